"""From the description of a call of `attention_weights` or `attention_stats` to a launch, as in `launch`."""

from __future__ import annotations

import math
from typing import Any

import numpy

from anyattn.arrays import Array, is_array
from anyattn.call import AttentionCall
from anyattn.expr.program import lower
from anyattn_cupy.arguments import argument_dtype
from anyattn_cupy.devices import current_device
from anyattn_cupy.exchange import as_cupy, hold
from anyattn_cupy.filling import (
    Captures,
    batch_axes,
    compiled,
    fill_arrays,
    fill_others,
    fill_schedule,
    fill_sizes,
    index_type,
    tensors_of,
    vector_loads,
)
from anyattn_cupy.launch import Choice
from anyattn_cupy.schedules import device_schedule
from anyattn_cupy.variants import choose_inspect, chunks_of

__all__ = ["chosen", "stats", "weights"]


def chosen(call: AttentionCall, tensors: dict[str, Array], cupy: Any) -> Choice:
    """The kernel for a call of "weights" or "stats" with these `tensors_of` it."""
    axes, _ = batch_axes(call.batch_shape, tuple(tensors.values()))
    vectors = vector_loads(tensors)
    variant = choose_inspect(current_device(cupy), call.dtype, call.head_dim, vectors, len(axes))
    # The schedule is one of all rows; chosen ones look at every key.
    spans = None if call.rows is not None else device_schedule(call, variant.rows, variant.keys, cupy)
    program = lower(call.visible, call.score)
    return Choice(variant, program, index_type(program, call), spans)


def weights(call: AttentionCall, cupy: Any) -> Array:
    """Softmax weights (..., Hq, R, Lk) of a call of "weights", in its dtype, as an array of CuPy."""
    tensors = tensors_of(call, cupy)
    rows = None if call.rows is None else as_cupy(call.rows, cupy)
    shape = (*call.batch_shape, call.num_heads, call.q_len if rows is None else rows.shape[0], call.k_len)
    # Tiles that the schedule leaves out are not written.
    out = (cupy.empty if call.visible is None else cupy.zeros)(shape, tensors["q"].dtype)
    if math.prod(shape):
        _launch(call, tensors, {"out": out}, {}, rows, cupy)
    return out


def stats(call: AttentionCall, cupy: Any) -> dict[str, Array]:
    """The statistics that a call of "stats" asks for, in the accumulation dtype, as arrays of CuPy."""
    heads, chunks = (*call.batch_shape, call.num_heads), 1
    found = {}
    if "key_mass" in call.stats:
        device = current_device(cupy)
        rows = choose_inspect(device, call.dtype, call.head_dim, vector_loads=False).rows
        nbytes = math.prod(heads) * call.k_len * numpy.dtype(call.accumulate).itemsize
        chunks = chunks_of(device, math.prod(heads), -(-call.q_len // rows), nbytes)
        found["key_mass"] = cupy.zeros((chunks, *heads, call.k_len), call.accumulate)
    for name, field in (("entropy", "entropy"), ("max", "peak")):
        if name in call.stats:
            found[field] = cupy.empty((*heads, call.q_len), call.accumulate)
    if math.prod(heads) * call.q_len:
        _launch(call, tensors_of(call, cupy), {}, found, None, cupy)
    if "key_mass" in found:
        mass = found["key_mass"]
        found["key_mass"] = mass[0] if chunks == 1 else mass.sum(axis=0)
    return {name: found["peak" if name == "max" else name] for name in call.stats}


def _launch(
    call: AttentionCall,
    tensors: dict[str, Array],
    written: dict[str, Array],
    sums: dict[str, Array],
    rows: Array | None,
    cupy: Any,
) -> None:
    """Launch `inspect` on q and k, and for weights out; with memory for sums, by their names as arguments."""
    arrays = tensors | written
    sizes, strides = batch_axes(call.batch_shape, tuple(arrays.values()))
    choice = chosen(call, tensors, cupy)
    variant = choice.variant
    others = [as_cupy(x, cupy) for x in call.others]
    captured, kept = Captures(call, choice.program, variant, choice.index, cupy)(others)

    block = numpy.zeros((), argument_dtype(len(sizes)))
    fill_arrays(block, arrays, sizes, strides)
    items = fill_sizes(block, call, variant, call.q_len if rows is None else rows.shape[0])
    fill_schedule(block, choice.spans, variant.packed, cupy)
    sinks = None if call.sinks is None else as_cupy(call.sinks, cupy)
    offset = as_cupy(call.offset, cupy) if is_array(call.offset) else int(call.offset)
    lengths = None if call.kv_lengths is None else as_cupy(call.kv_lengths, cupy)
    kept += fill_others(block, sinks, offset, lengths, call.batch_shape, cupy)
    for name, x in sums.items():
        block[name] = x.data.ptr
    if rows is not None:
        kept += [rows, cupy.ascontiguousarray(rows.astype("int64"))]
        block["row_numbers"] = kept[-1].data.ptr
    blocks = chunks = int(block["blocks"])
    if "key_mass" in sums:
        # A chunk is of one head, and its blocks are added up in their order.
        chunks, block["order"] = sums["key_mass"].shape[0], 0
    block["chunks"] = chunks

    number = cupy.cuda.Device().id
    inspect = compiled(cupy, number, "inspect", choice.source, variant.shared_memory)
    grid = (items // blocks * chunks,)
    inspect(grid, (variant.threads,), (block, captured), shared_mem=variant.shared_memory)
    hold(call.library, [*arrays.values(), *sums.values(), *others, *kept, choice.spans], cupy)
