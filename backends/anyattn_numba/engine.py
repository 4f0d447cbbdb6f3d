"""From the description of a call to a filled argument block, and back to the caller's arrays."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.expr.program import lower
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn_numba import arguments as a
from anyattn_numba import threads
from anyattn_numba.hostarrays import as_numpy, empty_like, from_numpy
from anyattn_numba.kernels import kernel_address, shape_for, tile_address
from anyattn_numba.target import Shape
from anyattn_numba.thread_count import thread_count
from anyattn_numba.tiles import capture, row_values
from anyattn_numba.work import Work, items_of

__all__ = ["attend"]

NDArray = numpy.ndarray[Any, Any]

# Work that another thread is worth: entering it takes microseconds, waking it up some tens.
_PAIRS_FOR_THREADS = 1 << 21


def attend(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention"."""
    shape = shape_for(call.accumulate)
    wanted = thread_count()
    work = items_of(call, shape, wanted)
    q, k, v = (as_numpy(x, call.library) for x in (call.q, call.k, call.v))
    result = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    out = empty_like(q.dtype, result, call.layout == "blhd" and call.has_heads)
    kind = numpy.dtype(call.accumulate)
    lse = numpy.empty(result[:-1], kind) if call.return_lse else None
    block, kept = argument_block(call, shape, work, {"Q": q, "K": k, "V": v, "OUT": out})
    block[a.LSE // 8] = address_of(lse) if lse is not None else 0
    number = 1 if work.pairs * (call.head_dim + call.v_head_dim) < _PAIRS_FOR_THREADS else wanted
    run("forward", call.dtype, block, number)
    del kept
    return from_numpy(out, call.q, call.library), None if lse is None else from_numpy(
        lse, call.q, call.library
    )


def run(kernel: str, dtype: str, block: NDArray, number: int) -> None:
    """Run a kernel on so many threads; an error there is one here."""
    size = int(block[a.SCRATCH_SIZE // 8])
    block[a.SCRATCH // 8] = scratch(size * number)
    block[a.COUNTER // 8] = 0
    status = threads.run(kernel_address(kernel, dtype), address_of(block), number)
    if status:
        raise RuntimeError(f"numba: the kernel {kernel!r} for {dtype} ended with status {status}")


def argument_block(
    call: AttentionCall, shape: Shape, work: Work, tensors: dict[str, NDArray]
) -> tuple[NDArray, list[Any]]:
    """The argument block of a call, and what must outlive its use."""
    block = numpy.zeros(a.BLOCK_WORDS, numpy.int64)
    kept: list[Any] = [work]

    def put(place: int, value: int | NDArray) -> None:
        if isinstance(value, numpy.ndarray):
            kept.append(value)
            value = address_of(value)
        block[place // 8] = value

    put(a.NUM_ITEMS, len(work.items))
    put(a.ITEMS, work.items)
    put(a.NUM_HEADS, call.num_heads)
    put(a.GROUP_SIZE, call.group_size)
    put(a.Q_LEN, call.q_len)
    put(a.K_LEN, call.k_len)
    put(a.HEAD_DIM, call.head_dim)
    put(a.V_HEAD_DIM, call.v_head_dim)
    for name, x in tensors.items():
        _put_array(put, getattr(a, name), x, call.batch_shape)
    batch = math.prod(call.batch_shape)
    if call.sinks is not None:
        put(a.SINKS, numpy.ascontiguousarray(as_numpy(call.sinks, call.library), call.accumulate))
    block[a.SCALE // 8] = numpy.float64(call.scale).view(numpy.int64)
    offsets = numpy.broadcast_to(numpy.asarray(call.offset_host, numpy.int64), call.batch_shape)
    put(a.OFFSETS, numpy.ascontiguousarray(offsets.reshape(batch)))
    if work.spans is not None:
        put(a.SPAN_STARTS, work.spans.starts)
        put(a.SPAN_ENDS, work.spans.ends)
        put(a.SPAN_KINDS, work.spans.kinds)
        put(a.COLUMNS, work.spans.columns)
    held = 0
    if call.score is not None or call.visible is not None:
        program = lower(call.visible, call.score)
        held = row_values(program)
        views = tuple(
            aligned_view(
                numpy,
                as_numpy(x, call.library),
                slot.block,
                call.batch_shape,
                call.num_heads,
                call.q_len,
                call.k_len,
            )
            for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
        )
        words, arrays = capture(program, call.accumulate, views, call.library)
        kept.append(arrays)
        put(a.CAPTURED, words)
        put(a.TILE_CODE, tile_address(program, call.accumulate))
        put(a.HAS_SCORE, call.score is not None)
    chunk = 128
    put(a.CHUNK, chunk)
    _lay_out(put, call, shape, chunk, held)
    return block, kept


def _put_array(put: Any, place: int, x: NDArray, batch_shape: tuple[int, ...]) -> None:
    """Address, offsets of the batch entries, and strides of an array (..., H, L, D)."""
    put(place, address_of(x))
    offsets = numpy.zeros(batch_shape, numpy.int64)
    lead = x.shape[:-3]
    for axis, (size, stride) in enumerate(zip(lead, x.strides[: len(lead)], strict=True)):
        if size > 1:
            index = numpy.arange(size, dtype=numpy.int64) * stride
            offsets += index.reshape(-1, *[1] * (len(lead) - axis - 1))
    put(place + 8, numpy.ascontiguousarray(offsets.reshape(-1)))
    for n, stride in enumerate(x.strides[-3:]):
        put(place + 16 + 8 * n, stride)


def _lay_out(put: Any, call: AttentionCall, shape: Shape, chunk: int, held: int) -> None:
    """Where the parts of a thread's memory begin."""
    size, width, lanes = shape.itemsize, shape.queries, shape.lanes
    d, dv = (-(-n // lanes) * lanes for n in (call.head_dim, call.v_head_dim))
    parts = {
        a.AT_LANES: 3 * width * 8,
        a.AT_STATE: 5 * width * size,
        a.AT_QUERY: d * width * size,
        a.AT_SUM: dv * width * size,
        a.AT_SCORE: chunk * width * size,
        a.AT_STAGE: max(d, dv) * width * size,
        a.AT_KEYS: chunk * call.head_dim * size,
        a.AT_VALUES: chunk * call.v_head_dim * size,
        a.AT_SEEN: chunk * width * size,
        a.AT_TILE: (a.TILE_WORDS + held * width) * 8,
    }
    at = 64
    for place, nbytes in parts.items():
        put(place, at)
        at += -(-nbytes // 64) * 64
    put(a.SCRATCH_SIZE, at)


def address_of(x: NDArray) -> int:
    """Where the numbers of an array begin."""
    found: int = x.__array_interface__["data"][0]
    return found


_local = threading.local()


def scratch(nbytes: int) -> int:
    """The address of memory of this Python thread, at a multiple of 64; the same memory in its next call."""
    room = getattr(_local, "room", None)
    if room is None or len(room) < nbytes + 64:
        room = _local.room = numpy.empty(nbytes + 64, numpy.uint8)
    return -(-address_of(room) // 64) * 64
