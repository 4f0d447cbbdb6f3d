"""Decoding against a cache gives what the whole sequence gives at once, for every mask."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 8, 5
TOKENS = 23
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
TABLE = np.linspace(-1, 1, 4 * 17).reshape(4, 17)

MASKS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (6, 0)},
    "global and strided": {"causal": True, "mask": aa.masks.strided(5) | aa.masks.global_tokens([0, 7])},
    "prefix of each sequence": {"mask": aa.masks.prefix(np.array([3, 9])) | aa.masks.causal()},
    "dilated, softcap, sinks": {
        "causal": True, "mask": aa.masks.dilated(4, 3), "softcap": 2.0, "sinks": [0.1, -1.0, 0.0, 2.0],
    },
    "alibi": {"causal": True, "score_mod": lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j)},
    "relative bias": {"causal": True, "score_mod": aa.scores.relative_bias(TABLE)},
}  # fmt: skip


def sequences(seed=0, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, HEADS, tokens, DIM))
    k = rng.standard_normal((2, KV_HEADS, tokens, DIM))
    v = rng.standard_normal((2, KV_HEADS, tokens, V_DIM))
    return q, k, v


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-9, atol=1e-11)


def paged(k, v, page_size=4, pages=40):
    """A pool with holes, in which the pages of sequences alternate and do not rise."""
    pool = (
        np.full((pages, page_size, KV_HEADS, DIM), np.nan),
        np.full((pages, page_size, KV_HEADS, V_DIM), np.nan),
    )
    cache = aa.PagedKVCache(*pool)
    blocker = cache.add()
    cache.append(
        blocker, np.zeros((KV_HEADS, 3 * page_size, DIM)), np.zeros((KV_HEADS, 3 * page_size, V_DIM))
    )
    for _ in range(len(k)):
        cache.add()
    cache.free(blocker)
    return cache


def append(cache, k, v):
    if isinstance(cache, aa.KVCache):
        cache.append(k, v)
    else:
        for n, number in enumerate(cache.sequences):
            cache.append(number, k[n, ...], v[n, ...])


# Prompt of 9, then tokens, then a chunk of 4 as in speculative decoding.
STEPS = [(0, 9), *((n, n + 1) for n in range(9, 19)), (19, TOKENS)]


@pytest.mark.parametrize("kind", ["buffer", "pages"])
@pytest.mark.parametrize("name", MASKS)
def test_decoding_equals_the_whole_sequence(name, kind):
    options = MASKS[name]
    q, k, v = sequences()
    whole = aa.attention(q, k, v, backend="reference", **options)
    cache = aa.KVCache(k[:, :, :0], v[:, :, :0]) if kind == "buffer" else paged(k, v)
    for first, last in STEPS:
        append(cache, k[:, :, first:last], v[:, :, first:last])
        found = aa.attention(q[:, :, first:last], cache, backend="reference", **options)
        close(found, whole[:, :, first:last])


def test_on_numba():
    q, k, v = sequences()
    whole = aa.attention(q, k, v, causal=True, window=(6, 0), backend="reference")
    for cache in (
        aa.KVCache(k[:, :, :0], v[:, :, :0]),
        paged(k, v),
        aa.KVCache(k[:, :, :0], v[:, :, :0], window=7),
    ):
        for n in range(TOKENS):
            append(cache, k[:, :, n : n + 1], v[:, :, n : n + 1])
            found = aa.attention(q[:, :, n : n + 1], cache, causal=True, window=(6, 0), backend="numba")
            close(found, whole[:, :, n : n + 1])


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("name", ["causal", "alibi", "relative bias"])
def test_a_ring_sees_its_window_and_the_first_tokens(name, sinks):
    options = MASKS[name]
    q, k, v = sequences()
    kept = aa.masks.sliding_window(5, 0) | aa.masks.from_function(lambda b, h, i, j: j < sinks)
    whole = aa.attention(q, k, v, mask=kept, backend="reference", **options)
    # Of 9 tokens at once the last ones push out what the first would see: the last alone is asked.
    cache = aa.KVCache(k[:, :, :0], v[:, :, :0], window=6, sink_tokens=sinks)
    assert cache.capacity == 6 + sinks
    append(cache, k[:, :, :9], v[:, :, :9])
    close(aa.attention(q[:, :, 8:9], cache, backend="reference", **options), whole[:, :, 8:9])
    for n in range(9, TOKENS):
        append(cache, k[:, :, n : n + 1], v[:, :, n : n + 1])
        found = aa.attention(q[:, :, n : n + 1], cache, backend="reference", **options)
        close(found, whole[:, :, n : n + 1])
    # Places that hold nothing yet are not seen, with or without a mask that would hide them.
    cache = aa.KVCache(k[:, :, :2], v[:, :, :2], window=6, sink_tokens=sinks)
    close(aa.attention(q[:, :, :1], cache), aa.attention(q[:, :, :1], k[:, :, :2], v[:, :, :2]))
    # A ring that is wider than the window serves a chunk.
    cache = aa.KVCache(k[:, :, :0], v[:, :, :0], window=6 + 8, sink_tokens=sinks)
    append(cache, k[:, :, :9], v[:, :, :9])
    found = aa.attention(q[:, :, :9], cache, mask=kept, backend="reference", **options)
    close(found, whole[:, :, :9])


def test_sequences_of_different_lengths():
    q, k, v = sequences()
    cache = aa.KVCache(k[:, :, :0], v[:, :, :0], capacity=4)
    lengths = np.array([7, 3])
    cache.append(k[:, :, :7], v[:, :, :7], lengths)
    cache.append(k[:, :, 7:9], v[:, :, 7:9], [2, 1])
    cache.append(k[:, :, 9:10], v[:, :, 9:10])
    assert cache.lengths.tolist() == [10, 5]
    found = aa.attention(q[:, :, :1], cache, causal=True)
    own = [np.concatenate([x[1, :, :3], x[1, :, 7:8], x[1, :, 9:10]], axis=1) for x in (k, v)]
    close(found[0], aa.attention(q[0, :, :1], k[0, :, :10], v[0, :, :10]))
    close(found[1], aa.attention(q[1, :, :1], *own))


def test_beams_and_cropping():
    q, k, v = sequences()
    cache = aa.KVCache(k, v)
    cache.crop([5, 9])
    cache.reorder([1, 1])
    assert cache.lengths.tolist() == [9, 9]
    cache.append(k[:, :, 20:21], v[:, :, 20:21])
    for n in range(2):
        own = [np.concatenate([x[1, :, :9], x[n, :, 20:21]], axis=1) for x in (k, v)]
        close(aa.attention(q[:, :, :1], cache)[n], aa.attention(q[n, :, :1], *own))
    ring = aa.KVCache(k, v, window=4)
    with pytest.raises(ValueError, match="ring has overwritten"):
        ring.crop(10)


def test_what_was_appended_is_copied_and_the_buffer_grows():
    _, k, v = sequences()
    cache = aa.KVCache(k[:, :, :2], v[:, :, :2])
    k[:] = 0
    assert cache.k.any()
    cache.append(k[:, :, :5], v[:, :, :5])
    assert cache.capacity == 7
    cache.append(k[:, :, :1], v[:, :, :1])
    assert cache.capacity == 14


def test_a_shared_prefix_is_held_once_until_somebody_writes():
    q, k, v = sequences()
    cache = paged(k, v, page_size=4)
    first, second = cache.sequences
    cache.append(first, k[0, :, :10], v[0, :, :10])
    before = cache.free_pages
    third = cache.fork(first)
    assert cache.free_pages == before
    cache.append(third, k[1, :, 10:11], v[1, :, 10:11])
    cache.append(first, k[0, :, 10:12], v[0, :, 10:12])
    assert cache.pages(first)[:2] == cache.pages(third)[:2]
    assert cache.pages(first)[2] != cache.pages(third)[2]
    assert cache.free_pages == before - 1
    cache.append(second, k[1, :, :3], v[1, :, :3])
    found = aa.attention(q[:, :, :1], cache[[third, first]])
    mixed = [np.concatenate([x[0, :, :10], x[1, :, 10:11]], axis=1) for x in (k, v)]
    close(found[0], aa.attention(q[0, :, :1], *mixed))
    close(found[1], aa.attention(q[1, :, :1], k[0, :, :12], v[0, :, :12]))
    for number in (first, second, third):
        cache.free(number)
    assert cache.free_pages == 40


def test_a_pool_that_is_full_says_so_and_stays_as_it_was():
    _, k, v = sequences()
    cache = paged(k, v, page_size=4, pages=5)
    first, second = cache.sequences
    cache.append(first, k[0, :, :13], v[0, :, :13])
    with pytest.raises(MemoryError, match="8 tokens need 2 more pages of 4, 1 are free"):
        cache.append(second, k[1, :, :8], v[1, :, :8])
    assert cache.free_pages == 1
    assert cache.length(second) == 0
    cache.crop(first, 4)
    assert cache.free_pages == 4
    cache.append(second, k[1, :, :8], v[1, :, :8])
    assert cache.length(second) == 8
    cache.crop(second, 7)
    third = cache.fork(second)
    cache.append(first, k[0, :, :8], v[0, :, :8])
    with pytest.raises(MemoryError, match="1 tokens need 1 more pages of 4, 0 are free"):
        cache.append(third, k[1, :, 7:8], v[1, :, 7:8])


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
def test_other_libraries(library):
    xp = pytest.importorskip(library)
    q, k, v = (x.astype(np.float32) for x in sequences())
    whole = aa.attention(q, k, v, causal=True, window=(6, 0), backend="reference")
    q, k, v = (xp.asarray(x) for x in (q, k, v))
    pool = (
        xp.zeros((20, 4, KV_HEADS, DIM), dtype=xp.float32),
        xp.zeros((20, 4, KV_HEADS, V_DIM), dtype=xp.float32),
    )
    pages = aa.PagedKVCache(*pool)
    pages.add(), pages.add()
    buffer = aa.KVCache(k[:, :, :0, :], v[:, :, :0, :])
    ring = aa.KVCache(k[:, :, :0, :], v[:, :, :0, :], window=7)
    for first, last in ((0, 9), (9, 10)):
        tokens = slice(first, last)
        for cache in (pages, buffer, ring):
            append(cache, k[:, :, tokens, :], v[:, :, tokens, :])
            found = aa.attention(q[:, :, last - 1 : last, :], cache, causal=True, window=(6, 0))
            np.testing.assert_allclose(np.asarray(found), whole[:, :, last - 1 : last], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["buffer", "pages", "ring"])
def test_a_layer_takes_a_sequence_piece_by_piece(kind):
    layer = aa.MultiHeadAttention.init(
        16, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=V_DIM, rope=True, xp=np, seed=3,
        dtype=np.float64,
    )  # fmt: skip
    x = np.random.default_rng(1).standard_normal((2, TOKENS, 16))
    _, k, v = sequences()
    empty = k[:, :, :0], v[:, :, :0]
    cache = paged(k, v) if kind == "pages" else aa.KVCache(*empty, window=TOKENS if kind == "ring" else None)
    whole = layer(x, causal=True)
    for first, last in STEPS:
        close(layer(x[:, first:last], cache=cache, causal=True), whole[:, first:last])
    assert cache.lengths.tolist() == [TOKENS, TOKENS]
    with pytest.raises(ValueError, match="cache: wanted None with kv"):
        layer(x, x, cache=cache)


def test_both_layouts():
    q, k, v = sequences()
    whole = aa.attention(q, k, v, causal=True, layout="bhld")
    for cache in (aa.KVCache(k, v), aa.KVCache(k, v, window=TOKENS)):
        found = aa.attention(np.moveaxis(q, 1, 2), cache, causal=True, layout="blhd")
        close(np.moveaxis(found, 1, 2), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_lengths": 3}, "kv_lengths: wanted None with a cache"),
        ({"q_offset": 3}, "q_offset: wanted None with a cache"),
        ({"v": np.zeros((2, 2, 3, 5))}, "v: wanted None where k is a cache"),
        ({"bias": np.zeros((1, 6))}, "bias: an array along keys"),
        ({"mask": np.ones((1, 6), dtype=bool)}, "mask: mask is an array along rows and keys"),
    ],
)
def test_errors_name_the_argument(options, message):
    q, k, v = sequences(tokens=8)
    cache = aa.KVCache(k, v, window=6)
    with pytest.raises((TypeError, ValueError), match=message):
        aa.attention(q[:, :, :1], cache, **options)


def test_wrong_tokens_are_refused():
    _, k, v = sequences()
    cache = aa.KVCache(k, v)
    with pytest.raises(ValueError, match=r"v: wanted .*all axes but the last like k"):
        cache.append(k, v[:, :, :3])
    with pytest.raises(ValueError, match=r"k: wanted shape \(2, 2, 'n', 8\)"):
        cache.append(k[:1], v[:1])
    with pytest.raises(TypeError, match="k: wanted dtype float64, got float32"):
        cache.append(k.astype(np.float32), v.astype(np.float32))
    with pytest.raises(ValueError, match="lengths: wanted numbers between 0 and the 23 new tokens"):
        cache.append(k, v, [24, 0])
    with pytest.raises(ValueError, match="sink_tokens: wanted 0 without a window"):
        aa.KVCache(k, v, sink_tokens=2)
    with pytest.raises(KeyError, match="sequence: the cache has"):
        paged(k, v).append(7, k[0], v[0])
