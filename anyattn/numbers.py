"""Checks of plain numbers, shared by everything that takes one."""

from __future__ import annotations

import math
import operator
from typing import Any

__all__ = ["integer", "real"]


def integer(value: Any, label: str, least: int | None = None) -> int:
    """`value` as a Python int; bools and floats are refused."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        raise TypeError(f"{label}: wanted an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{label}: wanted an integer, got {type(value).__name__} {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{label}: wanted {least} or more, got {number}")
    return number


def real(value: Any, label: str) -> float:
    """`value` as a finite Python float; bools and arrays with axes are refused."""
    scalar = isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0
    if isinstance(value, bool) or not scalar:
        raise TypeError(f"{label}: wanted a real number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{label}: wanted a finite number, got {number}")
    return number
