"""From the description of a call to a filled argument block, and back to the caller's arrays."""

from __future__ import annotations

import math
import threading
from copy import copy
from struct import Struct
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn_numba import arguments as a
from anyattn_numba import threads
from anyattn_numba.hostarrays import address_of, as_numpy, empty_like, from_numpy
from anyattn_numba.kernels import kernel_address, shape_for
from anyattn_numba.template import Template
from anyattn_numba.thread_count import thread_count
from anyattn_numba.work import threads_for

__all__ = ["Prepared", "attend", "prepare"]

NDArray = numpy.ndarray[Any, Any]

# Into the beginning of the block: the words that a call sets. NumPy takes twice as long to do so.
_put_addresses: Any = Struct("7q").pack_into


def attend(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention"."""
    return Prepared(call, lasting=False)(call.q, call.k, call.v, *call.others)


def prepare(call: AttentionCall) -> Prepared:
    """What serves all calls of a signature."""
    return Prepared(call, lasting=True)


class Prepared:
    """A call of "attention" with all that does not depend on its arrays, of which it keeps none.

    Called with arrays like them it gives (out, lse).
    """

    def __init__(self, call: AttentionCall, *, lasting: bool):
        self.library = call.library
        q, k, v = (as_numpy(x, call.library) for x in (call.q, call.k, call.v))
        self.dtype = q.dtype
        self.shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
        self.swapped = call.layout == "blhd" and call.has_heads
        self.lse_dtype = numpy.dtype(call.accumulate) if call.return_lse else None
        out = empty_like(q.dtype, self.shape, self.swapped, call.library)
        tensors = {"Q": q, "K": k, "V": v, "OUT": out}
        if call.k_scales is not None:
            scales = (as_numpy(x, call.library)[..., None] for x in (call.k_scales, call.v_scales))
            tensors |= dict(zip(("K_SCALES", "V_SCALES"), scales, strict=True))
        self.template = Template(call, shape_for(call.accumulate), tensors, lasting=lasting, keep_rows=True)
        self.scratch = self.template.word(a.SCRATCH_SIZE)
        self.rows = math.prod(self.shape[:-1])
        self.channels = call.head_dim + call.v_head_dim
        stored = None if call.k_scales is None else "int8"
        self.kernel = kernel_address("decode" if self.template.narrow else "forward", call.dtype, stored)
        self.dtype_name = call.dtype
        self.accumulate = numpy.dtype(call.accumulate)

    def __call__(self, q: Array, k: Array, v: Array, *others: Array) -> tuple[Array, Array | None]:
        library, like = self.library, q
        if library != "numpy":
            q, k, v = as_numpy(q, library), as_numpy(k, library), as_numpy(v, library)
        case = self.template.case(others, thread_count())
        number = threads_for(case.work, self.channels, case.threads, len(case.work.items))
        out = empty_like(self.dtype, self.shape, self.swapped, library)
        lse = None if self.lse_dtype is None else numpy.empty(self.shape[:-1], self.lse_dtype)
        block = case.block.copy()
        memory, room = scratch(self.scratch * number)
        _put_addresses(
            block,
            0,
            0,
            memory,
            address_of(q),
            address_of(k),
            address_of(v),
            address_of(out),
            0 if lse is None else address_of(lse),
        )
        held = room, self.template.put_others(block, others)
        if case.work.parts > 1:
            self._run_parts(block, case.work.parts, number)
        else:
            run(self.kernel, block, number)
        del held
        if library == "numpy":
            return out, lse
        return from_numpy(out, like, library), None if lse is None else from_numpy(lse, like, library)

    def resized(self, k: Array, v: Array) -> Prepared | None:
        """What serves calls with other keys, as many as these, and row 0 where it stands by default."""
        tensors = {"K": as_numpy(k, self.library), "V": as_numpy(v, self.library)}
        template = self.template.resized(tensors)
        if template is None:
            return None
        other = copy(self)
        other.template = template
        return other

    def _run_parts(self, block: NDArray, parts: int, number: int) -> None:
        """Compute the parts of rows whose keys are split, then merge them."""
        outs = numpy.empty((parts, self.rows, self.shape[-1]), self.accumulate)
        sums = numpy.empty((parts, self.rows), self.accumulate)
        for place, value in (
            (a.PARTS, address_of(outs)),
            (a.PART_LSE, address_of(sums)),
            (a.NUM_ROWS, self.rows),
            (a.NUM_PARTS, parts),
        ):
            block[place // 8] = value
        run(self.kernel, block, number)
        block[a.COUNTER // 8] = 0
        run(kernel_address("combine", self.dtype_name), block, number)


def run(kernel: int, block: NDArray, number: int) -> None:
    """Run a kernel on so many threads."""
    status = threads.run(kernel, address_of(block), number)
    if status:
        raise RuntimeError(f"numba: the kernel ended with status {status}")


_local = threading.local()
_NO_SCRATCH = 0, numpy.empty(0, numpy.uint8)


def scratch(nbytes: int) -> tuple[int, NDArray]:
    """The address of memory of this Python thread, at a multiple of 64; the same memory in its next call.

    Who uses it holds the array: a finaliser or a signal's handler may make a call that wants more, and then
    the thread has another.
    """
    found: tuple[int, NDArray] = getattr(_local, "scratch", _NO_SCRATCH)
    if len(found[1]) < nbytes + 64:
        room = numpy.empty(nbytes + 64, numpy.uint8)
        found = _local.scratch = -(-address_of(room) // 64) * 64, room
    return found
