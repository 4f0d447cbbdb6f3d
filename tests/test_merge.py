"""Partial results over disjoint keys join to the result over all of them."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, 3, n, 4)) for n in (5, 11, 11))


def part(keys, **options):
    return aa.attention(Q, K[:, :, keys], V[:, :, keys], return_lse=True, **options)


def test_three_parts():
    parts = [part(slice(0, 4)), part(slice(4, 5)), part(slice(5, 11))]
    out, lse = aa.merge(*zip(*parts, strict=True))
    wanted, wanted_lse = part(slice(None))
    np.testing.assert_allclose(out, wanted, rtol=1e-12)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-13)


def test_sinks_in_one_part_only():
    sinks = [0.3, -1.0, 2.0]
    out, lse = aa.merge(*zip(part(slice(0, 4), sinks=sinks), part(slice(4, 11)), strict=True))
    wanted, wanted_lse = part(slice(None), sinks=sinks)
    np.testing.assert_allclose(out, wanted, rtol=1e-12)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-13)


def test_the_identity_changes_nothing():
    out, lse = part(slice(None))
    merged, merged_lse = aa.merge([np.zeros_like(out), out], [np.full_like(lse, -np.inf), lse])
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(merged_lse, lse)


def test_nothing_but_identities_gives_the_identity():
    zero, lowest = np.zeros((3, 5, 4)), np.full((3, 5), -np.inf)
    out, lse = aa.merge([zero, zero], [lowest, lowest])
    np.testing.assert_array_equal(out, zero)
    np.testing.assert_array_equal(lse, lowest)


def test_a_part_without_weight_may_hold_anything():
    out, lse = part(slice(None))
    merged, _ = aa.merge([np.full_like(out, np.nan), out], [np.full_like(lse, -np.inf), lse])
    np.testing.assert_array_equal(merged, out)


def test_nan_and_infinity_are_not_hidden():
    out, lse = part(slice(None))
    for bad in (np.nan, np.inf):
        merged, merged_lse = aa.merge([out, out], [lse, np.full_like(lse, bad)])
        assert np.isnan(merged).all()
        assert not np.isfinite(merged_lse).any()


def test_large_logs_do_not_overflow():
    ones = np.ones((1, 2, 3), dtype="f4")
    high = np.full((1, 2), 3e38, dtype="f4")
    out, lse = aa.merge([ones, 3 * ones], [high, high])
    np.testing.assert_array_equal(out, 2 * ones)
    np.testing.assert_array_equal(lse, high)


def test_the_other_layout_and_no_heads():
    turned = [x.swapaxes(1, 2) for x in (Q, K, V)]
    whole = aa.attention(*turned, layout="blhd")
    first, second = (
        aa.attention(turned[0], turned[1][:, s], turned[2][:, s], layout="blhd", return_lse=True)
        for s in (slice(0, 6), slice(6, 11))
    )
    out, _ = aa.merge(*zip(first, second, strict=True), layout="blhd")
    np.testing.assert_allclose(out, whole, rtol=1e-13)
    first, second = (
        aa.attention(Q[0, 0], K[0, 0, s], V[0, 0, s], return_lse=True) for s in (slice(0, 6), slice(6, 11))
    )
    out, lse = aa.merge(*zip(first, second, strict=True))
    np.testing.assert_allclose(out, aa.attention(Q[0, 0], K[0, 0], V[0, 0]), rtol=1e-13)
    assert lse.shape == (5,)


def test_half_precision_stays_half():
    halves = [x.astype("f2") for x in (Q, K, V)]
    out, lse = aa.attention(*halves, return_lse=True)
    merged, merged_lse = aa.merge([out], [lse])
    assert (merged.dtype, merged_lse.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(merged, out)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "at least one part"),
        ([np.ones((2, 3))], [], ValueError, "one lse a part"),
        ([np.ones((2, 3))], [np.ones(3)], ValueError, r"lses: wanted shape \(2,\)"),
        ([np.ones((2, 3)), np.ones((2, 4))], [np.ones(2)] * 2, ValueError, "outs: wanted one shape"),
        ([np.ones((2, 3)), np.ones((2, 3), "f4")], [np.ones(2)] * 2, TypeError, "outs: wanted one dtype"),
        ([[1.0]], [np.ones(2)], TypeError, "outs: wanted float arrays"),
    ],
)
def test_refusals(outs, lses, error, message):
    with pytest.raises(error, match=message):
        aa.merge(outs, lses)
