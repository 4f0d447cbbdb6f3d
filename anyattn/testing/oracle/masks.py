"""Every entry of `anyattn.masks`, dense: one boolean for each (query, key) pair (contract section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anyattn.testing.oracle.pairs import Pairs
from anyattn.testing.oracle.philox import philox4x32

Array = Any


class Pattern:
    """A boolean function of the index grid; `&`, `|` and `~` combine patterns."""

    def __init__(self, values: Callable[[Pairs], Array]) -> None:
        self._values = values

    def __call__(self, pairs: Pairs) -> Array:
        """One boolean for each pair, (B, Hq, Lq, Lk)."""
        return pairs.fill(np.asarray(self._values(pairs), dtype=bool))

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(lambda pairs: self(pairs) & other(pairs))

    def __or__(self, other: Pattern) -> Pattern:
        return Pattern(lambda pairs: self(pairs) | other(pairs))

    def __invert__(self) -> Pattern:
        return Pattern(lambda pairs: ~self(pairs))


def causal(*, positions: bool = True) -> Pattern:
    return Pattern(lambda at: at.j <= at.place(positions))


def sliding_window(left: int | None, right: int | None = 0, *, positions: bool = True) -> Pattern:
    def values(at: Pairs) -> Array:
        distance = at.j - at.place(positions)
        far_left = False if left is None else distance < -left
        far_right = False if right is None else distance > right
        return ~(np.zeros(at.shape, bool) | far_left | far_right)

    return Pattern(values)


def dilated(window: int, dilation: int, *, positions: bool = True) -> Pattern:
    def values(at: Pairs) -> Array:
        distance = at.place(positions) - at.j
        return (np.abs(distance) <= window * dilation) & (np.mod(distance, dilation) == 0)

    return Pattern(values)


def strided(stride: int, *, positions: bool = True) -> Pattern:
    return Pattern(lambda at: np.mod(at.place(positions) - at.j, stride) == 0)


def fixed(stride: int, width: int = 1) -> Pattern:
    return Pattern(lambda at: np.mod(at.j, stride) >= stride - width)


def global_tokens(tokens: Any, *, positions: bool = True) -> Pattern:
    chosen = np.arange(tokens) if isinstance(tokens, int) else np.asarray(tokens).reshape(-1)
    return Pattern(lambda at: np.isin(at.place(positions), chosen) | np.isin(at.j, chosen))


def prefix(n: Any) -> Pattern:
    lengths = np.asarray(n, np.int64)
    return Pattern(lambda at: at.j < (lengths if lengths.ndim == 0 else lengths.reshape(-1)[at.b]))


def documents(ids: Any, *, positions: bool = True) -> Pattern:
    table = np.atleast_2d(np.asarray(ids))

    def values(at: Pairs) -> Array:
        length = table.shape[1]
        seen = np.zeros(at.shape, bool)
        place = np.broadcast_to(at.place(positions), (at.shape[0], 1, at.shape[2], 1))
        for b in range(at.shape[0]):
            of_batch = table[b if table.shape[0] > 1 else 0]
            for row in range(at.shape[2]):
                i = int(place[b, 0, row, 0])
                if 0 <= i < length:
                    known = min(length, at.shape[3])
                    seen[b, :, row, :known] = of_batch[:known] == of_batch[i]
        return seen

    return Pattern(values)


def padding(lengths: Any) -> Pattern:
    valid = np.asarray(lengths, np.int64).reshape(-1)
    return Pattern(lambda at: at.j < valid[at.b])


def block_sparse(blocks: Any, block_size: int) -> Pattern:
    table = np.asarray(blocks, bool)

    def values(at: Pairs) -> Array:
        blocks_of = (-(-at.shape[2] // block_size), -(-at.shape[3] // block_size))
        whole = np.broadcast_to(table, (*table.shape[:-2], *blocks_of))
        whole = np.repeat(np.repeat(whole, block_size, axis=-2), block_size, axis=-1)
        whole = whole[..., : at.shape[2], : at.shape[3]]
        if whole.ndim > 3:
            whole = whole.reshape(-1, *whole.shape[-3:])
        return whole

    return Pattern(values)


def random_blocks(count: int, block_size: int, seed: int, *, positions: bool = True) -> Pattern:
    """The `count` key blocks of least 64-bit Philox value for each query block; ties go to the lower one."""
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)

    def chosen(query_block: int, key_blocks: int) -> set[int]:
        ranked = []
        for key_block in range(key_blocks):
            low, high, _, _ = philox4x32((query_block & 0xFFFFFFFF, key_block, 0, 0), key)
            ranked.append((low | high << 32, key_block))
        return {key_block for _, key_block in sorted(ranked)[:count]}

    def values(at: Pairs) -> Array:
        key_blocks = -(-at.shape[3] // block_size)
        of_key = np.broadcast_to(at.j // block_size, at.shape)
        of_query = np.broadcast_to(at.place(positions) // block_size, at.shape)
        seen = np.zeros(at.shape, bool)
        for query_block in np.unique(of_query):
            wanted = sorted(chosen(int(query_block), key_blocks))
            seen |= (of_query == query_block) & np.isin(of_key, wanted)
        return seen

    return Pattern(values)


def dense(array: Any) -> Pattern:
    """A boolean array broadcastable to (..., Hq, Lq, Lk), indexed by row."""
    table = np.asarray(array, bool)
    return Pattern(lambda at: table.reshape(-1, *table.shape[-3:]) if table.ndim > 3 else table)


def from_function(function: Callable[..., Any]) -> Pattern:
    """A Python function (b, h, i, j) -> bool, called once on the whole index grid."""
    return Pattern(lambda at: function(at.b, at.h, at.i, at.j))
