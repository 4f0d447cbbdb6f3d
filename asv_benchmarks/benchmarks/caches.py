"""A step of decoding against each kind of cache, and what it costs to append the token to it.

Decoding reads all keys and values once, wherever they lie; those of int8 are a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
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


def step(backend: str, kind: str, keys: int) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Attention from one query of each sequence, called once, and the appending of one token to each."""
    common.require(backend)
    if backend == common.PEER:
        raise NotImplementedError("the peer has no caches")
    cache = filled(kind, keys)
    query = np.random.default_rng(1).standard_normal((SEQUENCES, HEADS, 1, DIM), dtype=np.float32)
    token = np.ones((2, SEQUENCES, KV_HEADS, 1, DIM), dtype=np.float32)

    def call() -> Any:
        return aa.attention(query, cache, backend=backend)

    call()
    return call, lambda: cache.extend(*token)


class Decode(common.Timed):
    """One query of each of 4 sequences, 32 query heads on 8 key/value heads of 128."""

    params: Any = (common.WHO, KINDS, (4096,))
    param_names = ("backend", "cache", "keys")

    def setup(self, backend: str, kind: str, keys: int) -> None:
        self.call, _ = step(backend, kind, keys)

    def time_attention(self, backend: str, kind: str, keys: int) -> None:
        self.call()


class Step(common.Timed):
    """One token of each sequence, appended and then attended from."""

    params: Any = (common.WHO, KINDS, (4096,))
    param_names = ("backend", "cache", "keys")
    # Each grows the cache, which has room for 4096 more.
    number, repeat, warmup_time = 10, 20, 0.0

    def setup(self, backend: str, kind: str, keys: int) -> None:
        self.call, self.append = step(backend, kind, keys)

    def time_step(self, backend: str, kind: str, keys: int) -> None:
        self.append()
        self.call()


class Append(common.Timed):
    """One token of each sequence, which no backend has a part in."""

    params: Any = (common.WHO, KINDS, (4096,))
    param_names = ("backend", "cache", "keys")
    number, repeat, warmup_time = 10, 20, 0.0

    def setup(self, backend: str, kind: str, keys: int) -> None:
        if backend != "reference":
            raise NotImplementedError("no backend appends")
        self.call, self.append = step(backend, kind, keys)

    def time_append(self, backend: str, kind: str, keys: int) -> None:
        self.append()
