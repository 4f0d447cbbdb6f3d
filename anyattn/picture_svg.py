"""Drawing a `Picture` as SVG: one small file that reads on light and on dark pages.

Cells of a row that share a shade are one horizontal stroke, a few characters each; shades are opacities of
one colour, so that the colour scheme of the page sets all of them.
"""

from __future__ import annotations

import textwrap
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anyattn.picture import Picture

__all__ = ["draw"]

_SIDE = 384
_LEFT, _RIGHT, _TOP = 68, 28, 18
_LINE = 17
_THINNEST = 24
# Shades of cells of which a part is seen; more cannot be told apart.
_SHADES = 6
_FAINTEST = 0.22
# Cells of so many pixels are told apart by lines.
_LINED = 7
# 12 px monospace letters across the drawing.
_TITLE_LETTERS = 58
_NOTE_LETTERS = 62

_STYLE = (
    ".aam{--bg:#fff;--ink:#1f2328;--dim:#59636e;--edge:#d0d7de;--no:#f3f5f8;--yes:#0b5cd5;--warn:#9a5b00;"
    "font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
    "@media(prefers-color-scheme:dark){.aam{--bg:#0f141a;--ink:#e6edf3;--dim:#9aa5b1;--edge:#30363d;"
    "--no:#1a212a;--yes:#58a6ff;--warn:#e3b341}}"
    ".aam text{fill:var(--ink)}.aam .d{fill:var(--dim)}.aam .w{fill:var(--warn)}"
    ".aam .m{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
    ".aam .y{stroke:var(--yes);fill:none}.aam .b{stroke:var(--warn);fill:none}"
)


def draw(picture: Picture) -> str:
    """The SVG of a picture."""
    down, across = picture.cells.shape
    step = _SIDE / max(down, across, 1)
    width, height = max(across * step, _THINNEST), max(down * step, _THINNEST)
    title = textwrap.wrap(picture.words, _TITLE_LETTERS, max_lines=3, placeholder=" ...")
    top = _TOP + _LINE * len(title) + 22
    full = _LEFT + _SIDE + _RIGHT
    notes = [("", line) for line in _notes(picture)]
    for warning in picture.warnings:
        lines = textwrap.wrap(f"⚠ {warning}", _NOTE_LETTERS)
        notes += [(" class='w'", line) for line in lines]
    bottom = top + height + 44
    total = bottom + _LINE * len(notes) + 12
    label = escape(f"{picture.words}: {', '.join(picture.summary())}", quote=True)
    size = f'width="{full}" height="{_n(total)}"'
    parts = [
        f'<svg class="aam" xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {full} {_n(total)}"',
        f' role="img" aria-label="{label}">',
        f"<style>{_STYLE}</style>",
        f'<rect {size} rx="8" fill="var(--bg)"/>',
        *(
            f'<text class="m" x="{_LEFT}" y="{_TOP + _LINE * (n + 1) - 6}">{escape(line)}</text>'
            for n, line in enumerate(title)
        ),
        f'<g transform="translate({_LEFT} {_n(top)})">',
        *_axes(picture, width, height),
        f'<rect width="{_n(width)}" height="{_n(height)}" fill="var(--no)"/>',
        *_cells(picture.cells, width, height),
        *_blind(picture, height),
        f'<rect width="{_n(width)}" height="{_n(height)}" fill="none" stroke="var(--edge)"/>',
        "</g>",
        *_legend(_LEFT, top + height + 22),
        *(
            f'<text x="{_LEFT}" y="{_n(bottom + _LINE * (n + 0.5))}"{kind}>{escape(line)}</text>'
            for n, (kind, line) in enumerate(notes)
        ),
        "</svg>",
    ]
    return "".join(parts)


def _notes(picture: Picture) -> list[str]:
    about = []
    if picture.entry is not None:
        about.append(f"batch entry {picture.entry[0]}, head {picture.entry[1]}")
    if picture.offset:
        about.append(f"row 0 stands at position {picture.offset}")
    if picture.cell > 1:
        about.append(f"a cell is {picture.cell} × {picture.cell} pairs")
    return [*picture.summary(), *([", ".join(about)] if about else [])]


def _axes(picture: Picture, width: float, height: float) -> list[str]:
    last_row, last_key = max(picture.q_len - 1, 0), max(picture.k_len - 1, 0)
    found = [
        '<text class="d" y="-8">0</text>',
        f'<text class="d" x="{_n(width / 2)}" y="-8" text-anchor="middle">key</text>',
        f'<text class="d" x="{_n(width)}" y="-8" text-anchor="end">{last_key}</text>',
        '<text class="d" x="-10" y="10" text-anchor="end">0</text>',
    ]
    if height >= 3 * _LINE:
        found += [
            f'<text class="d" x="-10" y="{_n(height / 2 + 4)}" text-anchor="end">row</text>',
            f'<text class="d" x="-10" y="{_n(height)}" text-anchor="end">{last_row}</text>',
        ]
    return found


def _cells(cells: Any, width: float, height: float) -> list[str]:
    down, across = cells.shape
    if not cells.size:
        return []
    # A sliver of a cell must be seen, and only a whole one looks whole.
    shade = np.where(cells >= 1, _SHADES + 1, np.ceil(cells * _SHADES)).astype(int)
    scale = f"scale({_n(width / across)} {_n(height / down)})"
    found = [f'<g class="y" transform="{scale}" shape-rendering="crispEdges">']
    for level in range(1, _SHADES + 2):
        path = _strokes(shade == level)
        if path:
            opacity = _FAINTEST + (1 - _FAINTEST) * (level - 1) / _SHADES
            found.append(f'<path d="{path}" opacity="{_n(opacity)}"/>')
    found.append("</g>")
    if min(width / across, height / down) >= _LINED:
        lines = "".join(f"M0 {n}H{across}" for n in range(1, down))
        lines += "".join(f"M{n} 0V{down}" for n in range(1, across))
        found.append(
            f'<path transform="{scale}" d="{lines}" stroke="var(--bg)" fill="none" '
            f'stroke-width="1" vector-effect="non-scaling-stroke"/>'
        )
    return found


def _strokes(which: Any) -> str:
    """A path that strokes the chosen cells, a move and a line for each run of a row."""
    path = []
    for y, row in enumerate(which):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        path += [f"M{a} {y}.5h{b - a}" for a, b in edges.reshape(-1, 2).tolist()]
    return "".join(path)


def _blind(picture: Picture, height: float) -> list[str]:
    """A mark beside the rows that see nothing."""
    if not picture.blind_rows.any():
        return []
    starts = np.arange(0, picture.q_len, picture.cell)
    blind = np.logical_or.reduceat(picture.blind_rows, starts)
    place = f"translate(-6 0) scale(4 {_n(height / len(blind))})"
    return [f'<path class="b" transform="{place}" d="{_strokes(blind[:, None])}"/>']


def _legend(x: float, y: float) -> list[str]:
    found = []
    for shade, words in ((1.0, "all seen"), (0.45, "some"), (0.0, "none")):
        box = f'<rect x="{_n(x)}" y="{_n(y - 9)}" width="10" height="10"'
        found += [
            f'{box} fill="var(--no)" stroke="var(--edge)"/>',
            f'{box} fill="var(--yes)" opacity="{_n(shade)}"/>',
            f'<text class="d" x="{_n(x + 16)}" y="{_n(y)}">{words}</text>',
        ]
        x += 34 + 6.4 * len(words)
    return found


def _n(x: float) -> str:
    return f"{x:.4g}" if abs(x) < 1000 else f"{x:.0f}"
