"""What launches of all kernels have in common: the argument block, what the program captures, the module.

CuPy comes as an argument, as in `launch`. Nothing here reads values of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.dropout import kept_scale
from anyattn.expr.bounds import fits, index_ranges
from anyattn.expr.print_cuda import cuda_arguments
from anyattn.expr.program import Program
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn_cupy.capture import refuse_converted
from anyattn_cupy.exchange import as_cupy
from anyattn_cupy.schedules import DeviceSchedule
from anyattn_cupy.source import OPTIONS
from anyattn_cupy.streams import Kept
from anyattn_cupy.variants import Variant

__all__ = [
    "Captures",
    "batch_axes",
    "compiled",
    "fill_arrays",
    "fill_others",
    "fill_schedule",
    "fill_sizes",
    "fill_strides",
    "index_type",
    "numbered",
    "tensors_of",
    "vector_loads",
]

_SMALL_SHARED_MEMORY = 48 * 1024


def tensors_of(call: AttentionCall, cupy: Any) -> dict[str, Array]:
    """q, k and v as CuPy's where a call has them, with scales (..., Hkv, Lk, 1) of int8 k and v."""
    named = {"q": call.q, "k": call.k, "v": call.v}
    found = {name: as_cupy(x, cupy) for name, x in named.items() if x is not None}
    for name, x in (("k_scales", call.k_scales), ("v_scales", call.v_scales)):
        if x is not None:
            found[name] = as_cupy(x, cupy)[..., None]
    return found


def vector_loads(tensors: dict[str, Array]) -> bool:
    """Whether rows of q, k and v (..., D) can be read in vectors of 16 bytes, of 8 where they are int8."""
    for x in (tensors[name] for name in "qkv" if name in tensors):
        size = x.dtype.itemsize
        vector = 8 if size == 1 else 16
        steps = [stride for n, stride in zip(x.shape[:-1], x.strides, strict=False) if n > 1]
        contiguous = x.shape[-1] <= 1 or x.strides[-1] == size
        if not contiguous or any(step % vector for step in (*steps, x.shape[-1] * size, x.data.ptr)):
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
    """Fill in addresses and strides of arrays, with batch axes from `batch_axes`."""
    fill_strides(block, arrays, sizes, strides)
    for name, x in arrays.items():
        block[name] = x.data.ptr


def fill_strides(
    block: Any, arrays: dict[str, Array], sizes: tuple[int, ...], strides: list[tuple[int, ...]]
) -> None:
    """Fill in the strides alone."""
    block["batch_sizes"] = sizes
    for (name, x), batch in zip(arrays.items(), strides, strict=True):
        block[f"{name}_batch"] = batch
        head, row, step = (s // x.dtype.itemsize for s in x.strides[-3:])
        block[f"{name}_head"], block[f"{name}_row"] = head, row
        if f"{name}_step" in block.dtype.names:
            block[f"{name}_step"] = step


def fill_sizes(block: Any, call: AttentionCall, variant: Variant, rows: int) -> int:
    """Fill in sizes of a call with so many rows for each head; how many items there are."""
    block["scale"] = call.scale
    block["kept_scale"] = 1.0 if call.keep is None else kept_scale(call.keep)
    for name in ("q_len", "k_len", "head_dim", "v_head_dim", "num_heads", "group_size"):
        block[name] = getattr(call, name)
    batch, packed = math.prod(call.batch_shape), variant.packed
    rows *= call.group_size if packed else 1
    blocks = -(-rows // variant.rows)
    block["batch_size"], block["rows"], block["blocks"] = batch, rows, blocks
    block["parts"] = 1
    return batch * (call.num_kv_heads if packed else call.num_heads) * blocks


def fill_schedule(block: Any, spans: DeviceSchedule | None, packed: bool, cupy: Any) -> None:
    """Fill in the schedule of a call; one of blocks of `packed` rows has no order."""
    if spans is not None:
        for name, array in spans.arrays(cupy).items():
            block[name] = 0 if name == "order" and packed else array.data.ptr


def numbered(call: AttentionCall) -> dict[int, int]:
    """Numbers of `call.others` by their ids."""
    found: dict[int, int] = {}
    for n, x in enumerate(call.others):
        found.setdefault(id(x), n)
    return found


def fill_others(
    block: Any,
    sinks: Array | None,
    offset: Array | int,
    lengths: Array | None,
    batch_shape: tuple[int, ...],
    cupy: Any,
) -> list[Array]:
    """Fill in sinks, the position of row 0 and valid keys, of CuPy; what must outlive the launch."""
    kept = []
    if sinks is not None:
        kept.append(_as_read(sinks, cupy.ascontiguousarray(sinks), "sinks", cupy))
        block["sinks"] = kept[-1].data.ptr
    if isinstance(offset, int):
        block["offset"], offset = offset, None
    for field, x, name in (("offsets", offset, "q_offset"), ("lengths", lengths, "kv_lengths")):
        if x is not None:
            entries = cupy.broadcast_to(x.astype("int64", copy=False), batch_shape)
            kept.append(_as_read(x, cupy.ascontiguousarray(entries), name, cupy))
            block[field] = kept[-1].data.ptr
    return kept


def _as_read(given: Array, read: Array, name: str, cupy: Any) -> Array:
    """What a kernel reads of an argument: its own memory, or that of a copy."""
    if read.data.ptr != given.data.ptr:
        refuse_converted(name, given, cupy)
    return read


def index_type(program: Program, call: AttentionCall) -> str:
    """The C++ type in which integers of a program are computed for a call."""
    return "int" if fits(program, index_ranges(call)) else "long long"


class Captures:
    """What masks and scores read, as the second argument of a kernel.

    Arrays of `call.others` are those of each call. What else there is was made for the call, and is kept.
    """

    def __init__(self, call: AttentionCall, program: Program, variant: Variant, index: str, cupy: Any):
        numbers, read = numbered(call), (*program.tables, *program.aligned)
        self._numbers = [numbers.get(id(x)) for x in read]
        self._own = Kept(
            (as_cupy(x, cupy) for x, n in zip(read, self._numbers, strict=True) if n is None), cupy
        )
        self._tables = len(program.tables)
        self._program = replace(program, tables=(), aligned=())
        self._sizes = call.batch_shape, call.num_heads, call.q_len, call.k_len
        self._how = variant.accumulate, index
        self._cupy = cupy
        self._made: dict[int, tuple[Any, list[Array]]] = {}
        if all(n is None for n in self._numbers):
            self(())

    def __call__(self, others: Sequence[Array]) -> tuple[Any, list[Array]]:
        """The argument for a call with these arrays of CuPy; what must outlive the launch."""
        own = self._own.here(self._cupy)
        if any(n is not None for n in self._numbers):
            return self._make(own, others)
        # Those of a stream are one object.
        if id(own) not in self._made:
            self._made[id(own)] = self._make(own, others)
        return self._made[id(own)]

    def _make(self, own: Sequence[Array], others: Sequence[Array]) -> tuple[Any, list[Array]]:
        cupy, kept = self._cupy, iter(own)
        given = [next(kept) if n is None else others[n] for n in self._numbers]
        tables = tuple(
            _as_read(x, cupy.ascontiguousarray(x), "an array of mask or score_mod", cupy)
            for x in given[: self._tables]
        )
        views = tuple(
            _as_read(x, aligned_view(cupy, x, slot.block, *self._sizes), "a bias or mask", cupy)
            for x, slot in zip(given[self._tables :], aligned_slots(self._program), strict=True)
        )
        read = [*tables, *views]
        addresses = tuple(x.data.ptr for x in read)
        accumulate, index = self._how
        program = replace(self._program, tables=tables)
        # CuPy passes an array of NumPy by value, and knows no scalar of a struct.
        return numpy.asarray(cuda_arguments(program, accumulate, views, addresses, index)), [*given, *read]


@cache
def compiled(cupy: Any, device: int, name: str, source: str, shared_memory: int) -> Any:
    """A compiled kernel of a device; CuPy keeps machine code on disk."""
    function = cupy.RawModule(code=source, options=OPTIONS).get_function(name)
    if shared_memory > _SMALL_SHARED_MEMORY:
        function.max_dynamic_shared_size_bytes = shared_memory
    return function
