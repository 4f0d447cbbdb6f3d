"""The feature maps of `anyattn.feature_maps`, written anew, the random ones a vector at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anyattn.testing.oracle.philox import philox4x32

Array = Any


def apply(given: Any, x: Array) -> Array:
    """Features of (..., D)."""
    if callable(given):
        return np.asarray(given(x))
    match given:
        case None | "identity":
            return x
        case "elu+1":
            return np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0)))
        case "relu":
            return np.maximum(x, 0)
        case "softmax":
            e = np.exp(x - np.max(x, axis=-1, keepdims=True))
            return e / e.sum(axis=-1, keepdims=True)
    raise ValueError(given)


class performer:  # noqa: N801
    """Positive random features: directions drawn by Philox, made orthogonal by Gram and Schmidt's method."""

    def __init__(self, dim: int, features: int, *, seed: int = 0, scale: float | None = None) -> None:
        self.scale = 1 / math.sqrt(dim) if scale is None else scale
        blocks = -(-features // dim)
        normal = _normal(seed, 2 * blocks * dim * dim)
        drawn, lengths = normal.reshape(2, blocks * dim, dim)
        rows: list[Array] = []
        for number, row in enumerate(drawn):
            for other in rows[number - number % dim : number]:
                row = row - (row @ other) * other
            rows.append(row / math.sqrt(row @ row))
        self.directions = np.array(
            [row * math.sqrt(length @ length) for row, length in zip(rows, lengths, strict=True)]
        )[:features]

    def __call__(self, x: Array) -> Array:
        y = np.asarray(x) * math.sqrt(self.scale)
        exponent = np.einsum("...d,md->...m", y, self.directions) - (y * y).sum(axis=-1)[..., None] / 2
        return np.exp(exponent) / math.sqrt(len(self.directions))


def _normal(seed: int, count: int) -> Array:
    found: list[float] = []
    for block in range(-(-count // 4)):
        words = [
            (int(word) + 0.5) / 2**32
            for word in philox4x32((block, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
        ]
        for radius, angle in (words[:2], words[2:]):
            length = math.sqrt(-2 * math.log(radius))
            found += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
    return np.array(found[:count])
