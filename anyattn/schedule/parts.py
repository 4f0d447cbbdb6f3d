"""What of a call decides which keys a row sees, with every array that the host may read as NumPy.

Arrays on a device, under a tracer or lazy are never read: what depends on them becomes `Unread`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anyattn import arrays
from anyattn.call import AttentionCall
from anyattn.expr.bind import batch_indices
from anyattn.expr.nodes import (
    ROW,
    Aligned,
    Const,
    Expr,
    H,
    J,
    Load,
    Symbol,
    Table,
    depends_on,
    load,
    rewrite,
)
from anyattn.expr.program import canonical

__all__ = ["Parts", "Readable", "Unread", "parts_of", "readable"]

NDArray = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Parts:
    """What a schedule is made from.

    Attributes
    ----------
    visible : Expr or None
        A bound mask expression; None sees all.
    q_len, k_len : int
    batch_shape : tuple of int
    num_heads : int
    offset : int or integer array or None
        Position of row 0, an array broadcasting to `batch_shape`; None where the host does not know it.
    accumulate : "float32" or "float64"
        The dtype in which an expression computes floats.
    """

    visible: Expr | None
    q_len: int
    k_len: int
    batch_shape: tuple[int, ...] = ()
    num_heads: int = 1
    offset: Any = 0
    accumulate: str = "float32"

    @property
    def batch_size(self) -> int:
        return math.prod(self.batch_shape)


def parts_of(call: AttentionCall) -> Parts:
    """The parts of a described call."""
    return Parts(
        visible=call.visible,
        q_len=call.q_len,
        k_len=call.k_len,
        batch_shape=call.batch_shape,
        num_heads=call.num_heads,
        offset=call.offset_host,
        accumulate=call.accumulate,
    )


@dataclass(frozen=True, eq=False, repr=False)
class Unread(Expr):
    """A value that the host may not read."""

    kind: str

    def __repr__(self) -> str:
        return "unread"


@dataclass(frozen=True, eq=False)
class Readable:
    """A mask expression over NumPy arrays, and on which of b and h it depends.

    `offsets` are the positions of row 0, one for each batch entry or one for all. `blocks` maps the id of a
    `Load` to the edge of the square of (rows, keys) that one entry of its table serves.
    """

    root: Expr
    offsets: NDArray
    blocks: dict[int, int]
    by_batch: bool
    by_head: bool


def can_read(x: Any) -> bool:
    """Whether the host may read the values of an array, and NumPy holds its dtype."""
    if not arrays.is_concrete_cpu(x):
        return False
    return arrays.dtype_name(x) != "bfloat16" or arrays.library(x) in ("numpy", "jax")


def host_values(table: Table) -> NDArray | None:
    """The entries of a table, where the host may read them or made them."""
    return arrays.to_host(table.value) if can_read(table.value) else table.known


def readable(parts: Parts) -> Readable:
    """The mask of `parts` as the host can read it."""
    assert parts.visible is not None
    known = parts.offset is not None
    offsets = np.asarray(parts.offset if known else 0, np.int64)
    if offsets.ndim:
        offsets = np.broadcast_to(offsets, parts.batch_shape).reshape(-1)
    if offsets.size and (offsets == offsets.flat[0]).all():
        offsets = offsets.reshape(-1)[:1]
    tables: dict[int, Table] = {}
    aligned: dict[int, Expr] = {}
    blocks: dict[int, int] = {}

    def change(node: Expr) -> Expr:
        if isinstance(node, Symbol) and node.name == "i" and not known:
            return Unread("int")
        if isinstance(node, Load):
            if id(node.table) not in tables:
                values = host_values(node.table)
                if values is None:
                    return Unread(node.kind)
                tables[id(node.table)] = replace(node.table, value=values)
            return load(tables[id(node.table)], node.indices)
        if isinstance(node, Aligned):
            if id(node) not in aligned:
                aligned[id(node)] = _as_load(node, parts.batch_shape, blocks)
            return aligned[id(node)]
        return node

    root = rewrite(canonical(parts.visible), change)
    return Readable(
        root=root,
        offsets=offsets.reshape(-1),
        blocks=blocks,
        by_batch=depends_on(root, "b") or (offsets.size > 1 and depends_on(root, "i")),
        by_head=depends_on(root, "h"),
    )


def _as_load(node: Aligned, batch_shape: tuple[int, ...], blocks: dict[int, int]) -> Expr:
    """An array along (..., h, row, j) as a table read at these indices."""
    if not can_read(node.value):
        return Unread(node.kind)
    value = arrays.to_host(node.value)
    *lead, rows, keys = value.shape

    def index(symbol: Expr, size: int, block: int) -> Expr:
        if size == 1:
            return Const(0, "int")
        return symbol if block == 1 else symbol // block

    indices: list[Expr] = []
    if lead:
        indices += batch_indices(tuple(lead[:-1]), batch_shape)
        indices.append(index(H, lead[-1], 1))
    indices += [index(ROW, rows, node.block), index(J, keys, node.block)]
    table = Table(value, node.kind, value.ndim, (None,) * value.ndim, node.label, host=False)
    read = load(table, tuple(indices))
    if rows > 1 and keys > 1:
        blocks[id(read)] = node.block
    return read
