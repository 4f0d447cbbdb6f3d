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
from anyattn_cupy.source import OPTIONS, combine_source, kernel_source
from anyattn_cupy.variants import Variant, choose, parts_of

__all__ = ["attend", "refusal"]

_SMALL_SHARED_MEMORY = 48 * 1024
# A warp of `combine` has a row.
_COMBINE_THREADS = 128
_ROWS_OF_COMBINE = _COMBINE_THREADS // 32


def refusal(call: AttentionCall, cupy: Any) -> str | None:
    """Why no kernel here serves a call, or None."""
    if _variant(call, cupy, vector_loads=False, batch_axes=1) is None:
        return f"has no tile for D = {call.head_dim} and Dv = {call.v_head_dim} that fits into shared memory"
    return None


def attend(call: AttentionCall, cupy: Any) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention"."""
    q, k, v = (cupy.asarray(x) for x in (call.q, call.k, call.v))
    out, lse = _results(call, q.dtype, cupy)
    if not math.prod(out.shape[:-1]):
        return out, lse
    sizes, strides = batch_axes(call.batch_shape, (q, k, v, out))
    variant = _variant(call, cupy, _vectors(q, k, v), len(sizes))
    if variant is None:
        raise RuntimeError(f"cupy: {refusal(call, cupy)}")
    variant, spans = _scheduled(call, variant, cupy)
    program = lower(call.visible, call.score)
    index = "int" if fits(program, index_ranges(call)) else "long long"
    captured, kept = _captured(call, program, variant, index, cupy)

    block = numpy.zeros((), argument_dtype(len(sizes)))
    _fill_arrays(block, {"q": q, "k": k, "v": v, "out": out}, sizes, strides)
    items = _fill_sizes(block, call, variant)
    kept += _fill_options(block, call, variant, spans, cupy)
    block["lse"] = 0 if lse is None else lse.data.ptr
    parts = parts_of(current_device(cupy), items, -(-call.k_len // variant.keys))
    block["parts"] = parts
    if parts > 1:
        kept += _make_parts(block, out, parts, call.accumulate, cupy)

    device = cupy.cuda.Device().id
    forward = _function(
        cupy, device, "forward", kernel_source(variant, program, index), variant.shared_memory
    )
    forward((items * parts,), (variant.threads,), (block, captured), shared_mem=variant.shared_memory)
    if parts > 1:
        combine = _function(cupy, device, "combine", combine_source(variant), 0)
        combine((-(-math.prod(out.shape[:-1]) // _ROWS_OF_COMBINE),), (_COMBINE_THREADS,), (block,))
    # CuPy's pool gives memory of temporary arrays to nobody before what was launched has run on this stream.
    del kept
    return out, lse


def _results(call: AttentionCall, dtype: Any, cupy: Any) -> tuple[Array, Array | None]:
    """out (..., Hq, Lq, Dv), contiguous in the order that the caller uses, and lse."""
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    if call.layout == "blhd" and call.has_heads:
        out = cupy.moveaxis(cupy.empty((*shape[:-3], shape[-2], shape[-3], shape[-1]), dtype), -2, -3)
    else:
        out = cupy.empty(shape, dtype)
    return out, cupy.empty(shape[:-1], call.accumulate) if call.return_lse else None


def _scheduled(call: AttentionCall, variant: Variant, cupy: Any) -> tuple[Variant, DeviceSchedule | None]:
    """The schedule of a call; few queries of many heads are packed if the mask does not tell heads apart."""
    if call.group_size > 1 and call.q_len < variant.rows:
        spans = device_schedule(call, call.q_len, variant.keys, cupy)
        if spans is None or not spans.by_head:
            return replace(variant, packed=True), spans
    return variant, device_schedule(call, variant.rows, variant.keys, cupy)


def _make_parts(block: Any, out: Array, parts: int, accumulate: str, cupy: Any) -> list[Array]:
    """Memory for the results of parts."""
    made = [cupy.empty((parts, *out.shape), accumulate), cupy.empty((parts, *out.shape[:-1]), accumulate)]
    block["part_out"], block["part_lse"] = (x.data.ptr for x in made)
    return made


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


def _fill_sizes(block: Any, call: AttentionCall, variant: Variant) -> int:
    """Fill in sizes; how many items there are."""
    block["scale"] = call.scale
    for name in ("q_len", "k_len", "head_dim", "v_head_dim", "num_heads", "group_size"):
        block[name] = getattr(call, name)
    batch, packed = math.prod(call.batch_shape), variant.packed
    rows = call.q_len * (call.group_size if packed else 1)
    blocks = -(-rows // variant.rows)
    block["batch_size"], block["rows"], block["blocks"] = batch, rows, blocks
    return batch * (call.num_kv_heads if packed else call.num_heads) * blocks


def _fill_options(
    block: Any, call: AttentionCall, variant: Variant, spans: DeviceSchedule | None, cupy: Any
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
            # The order is of blocks of one head.
            block[name] = 0 if name == "order" and variant.packed else array.data.ptr
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
def _function(cupy: Any, device: int, name: str, source: str, shared_memory: int) -> Any:
    """A compiled kernel of a device; CuPy keeps machine code on disk."""
    function = cupy.RawModule(code=source, options=OPTIONS).get_function(name)
    if shared_memory > _SMALL_SHARED_MEMORY:
        function.max_dynamic_shared_size_bytes = shared_memory
    return function
