"""Expressions of a call without the arrays that the caller gave, to serve calls with other ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyattn.arrays import Array
from anyattn.expr.nodes import Aligned, Expr, Load, Table, load, rewrite

__all__ = ["Given", "put_in", "take_out"]


@dataclass(frozen=True)
class Given:
    """Stands for an array that each call gives: number `number` of `AttentionCall.others`."""

    number: int
    shape: tuple[int, ...]
    dtype: Any


def take_out(root: Expr, numbers: Mapping[int, int]) -> Expr:
    """`root` with a `Given` for each array whose id has a number."""

    def other(x: Any) -> Any:
        return Given(numbers[id(x)], tuple(x.shape), x.dtype) if id(x) in numbers else x

    return _with_arrays(root, other)


def put_in(root: Expr, others: Sequence[Array]) -> Expr:
    """`root` with the arrays of a call in the places of `Given`."""
    return _with_arrays(root, lambda x: others[x.number] if isinstance(x, Given) else x)


def _with_arrays(root: Expr, other: Callable[[Any], Any]) -> Expr:
    tables: dict[int, Table] = {}

    def change(node: Expr) -> Expr:
        if isinstance(node, Aligned):
            found = other(node.value)
            return node if found is node.value else replace(node, value=found)
        if not isinstance(node, Load):
            return node
        table = node.table
        if id(table) not in tables:
            found = other(table.value)
            tables[id(table)] = table if found is table.value else replace(table, value=found)
        return load(tables[id(table)], node.indices)

    return rewrite(root, change)
