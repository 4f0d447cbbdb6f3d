"""Writes the table of `linear-attention.md`: how far Performer lies from softmax attention on equal inputs.

Run it as `python docs/performer_table.py`; the page is committed, and a test compares it with what comes out.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import anyattn as aa

PAGE = Path(__file__).parent / "linear-attention.md"
FEATURES = (16, 64, 256, 1024)
# Factors on standard normal queries and keys: scores of standard deviation 0.25, 1 and 2.25.
SIZES = (0.5, 1.0, 1.5)
DRAWINGS = 4
HEADS, LENGTH, DIM = 2, 128, 16


def error(size: float, features: int) -> float:
    """Root of the mean square error over several drawings, over that of the output of softmax attention."""
    q, k, v = np.random.default_rng(0).standard_normal((3, HEADS, LENGTH, DIM))
    q, k = size * q, size * k
    wanted = aa.attention(q, k, v, causal=True, backend="reference")
    differences = []
    for seed in range(DRAWINGS):
        feature_map = aa.feature_maps.performer(DIM, features, seed=seed)
        options = {"feature_map": feature_map, "normalize": True, "scale": 1.0}
        differences.append(aa.linear_attention(q, k, v, backend="reference", **options) - wanted)
    return float(np.sqrt(np.mean(np.square(differences)) / np.mean(wanted**2)))


def table(errors: dict[tuple[float, int], float]) -> str:
    """Return the table as text."""
    lines = [
        f"| random features | {' | '.join(f'scores of deviation {size**2:g}' for size in SIZES)} |",
        f"| --- | {' | '.join(['---'] * len(SIZES))} |",
    ]
    for features in FEATURES:
        shown = " | ".join(f"{100 * errors[size, features]:.1f} %" for size in SIZES)
        lines.append(f"| {features} | {shown} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, shown: str) -> str:
    """Return the page with another table."""
    return re.sub(r"\| random features .*?\n(?=\n)", lambda _: shown, text, flags=re.DOTALL)


if __name__ == "__main__":
    found = {(size, features): error(size, features) for size in SIZES for features in FEATURES}
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(found)), encoding="utf-8")
