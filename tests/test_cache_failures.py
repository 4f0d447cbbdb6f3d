"""A call that fails leaves the cache that it added tokens to as it was."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 8, 5


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
@pytest.mark.parametrize("kind", ["buffer", "ring", "int8 ring", "pages"])
def test_a_layer_that_fails_leaves_the_cache_as_it_was(kind, library):
    xp = pytest.importorskip(library)
    layer = aa.MultiHeadAttention.init(
        16, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=V_DIM, rope=True, xp=xp, seed=3
    )
    x = xp.asarray(np.random.default_rng(1).standard_normal((2, 12, 16)).astype(np.float32))
    empty = [xp.zeros((2, KV_HEADS, 0, n), dtype=xp.float32) for n in (DIM, V_DIM)]
    kept = {"window": 5, "sink_tokens": 1} if "ring" in kind else {}
    kept["quantize"] = "int8" if "int8" in kind else None
    found = []
    for failing in (True, False):
        if kind == "pages":
            cache = aa.PagedKVCache(*(xp.zeros((9, 4, KV_HEADS, n), dtype=xp.float32) for n in (DIM, V_DIM)))
            cache.add(), cache.add()
        else:
            cache = aa.KVCache(*empty, **kept)
        layer(x[:, :4], cache=cache)
        for n in range(4, 9):
            if failing:
                # Of a ring these overwrite what one token alone still sees.
                with pytest.raises(ValueError, match="window: "):
                    layer(x[:, n : n + 3], cache=cache, window=(-1, 0))
            found.append(np.asarray(layer(x[:, n : n + 1], cache=cache)))
        assert cache.lengths.tolist() == [9, 9]
    for mine, wanted in zip(found[:5], found[5:], strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


def interrupted(s, b, h, i, j):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "tokens", "options"),
    [
        (ValueError, 1, {"window": (-1, 0)}),
        (KeyboardInterrupt, 1, {"score_mod": interrupted}),
        (MemoryError, 4, {}),  # found at the second sequence
    ],
)
def test_pages_that_sequences_share_are_shared_after_a_call_that_fails(error, tokens, options):
    layer = aa.MultiHeadAttention.init(16, num_heads=HEADS, num_kv_heads=KV_HEADS, xp=np, seed=3)
    x = np.random.default_rng(1).standard_normal((2, 5 + tokens, 16)).astype(np.float32)
    cache = aa.PagedKVCache(*np.zeros((2, 4, 4, KV_HEADS, layer.head_dim), np.float32))
    cache.add()
    layer(x[:1, :5], cache=cache)
    cache.fork(0)
    with pytest.raises(error):
        layer(x[:, 5:], cache=cache, **options)
    assert [cache.pages(n) for n in (0, 1)] == [(0, 1), (0, 1)]
    assert cache.lengths.tolist() == [5, 5]
    assert cache.free_pages == 2
    # Both go on, on pages of their own: the first page and one each.
    layer(x[:, 5:6], cache=cache)
    assert cache.free_pages == 1
    cache.free(0), cache.free(1)
    assert cache.free_pages == 4


@pytest.mark.parametrize("window", [None, 4])
def test_an_interrupted_layer_leaves_the_cache_as_it_was(window):
    layer = aa.MultiHeadAttention.init(16, num_heads=HEADS, num_kv_heads=KV_HEADS, xp=np, seed=3)
    x = np.random.default_rng(1).standard_normal((2, 7, 16)).astype(np.float32)
    empty = np.zeros((2, KV_HEADS, 0, layer.head_dim), np.float32)
    cache, plain = (aa.KVCache(empty, empty, window=window) for _ in range(2))
    for one in (cache, plain):
        layer(x[:, :3], cache=one), layer(x[:, 3:5], cache=one)
    with pytest.raises(KeyboardInterrupt):
        layer(x[:, 5:6], cache=cache, score_mod=interrupted)
    assert cache.lengths.tolist() == [5, 5]
    np.testing.assert_array_equal(layer(x[:, 6:], cache=cache), layer(x[:, 6:], cache=plain))
