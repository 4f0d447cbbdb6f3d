"""Numba's decorators as this package uses them.

What they give is called by compiled code only, whose types are Numba's, so it has none for Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numba
import numba.extending
from numba.core import cgutils as _cgutils

__all__ = ["OPTIONS", "carray", "cgutils", "compiled", "inlined", "intrinsic"]

# No exception for a division by zero, no GIL, and no wrappers that make functions callable from Python, which
# take a sixth of the time in which kernels compile.
OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "nogil": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

carray: Any = vars(numba)["carray"]
cgutils: Any = _cgutils


def compiled(function: Callable[..., Any]) -> Any:
    """A function for compiled code and `threads.address`; a call from Python would end the process.

    What was made of one function for other dtypes must have another name: of machine code from the cache,
    compiled in several processes, functions of one name are taken for one.
    """
    _name_apart(function)
    return numba.njit(**OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A function that becomes part of each one that calls it.

    A function that is called is compiled with all that it calls, and again with its caller: a chain of
    functions that each call nearly all of a kernel would be optimised once for each.
    """
    _name_apart(function)
    return numba.njit(inline="always", **OPTIONS)(function)


def _name_apart(function: Callable[..., Any]) -> None:
    if function.__closure__:
        digest = hashlib.sha256(_identity(function).encode()).hexdigest()[:16]
        function.__qualname__ += f".made_{digest}"


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function whose code is written with llvmlite."""
    return numba.extending.intrinsic(function)


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
