"""A mask as a formula: atoms joined by and, or, xor and not.

Negations are moved to the atoms, and parts of one conjunction (or disjunction) that change in the same
direction become one atom, which is then judged exactly: `i - j >= 0`, `i - j <= 512` and `(i - j) % 8 == 0`
are one condition on i - j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np

from anyattn.expr.nodes import Apply, Const, Expr, Load, apply
from anyattn.schedule.atoms import Atom, Blocks, Bounds, Compare, Hidden, Line, Opposite
from anyattn.schedule.axes import KEY, MIXED, NONE, ROW, UNREAD, Space, directions
from anyattn.schedule.grid import Tiles
from anyattn.schedule.mixed import Mixed
from anyattn.schedule.verdicts import (
    AND,
    AND_APART,
    ANY,
    EMPTY,
    FULL,
    NOT,
    OR,
    OR_APART,
    XOR,
    XOR_APART,
)

__all__ = ["Formula", "Leaf", "formula_of"]

NDArray = np.ndarray[Any, Any]


class Formula:
    """Base of the nodes; `verdicts` are the sets of verdicts that leaf tiles of a tile may have.

    They are asked for where they matter (`where`, all tiles if None) and are ANY elsewhere. `cost` is that of
    asking a tile.
    """

    children: tuple[Formula, ...] = ()
    cost: int

    def verdicts(self, tiles: Tiles, where: NDArray | None = None) -> NDArray:
        found, asked = tiles.known.get(id(self), (None, None))
        missing = np.ones(len(tiles), bool) if where is None else where
        if asked is not None:
            missing = missing & ~asked
        if found is None or missing.any():
            fresh = self.judge(tiles, missing)
            found = fresh if found is None else np.where(missing, fresh, found)
            tiles.known[id(self)] = found, missing if asked is None else asked | missing
        return found

    def judge(self, tiles: Tiles, where: NDArray) -> NDArray:
        raise NotImplementedError

    def columns(self, tiles: Tiles, known: dict[int, NDArray]) -> NDArray:
        """Verdicts that the columns of leaf tiles may have (tiles, keys); `known` are those of nodes."""
        if id(self) not in known:
            known[id(self)] = self.judge_columns(tiles, known)
        return known[id(self)]

    def judge_columns(self, tiles: Tiles, known: dict[int, NDArray]) -> NDArray:
        raise NotImplementedError

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        """Every leaf below, once."""
        seen: dict[int, Formula] = {}
        stack: list[Formula] = [self]
        while stack:
            node = stack.pop()
            if id(node) not in seen:
                seen[id(node)] = node
                stack.extend(node.children)
                if isinstance(node, Leaf):
                    yield node


class Leaf(Formula):
    """An atom; `direction` is the one in which it changes."""

    def __init__(self, atom: Atom, direction: str):
        self.atom, self.direction = atom, direction
        self.cost = atom.cost

    def judge(self, tiles: Tiles, where: NDArray) -> NDArray:
        if where.all():
            return self.atom.verdicts(tiles)
        found = np.full(len(tiles), ANY, np.uint8)
        if where.any():
            found[where] = self.atom.verdicts(tiles.chosen(where))
        return found

    def judge_columns(self, tiles: Tiles, known: dict[int, NDArray]) -> NDArray:
        return self.atom.columns(tiles)

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        return self.atom.values(group, row, key)


class Not(Formula):
    """The opposite."""

    def __init__(self, inner: Formula):
        self.children = (inner,)
        self.cost = inner.cost

    def judge(self, tiles: Tiles, where: NDArray) -> NDArray:
        found: NDArray = NOT[self.children[0].verdicts(tiles, where)]
        return found

    def judge_columns(self, tiles: Tiles, known: dict[int, NDArray]) -> NDArray:
        found: NDArray = NOT[self.children[0].columns(tiles, known)]
        return found

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        upper, lower = self.children[0].values(group, row, key)
        return (~lower, ~upper) if upper is not lower else _same(~upper)


class Join(Formula):
    """All of ("and") or one of ("or") some parts."""

    def __init__(self, op: str, children: tuple[Formula, ...]):
        # A condition on rows and one on keys go first: as long as nothing else has joined, they are free of
        # each other. What is cheap to ask then spares asking the rest where it settles all.
        sides = [c for c in children if isinstance(c, Leaf) and c.direction in (ROW, KEY)]
        rest = [c for c in children if not any(c is s for s in sides)]
        self.op, self.children = op, (*sides, *sorted(rest, key=lambda c: c.cost))
        self.sides = len(sides)
        self.cost = max(c.cost for c in children)
        self.table, self.apart, self.final = (AND, AND_APART, EMPTY) if op == "and" else (OR, OR_APART, FULL)

    def judge(self, tiles: Tiles, where: NDArray) -> NDArray:
        found = self.children[0].verdicts(tiles, where)
        for n, child in enumerate(self.children[1:], 1):
            table = self.apart if n < self.sides else self.table
            found = table[found, child.verdicts(tiles, where & (found != self.final))]
        return found

    def judge_columns(self, tiles: Tiles, known: dict[int, NDArray]) -> NDArray:
        found: NDArray = reduce(
            lambda x, y: self.table[x, y], (c.columns(tiles, known) for c in self.children)
        )
        return found

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        operation = np.logical_and if self.op == "and" else np.logical_or
        return _joined(operation, [c.values(group, row, key) for c in self.children])


class Xor(Formula):
    """One of two parts, not both."""

    def __init__(self, left: Formula, right: Formula):
        self.children = (left, right)
        self.cost = max(left.cost, right.cost)

    def judge(self, tiles: Tiles, where: NDArray) -> NDArray:
        left, right = self.children
        sides = {c.direction for c in self.children if isinstance(c, Leaf)}
        table = XOR_APART if sides == {ROW, KEY} else XOR
        found: NDArray = table[left.verdicts(tiles, where), right.verdicts(tiles, where)]
        return found

    def judge_columns(self, tiles: Tiles, known: dict[int, NDArray]) -> NDArray:
        left, right = (c.columns(tiles, known) for c in self.children)
        found: NDArray = XOR[left, right]
        return found

    def values(self, group: NDArray, row: NDArray, key: NDArray) -> Bounds:
        (u, lu), (v, lv) = (c.values(group, row, key) for c in self.children)
        if u is lu and v is lv:
            return _same(u ^ v)
        return u & ~lv | v & ~lu, lu & ~v | lv & ~u


def _same(seen: NDArray) -> Bounds:
    return seen, seen


def _joined(operation: Callable[[NDArray, NDArray], NDArray], bounds: list[Bounds]) -> Bounds:
    upper = reduce(operation, [u for u, _ in bounds])
    if all(u is low for u, low in bounds):
        return upper, upper
    return upper, reduce(operation, [low for _, low in bounds])


def formula_of(root: Expr, space: Space, blocks: dict[int, int]) -> Formula:
    """The formula of a readable mask."""
    return _Builder(root, space, blocks)(root, False)


_LEFT = {"lt": "lt", "le": "le", "gt": "lt", "ge": "le"}


class _Builder:
    def __init__(self, root: Expr, space: Space, blocks: dict[int, int]):
        self.space, self.blocks = space, blocks
        self.directions: dict[int, str] = {}
        self.kept: list[Expr] = []
        self.done: dict[tuple[int, bool], Formula] = {}
        self.direction(root)

    def direction(self, expr: Expr) -> str:
        if id(expr) not in self.directions:
            self.kept.append(expr)
            self.directions.update(directions(expr))
        return self.directions[id(expr)]

    def __call__(self, node: Expr, negate: bool) -> Formula:
        key = id(node), negate
        if key not in self.done:
            self.done[key] = self.build(node, negate)
        return self.done[key]

    def build(self, node: Expr, negate: bool) -> Formula:
        if self.direction(node) not in (MIXED, UNREAD):
            return self.line([~node if negate else node], "and")
        if isinstance(node, Apply):
            if node.op == "not":
                return self(node.args[0], not negate)
            if node.op in ("and", "or"):
                return self.join(node, negate)
            if node.op == "where":
                c, x, y = node.args
                return self(self.keep((c & x) | (~c & y)), negate)
            if node.op == "xor" or (
                node.op in ("eq", "ne") and node.args[0].kind == "bool" == node.args[1].kind
            ):
                return Xor(self(node.args[0], negate ^ (node.op == "eq")), self(node.args[1], False))
        atom = self.atom(node)
        leaf = Leaf(atom, self.direction(node))
        return Not(leaf) if negate else leaf

    def keep(self, expr: Expr) -> Expr:
        self.kept.append(expr)
        return expr

    def line(self, parts: list[Expr], op: str) -> Formula:
        """One atom of parts that change in one direction."""
        expr = self.keep(reduce(lambda x, y: apply(op, x, y), parts))
        key = id(expr), False
        if key not in self.done:
            direction = self.direction(expr)
            self.done[key] = Leaf(Line(self.space, expr, direction), direction)
        return self.done[key]

    def join(self, node: Apply, negate: bool) -> Formula:
        """The parts of nested `and`s (or `or`s) together, those of one direction as one atom."""
        op = node.op if not negate else {"and": "or", "or": "and"}[node.op]
        lines: dict[str, list[Expr]] = {}
        others: list[Formula] = []
        stack: list[tuple[Expr, bool]] = [(node, negate)]
        seen: set[tuple[int, bool]] = set()
        while stack:
            part, opposite = stack.pop()
            if (id(part), opposite) in seen:
                continue
            seen.add((id(part), opposite))
            direction = self.direction(part)
            if direction not in (MIXED, UNREAD):
                lines.setdefault(direction, []).append(self.keep(~part if opposite else part))
            elif isinstance(part, Apply) and part.op == "not":
                stack.append((part.args[0], not opposite))
            elif isinstance(part, Apply) and (part.op, opposite) in ((op, False), (_other(op), True)):
                stack += [(arg, opposite) for arg in reversed(part.args)]
            else:
                others.append(self(part, opposite))
        joined = [self.line(parts, op) for parts in lines.values()] + others
        return joined[0] if len(joined) == 1 else Join(op, tuple(joined))

    def atom(self, node: Expr) -> Atom:
        if self.direction(node) == UNREAD:
            return Hidden()
        if isinstance(node, Load) and id(node) in self.blocks:
            return Blocks(self.space, node, self.blocks[id(node)])
        compare = self.compare(node) if isinstance(node, Apply) else None
        return compare or Mixed(self.space, node, self.directions)

    def compare(self, node: Apply) -> Atom | None:
        """`node` as a comparison of something of the rows with something of the keys, where it is one."""
        if node.op not in (*_LEFT, "eq", "ne"):
            return None
        left, right = node.args
        if {self.direction(left), self.direction(right)} - {NONE} != {ROW, KEY}:
            sides = self.separated(left, right)
            if sides is None:
                return None
            left, right = sides
        op, opposite = ("eq", node.op == "ne") if node.op in ("eq", "ne") else (_LEFT[node.op], False)
        if node.op in ("gt", "ge"):
            left, right = right, left
        dtype = self.space.accumulate if "float" in (left.kind, right.kind) else "int64"
        x, y = (self.space.line(side, self.direction(side)).astype(dtype) for side in (left, right))
        if not _tame(x) or not _tame(y):
            return None
        if self.direction(left) == KEY and op != "eq":
            # y < x is the opposite of x <= y, as nothing is NaN.
            op, opposite = {"lt": "le", "le": "lt"}[op], True
        if self.direction(left) == KEY:
            x, y = y, x
        atom = Compare(op, x, y)
        return Opposite(atom) if opposite else atom

    def separated(self, left: Expr, right: Expr) -> tuple[Expr, Expr] | None:
        """Whole numbers left and right with the terms of the rows on one side, of the keys on the other."""
        if "float" in (left.kind, right.kind):
            return None
        rows: list[Expr] = []
        keys: list[Expr] = []
        stack = [(left, 1), (right, -1)]
        while stack:
            term, factor = stack.pop()
            direction = self.direction(term)
            if direction in (NONE, ROW, KEY):
                (keys if direction == KEY else rows).append(term if factor == 1 else term * factor)
            elif not isinstance(term, Apply):
                return None
            elif term.op in ("add", "sub"):
                stack.append((term.args[0], factor))
                stack.append((term.args[1], factor if term.op == "add" else -factor))
            elif term.op == "neg":
                stack.append((term.args[0], -factor))
            elif term.op == "mul" and any(isinstance(a, Const) for a in term.args):
                n = 0 if isinstance(term.args[0], Const) else 1
                constant, other = term.args[n], term.args[1 - n]
                assert isinstance(constant, Const)
                stack.append((other, factor * int(constant.value)))
            else:
                return None
        if not rows or not keys:
            return None
        x, y = (self.keep(reduce(lambda a, b: a + b, terms)) for terms in (rows, keys))
        y = self.keep(-y)
        return (x, y) if self.direction(x) == ROW and self.direction(y) == KEY else None


def _other(op: str) -> str:
    return "or" if op == "and" else "and"


def _tame(values: NDArray) -> bool:
    """Whether nothing is NaN, or so large that sums of it may have wrapped."""
    if values.dtype.kind == "f":
        return not np.isnan(values).any()
    return bool(values.min() > -(1 << 61) and values.max() < 1 << 61)
