"""What is kept of a first call, on other streams: the stand-in hides from them what they did not wait for."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from cuda_runs import described, placed_arrays
from cuda_standin import Standin

from anyattn import masks, scores
from anyattn.reference import backend as reference
from anyattn_cupy import exchange, launch

pytestmark = pytest.mark.usefixtures("nvrtc")

OPTIONS = {
    "mask": masks.sliding_window(9) | masks.global_tokens([3, 40]),
    "score_mod": scores.alibi(2),
}


def _prepared(standin):
    """Prepare a call; what makes one like it on the current stream, and checks what it gives."""
    q, k, v = placed_arrays(standin, "float32", 5, 60, 8)
    call = described(q, k, v, **OPTIONS)
    wanted, _ = reference.run(described(*(np.array(x) for x in (q, k, v)), **OPTIONS))
    prepared = launch.prepare(call, standin)

    def again():
        given = placed_arrays(standin, "float32", 5, 60, 8)
        others = [standin.asarray(np.array(x)) for x in call.others]
        out, _ = prepared(*given, *others)

        def check():
            np.testing.assert_allclose(np.array(out), wanted, atol=1e-6)

        # What is captured has run when its graph has, and reads all that the call was given.
        check.given = given, others
        return check

    return again


def test_each_stream_waits_for_what_another_copies(monkeypatch):
    monkeypatch.setattr(exchange, "_held", deque())
    standin = Standin()
    again = _prepared(standin)
    again()()
    assert not exchange._held
    with standin.cuda.Stream.at(7):
        again()()
        waited = len(standin.events)
        # Of the schedule and of what the program reads: memory that this stream has yet to copy.
        assert len(exchange._held) == 2
        again()()
    assert len(standin.events) == waited
    assert [launched.where for launched in standin.launches] == [(0, 0), (0, 7), (0, 7)]


def test_a_captured_stream_reads_what_another_copied():
    """It can wait for nothing outside of its graph; the host has waited before."""
    standin = Standin()
    again = _prepared(standin)
    again()()
    standin.synchronize()
    made, copies = len(standin.events), standin.arena.copies
    stream = standin.cuda.Stream.at(7)
    with stream:
        stream.begin_capture()
        check = again()
        stream.end_capture().launch()
        check()
    assert len(standin.events) == made
    assert all(seen == {(0, 7)} for _, seen in copies)
