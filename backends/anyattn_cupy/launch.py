"""From the description of a call of `attention` to a launch on the current device and stream.

CuPy comes as an argument: all that is used of it is arrays, `RawModule` and `cuda`, so that tests run this
code where there is no device. Nothing here reads values of arrays, so nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy

from anyattn.arrays import Array, is_array
from anyattn.call import AttentionCall
from anyattn.expr.program import Program, lower
from anyattn_cupy.arguments import argument_dtype
from anyattn_cupy.capture import capturing
from anyattn_cupy.devices import current_device
from anyattn_cupy.exchange import as_cupy, hold
from anyattn_cupy.filling import (
    Captures,
    batch_axes,
    compiled,
    fill_others,
    fill_schedule,
    fill_sizes,
    fill_strides,
    index_type,
    numbered,
    tensors_of,
    vector_loads,
)
from anyattn_cupy.schedules import DeviceSchedule, device_schedule
from anyattn_cupy.source import combine_source, kernel_source
from anyattn_cupy.variants import TENSOR_CORES, Variant, choose, choose_inspect, parts_of

__all__ = ["Choice", "Prepared", "attend", "chosen", "prepare", "remarks"]

# A warp of `combine` has a row.
_COMBINE_THREADS = 128
_ROWS_OF_COMBINE = _COMBINE_THREADS // 32
# Of memory that CuPy's pool gives out.
_ALIGNMENT = 512


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
        least = TENSOR_CORES.get(call.dtype, 0)
        if device.capability < least:
            found.append(
                f"multiplies {call.dtype} in float32: tensor cores are used for it from compute capability "
                f"{least / 10} on"
            )
    else:
        variant = choose_inspect(device, call.dtype, call.head_dim, vector_loads=False)
        if variant.wide:
            found.append(f"a tile holds {variant.head_dim} of D = {call.head_dim} channels at a time")
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

    @cached_property
    def source(self) -> str:
        """CUDA C++, complete."""
        return kernel_source(self.variant, self.program, self.index)

    @cached_property
    def unaligned(self) -> Choice:
        """The same for arrays whose rows are not read in vectors."""
        return replace(self, variant=replace(self.variant, vector_loads=False))


def chosen(call: AttentionCall, tensors: dict[str, Array], cupy: Any) -> Choice:
    """The kernel for a call of "attention" with these `tensors_of` it."""
    # The result is contiguous and joins whatever axes its inputs join.
    axes, _ = batch_axes(call.batch_shape, tuple(tensors.values()))
    sizes = call.dtype, call.head_dim, call.v_head_dim
    scaled = call.k_scales is not None
    variant = choose(current_device(cupy), *sizes, vector_loads(tensors), len(axes), scaled)
    variant, spans = _scheduled(call, variant, cupy)
    program = lower(call.visible, call.score, call.keep)
    return Choice(variant, program, index_type(program, call), spans)


@dataclass(frozen=True)
class Results:
    """What a call gives: out (..., Hq, Lq, Dv), contiguous in the order that the caller uses, and lse."""

    shape: tuple[int, ...]
    moved: bool
    dtype: Any
    lse: str | None

    def make(self, cupy: Any, room: int = 0) -> tuple[Array, Array | None]:
        """Memory for them, that of out with so many bytes more at its end."""
        *batch, heads, rows, columns = self.shape
        shape = (*batch, rows, heads, columns) if self.moved else self.shape
        if room:
            size = math.prod(shape)
            out = cupy.empty((size + -(-room // self.dtype.itemsize),), self.dtype)[:size].reshape(shape)
        else:
            out = cupy.empty(shape, self.dtype)
        if self.moved:
            out = cupy.moveaxis(out, -2, -3)
        return out, None if self.lse is None else cupy.empty(self.shape[:-1], self.lse)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def like_out(self) -> Any:
        """What out is like, without its memory."""
        one = numpy.empty(1, self.dtype)
        *batch, heads, rows, columns = self.shape
        shape = (*batch, rows, heads, columns) if self.moved else self.shape
        steps = [math.prod(shape[n + 1 :]) * one.itemsize for n in range(len(shape))]
        x = numpy.lib.stride_tricks.as_strided(one, shape, steps, writeable=False)
        return numpy.moveaxis(x, -2, -3) if self.moved else x


def _results(call: AttentionCall, dtype: Any) -> Results:
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    # JAX takes arrays in the order of their axes alone.
    moved = call.layout == "blhd" and call.has_heads and call.library != "jax"
    return Results(shape, moved, dtype, call.accumulate if call.return_lse else None)


class Prepared:
    """All that a launch needs but memory and the call's own arrays: it serves calls like one.

    Parameters
    ----------
    call : AttentionCall
        Of "attention", with rows; it is not kept.
    tensors : dict of str to array
        `tensors_of` it; they are not kept.
    cupy : module
    """

    def __init__(self, call: AttentionCall, tensors: dict[str, Array], cupy: Any):
        self.cupy = cupy
        self.device = cupy.cuda.Device().id
        self.library, self.accumulate = call.library, call.accumulate
        self.batch_shape = call.batch_shape
        self.results = _results(call, tensors["q"].dtype)
        choice = chosen(call, tensors, cupy)
        variant = choice.variant
        self.captures = Captures(call, choice.program, variant, choice.index, cupy)
        self.choice = replace(choice, program=replace(choice.program, tables=(), aligned=()))
        numbers = numbered(call)
        self.numbers = {
            name: numbers[id(getattr(call, name))]
            for name in ("k_scales", "v_scales", "sinks", "offset", "kv_lengths")
            if id(getattr(call, name)) in numbers
        }
        # A difference of arrays of NumPy without axes is a number.
        self.offset = None if is_array(call.offset) else int(call.offset)
        named = {**tensors, "out": self.results.like_out}
        sizes, strides = batch_axes(call.batch_shape, tuple(named.values()))
        self.block = numpy.zeros((), argument_dtype(len(sizes)))
        fill_strides(self.block, named, sizes, strides)
        items = fill_sizes(self.block, call, variant, call.q_len)
        # Blocks of a wide call have a range of columns each.
        ranges = max(1, -(-call.v_head_dim // variant.v_head_dim)) if variant.wide else 1
        self.parts = parts_of(current_device(cupy), items * ranges, -(-call.k_len // variant.keys))
        self.block["parts"] = self.parts
        self.grid = (items * self.parts, ranges)
        self.combine = combine_source(variant) if self.parts > 1 else ""
        number = self.parts * numpy.dtype(self.accumulate).itemsize
        self.part_bytes = number * math.prod(self.results.shape)
        # The results of parts, and what lies between them and out.
        self.room = _ALIGNMENT + _aligned(self.part_bytes) + number * self.results.rows

    def __call__(self, q: Array, k: Array, v: Array, *others: Array) -> tuple[Array, Array | None]:
        """(out, lse) of arrays of CuPy like those of the call, which may be aligned otherwise."""
        # A graph runs again when the call has long returned, and has of its memory what out is part of.
        captured = self.parts > 1 and capturing(self.cupy)
        out, lse = self.results.make(self.cupy, self.room if captured else 0)
        block, own = self.block.copy(), {name: others[n] for name, n in self.numbers.items()}
        tensors = {"q": q, "k": k, "v": v}
        for name, x in (*tensors.items(), ("out", out)):
            block[name] = x.data.ptr
        for name in ("k_scales", "v_scales"):
            if name in own:
                block[name] = own[name].data.ptr
        block["lse"] = 0 if lse is None else lse.data.ptr
        offset = own["offset"] if self.offset is None else self.offset
        beside = own.get("sinks"), offset, own.get("kv_lengths")
        kept: list[Any] = fill_others(block, *beside, self.batch_shape, self.cupy)
        fill_schedule(block, self.choice.spans, self.choice.variant.packed, self.cupy)
        arguments, read = self.captures(others)
        if captured:
            block["part_out"] = out.data.ptr + _aligned(out.nbytes)
            block["part_lse"] = block["part_out"] + _aligned(self.part_bytes)
        elif self.parts > 1:
            shape = (self.parts, *self.results.shape)
            made = [self.cupy.empty(shape, self.accumulate), self.cupy.empty(shape[:-1], self.accumulate)]
            block["part_out"], block["part_lse"] = (x.data.ptr for x in made)
            kept += made
        choice = self.choice
        if choice.variant.vector_loads and not vector_loads(tensors):
            choice = choice.unaligned
        memory, threads = choice.variant.shared_memory, choice.variant.threads
        forward = compiled(self.cupy, self.device, "forward", choice.source, memory)
        forward(self.grid, (threads,), (block, arguments), shared_mem=memory)
        if self.parts > 1:
            combine = compiled(self.cupy, self.device, "combine", self.combine, 0)
            combine((-(-self.results.rows // _ROWS_OF_COMBINE),), (_COMBINE_THREADS,), (block,))
        # CuPy's pool gives memory of temporary arrays to nobody before what was launched has run here.
        hold(self.library, [q, k, v, *others, *kept, *read, self.choice.spans], self.cupy)
        return out, lse


def attend(call: AttentionCall, cupy: Any) -> tuple[Array, Array | None]:
    """(out, lse) of a call of "attention", as CuPy's arrays."""
    tensors = tensors_of(call, cupy)
    results = _results(call, tensors["q"].dtype)
    if not results.rows:
        return results.make(cupy)
    others = (as_cupy(x, cupy) for x in call.others)
    return Prepared(call, tensors, cupy)(tensors["q"], tensors["k"], tensors["v"], *others)


def prepare(call: AttentionCall, cupy: Any) -> Prepared | None:
    """What serves calls like this one on arrays of CuPy; None where they have no rows.

    Its schedule is that of the call: the host knows no value of an array on a device that it might hang on.
    """
    tensors = tensors_of(call, cupy)
    return Prepared(call, tensors, cupy) if _results(call, tensors["q"].dtype).rows else None


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _scheduled(call: AttentionCall, variant: Variant, cupy: Any) -> tuple[Variant, DeviceSchedule | None]:
    """The schedule of a call; few queries of many heads are packed if the mask does not tell heads apart."""
    if call.group_size > 1 and call.q_len < variant.rows:
        spans = device_schedule(call, call.q_len, variant.keys, cupy)
        if spans is None or not spans.by_head:
            return replace(variant, packed=True), spans
    return variant, device_schedule(call, variant.rows, variant.keys, cupy)
