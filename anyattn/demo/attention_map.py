"""The attention weights of one head as a picture: a square of cells, rows look, columns are looked at.

SVG is written by hand: it needs no plotting library, and a page can restyle it. Colours are classes (`l1` to
`l9`), so that one picture suits light and dark surroundings; faint cells of one colour share a path, which
keeps a file small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

LEVELS = 9
# Lightness falls (or, on dark, rises) evenly from step to step in OKLCH, so equal steps look equal.
LIGHT = ("#dff6f2", "#aee3dd", "#78d0ca", "#44abbf", "#2584b2", "#2162a5", "#2c3e92", "#292a71", "#221851")
DARK = ("#20243c", "#2d3463", "#3c448d", "#3167a9", "#1b8abd", "#00afc4", "#44d0c1", "#a1e7a9", "#f2f5a6")

CELL = 20
_CHARACTER = 6.4
_TITLED_FROM = 0.05


def level(weight: float) -> int:
    """Colour step of a weight, 0 (nothing drawn) to 9; the square root lets small weights be seen."""
    return min(LEVELS, int(math.sqrt(weight) * LEVELS + 0.5))


def bounds() -> list[float]:
    """The least weight of each colour step."""
    return [((step - 0.5) / LEVELS) ** 2 for step in range(1, LEVELS + 1)]


def colour_rules(colours: Sequence[str]) -> str:
    """Fill rules of the colour steps."""
    return "".join(f".l{step}{{fill:{colour}}}" for step, colour in enumerate(colours, start=1))


def percent(weight: float) -> str:
    """A weight in words: "21 %", "<1 %"."""
    return "<1 %" if 0 < weight < 0.005 else f"{100 * weight:.0f} %"


def thumbnail(weights: Any, label: str) -> str:
    """A small picture without words, one unit a cell; nested lists or a 2-D array of weights in [0, 1]."""
    size = len(weights)
    cells = _paths(weights, 0.0, 2.0)
    return f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="{escape(label)}">{cells}</svg>'


def head_map(
    labels: Sequence[str], weights: Any, title: str, *, emphasis: int | None = None, in_page: bool = False
) -> str:
    """A picture with words on both sides.

    Parameters
    ----------
    labels : sequence of str
        The words.
    weights : 2-D array
        Row i holds how much word i looks at each word.
    title : str
        What it shows, for people who hear it and for the tooltip.
    emphasis : int, optional
        Number of a row to frame.
    in_page : bool
        Draw every cell as an element of its own and leave colours to the page; otherwise a compact file.

    Returns
    -------
    str
        An `<svg>` element, or a complete SVG file.
    """
    size = len(labels)
    gutter = math.ceil(max(map(len, labels)) * _CHARACTER) + 12
    top = math.ceil((gutter - 8) * math.sin(math.radians(55))) + 14
    # The last column's slanted label leans out to the right.
    lean = max(
        math.ceil(len(text) * _CHARACTER * 0.574) - (size - 1 - j) * CELL for j, text in enumerate(labels)
    )
    width, height = gutter + size * CELL + max(lean, 8), top + size * CELL + 4
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" {box} role="img" aria-label="{escape(title)}">'
    ]
    if not in_page:
        parts.append(f"<title>{escape(title)}</title><style>{_file_style()}</style>")
        parts.append('<rect class="paper" width="100%" height="100%"/>')
    for number, text in enumerate(labels):
        middle = number * CELL + CELL // 2
        shown = escape(text)
        row_class = ' class="emphasis"' if number == emphasis else ""
        parts.append(
            f'<text x="{gutter - 7}" y="{top + middle + 4}" text-anchor="end"{row_class}>{shown}</text>'
        )
        parts.append(
            f'<text transform="translate({gutter + middle + 3} {top - 6}) rotate(-55)">{shown}</text>'
        )
    parts.append(f'<g transform="translate({gutter} {top}) scale({CELL})">')
    parts.append(f'<rect class="plate" width="{size}" height="{size}"/>')
    if not in_page:
        parts.append(_paths(weights, 0.0, _TITLED_FROM))
    for i in range(size):
        for j in range(size):
            weight = float(weights[i][j])
            if in_page or weight >= _TITLED_FROM:
                tip = escape(f"{labels[i]} → {labels[j]}: {percent(weight)}")
                place = f'x="{j}" y="{i}" width="1" height="1"'
                parts.append(f'<rect class="l{level(weight)}" {place}><title>{tip}</title></rect>')
    if emphasis is not None:
        parts.append(f'<rect class="frame" x="0" y="{emphasis}" width="{size}" height="1"/>')
    parts.append("</g></svg>")
    return "".join(parts)


def _paths(weights: Any, least: float, most: float) -> str:
    """One path for each colour step, of the cells with least <= weight < most; cells in a row are joined."""
    strokes: dict[int, list[str]] = {}
    for i, row in enumerate(weights):
        j = 0
        while j < len(row):
            step = level(row[j]) if least <= row[j] < most else 0
            start = j
            while j < len(row) and (level(row[j]) if least <= row[j] < most else 0) == step:
                j += 1
            if step:
                strokes.setdefault(step, []).append(f"M{start} {i}h{j - start}v1H{start}z")
    return "".join(f'<path class="l{step}" d="{"".join(found)}"/>' for step, found in sorted(strokes.items()))


def _file_style() -> str:
    return (
        "text{font:12px system-ui,sans-serif;fill:#26303b}.emphasis{font-weight:700}.paper{fill:#fff}"
        ".plate{fill:#f3f6f8}.l0{fill:none}.frame{fill:none;stroke:#d1571b;stroke-width:.1}"
        + colour_rules(LIGHT)
        + "@media(prefers-color-scheme:dark){text{fill:#d5dce4}.paper{fill:#12161c}.plate{fill:#181d25}"
        ".frame{stroke:#ffa15c}" + colour_rules(DARK) + "}"
    )
