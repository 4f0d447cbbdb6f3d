"""From the description of a call of `linear_attention` to an argument block and strands, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy

from anyattn.arrays import Array, cast, exactly
from anyattn.linear.call import LinearCall
from anyattn_numba import linear_arguments as a
from anyattn_numba.engine import run, scratch
from anyattn_numba.hostarrays import address_of, as_numpy, empty_like, from_numpy
from anyattn_numba.kernels import kernel_address, shape_for
from anyattn_numba.linear_loads import tile_of
from anyattn_numba.thread_count import thread_count

__all__ = ["linear"]

NDArray = numpy.ndarray[Any, Any]

# Products that another thread is worth: entering it takes microseconds, waking it up some tens.
_WORK_FOR_THREADS = 1 << 22

# Tokens of a chunk: its weights cost the square of their number, the state is read and written once for it.
_TOKENS, _FADING_TOKENS = 32, 16


def linear(call: LinearCall) -> tuple[Array, Array, Array | None]:
    """(out, state, normalizer) of a call."""
    q, k, v, dtype = _tensors(call)
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    out = empty_like(v.dtype, shape, call.layout == "blhd" and call.has_heads, call.library)
    parts = _parts(call)
    before, after = _states(call, parts)
    beside = _beside(call)
    strands = _strands(call, (q, k, v, out, *beside), before, after)
    if len(strands) and after.shape[-1]:
        _run(call, (q, k, v, out, *beside), strands, parts, dtype)
    rows = from_numpy(out, call.v, call.library)
    with exactly(call.v):
        rows = cast(call.xp, rows, call.v.dtype)
    state = numpy.moveaxis(after[..., : call.v_head_dim // parts], -3, -2)
    found = [state.reshape(*state.shape[:-2], call.v_head_dim)]
    if call.normalize:
        found.append(numpy.ascontiguousarray(after[..., 0, :, -1]))
    states = [from_numpy(numpy.ascontiguousarray(x), call.v, call.library) for x in found]
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


def _beside(call: LinearCall) -> tuple[NDArray, NDArray]:
    """Decay and beta with all batch axes, (..., Hkv, L, 1 or F) and (..., Hkv, L, 1); without, one number."""
    given = (call.decay, None if call.beta is None else call.beta[..., None])
    arrays = [numpy.zeros((1, 1, 1)) if x is None else as_numpy(x, call.library) for x in given]
    decay, beta = (
        numpy.broadcast_to(x, (*call.batch_shape, call.num_kv_heads, call.k_len, x.shape[-1])) for x in arrays
    )
    return decay, beta


def _parts(call: LinearCall) -> int:
    """Into how many parts the columns of the state are cut, so that every thread has some.

    Columns have nothing to do with each other; the weights of a chunk, a sixth of its products, are computed
    for each part.
    """
    strands = math.prod(call.batch_shape) * call.num_sequences * call.num_kv_heads
    wanted = _threads(call) / max(strands, 1)
    lanes, parts = shape_for(call.accumulate).lanes, 1
    while parts < wanted and call.v_head_dim % (2 * parts) == 0 and call.v_head_dim // (2 * parts) >= lanes:
        parts *= 2
    return parts


def _threads(call: LinearCall) -> int:
    """How many threads the work of a call is worth."""
    products = call.k_len * call.num_heads * (call.head_dim + _TOKENS) * (call.v_head_dim + call.normalize)
    return 1 if products * math.prod(call.batch_shape) < _WORK_FOR_THREADS else thread_count()


def _tokens(channels: int, tile: int) -> int:
    """Tokens of a chunk: fewer where keys fade by channel, which costs the square of their number."""
    wanted = _FADING_TOKENS if channels > 1 else _TOKENS
    return max(wanted // tile, 1) * tile


def _in_place(x: NDArray) -> bool:
    """Whether the numbers of a row lie one beside the other."""
    return x.strides[-1] == x.itemsize or x.shape[-1] == 1


def _states(call: LinearCall, parts: int) -> tuple[NDArray | None, NDArray]:
    """The states before and after, (..., Hkv, parts, F, Dv / parts), one more column with the normalizer."""
    sequences = () if call.cu_seqlens is None else (call.num_sequences,)
    lead, columns = (*call.batch_shape, *sequences, call.num_kv_heads), call.v_head_dim // parts
    after = numpy.empty((*lead, parts, call.head_dim, columns + call.normalize), call.accumulate)
    if call.state is None:
        return None, after
    before = numpy.empty_like(after)
    state = as_numpy(call.state, call.library)
    state = state.reshape(*state.shape[:-1], parts, columns)
    before[..., :columns] = numpy.moveaxis(state, -2, -3)
    if call.normalizer is not None:
        before[..., -1] = as_numpy(call.normalizer, call.library)[..., None, :]
    return before, after


def _strands(
    call: LinearCall, tensors: tuple[NDArray, ...], before: NDArray | None, after: NDArray
) -> NDArray:
    """The words of every strand, (strands, STRAND_WORDS)."""
    bounds = numpy.array([0, call.k_len]) if call.cu_seqlens_host is None else call.cu_seqlens_host
    packed, count = call.cu_seqlens is not None, len(bounds) - 1
    parts = after.shape[-3]
    columns = call.v_head_dim // parts
    heads = (*call.batch_shape, count, call.num_kv_heads, parts)
    starts = [numpy.arange(n) for n in heads]
    starts[-3] = bounds[:-1].astype(numpy.int64)
    grid = numpy.meshgrid(*starts, indexing="ij", sparse=True)
    words = numpy.zeros((*heads, a.STRAND_WORDS), numpy.int64)
    group = call.group_size
    q, k, v, out, decay, beta = tensors
    for place, x, step, cut in (
        (a.STRAND_Q, q, group, 0),
        (a.STRAND_K, k, 1, 0),
        (a.STRAND_V, v, 1, columns),
        (a.STRAND_OUT, out, group, columns),
        (a.STRAND_DECAY, decay, 1, 0),
        (a.STRAND_BETA, beta, 1, 0),
    ):
        strides = (*x.strides[:-3], x.strides[-2], step * x.strides[-3], cut * x.strides[-1])
        words[..., place // 8] = address_of(x) + sum(
            axis * stride for axis, stride in zip(grid, strides, strict=True)
        )
    states = numpy.arange(math.prod(heads)).reshape(heads) * (math.prod(after.shape[-2:]) * after.itemsize)
    words[..., a.STATE_BEFORE // 8] = 0 if before is None else address_of(before) + states
    words[..., a.STATE_AFTER // 8] = address_of(after) + states
    lengths = numpy.diff(bounds)[:, None, None]
    words[..., a.Q_LEN // 8] = lengths if packed else call.q_len
    words[..., a.K_LEN // 8] = lengths
    return words.reshape(-1, a.STRAND_WORDS)


def _run(call: LinearCall, tensors: tuple[NDArray, ...], strands: NDArray, parts: int, dtype: str) -> None:
    q, k, v, out, decay, beta = tensors
    shape = shape_for(call.accumulate)
    dim, v_dim = call.head_dim, call.v_head_dim // parts
    columns = v_dim + call.normalize
    channels = 0 if call.decay is None else decay.shape[-1]
    tile = tile_of(shape)
    most = _tokens(channels, tile)
    wide, wide_columns = (-(-n // tile) * tile for n in (dim, columns))
    block = numpy.zeros(a.BLOCK_WORDS, numpy.int64)

    def put(place: int, value: int) -> None:
        block[place // 8] = value

    size = 0
    for place, numbers in (
        (a.AT_KEYS, most * wide),
        (a.AT_TURNED, wide * most),
        (a.AT_VALUES, most * wide_columns),
        (a.AT_STATE, wide * wide_columns),
        (a.AT_QUERY, most * wide),
        (a.AT_OUT, most * wide_columns),
        (a.AT_SCORE, most * most),
        (a.AT_KEPT, most * max(channels, 1)),
        (a.AT_SINCE, most * max(channels, 1)),
        (a.AT_BETA, most),
        (a.AT_FACTORS, 2 * most),
        (a.AT_LEFT, most),
        (a.AT_STATE_KEPT, wide),
        (a.AT_ONES, most),
        (a.AT_COMING, 8 * a.COMING // shape.itemsize),
    ):
        put(place, size)
        size += -(-numbers * shape.itemsize // 64) * 64
    as_read = dtype == call.accumulate
    whole = as_read and columns == v_dim and v_dim % shape.lanes == 0
    number = max(1, min(_threads(call), len(strands)))
    memory, room = scratch(size * number)
    for place, value in (
        (a.NUM_STRANDS, len(strands)),
        (a.STRANDS, address_of(strands)),
        (a.SCRATCH, memory),
        (a.SCRATCH_SIZE, size),
        (a.GROUP_SIZE, call.group_size),
        (a.HEAD_DIM, dim),
        (a.V_HEAD_DIM, v_dim),
        (a.COLUMNS, columns),
        (a.CAUSAL, int(call.causal)),
        (a.SCALE, int(numpy.float64(call.scale).view(numpy.int64))),
        (a.TOKENS, most),
        (a.CHANNELS, channels),
        (a.DELTA, int(call.beta is not None)),
        (a.Q_IN_PLACE, int(as_read and _in_place(q))),
        (a.K_IN_PLACE, int(as_read and _in_place(k) and dim % tile == 0)),
        (a.V_IN_PLACE, int(whole and _in_place(v) and call.beta is None)),
        (a.OUT_IN_PLACE, int(whole)),
        (a.Q_HEAD, q.strides[-3]),
        (a.Q_ROW, q.strides[-2]),
        (a.Q_STEP, q.strides[-1]),
        (a.K_ROW, k.strides[-2]),
        (a.K_STEP, k.strides[-1]),
        (a.V_ROW, v.strides[-2]),
        (a.V_STEP, v.strides[-1]),
        (a.OUT_HEAD, out.strides[-3]),
        (a.OUT_ROW, out.strides[-2]),
        (a.DECAY_ROW, decay.strides[-2]),
        (a.DECAY_STEP, decay.strides[-1]),
        (a.BETA_ROW, beta.strides[-2]),
    ):
        put(place, value)
    run(kernel_address("linear", dtype), block, number)
    del room
