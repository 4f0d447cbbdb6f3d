"""The most similar pairs among many vectors."""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import numpy


class Pair(NamedTuple):
    """Two different vectors and their cosine."""

    cosine: float
    first: int
    second: int


def most_alike(vectors: numpy.ndarray[Any, Any], count: int, block: int = 256) -> list[Pair]:
    """The `count` pairs of rows with the largest product, the best first, ties by number.

    Parameters
    ----------
    vectors : numpy.ndarray
        (n, width), rows of length 1.
    count : int
        How many pairs.
    block : int
        Rows compared at a time, so that memory is some block × n numbers.
    """
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(vectors), block):
        products = vectors[start : start + block] @ vectors[start:].T
        rows = len(products)
        products[:, :rows][
            numpy.tri(rows, dtype=bool)
        ] = -numpy.inf  # itself, and pairs seen from the other side
        values = products.ravel()
        keep = (
            numpy.argpartition(-values, count - 1)[:count]
            if len(values) > count
            else numpy.arange(len(values))
        )
        found = zip(
            values[keep].tolist(),
            (-start - keep // products.shape[1]).tolist(),
            (-start - keep % products.shape[1]).tolist(),
            strict=True,
        )
        best = heapq.nlargest(count, [*best, *(pair for pair in found if pair[0] > -numpy.inf)])
    return [Pair(value, -first, -second) for value, first, second in best]
