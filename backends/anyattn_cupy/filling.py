"""What launches of all kernels have in common: the argument block, what the program captures, the module.

CuPy comes as an argument, as in `launch`. Nothing here reads values of arrays.
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
from anyattn.expr.program import Program
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn_cupy.exchange import as_cupy
from anyattn_cupy.schedules import DeviceSchedule
from anyattn_cupy.source import OPTIONS
from anyattn_cupy.variants import Variant

__all__ = [
    "batch_axes",
    "captured_of",
    "compiled",
    "fill_arrays",
    "fill_options",
    "fill_sizes",
    "index_type",
    "vector_loads",
]

_SMALL_SHARED_MEMORY = 48 * 1024


def vector_loads(*arrays: Array) -> bool:
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


def fill_arrays(
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


def fill_sizes(block: Any, call: AttentionCall, variant: Variant, rows: int) -> int:
    """Fill in sizes of a call with so many rows for each head; how many items there are."""
    block["scale"] = call.scale
    for name in ("q_len", "k_len", "head_dim", "v_head_dim", "num_heads", "group_size"):
        block[name] = getattr(call, name)
    batch, packed = math.prod(call.batch_shape), variant.packed
    rows *= call.group_size if packed else 1
    blocks = -(-rows // variant.rows)
    block["batch_size"], block["rows"], block["blocks"] = batch, rows, blocks
    block["parts"] = 1
    return batch * (call.num_kv_heads if packed else call.num_heads) * blocks


def fill_options(
    block: Any, call: AttentionCall, variant: Variant, spans: DeviceSchedule | None, cupy: Any
) -> list[Array | DeviceSchedule]:
    """What a call may have or not; what must outlive the launch, with what copies were begun from."""
    kept: list[Any] = [spans]
    if call.sinks is not None:
        kept.append(as_cupy(call.sinks, cupy))
        kept.append(cupy.ascontiguousarray(kept[-1].astype(call.accumulate)))
        block["sinks"] = kept[-1].data.ptr
    if isinstance(call.offset, int):
        block["offset"] = call.offset
    else:
        kept.append(as_cupy(call.offset, cupy))
        offsets = cupy.broadcast_to(kept[-1].astype("int64"), call.batch_shape)
        kept.append(cupy.ascontiguousarray(offsets))
        block["offsets"] = kept[-1].data.ptr
    if spans is not None:
        for name, array in spans.arrays.items():
            # The order is of blocks of one head.
            block[name] = 0 if name == "order" and variant.packed else array.data.ptr
    return kept


def index_type(program: Program, call: AttentionCall) -> str:
    """The C++ type in which integers of a program are computed for a call."""
    return "int" if fits(program, index_ranges(call)) else "long long"


def captured_of(
    call: AttentionCall, program: Program, variant: Variant, index: str, cupy: Any
) -> tuple[Any, list[Array]]:
    """What masks and scores read, as the second argument of a kernel; what must outlive the launch."""
    given = [as_cupy(x, cupy) for x in (*program.tables, *program.aligned)]
    tables, aligned = given[: len(program.tables)], given[len(program.tables) :]
    program = replace(program, tables=tuple(cupy.ascontiguousarray(x) for x in tables))
    sizes = call.batch_shape, call.num_heads, call.q_len, call.k_len
    views = tuple(
        aligned_view(cupy, x, slot.block, *sizes)
        for x, slot in zip(aligned, aligned_slots(program), strict=True)
    )
    read = [*program.tables, *views]
    addresses = tuple(x.data.ptr for x in read)
    # CuPy passes an array of NumPy by value, and knows no scalar of a struct.
    return numpy.asarray(cuda_arguments(program, variant.accumulate, views, addresses, index)), [
        *read,
        *given,
    ]


@cache
def compiled(cupy: Any, device: int, name: str, source: str, shared_memory: int) -> Any:
    """A compiled kernel of a device; CuPy keeps machine code on disk."""
    function = cupy.RawModule(code=source, options=OPTIONS).get_function(name)
    if shared_memory > _SMALL_SHARED_MEMORY:
        function.max_dynamic_shared_size_bytes = shared_memory
    return function
