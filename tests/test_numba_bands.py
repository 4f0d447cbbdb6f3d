"""Spans straight from the bounds of rows open what the mask opens; other masks are left to the search."""

from __future__ import annotations

import math

import numpy as np
import pytest

import anyattn as aa
from anyattn import masks
from anyattn.arrays import to_host
from anyattn.describe import Options, describe
from anyattn.schedule import MASKED
from anyattn.schedule.parts import parts_of

pytest.importorskip("numba", reason="numba is not installed")

from anyattn_numba.bands import band_of
from anyattn_numba.work import offsets_of, spans_of

LENGTHS = np.array([0, 9, 40, 17], "i4")

# Options of a call with 4 batch entries, 2 query heads, and the rows and keys that it is tried with.
BANDS = {
    "causal": {"causal": True},
    "causal-late": {"causal": True, "q_offset": np.array([-30, 0, 5, 100])},
    "window": {"window": (5, 2)},
    "one-sided": {"window": (None, 3)},
    "rows": {"mask": masks.sliding_window(3, 9, positions=False), "q_offset": np.array([2, 0, 1, 0])},
    "lengths": {"kv_lengths": LENGTHS},
    "all": {"causal": True, "window": (11, None), "kv_lengths": LENGTHS, "q_offset": np.array([-4, 0, 7, 3])},
    "pairs": {"mask": masks.prefix(np.array([3, 0, 41, 8])) & ~masks.causal()},
    "function": {"mask": lambda b, h, i, j: (j - 3 <= 2 * i) & ~(j < i - 6) & (j + LENGTHS[b] > 3)},
    "one-number": {"mask": lambda b, h, i, j: (-i <= 1 - j) & (j >= LENGTHS[3] - 12)},
}


def described(options, q_len, k_len, batch=(4,)):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((*batch, 2, n, 4)).astype("f4") for n in (q_len, k_len))
    return describe("attention", q, k, k, Options(**{"q_offset": 0, **options}))


def band(call, rows=16):
    return band_of(parts_of(call), rows)


def spans_of_call(call, rows):
    parts = parts_of(call)
    return spans_of(parts, band(call, rows), (), offsets_of(parts), rows)


def opened(spans, call, rows):
    """(seen, visited) of every (b, h, row, j): in a span that all rows see, in any span."""
    shape = (math.prod(call.batch_shape), call.num_heads, call.q_len, call.k_len)
    seen, visited = np.zeros(shape, int), np.zeros(shape, int)
    blocks = -(-call.q_len // rows)
    for b, h, n in np.ndindex(shape[0], shape[1], blocks):
        line = spans.groups[b, h] * blocks + n
        block = slice(n * rows, (n + 1) * rows)
        for at in range(spans.starts[line], spans.starts[line + 1]):
            low, high = spans.ends[at]
            assert 0 <= low <= high
            assert high <= call.k_len or low == high
            visited[b, h, block, low:high] += 1
            seen[b, h, block, low:high] += spans.kinds[at] & MASKED == 0
        assert spans.pairs[line] == visited[b, h, block].sum()
    return seen, visited


@pytest.mark.parametrize("kind", BANDS)
def test_spans_open_what_the_mask_opens_and_little_more(kind):
    options = {"q_offset": 0, **BANDS[kind]}
    for q_len, k_len, rows in ((1, 40, 1), (7, 43, 16), (40, 50, 16), (37, 41, 5)):
        call = described(options, q_len, k_len)
        assert band(call) is not None
        spans = spans_of_call(call, rows)
        seen, visited = opened(spans, call, rows)
        wanted = aa.attention_weights(call.q, call.k, backend="reference", **options) > 0
        assert visited.max() <= 1
        assert not wanted[visited == 0].any()
        assert wanted[seen == 1].all()
        for n in range(0, q_len, rows):
            block = (slice(None), slice(None), slice(n, n + rows))
            assert (visited[block].any(2).sum(-1) - wanted[block].any(2).sum(-1)).max() <= 14
            assert (wanted[block].all(2).sum(-1) - seen[block].all(2).sum(-1)).max() <= 14


def test_batch_entries_have_spans_of_their_own_only_where_they_differ():
    for offsets, groups in ((np.array([1, 1, 1, 1]), 1), (np.array([1, 1, 1, 2]), 4)):
        call = described({"causal": True, "q_offset": offsets}, 9, 20)
        spans = spans_of_call(call, 16)
        assert len(spans.starts) - 1 == groups
        assert np.array_equal(spans.groups[:, 1], np.arange(4) % groups)


def test_lengths_over_some_batch_axes():
    lengths = np.array([[3], [0], [12]])
    call = described({"kv_lengths": lengths}, 2, 12, batch=(2, 3, 2))
    spans = spans_of_call(call, 2)
    assert list(spans.ends[spans.groups[:, 1], 1]) == [3, 3, 0, 0, 12, 12] * 2


@pytest.mark.parametrize(
    "mask",
    [
        masks.strided(3),
        masks.causal() | masks.global_tokens(2),
        masks.documents(np.array([0] * 9 + [1] * 11)),
        masks.dense(np.ones((9, 20), bool)),
        masks.from_function(lambda b, h, i, j: j <= i + h),
        masks.from_function(lambda b, h, i, j: j <= 5 - i),
        masks.from_function(lambda b, h, i, j: 2 * j <= i),
        masks.from_function(lambda b, h, i, j: i <= 5),
        masks.from_function(lambda b, h, i, j: j * 1.0 <= i),
        masks.from_function(lambda b, h, i, j: j <= LENGTHS[i]),
        masks.from_function(lambda b, h, i, j: j <= i + 2**41),
    ],
)
def test_other_masks_are_no_bands(mask):
    assert band(described({"mask": mask}, 9, 20)) is None


def test_what_is_too_large_is_searched():
    far = np.array([0, 3, 2**45, 1])
    call = described({"causal": True, "q_offset": far}, 9, 20)
    assert band(call).spans(to_host, far) is None
    spans = spans_of_call(call, 16)
    wanted = aa.attention_weights(call.q, call.k, causal=True, q_offset=far, backend="reference") > 0
    assert (opened(spans, call, 16)[1][wanted] == 1).all()
