"""The end of an item, and the parts of a row that was split between items put together again.

out = sums / total, lse = largest + log(total); a row that saw nothing gives 0 and -inf
of parts p: lse = log(sum of exp(lse_p)), out = sum of exp(lse_p - lse) out_p
with a sink, at the end: total += exp(sink - largest); a row that saw nothing gives 0 and the sink
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy
from numba import types

from anyattn_numba import arguments as a
from anyattn_numba.atomics import fetch_add
from anyattn_numba.blocks import WIDTH
from anyattn_numba.jit import carray, compiled, task
from anyattn_numba.memory import pointer, read_word
from anyattn_numba.rows import writer
from anyattn_numba.target import Shape

__all__ = ["combine_kernel", "finisher", "sink_joiner"]


@lru_cache
def sink_joiner(shape: Shape) -> Any:
    """join(block, head, largest, total): (kept, top, total) with the head's sink in the denominator.

    The largest of all is `top`, what `total` is relative to, and `kept` is exp(largest - top). The total of a
    row that saw nothing stays 0, and its top is the sink, of whatever value that is, or -inf without one.
    """
    size = shape.itemsize
    kind = getattr(types, shape.element)

    @compiled
    def join(block: int, head: int, largest: float, total: float) -> Any:
        sinks = read_word(block + a.SINKS)
        if sinks == 0:
            return kind(1), largest, total
        sink = carray(pointer(sinks + size * head), 1, kind)[0]
        if total == 0 or sink == -math.inf:
            return kind(1), sink if total == 0 else largest, total
        # Not a number where the sink is not.
        top = largest if largest > sink else sink
        kept = kind(math.exp(largest - top))
        return kept, top, total * kept + kind(math.exp(sink - top))

    return join


@lru_cache
def finisher(shape: Shape, dtype: str) -> Any:
    """finish(block, item, scratch, sums): out and lse of the queries of an item.

    `sums` has a row for each lane, which is as long as whole vectors. A part of a split row is kept in the
    accumulation type, part after part at OUT and LSE.
    """
    lanes, size = shape.lanes, shape.itemsize
    kind = getattr(types, shape.element)
    write, write_part = writer(dtype, shape.element), writer(shape.element, shape.element)
    join = sink_joiner(shape)
    # Of the type of a stride that is read: Numba compiles a function anew for a literal.
    step = numpy.int64(size)

    @compiled
    def finish(block: int, item: int, scratch: int, sums: int) -> None:
        v_head_dim, width = read_word(block + a.V_HEAD_DIM), read_word(scratch + WIDTH)
        padded = (v_head_dim + lanes - 1) // lanes * lanes
        state = carray(pointer(scratch + read_word(block + a.AT_STATE)), (5, width), kind)
        b, head = read_word(item + a.ITEM_BATCH), read_word(item + a.ITEM_HEAD)
        first, q_len = read_word(item + a.ITEM_FIRST), read_word(block + a.Q_LEN)
        heads = read_word(block + a.NUM_HEADS)
        lse, part = read_word(block + a.LSE), read_word(item + a.ITEM_PART)
        base = read_word(block + a.OUT) + read_word(read_word(block + a.OUT_BATCH) + 8 * b)
        h, row = head * read_word(block + a.GROUP_SIZE) + first // q_len, first % q_len
        for lane in range(read_word(item + a.ITEM_COUNT)):
            if row == q_len:
                h, row = h + 1, 0
            kept, top, total, source = kind(1), state[0, lane], state[2, lane], sums + lane * padded * size
            if part < 0:
                kept, top, total = join(block, h, top, total)
            if total == 0:
                out = carray(pointer(source), v_head_dim, kind)
                for c in range(v_head_dim):
                    out[c] = 0
            factor = 1.0 if total == 0 else kept / total
            number = (b * heads + h) * q_len + row
            if part < 0:
                target = base + h * read_word(block + a.OUT_HEAD) + row * read_word(block + a.OUT_ROW)
                write(source, v_head_dim, factor, target, read_word(block + a.OUT_STEP))
            else:
                number += part * read_word(block + a.NUM_ROWS)
                target = read_word(block + a.PARTS) + number * v_head_dim * size
                write_part(source, v_head_dim, factor, target, step)
            sums_to = lse if part < 0 else read_word(block + a.PART_LSE)
            if sums_to != 0:
                value = top if total == 0 else top + kind(math.log(total))
                carray(pointer(sums_to + number * size), 1, kind)[0] = value
            row += 1

    return finish


@lru_cache
def combine_kernel(shape: Shape, dtype: str) -> Any:
    """The task that merges the parts of each row; an item is a row."""
    size = shape.itemsize
    kind = getattr(types, shape.element)
    write, join = writer(dtype, shape.element), sink_joiner(shape)

    @task
    def combine(block: int, worker: int) -> int:
        rows, parts = read_word(block + a.NUM_ROWS), read_word(block + a.NUM_PARTS)
        v_head_dim, q_len = read_word(block + a.V_HEAD_DIM), read_word(block + a.Q_LEN)
        heads, lse = read_word(block + a.NUM_HEADS), read_word(block + a.LSE)
        part_lse = carray(pointer(read_word(block + a.PART_LSE)), (parts, rows), kind)
        part_out = carray(pointer(read_word(block + a.PARTS)), (parts, rows, v_head_dim), kind)
        while True:
            n = fetch_add(block + a.COUNTER, 1)
            if n >= rows:
                return 0
            largest = kind(-math.inf)
            for p in range(parts):
                largest = max(largest, part_lse[p, n])
            base = kind(0) if largest == -math.inf else largest
            total = kind(0)
            for p in range(parts):
                total += math.exp(part_lse[p, n] - base)
            b, h, row = n // q_len // heads, n // q_len % heads, n % q_len
            kept, top, total = join(block, h, largest, total)
            for p in range(parts):
                weight = kind(0) if total == 0 else kept * kind(math.exp(part_lse[p, n] - base)) / total
                for c in range(v_head_dim):
                    # The first part's place takes the sum. A part that saw nothing is 0, whatever lse is.
                    part_out[0, n, c] = weight * part_out[p, n, c] + (part_out[0, n, c] if p else kind(0))
            target = read_word(block + a.OUT) + read_word(read_word(block + a.OUT_BATCH) + 8 * b)
            target += h * read_word(block + a.OUT_HEAD) + row * read_word(block + a.OUT_ROW)
            source = read_word(block + a.PARTS) + n * v_head_dim * size
            write(source, v_head_dim, 1.0, target, read_word(block + a.OUT_STEP))
            if lse != 0:
                found = top if total == 0 else top + kind(math.log(total))
                carray(pointer(lse + n * size), 1, kind)[0] = found

    return combine
