"""Derivatives of expressions, as expressions over the same symbols.

What a backward kernel needs is the derivative with respect to the score, and with respect to every read of a
captured float array; it adds the latter, times the gradient of the score, to the array's gradient at the
indices of the read. The rules are those of forward differentiation, one small function an operation, because
`where` then picks derivatives just as it picks values: what a branch that is not picked would give, NaN or
infinite, never enters a product. A derivative is an expression like any other and has derivatives.

Where an expression has no derivative, these are taken (as PyTorch and JAX take them):

- abs at 0: 0;
- minimum and maximum where both are equal: the mean of the two derivatives;
- floor, // and the truth of a condition: constant, also at a jump; x % y = x - (x // y) * y accordingly;
- sqrt, and powers below 1, at 0: infinite, but 0 where the operand does not change.

Values are free of NaN where all values that lead to the picked ones are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anyattn.expr.functions import log, where
from anyattn.expr.nodes import SCORE, Aligned, Apply, Const, Deferred, Expr, Load, walk

__all__ = ["Gradient", "derivative", "gradient"]

# A derivative that is known to be 0 everywhere is None.
_Change = Expr | None

_ZERO = Const(0.0, "float")
_HALF = Const(0.5, "float")
_ONE = Const(1.0, "float")
_TWO = Const(2.0, "float")


@dataclass(frozen=True, eq=False)
class Gradient:
    """The partial derivatives of an expression.

    Attributes
    ----------
    score : Expr
        With respect to the score.
    reads : tuple of (Load or Aligned, Expr)
        With respect to each distinct read of a float array, where it is not 0 everywhere.
    """

    score: Expr
    reads: tuple[tuple[Load | Aligned, Expr], ...]


def gradient(root: Expr) -> Gradient:
    """The derivatives of a bound expression with respect to the score and to its reads of float arrays."""
    reads = []
    for node in walk(root):
        if isinstance(node, (Load, Aligned)) and node.kind == "float":
            partial = _derivative(root, node)
            if partial is not None:
                reads.append((node, partial))
    return Gradient(derivative(root, SCORE), tuple(reads))


def derivative(root: Expr, variable: Expr) -> Expr:
    """The derivative of `root` with respect to one of its float nodes, all others held fixed.

    Parameters
    ----------
    root : Expr
        A bound expression.
    variable : Expr
        The score, a read of a float array (`Load`, `Aligned`), a float constant or a kernel's parameter: the
        very node that occurs in `root`.

    Raises
    ------
    TypeError
        If the variable is not a float, or `root` has parts that only a call settles.
    """
    if variable.kind != "float":
        raise TypeError(f"variable: wanted a float, got {variable!r} of kind {variable.kind}")
    found = _derivative(root, variable)
    return _ZERO if found is None else found


def _derivative(root: Expr, variable: Expr) -> _Change:
    changes: dict[int, _Change] = {}
    for node in walk(root):
        if isinstance(node, Deferred):
            raise TypeError(f"{node!r} must be bound before it is differentiated")
        change: _Change = None
        if node is variable:
            change = _ONE
        elif isinstance(node, Apply) and node.kind == "float":
            inner = [changes[id(child)] for child in node.args]
            if any(c is not None for c in inner):
                change = _RULES[node.op](node, *inner)
        changes[id(node)] = change
    found = changes[id(root)]
    return found if found is None or found.kind == "float" else found * _ONE


def _times(factor: Expr, change: _Change) -> _Change:
    if change is None:
        return None
    return factor if change is _ONE else factor * change


def _over(change: _Change, divisor: Expr) -> _Change:
    return None if change is None else change / divisor


def _plus(x: _Change, y: _Change) -> _Change:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _minus(change: _Change) -> _Change:
    return None if change is None else -change


def _pick(condition: Expr, x: _Change, y: _Change) -> _Change:
    if x is y:
        return x
    return where(condition, _ZERO if x is None else x, _ZERO if y is None else y)


def _unless_still(pole: Expr, change: Expr, product: Expr) -> Expr:
    """`product`, a multiple of `change` by a factor that is infinite at `pole`: 0 there if `change` is 0."""
    return product if change is _ONE else where(pole & (change == _ZERO), _ZERO, product)


def _mul(node: Apply, dx: _Change, dy: _Change) -> _Change:
    x, y = node.args
    return _plus(_times(y, dx), _times(x, dy))


def _truediv(node: Apply, dx: _Change, dy: _Change) -> _Change:
    y = node.args[1]
    return _plus(_over(dx, y), None if dy is None else _minus(_times(node / y, dy)))


def _mod(node: Apply, dx: _Change, dy: _Change) -> _Change:
    x, y = node.args
    return _plus(dx, None if dy is None else _minus(_times(x // y, dy)))


def _pow(node: Apply, dx: _Change, dy: _Change) -> _Change:
    x, y = node.args
    if dy is None and isinstance(y, Const):
        return _constant_power(x, y.value, dx)
    change: _Change = None
    if dx is not None:
        slope = where(y == 0, _ZERO, y * x ** (y - 1))
        change = _unless_still(x == 0, dx, slope * dx)
    if dy is not None:
        change = _plus(change, _times(where(x == 0, _ZERO, node * log(x)), dy))
    return change


def _constant_power(x: Expr, n: float, dx: _Change) -> _Change:
    if n == 0 or dx is None:
        return None
    if n == 1:
        return dx
    lower = x if n == 2 else x ** (n - 1)
    change = _times(float(n) * lower, dx)
    return change if n > 1 or change is None else _unless_still(x == 0, dx, change)


def _abs(node: Apply, dx: _Change) -> _Change:
    x = node.args[0]
    return _pick(x > 0, dx, _pick(x < 0, _minus(dx), None))


def _extremum(first: Expr, second: Expr, dx: _Change, dy: _Change) -> _Change:
    """dx where `first` holds, dy where `second` does, their mean where neither does."""
    return _pick(first, dx, _pick(second, dy, _times(_HALF, _plus(dx, dy))))


def _minimum(node: Apply, dx: _Change, dy: _Change) -> _Change:
    x, y = node.args
    return _extremum(x < y, y < x, dx, dy)


def _maximum(node: Apply, dx: _Change, dy: _Change) -> _Change:
    x, y = node.args
    return _extremum(x > y, y > x, dx, dy)


def _sqrt(node: Apply, dx: _Change) -> _Change:
    return None if dx is None else _unless_still(node.args[0] == 0, dx, dx / (_TWO * node))


_RULES: dict[str, Callable[..., _Change]] = {
    "add": lambda node, dx, dy: _plus(dx, dy),
    "sub": lambda node, dx, dy: _plus(dx, _minus(dy)),
    "mul": _mul,
    "truediv": _truediv,
    "floordiv": lambda node, dx, dy: None,
    "mod": _mod,
    "pow": _pow,
    "neg": lambda node, dx: _minus(dx),
    "abs": _abs,
    "minimum": _minimum,
    "maximum": _maximum,
    "where": lambda node, dc, dx, dy: _pick(node.args[0], dx, dy),
    "exp": lambda node, dx: _times(node, dx),
    "log": lambda node, dx: _over(dx, node.args[0]),
    "tanh": lambda node, dx: _times(_ONE - node * node, dx),
    "sqrt": _sqrt,
    "sigmoid": lambda node, dx: _times(node * (_ONE - node), dx),
    "floor": lambda node, dx: None,
}
