"""Making schedules, and keeping those that are asked for again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np

from anyattn.call import AttentionCall
from anyattn.numbers import integer
from anyattn.schedule.axes import Space
from anyattn.schedule.columns import ColumnLists
from anyattn.schedule.formula import formula_of
from anyattn.schedule.grid import grids
from anyattn.schedule.key import key_of
from anyattn.schedule.parts import Parts, parts_of, readable
from anyattn.schedule.result import Schedule, Statistics, assemble
from anyattn.schedule.search import Found, search
from anyattn.schedule.verdicts import FULL

__all__ = ["build", "rows_without_keys", "schedule"]

NDArray = np.ndarray[Any, Any]

# Values of a line that are held at once for all groups of a round.
_LINE_VALUES = 1 << 22
_KEPT = 64
_KEPT_BYTES = 1 << 28

_known: OrderedDict[Hashable, Schedule] = OrderedDict()
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
    rows, keys = integer(rows, "schedule: rows", least=1), integer(keys, "schedule: keys", least=1)
    key = key_of(parts, rows, keys)
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
