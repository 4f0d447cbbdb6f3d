"""Weights and statistics of the Numba engine where the conformance cases do not lead: sizes, threads, memory.

Expected values are those of the reference backend, which the same cases hold to the oracle.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import anyattn as aa
from anyattn import masks
from anyattn.describe import Options, describe

pytest.importorskip("numba", reason="numba is not installed")

from anyattn_numba import arguments as a
from anyattn_numba import inspect_engine
from anyattn_numba.kernels import shape_for
from anyattn_numba.template import Template

ALL = ("key_mass", "entropy", "max")
WINDOW_AND_COLUMNS = masks.sliding_window(100) & ~masks.prefix(7) | masks.global_tokens([5, 1000])


def drawn(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_near(found, wanted, bound=3e-6):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    size = max(1.0, np.nanmax(np.abs(wanted)))
    assert np.nanmax(np.abs(found - wanted)) <= bound * size


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": WINDOW_AND_COLUMNS}], ids=str)
def test_rows_of_one_head_are_added_up_by_several_threads_in_one_order(threads, options):
    q, k = drawn(1, 1100, 16, seed=1), drawn(1, 1037, 16, seed=2)
    wanted = aa.attention_stats(q, k, stats=ALL, backend="reference", **options)
    with aa.use(threads=threads, backend="numba"):
        found = aa.attention_stats(q, k, stats=ALL, **options)
        again = [aa.attention_stats(q, k, stats=ALL, **options) for _ in range(5)]
    for name in ALL:
        assert_near(found[name], wanted[name], 1e-5)
        assert all(np.array_equal(found[name], other[name]) for other in again)


@pytest.mark.parametrize(
    ("batch", "heads", "q_len", "threads", "parts"),
    [(1, 1, 1100, 2, 8), (1, 3, 1100, 2, 3), (2, 4, 1100, 2, 1), (1, 1, 1100, 1, 1), (1, 1, 20, 2, 8)],
)
def test_runs_take_every_item_once_and_those_with_most_keys_first(batch, heads, q_len, threads, parts):
    q, k = drawn(batch, heads, q_len, 8), drawn(batch, heads, q_len, 8)
    call = describe("stats", q, k, None, Options(causal=True, stats=ALL))
    # The register tile differs between processors, and with it the number of items of a head.
    work = Template(call, shape_for(call.accumulate), {"Q": q, "K": k}, lasting=False).case((), 1).work
    work, runs, found = inspect_engine._runs(call, work, threads)
    assert found == min(parts, len(work.items) // (batch * heads))
    assert sorted(runs[:, a.RUN_ROW // 8]) == list(range(batch * heads * found))
    taken = [n for first, end, _ in runs for n in range(first, end)]
    assert sorted(taken) == list(range(len(work.items)))
    pairs = work.spans.pairs[work.items[:, a.ITEM_LINE // 8]]
    costs = [pairs[first:end].sum() for first, end, _ in runs]
    assert costs == sorted(costs, reverse=True)
    for first, end, row in runs:
        group = q_len * (heads // call.num_kv_heads)
        where = work.items[first:end]
        head = where[:, a.ITEM_HEAD // 8] + where[:, a.ITEM_FIRST // 8] // group
        assert set(where[:, a.ITEM_BATCH // 8] * heads + head) == {row // found}


def test_statistics_hold_no_weights():
    q, k = drawn(1, 8192, 8, seed=1), drawn(1, 8192, 8, seed=2)
    with aa.use(threads=2, backend="numba"):
        aa.attention_stats(q[:, :64], k[:, :64], stats=ALL)
        tracemalloc.start()
        try:
            found = aa.attention_stats(q, k, stats=ALL)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # The weights would be 268 MB. There are 8 rows of key_mass here, and room for each of two threads.
    assert peak < 2e6
    assert abs(found["key_mass"].sum() - 8192) < 0.1


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": WINDOW_AND_COLUMNS}], ids=str)
@pytest.mark.parametrize("rows", [[19999], [70, 3, 19990, 3, 12345]], ids=len)
def test_rows_of_a_long_sequence(rows, options):
    q, k = drawn(4, 20000, 8, seed=1), drawn(2, 20000, 8, seed=2)
    found = aa.attention_weights(q, k, rows=rows, backend="numba", **options)
    assert_near(found, aa.attention_weights(q, k, rows=rows, backend="reference", **options))
    assert "causal" not in options or not found[:, 0, rows[0] + 1 :].any()


def test_a_row_of_nan_hides_what_it_does_not_see_in_gathered_columns_too():
    q, k = drawn(2, 300, 16, seed=1), drawn(2, 310, 16, seed=2)
    q[0, 77] = np.nan
    k[1, 50] = np.inf
    mask = masks.strided(29) | masks.sliding_window(3)
    wanted = aa.attention_weights(q, k, mask=mask, backend="reference")
    assert np.isnan(wanted).any()
    assert (wanted[0, 77] == 0).any()
    assert_near(aa.attention_weights(q, k, mask=mask, backend="numba"), wanted)
    wanted = aa.attention_stats(q, k, stats=ALL, mask=mask, backend="reference")
    found = aa.attention_stats(q, k, stats=ALL, mask=mask, backend="numba")
    assert not np.isnan(wanted["key_mass"]).all()
    for name in ALL:
        assert_near(found[name], wanted[name], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_entropy_of_certain_and_of_even_weights(dtype):
    k = np.eye(48, dtype=dtype)
    q = 1e4 * np.stack([k[7], 0 * k[7]])
    found = aa.attention_stats(q, k, stats=("entropy", "max"), scale=1.0, backend="numba")
    assert found["entropy"][0] == 0
    assert found["max"][0] == 1
    assert abs(found["entropy"][1] - np.log(48)) <= 20 * np.finfo(dtype).eps
