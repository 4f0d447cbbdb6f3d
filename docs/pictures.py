"""Draws the pictures of `looking-inside.md` into `docs/_static`, of the pretrained encoder of `anyattn demo`.

Run it as `python docs/pictures.py` where the demo and matplotlib are installed; what it writes is committed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from minilm import SENTENCE, attention_of_sentence, projections_of_text

import anyattn as aa
from anyattn import viz
from anyattn.top_blocks import top_blocks as choose

STATIC = Path(__file__).parent / "_static"
# The head of the sentence in which "it" looks at "trophy" most.
LAYER, HEAD = 3, 1
BLOCK = 16
COUNTS = (1, 2, 4, 8, 16, 32)


def head() -> Figure:
    """One head, with its words."""
    words, maps = attention_of_sentence()
    return viz.heat_map(maps[LAYER, HEAD], words, title=f"Layer {LAYER + 1}, head {HEAD + 1}")


def heads() -> Figure:
    """All heads, each with what it is called."""
    _, maps = attention_of_sentence()
    names = [f"{layer + 1}.{head + 1}" for layer in range(len(maps)) for head in range(maps.shape[1])]
    return viz.head_grid(maps, names=names, title=f"Every head, layers down: {SENTENCE}")


def rollout() -> Figure:
    """What of each word has reached each other one behind the last layer."""
    words, maps = attention_of_sentence()
    return viz.heat_map(viz.rollout(maps)[-1], words, title="Rollout over all layers")


def kept(q: np.ndarray, k: np.ndarray, weights: np.ndarray, count: int) -> dict[str, float]:
    """Shares of the weight that stay where each block of queries sees so many blocks of keys.

    Those of highest score, those that hold most weight, and those beside it.
    """
    blocks = weights.reshape(*weights.shape[:-2], -1, BLOCK, weights.shape[-1] // BLOCK, BLOCK)
    mass = blocks.sum(axis=(-3, -1)) / BLOCK
    numbers = np.arange(mass.shape[-1])
    beside = abs(numbers[:, None] - numbers)
    chosen = {
        "most weight (needs all weights)": -mass,
        "masks.top_blocks": ~choose(q, k, BLOCK, count),
        "nearest blocks": np.broadcast_to(beside, mass.shape),
    }
    shares = {}
    for name, order in chosen.items():
        first = np.argsort(order, axis=-1, kind="stable")[..., :count]
        shares[name] = float(np.take_along_axis(mass, first, axis=-1).sum(axis=-1).mean())
    return shares


def top_blocks() -> Figure:
    """How much of the weight few blocks hold, in all heads of a text of 512 tokens."""
    q, k = projections_of_text()[:, :2].swapaxes(0, 1)
    weights = aa.attention_weights(q, k)
    shares = [kept(q, k, weights, count) for count in COUNTS]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in shares[0]:
        axes.plot(COUNTS, [100 * share[name] for share in shares], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [f"{n} of 32" if n == COUNTS[0] else str(n) for n in COUNTS])
    axes.set_xlabel(f"blocks of {BLOCK} keys that a block of {BLOCK} queries sees")
    axes.set_ylabel("weight kept, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("Weight on chosen blocks, all 72 heads, 512 tokens of text")
    return figure


if __name__ == "__main__":
    for draw in (head, heads, rollout, top_blocks):
        viz.save(draw(), STATIC / f"{draw.__name__}.svg")
