"""From the description of a call of `linear_attention` to an argument block and strands, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy

from anyattn.arrays import Array, cast, exactly
from anyattn.linear.call import LinearCall
from anyattn_numba import linear_forward as a
from anyattn_numba.engine import run, scratch
from anyattn_numba.hostarrays import address_of, as_numpy, empty_like, from_numpy
from anyattn_numba.kernels import kernel_address, shape_for
from anyattn_numba.thread_count import thread_count

__all__ = ["linear"]

NDArray = numpy.ndarray[Any, Any]

# Products that another thread is worth: entering it takes microseconds, waking it up some tens.
_WORK_FOR_THREADS = 1 << 22


def linear(call: LinearCall) -> tuple[Array, Array, Array | None]:
    """(out, state, normalizer) of a call."""
    q, k, v, dtype = _tensors(call)
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    out = empty_like(v.dtype, shape, call.layout == "blhd" and call.has_heads, call.library)
    before, after = _states(call)
    strands = _strands(call, (q, k, v, out), before, after)
    if len(strands) and after.shape[-1]:
        _run(call, (q, k, v, out), strands, dtype)
    rows = from_numpy(out, call.v, call.library)
    with exactly(call.v):
        rows = cast(call.xp, rows, call.v.dtype)
    parts = (after[..., :-1], after[..., -1]) if call.normalize else (after,)
    states = [from_numpy(numpy.ascontiguousarray(x), call.v, call.library) for x in parts]
    return rows, states[0], states[1] if call.normalize else None


def _tensors(call: LinearCall) -> tuple[NDArray, NDArray, NDArray, str]:
    """q, k and v with all batch axes, and their dtype; features are made for all tokens at once."""
    tensors = [call.q, call.k, call.v]
    dtype = call.dtype
    if call.feature_map != "identity" or call.q.dtype != call.v.dtype:
        dtype, wide = call.accumulate, getattr(call.xp, call.accumulate)
        with exactly(call.v):
            q, k, v = (cast(call.xp, x, wide) for x in tensors)
            tensors = [call.mapped(q), call.mapped(k), v]
    q, k, v = (as_numpy(x, call.library) for x in tensors)
    q, k, v = (numpy.broadcast_to(x, (*call.batch_shape, *x.shape[-3:])) for x in (q, k, v))
    return q, k, v, dtype


def _states(call: LinearCall) -> tuple[NDArray | None, NDArray]:
    """The states before and after, (..., Hkv, F, Dv) and one more column with the normalizer."""
    sequences = () if call.cu_seqlens is None else (call.num_sequences,)
    lead = (*call.batch_shape, *sequences, call.num_kv_heads, call.head_dim)
    after = numpy.empty((*lead, call.v_head_dim + call.normalize), call.accumulate)
    if call.state is None:
        return None, after
    before = numpy.empty_like(after)
    before[..., : call.v_head_dim] = as_numpy(call.state, call.library)
    if call.normalizer is not None:
        before[..., -1] = as_numpy(call.normalizer, call.library)
    return before, after


def _strands(
    call: LinearCall, tensors: tuple[NDArray, ...], before: NDArray | None, after: NDArray
) -> NDArray:
    """The words of every strand, (strands, STRAND_WORDS)."""
    q, k, v, out = tensors
    bounds = numpy.array([0, call.k_len]) if call.cu_seqlens_host is None else call.cu_seqlens_host
    packed, count = call.cu_seqlens is not None, len(bounds) - 1
    heads = (*call.batch_shape, count, call.num_kv_heads)
    words = numpy.zeros((*heads, a.STRAND_WORDS), numpy.int64)
    group = call.group_size
    for place, x, step in ((0, q, group), (1, k, 1), (2, v, 1), (3, out, group)):
        strides = (*x.strides[:-3], x.strides[-2], step * x.strides[-3])
        starts = [numpy.arange(n) for n in heads]
        starts[-2] = bounds[:-1].astype(numpy.int64)
        grid = numpy.meshgrid(*starts, indexing="ij", sparse=True)
        words[..., place] = address_of(x) + sum(
            axis * stride for axis, stride in zip(grid, strides, strict=True)
        )
    states = numpy.arange(math.prod(heads)).reshape(heads) * (math.prod(after.shape[-2:]) * after.itemsize)
    words[..., 4] = 0 if before is None else address_of(before) + states
    words[..., 5] = address_of(after) + states
    lengths = numpy.diff(bounds)[:, None]
    words[..., 6] = lengths if packed else call.q_len
    words[..., 7] = lengths
    return words.reshape(-1, a.STRAND_WORDS)


def _run(call: LinearCall, tensors: tuple[NDArray, ...], strands: NDArray, dtype: str) -> None:
    q, k, v, out = tensors
    shape = shape_for(call.accumulate)
    dim, columns, most = call.head_dim, call.v_head_dim + call.normalize, shape.queries
    wide, wide_columns = (-(-n // shape.lanes) * shape.lanes for n in (dim, columns))
    block = numpy.zeros(a.BLOCK_WORDS, numpy.int64)

    def put(place: int, value: int) -> None:
        block[place // 8] = value

    size = 0
    for place, numbers in (
        (a.AT_KEYS, most * dim),
        (a.AT_VALUES, most * wide_columns),
        (a.AT_STATE, dim * wide_columns),
        (a.AT_QUERY, most * wide),
        (a.AT_STAGE, most * max(wide, wide_columns)),
        (a.AT_SCORE, most * most),
        (a.AT_SUM, most * wide_columns),
        (a.AT_ONES, most),
    ):
        put(place, size)
        size += -(-numbers * shape.itemsize // 64) * 64
    products = call.k_len * call.num_heads * (dim + most) * columns * math.prod(call.batch_shape)
    number = 1 if products < _WORK_FOR_THREADS else max(1, min(thread_count(), len(strands)))
    for place, value in (
        (a.NUM_STRANDS, len(strands)),
        (a.STRANDS, address_of(strands)),
        (a.SCRATCH, scratch(size * number)),
        (a.SCRATCH_SIZE, size),
        (a.GROUP_SIZE, call.group_size),
        (a.HEAD_DIM, dim),
        (a.V_HEAD_DIM, call.v_head_dim),
        (a.COLUMNS, columns),
        (a.CAUSAL, int(call.causal)),
        (a.SCALE, int(numpy.float64(call.scale).view(numpy.int64))),
        (a.Q_HEAD, q.strides[-3]),
        (a.Q_ROW, q.strides[-2]),
        (a.Q_STEP, q.strides[-1]),
        (a.K_ROW, k.strides[-2]),
        (a.K_STEP, k.strides[-1]),
        (a.V_ROW, v.strides[-2]),
        (a.V_STEP, v.strides[-1]),
        (a.OUT_HEAD, out.strides[-3]),
        (a.OUT_ROW, out.strides[-2]),
    ):
        put(place, value)
    run(kernel_address("linear", dtype), block, number)
