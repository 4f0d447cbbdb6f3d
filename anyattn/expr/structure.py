"""The structure of an expression: a text that two expressions share exactly when only their arrays differ.

Plans are found by it. Numbers are part of it, as schedules and generated code may depend on them; the arrays
stand beside it, to be read in every call.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyattn.expr.nodes import Aligned, Apply, Const, Deferred, Expr, Load, Size, Symbol, Table, walk

__all__ = ["Structure", "is_given", "is_read", "structure"]


@dataclass(frozen=True, eq=False)
class Structure:
    """Text and arrays of an expression.

    `text` is None where it cannot be told; `settled` is False where the sizes and the position of row 0 in
    the call decide a part of the expression.
    """

    text: str | None
    arrays: tuple[Table | Aligned, ...]
    settled: bool


def structure(root: Expr) -> Structure:
    """The structure of `root`, which is kept on the node: nodes do not change."""
    known: Structure | None = vars(root).get("_structure")
    if known is None:
        known = vars(root)["_structure"] = _structure(root)
    return known


def is_given(array: Table | Aligned) -> bool:
    """Whether an array of an expression is the caller's, who may give another in every call."""
    return isinstance(array, Aligned) or not array.host


def is_read(array: Table | Aligned) -> bool:
    """Whether the description of a call depends on the values of an array.

    It holds host data, and checks the bounds of indices that are computed from integers.
    """
    return isinstance(array, Table) and (array.host or array.kind == "int")


def _structure(root: Expr) -> Structure:
    numbers: dict[int, int] = {}
    arrays: dict[int, Table | Aligned] = {}
    lines: list[str | None] = []
    for node in walk(root):
        line = _line(node, arrays)
        numbers[id(node)] = len(lines)
        lines.append(None if line is None else f"{line} {[numbers[id(c)] for c in node.children]}")
    known = [line for line in lines if line is not None]
    text = "\n".join(known) if len(known) == len(lines) else None
    settled = not any(isinstance(node, Deferred) for node in walk(root))
    return Structure(text, tuple(arrays.values()), settled)


def _line(node: Expr, arrays: dict[int, Table | Aligned]) -> str | None:
    """What a node is, without its children."""
    if isinstance(node, Const):
        return f"{node.kind} {node.value!r}"
    if isinstance(node, Symbol):
        return node.name
    if isinstance(node, Apply):
        return f"{node.op} {node.kind}"
    if isinstance(node, Load):
        table = node.table
        return f"load {_number(table, arrays)} {table.kind} {table.axes} {table.host}"
    if isinstance(node, Size):
        return f"size {_number(node.table, arrays)} {node.axis}"
    if isinstance(node, Aligned):
        return f"aligned {_number(node, arrays)} {node.kind} {node.block} {node.any_rank}"
    if isinstance(node, Deferred) and node.parameters is not None and not node.tables:
        return f"{node.label} {node.parameters}"
    return None


def _number(array: Table | Aligned, arrays: dict[int, Table | Aligned]) -> int:
    arrays.setdefault(id(array), array)
    return list(arrays).index(id(array))
