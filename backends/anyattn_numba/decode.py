"""Attention of items with few queries, on the products of `narrow`: what `forward` does, otherwise.

Keys and values are read as they are stored, 16-bit and int8 numbers too, but for chunks that are masked or
gathered, which are converted first: there values are looked at, and a hidden one that is not finite left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import types

from anyattn_numba import arguments as a
from anyattn_numba.blocks import NEXT_KEY, next_item, row_at, scaler, steps, walker
from anyattn_numba.jit import carray, compiled, task
from anyattn_numba.memory import pointer, read_word
from anyattn_numba.microkernels import largest_kernel, soften_kernel
from anyattn_numba.narrow import QUERIES, narrow_score_kernel, narrow_soften_kernel, narrow_weigh_kernel
from anyattn_numba.results import finisher
from anyattn_numba.rows import ITEMSIZE, all_finite
from anyattn_numba.target import Shape

__all__ = ["decode_kernel"]


@lru_cache
def decode_kernel(shape: Shape, dtype: str, stored_dtype: str | None = None) -> Any:
    """The task that computes attention of few queries; one vector of lanes holds them.

    Keys and values are of the dtype of the queries, or of `stored_dtype` int8.
    """
    stored_dtype = stored_dtype or dtype
    lanes, size = shape.lanes, shape.itemsize
    kind = getattr(types, shape.element)
    step = steps(shape, dtype, stored_dtype)
    begin, load_keys, load_values = step.begin, step.load_keys, step.load_values
    describe_tile, weigh_seen = step.describe_tile, step.weigh_seen
    soften, largest_of = soften_kernel(shape), largest_kernel(shape)
    soften_packed = narrow_soften_kernel(shape)
    # float16 has no conversion that every target knows: it is read converted.
    raw_dtype = shape.element if stored_dtype == "float16" else stored_dtype
    in_place = raw_dtype == stored_dtype
    scale, scale_packed = scaler(shape, stored_dtype, lanes), scaler(shape, stored_dtype, QUERIES)
    raw_size = ITEMSIZE[raw_dtype]
    together = lanes // QUERIES
    score, score_one = (
        narrow_score_kernel(shape, shape.element, together),
        narrow_score_kernel(shape, shape.element, 1),
    )
    weigh = narrow_weigh_kernel(shape, shape.element)
    score_raw = narrow_score_kernel(shape, raw_dtype, together)
    score_raw_one = narrow_score_kernel(shape, raw_dtype, 1)
    weigh_raw = narrow_weigh_kernel(shape, raw_dtype)
    finite = all_finite(shape.element)
    finish = finisher(shape, dtype)

    @compiled
    def visit(block: int, item: int, scratch: int, first: int, columns: int, count: int, masked: int) -> None:
        head_dim, v_head_dim = read_word(block + a.HEAD_DIM), read_word(block + a.V_HEAD_DIM)
        raw = in_place and masked == 0 and columns == 0
        raw = raw and read_word(block + a.K_STEP) == raw_size and read_word(block + a.V_STEP) == raw_size
        if raw:
            keys, stride = row_at(block, item, a.K, a.K_BATCH, first), read_word(block + a.K_ROW)
            values, value_stride = row_at(block, item, a.V, a.V_BATCH, first), read_word(block + a.V_ROW)
            coming = row_at(block, item, a.K, a.K_BATCH, read_word(scratch + NEXT_KEY))
        else:
            keys, stride = load_keys(block, item, scratch, first, columns, count)
            values, value_stride = load_values(block, item, scratch, first, columns, count)
            coming = keys
        query = scratch + read_word(block + a.AT_STAGE)
        scores, state = scratch + read_word(block + a.AT_SCORE), scratch + read_word(block + a.AT_STATE)
        queries = read_word(item + a.ITEM_COUNT)
        long = head_dim * size
        # Scores that nothing but the softmax asks for lie side by side.
        packed = raw and read_word(block + a.HAS_SCORE) == 0 and read_word(block + a.HAS_KEEP) == 0
        pitch, apart = (QUERIES * size, (count + together) * size) if packed else (lanes * size, size)
        for q in range(0, queries, QUERIES):
            rows, out = query + q * long, scores + q * apart
            n = 0
            while n < count:
                here, to = keys + n * stride, out + n * pitch
                beside = values + n * value_stride
                whole = n + together <= count
                if raw and whole:
                    score_raw(here, stride, rows, long, head_dim, to, pitch, beside, value_stride)
                elif raw:
                    score_raw_one(here, stride, rows, long, head_dim, to, pitch, beside, value_stride)
                elif whole:
                    score(here, stride, rows, long, head_dim, to, pitch, beside, value_stride)
                else:
                    score_one(here, stride, rows, long, head_dim, to, pitch, beside, value_stride)
                n += together if whole else 1
        sums, wide = scratch + read_word(block + a.AT_SUM), v_head_dim * size
        largest, total, factor = state + lanes * size, state + 2 * lanes * size, state + 3 * lanes * size
        if packed:
            for q in range(0, queries, QUERIES):
                rows, of, out = scores + q * apart, q * size, sums + q * wide
                scale_packed(block, item, a.K_SCALES, first, count, rows)
                soften_packed(rows, count, state + of, largest + of, total + of, factor + of)
                scale_packed(block, item, a.V_SCALES, first, count, rows)
                decay = factor + of
                weigh_raw(
                    values, value_stride, v_head_dim, rows, pitch, count, decay, out, wide, coming, stride
                )
            return
        if raw:
            scale(block, item, a.K_SCALES, first, count, scores)
        if masked != 0 or read_word(block + a.HAS_SCORE) != 0:
            describe_tile(
                block, item, scratch, first, columns, count, a.SCORE_AND_HIDE if masked else a.SCORE
            )
        largest_of(1, scores, count, largest)
        soften(1, scores, count, state, largest, total, factor)
        if read_word(block + a.HAS_KEEP) != 0:
            describe_tile(block, item, scratch, first, columns, count, a.KEEP)
        if masked != 0 and not finite(values, value_stride, count, v_head_dim):
            describe_tile(block, item, scratch, first, columns, count, a.SEEN)
            weigh_seen(block, scratch, values, value_stride, count, size, v_head_dim * size)
            return
        if raw:
            scale(block, item, a.V_SCALES, first, count, scores)
        for q in range(0, queries, QUERIES):
            rows, out, decay = scores + q * size, sums + q * wide, factor + q * size
            if raw:
                weigh_raw(
                    values, value_stride, v_head_dim, rows, pitch, count, decay, out, wide, coming, stride
                )
            else:
                weigh(values, value_stride, v_head_dim, rows, pitch, count, decay, out, wide, coming, stride)

    walk = walker(visit)

    @task
    def decode(block: int, worker: int) -> int:
        scratch = read_word(block + a.SCRATCH) + worker * read_word(block + a.SCRATCH_SIZE)
        # Lanes without a query hold no score; what they hold must be a number.
        empty = carray(
            pointer(scratch + read_word(block + a.AT_SCORE)), read_word(block + a.CHUNK) * lanes, kind
        )
        for n in range(len(empty)):
            empty[n] = 0
        while True:
            item = next_item(block)
            if item == 0:
                return 0
            begin(block, item, scratch)
            walk(block, item, scratch)
            finish(block, item, scratch, scratch + read_word(block + a.AT_SUM))

    return decode
