"""From captured values to table nodes: which arrays and numbers an expression may read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyattn import arrays
from anyattn.expr.nodes import Table

__all__ = ["check_least", "is_numbers", "table_of"]


def table_of(
    value: Any,
    label: str,
    axes: tuple[str | None, ...] | None = None,
    *,
    host: bool = False,
    fixed: str = "shape",
    least: int | None = None,
) -> Table:
    """The table node of a captured array, or of numbers that every library gets a copy of.

    Rectangular sequences of numbers are such `host` data, and so are NumPy arrays that anyattn made itself.
    """
    if arrays.is_array(value) and arrays.refused_type(value):
        raise TypeError(f"{label}: {type(value).__name__} is not taken, {arrays.refused_type(value)}")
    if not arrays.is_array(value):
        import numpy

        host = True
        try:
            value = numpy.array(value)  # a copy: such numbers do not change
        except ValueError as error:
            raise ValueError(f"{label}: wanted numbers in equally long rows, got {value!r}") from error
        if value.size == 0:
            value = value.astype(int)
    kind = arrays.kind(value)
    if kind not in ("bool", "int", "float"):
        raise TypeError(f"{label}: wanted a bool, integer or real float array, got dtype {kind}")
    if axes is not None and value.ndim != len(axes):
        raise ValueError(f"{label}: wanted {len(axes)} axes, got shape {tuple(value.shape)}")
    table = Table(value, kind, value.ndim, axes or (None,) * value.ndim, label, host, fixed, least)
    check_least(table, label)
    return table


def check_least(table: Table, label: str) -> None:
    """Raise where the host can read an entry below `table.least`."""
    if table.least is None or not (table.host or arrays.is_concrete_cpu(table.value)):
        return
    found = arrays.to_host(table.value)
    if (found < table.least).any():
        raise ValueError(f"{label}: wanted {table.least} or more, got {found.min()}")


def is_numbers(value: Any) -> bool:
    """Whether `value` is a sequence of Python numbers, or of such sequences."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, range)) or not value:
        return False
    return all(isinstance(v, (bool, int, float)) or is_numbers(v) for v in value)
