"""Draws `docs/_static/patterns.svg`: the weights of one head under four patterns, computed by anyattn.

Run it as `python docs/patterns.py`; the result is committed, because README.md shows it. One dashed path a
colour, a dash a cell, keeps it small, and an opaque background makes it readable on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

import anyattn as aa

LENGTH, CELL, MARGIN, CAPTION = 24, 8, 28, 60
BACKGROUND, HIDDEN, TEXT = "#0f172a", "#1e293b", "#cbd5e1"
# From a weight just above 0 to the largest that is drawn apart.
RAMP = ["#3730a3", "#5b21b6", "#86198f", "#be185d", "#e11d48", "#f97316", "#fbbf24", "#fef08a"]

IDS = np.repeat([0, 1, 2], [7, 11, 6])
PATTERNS = [
    (["causal=True"], {"causal": True}),
    (
        ["mask=sliding_window(3, 3)", "     | global_tokens(2)"],
        {"mask": aa.masks.sliding_window(3, 3) | aa.masks.global_tokens(2)},
    ),
    (["mask=documents(ids)", "     & causal()"], {"mask": aa.masks.documents(IDS) & aa.masks.causal()}),
    (
        ["score_mod=lambda s, b, h, i, j:", "    s - abs(i - j) / 3"],
        {"score_mod": lambda s, b, h, i, j: s - abs(i - j) / 3},
    ),
]


def runs(cells: np.ndarray) -> str:
    """Return path data of one horizontal line through each run of true entries, in units of cells."""
    data = []
    for y, row in enumerate(cells):
        edges = np.flatnonzero(np.diff(row, prepend=False, append=False))
        data += [f"M{start} {y}.5h{stop - start}" for start, stop in edges.reshape(-1, 2)]
    return "".join(data)


def panel(index: int, caption: list[str], weights: np.ndarray) -> str:
    """Return one grid of weights with the argument that makes it below."""
    left = MARGIN + index * (LENGTH * CELL + MARGIN)
    # Square root: rows with many keys have small weights, and differences among them are to be seen.
    level = np.ceil(np.sqrt(weights) * 1.6 * len(RAMP)).clip(0, len(RAMP)).astype(int)
    lines = [
        f'<path stroke="{color}" d="{runs(level == number)}"/>'
        for number, color in enumerate([HIDDEN, *RAMP])
        if (level == number).any()
    ]
    words = [
        f'<text x="{left}" y="{MARGIN + LENGTH * CELL + 24 + 16 * line}">{escape(text)}</text>'
        for line, text in enumerate(caption)
    ]
    grid = f'<g transform="translate({left} {MARGIN}) scale({CELL})" class="grid">'
    return "\n".join([grid, *lines, "</g>", *words])


def draw() -> str:
    """Return the picture as SVG."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 1, LENGTH, 8))
    panels = [
        panel(index, caption, aa.attention_weights(q, k, **options)[0])
        for index, (caption, options) in enumerate(PATTERNS)
    ]
    width = MARGIN + len(PATTERNS) * (LENGTH * CELL + MARGIN)
    height = MARGIN + LENGTH * CELL + CAPTION
    font = "font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            "<title>Attention weights of one head under four patterns; queries down, keys across</title>",
            f"<style>text {{ {font}; fill: {TEXT} }}",
            ".grid { fill: none; stroke-width: 0.84; stroke-dasharray: 0.84 0.16 }</style>",
            f'<rect width="{width}" height="{height}" rx="14" fill="{BACKGROUND}"/>',
            *panels,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).parent.joinpath("_static", "patterns.svg").write_text(draw(), encoding="utf-8")
