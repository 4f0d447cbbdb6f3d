"""Dropout: the same weights on every backend, wherever keys lie, for every kind of seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import anyattn as aa
from anyattn import arrays, dispatch, plan
from anyattn.dropout import key_words
from anyattn.testing.oracle.philox import philox4x32

BATCH, HEADS, ROWS, KEYS = 2, 4, 6, 11
RATE, SEED = 0.4, 0x123456789ABCDEF0


def kept(seed, rate, b, h, row, j):
    """Which pairs the definition keeps."""
    counter = [np.asarray(x).astype(np.uint64) for x in (b, h, row, j)]
    word = philox4x32((*counter,), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]
    return (word >> np.uint64(8)) >= math.ceil(rate * 2**24)


def inputs(keys=KEYS, rows=ROWS, heads=HEADS, kv_heads=2, batch=BATCH, dim=5):
    rng = np.random.default_rng(7)
    shapes = (batch, heads, rows, dim), (batch, kv_heads, keys, dim)
    q, k = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    v = np.array(np.broadcast_to(np.eye(keys, dtype=np.float32), (batch, kv_heads, keys, keys)))
    return q, k, v


GRID = np.ix_(range(BATCH), range(HEADS), range(ROWS), range(KEYS))


def backends():
    """Names of backends, each with libraries that it takes."""
    for name in ("reference", "numba", "torch"):
        for library in ("numpy", "torch", "jax.numpy", "array_api_strict", "dask.array"):
            if name == "reference" or (name, library) in (("numba", "numpy"), ("torch", "torch")):
                yield name, library


@pytest.mark.parametrize(("backend", "library"), list(backends()))
def test_every_backend_drops_the_same_weights(backend, library):
    """Values are the identity, so that the output is the weights."""
    xp = pytest.importorskip(library)
    if not aa.backends()[backend].available:
        pytest.skip(f"{backend} is not installed")
    q, k, v = (xp.asarray(x) for x in inputs())
    options = {"backend": backend, "return_lse": True}
    with dispatch.recording() as records:
        found, lse = aa.attention(q, k, v, dropout=RATE, dropout_seed=SEED, **options)
    assert [record.backend for record in records] == [backend]
    plain, wanted_lse = aa.attention(q, k, v, **options)
    found, lse, plain, wanted_lse = (np.asarray(x) for x in (found, lse, plain, wanted_lse))
    wanted = kept(SEED, RATE, *GRID)
    assert np.array_equal(found != 0, wanted)
    np.testing.assert_allclose(found, plain * wanted / (1 - RATE), rtol=1e-5)
    np.testing.assert_array_equal(lse, wanted_lse)


def test_weights_stay_in_the_mean():
    """Over 200 seeds a weight is kept as often as a binomial number says, and is itself in the mean."""
    q, k, v = inputs()
    outs = np.stack([aa.attention(q, k, v, dropout=RATE, dropout_seed=n) for n in range(200)])
    share = (outs != 0).mean(axis=0)
    error = math.sqrt(RATE * (1 - RATE) / 200)
    assert abs(share - (1 - RATE)).max() < 5 * error
    assert abs(share.mean() - (1 - RATE)) < 5 * error / math.sqrt(share.size)
    plain = aa.attention(q, k, v)
    assert (abs(outs.mean(axis=0) - plain) <= 5 * error / (1 - RATE) * plain).all()


def test_another_seed_makes_no_other_plan():
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    q, k, v = inputs()
    first = aa.attention(q, k, v, dropout=RATE, dropout_seed=1)
    plans = list(plan._plans)
    second = aa.attention(q, k, v, dropout=RATE, dropout_seed=2)
    third = aa.attention(q, k, v, dropout=RATE, dropout_seed=np.asarray(1))
    assert list(plan._plans)[: len(plans)] == plans
    assert len(plan._plans) <= len(plans) + 1  # for seeds in arrays
    assert np.array_equal(aa.attention(q, k, v, dropout=RATE, dropout_seed=1), first)
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63, 2**64 - 1, SEED, 2**31, -(2**31) - 7])
def test_the_words_of_a_seed(seed):
    bits = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    found = [key_words(seed, arrays.namespace(np.zeros(1)), None)]
    for dtype in ("int8", "uint16", "int32", "uint32", "int64", "uint64"):
        if np.iinfo(dtype).min <= seed <= np.iinfo(dtype).max:
            own = np.asarray(seed, dtype)
            found.append(key_words(own, arrays.namespace(own), None))
            own = pytest.importorskip("torch").asarray(own)
            found.append(key_words(own, arrays.namespace(own), "cpu").numpy())
    for words in found:
        assert words.dtype == np.int32
        assert words.view(np.uint32).tolist() == bits


def test_a_traced_seed():
    jax = pytest.importorskip("jax")
    q, k, v = inputs()
    tensors = [jax.numpy.asarray(x) for x in (q, k, v)]
    for seed in (jax.numpy.uint32(2**32 - 5), jax.numpy.int32(-5)):
        found = jax.jit(lambda seed: aa.attention(*tensors, dropout=RATE, dropout_seed=seed))(seed)
        wanted = aa.attention(q, k, v, dropout=RATE, dropout_seed=int(seed))
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5)


def test_packed_sequences_drop_what_each_of_them_does():
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((11, heads, 5)) for heads in (4, 2, 2))
    starts = [0, 4, 4, 11]
    options = {"causal": True, "dropout": RATE, "dropout_seed": SEED}
    found = aa.varlen_attention(q, k, v, starts, starts, **options)
    for n in (0, 2):
        part = slice(starts[n], starts[n + 1])
        own = [x[None, part].swapaxes(1, 2).repeat(n + 1, axis=0) for x in (q, k, v)]
        wanted = aa.attention(*own, **options)[n].swapaxes(0, 1)  # b is n
        np.testing.assert_allclose(found[part], wanted, rtol=1e-12)


@pytest.mark.parametrize("kind", ["grown", "ring", "pages"])
def test_caches_count_keys_as_tokens(kind):
    rng = np.random.default_rng(4)
    k, v = (rng.standard_normal((2, 2, 13, 5)) for _ in range(2))
    q = rng.standard_normal((2, 4, 1, 5))
    window = 8 if kind == "ring" else None
    if kind == "pages":
        cache = aa.PagedKVCache(*np.zeros((2, 12, 3, 2, 5)))
        for n in range(2):
            cache.append(cache.add(), k[n], v[n])
    else:
        cache = aa.KVCache(k[:, :, :6], v[:, :, :6], window=window)
        for n in range(6, 13):
            cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1])
    options = {"dropout": RATE, "dropout_seed": SEED}
    mask = None if window is None else aa.masks.sliding_window(window - 1)
    wanted = aa.attention(q, k, v, mask=mask, **options)
    np.testing.assert_allclose(aa.attention(q, cache, **options), wanted, rtol=1e-12)
