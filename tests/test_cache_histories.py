"""Caches beside a list of tokens for each sequence, through histories that nobody wrote by hand.

Tokens are told apart by their values, so that what a cache holds says which tokens it took them for.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import anyattn as aa

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 3, 2
OPTIONS = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": (2, 0)},
    "mask": {"mask": aa.masks.strided(3) | aa.masks.global_tokens(1), "causal": True},
    "score": {"score_mod": lambda s, b, h, i, j: s - 0.25 * (h + 1) * abs(i - j) + 0.1 * b, "causal": True},
}


def rows(tokens):
    """Keys and values (Hkv, n, D) and (Hkv, n, Dv) of tokens by their numbers."""
    made = [np.random.default_rng(n).standard_normal((KV_HEADS, DIM + V_DIM)) for n in tokens]
    both = np.stack(made, axis=1) if made else np.zeros((KV_HEADS, 0, DIM + V_DIM))
    return both[..., :DIM].astype(np.float32), both[..., DIM:].astype(np.float32)


def attended(q, tokens, kept, b, options):
    """Attention from the queries at the end of a sequence to the tokens that a cache kept of it."""
    k, v = rows(tokens)
    mask = aa.masks.dense(np.isin(np.arange(len(tokens)), kept)[None])
    if "mask" in options:
        mask = mask & options["mask"]
    score = options.get("score_mod")
    own = None if score is None else lambda s, _, h, i, j: score(s, b, h, i, j)
    return aa.attention(q, k, v, backend="reference", **{**options, "mask": mask, "score_mod": own})


class Histories(RuleBasedStateMachine):
    """What both kinds of caches have in common: numbers of tokens, and attention to what is kept."""

    library = "numpy"

    def __init__(self):
        super().__init__()
        self.xp = pytest.importorskip(self.library)
        self.count = 0

    def place(self, x):
        return self.xp.asarray(x)

    def new_tokens(self, count):
        self.count += count
        return list(range(self.count - count, self.count))

    def compare(self, cache, sequences, kept, queries, option):
        """Queries at the end of sequences; `kept` are the places of their tokens that the cache has."""
        q = np.random.default_rng(self.count).standard_normal((len(sequences), HEADS, queries, DIM))
        q, options = q.astype(np.float32), OPTIONS[option]
        found = np.asarray(aa.attention(self.place(q), cache, backend="reference", **options))
        for n, tokens in enumerate(sequences):
            wanted = attended(q[n], tokens, kept[n], n, options)
            np.testing.assert_allclose(found[n], wanted, rtol=1e-4, atol=1e-5)


class Buffers(Histories):
    """A `KVCache` of three sequences, a ring or not."""

    @initialize(ring=st.none() | st.tuples(st.integers(1, 5), st.integers(0, 3)), capacity=st.integers(0, 4))
    def start(self, ring, capacity):
        kept = {"capacity": capacity} if ring is None else {"window": ring[0], "sink_tokens": ring[1]}
        self.ring = ring
        self.sequences = [[], [], []]
        k, v = rows([])
        self.cache = aa.KVCache(self.place(np.stack([k] * 3)), self.place(np.stack([v] * 3)), **kept)

    @rule(counts=st.lists(st.integers(0, 5), min_size=3, max_size=3), alike=st.booleans())
    def append(self, counts, alike):
        counts = [counts[0]] * 3 if alike else counts
        # What is beyond a sequence's count is padding.
        more = [self.new_tokens(max(counts)) for _ in counts]
        k, v = (np.stack(parts) for parts in zip(*map(rows, more), strict=True))
        self.cache.append(self.place(k), self.place(v), None if alike else counts)
        self.sequences = [
            old + new[:count] for old, new, count in zip(self.sequences, more, counts, strict=True)
        ]

    @rule(indices=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def reorder(self, indices):
        self.cache.reorder(indices)
        self.sequences = [list(self.sequences[n]) for n in indices]

    @rule(lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3))
    def crop(self, lengths):
        forgot = self.ring is not None and any(
            sum(self.ring) < len(tokens) > length
            for tokens, length in zip(self.sequences, lengths, strict=True)
        )
        if forgot:
            with pytest.raises(ValueError, match="crop: the ring has overwritten"):
                self.cache.crop(lengths)
        else:
            self.cache.crop(lengths)
            self.sequences = [x[:length] for x, length in zip(self.sequences, lengths, strict=True)]

    def kept(self, tokens):
        """Places of the tokens that are there."""
        if self.ring is None:
            return list(range(len(tokens)))
        window, sinks = self.ring
        return [n for n in range(len(tokens)) if n < sinks or n >= len(tokens) - window]

    @rule(queries=st.integers(1, 3), option=st.sampled_from(sorted(OPTIONS)))
    def attend(self, queries, option):
        full = self.ring is not None and max(map(len, self.sequences)) > sum(self.ring)
        if full and queries > self.ring[0]:
            with pytest.raises(ValueError, match=f"q: wanted at most {self.ring[0]} queries"):
                self.compare(self.cache, self.sequences, [], queries, option)
        else:
            self.compare(self.cache, self.sequences, list(map(self.kept, self.sequences)), queries, option)

    @invariant()
    def lengths_are_those_of_the_sequences(self):
        if hasattr(self, "cache"):
            assert self.cache.lengths.tolist() == list(map(len, self.sequences))
            assert self.cache.longest == max(map(len, self.sequences))
            assert not self.cache.lengths.flags.writeable


class Pages(Histories):
    """A `PagedKVCache` of few pages."""

    @initialize(size=st.integers(2, 4))
    def start(self, size):
        shape = 10, size, KV_HEADS
        pools = (np.full((*shape, n), np.nan, np.float32) for n in (DIM, V_DIM))
        self.cache = aa.PagedKVCache(*map(self.place, pools))
        # Two that share a page in the middle of which both go on.
        self.sequences = {self.cache.add(): self.new_tokens(5)}
        self.cache.append(0, *map(self.place, rows(self.sequences[0])))
        self.sequences[self.cache.fork(0)] = list(self.sequences[0])

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.sequences)))

    @rule()
    def add(self):
        self.sequences[self.cache.add()] = []

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        old = self.some(data)
        self.sequences[self.cache.fork(old)] = list(self.sequences[old])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data):
        number = self.some(data)
        self.cache.free(number)
        del self.sequences[number]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), length=st.integers(0, 9))
    def crop(self, data, length):
        number = self.some(data)
        self.cache.crop(number, length)
        del self.sequences[number][length:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(0, 7))
    def append(self, data, count):
        number, more = self.some(data), self.new_tokens(count)
        self.checked(lambda: self.cache.append(number, *map(self.place, rows(more))), {number: more})

    @precondition(lambda self: self.sequences)
    @rule(count=st.integers(1, 3))
    def extend(self, count):
        more = {number: self.new_tokens(count) for number in self.cache.sequences}
        k, v = (np.stack(parts) for parts in zip(*map(rows, more.values()), strict=True))
        self.checked(lambda: self.cache.extend(self.place(k), self.place(v)), more)

    def checked(self, action, more):
        """Do it, or be told that the pool is full and find all as it was."""
        try:
            action()
        except MemoryError as error:
            assert "more pages of" in str(error)  # noqa: PT017
            needed = sum(len(tokens) for tokens in more.values()) + len(more) * self.cache.page_size
            assert self.cache.free_pages * self.cache.page_size < needed
        else:
            for number, tokens in more.items():
                self.sequences[number] += tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), queries=st.integers(1, 3), option=st.sampled_from(sorted(OPTIONS)))
    def attend(self, data, queries, option):
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), min_size=1, max_size=3))
        chosen = [self.sequences[number] for number in numbers]
        self.compare(self.cache[numbers], chosen, [range(len(x)) for x in chosen], queries, option)

    @invariant()
    def pages_hold_the_tokens_of_the_sequences(self):
        if not hasattr(self, "cache"):
            return
        size, users = self.cache.page_size, Counter()
        stored = [np.asarray(x) for x in (self.cache.k_pages, self.cache.v_pages)]
        for number, tokens in self.sequences.items():
            pages = self.cache.pages(number)
            assert self.cache.length(number) == len(tokens)
            assert len(pages) == -(-len(tokens) // size)
            assert len(set(pages)) == len(pages)
            users.update(pages)
            for pool, wanted in zip(stored, rows(tokens), strict=True):
                held = pool[list(pages)].reshape(-1, KV_HEADS, pool.shape[-1])[: len(tokens)]
                np.testing.assert_array_equal(held, np.moveaxis(wanted, 0, 1))
        assert self.cache.free_pages == len(stored[0]) - len(users)
        assert self.cache.sequences == tuple(self.sequences)


# Examples and steps. JAX compiles each operation for each shape, and to compare pages takes few.
RUNS = {
    Buffers: {"numpy": (20, 15), "torch": (3, 12), "array_api_strict": (2, 12)},
    Pages: {"numpy": (20, 15), "torch": (3, 12), "array_api_strict": (2, 12), "jax.numpy": (1, 6)},
}


@pytest.mark.parametrize(("kind", "library"), [(kind, name) for kind, runs in RUNS.items() for name in runs])
def test_any_history(kind, library):
    examples, steps = RUNS[kind][library]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    made = type(kind.__name__, (kind,), {"library": library}).TestCase
    made.settings = chosen
    made("runTest").runTest()
