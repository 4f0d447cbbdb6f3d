"""The float64 oracle: what every call of the contract means, written down once more from the contract alone.

It shares no code with the library: nothing here imports `anyattn` outside this package, arrays are NumPy
arrays, every definition is dense (an L x L array of scores, a Python loop over rows), and the masks, scores,
Philox and T5 buckets are written anew. A mistake in `reference` and the same mistake here would have to be
made twice.

`attention`, `weights`, `stats` and `merge` take what their namesakes in `anyattn` take, with NumPy arrays;
`masks`, `scores` and `feature_maps` hold the vocabulary; `gradients` gives the derivatives,
`linear_attention` is the recurrence of its namesake.
"""

from __future__ import annotations

from anyattn.testing.oracle import feature_maps, functions, masks, scores
from anyattn.testing.oracle.dense import Dense, attention, merge, stats, weights
from anyattn.testing.oracle.derivatives import gradients
from anyattn.testing.oracle.linear import LinearDense, linear_attention

__all__ = [
    "Dense",
    "LinearDense",
    "attention",
    "feature_maps",
    "functions",
    "gradients",
    "linear_attention",
    "masks",
    "merge",
    "scores",
    "stats",
    "weights",
]
