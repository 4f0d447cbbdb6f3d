"""Blocks that queries and keys choose, against a loop over blocks."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn.top_blocks import top_blocks

HEADS, KV_HEADS, Q_LEN, K_LEN, SIZE = 4, 2, 21, 34, 8
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((2, HEADS, Q_LEN, 5))
K = RNG.standard_normal((2, KV_HEADS, K_LEN, 5))


def chosen(q, k, size, count, causal=False):
    """The definition, a block at a time."""
    ahead = k.shape[2] - q.shape[2]
    batch, heads, q_len, _ = q.shape
    found = np.zeros((batch, heads, -(-q_len // size), -(-k.shape[2] // size)), dtype=bool)
    for b, h, n in np.ndindex(found.shape[:3]):
        query = q[b, h, n * size : (n + 1) * size].mean(axis=0)
        keys = k[b, h // (heads // k.shape[1])]
        scores = [query @ keys[m * size : (m + 1) * size].mean(axis=0) for m in range(found.shape[3])]
        if causal:
            last = min((n + 1) * size, q_len) - 1 + ahead
            scores = [x for m, x in enumerate(scores) if m * size <= last]
        for m in sorted(range(len(scores)), key=lambda m: (-scores[m], m))[:count]:
            found[b, h, n, m] = True
    return found


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy", "array_api_strict"])
def test_blocks_of_highest_score(library):
    xp = pytest.importorskip(library)
    for count, causal in ((0, False), (2, False), (5, True), (9, False), (2, True)):
        found = top_blocks(xp.asarray(Q), xp.asarray(K), SIZE, count, causal=causal)
        np.testing.assert_array_equal(np.asarray(found), chosen(Q, K, SIZE, count, causal))
    # More queries than keys: the first blocks see none.
    found = top_blocks(xp.asarray(Q), xp.asarray(K[:, :, :9]), SIZE, 1, causal=True)
    wanted = chosen(Q, K[:, :, :9], SIZE, 1, causal=True)
    assert wanted.any(axis=-1).all(axis=(0, 1)).tolist() == [False, True, True]
    np.testing.assert_array_equal(np.asarray(found), wanted)


def test_batch_axes_broadcast():
    found = top_blocks(Q, K[0], SIZE, 2)
    np.testing.assert_array_equal(found, chosen(Q, np.stack([K[0], K[0]]), SIZE, 2))
    found = top_blocks(Q[:, None], K[None], SIZE, 2)
    assert found.shape == (2, 2, HEADS, 3, 5)
    np.testing.assert_array_equal(found[1, 0], chosen(Q[1:], K[:1], SIZE, 2)[0])


def test_equal_scores_take_the_lower_block():
    q, k = np.ones((1, 1, 4, 3)), np.ones((1, 1, 40, 3))
    k[0, 0, 8:16] = 2.0
    found = top_blocks(q, k, 8, 3)
    assert found[0, 0].tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_attention_sees_the_chosen_blocks_alone(backend):
    v = RNG.standard_normal((2, KV_HEADS, K_LEN, 3))
    seen = chosen(Q, K, SIZE, 2).repeat(SIZE, axis=2)[:, :, :Q_LEN].repeat(SIZE, axis=3)[..., :K_LEN]
    mask = aa.masks.top_blocks(Q, K, SIZE, 2)
    assert repr(mask) == "top_blocks(<q (2, 4, 21, 5)>, 8, 2)"
    assert repr(aa.masks.top_blocks(Q, K, 8, 2, causal=True)).endswith(", 8, 2, causal=True)")
    for options in ({}, {"causal": True}):
        found = aa.attention(Q, K, v, mask=mask, backend=backend, **options)
        wanted = aa.attention(Q, K, v, mask=seen, backend="reference", **options)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_no_choice_compiles_anything():
    """Other tables, counts and lengths are arguments of one kernel."""
    event = pytest.importorskip("numba.core.event")

    def run(q, k, count):
        v = np.ones((*k.shape[:-1], 3))
        mask = aa.masks.top_blocks(q, k, SIZE, count)
        out = aa.attention(q, k, v, mask=mask, causal=True, q_offset=k.shape[2], backend="numba")
        np.testing.assert_allclose(out, 1.0, rtol=1e-12)
        options = {"mask": mask, "dtype": "float64", "head_dim": 5, "v_head_dim": 3, "causal": True}
        return aa.compile(backend="numba", **options).cache_key

    key = run(Q, K, 2)
    with event.install_recorder("numba:compile") as compiled:
        keys = {run(Q[..., ::-1].copy(), K, 2), run(Q, -K, 3), run(Q[:, :, :9], K[:, :, :17], 1)}
    assert {str(one) for one in keys} == {str(key)}
    assert compiled.buffer == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q, K[..., :4], 8, 1), "k: wanted the axes and features of q"),
        ((Q, K[:, :1].repeat(3, axis=1), 8, 1), "k: wanted a number of heads that divides 4, got 3"),
        ((Q, K, 0, 1), "block_size: wanted 1 or more"),
        ((Q, K, 8, -1), "count: wanted 0 or more"),
        ((Q.astype(int), K, 8, 1), "q: wanted floats"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        aa.masks.top_blocks(*arguments)
