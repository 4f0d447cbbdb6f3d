"""Decoding against a cache gives what the whole sequence gives at once, for every mask."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import anyattn as aa
from anyattn.testing.case import CACHES
from anyattn.testing.cases.cached import EVERY, OF_A_BUFFER, VOCABULARY, case, every
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_values

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


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", CACHES)
def test_decoding_with_every_mask_and_score_there_is(kind, backend):
    """Backends that compile take one of each kind, and all of them in `pytest --anyattn-full`."""
    library = LIBRARIES["numpy" if backend == "reference" else pytest.importorskip(backend).__name__]
    chosen = [one for one in every() if one.operation == kind]
    for one in chosen:
        check_values(one, library, backend)
    assert {one.family for one in chosen} == {EVERY}
    assert len(chosen) == (71 if kind == "buffer" else 54)


@pytest.mark.parametrize("kind", ["ring", "pages"])
def test_arrays_along_keys_that_lie_elsewhere_are_refused(kind):
    refused = [name for name in VOCABULARY if any(word in name for word in OF_A_BUFFER)]
    assert len(refused) == 17
    for name in refused:
        one = case(f"{kind}: {name}, refused", "keys lie elsewhere", kind, **VOCABULARY[name])
        with pytest.raises(ValueError, match=r"lie elsewhere in this call|depends on the sizes of a call"):
            check_values(one, LIBRARIES["numpy"], "reference")


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_what_counts_keys_counts_tokens_not_the_room_for_more(backend):
    q, k, v = sequences()
    last = q[:, :, -1:]
    cache = aa.KVCache(k[:, :, :20], v[:, :, :20])
    cache.append(k[:, :, 20:], v[:, :, 20:])
    assert cache.capacity == 40
    bias = np.linspace(-1, 1, TOKENS)[None]
    chosen = {
        "random": {"mask": aa.masks.random_blocks(2, 4, 7)},
        "top": {"mask": aa.masks.top_blocks(last, k, 4, 2)},
        "top of the cache": {"mask": aa.masks.top_blocks(last, cache.k[:, :, :TOKENS], 4, 2)},
        "array": {"mask": bias < 0.5, "bias": bias},
    }
    for options in chosen.values():
        found = aa.attention(last, cache, backend=backend, **options)
        close(found, aa.attention(last, k, v, backend="reference", **options))
    assert not np.allclose(found, aa.attention(last, k, v, backend="reference"))


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
    # Of 9 tokens at once the last ones push out what the first would see: the last alone is asked, and more
    # than the ring has room for are refused.
    cache = aa.KVCache(k[:, :, :0], v[:, :, :0], window=6, sink_tokens=sinks)
    assert cache.capacity == 6 + sinks
    append(cache, k[:, :, :9], v[:, :, :9])
    close(aa.attention(q[:, :, 8:9], cache, backend="reference", **options), whole[:, :, 8:9])
    if sinks < 3:
        with pytest.raises(ValueError, match="q: wanted at most 6 queries, whose keys the ring still holds"):
            aa.attention(q[:, :, 2:9], cache, **options)
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


@pytest.mark.parametrize("kept", [{}, {"window": 5}, {"window": 5, "sink_tokens": 2}])
def test_batch_axes_that_broadcast_with_those_of_the_queries(kept):
    rng = np.random.default_rng(0)
    lengths = np.array([9, 2, 5])
    k, v = (rng.standard_normal((3, KV_HEADS, 9, n)) for n in (DIM, V_DIM))

    def cache(k, v, lengths):
        made = aa.KVCache(k[..., :0, :], v[..., :0, :], **kept)
        made.append(k, v, lengths)
        return made

    for own, batch in (((3, 1), (1, 4)), ((3,), (2, 3)), ((3,), ())):
        q = rng.standard_normal((*batch, HEADS, 1, DIM))
        shared = cache(k.reshape(*own, *k.shape[1:]), v.reshape(*own, *v.shape[1:]), lengths.reshape(own))
        found = aa.attention(q, shared, window=(3, 0), backend="reference")
        whole = np.broadcast_shapes(own, batch)
        numbers = np.broadcast_to(np.arange(3).reshape(own), whole)
        queries = np.broadcast_to(q, (*whole, *q.shape[-3:]))
        for entry in np.ndindex(whole):
            n = numbers[entry]
            alone = cache(k[n], v[n], lengths[n])
            close(found[entry], aa.attention(queries[entry], alone, window=(3, 0), backend="reference"))


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


def test_a_step_of_several_sequences_is_of_all_or_of_none():
    _, k, v = sequences()
    cache = paged(k, v, page_size=4, pages=3)
    first, second = cache.sequences
    cache.append(first, k[0, :, :4], v[0, :, :4])
    cache.append(second, k[1, :, :4], v[1, :, :4])
    with pytest.raises(MemoryError):
        cache.extend(k[:, :, :1], v[:, :, :1])
    assert (cache.length(first), cache.length(second), cache.free_pages) == (4, 4, 1)
    with pytest.raises(ValueError, match="sequences: wanted different ones"):
        cache[[first, first]].extend(k[:, :, :1], v[:, :, :1])
    assert cache.length(first) == 4
    np.testing.assert_array_equal(cache.k_pages[cache.pages(first)[0]], np.moveaxis(k[0, :, :4], 0, 1))


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


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_pools_that_would_be_copied_are_refused(library):
    xp = pytest.importorskip(library)
    both = xp.zeros((6, 2, 4, KV_HEADS, DIM))
    for pool in (both[:, 0], xp.moveaxis(xp.zeros((6, KV_HEADS, 4, DIM)), 1, 2)):
        with pytest.raises(ValueError, match="k_pages: wanted pages in which all tokens lie at one distance"):
            aa.PagedKVCache(pool, pool)
    aa.PagedKVCache(both[0], both[1])
    aa.PagedKVCache(both[:, 0, :1], both[:, 1, :1])


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
        ({"dropout": np.array([0.1, 0.2])}, "dropout: wanted a real number, got ndarray"),
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


def int8_buffer(k, v, **kept):
    return aa.KVCache(k, v, quantize="int8", **kept)


def test_int8_is_off_by_half_a_step_at_most():
    _, k, v = sequences()
    k[0, 0, 3], k[0, 1, 2, 1], v[1, 0, 4, 0], v[1, 1, 5] = 0, np.nan, np.inf, 1e-44
    cache = int8_buffer(k.astype(np.float32), v.astype(np.float32))
    assert cache.k.dtype == cache.v.dtype == np.int8
    assert cache.k_scales.dtype == np.float32
    for x, stored, scales in ((k, cache.k, cache.k_scales), (v, cache.v, cache.v_scales)):
        plain = np.isfinite(x).all(axis=-1)
        assert np.isnan((stored * scales)[~plain]).all()
        steps = abs(x).max(axis=-1, keepdims=True)[plain] / 127
        assert (abs(stored * scales - x)[plain] <= steps * (0.5 + 1e-4) + 1e-44).all()
        assert (abs(stored[plain].astype(int)).max(axis=-1)[steps[:, 0] > 1e-30] == 127).all()


@pytest.mark.parametrize("backend", ["reference", "numba", "torch"])
def test_int8_tokens_that_are_hidden_never_matter(backend):
    xp = pytest.importorskip("torch") if backend == "torch" else np
    q, k, v = (x.astype(np.float32) for x in sequences())
    k[:, 0, 4], v[:, 0, 4] = np.nan, np.inf
    cache = int8_buffer(xp.asarray(k), xp.asarray(v))
    hidden = aa.masks.from_function(lambda b, h, i, j: j != 4)
    for count in (1, TOKENS):
        queries = xp.asarray(np.ascontiguousarray(q[:, :, -count:]))
        found = np.asarray(aa.attention(queries, cache, mask=hidden, backend=backend))
        kept = [np.delete(x, 4, axis=2) for x in (k, v)]
        wanted = aa.attention(queries, int8_buffer(*map(xp.asarray, kept)), backend="reference")
        np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-5, atol=1e-6)
        seen = np.asarray(aa.attention(queries, cache, backend=backend))
        assert np.isnan(seen[:, : HEADS // KV_HEADS]).all()
        assert np.isfinite(seen[:, HEADS // KV_HEADS :]).all()


def test_int8_caches_grow_are_cropped_reordered_and_shared():
    q, k, v = (x.astype(np.float32) for x in sequences())
    cache = int8_buffer(k[:, :, :5], v[:, :, :5])
    cache.append(k[:, :, 5:9], v[:, :, 5:9])
    cache.crop(8)
    cache.reorder([1, 1])
    cache.append(k[:, :, 20:21], v[:, :, 20:21])
    pool = aa.PagedKVCache(*(np.zeros((20, 4, KV_HEADS, n), np.int8) for n in (DIM, V_DIM)))
    first = pool.add()
    pool.append(first, k[1, :, :8], v[1, :, :8])
    pool.append(first, k[0, :, 20:21], v[0, :, 20:21])
    second = pool.fork(first)
    # In the middle of a page that both use, which is copied with its scales.
    pool.crop(second, 7)
    pool.append(second, k[1, :, 7:8], v[1, :, 7:8])
    pool.append(second, k[1, :, 20:21], v[1, :, 20:21])
    assert repr(pool) == "PagedKVCache(2 sequences, 18 tokens, 5 of 20 pages of 4, 2 heads, numpy int8)"
    for n in range(2):
        own = int8_buffer(*(np.concatenate([x[1, :, :8], x[n, :, 20:21]], axis=1)[None] for x in (k, v)))
        wanted = aa.attention(q[n : n + 1, :, :1], own)[0]
        np.testing.assert_allclose(aa.attention(q[:, :, :1], cache)[n], wanted, rtol=1e-6)
        np.testing.assert_allclose(aa.attention(q[:, :, :1], pool)[n], wanted, rtol=1e-6)


def test_int8_refuses_gradients_and_backends_that_lack_it(monkeypatch):
    torch = pytest.importorskip("torch")
    _, k, v = (torch.asarray(x) for x in sequences())
    with pytest.raises(ValueError, match="k: wanted an array without gradients for an int8 cache"):
        int8_buffer(k.requires_grad_(), v)
    cache = int8_buffer(k.detach(), v)
    q = torch.zeros(2, HEADS, 1, DIM, dtype=torch.float64, requires_grad=True)
    found = aa.explain(q, cache, causal=True)
    assert found.backend == "reference"
    assert "int8" in found.call.features
    assert "converts k and v from int8 to float64 a block at a time" in found.notes
    unlike = aa.KVCache(k.detach(), v)
    unlike.crop([5, 9])
    assert "kv_lengths" in aa.explain(q, unlike).call.features
    with pytest.raises(aa.errors.UnsupportedCallError, match="reads int8 keys and values of plain tensors"):
        aa.attention(q, cache, backend="torch")
    # What is asked from constants has gradients still.
    aa.attention(q, cache).sum().backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad.abs().max() > 0
    monkeypatch.setattr(type(aa.backends()["reference"].backend), "capabilities", frozenset({"kv_lengths"}))
    with pytest.raises(aa.errors.UnsupportedCallError, match="has no int8 "):
        aa.attention(q.detach(), cache, backend="reference")
    with pytest.raises(ValueError, match="quantize: wanted None or 'int8', got 'int4'"):
        aa.KVCache(k, v, quantize="int4")
    with pytest.raises(TypeError, match="k_pages, v_pages: wanted one dtype, a float or int8"):
        aa.PagedKVCache(np.zeros((2, 2, 1, 3), np.int16), np.zeros((2, 2, 1, 3), np.int16))


def test_pages_are_read_in_place():
    """Decoding 26 MB of a pool of 32 MB takes 1.5 MB, for the schedule: nothing is gathered."""
    pytest.importorskip("numba")
    pool = np.ones((2, 512, 16, 4, 128), dtype=np.float32)
    cache = aa.PagedKVCache(*pool)
    numbers = [cache.add() for _ in range(4)]
    for _ in range(100):
        for n in numbers:
            cache.append(n, *np.ones((2, 4, 16, 128), dtype=np.float32))
    q = np.ones((4, 4, 1, 128), dtype=np.float32)
    aa.attention(q, cache, backend="numba")
    cache.append(numbers[0], *np.ones((2, 4, 1, 128), dtype=np.float32))
    tracemalloc.start()
    found = aa.attention(q, cache, backend="numba")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)
    assert most < pool.nbytes // 10
