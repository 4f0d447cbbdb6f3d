"""Every entry of `anyattn.scores`, dense, and how scores combine (contract section 3).

A score function may be called with complex scores or tables: `derivatives` differentiates by a complex step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from anyattn.testing.oracle.pairs import Pairs

Array = Any


class Score:
    """A function (scores, index grid) -> scores; `+` adds the changes of two, `then` chains them."""

    def __init__(self, change: Callable[[Array, Pairs], Array]) -> None:
        self._change = change

    def __call__(self, score: Array, pairs: Pairs) -> Array:
        """The modified scores, (B, Hq, Lq, Lk)."""
        return self._change(score, pairs)

    def __add__(self, other: Score) -> Score:
        return Score(lambda s, at: self(s, at) + other(s, at) - s)

    def then(self, other: Score) -> Score:
        return Score(lambda s, at: other(self(s, at), at))


def alibi_slopes(heads: int) -> Array:
    """Slopes of Press, Smith and Lewis, "Train Short, Test Long" (2022), section 3, and their released code.

    For a power of two n the slopes are 2^(-8/n), 2^(-16/n), ... For other head counts the released code takes
    the slopes of the next lower power of two and fills up with every other slope of twice as many heads.
    """
    power = 1
    while power * 2 <= heads:
        power *= 2
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    between = [2 ** (-8 * (n + 1) / (2 * power)) for n in range(2 * power)][0::2]
    return np.asarray((slopes + between)[:heads])


def wide(values: Any) -> Array:
    """Values in float64, or complex for a derivative: tables of 16 bits must not round what they meet."""
    values = np.asarray(values)
    return values if np.iscomplexobj(values) else values.astype(np.float64)


def alibi(slopes: Any, *, positions: bool = True) -> Score:
    of_head = alibi_slopes(slopes) if isinstance(slopes, int) else wide(slopes)
    return Score(lambda s, at: s - of_head[at.h] * np.abs(at.place(positions) - at.j))


def t5_bucket(distance: int, num_buckets: int, bidirectional: bool, max_distance: int) -> int:
    """Bucket of key position minus query position, in exact integers.

    Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1, as in T5's released code:
    half of the buckets hold one distance each, the others grow by the logarithm up to `max_distance`. The
    code's floor(log(d/e) / log(m/e) * n) >= k means (d/e)^n >= (m/e)^k, which integers decide without
    rounding.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    grown = num_buckets - exact
    steps = 0
    while (
        steps + 1 < grown
        and distance**grown * exact ** (steps + 1) >= max_distance ** (steps + 1) * exact**grown
    ):
        steps += 1
    return first + exact + steps


def t5_bias(table: Any, bidirectional: bool, max_distance: int, *, positions: bool = True) -> Score:
    """`table` is (num_buckets, Hq), as `relative_attention_bias.weight` of T5."""
    values = wide(table)

    def change(s: Array, at: Pairs) -> Array:
        distance = at.j - at.place(positions)
        known = {
            int(d): t5_bucket(int(d), values.shape[0], bidirectional, max_distance)
            for d in np.unique(distance)
        }
        bucket = np.vectorize(known.__getitem__, otypes=[np.int64])(distance) if distance.size else distance
        return s + values[bucket, at.h]

    return Score(change)


def relative_bias(table: Any, *, positions: bool = True) -> Score:
    """`table` is (Hq, 2R + 1)."""
    values = wide(table)
    reach = (values.shape[1] - 1) // 2
    return Score(lambda s, at: s + values[at.h, np.clip(at.place(positions) - at.j, -reach, reach) + reach])


def relative_bias_2d(table: Any, width: int, *, positions: bool = True) -> Score:
    """`table` is (Hq, 2 Ry + 1, 2 Rx + 1), for pixels in rows of `width`."""
    values = wide(table)

    def change(s: Array, at: Pairs) -> Array:
        index = []
        for size, place in zip(values.shape[1:], (np.floor_divide, np.mod), strict=True):
            distance = place(at.place(positions), width) - place(at.j, width)
            index.append(np.minimum(np.maximum(distance + size // 2, 0), size - 1))
        return s + values[at.h, index[0], index[1]]

    return Score(change)


def relative_keys(
    q: Any, table: Any, scale: float | None = None, *, positions: bool = True, layout: str = "bhld"
) -> Score:
    """Shaw, Uszkoreit and Vaswani (2018), equation 5: `table` is (2R + 1, D), the same for every head."""
    queries, values = wide(q), wide(table)
    if layout == "blhd" and queries.ndim > 2:
        queries = np.swapaxes(queries, -3, -2)
    rows = ((1,) * (3 - queries.ndim) + queries.shape)[-3:]
    queries = queries.reshape(math.prod(queries.shape[:-3]), *rows)
    reach = (values.shape[-2] - 1) // 2
    factor = queries.shape[-1] ** -0.5 if scale is None else scale

    def change(s: Array, at: Pairs) -> Array:
        by_distance = factor * np.einsum("bhrd,nd->bhrn", queries, values)
        by_distance = np.broadcast_to(by_distance, (*at.shape[:3], values.shape[-2]))
        return s + by_distance[at.b, at.h, at.row, np.clip(at.j - at.place(positions), -reach, reach) + reach]

    return Score(change)


def softcap(c: float) -> Score:
    return Score(lambda s, at: c * np.tanh(s / c))


def from_function(function: Callable[..., Any]) -> Score:
    """A Python function (score, b, h, i, j) -> score, called once on the whole index grid."""
    return Score(lambda s, at: function(s, at.b, at.h, at.i, at.j))
