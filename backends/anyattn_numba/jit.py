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

# No exception for a division by zero, and no GIL.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}

carray: Any = vars(numba)["carray"]
cgutils: Any = _cgutils


def compiled(function: Callable[..., Any]) -> Any:
    """A function compiled by Numba when it is first called with its types."""
    return numba.njit(**OPTIONS)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function whose code is written with llvmlite."""
    return numba.extending.intrinsic(function)
