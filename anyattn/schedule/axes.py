"""Along which line of the (row, key) plane an expression changes, and its values along that line.

Most of what masks are made of changes in one direction only: with the row, with the key, with their
difference, or with their sum. Such a part has some Lq + Lk values; they are computed once, and every question
about a tile is a question about a range of them, answered exactly. That covers bounds, strides, tables and
whatever else is in the part, and combinations of such parts in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattn import arrays
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.nodes import Apply, Const, Expr, Symbol, depends_on, walk
from anyattn.schedule.parts import Parts, Readable, Unread

__all__ = ["DIFFERENCE", "KEY", "MIXED", "NONE", "ROW", "SUM", "UNREAD", "Space", "directions"]

NDArray = np.ndarray[Any, Any]

NONE, ROW, KEY, DIFFERENCE, SUM, MIXED, UNREAD = (
    "none",
    "row",
    "key",
    "difference",
    "sum",
    "mixed",
    "unread",
)

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")

# What is computed is within 2**62 wherever the call asks for it (`expr.bounds`). A comparison is moved along
# its line, where its sides change by at most this slope times an index below 2**40, and stay in int64.
_STEEP = 1 << 20

# Points evaluated at once: bounds the temporaries, of which an expression of ten nodes has ten.
_CHUNK = 1 << 15


def directions(root: Expr) -> dict[int, str]:
    """The direction of every node under `root`, by its id."""
    found: dict[int, str] = {}
    slopes: dict[int, tuple[int, int]] = {}
    for node in walk(root):
        if isinstance(node, Unread):
            found[id(node)] = UNREAD
            continue
        slope = _slope(node, found, slopes)
        if isinstance(node, Apply) and node.op in _COMPARISONS:
            # Whole numbers compare as their difference does with zero, unless they wrap.
            left, right = (slopes.get(id(c)) for c in node.args)
            if left and right and max(map(abs, (*left, *right))) < _STEEP:
                found[id(node)] = _direction(left[0] - right[0], left[1] - right[1])
                continue
        if slope is not None:
            slopes[id(node)] = slope
            found[id(node)] = _direction(*slope)
        else:
            found[id(node)] = _join([found[id(c)] for c in node.children])
    return found


def _slope(node: Expr, found: dict[int, str], slopes: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
    """(a, c) where the node is a * row + c * j + something that depends on b and h only."""
    if node.kind == "float":
        return None
    if isinstance(node, Symbol):
        return {"row": (1, 0), "i": (1, 0), "j": (0, 1)}.get(node.name, (0, 0))
    if not isinstance(node, Apply):
        return (0, 0) if all(found[id(c)] == NONE for c in node.children) else None
    args = [slopes.get(id(c)) for c in node.args]
    if all(found[id(c)] == NONE for c in node.args):
        return 0, 0
    if any(slope is None for slope in args) or node.kind != "int":
        return None
    (a, c), *rest = [slope for slope in args if slope is not None]
    if node.op == "neg":
        return -a, -c
    if node.op in ("add", "sub"):
        sign = 1 if node.op == "add" else -1
        return a + sign * rest[0][0], c + sign * rest[0][1]
    if node.op == "mul":
        for factor, other in ((node.args[0], rest[0]), (node.args[1], (a, c))):
            if isinstance(factor, Const):
                return int(factor.value) * other[0], int(factor.value) * other[1]
    return None


def _direction(a: int, c: int) -> str:
    if a == 0 or c == 0:
        return NONE if a == c else ROW if c == 0 else KEY
    return DIFFERENCE if a == -c else SUM if a == c else MIXED


def _join(parts: list[str]) -> str:
    kinds = set(parts) - {NONE}
    if UNREAD in kinds:
        return UNREAD
    return kinds.pop() if len(kinds) == 1 else MIXED if kinds else NONE


@dataclass(frozen=True, eq=False)
class Space:
    """Index ranges, the groups of (b, h) that are analysed together, and evaluation at any indices.

    `b`, `h` and `offset` have one entry for each group.
    """

    q_len: int
    k_len: int
    accumulate: str
    b: NDArray
    h: NDArray
    offset: NDArray

    @classmethod
    def of(cls, parts: Parts, mask: Readable, groups: NDArray, heads: int) -> Space:
        """The space of some groups, numbered row-major in (b, h) with `heads` entries of h."""
        b = groups // heads
        offset = mask.offsets[b] if mask.offsets.size > 1 else np.repeat(mask.offsets, len(groups))
        return cls(parts.q_len, parts.k_len, parts.accumulate, b, groups % heads, offset)

    @property
    def groups(self) -> int:
        return len(self.b)

    def size(self, direction: str) -> int:
        """Number of points along a direction."""
        whole = self.q_len + self.k_len - 1
        return {NONE: 1, ROW: self.q_len, KEY: self.k_len, DIFFERENCE: whole, SUM: whole}[direction]

    def place(self, direction: str, row: NDArray, key: NDArray) -> NDArray:
        """Where along a direction the pairs (row, key) lie."""
        if direction == ROW:
            return row
        if direction == KEY:
            return key
        if direction == NONE:
            return np.zeros((1,) * max(row.ndim, key.ndim), np.int64)
        return row - key + (self.k_len - 1) if direction == DIFFERENCE else row + key

    def pairs(self, direction: str, at: NDArray) -> tuple[NDArray, NDArray]:
        """One pair (row, key) for each place along a direction, whatever the other index may be."""
        zero = np.zeros_like(at)
        if direction == KEY:
            return zero, at
        return (at - (self.k_len - 1) if direction == DIFFERENCE else at), zero

    def varies(self, expr: Expr) -> bool:
        """Whether `expr` may have another value in another group."""
        if self.groups == 1:
            return False
        moved = bool((self.offset != self.offset[0]).any()) and depends_on(expr, "i")
        return moved or depends_on(expr, "b", "h")

    def line(self, expr: Expr, direction: str) -> NDArray:
        """Values (groups, size) along a direction, (1, size) where the groups do not differ."""
        size = self.size(direction)
        groups = np.arange(self.groups if self.varies(expr) else 1)[:, None]
        dtype = {"bool": "bool", "int": "int64", "float": self.accumulate}[expr.kind]
        values = np.empty((len(groups), size), dtype)
        step = max(1, _CHUNK // len(groups))
        for start in range(0, size, step):
            at = np.arange(start, min(start + step, size))
            values[:, start : start + step] = self.evaluate(expr, groups, *self.pairs(direction, at))
        return values

    def evaluate(self, expr: Expr, group: NDArray, row: NDArray, key: NDArray) -> NDArray:
        """Values at (group, row, key), whose shapes broadcast."""
        xp = arrays.namespace(row)
        symbols = {
            "b": self.b[group],
            "h": self.h[group],
            "row": row,
            "i": row + self.offset[group],
            "j": key,
        }
        tile = Tile(
            xp=xp,
            device="cpu",
            index=np.dtype(np.int64),
            accumulate=np.dtype(self.accumulate),
            symbols=symbols,
            start=0,
            size=0,
            rows=None,
        )
        with np.errstate(all="ignore"):
            return np.asarray(evaluate(expr, tile))
