"""What a mask lets through: shares of cells for a drawing, numbers, and warnings.

A picture has some hundred cells a side, however long the sequences are. Cells come from the schedule, which
proves them empty or full without a pass over their pairs; the share of a partial cell is counted where that
is cheap and estimated from points of it elsewhere. `picture_svg` draws.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import array_api_compat.numpy as compat_numpy
import numpy as np

from anyattn import arrays
from anyattn.call import AttentionCall
from anyattn.describe import Options, describe
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.nodes import Aligned, Const, Expr, I, J, Load, walk
from anyattn.numbers import integer
from anyattn.schedule import EMPTY, PARTIAL, Schedule, schedule
from anyattn.schedule.parts import Readable, Unread, parts_of, readable

if TYPE_CHECKING:
    from anyattn.masks import Mask

__all__ = ["Picture", "picture"]

NDArray = np.ndarray[Any, Any]

# Cells a side: what some 400 pixels show.
_CELLS = 128
# Pairs of partial cells up to which all are counted; beyond, so many in all cells together are.
_COUNTED = 1 << 22
# Rows named in a warning.
_NAMED = 4


@dataclass(frozen=True, eq=False)
class Picture:
    """The pattern of a mask for one batch entry and head; notebooks show it drawn.

    Attributes
    ----------
    words : str
        The mask as it was written.
    q_len, k_len : int
    offset : int
        Position of query row 0.
    entry : (int, int) or None
        Batch entry and head that are shown, where the mask differs between them.
    cells : float array (cells down, cells across)
        Share of the pairs of each cell that are seen.
    cell : int
        Rows and keys of a cell.
    density : float
        Share of all (row, key) pairs that are seen.
    exact : bool
        Whether `density` and `cells` are counted; otherwise partial cells are estimated.
    tile : (int, int)
        Rows and keys of a kernel's tile.
    tiles_kept : float
        Share of the tiles that a kernel visits.
    blind_rows : bool array (q_len,)
        Rows that see no key.
    warnings : tuple of str
        Of all entries: rows that see nothing, and a mask called causal that is not.
    """

    words: str
    q_len: int
    k_len: int
    offset: int
    entry: tuple[int, int] | None
    cells: NDArray
    cell: int
    density: float
    exact: bool
    tile: tuple[int, int]
    tiles_kept: float
    blind_rows: NDArray
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"{self.words} of {self.q_len} rows and {self.k_len} keys: {', '.join(self.summary())}"]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def summary(self) -> tuple[str, str]:
        """Density and tiles kept, in words."""
        about = "" if self.exact else "about "
        rows, keys = self.tile
        seen = f"{about}{_percent(self.density)} of the pairs seen"
        return seen, f"{_percent(self.tiles_kept)} of the {rows} × {keys} tiles kept"

    def svg(self) -> str:
        """The drawing."""
        from anyattn.picture_svg import draw

        return draw(self)

    def _repr_svg_(self) -> str:
        return self.svg()

    def _repr_html_(self) -> str:
        return self.svg()

    def save(self, path: str | Path) -> None:
        """Write the drawing to an .svg file."""
        path = Path(path)
        if path.suffix != ".svg":
            raise ValueError(f"path: wanted a name that ends in .svg, got {path.name!r}")
        path.write_text(self.svg(), encoding="utf-8")


def picture(
    mask: Mask,
    q_len: int | None = None,
    k_len: int | None = None,
    *,
    q_offset: int | None = None,
    b: int = 0,
    h: int = 0,
    tile: tuple[int, int] = (128, 128),
) -> Picture:
    """The picture of a mask; `Mask.picture` documents it."""
    q_len = None if q_len is None else integer(q_len, "picture: q_len", least=0)
    k_len = None if k_len is None else integer(k_len, "picture: k_len", least=0)
    if q_offset is not None:
        q_offset = integer(q_offset, "picture: q_offset")
    sides: Any = tile
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ValueError(f"picture: tile: wanted (rows, keys), got {tile!r}")
    rows, keys = (integer(side, "picture: tile", least=1) for side in sides)
    shape = _Shape.of(mask.expr)
    if k_len is None:
        k_len = shape.k_len if q_len is None else q_len
    if q_len is None:
        q_len = shape.q_len or k_len
    call = _call(mask, q_len, k_len, q_offset, shape)
    parts = parts_of(call)
    read = readable(parts)
    if any(isinstance(node, Unread) for node in walk(read.root)):
        raise ValueError(
            f"picture: {mask!r} hangs on arrays that the host cannot read; wanted concrete arrays on the CPU"
        )
    for name, number, size in (("b", b, parts.batch_size), ("h", h, parts.num_heads)):
        if not 0 <= integer(number, f"picture: {name}") < size:
            raise ValueError(f"picture: {name}: wanted 0 to {size - 1}, got {number}")
    cell = max(1, -(-max(q_len, k_len) // _CELLS))
    cells, density, exact = _shares(read, schedule(parts, cell, cell), b, h)
    kernel = schedule(parts, rows, keys)
    by_row = schedule(parts, 1, max(k_len, 1))
    offset = int(read.offsets[b if read.offsets.size > 1 else 0])
    return Picture(
        words=repr(mask),
        q_len=q_len,
        k_len=k_len,
        offset=offset,
        entry=(b, h) if kernel.groups != (1, 1) else None,
        cells=cells,
        cell=cell,
        density=density,
        exact=exact,
        tile=(rows, keys),
        tiles_kept=_kept(kernel, b, h),
        blind_rows=_blind(by_row)[by_row.line(0, b, h) // max(q_len, 1)] if q_len else np.zeros(0, bool),
        warnings=(*_blind_rows_warning(by_row), *_leak_warning(mask, q_len, k_len, q_offset, shape)),
    )


@dataclass(frozen=True)
class _Shape:
    """The sizes that a mask's arrays ask for, and where they live."""

    like: Any
    batch: tuple[int, ...]
    heads: int
    q_len: int | None
    k_len: int

    @staticmethod
    def of(expr: Expr) -> _Shape:
        """Lengths where the mask names none: of its arrays, else some times its largest number."""
        like: Any = None
        batch: tuple[int, ...] = ()
        q_len: int | None = None
        heads, k_len, largest = 1, 0, 16
        for node in walk(expr):
            if isinstance(node, Load):
                table = node.table
                like = like if table.host else table.value
                for size, axis in zip(table.value.shape, table.axes, strict=True):
                    batch = (size,) if axis == "b" else batch
                    heads = size if axis == "h" else heads
                    k_len = max(k_len, size) if axis is None else k_len
            elif isinstance(node, Aligned):
                like = node.value
                *lead, rows, keys = node.value.shape
                heads = lead[-1] if lead and lead[-1] > 1 else heads
                batch = tuple(lead[:-1]) if math.prod(lead[:-1]) > 1 or not batch else batch
                q_len = rows * node.block if rows > 1 else q_len
                k_len = keys * node.block if keys > 1 else k_len
            elif isinstance(node, Const) and node.kind == "int":
                largest = max(largest, abs(int(node.value)))
        return _Shape(like, batch, heads, q_len, k_len or min(4 * largest, 1 << 16))


def _call(mask: Any, q_len: int, k_len: int, q_offset: int | None, shape: _Shape) -> AttentionCall:
    """A call of nothing but the mask."""
    xp = compat_numpy if shape.like is None else arrays.namespace(shape.like)
    where = {} if shape.like is None else {"device": arrays.device(shape.like)}
    lead = (*shape.batch, shape.heads)
    q = xp.zeros((*lead, q_len, 1), dtype=xp.float32, **where)
    k = xp.zeros((*lead, k_len, 1), dtype=xp.float32, **where)
    return describe("weights", q, k, None, Options(mask=mask, q_offset=q_offset))


def _shares(read: Readable, cells: Schedule, b: int, h: int) -> tuple[NDArray, float, bool]:
    """The share of each cell that is seen, that of all, and whether these are counted."""
    verdicts = cells.verdicts(b, h)
    height, width = _sizes(cells.q_len, cells.rows), _sizes(cells.k_len, cells.keys)
    share = (verdicts != EMPTY).astype(np.float64)
    down, across = np.nonzero(verdicts == PARTIAL)
    exact = len(down) * cells.rows * cells.keys <= _COUNTED
    if len(down):
        places = _all_pairs if exact else _some_pairs
        row, key = places(down * cells.rows, across * cells.keys, height[down], width[across])
        inside = (row < cells.q_len) & (key < cells.k_len)
        seen = (
            _values(read, np.minimum(row, cells.q_len - 1), np.minimum(key, cells.k_len - 1), b, h) & inside
        )
        share[down, across] = seen.sum((1, 2)) / inside.sum((1, 2))
        # A partial cell has a pair that is seen and one that is not, whatever was met of it.
        least = 1 / (height[down] * width[across])
        share[down, across] = np.clip(share[down, across], least, 1 - least)
    pairs = cells.q_len * cells.k_len
    return share, float(height @ share @ width) / pairs if pairs else 0.0, exact


def _all_pairs(row: NDArray, key: NDArray, height: NDArray, width: NDArray) -> tuple[NDArray, NDArray]:
    """All rows (n, r, 1) and keys (n, 1, k) of n cells; those past the last are past the lengths too."""
    rows, keys = np.arange(height.max())[None, :, None], np.arange(width.max())[None, None, :]
    return row[:, None, None] + rows, key[:, None, None] + keys


def _some_pairs(row: NDArray, key: NDArray, height: NDArray, width: NDArray) -> tuple[NDArray, NDArray]:
    """Rows (n, r, 1) spread over each of n cells, and runs of keys (n, r, k) at random places in it.

    Runs of keys meet the periods of strided patterns as often as the whole cell does.
    """
    rng = np.random.default_rng(0)
    points = _COUNTED // len(row)
    run = min(int(width.max()), max(32, math.isqrt(points)))
    rows = max(2, points // run)
    place = (np.arange(rows) + rng.random((len(row), rows))) / rows
    row = row[:, None] + (place * height[:, None]).astype(np.int64)
    start = (rng.random(row.shape) * width[:, None]).astype(np.int64)
    # Around the end of the cell, so that its edges are met as often as its middle.
    keys = (start[:, :, None] + np.arange(run)) % width[:, None, None]
    return row[:, :, None], key[:, None, None] + keys


def _sizes(length: int, step: int) -> NDArray:
    return np.diff([*range(0, length, step), length]) if length else np.zeros(0, np.int64)


def _values(read: Readable, row: NDArray, key: NDArray, b: int, h: int) -> NDArray:
    """Whether rows see keys, of arrays of both that broadcast."""
    offset = read.offsets[b if read.offsets.size > 1 else 0]
    symbols = {"b": np.asarray(b), "h": np.asarray(h), "row": row, "i": row + offset, "j": key}
    tile = Tile(compat_numpy, "cpu", np.int64, np.float32, symbols, 0, 0, None)
    with np.errstate(all="ignore"):
        return np.broadcast_to(evaluate(read.root, tile), np.broadcast_shapes(row.shape, key.shape))


def _kept(tiles: Schedule, b: int, h: int) -> float:
    first, blocks = tiles.line(0, b, h), tiles.shape[0]
    number = 0
    for runs in (tiles.full, tiles.partial, tiles.gathered):
        own = runs.tiles[runs.starts[first] : runs.starts[first + blocks]].astype(np.int64)
        number += int((own[:, 1] - own[:, 0]).sum())
    return number / (blocks * tiles.shape[1]) if blocks * tiles.shape[1] else 0.0


def _blind(by_row: Schedule) -> NDArray:
    """(groups, q_len): rows that see no key, of a schedule with a tile a row."""
    number = sum(np.diff(runs.starts) for runs in (by_row.full, by_row.partial, by_row.gathered))
    return np.asarray(number == 0).reshape(-1, max(by_row.q_len, 1))


def _blind_rows_warning(by_row: Schedule) -> tuple[str, ...]:
    if not by_row.q_len:
        return ()
    blind = _blind(by_row)
    if not blind.any():
        return ()
    group = int(np.flatnonzero(blind.any(1))[0])
    rows = np.flatnonzero(blind[group])
    b, h = divmod(group, by_row.groups[1])
    parts = [f"batch entry {b}"] * (by_row.groups[0] > 1) + [f"head {h}"] * (by_row.groups[1] > 1)
    where = f" ({', '.join(parts)})" if parts else ""
    verb = "row sees" if len(rows) == 1 else "rows see"
    return (f"{len(rows)} {verb} no key, and the result there is 0: {_ranges(rows)}{where}",)


def _ranges(rows: NDArray) -> str:
    cuts = np.flatnonzero(np.diff(rows) > 1) + 1
    parts = np.split(rows, cuts)
    shown = [f"{p[0]}" if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts[:_NAMED]]
    return ", ".join(shown) + (", ..." if len(parts) > _NAMED else "")


# "causal()" and "from_function(causal_prefix)", not "~causal()" and "non_causal".
_CAUSAL = re.compile(r"(?<![~a-z])(?<!non_)causal")


def _leak_warning(mask: Mask, q_len: int, k_len: int, q_offset: int | None, shape: _Shape) -> tuple[str, ...]:
    if not _CAUSAL.search(repr(mask)) or "~(" in repr(mask):
        return ()
    ahead = mask & type(mask)(J > I, "ahead")
    call = _call(ahead, q_len, k_len, q_offset, shape)
    parts = parts_of(call)
    tiles = schedule(parts, 128, 128)
    for group in range(tiles.groups[0] * tiles.groups[1]):
        b, h = divmod(group, tiles.groups[1])
        for block in range(tiles.shape[0]):
            line = tiles.line(block, b, h)
            runs = [r.of(line) for r in (tiles.full, tiles.partial, tiles.gathered)]
            first = min((int(r[0, 0]) for r in runs if len(r)), default=None)
            if first is not None:
                read = readable(parts)
                row = np.arange(block * 128, min(block * 128 + 128, q_len))[:, None]
                key = np.arange(first * 128, min(first * 128 + 128, k_len))
                r, k = np.argwhere(_values(read, row, key, b, h))[0]
                position = int(row[r, 0]) + int(read.offsets[b if read.offsets.size > 1 else 0])
                return (f"called causal, but position {position} (row {row[r, 0]}) sees key {key[k]}",)
    return ()


def _percent(share: float) -> str:
    if 0 < share < 1e-5:
        return "less than 0.001 %"
    return "99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.3g} %"
