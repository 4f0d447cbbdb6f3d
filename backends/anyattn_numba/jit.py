"""Numba's decorators as this package uses them, and arrays made of addresses.

What they give is called by compiled code only, whose types are Numba's, so it has none for Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numba.extending
from llvmlite import ir
from numba.core import cgutils as _cgutils
from numba.core import types
from numba.np.numpy_support import as_dtype

from anyattn_numba.parts import PartCompiler, TaskCompiler

__all__ = [
    "OPTIONS",
    "array_value",
    "carray",
    "cgutils",
    "compiled",
    "inlined",
    "intrinsic",
    "itemsize",
    "named_apart",
    "task",
]

# No exception for a division by zero, no GIL, and no wrappers that make functions callable from Python, which
# take a sixth of the time in which kernels compile.
OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "nogil": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

cgutils: Any = _cgutils


def compiled(function: Callable[..., Any]) -> Any:
    """A function for compiled code; a call from Python would end the process."""
    return numba.njit(pipeline_class=PartCompiler, **OPTIONS)(named_apart(function))


def inlined(function: Callable[..., Any]) -> Any:
    """A function for compiled code that becomes a part of each one that calls it."""
    return numba.njit(pipeline_class=PartCompiler, forceinline=True, **OPTIONS)(named_apart(function))


def task(function: Callable[..., Any]) -> Any:
    """A function of two integers for `threads.address`; a call from Python would end the process."""
    return numba.njit(pipeline_class=TaskCompiler, **OPTIONS)(named_apart(function))


def named_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, with another name than what is made of it for other dtypes.

    Of machine code from the cache, compiled in several processes, functions of one name are taken for one.
    """
    if function.__closure__:
        digest = hashlib.sha256(_identity(function).encode()).hexdigest()[:16]
        function.__qualname__ += f".made_{digest}"
    return function


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function whose code is written with llvmlite."""
    return numba.extending.intrinsic(function)


@intrinsic
def carray(typing_context: Any, address: Any, shape: Any, kind: Any) -> Any:
    """The contiguous array of numbers of a kind at a pointer; its shape is a length or a tuple of them.

    Numba's function of this name takes 20 ms for each kind and number of axes, and to load code that calls it
    from the disk takes 25 ms of imports.
    """
    ndim = 1 if isinstance(shape, types.Integer) else len(shape)
    many: Any = types.UniTuple
    lengths = types.int64 if isinstance(shape, types.Integer) else many(types.int64, ndim)
    made = types.Array(kind.instance_type, ndim, "C")

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, shape, _ = arguments
        sizes = [shape] if lengths is types.int64 else cgutils.unpack_tuple(builder, shape, ndim)
        strides = [ir.Constant(ir.IntType(64), itemsize(made.dtype))]
        for size in sizes[:0:-1]:
            strides.insert(0, builder.mul(strides[0], size))
        return array_value(context, builder, made, address, sizes, strides)

    return made(types.voidptr, lengths, kind), code


def array_value(
    context: Any, builder: Any, array_type: Any, address: Any, shape: list[Any], strides: list[Any]
) -> Any:
    """An array of a Numba type from a pointer, and its shape and strides as int64.

    Numba's own way to make one (`numba.np.arrayobj`) takes 4 ms.
    """
    model = context.data_model_manager[array_type]
    number: Any = ir.Constant(ir.IntType(64), 1)
    for size in shape:
        number = builder.mul(number, size)
    fields = {
        "nitems": number,
        "itemsize": ir.Constant(ir.IntType(64), itemsize(array_type.dtype)),
        "data": builder.bitcast(address, context.get_data_type(array_type.dtype).as_pointer()),
        "shape": cgutils.pack_array(builder, shape, ty=ir.IntType(64)),
        "strides": cgutils.pack_array(builder, strides, ty=ir.IntType(64)),
    }
    # The others say who owns the memory: nobody.
    value = ir.Constant(model.get_value_type(), None)
    for name, field in fields.items():
        value = model.set(builder, value, field, name)
    return value


def itemsize(kind: Any) -> int:
    """Bytes of a number in an array."""
    return int(as_dtype(kind).itemsize)


def _identity(value: Any) -> str:
    """What tells a value apart that compiled code was made with, the same in every process."""
    if hasattr(value, "py_func"):
        return str(value.py_func.__qualname__)
    value = getattr(value, "_defn", value)
    value = getattr(value, "__wrapped__", value)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}({', '.join(map(_identity, cells))})"
    text = repr(value)
    if " at 0x" in text:
        raise TypeError(f"compiled: wanted a value whose repr tells it apart, got {text}")
    return text
