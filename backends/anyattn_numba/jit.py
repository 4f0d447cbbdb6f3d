"""Numba's decorators as this package uses them.

What they give is called by compiled code only, whose types are Numba's, so it has none for Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numba.extending
from numba.core import cgutils as _cgutils

__all__ = ["OPTIONS", "carray", "cgutils", "compiled", "intrinsic"]

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
    """A function for compiled code and `threads.address`; a call from Python would end the process."""
    return numba.njit(**OPTIONS)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function whose code is written with llvmlite."""
    return numba.extending.intrinsic(function)
