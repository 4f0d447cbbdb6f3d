"""Writes a table of `looking-inside.md`: how much of the weight chosen blocks hold in a text of 8192 tokens.

Run it as `python docs/long_text.py` where the demo is installed; the page is committed. The encoder of the
demo has positions for 512 tokens: the text is encoded in pieces of so many, and attends from each to all.
"""

from __future__ import annotations

import numpy as np
from caches_table import with_table
from minilm import LONGEST, projections_of_pieces
from pictures import STATIC

import anyattn as aa
from anyattn.top_blocks import top_blocks

PAGE = STATIC.parent / "looking-inside.md"
BLOCK, PIECES, COUNTS = 64, 16, (4, 8, 16, 32)
# Of the blocks of queries every so-manieth is looked at.
STEP = 8


def shares(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Weight (counts, 3) in the blocks that hold most, in those of top_blocks, and in the nearest."""
    blocks = q.shape[-2] // BLOCK
    chosen = np.arange(0, blocks, STEP)
    rows = (chosen[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    weights = aa.attention_weights(q, k, rows=rows.tolist())
    mass = weights.reshape(len(q), len(chosen), BLOCK, blocks, BLOCK).sum(axis=(2, 4)) / BLOCK
    beside = np.broadcast_to(abs(chosen[:, None] - np.arange(blocks)), mass.shape)
    found = []
    for count in COUNTS:
        orders = -mass, ~top_blocks(q, k, BLOCK, count)[:, chosen], beside
        first = (np.argsort(order, axis=-1, kind="stable")[..., :count] for order in orders)
        found.append([np.take_along_axis(mass, places, axis=-1).sum(axis=-1).mean() for places in first])
    return np.array(found)


if __name__ == "__main__":
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGE.parent.glob("*.md")))
    layers = [shares(*layer) for layer in projections_of_pieces(text, PIECES)]
    lines = [
        f"| {count} of {PIECES * LONGEST // BLOCK} | " + " | ".join(f"{100 * x:.0f} %" for x in row) + " |"
        for count, row in zip(COUNTS, np.mean(layers, axis=0), strict=True)
    ]
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), 4, lines), encoding="utf-8")
