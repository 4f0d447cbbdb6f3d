"""From the description of a call of `attention` to a launch on the current device and stream.

CuPy comes as an argument: all that is used of it is arrays, `RawModule` and `cuda`, so that tests run this
code where there is no device. Nothing here reads values of arrays, so nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.expr.program import Program, lower
from anyattn_cupy.arguments import argument_dtype
from anyattn_cupy.devices import current_device
from anyattn_cupy.exchange import as_cupy, hold
from anyattn_cupy.filling import (
    batch_axes,
    captured_of,
    compiled,
    fill_arrays,
    fill_options,
    fill_sizes,
    index_type,
    vector_loads,
)
from anyattn_cupy.schedules import DeviceSchedule, device_schedule
from anyattn_cupy.source import combine_source, kernel_source
from anyattn_cupy.variants import Variant, choose, parts_of

__all__ = ["Choice", "attend", "chosen", "remarks"]

# A warp of `combine` has a row.
_COMBINE_THREADS = 128
_ROWS_OF_COMBINE = _COMBINE_THREADS // 32


def remarks(call: AttentionCall, cupy: Any) -> tuple[str, ...]:
    """What a caller should know of the kernel that serves a call on the current device."""
    device = current_device(cupy)
    found = []
    if call.operation == "attention":
        variant = choose(device, call.dtype, call.head_dim, call.v_head_dim, vector_loads=False)
        if variant.wide:
            found.append(
                f"a tile holds {variant.head_dim} of D = {call.head_dim} channels at a time, and scores are "
                f"computed anew for every {variant.v_head_dim} of Dv = {call.v_head_dim} columns"
            )
        if call.dtype == "bfloat16" and device.capability < 80:
            found.append(
                "multiplies bfloat16 in float32: tensor cores know it from compute capability 8.0 on"
            )
    return tuple(found)


@dataclass(frozen=True)
class Choice:
    """The kernel for a call: its variant, the program that is printed into it, the type of its integers.

    `spans` is the schedule on the device, in the tiles of the variant.
    """

    variant: Variant
    program: Program
    index: str
    spans: DeviceSchedule | None

    @property
    def source(self) -> str:
        """CUDA C++, complete."""
        return kernel_source(self.variant, self.program, self.index)


def chosen(call: AttentionCall, arrays: tuple[Array, ...], cupy: Any) -> Choice:
    """The kernel for a call of "attention" with these q, k and v of CuPy."""
    # The result is contiguous and joins whatever axes its inputs join.
    axes, _ = batch_axes(call.batch_shape, arrays)
    sizes = call.dtype, call.head_dim, call.v_head_dim
    variant = choose(current_device(cupy), *sizes, vector_loads(*arrays), len(axes))
    variant, spans = _scheduled(call, variant, cupy)
    program = lower(call.visible, call.score, call.keep)
    return Choice(variant, program, index_type(program, call), spans)


def attend(call: AttentionCall, cupy: Any) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention", as CuPy's arrays."""
    q, k, v = (as_cupy(x, cupy) for x in (call.q, call.k, call.v))
    out, lse = _results(call, q.dtype, cupy)
    if not math.prod(out.shape[:-1]):
        return out, lse
    sizes, strides = batch_axes(call.batch_shape, (q, k, v, out))
    choice = chosen(call, (q, k, v), cupy)
    variant = choice.variant
    captured, kept = captured_of(call, choice.program, variant, choice.index, cupy)

    block = numpy.zeros((), argument_dtype(len(sizes)))
    fill_arrays(block, {"q": q, "k": k, "v": v, "out": out}, sizes, strides)
    items = fill_sizes(block, call, variant, call.q_len)
    kept += fill_options(block, call, variant, choice.spans, cupy)
    block["lse"] = 0 if lse is None else lse.data.ptr
    # Blocks of a wide call have a range of columns each.
    ranges = max(1, -(-call.v_head_dim // variant.v_head_dim)) if variant.wide else 1
    parts = parts_of(current_device(cupy), items * ranges, -(-call.k_len // variant.keys))
    block["parts"] = parts
    if parts > 1:
        kept += _make_parts(block, out, parts, call.accumulate, cupy)

    number = cupy.cuda.Device().id
    forward = compiled(cupy, number, "forward", choice.source, variant.shared_memory)
    grid = (items * parts, ranges)
    forward(grid, (variant.threads,), (block, captured), shared_mem=variant.shared_memory)
    if parts > 1:
        combine = compiled(cupy, number, "combine", combine_source(variant), 0)
        combine((-(-math.prod(out.shape[:-1]) // _ROWS_OF_COMBINE),), (_COMBINE_THREADS,), (block,))
    # CuPy's pool gives memory of temporary arrays to nobody before what was launched has run on this stream.
    hold(call, [q, k, v, *kept], cupy)
    return out, lse


def _results(call: AttentionCall, dtype: Any, cupy: Any) -> tuple[Array, Array | None]:
    """out (..., Hq, Lq, Dv), contiguous in the order that the caller uses, and lse."""
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    # JAX takes arrays in the order of their axes alone.
    if call.layout == "blhd" and call.has_heads and call.library != "jax":
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
