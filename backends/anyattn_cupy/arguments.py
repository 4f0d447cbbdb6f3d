"""The argument block of a kernel: one struct, written once, as CUDA C++ and as a NumPy dtype.

A kernel has two parameters: this block, and what masks and scores capture (`anyattn.expr.print_cuda`), both
by value. Strides are in elements. What a call has not is a null pointer.
"""

from __future__ import annotations

from typing import Any

import numpy

__all__ = ["Field", "argument_dtype", "argument_source", "struct_dtype", "struct_source"]

_POINTERS = {
    # Arrays (..., H, L, D); out has steps of 1, lse (B, Hq, Lq) is contiguous and of the accumulation type.
    "q": "const void*", "k": "const void*", "v": "const void*", "out": "void*", "lse": "void*",
    # Of int8 k and v: (..., Hkv, Lk).
    "k_scales": "const float*", "v_scales": "const float*",
    # (Hq,), of the accumulation type.
    "sinks": "const void*",
    # Of each batch entry: the position of row 0, without which `offset` is that of all; valid keys.
    "offsets": "const long long*", "lengths": "const long long*",
    # The schedule (`anyattn.schedule.Spans`), and the order in which items are handed out.
    "span_starts": "const long long*", "span_ends": "const long long*", "span_kinds": "const unsigned char*",
    "columns": "const int*", "groups": "const int*", "order": "const int*",
    # Where keys are split into parts, their results (parts, B, Hq, Lq, Dv) and lse (parts, B, Hq, Lq), of the
    # accumulation type.
    "part_out": "void*", "part_lse": "void*",
    # Of `inspect`: the rows that are asked for (R,); sums over rows (chunks, B, Hq, Lk), of rows (B, Hq, Lq),
    # of the accumulation type. Its out are the weights (..., Hq, R, Lk).
    "row_numbers": "const long long*", "key_mass": "void*", "entropy": "void*", "peak": "void*",
}  # fmt: skip
_WIDE = (
    "q_head", "q_row", "q_step", "k_head", "k_row", "k_step", "v_head", "v_row", "v_step",
    "k_scales_head", "k_scales_row", "v_scales_head", "v_scales_row", "out_head", "out_row", "offset",
)  # fmt: skip
# Rows of a head, or of a group of heads that are packed; `blocks` of rows that these are, which `chunks` take
# in turn.
_NARROW = (
    "q_len", "k_len", "head_dim", "v_head_dim", "batch_size", "num_heads", "group_size", "rows", "blocks",
    "parts", "chunks",
)  # fmt: skip
_PER_BATCH_AXIS = ("q_batch", "k_batch", "v_batch", "k_scales_batch", "v_scales_batch", "out_batch")


Field = tuple[str, str, str, int]
"""Name, type in C++, type in NumPy, and number of a field; 0 is no array."""


def _fields(axes: int) -> list[Field]:
    fields = [(name, kind, "u8", 0) for name, kind in _POINTERS.items()]
    fields += [(name, "long long", "i8", 0) for name in _WIDE]
    fields += [(name, "long long", "i8", axes) for name in _PER_BATCH_AXIS]
    # Of products of queries and keys; of weights that dropout leaves.
    fields += [(name, "double", "f8", 0) for name in ("scale", "kept_scale")]
    fields += [(name, "int", "i4", 0) for name in _NARROW]
    return [*fields, ("batch_sizes", "int", "i4", axes)]


def argument_source(axes: int) -> str:
    """The struct `Arguments` for arrays of so many batch axes, at least 1."""
    return struct_source(_fields(axes))


def argument_dtype(axes: int) -> numpy.dtype[Any]:
    """The same struct as a NumPy dtype."""
    return struct_dtype(_fields(axes))


def struct_source(fields: list[Field]) -> str:
    """A struct `Arguments` of fields."""
    lines = ["struct Arguments {"]
    for name, kind, _, count in fields:
        lines.append(f"    {kind} {name}{f'[{count}]' if count else ''};")
    return "\n".join([*lines, "};"]) + "\n"


def struct_dtype(fields: list[Field]) -> numpy.dtype[Any]:
    """The same struct as a NumPy dtype."""
    members = [(name, kind, (count,)) if count else (name, kind) for name, _, kind, count in fields]
    return numpy.dtype(members, align=True)
