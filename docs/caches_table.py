"""Writes the table of `caches.md`: how far attention from int8 keys and values lies from that of floats.

Run it as `python docs/caches_table.py` where the demo is installed; the page is committed, and a test
compares what needs no model with what comes out.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import anyattn as aa

PAGE = Path(__file__).parent / "caches.md"
HEADS, TOKENS, DIM = 4, 512, 64


def normal() -> np.ndarray:
    """Standard normal queries, keys and values."""
    return np.random.default_rng(0).standard_normal((3, 1, HEADS, TOKENS, DIM), dtype=np.float32)


def with_outliers() -> np.ndarray:
    """The same with one channel ten times as large, as keys of language models have them."""
    tokens = normal()
    tokens[1:, ..., 7] *= 10
    return tokens


def errors(tokens: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """For each way to keep keys and values: rms and largest error of the result, and of the weights.

    The first two as shares of the rms and of the largest number of the result in float64, the last as the
    mean share of a row's weight that lies on other keys.
    """
    q, k, v = tokens
    wide = [x.astype(np.float64) for x in (q, k, v)]
    wanted, weights = aa.attention(*wide, backend="reference"), aa.attention_weights(*wide[:2])
    cache = aa.KVCache(k, v, quantize="int8")
    kept = {
        "int8": (cache.k * cache.k_scales, cache.v * cache.v_scales),
        "float16": tuple(x.astype(np.float16) for x in (k, v)),
    }
    found = {}
    for name, stored in kept.items():
        keys, values = (x.astype(np.float64) for x in stored)
        error = aa.attention(wide[0], keys, values, backend="reference") - wanted
        moved = abs(aa.attention_weights(wide[0], keys) - weights).sum(axis=-1).mean() / 2
        rms = np.sqrt(np.mean(error**2) / np.mean(wanted**2))
        found[name] = (rms, abs(error).max() / abs(wanted).max(), moved)
    return found


def rows(name: str, tokens: np.ndarray) -> list[str]:
    """The table's rows of some tokens."""
    return [
        f"| {name} | {kept} | {100 * rms:.2f} % | {100 * most:.1f} % | {100 * moved:.3f} % |"
        for kept, (rms, most, moved) in errors(tokens).items()
    ]


def with_table(text: str, shown: list[str]) -> str:
    """Return the page with other rows."""
    return re.sub(
        r"(?<=\| --- \| --- \| --- \| --- \| --- \|\n).*?\n(?=\n)",
        "\n".join(shown) + "\n",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    from minilm import projections_of_text

    layers = np.moveaxis(projections_of_text(), 1, 0)
    shown = [*rows("standard normal", normal()), *rows("one channel ten times as large", with_outliers())]
    shown += rows("MiniLM, 72 heads", layers)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), shown), encoding="utf-8")
