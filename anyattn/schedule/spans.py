"""A schedule as plain arrays, for a compiled kernel to walk.

One list of spans a line, in the manner of CSR, instead of three lists of runs: a kernel has one loop, and two
bits of a span's kind say where its keys come from and whether the mask is evaluated. Columns that many lines
gather stay shared: a span names a stretch of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anyattn.schedule.result import Schedule

__all__ = ["GATHERED", "MASKED", "Spans", "spans_of"]

NDArray = np.ndarray[Any, Any]

MASKED, GATHERED = 1, 2


@dataclass(frozen=True, eq=False)
class Spans:
    """What each line visits; line (group * query blocks + query block) has spans starts[n]:starts[n + 1].

    All arrays are contiguous and read-only.

    Attributes
    ----------
    starts : int64 array (lines + 1,)
    ends : int64 array (spans, 2)
        First and the one past the last: of the keys, cut by the length, or in `columns` where the kind has
        `GATHERED`. The keys of a span begin at a multiple of the schedule's tile.
    kinds : uint8 array (spans,)
        Bits: `MASKED` where some row may not see some key, so that the mask is to be evaluated, and
        `GATHERED`. The spans of a line are ordered by kind, then by key.
    columns : int32 array
        Keys to gather.
    groups : int32 array (batch_size, num_heads)
        The group of each batch entry and query head.
    pairs : int64 array (lines,)
        Pairs (row, key) that a line visits: what its work is proportional to.
    """

    starts: NDArray
    ends: NDArray
    kinds: NDArray
    columns: NDArray
    groups: NDArray
    pairs: NDArray


def spans_of(schedule: Schedule) -> Spans:
    """The spans of a schedule; `Schedule.spans` keeps them."""
    lines, ends, kinds, places = [], [], [], []
    for runs, masked in ((schedule.full, 0), (schedule.partial, MASKED), (schedule.stretches, MASKED)):
        tiles = runs.tiles.astype(np.int64)
        lines.append(np.repeat(np.arange(len(runs.starts) - 1), np.diff(runs.starts)))
        places.append(tiles[:, 0])
        if runs.lists is None:
            ends.append(np.minimum(tiles * schedule.keys, schedule.k_len))
            kinds.append(np.full(len(tiles), masked, np.uint8))
        else:
            base = (schedule.list_start[runs.lists] - schedule.list_block[runs.lists])[:, None]
            ends.append(schedule.column_starts[base + tiles])
            kinds.append(np.where(schedule.list_masked[runs.lists], GATHERED | masked, GATHERED))
    line, kind = np.concatenate(lines), np.concatenate(kinds).astype(np.uint8)
    order = np.lexsort((np.concatenate(places), kind, line))
    line, kind, end = line[order], kind[order], np.concatenate(ends)[order]
    blocks = schedule.shape[0]
    number = schedule.groups[0] * schedule.groups[1] * blocks
    rows = np.minimum((np.arange(blocks) + 1) * schedule.rows, schedule.q_len)
    rows -= np.arange(blocks) * schedule.rows
    width = np.zeros(number, np.int64)
    np.add.at(width, line, end[:, 1] - end[:, 0])
    batch, heads = schedule.groups
    b = np.arange(schedule.batch_size)[:, None] if batch > 1 else np.zeros((schedule.batch_size, 1), int)
    h = np.arange(schedule.num_heads) if heads > 1 else np.zeros(schedule.num_heads, int)
    found = Spans(
        starts=np.searchsorted(line, np.arange(number + 1)),
        ends=end,
        kinds=kind,
        columns=schedule.columns,
        groups=(b * heads + h).astype(np.int32),
        pairs=width * np.tile(rows, batch * heads),
    )
    for x in (found.starts, found.ends, found.kinds, found.groups, found.pairs):
        x.flags.writeable = False
    return found
