"""`flash_attn_varlen_func` and `flash_attn_with_kvcache` against FlashAttention's definition."""

from __future__ import annotations

import numpy as np
import pytest
from flash_attn_definition import defined, turned

import anyattn as aa
from anyattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from anyattn.dispatch import recording

RNG = np.random.default_rng(0)
HEADS, KV_HEADS, DIM, V_DIM = 6, 3, 8, 5
SLOPES = RNG.uniform(0.1, 1, (3, HEADS))
BEFORE = np.array([7, 0, 4], dtype=np.int32)
NEW, SPACE, PAGE = 3, 12, 4
ANGLES = RNG.uniform(0, 6, (40, 3))
TABLE = np.array([[5, 2, 9], [1, 7, 7], [0, 8, 3]], dtype=np.int32)


@pytest.fixture(autouse=True)
def reference():
    """Translation is the same on every backend; the one that defines the meaning runs."""
    with aa.use(backend="reference"):
        yield


def drawn(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize("slopes", [None, SLOPES[0], SLOPES])
def test_packed_sequences(slopes):
    lengths_q, lengths_k = (5, 1, 3), (9, 4, 3)
    cu_q, cu_k = (np.cumsum([0, *x]).astype(np.int32) for x in (lengths_q, lengths_k))
    q, k, v = drawn(9, HEADS, DIM), drawn(16, KV_HEADS, DIM), drawn(16, KV_HEADS, V_DIM)
    out, lse, pattern = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 5, 9, 0.0, 0.7, True, (3, -1), 1.5, slopes, return_attn_probs=True
    )
    assert pattern is None
    for n in range(3):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        own = slopes[n] if slopes is not None and slopes.ndim == 2 else slopes
        wanted, wanted_lse = defined(
            q[None, rows], k[None, keys], v[None, keys], 0.7, True, (3, -1), 1.5, own
        )
        np.testing.assert_allclose(out[rows], wanted[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse[:, rows], wanted_lse[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_packed_queries_of_keys_in_pages(library):
    """One sequence has no query, one no key, one a part of a page; what is of none is NaN."""
    xp = pytest.importorskip(library)
    lengths_q, lengths_k = (5, 0, 2, 3), (9, 4, 0, 7)
    cu_q, cu_k = (np.cumsum([0, *x]).astype(np.int32) for x in (lengths_q, lengths_k))
    table = np.array([[5, 2, 9], [1, -1, 99], [-1, 0, 0], [8, 3, 5]], dtype=np.int32)
    q = drawn(10, HEADS, DIM)
    tokens = drawn(4, SPACE, KV_HEADS, DIM), drawn(4, SPACE, KV_HEADS, V_DIM)
    pools = [np.full((10, PAGE, *x.shape[2:]), np.nan) for x in tokens]
    for n, length in enumerate(lengths_k):
        for t in range(length):
            for pool, x in zip(pools, tokens, strict=True):
                pool[table[n, t // PAGE], t % PAGE] = x[n, t]
    slopes = RNG.uniform(0.1, 1, (4, HEADS))
    given = [xp.asarray(x) for x in (q, *pools, cu_q, cu_k)]
    options = {"block_table": xp.asarray(table), "alibi_slopes": xp.asarray(slopes), "deterministic": True}
    out, lse, pattern = flash_attn_varlen_func(
        *given, 5, 9, 0.0, 0.7, True, (3, -1), 1.5, return_attn_probs=True, **options
    )
    assert pattern is None
    for n, length in enumerate(lengths_k):
        rows = slice(cu_q[n], cu_q[n + 1])
        k, v = (x[n : n + 1, :length] for x in tokens)
        wanted, wanted_lse = defined(q[None, rows], k, v, 0.7, True, (3, -1), 1.5, slopes[n])
        np.testing.assert_allclose(np.asarray(out)[rows], wanted[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(np.asarray(lse)[:, rows], wanted_lse[0], rtol=1e-9, atol=1e-12)


def test_pages_are_read_where_they_lie():
    """Without a copy in the order of the sequences: gradients come to the pages that are used."""
    torch = pytest.importorskip("torch")
    k, v = torch.from_numpy(drawn(10, PAGE, 2, DIM)), torch.from_numpy(drawn(10, PAGE, 2, DIM))
    q = torch.from_numpy(drawn(4, 2, DIM))
    given = torch.tensor([0, 1, 3, 4]), torch.tensor([0, 9, 13, 20]), 2, 9
    table = torch.tensor([[5, 2, 9], [1, 0, 0], [8, 3, 0]])

    def attend():
        return flash_attn_varlen_func(q, k, v, *given, causal=True, block_table=table)

    wanted = attend()
    with aa.use(backend="torch"), recording() as records:
        torch.testing.assert_close(attend(), wanted)
        k.requires_grad_()
        (grad,) = torch.autograd.grad(attend().square().sum(), k)
    assert [record.backend for record in records] == ["torch", "torch"]
    used = grad.abs().sum((1, 2, 3)) > 0
    assert used.tolist() == [n in (1, 2, 3, 5, 8, 9) for n in range(10)]


def test_packed_inputs_of_packed_sequences():
    cu = np.array([0, 4, 9])
    qkv = drawn(9, 3, HEADS, DIM)
    options = {"causal": True, "window_size": (3, 0), "softcap": 2.0, "alibi_slopes": SLOPES[:2]}
    q, k, v = (qkv[:, n] for n in range(3))
    wanted, wanted_lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, **options, return_attn_probs=True)
    out, lse, _ = flash_attn_varlen_qkvpacked_func(qkv, cu, 5, **options, return_attn_probs=True)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)
    out = flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 5, 5, **options)
    np.testing.assert_array_equal(out, wanted)
    with pytest.raises(ValueError, match=r"^qkv: wanted axes \(total, 3, heads, dim\)"):
        flash_attn_varlen_qkvpacked_func(qkv[:, :2], cu, 5)
    with pytest.raises(ValueError, match=r"^kv: wanted axes \(total, 2, heads, dim\)"):
        flash_attn_varlen_kvpacked_func(q, qkv, cu, cu, 5, 5)


def test_packed_errors_name_the_argument():
    q, cu = drawn(6, HEADS, DIM), np.array([0, 6])
    with pytest.raises(ValueError, match="max_seqlen_q: wanted at least 6"):
        flash_attn_varlen_func(q, q, q, cu, cu, 3, 6)
    with pytest.raises(ValueError, match=r"k: wanted \(pages, page_size, heads, dim\) with block_table"):
        flash_attn_varlen_func(q, q, q, cu, cu, 6, 6, block_table=TABLE)
    pages = drawn(3, PAGE, HEADS, DIM)
    with pytest.raises(ValueError, match="block_table: wanted integers of 2 axes for 1 sequences"):
        flash_attn_varlen_func(q, pages, pages, cu, cu, 6, 6, block_table=TABLE)
    with pytest.raises(ValueError, match="block_table: wanted numbers from 0 to 2, got 5"):
        flash_attn_varlen_func(q, pages, pages, cu, cu, 6, 6, block_table=TABLE[:1])
    with pytest.raises(ValueError, match="block_table: wanted pages of 4 for 6 tokens, got 1 to a sequence"):
        flash_attn_varlen_func(q, pages, pages, cu, cu, 6, 6, block_table=TABLE[:1, :1])
    with pytest.raises(ValueError, match="max_seqlen_k: wanted at least 6"):
        flash_attn_varlen_func(q, pages, pages, cu, cu, 6, 5, block_table=TABLE[2:] % 3)
    with pytest.raises(ValueError, match="block_table: wanted each page once in a sequence, got page 1 more"):
        flash_attn_varlen_func(q, pages, pages, cu, cu, 6, 6, block_table=TABLE[1:2] % 2)
    with pytest.raises(ValueError, match="dropout_p: wanted a probability"):
        flash_attn_varlen_func(q, q, q, cu, cu, 6, 6, 1.5)


class Caches:
    """The same tokens in three kinds of cache, NaN where there is none, and how to read them back."""

    def __init__(self, kind):
        self.k, self.v = drawn(3, SPACE, KV_HEADS, DIM), drawn(3, SPACE, KV_HEADS, V_DIM)
        self.kind = kind
        shapes = {"plain": (3, SPACE), "some entries": (5, SPACE), "pages": (10, PAGE)}
        self.arrays = [np.full((*shapes[kind], *x.shape[2:]), np.nan) for x in (self.k, self.v)]
        self.options = {
            "plain": {},
            "some entries": {"cache_batch_idx": np.array([4, 0, 2])},
            "pages": {"block_table": TABLE},
        }[kind]
        for n, length in enumerate(BEFORE):
            for t in range(length):
                for cache, x in zip(self.arrays, (self.k, self.v), strict=True):
                    cache[self.place(n, t)] = x[n, t]

    def place(self, n, t):
        if self.kind == "pages":
            return TABLE[n, t // PAGE], t % PAGE
        return (n if self.kind == "plain" else [4, 0, 2][n]), t


@pytest.mark.parametrize(
    ("kind", "library"),
    [
        *((kind, library) for kind in ("plain", "some entries", "pages") for library in ("numpy", "torch")),
        ("pages", "jax.numpy"),  # for its new arrays; each kind compiles for seconds
    ],
)
def test_new_tokens_join_the_cache(kind, library):
    xp = pytest.importorskip(library)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if library != "jax.numpy" else {"rtol": 1e-4, "atol": 1e-5}
    caches = Caches(kind)
    q, k, v = drawn(3, 2, HEADS, DIM), drawn(3, NEW, KV_HEADS, DIM), drawn(3, NEW, KV_HEADS, V_DIM)

    def to(x):
        return xp.asarray(x)

    k_cache, v_cache = map(to, caches.arrays)
    out, lse, *rest = flash_attn_with_kvcache(
        to(q), k_cache, v_cache, to(k), to(v), cache_seqlens=to(BEFORE), causal=True, window_size=(5, 0),
        alibi_slopes=to(SLOPES), return_softmax_lse=True,
        **{name: to(x) for name, x in caches.options.items()},
    )  # fmt: skip
    assert len(rest) == (2 if library == "jax.numpy" else 0)
    k_cache, v_cache = (np.asarray(x) for x in (rest or (k_cache, v_cache)))
    for n, length in enumerate(BEFORE):
        own_k, own_v = (np.concatenate([x[n, :length], new[n]]) for x, new in ((caches.k, k), (caches.v, v)))
        for t in range(length + NEW):
            np.testing.assert_allclose(k_cache[caches.place(n, t)], own_k[t], rtol=1e-6)
            np.testing.assert_allclose(v_cache[caches.place(n, t)], own_v[t], rtol=1e-6)
        wanted, wanted_lse = defined(
            q[n : n + 1], own_k[None], own_v[None], None, True, (5, 0), 0.0, SLOPES[n]
        )
        np.testing.assert_allclose(np.asarray(out)[n], wanted[0], **tolerance)
        np.testing.assert_allclose(np.asarray(lse)[n], wanted_lse[0], **tolerance)
    # Nothing else was written.
    written = {caches.place(n, t) for n, length in enumerate(BEFORE) for t in range(length + NEW)}
    others = [place for place in np.ndindex(k_cache.shape[:2]) if place not in written]
    assert np.isnan(k_cache[tuple(zip(*others, strict=True))]).all()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_rotation(interleaved, causal):
    caches = Caches("plain")
    q, k, v = drawn(3, NEW, HEADS, DIM), drawn(3, NEW, KV_HEADS, DIM), drawn(3, NEW, KV_HEADS, V_DIM)
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    out = flash_attn_with_kvcache(
        q, *caches.arrays, k, v, cos, sin, BEFORE, causal=causal, rotary_interleaved=interleaved
    )
    for n, length in enumerate(BEFORE):
        at = length + np.arange(NEW)
        new_k = turned(k[n], cos[at], sin[at], interleaved)
        rows = at if causal else np.full(NEW, length)
        new_q = turned(q[n], cos[rows], sin[rows], interleaved)
        own_k = np.concatenate([caches.k[n, :length], new_k])[None]
        own_v = np.concatenate([caches.v[n, :length], v[n]])[None]
        np.testing.assert_allclose(out[n], defined(new_q[None], own_k, own_v, causal=causal)[0][0], rtol=1e-9)


def test_a_full_cache_and_padding_on_the_left():
    k, v = drawn(3, SPACE, KV_HEADS, DIM), drawn(3, SPACE, KV_HEADS, V_DIM)
    q, pad = drawn(3, 2, HEADS, DIM), np.array([0, 3, 11])
    out = flash_attn_with_kvcache(q, k, v, cache_leftpad=pad, causal=True, softmax_scale=0.4, softcap=2.0)
    for n, first in enumerate(pad):
        wanted, _ = defined(q[n : n + 1], k[n : n + 1, first:], v[n : n + 1, first:], 0.4, True, softcap=2.0)
        np.testing.assert_allclose(out[n], wanted[0], rtol=1e-9, atol=1e-12)
    some = flash_attn_with_kvcache(q, k, v, cache_seqlens=5)
    np.testing.assert_allclose(some, defined(q, k[:, :5], v[:, :5])[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, "v: wanted an array with k"),
        ({"k": drawn(3, 2, 1, DIM)}, r"k: wanted shape \(3, 'n', 3, 8\)"),
        ({"k": drawn(3, NEW, KV_HEADS, DIM).astype(np.float32)}, "k: wanted dtype float64 like k_cache"),
        (
            {
                "k_cache": np.zeros((10, PAGE, KV_HEADS, DIM)),
                "v_cache": np.zeros((10, PAGE, KV_HEADS, V_DIM)),
                "block_table": np.array([[5, 2, 5], [1, 7, 7], [0, 8, 0]]),
            },
            "block_table: wanted each page once in a sequence, got page 5 more than once in that of entry 0",
        ),
        (
            {"v_cache": np.broadcast_to(1.0, (3, SPACE, KV_HEADS, V_DIM))},
            "v_cache: wanted an array that can be",
        ),
        ({"rotary_cos": ANGLES[:9], "rotary_sin": ANGLES}, "rotary_cos: wanted 10 rows, one for each"),
        ({"cache_seqlens": 10}, "cache_seqlens: wanted 0 to 9, so that 3 new tokens fit, got 10 to 10"),
        ({"cache_seqlens": 13, "k": None, "v": None}, "cache_seqlens: wanted 0 to 12"),
        ({"cache_seqlens": np.array([1, 2])}, r"cache_seqlens: wanted integers of shape \(3,\)"),
        ({"rotary_cos": ANGLES}, "rotary_sin: wanted an array with rotary_cos"),
        ({"rotary_cos": np.ones((40, 5)), "rotary_sin": np.ones((40, 5))}, "rotary_cos: wanted at most 4"),
        ({"block_table": TABLE, "cache_batch_idx": np.arange(3)}, "cache_batch_idx: wanted None"),
        ({"block_table": TABLE[0]}, "block_table: wanted integers of 2 axes"),
        ({"cache_batch_idx": np.array([0, 3, 1])}, "cache_batch_idx: wanted numbers from 0 to 2, got 3"),
        ({"q": drawn(2, 1, HEADS, DIM), "k": None, "v": None}, "k_cache: wanted 2 sequences like q"),
        ({"window_size": (1,)}, "window_size: wanted a pair"),
        ({"num_splits": -1}, "num_splits: wanted 0 or more"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "q": drawn(3, 1, HEADS, DIM),
        "k_cache": drawn(3, SPACE, KV_HEADS, DIM),
        "v_cache": drawn(3, SPACE, KV_HEADS, V_DIM),
        "k": drawn(3, NEW, KV_HEADS, DIM),
        "v": drawn(3, NEW, KV_HEADS, V_DIM),
        "cache_seqlens": BEFORE,
        **change,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        flash_attn_with_kvcache(**arguments)


@pytest.mark.parametrize("axis", [0, 2])
def test_new_tokens_want_memory_of_their_own(axis):
    """An expanded cache holds one row for all its entries, which the last of them would get."""
    torch = pytest.importorskip("torch")
    k_cache = torch.zeros(3, SPACE, KV_HEADS, DIM, dtype=torch.float64)
    v_cache = k_cache.narrow(axis, 0, 1).expand(3, SPACE, KV_HEADS, DIM)
    q, k = torch.asarray(drawn(3, 1, HEADS, DIM)), torch.asarray(drawn(3, NEW, KV_HEADS, DIM))
    with pytest.raises(
        ValueError, match="v_cache: wanted an array whose entries all have memory of their own"
    ):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=4)
    assert not k_cache.any()
    # Who only reads may have one; nor does an axis of one entry matter.
    flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4)
    shape = (3, SPACE, KV_HEADS, 1)
    one = torch.zeros(shape, dtype=torch.float64).as_strided(shape, (SPACE * KV_HEADS, KV_HEADS, 1, 0))
    flash_attn_with_kvcache(q, k_cache, one, k, k[..., :1], cache_seqlens=4)
    assert one.any()
    nobody = np.zeros((0, SPACE, KV_HEADS, DIM))
    flash_attn_with_kvcache(
        drawn(0, 1, HEADS, DIM), nobody, nobody, nobody[:, :1], nobody[:, :1], cache_seqlens=0
    )


def test_what_does_not_belong_into_compiled_functions_says_so():
    torch = pytest.importorskip("torch")
    q, k, table = torch.zeros(3, 2, 2, 8), torch.zeros(3, 4, 2, 8), torch.zeros(3, 1, dtype=torch.int32)
    cu = torch.arange(4, dtype=torch.int32)
    calls = [
        lambda: flash_attn_func(q, k, k, deterministic=True),
        lambda: flash_attn_with_kvcache(q, k, k),
        lambda: flash_attn_varlen_func(q[:, 0], k, k, cu, cu, 1, 1, block_table=table),
    ]
    for call in calls:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="call it outside of the compiled function"):
            torch.compile(call, backend="eager", fullgraph=True)()
