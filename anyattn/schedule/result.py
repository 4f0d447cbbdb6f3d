"""A schedule: for each block of queries, which tiles of keys to visit and how.

Runs of tiles, not tiles, in a few arrays in the manner of CSR, so that a kernel walks them and a mask of a
million tokens takes some hundred kilobytes. Batch entries and heads on which the mask does not depend share
one entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from anyattn.schedule.columns import ColumnLists
from anyattn.schedule.spans import Spans, spans_of
from anyattn.schedule.verdicts import EMPTY, FULL, PARTIAL

__all__ = ["QueryBlock", "Runs", "Schedule", "Statistics", "assemble"]

NDArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Statistics:
    """How a schedule was found.

    Attributes
    ----------
    by_analysis, by_witness, by_evaluation : int
        Tiles decided without looking at points, by points that prove them partial, and by all their points.
    seconds : float
        Time that it took.
    """

    by_analysis: int
    by_witness: int
    by_evaluation: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of tiles of each line; line (group * query blocks + query block) has runs starts[n]:starts[n + 1].

    Attributes
    ----------
    starts : int64 array (lines + 1,)
    tiles : int32 array (runs, 2)
        First tile of keys and the one past the last; in order within a line.
    lists : int32 array (runs,) or None
        For runs whose columns are gathered: the number of their column list.
    """

    starts: NDArray
    tiles: NDArray
    lists: NDArray | None = None

    def of(self, line: int) -> NDArray:
        """The runs (n, 2) of a line."""
        return self.tiles[self.starts[line] : self.starts[line + 1]]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return int((self.tiles[:, 1].astype(np.int64) - self.tiles[:, 0]).sum())


@dataclass(frozen=True, eq=False)
class QueryBlock:
    """What the rows of one block of queries visit.

    Attributes
    ----------
    rows : (int, int)
        First row and the one past the last.
    full : int32 array (n, 2)
        Runs [first, end) of tiles of which every row sees every key.
    partial : int32 array (n, 2)
        Runs of tiles that need the mask.
    columns : int64 array
        Single keys, in order, that every row sees.
    masked_columns : int64 array
        Single keys, in order, that need the mask.
    """

    rows: tuple[int, int]
    full: NDArray
    partial: NDArray
    columns: NDArray
    masked_columns: NDArray


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """Which tiles of (query, key) a mask fills, opens in part, or leaves empty.

    A tile has `rows` queries and `keys` keys; the last ones are cut by the lengths. Arrays are read-only.

    Attributes
    ----------
    q_len, k_len, rows, keys, batch_size, num_heads : int
    groups : (int, int)
        Batch entries and heads that have entries of their own: 1 or `batch_size`, 1 or `num_heads`.
    full, partial : Runs
        Runs of full tiles, and of partial tiles that are not `gathered`.
    stretches : Runs
        Runs that hold all partial tiles that open few columns, with the number of the list that names these,
        and maybe tiles between them of which the list names none.
    list_block : int32 array (lists,)
        First tile of keys that a list knows.
    list_start : int64 array (lists + 1,)
        Where in `column_starts` a list begins: the columns of tile t in list n are
        columns[column_starts[m]:column_starts[m + 1]] with m = list_start[n] + t - list_block[n].
    column_starts : int64 array
    columns : int32 array
        Keys, in order within a tile.
    list_masked : bool array (lists,)
        Whether some rows may not see all columns of a list, so that the mask is needed there.
    stats : Statistics
    """

    q_len: int
    k_len: int
    rows: int
    keys: int
    batch_size: int
    num_heads: int
    groups: tuple[int, int]
    full: Runs
    partial: Runs
    stretches: Runs
    list_block: NDArray
    list_start: NDArray
    column_starts: NDArray
    columns: NDArray
    list_masked: NDArray
    stats: Statistics

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks of queries and tiles of keys."""
        return -(-self.q_len // self.rows), -(-self.k_len // self.keys)

    def line(self, q_block: int, b: int = 0, h: int = 0) -> int:
        """The line of a block of queries of batch entry `b` and query head `h`."""
        batch, heads = self.groups
        group = (b if batch > 1 else 0) * heads + (h if heads > 1 else 0)
        return group * self.shape[0] + q_block

    def block(self, q_block: int, b: int = 0, h: int = 0) -> QueryBlock:
        """What one block of queries visits."""
        line = self.line(q_block, b, h)
        open_: list[NDArray] = []
        masked: list[NDArray] = []
        start, end = self.stretches.starts[line], self.stretches.starts[line + 1]
        lists = self.stretches.lists
        for n in range(int(start), int(end)):
            assert lists is not None
            first, stop = self.stretches.tiles[n]
            (masked if self.list_masked[lists[n]] else open_).append(
                self._columns(int(lists[n]), int(first), int(stop))
            )
        none = np.zeros(0, np.int64)
        return QueryBlock(
            rows=(q_block * self.rows, min((q_block + 1) * self.rows, self.q_len)),
            full=self.full.of(line),
            partial=self.partial.of(line),
            columns=np.concatenate([none, *open_]),
            masked_columns=np.concatenate([none, *masked]),
        )

    def _columns(self, number: int, first: int, stop: int) -> NDArray:
        base = self.list_start[number] - self.list_block[number]
        return self.columns[self.column_starts[base + first] : self.column_starts[base + stop]]

    @cached_property
    def gathered(self) -> Runs:
        """Runs of the partial tiles that open few columns, of no tile but these, each with its list."""
        assert self.stretches.lists is not None
        line = np.repeat(np.arange(len(self.stretches.starts) - 1), np.diff(self.stretches.starts))
        lines, tiles, lists = [], [], []
        for n in np.unique(self.stretches.lists):
            own = self.stretches.lists == n
            columns = np.diff(self.column_starts[self.list_start[n] : self.list_start[n + 1]])
            some = np.concatenate([[False], columns > 0, [False]])
            begins, ends = (np.flatnonzero(some[1:] != some[:-1]) + self.list_block[n]).reshape(-1, 2).T
            first, end = self.stretches.tiles[own].T
            low, high = np.searchsorted(ends, first, "right"), np.searchsorted(begins, end, "left")
            number = np.maximum(high - low, 0)
            of = np.repeat(np.arange(len(first)), number)
            run = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number) + low[of]
            lines.append(line[own][of])
            tiles.append(np.stack([np.maximum(begins[run], first[of]), np.minimum(ends[run], end[of])], 1))
            lists.append(np.full(len(of), n, np.int32))
        return _runs(lines, tiles, lists, len(self.stretches.starts) - 1)

    @cached_property
    def spans(self) -> Spans:
        """The same as plain arrays for a compiled kernel."""
        return spans_of(self)

    def verdicts(self, b: int = 0, h: int = 0) -> NDArray:
        """EMPTY (1), FULL (2) or PARTIAL (4) of every tile, uint8 (query blocks, tiles of keys).

        For pictures and tests; the one thing here whose size is quadratic.
        """
        found = np.full(self.shape, EMPTY, np.uint8)
        for runs, verdict in ((self.full, FULL), (self.partial, PARTIAL), (self.gathered, PARTIAL)):
            for q in range(self.shape[0]):
                for first, end in runs.of(self.line(q, b, h)):
                    found[q, first:end] = verdict
        return found

    @property
    def num_tiles(self) -> int:
        """Tiles of all entries that the schedule holds; shared ones count once."""
        return self.groups[0] * self.groups[1] * self.shape[0] * self.shape[1]

    @property
    def num_full(self) -> int:
        """Tiles in which every row sees every key."""
        return self.full.count

    @property
    def num_partial(self) -> int:
        """Tiles in which some see something, those whose columns are gathered included."""
        return self.partial.count + self.gathered.count

    @property
    def num_empty(self) -> int:
        """Tiles in which nothing is seen."""
        return self.num_tiles - self.num_full - self.num_partial

    @property
    def kept(self) -> float:
        """Share of the tiles that are not empty."""
        return (self.num_full + self.num_partial) / self.num_tiles if self.num_tiles else 0.0

    @property
    def density(self) -> float:
        """Share of the (row, key) pairs that are visited: tiles in full, of gathered ones their columns."""
        pairs = self.groups[0] * self.groups[1] * self.q_len * self.k_len
        if not pairs:
            return 0.0
        return int(self.spans.pairs.sum()) / pairs

    @property
    def blocks_without_keys(self) -> NDArray:
        """Query blocks none of whose rows sees a key, int64 (n, 2): group (b, h row-major) and block."""
        total = sum(np.diff(runs.starts) for runs in (self.full, self.partial, self.stretches))
        lines = np.flatnonzero(total == 0)
        blocks = max(self.shape[0], 1)
        return np.stack([lines // blocks, lines % blocks], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        own = [self.list_block, self.list_start, self.column_starts, self.columns, self.list_masked]
        runs = (self.full, self.partial, self.stretches)
        own += [x for r in runs for x in (r.starts, r.tiles, r.lists) if x is not None]
        return sum(x.nbytes for x in own)

    def __repr__(self) -> str:
        batch, heads = self.groups
        shared = "" if (batch, heads) == (1, 1) else f" x {batch} batch entries x {heads} heads"
        return (
            f"<Schedule {self.q_len} x {self.k_len} in tiles of {self.rows} x {self.keys}{shared}: "
            f"{self.num_full} full, {self.num_partial} partial, {self.num_empty} empty; "
            f"{self.kept:.2%} of the tiles kept, {self.nbytes} bytes>"
        )


def assemble(boxes: NDArray, lists: ColumnLists, lines_of_group: int, groups: int) -> dict[str, Any]:
    """The arrays of a schedule from boxes (group, first and end query block, first and end tile, kind)."""
    height = boxes[:, 2] - boxes[:, 1]
    of = np.repeat(np.arange(len(boxes)), height)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(height) - height, height)
    line = boxes[of, 0].astype(np.int64) * lines_of_group + boxes[of, 1] + nth
    first, end, kind = boxes[of, 3], boxes[of, 4], boxes[of, 5]
    order = np.lexsort((first, line))
    line, first, end, kind = line[order], first[order], end[order], kind[order]
    new = np.ones(len(line), bool)
    new[1:] = (line[1:] != line[:-1]) | (kind[1:] != kind[:-1]) | (first[1:] != end[:-1])
    last = np.ones(len(line), bool)
    last[:-1] = new[1:]
    line, first, end, kind = line[new], first[new], end[last], kind[new]
    number = lines_of_group * groups

    def runs(which: NDArray, listed: bool = False) -> Runs:
        starts = np.searchsorted(line[which], np.arange(number + 1))
        tiles = np.stack([first[which], end[which]], axis=1).astype(np.int32)
        numbers = (kind[which] - ColumnLists.FIRST).astype(np.int32) if listed else None
        return Runs(*map(_fixed, (starts, tiles, numbers)))

    sizes = [len(s) for s in lists.starts]
    offsets = np.concatenate([[0], np.cumsum([len(k) for k in lists.keys])]).astype(np.int64)
    starts = [s + offset for s, offset in zip(lists.starts, offsets, strict=False)]
    none = np.zeros(0, np.int64)
    return {
        "full": runs(kind == FULL),
        "partial": runs(kind == PARTIAL),
        "stretches": runs(kind >= ColumnLists.FIRST, listed=True),
        "list_block": _fixed(np.array(lists.k_block, np.int32)),
        "list_start": _fixed(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)),
        "column_starts": _fixed(np.concatenate([none, *starts])),
        "columns": _fixed(np.concatenate([none, *lists.keys]).astype(np.int32)),
        "list_masked": _fixed(np.array(lists.masked, bool)),
    }


def _runs(lines: list[NDArray], tiles: list[NDArray], lists: list[NDArray], number: int) -> Runs:
    """Runs with lists, in pieces that are not in order, of so many lines."""
    line = np.concatenate([np.zeros(0, np.int64), *lines])
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *tiles])
    names = np.concatenate([np.zeros(0, np.int32), *lists])
    order = np.lexsort((pairs[:, 0], line))
    starts = np.searchsorted(line[order], np.arange(number + 1))
    return Runs(_fixed(starts), _fixed(pairs[order].astype(np.int32)), _fixed(names[order]))


def _fixed(x: NDArray | None) -> Any:
    if x is not None:
        x.flags.writeable = False
    return x
