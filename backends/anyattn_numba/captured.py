"""Arrays that tile code reads and writes, made of addresses.

`numba.carray` does the same, and takes Numba 20 ms for each type and number of axes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llvmlite import ir
from numba.core import types

from anyattn_numba.jit import cgutils, intrinsic
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
        size = ir.Constant(INT64, context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
        shape = [rows, width][-array_type.ndim :]
        strides = [builder.mul(width, size), size][-array_type.ndim :]
        return _array(context, builder, array_type, address, shape, strides)

    return array_type(*[types.int64] * 3, kind), code


def _array(
    context: Any, builder: Any, array_type: Any, address: Any, shape: list[Any], strides: list[Any]
) -> Any:
    # 25 ms, which code from the disk cache does without.
    arrayobj: Any = import_module("numba.np.arrayobj")
    array = arrayobj.make_array(array_type)(context, builder)
    item = context.get_data_type(array_type.dtype)
    arrayobj.populate_array(
        array,
        data=builder.inttoptr(address, item.as_pointer()),
        shape=cgutils.pack_array(builder, shape, ty=INT64),
        strides=cgutils.pack_array(builder, strides, ty=INT64),
        itemsize=ir.Constant(INT64, context.get_abi_sizeof(item)),
        meminfo=None,
    )
    return array._getvalue()
