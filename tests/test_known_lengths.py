"""Lengths that the host has: schedules leave out the same tiles wherever the arrays lie."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn.describe import describe
from anyattn.options import ARGUMENTS, Options
from anyattn.schedule import schedule
from anyattn.varlen import packed_options


def _packed():
    q, k, v = (np.zeros((n, 2, 4), "f4") for n in (40, 60, 60))
    return q, k, v, packed_options(q, k, v, [0, 7, 30, 40], [0, 20, 50, 60], causal=True, window=None,
                                   mask=None, score_mod=None)  # fmt: skip


def _ring():
    cache = aa.KVCache(*np.zeros((2, 2, 2, 3, 4), "f4"), window=40, sink_tokens=2)
    cache.append(*np.zeros((2, 2, 2, 30, 4), "f4"), lengths=[2, 30])
    q, given = np.zeros((2, 2, 3, 4), "f4"), Options()
    k, v, found = cache.arguments(q, tuple(getattr(given, name) for name in ARGUMENTS))
    return q, k, v, dict(zip(ARGUMENTS, found, strict=True))


@pytest.mark.parametrize("make", [_packed, _ring])
def test_tiles_that_nobody_sees_are_left_out(make, monkeypatch):
    def spans():
        q, k, v, options = make()
        made = schedule(describe("attention", q, k, v, Options(**options)), rows=8, keys=8)
        found = made.spans
        return found.starts.tolist(), found.ends.tolist(), found.kinds.tolist()

    wanted = spans()
    monkeypatch.setattr("anyattn.arrays.is_concrete_cpu", lambda x: False)
    found = spans()
    assert found == wanted
    assert len(set(found[2])) > 1
