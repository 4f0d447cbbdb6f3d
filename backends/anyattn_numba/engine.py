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
from anyattn_numba.hostarrays import address_of, as_numpy, empty_like, from_numpy
from anyattn_numba.kernels import entries_address, kernel_address, shape_for, tile_address
from anyattn_numba.narrow import suits
from anyattn_numba.target import Shape
from anyattn_numba.thread_count import thread_count
from anyattn_numba.tiles import capture, index_type, tile_memory
from anyattn_numba.work import Work, items_of

__all__ = ["Prepared", "attend", "prepare"]

NDArray = numpy.ndarray[Any, Any]

# The words that a call sets, at the beginning of the block.
_ADDRESSES = 7
# Keys of a chunk. Scores, keys and values of one stay in the first or second cache.
_CHUNK = 128
_NARROW_CHUNK = 64
# Products of a pair and a channel that another thread is worth: entering it takes microseconds, waking it up
# some tens.
_WORK_FOR_THREADS = 1 << 21


def attend(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention"."""
    return Prepared(call)(call.q, call.k, call.v)


def prepare(call: AttentionCall) -> Prepared | None:
    """What serves all calls of a signature: calls without arrays besides q, k and v."""
    return None if call.others else Prepared(call)


class Prepared:
    """A call of "attention" with all that does not depend on the addresses of q, k, v and the results.

    Called with such arrays it gives (out, lse). Of the call's arrays it keeps those that the mask and the
    score read, and sinks.
    """

    def __init__(self, call: AttentionCall):
        shape = shape_for(call.accumulate)
        work = items_of(call, shape, thread_count())
        self.library = call.library
        q, k, v = (as_numpy(x, call.library) for x in (call.q, call.k, call.v))
        self.dtype = q.dtype
        self.shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
        self.swapped = call.layout == "blhd" and call.has_heads
        self.lse_dtype = numpy.dtype(call.accumulate) if call.return_lse else None
        out = empty_like(q.dtype, self.shape, self.swapped, call.library)
        self.block, self.kept = argument_block(call, shape, work, {"Q": q, "K": k, "V": v, "OUT": out})
        small = work.pairs * (call.head_dim + call.v_head_dim) < _WORK_FOR_THREADS
        self.most_threads = 1 if small else max(len(work.items), 1)
        self.scratch = int(self.block[a.SCRATCH_SIZE // 8])
        self.parts = work.parts
        self.rows = math.prod(self.shape[:-1])
        self.kernel = kernel_address("decode" if _narrow(call, shape, work) else "forward", call.dtype)
        self.combine = kernel_address("combine", call.dtype) if work.parts > 1 else 0
        self.accumulate = numpy.dtype(call.accumulate)

    def __call__(self, q: Array, k: Array, v: Array) -> tuple[Array, Array | None]:
        library = self.library
        out = empty_like(self.dtype, self.shape, self.swapped, library)
        lse = None if self.lse_dtype is None else numpy.empty(self.shape[:-1], self.lse_dtype)
        number = 1 if self.most_threads == 1 else min(thread_count(), self.most_threads)
        block = self.block.copy()
        block[:_ADDRESSES] = (
            0,
            scratch(self.scratch * number),
            address_of(as_numpy(q, library)),
            address_of(as_numpy(k, library)),
            address_of(as_numpy(v, library)),
            address_of(out),
            0 if lse is None else address_of(lse),
        )
        if self.parts > 1:
            self._run_parts(block, number)
        else:
            run(self.kernel, block, number)
        return from_numpy(out, q, library), None if lse is None else from_numpy(lse, q, library)

    def _run_parts(self, block: NDArray, number: int) -> None:
        """Compute the parts of rows whose keys are split, then merge them."""
        outs = numpy.empty((self.parts, self.rows, self.shape[-1]), self.accumulate)
        sums = numpy.empty((self.parts, self.rows), self.accumulate)
        for place, value in (
            (a.PARTS, address_of(outs)),
            (a.PART_LSE, address_of(sums)),
            (a.NUM_ROWS, self.rows),
            (a.NUM_PARTS, self.parts),
        ):
            block[place // 8] = value
        run(self.kernel, block, number)
        block[a.COUNTER // 8] = 0
        run(self.combine, block, number)


def run(kernel: int, block: NDArray, number: int) -> None:
    """Run a kernel on so many threads."""
    status = threads.run(kernel, address_of(block), number)
    if status:
        raise RuntimeError(f"numba: the kernel ended with status {status}")


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
        put(getattr(a, name), address_of(x))
        _put_strides(put, getattr(a, f"{name}_BATCH"), x, call.batch_shape)
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
    program = None
    if call.score is not None or call.visible is not None:
        program = lower(call.visible, call.score)
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
        words, arrays = capture(program, call.accumulate, views, call.library, entries_address)
        kept.append(arrays)
        put(a.CAPTURED, words)
        put(a.TILE_CODE, tile_address(program, call.accumulate, index_type(program, call)))
        put(a.HAS_SCORE, call.score is not None)
    chunk = _NARROW_CHUNK if _narrow(call, shape, work) else _CHUNK
    put(a.CHUNK, chunk)
    tile = 0 if program is None else tile_memory(program, call.accumulate, chunk)
    _lay_out(put, call, shape, chunk, tile)
    return block, kept


def _narrow(call: AttentionCall, shape: Shape, work: Work) -> bool:
    """Whether all items have so few queries that lanes run along the channels."""
    return suits(shape, int(work.items[:, 3].max(initial=0)), call.head_dim, call.v_head_dim)


def _put_strides(put: Any, place: int, x: NDArray, batch_shape: tuple[int, ...]) -> None:
    """Offsets of the batch entries and strides of an array (..., H, L, D)."""
    offsets = numpy.zeros(batch_shape, numpy.int64)
    lead = x.shape[:-3]
    for axis, (size, stride) in enumerate(zip(lead, x.strides[: len(lead)], strict=True)):
        if size > 1:
            index = numpy.arange(size, dtype=numpy.int64) * stride
            offsets += index.reshape(-1, *[1] * (len(lead) - axis - 1))
    put(place, numpy.ascontiguousarray(offsets.reshape(-1)))
    for n, stride in enumerate(x.strides[-3:]):
        put(place + 8 + 8 * n, stride)


def _lay_out(put: Any, call: AttentionCall, shape: Shape, chunk: int, tile: int) -> None:
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
        a.AT_TILE: 8 * a.TILE_WORDS + tile * width,
    }
    at = 64
    for place, nbytes in parts.items():
        put(place, at)
        at += -(-nbytes // 64) * 64
    put(a.SCRATCH_SIZE, at)


_local = threading.local()


def scratch(nbytes: int) -> int:
    """The address of memory of this Python thread, at a multiple of 64; the same memory in its next call."""
    size, address, _ = getattr(_local, "scratch", (-1, 0, None))
    if size < nbytes:
        room = numpy.empty(nbytes + 64, numpy.uint8)
        address = -(-address_of(room) // 64) * 64
        _local.scratch = nbytes, address, room
    return int(address)
