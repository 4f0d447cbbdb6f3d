"""Binding: what in an expression depends on the call is settled once, before a backend sees it.

Deferred parts get the sizes, captured arrays are checked against the library, the device and the axes of the
call, and host data becomes arrays beside the queries.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.expr.bounds import check_integers, holds
from anyattn.expr.nodes import (
    COMPARISONS,
    Aligned,
    Apply,
    B,
    Const,
    Deferred,
    Expr,
    Load,
    Size,
    Table,
    load,
    rewrite,
    walk,
)
from anyattn.expr.statements import computed_in

if TYPE_CHECKING:
    import numpy

__all__ = ["Geometry", "batch_indices", "bind", "captured_arrays", "check_same_place"]


@dataclass(frozen=True, eq=False)
class Geometry:
    """The sizes of a call and where its arrays live.

    `offset_host` is the position of query row 0 where the host knows it: an integer, or one integer for each
    batch entry in the shape that the caller gave; None where it lies on a device or does not exist yet.
    """

    xp: Namespace
    like: Array
    library: str
    device: Any
    accumulate: str
    batch_shape: tuple[int, ...]
    num_heads: int
    has_heads: bool
    q_len: int
    k_len: int
    offset_host: numpy.ndarray[Any, Any] | int | None

    @property
    def batch_size(self) -> int:
        return math.prod(self.batch_shape)

    def result_shape(self) -> tuple[int, ...]:
        """(..., Hq, Lq, Lk) of the call."""
        return (*self.batch_shape, self.num_heads, self.q_len, self.k_len)

    def host_array(self, data: Any) -> Array:
        """Host numbers as an array beside the queries, in a dtype that every library has."""
        import numpy

        data = numpy.asarray(data)
        if data.dtype.kind in "iu":
            dtype = arrays.index_dtype(self.xp, self.device)
        elif data.dtype.kind == "b":
            dtype = self.xp.bool
        else:
            dtype = getattr(self.xp, self.accumulate)
            data = data.astype(self.accumulate)
        return self.xp.asarray(data, dtype=dtype, device=self.device)


def bind(root: Expr, geometry: Geometry, argument: str) -> Expr:
    """`root` with deferred parts settled and every captured array checked and beside the queries.

    No integer of it leaves the index dtype of the call: errors of those that may name `argument`.
    """
    tables: dict[int, Table] = {}
    bits = int(geometry.xp.iinfo(arrays.index_dtype(geometry.xp, geometry.device)).bits)

    def settle(node: Expr) -> Expr:
        if isinstance(node, Size):
            return Const(int(node.table.value.shape[node.axis]), "int")
        if isinstance(node, Deferred):
            return settled(node.settle(geometry, *(table.value for table in node.tables)))
        return node

    def settled(node: Expr) -> Expr:
        return rewrite(node, settle)

    def place(node: Expr) -> Expr:
        if isinstance(node, Load):
            if id(node.table) not in tables:
                tables[id(node.table)] = _bind_table(node.table, geometry, bits)
            return load(tables[id(node.table)], tuple(_nearest(index, bits) for index in node.indices))
        if isinstance(node, Aligned):
            return _bind_aligned(node, geometry)
        return _without_wide_constants(node, bits) if isinstance(node, Apply) else node

    bound = rewrite(settled(root), place)
    check_integers(bound, geometry, bits, argument, geometry.library)
    return bound


def captured_arrays(root: Expr | None) -> list[Array]:
    """The arrays that a bound expression reads."""
    found = []
    for node in () if root is None else walk(root):
        if isinstance(node, Load):
            found.append(node.table.value)
        elif isinstance(node, Aligned):
            found.append(node.value)
    return found


def batch_indices(shape: tuple[int, ...], full: tuple[int, ...]) -> tuple[Expr, ...]:
    """An index for each axis of `shape`, which broadcasts to the batch axes `full`, from the flat index b."""
    indices: list[Expr] = []
    stride = 1
    for axis, (size, whole) in enumerate(zip(reversed(shape), reversed(full), strict=False), 1):
        # Sizes are left out where they can be: they would make the code that of one batch shape.
        index = B // stride if stride > 1 else B
        indices.append(Const(0, "int") if size == 1 else index % whole if axis < len(full) else index)
        stride *= whole
    return tuple(reversed(indices))


def _without_wide_constants(node: Apply, bits: int) -> Expr:
    """`node` without integers that the indices do not hold, where it has a meaning without them."""
    if not any(_is_wide(arg, bits) for arg in node.args):
        return node
    if computed_in(node) == "float":
        return node.rebuild(tuple(_real(arg) if _is_wide(arg, bits) else arg for arg in node.args))
    if node.op in COMPARISONS:
        # What is beyond all indices compares with each of them as with 0.
        x, y = (arg.value if isinstance(arg, Const) else 0 for arg in node.args)
        return Const(bool(getattr(operator, node.op)(x, y)), "bool")
    return node


def _is_wide(node: Expr, bits: int) -> bool:
    if not (isinstance(node, Const) and node.kind == "int"):
        return False
    value = int(node.value)
    return not holds(value, value, bits)


def _nearest(index: Expr, bits: int) -> Expr:
    """An index into a table, moved into the range of the indices."""
    if isinstance(index, Const) and _is_wide(index, bits):
        largest = 2 ** (bits - 1) - 1
        return Const(max(min(int(index.value), largest), -largest), "int")
    return index


def _real(node: Expr) -> Const:
    """A constant as a float."""
    assert isinstance(node, Const)
    try:
        return Const(float(node.value), "float")
    except OverflowError:
        return Const(math.copysign(math.inf, node.value), "float")


def check_same_place(value: Array, label: str, geometry: Geometry) -> None:
    """Raise unless `value` belongs to the library and the device of the queries."""
    arrays.check_beside(value, label, geometry.like, "q")


def _bind_table(table: Table, geometry: Geometry, bits: int) -> Table:
    if 0 in table.value.shape and 0 not in geometry.result_shape():
        raise ValueError(
            f"{table.label}: wanted at least one entry on every axis, got shape {tuple(table.value.shape)}"
        )
    for size, axis in zip(table.value.shape, table.axes, strict=True):
        wanted = {"b": geometry.batch_size, "h": geometry.num_heads, None: size}[axis]
        if size != wanted:
            what = {"b": "batch entries", "h": "query heads"}[axis or ""]
            raise ValueError(
                f"{table.label}: wanted one entry for each of {wanted} {what}, "
                f"got shape {tuple(table.value.shape)}"
            )
    if not holds(0, math.prod(table.value.shape) - 1, bits):
        raise ValueError(
            f"{table.label}: wanted at most 2**{bits - 1} entries, as the indices of {geometry.library} "
            f"have {bits} bits, got shape {tuple(table.value.shape)}"
        )
    if table.host and table.kind == "int" and table.value.size:
        least, most = int(table.value.min()), int(table.value.max())
        if not holds(least, most, bits):
            raise ValueError(
                f"{table.label}: wanted integers of {bits} bits, as the indices of {geometry.library} have, "
                f"got {least} to {most}"
            )
    if table.host:
        # Floats are rounded on their way, and a mask that compares them is decided by what they become.
        known = None if table.kind == "float" else table.value
        return replace(table, value=geometry.host_array(table.value), host=False, known=known)
    check_same_place(table.value, table.label, geometry)
    return table


def _bind_aligned(node: Aligned, geometry: Geometry) -> Aligned:
    check_same_place(node.value, node.label, geometry)
    *lead, rows, keys = geometry.result_shape()
    wanted = (*lead, -(-rows // node.block), -(-keys // node.block))
    shape = tuple(node.value.shape)
    full = len(wanted) if geometry.has_heads else 2
    ranks = tuple(range(2, full + 1)) if node.any_rank else (2, full)
    described = f"2 axes {wanted[-2:]}" + (f" or all {full} axes {wanted}" if full > 2 else "")
    if len(shape) not in ranks:
        raise ValueError(f"{node.label}: wanted {described}, got shape {shape}")
    for size, full in zip(reversed(shape), reversed(wanted), strict=False):
        if size not in (1, full):
            raise ValueError(f"{node.label}: wanted a shape that broadcasts to {wanted}, got {shape}")
    return node
