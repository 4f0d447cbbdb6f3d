"""Steps of decoding from a cache find their plan: none but the first is described."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn import plan

HEADS, KV_HEADS, DIM, ROOM = 4, 2, 16, 40

CACHES = {
    "buffer": {"capacity": ROOM},
    "int8 buffer": {"capacity": ROOM, "quantize": "int8"},
    "ring before it is full": {"window": ROOM},
    "full ring": {"window": 5, "sink_tokens": 2},
    "full int8 ring": {"window": 6, "quantize": "int8"},
}


@pytest.fixture
def described(monkeypatch):
    """The calls that are described."""
    from anyattn import describe

    calls = []
    original = describe.describe

    def counting(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(describe, "describe", counting)
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_families", {})
    return calls


def tokens(rng, batch, count):
    return tuple(rng.standard_normal((*batch, KV_HEADS, count, DIM)).astype("f4") for _ in "kv")


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "several"])
@pytest.mark.parametrize("name", CACHES)
def test_a_step_is_not_described(name, batch, described):
    rng = np.random.default_rng(3)
    cache = aa.KVCache(*tokens(rng, batch, 9), **CACHES[name])
    for n in range(5):
        cache.append(*tokens(rng, batch, 1))
        q = rng.standard_normal((*batch, HEADS, 1, DIM)).astype("f4")
        before = len(described)
        found = aa.attention(q, cache, causal=True, backend="numba")
        assert len(described) - before == (n == 0)
        held = min(10 + n, cache.capacity)
        scales = (1, 1) if cache.k_scales is None else (cache.k_scales, cache.v_scales)
        k, v = (x[..., :held, :] for x in (cache.k * scales[0], cache.v * scales[1]))
        wanted = aa.attention(q, k, v, backend="reference")
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def test_sequences_of_different_lengths_have_one_plan(described):
    rng = np.random.default_rng(4)
    cache = aa.KVCache(*tokens(rng, (2,), 9), capacity=ROOM, quantize="int8")
    cache.crop([4, 9])
    for n in range(3):
        cache.append(*tokens(rng, (2,), 1))
        q = rng.standard_normal((2, HEADS, 1, DIM)).astype("f4")
        before = len(described)
        found = aa.attention(q, cache, causal=True, backend="numba")
        assert len(described) - before == (n == 0)
        for b, held in enumerate((5 + n, 10 + n)):
            k, v = cache.k[b] * cache.k_scales[b], cache.v[b] * cache.v_scales[b]
            wanted = aa.attention(q[b], k[:, :held], v[:, :held], backend="reference")
            np.testing.assert_allclose(found[b], wanted, rtol=2e-5, atol=2e-6)


def test_options_that_count_tokens_see_their_numbers_in_a_full_ring(described):
    """Its order is then not that of the tokens, so a window or a score hangs on where they lie."""
    rng = np.random.default_rng(5)
    k, v = tokens(rng, (2,), 20)
    cache = aa.KVCache(k, v, window=8)
    q = rng.standard_normal((2, HEADS, 1, DIM)).astype("f4")
    for options in ({"window": (3, 0)}, {"score_mod": aa.scores.alibi(HEADS)}):
        found = aa.attention(q, cache, causal=True, backend="numba", **options)
        last = (x[..., -8:, :] for x in (k, v))
        wanted = aa.attention(q, *last, causal=True, backend="reference", **options)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def test_a_ring_refuses_an_array_along_keys_before_it_is_full_too():
    rng = np.random.default_rng(6)
    cache = aa.KVCache(*tokens(rng, (2,), 3), window=8)
    q = rng.standard_normal((2, HEADS, 1, DIM)).astype("f4")
    with pytest.raises(ValueError, match="bias: an array along keys"):
        aa.attention(q, cache, bias=np.zeros((1, 3), "f4"))
    with pytest.raises(TypeError, match="causal: wanted True or False, got 1"):
        aa.attention(q, cache, causal=1)
