"""Captured arrays by name, so that a compiled function can be given others.

A capture is called what the traced function calls it ("slopes"), or what the entry of the vocabulary calls
its argument ("slopes" of `scores.alibi`, "ids" of `masks.documents`). An array that takes a captured one's
place has its dtype and rank; where an expression was built from its sizes, these too, but along axes that
follow the call (batch entries, query heads). Where one was built from its values, no array takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyattn import arrays
from anyattn.expr.nodes import Aligned, Deferred, Expr, Load, Size, Table, load, rewrite, walk
from anyattn.expr.tables import check_least

__all__ = ["Capture", "arrays_of", "find_captures", "rebind"]

# What host numbers become in a call (`Geometry.host_array`); floats take the accumulation dtype.
_HOST_DTYPES = {"bool": "bool", "int": "int64"}


@dataclass(frozen=True, eq=False)
class Capture:
    """A captured array; where it is read in several places, one part for each.

    `fixed` where expressions were built from its values, so that no other array takes its place.
    """

    name: str
    parts: tuple[Table | Aligned, ...]
    fixed: bool

    @property
    def value(self) -> Any:
        return self.parts[0].value

    @property
    def per_call(self) -> bool:
        """Whether the values belong to one call: they have an entry for each of its rows."""
        return any(isinstance(part, Table) and "row" in part.axes for part in self.parts)

    def dtype(self, accumulate: str) -> str:
        """The dtype that a kernel was compiled for."""
        part = self.parts[0]
        if isinstance(part, Table) and part.host:
            return _HOST_DTYPES.get(part.kind, accumulate)
        return arrays.dtype_name(part.value)


def arrays_of(node: Expr) -> tuple[Table | Aligned, ...]:
    """The arrays that one node of an unbound expression holds."""
    if isinstance(node, (Load, Size)):
        return (node.table,)
    if isinstance(node, Deferred):
        return node.tables
    return (node,) if isinstance(node, Aligned) else ()


def find_captures(roots: Iterable[Expr], reads: Sequence[tuple[str, Any]] = ()) -> dict[str, Capture]:
    """The captures of unbound expressions by name; a name used for two arrays is told apart by a number.

    `reads` are arrays, with their names, whose values were read while functions were traced.
    """
    groups: list[tuple[str, list[Table | Aligned]]] = []
    seen: set[int] = set()
    for root in roots:
        for part in (part for node in walk(root) for part in arrays_of(node)):
            name = _name(part)
            if name is None or id(part) in seen:
                continue
            seen.add(id(part))
            for known, parts in groups:
                if known == name and _same(parts[0], part):
                    parts.append(part)
                    break
            else:
                groups.append((name, [part]))
    found: dict[str, Capture] = {}
    for name, parts in groups:
        number, own = 1, name
        while own in found:
            number += 1
            own = f"{name}_{number}"
        found[own] = Capture(own, tuple(parts), any(_was_read(x, name, reads) for x in parts))
    return found


def rebind(roots: Iterable[Expr | None], values: Mapping[Capture, Any], accumulate: str) -> list[Expr | None]:
    """The expressions with other arrays in the places of captures.

    Raises
    ------
    TypeError, ValueError
        If an array has another dtype, rank or fixed size than the one that it takes the place of.
    """
    new: dict[int, Any] = {}
    for capture, value in values.items():
        if capture.fixed:
            raise ValueError(
                f"{capture.name}: its values were read while the function was traced (an element, float(), "
                f"a loop), and another array would leave those in place; index it by index expressions only, "
                f"or compile again with the other array"
            )
        for part in capture.parts:
            new[id(part)] = (
                _other_table(part, value, capture, accumulate)
                if isinstance(part, Table)
                else _other_aligned(part, value, capture)
            )

    def change(node: Expr) -> Expr:
        if isinstance(node, Load):
            return load(new.get(id(node.table), node.table), node.indices)
        if isinstance(node, Size):
            return replace(node, table=new.get(id(node.table), node.table))
        if isinstance(node, Deferred):
            return replace(node, tables=tuple(new.get(id(table), table) for table in node.tables))
        replaced: Expr = new.get(id(node), node)
        return replaced

    return [None if root is None else rewrite(root, change) for root in roots]


def _name(part: Table | Aligned) -> str | None:
    """What the user calls an array, or None where it is anyattn's own."""
    if isinstance(part, Table) and part.host and part.label == "global_tokens: tokens":
        return None  # a table of flags, made from the tokens
    name = part.label.rpartition(": ")[2]
    return None if " " in name else name


def _was_read(part: Table | Aligned, name: str, reads: Sequence[tuple[str, Any]]) -> bool:
    """Whether the values of an array were read by the function that captures it, or by another."""
    if isinstance(part, Table) and part.fixed == "values":
        return True
    for called, value in reads:
        if part.value is value:
            return True
        # A list is converted anew at each place where a function reads it.
        host = isinstance(part, Table) and part.host and not arrays.is_array(value)
        if host and called == name and part.value.tolist() == _listed(value):
            return True
    return False


def _listed(value: Any) -> Any:
    return [_listed(x) for x in value] if isinstance(value, Sequence) else value


def _same(one: Table | Aligned, other: Table | Aligned) -> bool:
    if one.value is other.value:
        return True
    if not (isinstance(one, Table) and isinstance(other, Table) and one.host and other.host):
        return False
    # A list is converted anew at each place where a function reads it.
    return bool(one.value.dtype == other.value.dtype and one.value.tobytes() == other.value.tobytes())


def _other_aligned(part: Aligned, value: Any, capture: Capture) -> Aligned:
    _check_dtype(value, arrays.dtype_name(part.value), capture)
    return replace(part, value=value)


def _other_table(part: Table, value: Any, capture: Capture, accumulate: str) -> Table:
    wanted = capture.dtype(accumulate)
    host = not arrays.is_array(value)
    if host:
        value = _numbers(value, part.kind, wanted, capture)
    else:
        _check_dtype(value, wanted, capture)
    shape, was = tuple(value.shape), tuple(part.value.shape)
    fits = len(shape) == len(was) and all(
        part.fixed != "shape" or axis is not None or a == b
        for a, b, axis in zip(shape, was, part.axes, strict=True)
    )
    if not fits:
        keeps = part.fixed == "shape"
        free = [str(n) if keeps and axis is None else "any" for n, axis in zip(was, part.axes, strict=True)]
        raise ValueError(
            f"{capture.name}: wanted shape ({', '.join(free)}{',' if len(free) == 1 else ''}) "
            f"as it was compiled for, got {shape}"
        )
    other = replace(part, value=value, host=host)
    check_least(other, capture.name)
    return other


def _check_dtype(value: Any, wanted: str, capture: Capture) -> None:
    if not arrays.is_array(value):
        raise TypeError(f"{capture.name}: wanted an array of {wanted}, got {type(value).__name__}")
    if arrays.dtype_name(value) != wanted:
        raise TypeError(
            f"{capture.name}: wanted dtype {wanted} as it was compiled for, got {arrays.dtype_name(value)}"
        )


def _numbers(value: Any, kind: str, wanted: str, capture: Capture) -> Any:
    """A sequence of numbers as host data, where it becomes of the dtype that was compiled for."""
    import numpy

    try:
        found = numpy.asarray(value)
    except ValueError as error:
        raise ValueError(f"{capture.name}: wanted numbers in equally long rows, got {value!r}") from error
    fits = found.dtype.kind in {"bool": "b", "int": "iu", "float": "fiu"}[kind]
    if not fits or wanted not in (*_HOST_DTYPES.values(), "float32", "float64"):
        raise TypeError(f"{capture.name}: wanted an array of {wanted}, got {value!r}")
    return found.astype(wanted)
