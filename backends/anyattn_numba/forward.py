"""Attention of one item after another, in one pass over the keys with a running maximum and sum.

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
Plainly, for the queries of an item:

    for each chunk of keys that the schedule opens:
        scores = product, score code, -inf where hidden
        new = max(largest, scores)                    (down the keys of each lane)
        weights, factor = exp(scores - new), exp(largest - new)
        total = factor * total + sum of weights
        out = factor * out + values^T weights
    out / total, and lse = largest + log(total)

A hidden key has the weight 0, and 0 * NaN is NaN: in a masked chunk values are looked at first, and where one
is not finite the sum runs over what is seen alone.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from numba import types

from anyattn_numba import arguments as a
from anyattn_numba.atomics import fetch_add
from anyattn_numba.blocks import WIDTH, steps, walker
from anyattn_numba.jit import carray, compiled
from anyattn_numba.memory import pointer, read_word, transpose_kernel
from anyattn_numba.microkernels import soften_kernel, weigh_kernel
from anyattn_numba.rows import all_finite, writer
from anyattn_numba.target import Shape

__all__ = ["forward_kernel"]


@lru_cache
def forward_kernel(shape: Shape, dtype: str) -> Any:
    """The task (`anyattn_numba.threads.TASK`) that computes attention for arrays of a dtype."""
    lanes, size, rows = shape.lanes, shape.itemsize, shape.rows
    kind = getattr(types, shape.element)
    step = steps(shape, dtype)
    begin, load_scores, load_values = step.begin, step.load_scores, step.load_values
    describe_tile = step.describe_tile
    soften = soften_kernel(shape)
    weigh = weigh_kernel(shape, rows)
    weigh_four, weigh_one = weigh_kernel(shape, 4), weigh_kernel(shape, 1)
    finite = all_finite(shape.element)
    transpose = transpose_kernel(shape.element, lanes)
    write = writer(dtype, shape.element)
    write_part = writer(shape.element, shape.element)

    @compiled
    def weigh_seen(scratch: int, block: int, values: int, stride: int, count: int) -> None:
        """The sum over what is seen alone, where a hidden value may be NaN or infinite."""
        v_head_dim, width = read_word(block + a.V_HEAD_DIM), read_word(scratch + WIDTH)
        state = carray(pointer(scratch + read_word(block + a.AT_STATE)), (5, width), kind)
        sums = carray(pointer(scratch + read_word(block + a.AT_SUM)), (v_head_dim, width), kind)
        weights = carray(pointer(scratch + read_word(block + a.AT_SCORE)), (count, width), kind)
        seen = carray(pointer(scratch + read_word(block + a.AT_SEEN)), (count, width), kind)
        for c in range(v_head_dim):
            for lane in range(width):
                sums[c, lane] *= state[3, lane]
            for n in range(count):
                value = carray(pointer(values + n * stride + c * size), 1, kind)[0]
                for lane in range(width):
                    if seen[n, lane] != 0:
                        sums[c, lane] += weights[n, lane] * value

    @compiled
    def visit(block: int, item: int, scratch: int, first: int, columns: int, count: int, masked: int) -> None:
        """Take some keys into the state."""
        load_scores(block, item, scratch, first, columns, count, masked)
        width = read_word(scratch + WIDTH)
        vectors = width // lanes
        weights = scratch + read_word(block + a.AT_SCORE)
        state = scratch + read_word(block + a.AT_STATE)
        factor = state + 3 * width * size
        soften(vectors, weights, count, state, state + width * size, state + 2 * width * size, factor)
        values, stride = load_values(block, item, scratch, first, columns, count)
        v_head_dim = read_word(block + a.V_HEAD_DIM)
        if masked != 0 and not finite(values, stride, count, v_head_dim):
            describe_tile(block, item, scratch, first, columns, count, a.SEEN)
            weigh_seen(scratch, block, values, stride, count)
            return
        sums = scratch + read_word(block + a.AT_SUM)
        c = 0
        while c + rows <= v_head_dim:
            weigh(vectors, values + c * size, stride, weights, count, factor, sums + c * width * size)
            c += rows
        if c + 4 <= v_head_dim:
            weigh_four(vectors, values + c * size, stride, weights, count, factor, sums + c * width * size)
            c += 4
        while c < v_head_dim:
            weigh_one(vectors, values + c * size, stride, weights, count, factor, sums + c * width * size)
            c += 1

    walk = walker(visit)

    @compiled
    def finish(block: int, item: int, scratch: int) -> None:
        """out / total in the dtype of the call, and lse."""
        v_head_dim = read_word(block + a.V_HEAD_DIM)
        width = read_word(scratch + WIDTH)
        padded = (v_head_dim + lanes - 1) // lanes * lanes
        stage, sums = scratch + read_word(block + a.AT_STAGE), scratch + read_word(block + a.AT_SUM)
        for c in range(0, padded, lanes):
            for lane in range(0, width, lanes):
                transpose(
                    sums + (c * width + lane) * size,
                    width * size,
                    stage + (lane * padded + c) * size,
                    padded * size,
                )
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
            total, source = state[2, lane], stage + lane * padded * size
            if total == 0:
                out = carray(pointer(source), v_head_dim, kind)
                for c in range(v_head_dim):
                    out[c] = 0
            factor = 1.0 if total == 0 else 1.0 / total
            target = base + h * read_word(block + a.OUT_HEAD) + row * read_word(block + a.OUT_ROW)
            if part < 0:
                write(source, v_head_dim, factor, target, read_word(block + a.OUT_STEP))
            else:
                write_part(source, v_head_dim, factor, target + part * read_word(block + a.PART_SIZE), size)
            if lse != 0:
                where = (max(part, 0) * read_word(block + a.PART_ROWS) + (b * heads + h) * q_len + row) * size
                value = kind(-math.inf) if total == 0 else state[0, lane] + kind(math.log(total))
                carray(pointer(lse + where), 1, kind)[0] = value
            row += 1

    @compiled
    def forward(block: int, worker: int) -> int:
        scratch = read_word(block + a.SCRATCH) + worker * read_word(block + a.SCRATCH_SIZE)
        while True:
            number = fetch_add(block + a.COUNTER, 1)
            if number >= read_word(block + a.NUM_ITEMS):
                return 0
            item = read_word(block + a.ITEMS) + number * (8 * a.ITEM_WORDS)
            begin(block, item, scratch)
            walk(block, item, scratch)
            finish(block, item, scratch)

    return forward
