"""What a schedule is kept under: all that it is made from.

The mask node by node with its numbers, the lengths, the tiles, and the contents of every array that the
analysis reads, never their identity: an array changed in place gives another schedule. Every call of
`attention` asks for a key, so the mask is listed as it is and not brought into a canonical form first, which
takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from anyattn import arrays
from anyattn.expr.nodes import Aligned, Apply, Const, Expr, Load, Symbol, walk
from anyattn.schedule.parts import Parts, can_read, host_values

__all__ = ["key_of"]


def key_of(parts: Parts, rows: int, keys: int) -> Hashable:
    """The key of the schedule of `parts` in tiles of `rows` x `keys`."""
    offset = parts.offset
    return (
        None if parts.visible is None else _structure(parts.visible),
        offset if offset is None or isinstance(offset, int) else _contents(offset, np.asarray(offset)),
        parts.q_len,
        parts.k_len,
        parts.batch_shape,
        parts.num_heads,
        parts.accumulate,
        rows,
        keys,
    )


def _structure(root: Expr) -> Hashable:
    """The nodes, children before parents and named by their place, with their values."""
    place: dict[int, int] = {}
    tables: dict[int, Hashable] = {}
    listed: list[Hashable] = []
    for node in walk(root):
        line: Hashable
        if isinstance(node, Apply):
            line = (node.op, *[place[id(c)] for c in node.args])
        elif isinstance(node, Const):
            # As text: equal numbers of two kinds, and zeros of two signs, are one entry of a dict.
            line = repr(node.value)
        elif isinstance(node, Symbol):
            line = node.name
        elif isinstance(node, Load):
            if id(node.table) not in tables:
                tables[id(node.table)] = _contents(node.table.value, host_values(node.table))
            line = (tables[id(node.table)], *[place[id(c)] for c in node.indices])
        elif isinstance(node, Aligned):
            values = arrays.to_host(node.value) if can_read(node.value) else None
            line = ("aligned", node.block, _contents(node.value, values))
        else:
            raise TypeError(f"{type(node).__name__} must be bound before it is scheduled")
        place[id(node)] = len(listed)
        listed.append(line)
    return tuple(listed)


def _contents(x: Any, values: np.ndarray[Any, Any] | None) -> Hashable:
    """The contents of an array, or its shape where the host has none of its values."""
    if values is None:
        return "unread", tuple(x.shape)
    # It loads OpenSSL, a tenth of what importing anyattn would take.
    import hashlib

    data: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return str(values.dtype), values.shape, hashlib.blake2b(data, digest_size=20).digest()
