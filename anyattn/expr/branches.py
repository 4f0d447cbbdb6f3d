"""Branches that automatic differentiation cannot make NaN.

`where(c, x, y)` gives the branch that is not picked the gradient 0, and its operations multiply that 0 by
derivatives that may be infinite or NaN just because they are not meant to be used there: sqrt at 0, 1 / (i -
j) on the diagonal. So each branch reads what it depends on through `where(picked, leaf, held leaf)`: the
value is the same to the bit, and a gradient that comes from where the branch is not picked is dropped before
it reaches the leaf, in derivatives of every order. (Replacing operands by harmless numbers, the usual "double
where", needs the domain of every function and of every product.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from anyattn import arrays
from anyattn.expr.functions import where
from anyattn.expr.nodes import Aligned, Apply, Const, Expr, Load, Symbol, rewrite, walk

__all__ = ["SEEN", "Held", "hold_unpicked"]

# Whether the key is seen, a value that the evaluation brings.
SEEN = Symbol("seen", "bool")

# Their derivatives are 1, -1, or chosen by a mask.
_HARMLESS = {"add", "sub", "neg", "where", "minimum", "maximum"}


@dataclass(frozen=True, eq=False, repr=False)
class Held(Expr):
    """The value of a node, constant for automatic differentiation."""

    node: Expr
    kind: str

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.node,)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return Held(children[0], self.kind)

    def __repr__(self) -> str:
        return f"held({self.node!r})"


def hold_unpicked(root: Expr, masked: bool) -> Expr:
    """`root` with the same values, and gradients from the picked branches of each `where` only.

    With `masked`, no gradient reaches a captured array from where `SEEN` is false either (the caller selects
    the score there).
    """

    def hold(node: Expr) -> Expr:
        if not (isinstance(node, Apply) and node.op == "where"):
            return node
        condition, x, y = node.args
        return where(condition, _held(x, condition, _varies), _held(y, ~condition, _varies))

    held = rewrite(root, hold)
    return _held(held, SEEN, lambda leaf: _varies(leaf) and not isinstance(leaf, Symbol)) if masked else held


def _held(branch: Expr, picked: Expr, varies: Callable[[Expr], bool]) -> Expr:
    if not _is_risky(branch, varies):
        return branch
    return rewrite(branch, lambda node: where(picked, node, Held(node, "float")) if varies(node) else node)


def _varies(leaf: Expr) -> bool:
    """Whether a leaf may take part in automatic differentiation."""
    if isinstance(leaf, Symbol):
        return leaf.name == "score"
    value = leaf.table.value if isinstance(leaf, Load) else leaf.value if isinstance(leaf, Aligned) else None
    if value is None or leaf.kind != "float":
        return False
    return arrays.needs_gradient(value) or arrays.is_tracer(value)


def _is_risky(branch: Expr, varies: Callable[[Expr], bool]) -> bool:
    """Whether a gradient on its way from `branch` to a leaf is multiplied by what may not be finite."""
    moving: set[int] = set()
    for node in walk(branch):
        if varies(node):
            moving.add(id(node))
        elif isinstance(node, Held):
            continue
        elif node.kind == "float" and any(id(child) in moving for child in node.children):
            moving.add(id(node))
            if isinstance(node, Apply) and not _is_harmless(node, moving):
                return True
    return False


def _is_harmless(node: Apply, moving: set[int]) -> bool:
    if node.op in _HARMLESS:
        return True
    fixed = [child for child in node.args if id(child) not in moving]
    if node.op == "mul":
        return all(_is_finite(child) for child in fixed) and len(fixed) == 1
    if node.op == "truediv":
        divisor = node.args[1]
        return isinstance(divisor, Const) and divisor.value != 0 and _is_finite(divisor)
    return False


def _is_finite(node: Expr) -> bool:
    return node.kind != "float" or (isinstance(node, Const) and math.isfinite(node.value))
