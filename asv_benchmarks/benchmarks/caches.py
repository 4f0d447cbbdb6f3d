"""A step of decoding against each kind of cache, and what it costs to append the token to it.

Decoding reads all keys and values once: pages should cost what one buffer costs, int8 a quarter of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import anyattn as aa

from . import common

SEQUENCES, HEADS, KV_HEADS, DIM = 4, 32, 8, 128
PAGE_SIZE = 64
KINDS = ("buffer", "ring", "pages", "int8 buffer", "int8 pages")


def filled(kind: str, keys: int) -> Any:
    """A cache of some sequences of so many tokens, with room for more."""
    tokens = np.random.default_rng(0).standard_normal((2, SEQUENCES, KV_HEADS, keys, DIM), dtype=np.float32)
    quantize = "int8" if kind.startswith("int8") else None
    if not kind.endswith("pages"):
        kept = {"window": keys - 4, "sink_tokens": 4} if kind == "ring" else {"capacity": keys + 4096}
        return aa.KVCache(*tokens, quantize=quantize, **kept)
    pages = SEQUENCES * (-(-(keys + 4096) // PAGE_SIZE))
    shape = (pages, PAGE_SIZE, KV_HEADS, DIM)
    cache = aa.PagedKVCache(*(np.zeros(shape, np.int8 if quantize else np.float32) for _ in range(2)))
    numbers = [cache.add() for _ in range(SEQUENCES)]
    # Page by page in turn, as sequences grow beside each other: none has two pages in a row.
    for start in range(0, keys, PAGE_SIZE):
        part = tokens[..., start : start + PAGE_SIZE, :]
        for n in numbers:
            cache.append(n, part[0, n], part[1, n])
    return cache


class _Caches(common.Timed):
    """A batch of 4, 32 query heads on 8 key/value heads of 128, in pages of 64 tokens."""

    params: Any = (common.WHO, KINDS, (4096,))
    param_names = ("backend", "cache", "keys")

    def setup(self, backend: str, kind: str, keys: int) -> None:
        common.require(backend)
        if backend == common.PEER:
            raise NotImplementedError("the peer has no caches")
        self.cache = filled(kind, keys)
        self.query = np.random.default_rng(1).standard_normal((SEQUENCES, HEADS, 1, DIM), dtype=np.float32)
        self.token = np.ones((2, SEQUENCES, KV_HEADS, 1, DIM), dtype=np.float32)
        self.backend = backend
        self.call()

    def call(self) -> Any:
        return aa.attention(self.query, self.cache, backend=self.backend)


class Decode(_Caches):
    """One query of each sequence."""

    def time_attention(self, backend: str, kind: str, keys: int) -> None:
        self.call()


class Step(_Caches):
    """One token of each sequence, appended and then attended from."""

    def time_step(self, backend: str, kind: str, keys: int) -> None:
        self.cache.extend(*self.token)
        self.call()


class Append(_Caches):
    """One token of each sequence, which no backend has a part in."""

    def setup(self, backend: str, kind: str, keys: int) -> None:
        if backend != "reference":
            raise NotImplementedError("no backend appends")
        super().setup(backend, kind, keys)

    def time_append(self, backend: str, kind: str, keys: int) -> None:
        self.cache.extend(*self.token)
