"""Rows of numbers in and out of memory: any stored dtype, any stride, to and from the accumulation type.

16-bit floats are read and written as their bits with integer operations, which LLVM has on every target and
turns into vectors; its own conversions end the process on some.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
from numba import types

from anyattn_numba.jit import carray, compiled
from anyattn_numba.memory import pointer

__all__ = ["ITEMSIZE", "all_finite", "reader", "writer"]

_STORED = {
    "bool": types.uint8,
    "int8": types.int8,
    "float16": types.uint16,
    "bfloat16": types.uint16,
    "float32": types.float32,
    "float64": types.float64,
}
ITEMSIZE = {"bool": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@compiled
def _from_half(bits: Any) -> Any:
    """float16 to float32: the exponent is moved; below, the fraction stands behind the least normal number.

    No operand is subnormal, which a thread may be told to take for 0.
    """
    wide = numpy.uint32(bits)
    size = numpy.uint32((wide & numpy.uint32(0x7FFF)) << numpy.uint32(13))
    normal = numpy.uint32(size + numpy.uint32(0x38000000)).view(numpy.float32)
    least = numpy.float32(2.0**-14)
    small = numpy.uint32(size | numpy.uint32(0x38800000)).view(numpy.float32) - least
    value = small if size < numpy.uint32(0x00800000) else normal
    special = numpy.uint32(size | numpy.uint32(0x7F800000)).view(numpy.float32)
    value = special if size >= numpy.uint32(0x0F800000) else value
    return -value if wide & numpy.uint32(0x8000) else value


@compiled
def _to_half(value: Any) -> Any:
    """float32 to float16, to nearest, ties to even.

    Below the smallest normal number an addition rounds at the right place; above, adding half of what is cut
    (less one where the last kept bit is 0) carries into it.
    """
    bits = numpy.float32(value).view(numpy.uint32)
    sign = numpy.uint32((bits >> numpy.uint32(16)) & numpy.uint32(0x8000))
    size = numpy.uint32(bits & numpy.uint32(0x7FFFFFFF))
    small = numpy.float32(size.view(numpy.float32) + numpy.float32(0.5)).view(numpy.uint32)
    small = numpy.uint32(small - numpy.uint32(0x3F000000))
    odd = numpy.uint32((size >> numpy.uint32(13)) & numpy.uint32(1))
    normal = numpy.uint32((size - numpy.uint32(0x38000000) + numpy.uint32(0xFFF) + odd) >> numpy.uint32(13))
    normal = normal if normal < numpy.uint32(0x7C00) else numpy.uint32(0x7C00)
    result = small if size < numpy.uint32(0x38800000) else normal
    result = numpy.uint32(0x7E00) if size > numpy.uint32(0x7F800000) else result
    return numpy.uint16(result | sign)


@compiled
def _from_bfloat(bits: Any) -> Any:
    """bfloat16 to float32: it is its upper half."""
    return numpy.uint32(numpy.uint32(bits) << numpy.uint32(16)).view(numpy.float32)


@compiled
def _to_bfloat(value: Any) -> Any:
    """float32 to bfloat16, to nearest, ties to even."""
    bits = numpy.float32(value).view(numpy.uint32)
    odd = numpy.uint32((bits >> numpy.uint32(16)) & numpy.uint32(1))
    rounded = numpy.uint32((bits + numpy.uint32(0x7FFF) + odd) >> numpy.uint32(16))
    quiet = numpy.uint32((bits >> numpy.uint32(16)) | numpy.uint32(0x40))
    nan = numpy.uint32(bits & numpy.uint32(0x7FFFFFFF)) > numpy.uint32(0x7F800000)
    return numpy.uint16(quiet if nan else rounded)


@compiled
def _same(value: Any) -> Any:
    return value


_FROM = {
    "bool": numpy.float32,
    "int8": numpy.float32,
    "float16": _from_half,
    "bfloat16": _from_bfloat,
    "float32": _same,
    "float64": _same,
}
_TO = {"float16": _to_half, "bfloat16": _to_bfloat, "float32": _same, "float64": _same}


@lru_cache
def reader(dtype: str, element: str) -> Any:
    """read(source, step, count, factor, target), which converts a row to contiguous numbers of `element`.

    It has `count` numbers of a dtype, `step` bytes apart, and they are multiplied by `factor`.
    """
    stored, size, convert = _STORED[dtype], ITEMSIZE[dtype], _FROM[dtype]
    kind = getattr(types, element)

    @compiled
    def read(source: int, step: int, count: int, factor: float, target: int) -> None:
        out = carray(pointer(target), count, kind)
        times = kind(factor)
        if step == size:
            row = carray(pointer(source), count, stored)
            for n in range(count):
                out[n] = convert(row[n]) * times
        else:
            for n in range(count):
                out[n] = convert(carray(pointer(source + n * step), 1, stored)[0]) * times

    return read


@lru_cache
def writer(dtype: str, element: str) -> Any:
    """write(source, count, factor, target, step): the other way round."""
    stored, size, convert = _STORED[dtype], ITEMSIZE[dtype], _TO[dtype]
    kind = getattr(types, element)

    @compiled
    def write(source: int, count: int, factor: float, target: int, step: int) -> None:
        row = carray(pointer(source), count, kind)
        times = kind(factor)
        if step == size:
            out = carray(pointer(target), count, stored)
            for n in range(count):
                out[n] = convert(row[n] * times)
        else:
            for n in range(count):
                carray(pointer(target + n * step), 1, stored)[0] = convert(row[n] * times)

    return write


@lru_cache
def all_finite(element: str) -> Any:
    """all_finite(source, stride, rows, count): whether no number of some rows is NaN or infinite."""
    bits, mask = (
        (types.uint32, numpy.uint32(0x7F800000))
        if element == "float32"
        else (types.uint64, numpy.uint64(0x7FF << 52))
    )

    @compiled
    def finite(source: int, stride: int, rows: int, count: int) -> bool:
        for r in range(rows):
            row = carray(pointer(source + r * stride), count, bits)
            found = False
            # Without a way out of the loop it becomes vectors.
            for n in range(count):
                found |= (row[n] & mask) == mask
            if found:
                return False
        return True

    return finite
