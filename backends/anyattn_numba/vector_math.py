"""exp, log, tanh and sigmoid that LLVM can turn into vector instructions.

LLVM vectorises no call into the C library. A scalar call costs 3 to 8 ns an element, these cost 0.3 to 0.7
(float32, AVX-512): they are polynomials without branches or tables. They are right for NaN, infinities, zeros
of either sign and subnormal numbers. Errors in units in the last place, measured: exp 1.1, log 0.9, sigmoid
2.4, tanh 2.6; `test_vector_math.py` holds them there. The one fast-math flag, `contract`, lets a processor
round a product and sum once; the results differ by that between processors.

The reductions are those of Cody and Waite, Software Manual for the Elementary Functions (1980), and of
FreeBSD's msun (e_log.c, s_tanh.c); the coefficients are minimax polynomials by Remez' algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from anyattn_numba.jit import named_apart

__all__ = [
    "exp_float32",
    "exp_float64",
    "log_float32",
    "log_float64",
    "sigmoid_float32",
    "sigmoid_float64",
    "tanh_float32",
    "tanh_float64",
]


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    jit: Callable[..., Callable[..., Any]] = numba.njit(
        forceinline=True, error_model="numpy", fastmath={"contract"}
    )
    return jit(named_apart(function))


class _Format(NamedTuple):
    """A binary floating-point format, and what the functions need to know for it.

    `ln2` is log(2) in two parts, the first with so few bits that its products with exponents are exact.
    `exp` are the coefficients of (exp(r) - 1 - r) / r**2 for abs(r) <= log(2) / 2, and `log` those of
    (log((1 + s) / (1 - s)) - 2 * s) / s**3 in s**2 for s <= 3 - sqrt(8). `exp_range` is where exp is neither
    0 nor infinite, and a little more; tanh is 1 at half of `saturated`.
    """

    float: Any
    int: Any
    fraction_bits: int
    bias: int
    ln2: tuple[float, float]
    exp: tuple[float, ...]
    log: tuple[float, ...]
    exp_range: tuple[float, float]
    saturated: float


_FLOAT32 = _Format(
    float=np.float32,
    int=np.int32,
    fraction_bits=23,
    bias=127,
    ln2=(0.693145751953125, 1.42860677e-6),
    exp=(0.5, 0.16666576, 0.041666374, 0.008363181, 0.0013941122),
    log=(0.66666687, 0.39988717, 0.29582152),
    exp_range=(-104.0, 89.0),
    saturated=20.0,
)
_FLOAT64 = _Format(
    float=np.float64,
    int=np.int64,
    fraction_bits=52,
    bias=1023,
    ln2=(0.6931471803691238, 1.9082149292705877e-10),
    exp=(
        0.5000000000000001,
        0.16666666666666674,
        0.04166666666662413,
        0.008333333333322195,
        0.0013888888917214866,
        0.0001984126988665555,
        2.4801521294142193e-05,
        2.7557242250054606e-06,
        2.76200892974485e-07,
        2.5110084539028016e-08,
    ),
    log=(
        0.666666666666667,
        0.39999999999898445,
        0.2857142862639866,
        0.22222211072930448,
        0.18182893211959592,
        0.15331597195236973,
        0.14617869685851995,
    ),
    exp_range=(-746.0, 710.0),
    saturated=40.0,
)


def _polynomial(coefficients: tuple[float, ...], form: _Format) -> Callable[[Any], Any]:
    """The polynomial with these coefficients, the constant one first, by Horner's rule."""
    last = form.float(coefficients[-1])
    others = tuple(map(form.float, coefficients[-2::-1]))

    @_inline
    def polynomial(x: Any) -> Any:
        value = last
        for c in others:
            value = value * x + c
        return value

    return polynomial


def _power_of_two(form: _Format) -> Callable[[Any], Any]:
    integer, real, bias, shift = form.int, form.float, form.int(form.bias), form.int(form.fraction_bits)

    @_inline
    def power_of_two(n: Any) -> Any:
        """2**n, n within the exponents of normal numbers."""
        return integer(integer(n + bias) << shift).view(real)

    return power_of_two


def _reduction(form: _Format) -> Callable[[Any], Any]:
    integer, real = form.int, form.float
    # Adding it leaves the nearest integer in the last bits.
    shifter = real(1.5 * 2.0**form.fraction_bits)
    zero_bits = shifter.view(integer)
    per_ln2, high, low = real(1 / np.log(2.0)), real(form.ln2[0]), real(form.ln2[1])
    tail = _polynomial(form.exp, form)

    @_inline
    def reduction(x: Any) -> Any:
        """n and exp(r) - 1, where x = n * log(2) + r and abs(r) <= log(2) / 2."""
        shifted = x * per_ln2 + shifter
        n = shifted - shifter
        r = (x - n * high) - n * low
        return integer(real(shifted).view(integer) - zero_bits), r + r * r * tail(r)

    return reduction


def _exp(form: _Format) -> Callable[[Any], Any]:
    integer, one, (low, high) = form.int, form.float(1), map(form.float, form.exp_range)
    reduction, power_of_two = _reduction(form), _power_of_two(form)

    @_inline
    def exp(x: Any) -> Any:
        """e to the power of x."""
        x = low if x < low else x
        x = high if x > high else x
        n, part = reduction(x)
        # In two steps, as 2**n itself may be infinite or subnormal.
        half = integer(n >> 1)
        return (one + part) * power_of_two(half) * power_of_two(integer(n - half))

    return exp


def _tanh(form: _Format) -> Callable[[Any], Any]:
    one, two, saturated = form.float(1), form.float(2), form.float(form.saturated)
    reduction, power_of_two = _reduction(form), _power_of_two(form)

    @_inline
    def tanh(x: Any) -> Any:
        """(exp(2 * x) - 1) / (exp(2 * x) + 1), from exp - 1, which keeps its last bits near 0."""
        twice = x + x
        twice = -saturated if twice < -saturated else twice
        twice = saturated if twice > saturated else twice
        n, part = reduction(twice)
        scale = power_of_two(n)
        less_one = scale * part + (scale - one)
        # -0.0 stays what it is.
        return less_one / (less_one + two) if x != 0 else x

    return tanh


def _sigmoid(form: _Format) -> Callable[[Any], Any]:
    one, exp = form.float(1), _exp(form)

    @_inline
    def sigmoid(x: Any) -> Any:
        """1 / (1 + exp(-x)), where exp(-x) may be too large."""
        t = exp(x if x < 0 else -x)
        return (t if x < 0 else one) / (one + t)

    return sigmoid


def _log(form: _Format) -> Callable[[Any], Any]:
    integer, real, shift = form.int, form.float, form.int(form.fraction_bits)
    least = np.finfo(real).smallest_normal
    up, raised = real(2.0**form.fraction_bits), integer(form.fraction_bits)
    zero, one, half, two = map(real, (0, 1, 0.5, 2))
    infinity, nan = real(np.inf), real(np.nan)
    lowest = real(np.sqrt(0.5)).view(integer)
    high, low = real(form.ln2[0]), real(form.ln2[1])
    tail = _polynomial(form.log, form)

    @_inline
    def log(x: Any) -> Any:
        """Natural logarithm: x = 2**n * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), s = f / (2 + f)."""
        subnormal = x < least
        bits = real(x * up if subnormal else x).view(integer)
        exponent = integer(integer(bits - lowest) >> shift)
        f = integer(bits - integer(exponent << shift)).view(real) - one
        n = real(integer(exponent - raised) if subnormal else exponent)
        s = f / (two + f)
        z = s * s
        square = half * f * f
        found = n * high + (f - (square - (s * (square + z * tail(z)) + n * low)))
        found = found if x < infinity else x
        return found if x > zero else (-infinity if x == zero else (nan if x < zero else x))

    return log


exp_float32, exp_float64 = _exp(_FLOAT32), _exp(_FLOAT64)
log_float32, log_float64 = _log(_FLOAT32), _log(_FLOAT64)
tanh_float32, tanh_float64 = _tanh(_FLOAT32), _tanh(_FLOAT64)
sigmoid_float32, sigmoid_float64 = _sigmoid(_FLOAT32), _sigmoid(_FLOAT64)
