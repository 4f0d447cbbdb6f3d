"""Vectors of floats as LLVM has them: what the micro-kernels are written in.

Operations that every processor has (`fmuladd`, compare and select, integer shifts), so that one text becomes
AVX-512, AVX2, SSE2 or NEON. Addresses are int64; a load or store is aligned to its element only.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from anyattn_numba.jit import cgutils

__all__ = ["INT64", "LINE", "Vectors", "fetch", "offset"]

INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
# Bytes of a cache line.
LINE = 64

# 2**f on [-1/2, 1/2], highest power first, of least relative error by Remez's exchange algorithm. The
# constant is 1, so that the largest score of a row has the weight 1 exactly. Evaluated in its type the
# largest relative error is 2.2e-7 for float32 (7.5e-8 of it the polynomial's), 2.3e-16 for float64; with that
# of log2(e) as one number e**x has abs(x) * 1.4e-8 and abs(x) * 1.5e-17 more, without a fused product up to
# abs(x) times the rounding error. Of the largest weight, 1, that is nothing: abs(x) * e**x is 0.37 at most.
_EXP2 = {
    "float32": (1.3276472632e-3, 9.67554134312e-3, 5.55071327186e-2, 0.240221197237, 0.693146967065, 1.0),
    "float64": (
        4.0779938562463537778e-10,
        7.0725704454692940706e-9,
        1.0180648196555812362e-7,
        1.3215442675115585098e-6,
        1.5252727383872462884e-5,
        1.5403530441572599042e-4,
        1.3333558153441334774e-3,
        9.6181291076070019986e-3,
        5.5504108664790389252e-2,
        0.24022650695910098007,
        0.69314718055994569679,
        1.0,
    ),
}


def fetch(builder: Any, address: Any, *, cache: int = 1) -> None:
    """Bring the cache line of an address as near as a cache; no error where there is no memory."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT32, INT32, INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [pointer, *(ir.Constant(INT32, n) for n in (0, 4 - cache, 1))])


def offset(builder: Any, address: Any, nbytes: int) -> Any:
    """`address` + `nbytes`."""
    return builder.add(address, ir.Constant(INT64, nbytes))


class Vectors:
    """Vectors of `lanes` numbers of type `element`, and the builder's operations on them."""

    def __init__(self, element: str, lanes: int):
        single = element == "float32"
        self.element = element
        self.lanes = lanes
        self.scalar = ir.FloatType() if single else ir.DoubleType()
        self.type = ir.VectorType(self.scalar, lanes)
        self.integer = ir.VectorType(INT32 if single else INT64, lanes)
        self.itemsize = 4 if single else 8
        self.nbytes = self.itemsize * lanes
        self.mantissa, self.bias = (23, 127) if single else (52, 1023)
        self.suffix = f"v{lanes}f{8 * self.itemsize}"

    def __repr__(self) -> str:
        return f"Vectors({self.element!r}, {self.lanes})"

    def constant(self, value: float) -> Any:
        """A vector of one constant."""
        return ir.Constant(self.type, [value] * self.lanes)

    def load(self, builder: Any, address: Any) -> Any:
        value = builder.load(builder.inttoptr(address, self.type.as_pointer()))
        value.align = self.itemsize
        return value

    def store(self, builder: Any, value: Any, address: Any) -> None:
        done = builder.store(value, builder.inttoptr(address, self.type.as_pointer()))
        done.align = self.itemsize

    def splat(self, builder: Any, scalar: Any) -> Any:
        """A scalar in every lane."""
        none = ir.Constant(self.type, ir.Undefined)
        first = builder.insert_element(none, scalar, ir.Constant(INT32, 0))
        lanes = ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        return builder.shuffle_vector(first, none, lanes)

    def broadcast(self, builder: Any, address: Any) -> Any:
        """The number at an address in every lane."""
        return self.splat(builder, builder.load(builder.inttoptr(address, self.scalar.as_pointer())))

    def muladd(self, builder: Any, x: Any, y: Any, z: Any) -> Any:
        """x * y + z. Not `llvm.fma`: without the instruction that is a call of the C library a number."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{self.suffix}")
        return builder.call(function, [x, y, z])

    def maximum(self, builder: Any, x: Any, y: Any) -> Any:
        """The larger of each lane, y where either is NaN."""
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    def exp(self, builder: Any, x: Any, spare: int = 0) -> Any:
        """e**x for x <= 0; exactly 0 where it would be subnormal, also for -inf; NaN stays NaN.

        x log2(e) = n + f, n whole: adding 1.5 * 2**mantissa leaves n in the low bits of a float. 2**n comes
        from its exponent bits, 2**f from a polynomial. Positive x up to the largest finite exp are right too.

        With `spare` what is smaller than 2**spare times the smallest normal number is 0: products with it
        stay normal, and arithmetic with subnormal numbers takes a hundred times as long.
        """
        least = (spare - self.bias + 1) * math.log(2)
        tiny = builder.fcmp_ordered("<", x, self.constant(least))
        log2e = self.constant(math.log2(math.e))
        shift = self.constant(1.5 * 2.0**self.mantissa + self.bias)
        shifted = self.muladd(builder, x, log2e, shift)
        whole = builder.fsub(shifted, shift)
        part = self.muladd(builder, x, log2e, builder.fneg(whole))
        terms = _EXP2[self.element]
        power = self.constant(terms[0])
        for term in terms[1:]:
            power = self.muladd(builder, power, part, self.constant(term))
        bits = builder.bitcast(shifted, self.integer)
        exponent = builder.shl(bits, ir.Constant(self.integer, [self.mantissa] * self.lanes))
        found = builder.fmul(power, builder.bitcast(exponent, self.type))
        return builder.select(tiny, self.constant(0.0), found)
