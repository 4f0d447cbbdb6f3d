"""Making schedules, and keeping those that are asked for again.

A schedule is kept under all that it was made from: the structure of the mask, its numbers, the lengths, the
tiles, and the contents of every array that the analysis reads, never their identity: an array changed in
place gives another schedule.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from anyattn import arrays
from anyattn.call import AttentionCall
from anyattn.expr.program import lower
from anyattn.schedule.axes import Space
from anyattn.schedule.columns import ColumnLists
from anyattn.schedule.formula import formula_of
from anyattn.schedule.grid import grids
from anyattn.schedule.parts import Parts, can_read, parts_of, readable
from anyattn.schedule.result import Schedule, Statistics, assemble
from anyattn.schedule.search import Found, search
from anyattn.schedule.verdicts import FULL

__all__ = ["build", "rows_without_keys", "schedule"]

NDArray = np.ndarray[Any, Any]

# Values of a line that are held at once for all groups of a round.
_LINE_VALUES = 1 << 22
_KEPT = 64
_KEPT_BYTES = 1 << 28

_known: OrderedDict[str, Schedule] = OrderedDict()
_lock = threading.Lock()


def schedule(call: AttentionCall | Parts, rows: int = 128, keys: int = 128) -> Schedule:
    """The schedule of a call's mask in tiles of `rows` queries and `keys` keys.

    Every tile's verdict is exact where the host may read all that the mask depends on; a tile that hangs on
    a value on a device, under a tracer or of a lazy array is partial.

    Parameters
    ----------
    call : AttentionCall or Parts
        `AttentionCall.rows` has no influence: all rows of the call are scheduled.
    rows, keys : int, at least 1
        Size of a tile.
    """
    parts = parts_of(call) if isinstance(call, AttentionCall) else call
    if rows < 1 or keys < 1:
        raise ValueError(f"schedule: wanted tiles of at least 1 x 1, got {rows} x {keys}")
    key = _key(parts, rows, keys)
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    made = build(parts, rows, keys)
    with _lock:
        _known[key] = made
        while len(_known) > _KEPT or (
            len(_known) > 1 and sum(s.nbytes for s in _known.values()) > _KEPT_BYTES
        ):
            _known.popitem(last=False)
    return made


def rows_without_keys(call: AttentionCall | Parts) -> NDArray:
    """Rows that see no key, as far as the host may read what decides it.

    Returns
    -------
    int64 array (n, 2)
        Group (b, h row-major over `Schedule.groups`) and row.
    """
    parts = parts_of(call) if isinstance(call, AttentionCall) else call
    return schedule(parts, 1, max(parts.k_len, 1)).blocks_without_keys


def build(parts: Parts, rows: int, keys: int) -> Schedule:
    """A schedule made anew."""
    began = time.perf_counter()
    lists, found = ColumnLists(), Found()
    batch = heads = 1
    blocks, tiles = -(-parts.q_len // rows), -(-parts.k_len // keys)
    if parts.visible is None:
        found.boxes.append(np.array([[0, 0, blocks, 0, tiles, FULL]], np.int32)[: blocks * tiles])
        found.by_analysis = blocks * tiles
    elif parts.q_len and parts.k_len and parts.batch_size and parts.num_heads:
        mask = readable(parts)
        batch = parts.batch_size if mask.by_batch else 1
        heads = parts.num_heads if mask.by_head else 1
        together = max(1, _LINE_VALUES // (parts.q_len + parts.k_len))
        for start in range(0, batch * heads, together):
            groups = np.arange(start, min(start + together, batch * heads))
            space = Space.of(parts, mask, groups, heads)
            formula = formula_of(mask.root, space, mask.blocks)
            for grid in grids(parts.q_len, parts.k_len, rows, keys):
                search(formula, space, grid, found, lists, start)
    boxes = np.concatenate([np.zeros((0, 6), np.int32), *found.boxes])
    made = assemble(boxes, lists, blocks, batch * heads)
    seconds = time.perf_counter() - began
    return Schedule(
        q_len=parts.q_len,
        k_len=parts.k_len,
        rows=rows,
        keys=keys,
        batch_size=parts.batch_size,
        num_heads=parts.num_heads,
        groups=(batch, heads),
        stats=Statistics(found.by_analysis, found.by_witness, found.by_evaluation, seconds),
        **made,
    )


def _key(parts: Parts, rows: int, keys: int) -> str:
    program = lower(parts.visible, None)
    sizes = (parts.q_len, parts.k_len, parts.batch_shape, parts.num_heads, parts.accumulate, rows, keys)
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((program.key, program.parameters, sizes)).encode())
    for x in (*program.tables, *program.aligned):
        _add(digest, arrays.to_host(x) if can_read(x) else None, tuple(x.shape))
    if parts.offset is not None:
        _add(digest, np.asarray(parts.offset, np.int64), None)
    return digest.hexdigest()


def _add(digest: Any, x: NDArray | None, shape: Any) -> None:
    """The contents of an array, or its shape where it is not read."""
    if x is None:
        digest.update(f"unread {shape}".encode())
        return
    digest.update(f"read {x.dtype} {x.shape}".encode())
    digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
