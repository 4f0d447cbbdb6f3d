"""The score vocabulary: numbers from the papers, composition, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn import scores


def logits(score, q_len=5, k_len=5, heads=2, dim=3, seed=None, **options):
    """What `score` makes of scores s = 0 (or of random ones), up to a constant a row."""
    q = (
        np.zeros((heads, q_len, dim))
        if seed is None
        else np.random.default_rng(seed).standard_normal((heads, q_len, dim))
    )
    k = np.ones((heads, k_len, dim))
    return np.log(aa.attention_weights(q, k, score_mod=score, **options))


def same_up_to_rows(found, wanted):
    np.testing.assert_allclose(
        found - found.max(-1, keepdims=True), wanted - wanted.max(-1, keepdims=True), atol=1e-13
    )


def distances(q_len=5, k_len=5, offset=0):
    return np.arange(q_len)[:, None] + offset - np.arange(k_len)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [1 / 256]),
        (2, [1 / 16, 1 / 256]),
        (8, [2.0**-n for n in range(1, 9)]),
        (3, [1 / 16, 1 / 256, 1 / 4]),
        (12, [*(2.0**-n for n in range(1, 9)), *(2.0 ** -(n + 0.5) for n in range(4))]),
    ],
)
def test_alibi_slopes_are_the_papers(heads, slopes):
    found = logits(scores.alibi(heads), heads=heads)
    same_up_to_rows(found, -np.array(slopes)[:, None, None] * np.abs(distances()))


def test_alibi_of_given_slopes_at_an_offset():
    found = logits(scores.alibi([1.0, 2.0]), q_len=2, q_offset=3)
    same_up_to_rows(found, -np.array([1.0, 2.0])[:, None, None] * np.abs(distances(2, 5, 3)))
    by_rows = logits(scores.alibi([1.0, 2.0], positions=False), q_len=2, q_offset=3)
    same_up_to_rows(by_rows, -np.array([1.0, 2.0])[:, None, None] * np.abs(distances(2, 5)))


def t5_buckets(bidirectional, buckets, max_distance, length):
    """Buckets of distances j - i = 0, 1, ... and of i - j = 0, 1, ..., read out through an attention call."""
    table = np.repeat(np.arange(float(buckets))[:, None], 1, axis=1)
    score = scores.t5_bias(table, bidirectional, max_distance)
    ahead = logits(score, 1, length, heads=1, q_offset=0)[0, 0]
    behind = logits(score, 1, length, heads=1, q_offset=length - 1)[0, 0][::-1]
    return [np.rint(side - side[0]).astype(int) for side in (ahead, behind)]


def test_t5_buckets_are_the_papers():
    """32 buckets both ways up to 128: 16 a side, 8 exact, then edges at 8 * 16**(k / 8)."""
    ahead, behind = t5_buckets(True, 32, 128, 140)
    edges = [12, 16, 23, 32, 46, 64, 91]  # the first distances of buckets 9 to 15
    one_side = np.array([min(d, 8) + sum(d >= e for e in edges) for d in range(140)])
    np.testing.assert_array_equal(behind, one_side)
    np.testing.assert_array_equal(ahead[1:], one_side[1:] + 16)


def test_t5_buckets_of_a_decoder_ignore_the_future():
    """32 buckets for the past: 16 exact, then edges at 16 * 8**(k / 16)."""
    ahead, behind = t5_buckets(False, 32, 128, 140)
    assert not ahead.any()
    edges = [19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]  # of buckets 17 to 31
    np.testing.assert_array_equal(behind, [min(d, 16) + sum(d >= e for e in edges) for d in range(140)])


def test_t5_buckets_equal_those_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    import torch

    for bidirectional in (True, False):
        ahead, behind = t5_buckets(bidirectional, 32, 128, 200)
        position = torch.arange(200)
        bucket = t5.T5Attention._relative_position_bucket
        np.testing.assert_array_equal(ahead, bucket(position, bidirectional, 32, 128).numpy())
        np.testing.assert_array_equal(behind, bucket(-position, bidirectional, 32, 128).numpy())


def test_relative_bias_clips_to_its_reach():
    table = np.random.default_rng(0).standard_normal((2, 5))
    same_up_to_rows(logits(scores.relative_bias(table)), table[:, np.clip(distances(), -2, 2) + 2])


def test_relative_keys_are_shaws():
    rng = np.random.default_rng(1)
    q, k, table = (
        rng.standard_normal((2, 2, 4, 3)),
        rng.standard_normal((2, 2, 6, 3)),
        rng.standard_normal((5, 3)),
    )
    relative = np.clip(np.arange(6) - np.arange(4)[:, None] - 2, -2, 2) + 2
    wanted = (q @ k.swapaxes(-1, -2) + np.einsum("bhid,ijd->bhij", q, table[relative])) / np.sqrt(3)
    same_up_to_rows(np.log(aa.attention_weights(q, k, score_mod=scores.relative_keys(q, table))), wanted)
    turned = q.swapaxes(1, 2), k.swapaxes(1, 2)
    score = scores.relative_keys(turned[0], table, layout="blhd")
    same_up_to_rows(np.log(aa.attention_weights(*turned, score_mod=score, layout="blhd")), wanted)


def test_relative_keys_of_queries_with_fewer_batch_axes():
    rng = np.random.default_rng(1)
    q, k, table = (
        rng.standard_normal((2, 1, 1, 4, 3)),
        rng.standard_normal((3, 1, 4, 3)),
        rng.standard_normal((3, 3)),
    )
    found = aa.attention_weights(q, k, score_mod=scores.relative_keys(q, table))
    assert found.shape == (2, 3, 1, 4, 4)
    for a in range(2):
        for b in range(3):
            alone = aa.attention_weights(q[a, 0], k[b], score_mod=scores.relative_keys(q[a, 0], table))
            np.testing.assert_allclose(found[a, b], alone, rtol=1e-13)


def test_sums_and_chains():
    """With s = q . 1 / sqrt(3): (f + g)(s) = f(s) + g(s) - s and f.then(g)(s) = g(f(s))."""

    def double(s, b, h, i, j):
        return 2 * s

    capped, slope = scores.softcap(0.5), scores.alibi([1.0, 0.5])
    s = np.random.default_rng(3).standard_normal((2, 5, 3)).sum(-1)[..., None] / np.sqrt(3)
    alibi = -np.array([1.0, 0.5])[:, None, None] * np.abs(distances())
    cap = lambda x: 0.5 * np.tanh(x / 0.5)  # noqa: E731
    same_up_to_rows(logits(slope.then(capped), seed=3), cap(s + alibi))
    same_up_to_rows(logits(capped.then(slope), seed=3), cap(s) + alibi)
    same_up_to_rows(logits(slope + scores.from_function(double), seed=3), s + alibi + s)
    same_up_to_rows(logits(slope.then(double), seed=3), 2 * (s + alibi))
    same_up_to_rows(logits((slope + slope).then(capped), seed=3), cap(s + 2 * alibi))
    assert repr((slope + slope).then(capped)) == "(alibi(<slopes>) + alibi(<slopes>)).then(softcap(0.5))"


def test_a_chain_reaches_what_the_call_settles():
    """relative_keys is settled late; what is chained before it must still reach the sum."""
    rng = np.random.default_rng(1)
    q, k, table = rng.standard_normal((1, 4, 3)), rng.standard_normal((1, 4, 3)), rng.standard_normal((3, 3))
    added = np.einsum("hid,ijd->hij", q, table[np.clip(-distances(4, 4), -1, 1) + 1]) / np.sqrt(3)
    wanted = 0.1 * np.tanh(q @ k.swapaxes(-1, -2) / np.sqrt(3) / 0.1) + added
    chained = scores.softcap(0.1).then(scores.relative_keys(q, table))
    same_up_to_rows(np.log(aa.attention_weights(q, k, score_mod=chained)), wanted)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: scores.alibi(0), ValueError, "slopes: wanted 1 or more"),
        (lambda: scores.alibi([[1.0]]), ValueError, r"slopes: wanted 1 axes, got shape \(1, 1\)"),
        (
            lambda: scores.t5_bias(np.zeros((32, 2), dtype=int), True, 128),
            TypeError,
            "table: wanted a float array",
        ),
        (lambda: scores.t5_bias(np.zeros((31, 2)), True, 128), ValueError, "even number of buckets"),
        (
            lambda: scores.t5_bias(np.zeros((32, 2)), False, 16),
            ValueError,
            "max_distance: wanted more than the 16",
        ),
        (lambda: scores.relative_bias(np.zeros((2, 4))), ValueError, r"wanted shape \(Hq, 2R \+ 1\)"),
        (lambda: scores.relative_keys(np.zeros((1, 4, 3)), np.zeros((3, 4))), ValueError, "wanted q"),
        (lambda: scores.softcap(0.0), ValueError, "c: wanted a positive number"),
        (lambda: scores.softcap(float("nan")), ValueError, "c: wanted a finite number"),
        (lambda: scores.alibi(2) + 3, TypeError, "score_mod: wanted a score"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_heads_of_the_call_must_fit():
    x = np.zeros((4, 3, 2))
    with pytest.raises(ValueError, match="alibi: slopes: wanted one entry for each of 4 query heads"):
        aa.attention(x, x, x, score_mod=scores.alibi(8))


def test_relative_bias_of_an_image_is_that_of_swin():
    """Coordinates as the paper's code makes them: shifted differences of the pixels' rows and columns."""
    height, width, heads = 3, 5, 2
    rng = np.random.default_rng(0)
    table = rng.standard_normal((heads, 2 * height - 1, 2 * width - 1))
    y, x = np.divmod(np.arange(height * width), width)
    bias = table[:, y[:, None] - y + height - 1, x[:, None] - x + width - 1]
    q, k, v = rng.standard_normal((3, 2, height * width, 4))
    found = aa.attention(q, k, v, score_mod=aa.scores.relative_bias_2d(table, width))
    np.testing.assert_allclose(found, aa.attention(q, k, v, bias=bias), rtol=1e-9)
    # Farther pixels read the edge of a smaller table.
    small = table[:, 1:-1, 2:-2]
    clipped = small[:, np.clip(y[:, None] - y, -1, 1) + 1, np.clip(x[:, None] - x, -2, 2) + 2]
    found = aa.attention(q, k, v, score_mod=aa.scores.relative_bias_2d(small, width))
    np.testing.assert_allclose(found, aa.attention(q, k, v, bias=clipped), rtol=1e-9)
    with pytest.raises(ValueError, match="relative_bias_2d: table: wanted shape"):
        aa.scores.relative_bias_2d(table[:, 1:], width)
