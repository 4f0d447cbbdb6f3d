"""Arrays that tile code captures, made again from words in memory."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llvmlite import ir
from numba.core import types

from anyattn_numba.jit import cgutils, intrinsic
from anyattn_numba.vectors import INT64, offset

__all__ = ["captured_array"]


@intrinsic
def captured_array(typing_context: Any, address: Any, kind: Any) -> Any:
    """The array whose address, shape and strides are the words at `address`, as a Numba array type has it."""
    array_type = kind.instance_type

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # 25 ms, which code from the disk cache does without.
        arrayobj: Any = import_module("numba.np.arrayobj")
        address = arguments[0]
        count = 1 + 2 * array_type.ndim
        words = [
            builder.load(builder.inttoptr(offset(builder, address, 8 * n), INT64.as_pointer()))
            for n in range(count)
        ]
        array = arrayobj.make_array(array_type)(context, builder)
        item = context.get_data_type(array_type.dtype)
        arrayobj.populate_array(
            array,
            data=builder.inttoptr(words[0], item.as_pointer()),
            shape=cgutils.pack_array(builder, words[1 : 1 + array_type.ndim], ty=INT64),
            strides=cgutils.pack_array(builder, words[1 + array_type.ndim :], ty=INT64),
            itemsize=ir.Constant(INT64, context.get_abi_sizeof(item)),
            meminfo=None,
        )
        return array._getvalue()

    return array_type(types.int64, kind), code
