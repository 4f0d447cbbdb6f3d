"""Arrays that tile code reads and writes, made of addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from anyattn_numba.jit import array_value, intrinsic, itemsize
from anyattn_numba.vectors import INT64, offset

__all__ = ["array_of", "captured_array"]


@intrinsic
def captured_array(typing_context: Any, address: Any, kind: Any) -> Any:
    """The array whose address, shape and strides are the words at `address`, as a Numba array type has it."""
    ndim = kind.instance_type.ndim

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = [
            builder.load(builder.inttoptr(offset(builder, arguments[0], 8 * n), INT64.as_pointer()))
            for n in range(1 + 2 * ndim)
        ]
        return _array(context, builder, kind.instance_type, words[0], words[1 : 1 + ndim], words[1 + ndim :])

    return kind.instance_type(types.int64, kind), code


@intrinsic
def array_of(typing_context: Any, address: Any, rows: Any, width: Any, kind: Any) -> Any:
    """The contiguous array (rows, width), or (width,), at an address, of a Numba array type."""
    array_type = kind.instance_type

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, rows, width, _ = arguments
        size = ir.Constant(INT64, itemsize(array_type.dtype))
        shape = [rows, width][-array_type.ndim :]
        strides = [builder.mul(width, size), size][-array_type.ndim :]
        return _array(context, builder, array_type, address, shape, strides)

    return array_type(*[types.int64] * 3, kind), code


def _array(
    context: Any, builder: Any, array_type: Any, address: Any, shape: list[Any], strides: list[Any]
) -> Any:
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    return array_value(context, builder, array_type, pointer, shape, strides)
