"""The order in which a lowered expression is written down: what gets a name, and what comes once a row.

Printers of source share this and nothing else. A part that is used twice is computed once under a name; a
part that depends neither on the key nor on the score comes before those that do, so that a kernel can compute
it outside its loop over keys; a long line is broken by naming its largest part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from anyattn.arrays import Array, Namespace
from anyattn.expr.nodes import Apply, Const, Expr, Symbol, walk
from anyattn.expr.program import AlignedSlot, LoadSlot, Parameter, Program, TableSlot

__all__ = [
    "Body",
    "aligned_slots",
    "aligned_view",
    "body",
    "computed_in",
    "table_slots",
    "times_read",
    "whole_power",
]

# What a line holds, in units of `_own_size`.
_LONGEST = 10
_KEY_SYMBOLS = ("j", "score")


@dataclass(frozen=True, eq=False)
class Body:
    """A function: named parts that all keys of a row share, named parts of each key, and the result."""

    row: tuple[tuple[str, Expr], ...]
    key: tuple[tuple[str, Expr], ...]
    result: Expr


def body(root: Expr) -> Body:
    """The parts of `root`, each after those that it reads: r0, r1, ... of the row, x0, x1, ... of the key."""
    order = list(walk(root))
    uses = times_read(order)
    per_key: dict[int, bool] = {}
    for node in order:
        varies = isinstance(node, AlignedSlot) or (isinstance(node, Symbol) and node.name in _KEY_SYMBOLS)
        per_key[id(node)] = varies or any(per_key[id(child)] for child in node.children)

    named: set[int] = set()
    size: dict[int, int] = {}
    for node in order:
        parts = {id(child): child for child in node.children if not _is_leaf(child)}
        for child in parts.values():
            hoisted = per_key[id(node)] and not per_key[id(child)]
            if uses[id(child)] > 1 or hoisted or whole_power(node) in (2, 3, 4):
                named.add(id(child))
        inline = sorted((c for c in parts if c not in named), key=size.__getitem__)
        own = _own_size(node)
        while inline and own + sum(size[c] for c in inline) > _LONGEST:
            named.add(inline.pop())
        size[id(node)] = own + sum(size[c] for c in inline)

    row: list[tuple[str, Expr]] = []
    key: list[tuple[str, Expr]] = []
    for node in order:
        if id(node) in named and node is not root:
            if per_key[id(node)]:
                key.append((f"x{len(key)}", node))
            else:
                row.append((f"r{len(row)}", node))
    return Body(tuple(row), tuple(key), root)


def times_read(nodes: Iterable[Expr]) -> Counter[int]:
    """How often the nodes, each given once, read each of their operands, by id."""
    return Counter(id(child) for node in nodes for child in node.children)


def computed_in(node: Apply) -> str:
    """The kind that the operands of an operation are converted to."""
    if node.kind != "bool":
        return node.kind
    kinds = {child.kind for child in node.args}
    return next(kind for kind in ("float", "int", "bool") if kind in kinds)


def whole_power(node: Expr) -> int | None:
    """The exponent of a power that is a whole number in the structure, else None."""
    if isinstance(node, Apply) and node.op == "pow" and isinstance(node.args[1], Const):
        exponent = float(node.args[1].value)
        if exponent.is_integer():
            return int(exponent)
    return None


def table_slots(program: Program) -> tuple[TableSlot, ...]:
    """The table arguments of a program, by slot."""
    found = {node.table.slot: node.table for node in _nodes(program) if isinstance(node, LoadSlot)}
    return tuple(found[slot] for slot in sorted(found))


def aligned_slots(program: Program) -> tuple[AlignedSlot, ...]:
    """The aligned arguments of a program, by slot."""
    found = {node.slot: node for node in _nodes(program) if isinstance(node, AlignedSlot)}
    return tuple(found[slot] for slot in sorted(found))


def aligned_view(
    xp: Namespace,
    value: Array,
    block: int,
    batch_shape: tuple[int, ...],
    num_heads: int,
    q_len: int,
    k_len: int,
) -> Array:
    """An aligned array as (b, h, row // block, j // block): axes of one entry are repeated by stride 0.

    Only an array that has some of several batch axes and not the others is copied.
    """
    last = (num_heads, -(-q_len // block), -(-k_len // block))
    wide = xp.broadcast_to(value, (*batch_shape, *last))
    size = 1
    for n in batch_shape:
        size *= n
    return wide if len(batch_shape) == 1 else xp.reshape(wide, (size, *last))


def _own_size(node: Expr) -> int:
    """How much room a node takes on a line, an operator being one."""
    if isinstance(node, AlignedSlot):
        return 6
    return 2 + 2 * len(node.children) if isinstance(node, LoadSlot) else 1


def _is_leaf(node: Expr) -> bool:
    return isinstance(node, (Const, Symbol, Parameter))


def _nodes(program: Program) -> list[Expr]:
    return [node for root in program.functions.values() for node in walk(root)]
