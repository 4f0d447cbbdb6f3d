"""Writes tables of `caches.md`: cases in which decoding equals the whole, and the error of int8.

The first counts those of the conformance kit by backend; the second says how far attention from int8 keys and
values lies from that of floats.

Run it as `python docs/caches_table.py` where the demo is installed; the page is committed, and tests compare
what needs no model with what comes out.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np

import anyattn as aa
from anyattn.testing.case import CACHES
from anyattn.testing.cases import all_cases, seldom_cases
from anyattn.testing.cases.cached import EVERY, FAMILY

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


def counts() -> list[str]:
    """The table's rows of cases: those that a backend declares to take, all of which the kit holds it to."""
    lines = []
    for name in ("reference", "numba", "torch", "cupy"):
        module = "anyattn.reference" if name == "reference" else f"anyattn_{name}"
        backend = import_module(module).backend
        taken = Counter(
            (case.family, case.operation)
            for case in (*all_cases(), *seldom_cases())
            if case.needs <= backend.capabilities and case.dtype in backend.dtypes
        )
        numbers = [taken[family, kind] for family in (FAMILY, EVERY) for kind in CACHES]
        lines.append(f"| `{name}` | {' | '.join(map(str, numbers))} |")
    return lines


def with_table(text: str, columns: int, shown: list[str]) -> str:
    """Return the page with other rows in its first table of so many columns."""
    head = re.escape("|" + " --- |" * columns + "\n")
    return re.sub(f"(?<=\n{head}).*?\n(?=\n)", "\n".join(shown) + "\n", text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    from minilm import projections_of_text

    layers = np.moveaxis(projections_of_text(), 1, 0)
    shown = [*rows("standard normal", normal()), *rows("one channel ten times as large", with_outliers())]
    shown += rows("MiniLM, 72 heads", layers)
    text = with_table(PAGE.read_text(encoding="utf-8"), 5, shown)
    PAGE.write_text(with_table(text, 7, counts()), encoding="utf-8")
