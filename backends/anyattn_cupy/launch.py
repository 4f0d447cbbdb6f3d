"""From the description of a call to a launch on the current device and stream.

CuPy comes as an argument: all that is used of it is arrays, `RawModule` and `cuda.Device`, so that tests run
this code where there is no device. Nothing here reads values of arrays, so nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.expr.bounds import fits, index_ranges
from anyattn.expr.print_cuda import cuda_arguments
from anyattn.expr.program import Program, lower
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn_cupy.arguments import argument_dtype
from anyattn_cupy.devices import current_device
from anyattn_cupy.schedules import DeviceSchedule, device_schedule
from anyattn_cupy.source import OPTIONS, kernel_source
from anyattn_cupy.variants import Variant, choose

__all__ = ["attend", "refusal"]

_SMALL_SHARED_MEMORY = 48 * 1024


def refusal(call: AttentionCall, cupy: Any) -> str | None:
    """Why no kernel here serves a call, or None."""
    if _variant(call, cupy, vector_loads=False, batch_axes=1) is None:
        return f"has no tile for D = {call.head_dim} and Dv = {call.v_head_dim} that fits into shared memory"
    return None


def attend(call: AttentionCall, cupy: Any) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention"."""
    q, k, v = (cupy.asarray(x) for x in (call.q, call.k, call.v))
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    if call.layout == "blhd" and call.has_heads:
        out = cupy.moveaxis(cupy.empty((*shape[:-3], shape[-2], shape[-3], shape[-1]), q.dtype), -2, -3)
    else:
        out = cupy.empty(shape, q.dtype)
    lse = cupy.empty(shape[:-1], call.accumulate) if call.return_lse else None
    if not math.prod(shape[:-1]):
        return out, lse
    sizes, strides = batch_axes(call.batch_shape, (q, k, v, out))
    variant = _variant(call, cupy, _vectors(q, k, v), len(sizes))
    if variant is None:
        raise RuntimeError(f"cupy: {refusal(call, cupy)}")
    spans = device_schedule(call, variant.rows, variant.keys, cupy)
    program = lower(call.visible, call.score)
    index = "int" if fits(program, index_ranges(call)) else "long long"
    captured, kept = _captured(call, program, variant, index, cupy)
    block = numpy.zeros((), argument_dtype(len(sizes)))
    _fill_arrays(block, {"q": q, "k": k, "v": v, "out": out}, sizes, strides)
    _fill_sizes(block, call, variant)
    kept += _fill_options(block, call, spans, cupy)
    block["lse"] = 0 if lse is None else lse.data.ptr
    source = kernel_source(variant, program, index)
    function = _function(cupy, cupy.cuda.Device().id, source, variant.shared_memory)
    items = math.prod(call.batch_shape) * call.num_heads * int(block["blocks"])
    # `kept` holds temporary arrays: CuPy's pool gives their memory to nobody before the launch is queued.
    function((items,), (variant.threads,), (block, captured), shared_mem=variant.shared_memory)
    del kept
    return out, lse


def _variant(call: AttentionCall, cupy: Any, vector_loads: bool, batch_axes: int) -> Variant | None:
    device = current_device(cupy)
    return choose(device, call.dtype, call.head_dim, call.v_head_dim, vector_loads, batch_axes)


def _vectors(*arrays: Array) -> bool:
    """Whether rows of arrays (..., D) can be read in vectors of 16 bytes."""
    for x in arrays:
        size = x.dtype.itemsize
        steps = [stride for n, stride in zip(x.shape[:-1], x.strides, strict=False) if n > 1]
        contiguous = x.shape[-1] <= 1 or x.strides[-1] == size
        if not contiguous or any(step % 16 for step in (*steps, x.shape[-1] * size, x.data.ptr)):
            return False
    return True


def batch_axes(
    shape: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Batch axes with those joined that lie in memory as one, and the strides of each array, in elements.

    Axes that an array broadcasts over have stride 0. There is at least one axis.
    """
    columns = []
    for x in arrays:
        own = x.shape[:-3]
        of_own = [0 if n == 1 else s // x.dtype.itemsize for n, s in zip(own, x.strides, strict=False)]
        columns.append([0] * (len(shape) - len(own)) + of_own)
    axes = [(n, steps) for n, *steps in zip(shape, *columns, strict=True) if n != 1]
    joined = axes[:1]
    for size, steps in axes[1:]:
        before, outer = joined[-1]
        if all(o == s * size for o, s in zip(outer, steps, strict=True)):
            joined[-1] = before * size, steps
        else:
            joined.append((size, steps))
    joined = joined or [(1, [0] * len(arrays))]
    return tuple(n for n, _ in joined), [tuple(s[which] for _, s in joined) for which in range(len(arrays))]


def _fill_arrays(
    block: Any, arrays: dict[str, Array], sizes: tuple[int, ...], strides: list[tuple[int, ...]]
) -> None:
    block["batch_sizes"] = sizes
    for (name, x), batch in zip(arrays.items(), strides, strict=True):
        block[name] = x.data.ptr
        block[f"{name}_batch"] = batch
        head, row, step = (s // x.dtype.itemsize for s in x.strides[-3:])
        block[f"{name}_head"], block[f"{name}_row"] = head, row
        if name != "out":
            block[f"{name}_step"] = step


def _fill_sizes(block: Any, call: AttentionCall, variant: Variant) -> None:
    block["scale"] = call.scale
    for name in ("q_len", "k_len", "head_dim", "v_head_dim", "num_heads", "group_size"):
        block[name] = getattr(call, name)
    block["blocks"] = -(-call.q_len // variant.rows)


def _fill_options(
    block: Any, call: AttentionCall, spans: DeviceSchedule | None, cupy: Any
) -> list[Array | DeviceSchedule]:
    """What a call may have or not; what must outlive the launch."""
    kept: list[Any] = [spans]
    if call.sinks is not None:
        kept.append(cupy.ascontiguousarray(cupy.asarray(call.sinks).astype(call.accumulate)))
        block["sinks"] = kept[-1].data.ptr
    if isinstance(call.offset, int):
        block["offset"] = call.offset
    else:
        offsets = cupy.broadcast_to(cupy.asarray(call.offset).astype("int64"), call.batch_shape)
        kept.append(cupy.ascontiguousarray(offsets))
        block["offsets"] = kept[-1].data.ptr
    if spans is not None:
        for name, array in spans.arrays.items():
            block[name] = array.data.ptr
    return kept


def _captured(
    call: AttentionCall, program: Program, variant: Variant, index: str, cupy: Any
) -> tuple[Any, list[Array]]:
    """What masks and scores read, as the second argument of a kernel, and the arrays of it."""
    program = replace(program, tables=tuple(cupy.ascontiguousarray(cupy.asarray(x)) for x in program.tables))
    sizes = call.batch_shape, call.num_heads, call.q_len, call.k_len
    views = tuple(
        aligned_view(cupy, cupy.asarray(x), slot.block, *sizes)
        for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
    )
    kept = [*program.tables, *views]
    addresses = tuple(x.data.ptr for x in kept)
    # CuPy passes an array of NumPy by value, and knows no scalar of a struct.
    return numpy.asarray(cuda_arguments(program, variant.accumulate, views, addresses, index)), kept


@cache
def _function(cupy: Any, device: int, source: str, shared_memory: int) -> Any:
    """A compiled kernel of a device; CuPy keeps machine code on disk."""
    function = cupy.RawModule(code=source, options=OPTIONS).get_function("forward")
    if shared_memory > _SMALL_SHARED_MEMORY:
        function.max_dynamic_shared_size_bytes = shared_memory
    return function
