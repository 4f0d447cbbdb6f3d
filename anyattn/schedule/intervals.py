"""Interval arithmetic with congruences, over many tiles at once: what holds for every point of a tile.

A whole number is known to lie in [low, high] and to leave the remainder `rest` modulo `modulus` (modulus 1:
nothing known; modulus 0: it is `rest`). Bounds that leave int64 mean that nothing is known. A float lies in
[low, high], computed in the dtype of the expression: rounding is monotone, so the ends of exact operations
are exact; `nan` says that it may be NaN. A condition may be true, may be false, or both.

Every rule may give more values than there are, never fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Number", "Truth", "number_of", "operate", "unknown", "whole"]

NDArray = np.ndarray[Any, Any]

_LEAST, _MOST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
# Ends beyond this are not trusted: they may have wrapped.
_SAFE = 2.0**62


@dataclass(frozen=True, eq=False)
class Number:
    """Ints (`kind` "int") or floats of every tile; the fields are arrays that broadcast over the tiles."""

    kind: str
    low: NDArray
    high: NDArray
    modulus: NDArray
    rest: NDArray
    nan: NDArray


@dataclass(frozen=True, eq=False)
class Truth:
    """Whether a condition may be true and may be false somewhere in a tile."""

    true: NDArray
    false: NDArray


_NO, _YES = np.array(False), np.array(True)
_ZERO, _ONE = np.array(0), np.array(1)


def whole(low: Any, high: Any, modulus: Any = 1, rest: Any = 0) -> Number:
    """A whole number of these bounds; one value is congruent to itself."""
    low, high = np.asarray(low, np.int64), np.asarray(high, np.int64)
    single = low == high
    modulus, rest = np.where(single, 0, modulus), np.where(single, low, rest)
    return Number("int", low, high, modulus, rest, _NO)


def unknown(kind: str, dtype: Any = np.float64) -> Number | Truth:
    """Anything of a kind."""
    if kind == "bool":
        return Truth(_YES, _YES)
    if kind == "int":
        return whole(_LEAST, _MOST)
    return Number("float", np.array(-np.inf, dtype), np.array(np.inf, dtype), _ONE, _ZERO, _YES)


def real(low: Any, high: Any, nan: Any = _NO) -> Number:
    """A float of these bounds; bounds that are NaN themselves bound nothing."""
    low, high = np.asarray(low), np.asarray(high)
    lost = np.isnan(low) | np.isnan(high)
    low = np.where(lost, -np.inf, low).astype(low.dtype)
    high = np.where(lost, np.inf, high).astype(high.dtype)
    return Number("float", low, high, _ONE, _ZERO, np.asarray(nan) | lost)


def number_of(x: Number | Truth, kind: str, dtype: Any) -> Number:
    """`x` as a number of a kind, as an operator casts its operands."""
    if isinstance(x, Truth):
        x = whole(np.where(x.false, 0, 1), np.where(x.true, 1, 0))
    if kind == "float" and x.kind == "int":
        return real(x.low.astype(dtype), x.high.astype(dtype))
    return x


def operate(op: str, kind: str, args: list[Number | Truth], dtype: Any) -> Number | Truth:
    """What an operation gives on these operands."""
    if op in _LOGIC:
        truths = [a for a in args if isinstance(a, Truth)]
        if len(truths) == len(args):
            return _LOGIC[op](*truths)
    if op == "where":
        return _where(kind, args, dtype)
    inner = kind
    if kind == "bool":
        inner = "float" if any(isinstance(a, Number) and a.kind == "float" for a in args) else "int"
    numbers = [number_of(a, inner, dtype) for a in args]
    if op in _COMPARISONS:
        return _COMPARISONS[op](*numbers)
    rule = (_WHOLE if inner == "int" else _REAL).get(op)
    if rule is None:
        return unknown(kind, dtype)
    with np.errstate(all="ignore"):
        return rule(*numbers)


def _where(kind: str, args: list[Number | Truth], dtype: Any) -> Number | Truth:
    condition, x, y = args
    assert isinstance(condition, Truth)
    if isinstance(x, Truth) and isinstance(y, Truth):
        true = condition.true & x.true | condition.false & y.true
        return Truth(true, condition.true & x.false | condition.false & y.false)
    a, b = number_of(x, kind, dtype), number_of(y, kind, dtype)
    both = condition.true & condition.false
    low = np.where(both, np.minimum(a.low, b.low), np.where(condition.true, a.low, b.low))
    high = np.where(both, np.maximum(a.high, b.high), np.where(condition.true, a.high, b.high))
    nan = condition.true & a.nan | condition.false & b.nan
    modulus, rest = _meet(a, b)
    modulus = np.where(both, modulus, np.where(condition.true, a.modulus, b.modulus))
    rest = np.where(both, rest, np.where(condition.true, a.rest, b.rest))
    return Number(kind, low, high, modulus, rest, nan)


def _meet(a: Number, b: Number) -> tuple[NDArray, NDArray]:
    """The finest congruence that both have."""
    modulus = np.gcd(np.gcd(a.modulus, b.modulus), _difference(a.rest, b.rest))
    return modulus, _remainder(a.rest, modulus)


def _difference(x: NDArray, y: NDArray) -> NDArray:
    """x - y, or 1, of which no congruence is left, where that leaves int64."""
    wide = np.abs(x.astype(np.float64) - y.astype(np.float64)) > _SAFE
    return np.where(wide, 1, x - y)


def _remainder(x: NDArray, modulus: NDArray) -> NDArray:
    return np.where(modulus == 0, x, x % np.where(modulus == 0, 1, modulus))


def _limited(low: NDArray, high: NDArray, guess: NDArray, modulus: Any, rest: Any) -> Number:
    """A whole number, unknown where `guess`, the size of its ends as floats, leaves the safe range."""
    lost = ~(guess < _SAFE)
    single = ~lost & (low == high)
    modulus = np.where(single, 0, np.where(lost, 1, modulus))
    rest = np.where(single, low, np.where(lost, 0, rest))
    low, high = np.where(lost, _LEAST, low), np.where(lost, _MOST, high)
    return Number("int", low, high, modulus, _remainder(rest, modulus), _NO)


def _size(x: Number) -> NDArray:
    return np.maximum(np.abs(x.low.astype(np.float64)), np.abs(x.high.astype(np.float64)))


def _add(x: Number, y: Number) -> Number:
    guess = _size(x) + _size(y)
    return _limited(x.low + y.low, x.high + y.high, guess, np.gcd(x.modulus, y.modulus), x.rest + y.rest)


def _negative(x: Number) -> Number:
    return _limited(-x.high, -x.low, _size(x), x.modulus, -x.rest)


def _subtract(x: Number, y: Number) -> Number:
    guess = _size(x) + _size(y)
    return _limited(x.low - y.high, x.high - y.low, guess, np.gcd(x.modulus, y.modulus), x.rest - y.rest)


def _multiply(x: Number, y: Number) -> Number:
    low, high = _ends(np.multiply, x, y)
    # (m p + r)(n q + s) = mn pq + ms p + nr q + rs
    parts = [(x.modulus, y.modulus), (x.modulus, y.rest), (y.modulus, x.rest)]
    products = [np.abs(a * b) for a, b in parts]
    big = [np.abs(a.astype(np.float64) * b) for a, b in [*parts, (x.rest, y.rest)]]
    tame = np.maximum.reduce(np.broadcast_arrays(*big)) < _SAFE
    modulus = np.gcd(np.gcd(products[0], products[1]), products[2])
    modulus = np.where(tame, modulus, 1)
    return _limited(low, high, _size(x) * _size(y), modulus, np.where(tame, x.rest * y.rest, 0))


def _ends(operation: Callable[[NDArray, NDArray], NDArray], x: Number, y: Number) -> tuple[NDArray, NDArray]:
    corners = [operation(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
    return np.minimum.reduce(np.broadcast_arrays(*corners)), np.maximum.reduce(np.broadcast_arrays(*corners))


def _floor_divide(x: Number, y: Number) -> Number:
    divisor = np.where(y.low > 0, y.low, np.where(y.high < 0, y.high, 1))
    other = np.where(y.low > 0, y.high, np.where(y.high < 0, y.low, 1))
    safe = Number("int", np.minimum(divisor, other), np.maximum(divisor, other), _ONE, _ZERO, _NO)
    low, high = _ends(np.floor_divide, x, safe)
    guess = np.where((y.low > 0) | (y.high < 0), _size(x), np.inf)
    # x = m p + r with d | m and d | r divides exactly.
    d = safe.low
    exact = (safe.low == safe.high) & (x.modulus % d == 0)
    modulus = np.where(exact, np.abs(x.modulus // d), 1)
    return _limited(low, high, guess, modulus, np.where(exact, x.rest // d, 0))


def _modulo(x: Number, y: Number) -> Number:
    apart = (y.low > 0) | (y.high < 0)
    d = np.where(apart & (y.low == y.high), y.low, 0)
    d1 = np.where(d == 0, 1, d)
    # The values stay in order within one period.
    one = (d != 0) & (x.low // d1 == x.high // d1) & (_size(x) < _SAFE)
    low = np.where(one, x.low - x.low // d1 * d1, np.where(y.low > 0, 0, y.low + 1))
    high = np.where(one, x.high - x.low // d1 * d1, np.where(y.low > 0, y.high - 1, 0))
    modulus = np.where(d != 0, np.gcd(x.modulus, d), 1)
    rest = _remainder(x.rest, modulus)
    # All of x is congruent to `rest` modulo the divisor: one remainder is left.
    fixed = (d != 0) & (modulus == np.abs(d))
    value = np.where(d < 0, np.where(rest == 0, 0, rest + d), rest)
    low, high = np.where(fixed, value, low), np.where(fixed, value, high)
    # What is congruent within [low, high] narrows the ends.
    step = np.maximum(modulus, 1)
    low, high = low + (rest - low) % step, high - (high - rest) % step
    guess = np.where(apart, np.maximum(np.abs(low), np.abs(high)).astype(np.float64), np.inf)
    return _limited(low, high, guess, modulus, rest)


def _absolute(x: Number) -> Number:
    positive, negative = x.low >= 0, x.high <= 0
    low = np.where(positive, x.low, np.where(negative, -x.high, 0))
    high = np.maximum(np.abs(x.low), np.abs(x.high))
    if x.kind == "float":
        return real(low.astype(x.low.dtype), high, x.nan)
    # x and -x leave the same remainder modulo what divides twice the remainder.
    either = np.gcd(x.modulus, _difference(x.rest, -x.rest))
    modulus = np.where(positive | negative, x.modulus, either)
    rest = np.where(negative & ~positive, -x.rest, x.rest)
    return _limited(low, high, _size(x), modulus, rest)


def _extreme(pick: Callable[[NDArray, NDArray], NDArray]) -> Callable[[Number, Number], Number]:
    def rule(x: Number, y: Number) -> Number:
        low, high = pick(x.low, y.low), pick(x.high, y.high)
        if x.kind == "float":
            return real(low, high, x.nan | y.nan)
        modulus, rest = _meet(x, y)
        return _limited(low, high, np.zeros(1), modulus, rest)

    return rule


def _power(x: Number, y: Number) -> Number | Truth:
    if not ((y.low == y.high).all() and (y.low >= 0).all() and (y.low <= 8).all()):
        return unknown("int")
    n = y.low
    ends = np.broadcast_arrays(x.low**n, x.high**n)
    low, high = np.minimum(*ends), np.maximum(*ends)
    low = np.where((n % 2 == 0) & (n > 0) & (x.low < 0) & (x.high > 0), 0, low)
    return _limited(low, high, _size(x) ** n, 1, 0)


def _real_ends(operation: Callable[[NDArray, NDArray], NDArray]) -> Callable[[Number, Number], Number]:
    def rule(x: Number, y: Number) -> Number:
        low, high = _ends(operation, x, y)
        # inf - inf and 0 * inf come from the ends, or from between them where an end is infinite.
        wild = ~(np.isfinite(x.low) & np.isfinite(x.high) & np.isfinite(y.low) & np.isfinite(y.high))
        low, high = (
            np.where(wild, -np.inf, low).astype(low.dtype),
            np.where(wild, np.inf, high).astype(high.dtype),
        )
        return real(low, high, x.nan | y.nan | wild)

    return rule


def _real_divide(x: Number, y: Number) -> Number:
    apart = (y.low > 0) | (y.high < 0)
    low, high = _ends(np.divide, x, y)
    wild = ~apart | ~(np.isfinite(x.low) & np.isfinite(x.high) & np.isfinite(y.low) & np.isfinite(y.high))
    low, high = (
        np.where(wild, -np.inf, low).astype(low.dtype),
        np.where(wild, np.inf, high).astype(high.dtype),
    )
    return real(low, high, x.nan | y.nan | wild)


def _monotone(
    operation: Callable[[NDArray], NDArray], least: float = -np.inf, exact: bool = False
) -> Callable[[Number], Number]:
    """A rising function, of a few units in the last place unless `exact`; NaN below `least`."""

    def rule(x: Number) -> Number:
        outside = x.low < least
        low, high = operation(np.maximum(x.low, least).astype(x.low.dtype)), operation(x.high)
        if not exact:
            eps = 8 * np.finfo(x.low.dtype).eps
            tiny = np.finfo(x.low.dtype).tiny
            low, high = low - np.abs(low) * eps - tiny, high + np.abs(high) * eps + tiny
        low = np.where(outside, -np.inf, low).astype(x.low.dtype)
        return real(low, high, x.nan | outside)

    return rule


def _order(strict: bool) -> Callable[[Number, Number], Truth]:
    def rule(x: Number, y: Number) -> Truth:
        if strict:
            return Truth(x.low < y.high, (x.high >= y.low) | x.nan | y.nan)
        return Truth(x.low <= y.high, (x.high > y.low) | x.nan | y.nan)

    return rule


def _equal(x: Number, y: Number) -> Truth:
    single = (x.low == x.high) & (y.low == y.high) & (x.low == y.low) & ~x.nan & ~y.nan
    meet = (x.low <= y.high) & (y.low <= x.high)
    if x.kind == "int":
        common = np.gcd(x.modulus, y.modulus)
        gap = _difference(x.rest, y.rest)
        meet = meet & np.where(common == 0, gap == 0, gap % np.where(common == 0, 1, common) == 0)
        meet = meet | single
    return Truth(meet, ~single)


def _swap(truth: Truth) -> Truth:
    return Truth(truth.false, truth.true)


_lt, _le = _order(True), _order(False)
_COMPARISONS: dict[str, Callable[[Number, Number], Truth]] = {
    "lt": _lt,
    "le": _le,
    "gt": lambda x, y: _lt(y, x),
    "ge": lambda x, y: _le(y, x),
    "eq": _equal,
    "ne": lambda x, y: _swap(_equal(x, y)),
}
_LOGIC: dict[str, Callable[..., Truth]] = {
    "and": lambda x, y: Truth(x.true & y.true, x.false | y.false),
    "or": lambda x, y: Truth(x.true | y.true, x.false & y.false),
    "xor": lambda x, y: Truth(x.true & y.false | x.false & y.true, x.true & y.true | x.false & y.false),
    "ne": lambda x, y: Truth(x.true & y.false | x.false & y.true, x.true & y.true | x.false & y.false),
    "eq": lambda x, y: Truth(x.true & y.true | x.false & y.false, x.true & y.false | x.false & y.true),
    "not": _swap,
}
_WHOLE: dict[str, Callable[..., Number | Truth]] = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "floordiv": _floor_divide,
    "mod": _modulo,
    "pow": _power,
    "neg": _negative,
    "abs": _absolute,
    "minimum": _extreme(np.minimum),
    "maximum": _extreme(np.maximum),
}
_REAL: dict[str, Callable[..., Number]] = {
    "add": _real_ends(np.add),
    "sub": _real_ends(np.subtract),
    "mul": _real_ends(np.multiply),
    "truediv": _real_divide,
    "neg": lambda x: real(-x.high, -x.low, x.nan),
    "abs": _absolute,
    "minimum": _extreme(np.minimum),
    "maximum": _extreme(np.maximum),
    "exp": _monotone(np.exp),
    "log": _monotone(np.log, 0.0),
    "tanh": _monotone(np.tanh),
    "sqrt": _monotone(np.sqrt, 0.0, exact=True),
    "sigmoid": _monotone(lambda x: (np.tanh(x / 2) + 1) / 2),
    "floor": _monotone(np.floor, exact=True),
}
