"""The steps that all kernels share: the queries of an item, the keys it visits, and the scores of these.

`Steps` holds them compiled for one dtype. Plainly, for the queries of an
item and keys j of a chunk:

    query[d, lane] = scale * q[b, h, row, d]
    scores[j, lane] = sum over d of k[b, h // group_size, j, d] query[d, lane], then tile code
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
from numba import types

from anyattn.schedule import GATHERED, MASKED
from anyattn_numba import arguments as a
from anyattn_numba.atomics import fetch_add, invoke
from anyattn_numba.jit import carray, compiled
from anyattn_numba.memory import (
    pointer,
    read_byte,
    read_index,
    read_real,
    read_word,
    transpose_kernel,
    write_word,
)
from anyattn_numba.microkernels import largest_kernel, score_kernel
from anyattn_numba.rows import ITEMSIZE, reader
from anyattn_numba.target import Shape

__all__ = ["NONE", "WIDTH", "Steps", "next_item", "row_at", "scaler", "steps", "walker"]

# A zero of the type of all other arguments: Numba compiles a function anew for a literal.
NONE = numpy.int64(0)
# Where in a thread's memory the number of lanes of its item stands: whole vectors.
WIDTH = 0
# The batch entry and the head of the rows that a thread keeps converted.
KEPT_BATCH, KEPT_HEAD = 8, 16
# Where the first key stands that is visited after those of a visit, or one of these.
NEXT_KEY = 32


@dataclass(frozen=True)
class Steps:
    """Compiled steps.

    Attributes
    ----------
    begin(block, item, scratch)
        Load the queries, and set what is summed up over the keys to that of no key.
    load_queries(block, item, scratch)
        Fill the lanes (head, row and position of each query) and the scaled, transposed queries.
    load_keys(block, item, scratch, first, columns, count), load_values(...)
        (address, stride) of `count` rows from `first` on, or of those whose numbers are at `columns`: in
        place where they are contiguous numbers of the accumulation type, else converted.
    load_scores(block, item, scratch, first, columns, count, masked)
        Scores of these keys, and the largest of each lane so far.
    describe_tile(block, item, scratch, first, columns, count, action)
        Let tile code do something to the scores.
    weigh_seen(block, scratch, values, stride, count, of_channel, of_lane)
        Add values times weights to the sums, which are `of_lane` and `of_channel` bytes apart, of what is
        seen alone: where a hidden value may be NaN or infinite.
    """

    begin: Any
    load_queries: Any
    load_keys: Any
    load_values: Any
    load_scores: Any
    describe_tile: Any
    weigh_seen: Any


# Behind the address of an array of factors: the offsets of its batch entries.
BATCH = 8
# Behind the offsets of the batch entries: strides of heads, rows and numbers.
HEAD, ROW, STEP = 8, 16, 24


@compiled
def lesser(x: int, y: int) -> int:
    """The lesser of two. Numba makes machine code of `min` and `max`, which takes 40 ms each."""
    return x if x < y else y


@compiled
def next_item(block: int) -> int:
    """The address of an item that no thread has taken, or 0 where none is left."""
    number = fetch_add(block + a.COUNTER, 1)
    if number >= read_word(block + a.NUM_ITEMS):
        return 0
    item: int = read_word(block + a.ITEMS) + number * (8 * a.ITEM_WORDS)
    return item


@compiled
def row_at(block: int, item: int, base: int, strides: int, row: int) -> int:
    """The address of a row of the item's key/value head, of keys or values."""
    at: int = read_word(block + base)
    at += read_word(read_word(block + strides) + 8 * read_word(item + a.ITEM_BATCH))
    at += read_word(item + a.ITEM_HEAD) * read_word(block + strides + HEAD)
    at += row * read_word(block + strides + ROW)
    return at


@compiled
def flags_of(block: int) -> int:
    """Bytes that say of a head's keys which are converted."""
    flags: int = (read_word(block + a.K_LEN) + a.WIDENED - 1) // a.WIDENED
    return flags


@compiled
def forget(block: int, item: int, scratch: int) -> None:
    """Drop the rows that a thread keeps converted, if they are not those of an item's head."""
    batch, head = read_word(item + a.ITEM_BATCH), read_word(item + a.ITEM_HEAD)
    if read_word(scratch + KEPT_BATCH) == batch and read_word(scratch + KEPT_HEAD) == head:
        return
    write_word(scratch + KEPT_BATCH, batch)
    write_word(scratch + KEPT_HEAD, head)
    number = 2 * flags_of(block)
    there = carray(pointer(scratch + read_word(block + a.AT_WIDENED)), number, types.uint8)
    for n in range(number):
        there[n] = 0


@compiled
def scale_at(block: int, item: int, scales: int, row: int) -> float:
    """The factor of an int8 row of the item's key/value head; `scales` is K_SCALES or V_SCALES."""
    at = row_at(block, item, scales, scales + BATCH, row)
    found: float = carray(pointer(at), 1, types.float32)[0]
    return found


@compiled
def no_scale(block: int, item: int, scales: int, row: int) -> float:
    """The factor of any other row."""
    return 1.0


@lru_cache
def steps(shape: Shape, dtype: str, stored_dtype: str | None = None) -> Steps:
    """The steps for queries of a dtype, and keys and values of that or of `stored_dtype` int8."""
    stored_dtype = stored_dtype or dtype
    lanes, size, rows = shape.lanes, shape.itemsize, shape.rows
    read, read_stored = reader(dtype, shape.element), reader(stored_dtype, shape.element)
    factor_of = scale_at if stored_dtype == "int8" else no_scale
    transpose = transpose_kernel(shape.element, lanes)
    score, score_one = score_kernel(shape, rows), score_kernel(shape, 1)
    largest_of = largest_kernel(shape)
    in_place = stored_dtype == shape.element
    stored = ITEMSIZE[stored_dtype]
    kind = getattr(types, shape.element)

    @compiled
    def load_queries(block: int, item: int, scratch: int) -> None:
        b, head = read_word(item + a.ITEM_BATCH), read_word(item + a.ITEM_HEAD)
        first, count = read_word(item + a.ITEM_FIRST), read_word(item + a.ITEM_COUNT)
        width = (count + lanes - 1) // lanes * lanes
        write_word(scratch + WIDTH, width)
        q_len, group = read_word(block + a.Q_LEN), read_word(block + a.GROUP_SIZE)
        where = read_word(block + a.ROWS)
        position = read_word(read_word(block + a.OFFSETS) + 8 * b)
        head_dim = read_word(block + a.HEAD_DIM)
        scale = read_real(block + a.SCALE)
        base = read_word(block + a.Q) + read_word(read_word(block + a.Q_BATCH) + 8 * b)
        table = scratch + read_word(block + a.AT_LANES)
        stage = scratch + read_word(block + a.AT_STAGE)
        padded = (head_dim + lanes - 1) // lanes * lanes
        # Counted on: a division takes some 20 cycles.
        h, number = head * group + first // q_len, first % q_len
        for lane in range(width):
            if number == q_len:
                h, number = h + 1, 0
            row = read_word(where + 8 * number) if where else number
            write_word(table + 8 * lane, h)
            write_word(table + 8 * (width + lane), row)
            write_word(table + 8 * (2 * width + lane), row + position)
            target = stage + lane * padded * size
            if lane < count:
                source = base + h * read_word(block + a.Q_HEAD) + row * read_word(block + a.Q_ROW)
                read(source, read_word(block + a.Q_STEP), head_dim, scale, target)
            else:
                empty = carray(pointer(target), padded, kind)
                for n in range(padded):
                    empty[n] = 0
            # Lanes without a query repeat the last one's indices, so that tile code reads nothing beyond.
            if lane + 1 < count:
                number += 1
        query = scratch + read_word(block + a.AT_QUERY)
        for d in range(0, padded, lanes):
            for lane in range(0, width, lanes):
                transpose(
                    stage + (lane * padded + d) * size,
                    padded * size,
                    query + (d * width + lane) * size,
                    width * size,
                )

    @compiled
    def begin(block: int, item: int, scratch: int) -> None:
        """largest = -inf, total = 0, out = 0."""
        load_queries(block, item, scratch)
        if read_word(block + a.AT_WIDENED) != 0:
            forget(block, item, scratch)
        width = read_word(scratch + WIDTH)
        state = carray(pointer(scratch + read_word(block + a.AT_STATE)), (5, width), kind)
        sums = carray(
            pointer(scratch + read_word(block + a.AT_SUM)), read_word(block + a.V_HEAD_DIM) * width, kind
        )
        for lane in range(width):
            state[0, lane] = -math.inf
            state[1, lane] = -math.inf
            state[2, lane] = 0
        for n in range(len(sums)):
            sums[n] = 0

    @compiled
    def rows_of(
        block: int,
        item: int,
        base: int,
        strides: int,
        scales: int,
        length: int,
        room: int,
        wide: int,
        done: int,
        first: int,
        columns: int,
        count: int,
    ) -> Any:
        step = read_word(block + strides + STEP)
        if in_place and step == stored and columns == 0:
            return row_at(block, item, base, strides, first), read_word(block + strides + ROW)
        start, stride = row_at(block, item, base, strides, NONE), read_word(block + strides + ROW)
        if columns == 0 and done != 0:
            for n in range(first // a.WIDENED, (first + count - 1) // a.WIDENED + 1):
                there = carray(pointer(done + n), 1, types.uint8)
                if there[0] == 0:
                    for j in range(n * a.WIDENED, lesser((n + 1) * a.WIDENED, read_word(block + a.K_LEN))):
                        factor = factor_of(block, item, scales, j)
                        read_stored(start + j * stride, step, length, factor, wide + j * length * size)
                    there[0] = 1
            return wide + first * length * size, length * size
        for n in range(count):
            j = read_index(columns + 4 * n) if columns else first + n
            factor = factor_of(block, item, scales, j)
            read_stored(start + j * stride, step, length, factor, room + n * length * size)
        return room, length * size

    @compiled
    def load_keys(block: int, item: int, scratch: int, first: int, columns: int, count: int) -> Any:
        length, room = read_word(block + a.HEAD_DIM), scratch + read_word(block + a.AT_KEYS)
        wide, done = scratch + read_word(block + a.AT_WIDE_KEYS), read_word(block + a.AT_WIDENED)
        done += scratch if done != 0 else 0
        return rows_of(
            block, item, a.K, a.K_BATCH, a.K_SCALES, length, room, wide, done, first, columns, count
        )

    @compiled
    def load_values(block: int, item: int, scratch: int, first: int, columns: int, count: int) -> Any:
        length, room = read_word(block + a.V_HEAD_DIM), scratch + read_word(block + a.AT_VALUES)
        wide, done = scratch + read_word(block + a.AT_WIDE_VALUES), read_word(block + a.AT_WIDENED)
        done += scratch + flags_of(block) if done != 0 else 0
        return rows_of(
            block, item, a.V, a.V_BATCH, a.V_SCALES, length, room, wide, done, first, columns, count
        )

    @compiled
    def describe_tile(
        block: int, item: int, scratch: int, first: int, columns: int, count: int, action: int
    ) -> None:
        tile, width = scratch + read_word(block + a.AT_TILE), read_word(scratch + WIDTH)
        write_word(tile + a.TILE_SCORES, scratch + read_word(block + a.AT_SCORE))
        write_word(tile + a.TILE_KEYS, count)
        write_word(tile + a.TILE_FIRST, first)
        write_word(tile + a.TILE_COLUMNS, columns)
        write_word(tile + a.TILE_BATCH, read_word(item + a.ITEM_BATCH))
        write_word(tile + a.TILE_LANES, scratch + read_word(block + a.AT_LANES))
        write_word(tile + a.TILE_WIDTH, width)
        write_word(tile + a.TILE_ROW_VALUES, tile + 8 * a.TILE_WORDS)
        write_word(tile + a.TILE_CAPTURED, read_word(block + a.CAPTURED))
        write_word(tile + a.TILE_ACTION, action)
        write_word(tile + a.TILE_SEEN, scratch + read_word(block + a.AT_SEEN))
        invoke(read_word(block + a.TILE_CODE), tile, 0)

    @compiled
    def load_scores(
        block: int, item: int, scratch: int, first: int, columns: int, count: int, masked: int
    ) -> None:
        keys, stride = load_keys(block, item, scratch, first, columns, count)
        query, head_dim = scratch + read_word(block + a.AT_QUERY), read_word(block + a.HEAD_DIM)
        scores = scratch + read_word(block + a.AT_SCORE)
        state = scratch + read_word(block + a.AT_STATE)
        width = read_word(scratch + WIDTH)
        vectors = width // lanes
        coded = masked != 0 or read_word(block + a.HAS_SCORE) != 0
        # Raw scores have no part in the maximum where tile code changes them; the last state is free then.
        largest = state + (4 if coded else 1) * width * size
        values, value_stride = keys, stride
        if in_place and columns == 0 and read_word(block + a.V_STEP) == stored:
            values, value_stride = row_at(block, item, a.V, a.V_BATCH, first), read_word(block + a.V_ROW)
        n = 0
        while n < count:
            if n + rows > count and count >= rows:
                # The last keys once more with some before them: the same scores again.
                n = count - rows
            here, to, beside = keys + n * stride, scores + n * width * size, values + n * value_stride
            if n + rows <= count:
                score(vectors, here, stride, query, head_dim, to, largest, beside, value_stride)
                n += rows
            else:
                score_one(vectors, here, stride, query, head_dim, to, largest, beside, value_stride)
                n += 1
        if coded:
            describe_tile(
                block, item, scratch, first, columns, count, a.SCORE_AND_HIDE if masked else a.SCORE
            )
            largest_of(vectors, scores, count, state + width * size)

    @compiled
    def weigh_seen(
        block: int, scratch: int, values: int, stride: int, count: int, of_channel: int, of_lane: int
    ) -> None:
        width = read_word(scratch + WIDTH)
        state = carray(pointer(scratch + read_word(block + a.AT_STATE)), (5, width), kind)
        weights = carray(pointer(scratch + read_word(block + a.AT_SCORE)), (count, width), kind)
        seen = carray(pointer(scratch + read_word(block + a.AT_SEEN)), (count, width), kind)
        sums = scratch + read_word(block + a.AT_SUM)
        for c in range(read_word(block + a.V_HEAD_DIM)):
            for lane in range(width):
                at = carray(pointer(sums + c * of_channel + lane * of_lane), 1, kind)
                total = at[0] * state[3, lane]
                for n in range(count):
                    if seen[n, lane] != 0:
                        value = carray(pointer(values + n * stride + c * size), 1, kind)[0]
                        total += weights[n, lane] * value
                at[0] = total

    return Steps(begin, load_queries, load_keys, load_values, load_scores, describe_tile, weigh_seen)


@lru_cache
def scaler(shape: Shape, stored_dtype: str, numbers: int) -> Any:
    """scale(block, item, scales, first, count, table): so many numbers of each key times the key's factor.

    It does nothing where rows have no factors.
    """
    kind = getattr(types, shape.element)

    @compiled
    def leave(block: int, item: int, scales: int, first: int, count: int, table: int) -> None:
        pass

    @compiled
    def scale(block: int, item: int, scales: int, first: int, count: int, table: int) -> None:
        at = row_at(block, item, scales, scales + BATCH, first)
        stride = read_word(block + scales + BATCH + ROW)
        rows = carray(pointer(table), (count, numbers), kind)
        for n in range(count):
            factor = kind(carray(pointer(at + n * stride), 1, types.float32)[0])
            for number in range(numbers):
                rows[n, number] *= factor

    return scale if stored_dtype == "int8" else leave


def walker(visit: Any) -> Any:
    """walk(block, item, scratch), which visits what the schedule opens, within the keys of the item.

    visit(block, item, scratch, first, columns, count, masked) takes up to a chunk of keys: those from `first`
    on, or those whose numbers are at the address `columns`; all are seen where `masked` is 0.
    """

    @compiled
    def visit_all(
        block: int, item: int, scratch: int, first: int, end: int, columns: int, masked: int, after: int
    ) -> None:
        chunk = read_word(block + a.CHUNK)
        for start in range(first, end, chunk):
            count = lesser(chunk, end - start)
            write_word(scratch + NEXT_KEY, start + chunk if start + chunk < end else after)
            visit(block, item, scratch, start, columns + 4 * start if columns else NONE, count, masked)

    @compiled
    def walk(block: int, item: int, scratch: int) -> None:
        first, end = read_word(item + a.ITEM_KEY), read_word(item + a.ITEM_KEY_END)
        line = read_word(item + a.ITEM_LINE)
        starts, ends = read_word(block + a.SPAN_STARTS), read_word(block + a.SPAN_ENDS)
        kinds, columns = read_word(block + a.SPAN_KINDS), read_word(block + a.COLUMNS)
        span, last = NONE, NONE + 1
        if line >= 0:
            span, last = read_word(starts + 8 * line), read_word(starts + 8 * line + 8)
        for n in range(span, last):
            low, high, masked, at = first, end, NONE, NONE
            if line >= 0:
                kind_of = read_byte(kinds + n)
                low, high = read_word(ends + 16 * n), read_word(ends + 16 * n + 8)
                masked = kind_of & MASKED
                if not kind_of & GATHERED:
                    low, high = -lesser(-low, -first), lesser(high, end)
                elif read_word(item + a.ITEM_PART) <= 0:
                    at = columns
                else:
                    # The first item of a row that is split gathers its columns.
                    high = low
            after = read_word(ends + 16 * n + 16) if n + 1 < last else low
            visit_all(block, item, scratch, low, high, at, masked, after)

    return walk
