"""Functions that may be called inside a traced mask or score function (`aa.where`, `aa.exp`, ...)."""

from __future__ import annotations

from typing import Any

from anyattn.expr.nodes import Expr, apply

__all__ = ["clip", "exp", "floor", "log", "maximum", "minimum", "sigmoid", "sqrt", "tanh", "where"]


def where(condition: Any, x: Any, y: Any) -> Expr:
    """`x` where `condition` holds, else `y`."""
    return apply("where", condition, x, y)


def minimum(x: Any, y: Any) -> Expr:
    """The smaller of `x` and `y`."""
    return apply("minimum", x, y)


def maximum(x: Any, y: Any) -> Expr:
    """The larger of `x` and `y`."""
    return apply("maximum", x, y)


def clip(x: Any, low: Any, high: Any) -> Expr:
    """`x` limited to [low, high]."""
    return minimum(maximum(x, low), high)


def exp(x: Any) -> Expr:
    """e to the power of `x`."""
    return apply("exp", x)


def log(x: Any) -> Expr:
    """Natural logarithm of `x`."""
    return apply("log", x)


def tanh(x: Any) -> Expr:
    """Hyperbolic tangent of `x`."""
    return apply("tanh", x)


def sqrt(x: Any) -> Expr:
    """Square root of `x`."""
    return apply("sqrt", x)


def sigmoid(x: Any) -> Expr:
    """1 / (1 + exp(-x))."""
    return apply("sigmoid", x)


def floor(x: Any) -> Expr:
    """The largest whole number not above `x`; may index a captured array."""
    return apply("floor", x)
