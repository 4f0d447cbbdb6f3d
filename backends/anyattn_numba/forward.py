"""Attention of one item after another, in one pass over the keys with a running maximum and sum.

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
Plainly, for the queries of an item:

    for each chunk of keys that the schedule opens:
        scores = product, score code, -inf where hidden
        new = max(largest, scores)                    (down the keys of each lane)
        weights, factor = exp(scores - new), exp(largest - new)
        total = factor * total + sum of weights
        weights = keep code of weights                (dropout, which the total knows nothing of)
        out = factor * out + values^T weights
    out / total, and lse = largest + log(total)

A hidden key has the weight 0, and 0 * NaN is NaN: in a masked chunk values are looked at first, and where one
is not finite the sum runs over what is seen alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from anyattn_numba import arguments as a
from anyattn_numba.blocks import KEPT_BATCH, NONE, WIDTH, next_item, steps, walker
from anyattn_numba.jit import compiled, task
from anyattn_numba.memory import read_word, transpose_kernel, write_word
from anyattn_numba.microkernels import soften_kernel, weigh_kernel
from anyattn_numba.results import finisher
from anyattn_numba.rows import all_finite
from anyattn_numba.target import Shape

__all__ = ["forward_kernel"]


@lru_cache
def forward_kernel(shape: Shape, dtype: str, stored_dtype: str | None = None) -> Any:
    """The task (`anyattn_numba.threads.TASK`) that computes attention for arrays of a dtype.

    Keys and values are of the dtype of the queries, or of `stored_dtype` int8.
    """
    lanes, size, rows = shape.lanes, shape.itemsize, shape.rows
    step = steps(shape, dtype, stored_dtype)
    begin, load_scores, load_values = step.begin, step.load_scores, step.load_values
    describe_tile, weigh_seen = step.describe_tile, step.weigh_seen
    soften = soften_kernel(shape)
    weigh = weigh_kernel(shape, rows)
    weigh_four, weigh_one = weigh_kernel(shape, 4), weigh_kernel(shape, 1)
    finite = all_finite(shape.element)
    transpose = transpose_kernel(shape.element, lanes)
    finish = finisher(shape, dtype)

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
        if read_word(block + a.HAS_KEEP) != 0:
            describe_tile(block, item, scratch, first, columns, count, a.KEEP)
        values, stride = load_values(block, item, scratch, first, columns, count)
        v_head_dim = read_word(block + a.V_HEAD_DIM)
        if masked != 0 and not finite(values, stride, count, v_head_dim):
            describe_tile(block, item, scratch, first, columns, count, a.SEEN)
            weigh_seen(block, scratch, values, stride, count, width * size, size)
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
    def turn(block: int, scratch: int) -> int:
        """The sums with a row for each query, at the address that is returned."""
        v_head_dim, width = read_word(block + a.V_HEAD_DIM), read_word(scratch + WIDTH)
        padded = (v_head_dim + lanes - 1) // lanes * lanes
        stage: int = scratch + read_word(block + a.AT_STAGE)
        sums = scratch + read_word(block + a.AT_SUM)
        for c in range(0, padded, lanes):
            for lane in range(0, width, lanes):
                source = sums + (c * width + lane) * size
                transpose(source, width * size, stage + (lane * padded + c) * size, padded * size)
        return stage

    @task
    def forward(block: int, worker: int) -> int:
        scratch = read_word(block + a.SCRATCH) + worker * read_word(block + a.SCRATCH_SIZE)
        write_word(scratch + KEPT_BATCH, NONE - 1)
        while True:
            item = next_item(block)
            if item == 0:
                return 0
            begin(block, item, scratch)
            walk(block, item, scratch)
            finish(block, item, scratch, turn(block, scratch))

    return forward
