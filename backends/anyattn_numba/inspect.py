"""The weights themselves, and sums over them, in two passes over the keys of each item.

Plainly, for the queries of an item, with the state that `forward` has:

    for each chunk of keys that the schedule opens:
        largest, total = those of forward, without values
    for each chunk again:
        weights = exp(scores - largest) / total, 0 where hidden
        "weights": write them, row by row
        "stats":   key_mass += sum over lanes of weights
                   entropy  -= weights * (scores - largest - log(total))     (down the keys of each lane)
                   peak      = max(peak, weights)

A row with NaN or +inf at a seen key is NaN at all keys it sees, but 0 at hidden ones: for such rows, and no
others, masked chunks are asked what is seen. A row that saw nothing has total 0 and weights 0.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy
from numba import types

from anyattn_numba import arguments as a
from anyattn_numba.atomics import fetch_add
from anyattn_numba.blocks import NONE, WIDTH, next_item, steps, walker
from anyattn_numba.jit import carray, compiled, task
from anyattn_numba.memory import pointer, read_index, read_word, transpose_kernel, write_word
from anyattn_numba.microkernels import soften_kernel
from anyattn_numba.normalise import gather_kernel, normalise_kernel
from anyattn_numba.results import sink_joiner
from anyattn_numba.rows import writer
from anyattn_numba.target import Shape

__all__ = ["stats_kernel", "weights_kernel"]

ONE = numpy.int64(1)
# Words of a thread's memory beside WIDTH: which pass it is (0 or 1), whether a row of the item is NaN, and
# the row of key_mass that is added to.
_PASS, _UNDEFINED, _ROW = 8, 16, 24


def _two_passes(shape: Shape, dtype: str, take: Any) -> tuple[Any, Any, Any]:
    """(begin, walk, total_up), each of (block, item, scratch), for tasks to call.

    A walk in pass 1 calls take(block, item, scratch, first, columns, count) when the weights of these keys
    are where their scores were. At AT_SUMMARY are log(total) with the sink, entropy and peak.
    """
    lanes, size = shape.lanes, shape.itemsize
    kind = getattr(types, shape.element)
    step = steps(shape, dtype)
    load_scores, describe_tile = step.load_scores, step.describe_tile
    soften, normalise, join = soften_kernel(shape), normalise_kernel(shape), sink_joiner(shape)

    @compiled
    def hide(block: int, scratch: int, count: int) -> None:
        width = read_word(scratch + WIDTH)
        weights = carray(pointer(scratch + read_word(block + a.AT_SCORE)), count * width, kind)
        seen = carray(pointer(scratch + read_word(block + a.AT_SEEN)), count * width, kind)
        for n in range(count * width):
            if seen[n] == 0:
                weights[n] = 0

    @compiled
    def visit(block: int, item: int, scratch: int, first: int, columns: int, count: int, masked: int) -> None:
        load_scores(block, item, scratch, first, columns, count, masked)
        width = read_word(scratch + WIDTH)
        vectors, row = width // lanes, width * size
        scores = scratch + read_word(block + a.AT_SCORE)
        state = scratch + read_word(block + a.AT_STATE)
        factor = state + 3 * row
        if read_word(scratch + _PASS) == 0:
            soften(vectors, scores, count, state, state + row, state + 2 * row, factor)
            return
        summary = scratch + read_word(block + a.AT_SUMMARY)
        normalise(vectors, scores, count, state, factor, summary, summary + row)
        if masked != 0 and read_word(scratch + _UNDEFINED) != 0:
            describe_tile(block, item, scratch, first, columns, count, a.SEEN)
            hide(block, scratch, count)
        take(block, item, scratch, first, columns, count)

    walk = walker(visit)

    @compiled
    def total_up(block: int, item: int, scratch: int) -> None:
        """The factor of each lane, 0 for those without a query or weights, and an empty summary."""
        width, count = read_word(scratch + WIDTH), read_word(item + a.ITEM_COUNT)
        state = carray(pointer(scratch + read_word(block + a.AT_STATE)), (5, width), kind)
        summary = carray(pointer(scratch + read_word(block + a.AT_SUMMARY)), (3, width), kind)
        heads = carray(pointer(scratch + read_word(block + a.AT_LANES)), width, types.int64)
        undefined = NONE
        for lane in range(width):
            largest, total = state[0, lane], state[2, lane] if lane < count else kind(0)
            kept, top, total = join(block, heads[lane], largest, total)
            state[3, lane] = kind(0) if total == 0 else kept / total
            # Relative to the largest of the keys, as the weights are.
            summary[0, lane] = kind(0) if total == 0 else kind(math.log(total)) + (top - largest)
            summary[1, lane] = 0
            summary[2, lane] = 0
            if total != total:
                undefined = ONE
        write_word(scratch + _UNDEFINED, undefined)

    return step.begin, walk, total_up


@lru_cache
def weights_kernel(shape: Shape, dtype: str) -> Any:
    """The task that writes the weights of the rows of its items where the schedule opens keys."""
    lanes, size = shape.lanes, shape.itemsize
    transpose, write = transpose_kernel(shape.element, lanes), writer(dtype, shape.element)

    @compiled
    def take(block: int, item: int, scratch: int, first: int, columns: int, count: int) -> None:
        width = read_word(scratch + WIDTH)
        padded = (count + lanes - 1) // lanes * lanes
        weights, stage = scratch + read_word(block + a.AT_SCORE), scratch + read_word(block + a.AT_WEIGHTS)
        for n in range(0, padded, lanes):
            for lane in range(0, width, lanes):
                transpose(
                    weights + (n * width + lane) * size,
                    width * size,
                    stage + (lane * padded + n) * size,
                    padded * size,
                )
        q_len, step = read_word(block + a.Q_LEN), read_word(block + a.OUT_STEP)
        base = read_word(block + a.OUT) + read_word(
            read_word(block + a.OUT_BATCH) + 8 * read_word(item + a.ITEM_BATCH)
        )
        head = read_word(item + a.ITEM_HEAD) * read_word(block + a.GROUP_SIZE)
        for lane in range(read_word(item + a.ITEM_COUNT)):
            number = read_word(item + a.ITEM_FIRST) + lane
            target = base + (head + number // q_len) * read_word(block + a.OUT_HEAD)
            target += number % q_len * read_word(block + a.OUT_ROW)
            source = stage + lane * padded * size
            if columns == 0:
                write(source, count, 1.0, target + first * step, step)
            else:
                for n in range(count):
                    write(source + n * size, ONE, 1.0, target + read_index(columns + 4 * n) * step, step)

    begin, walk, total_up = _two_passes(shape, dtype, take)

    @task
    def weights(block: int, worker: int) -> int:
        scratch = read_word(block + a.SCRATCH) + worker * read_word(block + a.SCRATCH_SIZE)
        while True:
            item = next_item(block)
            if item == 0:
                return 0
            begin(block, item, scratch)
            for which in range(2):
                write_word(scratch + _PASS, which)
                walk(block, item, scratch)
                if which == 0:
                    total_up(block, item, scratch)

    return weights


@lru_cache
def stats_kernel(shape: Shape, dtype: str) -> Any:
    """The task that sums up the weights of runs of items.

    Sums over rows are in a fixed order: one thread takes the items of a run one after another and adds them
    to a row of key_mass that no other run adds to.
    """
    lanes, size = shape.lanes, shape.itemsize
    kind = getattr(types, shape.element)
    gather = gather_kernel(shape)

    @compiled
    def take(block: int, item: int, scratch: int, first: int, columns: int, count: int) -> None:
        width = read_word(scratch + WIDTH)
        weights, sums = scratch + read_word(block + a.AT_SCORE), scratch + read_word(block + a.AT_WEIGHTS)
        peak = scratch + read_word(block + a.AT_SUMMARY) + 2 * width * size
        gather(width // lanes, weights, count, sums, peak)
        mass = read_word(block + a.KEY_MASS)
        if mass == 0:
            return
        mass += read_word(scratch + _ROW) * read_word(block + a.K_LEN) * size
        found = carray(pointer(sums), count, kind)
        if columns == 0:
            row = carray(pointer(mass + first * size), count, kind)
            for n in range(count):
                row[n] += found[n]
        else:
            for n in range(count):
                carray(pointer(mass + read_index(columns + 4 * n) * size), 1, kind)[0] += found[n]

    begin, walk, total_up = _two_passes(shape, dtype, take)

    @compiled
    def finish(block: int, item: int, scratch: int) -> None:
        """Entropy and largest weight of the rows of an item."""
        width = read_word(scratch + WIDTH)
        summary = carray(pointer(scratch + read_word(block + a.AT_SUMMARY)), (3, width), kind)
        entropy, peak = read_word(block + a.ENTROPY), read_word(block + a.PEAK)
        q_len = read_word(block + a.Q_LEN)
        head = read_word(item + a.ITEM_BATCH) * read_word(block + a.NUM_HEADS)
        head += read_word(item + a.ITEM_HEAD) * read_word(block + a.GROUP_SIZE)
        for lane in range(read_word(item + a.ITEM_COUNT)):
            where = (head * q_len + read_word(item + a.ITEM_FIRST) + lane) * size
            if entropy != 0:
                carray(pointer(entropy + where), 1, kind)[0] = summary[1, lane]
            if peak != 0:
                carray(pointer(peak + where), 1, kind)[0] = summary[2, lane]

    @task
    def stats(block: int, worker: int) -> int:
        scratch = read_word(block + a.SCRATCH) + worker * read_word(block + a.SCRATCH_SIZE)
        while True:
            number = fetch_add(block + a.COUNTER, 1)
            if number >= read_word(block + a.NUM_RUNS):
                return 0
            run = read_word(block + a.RUNS) + number * (8 * a.RUN_WORDS)
            write_word(scratch + _ROW, read_word(run + a.RUN_ROW))
            for n in range(read_word(run + a.RUN_FIRST), read_word(run + a.RUN_END)):
                item = read_word(block + a.ITEMS) + n * (8 * a.ITEM_WORDS)
                begin(block, item, scratch)
                for which in range(2):
                    write_word(scratch + _PASS, which)
                    walk(block, item, scratch)
                    if which == 0:
                        total_up(block, item, scratch)
                finish(block, item, scratch)

    return stats
