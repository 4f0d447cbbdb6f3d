"""Checks of plain numbers, shared by everything that takes one."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from anyattn import arrays

if TYPE_CHECKING:
    import numpy

__all__ = ["boolean", "host_integers", "integer", "integers", "is_integer", "real"]


def is_integer(value: Any) -> bool:
    """Whether `value` is a Python or NumPy integer, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(value: Any, label: str, least: int | None = None) -> int:
    """`value` as a Python int; bools and floats are refused."""
    if not is_integer(value):
        raise TypeError(f"{label}: wanted an integer, got {type(value).__name__} {value!r}")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{label}: wanted {least} or more, got {number}")
    return number


def integers(value: Any, label: str) -> numpy.ndarray[Any, Any]:
    """An integer or nested sequences of integers as an int64 array."""
    import numpy

    def check(part: Any) -> tuple[int, ...]:
        """The shape of `part`."""
        if not isinstance(part, (list, tuple, range)):
            number = integer(part, label)
            if not -(2**63) <= number < 2**63:
                raise ValueError(f"{label}: wanted integers of 64 bits, got {number}")
            return ()
        shapes = {check(inner) for inner in part}
        if len(shapes) > 1:
            raise ValueError(f"{label}: wanted integers in equally long rows, got {value!r}")
        return (len(part), *shapes.pop()) if shapes else (0,)

    check(value)
    return numpy.asarray(value, dtype=numpy.int64)


def host_integers(value: Any, label: str, reason: str) -> numpy.ndarray[Any, Any]:
    """Integers, sequences of them or an integer array as int64; `reason` ends the error where unreadable."""
    if not arrays.is_array(value):
        return integers(value, label)
    if arrays.kind(value) != "int":
        raise TypeError(f"{label}: wanted integers, got dtype {arrays.dtype_name(value)}")
    if not arrays.is_concrete_cpu(value):
        raise TypeError(f"{label}: wanted numbers that the host can read{reason}")
    found: numpy.ndarray[Any, Any] = arrays.to_host(value).astype("int64")
    return found


def real(value: Any, label: str) -> float:
    """`value` as a finite Python float; bools and arrays are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{label}: wanted a real number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{label}: wanted a finite number, got {number}")
    return number


def boolean(value: Any, label: str) -> bool:
    """`value` as it is, True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{label}: wanted True or False, got {value!r}")
    return value
