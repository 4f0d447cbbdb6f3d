"""From the description of a call of `linear_attention` to launches on the current device and stream.

As in `launch`, CuPy comes as an argument, and nothing reads values of arrays. A long sequence of few heads is
cut into parts: a first launch finds what each makes of no state, `linear_join` the states before them, and a
second launch goes over them all at once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy

from anyattn.arrays import Array, cast, exactly
from anyattn.linear.call import LinearCall
from anyattn_cupy.arguments import struct_dtype, struct_source
from anyattn_cupy.devices import current_device
from anyattn_cupy.exchange import as_cupy, hold
from anyattn_cupy.filling import batch_axes, compiled, fill_arrays
from anyattn_cupy.linear_variants import FEATURE_MAPS, LinearVariant, choose, parts_of
from anyattn_cupy.source import joined

__all__ = ["join_source", "linear", "linear_source", "remarks"]

_JOIN_THREADS = 128

# As in `arguments`: what a call has not is a null pointer, strides are in elements.
_POINTERS = {
    # Arrays (..., H, L, D); out has steps of 1. Decays (..., Hkv, L, F or 1), beta (..., Hkv, L, 1) and
    # states are of the accumulation type.
    "q": "const void*", "k": "const void*", "v": "const void*", "out": "void*",
    "decay": "const void*", "beta": "const void*",
    # States (B, N, Hkv, F, Dv) and normalizers (B, N, Hkv, F), contiguous; of the normalizers after, one for
    # each block of columns, `z_columns` apart.
    "state_before": "const void*", "z_before": "const void*", "state_after": "void*", "z_after": "void*",
    # Of parts of sequences: theirs (B, parts, Hkv, F, Dv) and (B, parts, Hkv, F), and what they keep of a
    # state, (B, parts, Hkv, F).
    "part_state": "void*", "part_z": "void*", "kept": "void*",
    # Bounds of packed sequences, (N + 1,).
    "bounds": "const long long*",
}  # fmt: skip
_WIDE = (
    *(f"{name}_{part}" for name in ("q", "k", "v", "decay", "beta") for part in ("head", "row", "step")),
    "out_head", "out_row", "z_columns",
)  # fmt: skip
_PER_BATCH_AXIS = tuple(f"{name}_batch" for name in ("q", "k", "v", "out", "decay", "beta"))
# `sequences` of a batch entry, or parts of `part_len` tokens, of which a launch may take `rows_alone`;
# whether rows of out are whole `vectors`.
_NARROW = (
    "q_len", "k_len", "head_dim", "v_head_dim", "batch_size", "num_kv_heads", "group_size", "sequences",
    "part_len", "rows_alone", "vectors",
)  # fmt: skip


_States = tuple[Array | None, Array | None]


def _fields(axes: int) -> list[tuple[str, str, str, int]]:
    fields = [(name, kind, "u8", 0) for name, kind in _POINTERS.items()]
    fields += [(name, "long long", "i8", 0) for name in _WIDE]
    fields += [(name, "long long", "i8", axes) for name in _PER_BATCH_AXIS]
    fields += [("scale", "double", "f8", 0)]
    fields += [(name, "int", "i4", 0) for name in _NARROW]
    return [*fields, ("batch_sizes", "int", "i4", axes)]


@lru_cache
def linear_source(variant: LinearVariant) -> str:
    """CUDA C++ of a kernel for NVRTC, complete."""
    files = ("elements.cuh", "linear_chunk.cuh", "linear_forward.cu")
    return joined(variant.constants(), struct_source(_fields(variant.batch_axes)), "", files)


@lru_cache
def join_source(variant: LinearVariant) -> str:
    """CUDA C++ of the kernel that joins parts of sequences."""
    files = ("elements.cuh", "linear_join.cu")
    return joined(variant.constants(), struct_source(_fields(variant.batch_axes)), "", files)


def remarks(call: LinearCall, cupy: Any) -> tuple[str, ...]:
    """What a caller should know of how a call runs on the current device."""
    found = []
    wide_features = call.feature_map not in FEATURE_MAPS or call.q.dtype != call.v.dtype
    if wide_features:
        found.append(f"holds features of q and k of all tokens in {call.accumulate}")
    variant = choose(current_device(cupy), call, 1, wide_features)
    if variant.wide:
        found.append(
            f"a chunk holds {variant.head_dim} of D = {call.head_dim} channels at a time, and the state "
            "comes from global memory for each"
        )
    if call.dtype != call.accumulate:
        found.append(f"multiplies {call.dtype} in {call.accumulate}, without tensor cores")
    return tuple(found)


def _tensors(call: LinearCall, cupy: Any) -> tuple[dict[str, Array], bool]:
    """The arrays of a call that have tokens, as CuPy's; whether q and k are in the accumulation dtype."""
    q, k = call.q, call.k
    if call.feature_map not in FEATURE_MAPS:
        wide = getattr(call.xp, call.accumulate)
        with exactly(call.v):
            q, k = (call.mapped(cast(call.xp, x, wide)) for x in (q, k))
    given = {"q": q, "k": k, "v": call.v, "decay": call.decay, "beta": call.beta}
    found = {name: as_cupy(x, cupy) for name, x in given.items() if x is not None}
    if call.beta is not None:
        found["beta"] = found["beta"][..., None]
    return found, q.dtype != call.v.dtype


def _out(call: LinearCall, dtype: Any, cupy: Any) -> Array:
    """Memory for the result, contiguous in the order that the caller uses."""
    shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
    # JAX takes arrays in the order of their axes alone.
    if call.layout != "blhd" or not call.has_heads or call.library == "jax":
        return cupy.empty(shape, dtype)
    *batch, heads, rows, columns = shape
    return cupy.moveaxis(cupy.empty((*batch, rows, heads, columns), dtype), -2, -3)


class _Launch:
    """The arrays of a call and the argument block, which launches change."""

    def __init__(self, call: LinearCall, cupy: Any):
        self.call, self.cupy = call, cupy
        self.device = current_device(cupy)
        tensors, wide_features = _tensors(call, cupy)
        self.sequences = () if call.cu_seqlens is None else (call.num_sequences,)
        self.lead = (*call.batch_shape, *self.sequences, call.num_kv_heads)
        self.strands = math.prod(self.lead)
        self.out = _out(call, tensors["v"].dtype, cupy)
        named = {**tensors, "out": self.out}
        sizes, strides = batch_axes(call.batch_shape, tuple(named.values()))
        self.variant = choose(self.device, call, self.strands, wide_features, len(sizes))
        # One block of columns at least, for the normalizer.
        self.columns = max(1, -(-call.v_head_dim // self.variant.columns))
        self.used = list(named.values())
        self.block = numpy.zeros((), struct_dtype(_fields(len(sizes))))
        fill_arrays(self.block, named, sizes, strides)
        for name in ("scale", "q_len", "k_len", "head_dim", "v_head_dim", "num_kv_heads", "group_size"):
            self.block[name] = getattr(call, name)
        self.block["batch_size"], self.block["sequences"] = math.prod(call.batch_shape), call.num_sequences
        self.block["vectors"] = _whole_vectors(self.out, self.variant)
        if call.cu_seqlens is not None:
            bounds = as_cupy(call.cu_seqlens, cupy)
            self.used.append(bounds)
            self.put(bounds=self.ready(bounds.astype("int64")))

    def empty(self, *shape: int) -> Array:
        """Memory of the accumulation type."""
        return self.cupy.empty(shape, self.call.accumulate)

    def ready(self, x: Array) -> Array:
        """A contiguous array; what it is made of must outlive the launch too."""
        self.used.append(x)
        return self.cupy.ascontiguousarray(x)

    def start(self, given: Array | None, shape: tuple[int, ...]) -> Array | None:
        """A state as kernels read it."""
        if given is None:
            return None
        x = as_cupy(given, self.cupy)
        self.used.append(x)
        return self.ready(self.cupy.broadcast_to(x, shape))

    def put(self, **arrays: Array | None) -> None:
        """Fill in pointers."""
        for name, x in arrays.items():
            self.block[name] = 0 if x is None else x.data.ptr
            self.used.append(x)

    def run(self) -> tuple[Array, Array, Array | None]:
        """(out, state, normalizer)."""
        call = self.call
        shape = (*self.lead, call.head_dim)
        state = self.empty(*shape, call.v_head_dim)
        z = self.empty(self.columns, *shape) if call.normalize else None
        before = self.start(call.state, state.shape), self.start(call.normalizer, shape)
        if self.strands:
            parts = 1
            if call.cu_seqlens is None:
                blocks = self.strands * self.columns
                parts = parts_of(self.device, self.variant, blocks, max(call.k_len, call.q_len))
            (self._in_parts if parts > 1 else self._whole)(before, (state, z), parts)
        hold(call.library, [x for x in self.used if x is not None], self.cupy)
        return self.out, state, None if z is None else z[0]

    def _whole(self, before: _States, after: _States, parts: int) -> None:
        self.put(state_before=before[0], z_before=before[1], state_after=after[0], z_after=after[1])
        self._forward(self.strands)

    def _in_parts(self, before: _States, after: _States, parts: int) -> None:
        call, block = self.call, self.block
        block["part_len"], block["sequences"] = self._part_of(call.k_len, parts), parts
        number = self.strands * parts
        state = self.empty(number, call.head_dim, call.v_head_dim)
        z = self.empty(self.columns, number, call.head_dim) if call.normalize else None
        kept = self.empty(number, call.head_dim) if self.variant.channels else None
        block["group_size"] = 0
        self.put(state_after=state, z_after=z, kept=kept)
        self._forward(number)
        self.put(state_before=before[0], z_before=before[1], state_after=after[0], z_after=after[1])
        self.put(part_state=state, part_z=z)
        entries = self.strands * call.head_dim * (call.v_head_dim + call.normalize)
        if entries:
            join = compiled(self.cupy, self._number, "linear_join", join_source(self.variant), 0)
            join((-(-entries // _JOIN_THREADS),), (_JOIN_THREADS,), (block,))
        block["group_size"] = call.group_size
        self.put(state_before=state, z_before=z, state_after=None, z_after=None, kept=None)
        if not call.causal:
            block["rows_alone"], block["k_len"] = True, call.q_len
            block["part_len"] = self._part_of(call.q_len, parts)
        self._forward(number)

    def _part_of(self, length: int, parts: int) -> int:
        """Tokens of a part, whole chunks."""
        rows = self.variant.rows
        return max(1, -(-length // (rows * parts))) * rows

    def _forward(self, strands: int) -> None:
        memory = self.variant.shared_memory
        # Between normalizers of blocks of columns.
        self.block["z_columns"] = strands * self.call.head_dim
        kernel = compiled(self.cupy, self._number, "linear_forward", linear_source(self.variant), memory)
        kernel((strands, self.columns), (self.variant.threads,), (self.block,), shared_mem=memory)

    @property
    def _number(self) -> int:
        return int(self.cupy.cuda.Device().id)


def _whole_vectors(out: Array, variant: LinearVariant) -> bool:
    """Whether rows of the result are whole vectors of as many columns as a lane has."""
    size = out.dtype.itemsize
    nbytes = size * (2 if variant.accumulate == "float64" else 4)
    steps = [stride for n, stride in zip(out.shape[:-1], out.strides, strict=False) if n > 1]
    return not any(step % nbytes for step in (*steps, out.shape[-1] * size, out.data.ptr))


def linear(call: LinearCall, cupy: Any) -> tuple[Array, Array, Array | None]:
    """(out, state, normalizer) of a call, as CuPy's arrays."""
    return _Launch(call, cupy).run()
