"""What `anyattn check` does on a device with streams and graphs, on a stand-in for one."""

from __future__ import annotations

from operator import imul

import numpy as np
import pytest
from cuda_runs import described
from cuda_standin import Standin

from anyattn.check import device
from anyattn.errors import UnsupportedCallError
from anyattn_cupy import capture, launch

pytestmark = pytest.mark.usefixtures("nvrtc")


SIZES = 20, 300


@pytest.fixture
def standin():
    return Standin(size=1 << 25, multiprocessors=16)


def attention_on(standin):
    """`attention` of arrays of the stand-in: described once for each kind of call."""
    known = {}

    def attention(*given, **options):
        arrays = {name: x for name, x in options.items() if isinstance(x, standin.ndarray)}
        key = (given[0].shape, str(given[0].dtype), *options)
        if key not in known:
            host = {name: np.array(x) for name, x in arrays.items()}
            call = described(*given, **(options | host))
            own = [standin.asarray(np.array(x)) for x in call.others if id(x) != id(call.kv_lengths)]
            known[key] = launch.prepare(call, standin), own
        prepared, own = known[key]
        for name, x in arrays.items():
            capture.refuse_converted(name, x, standin)
        return prepared(*given, *arrays.values(), *own)[0]

    return attention


def test_two_streams(standin):
    device.two_streams(attention_on(standin), standin, rows=20, busy=8)
    # The streams that it makes, in turn, and none beside.
    streams = [one.where[1] for one in standin.launches]
    assert streams == [streams[0], streams[1], streams[0]]
    assert len(set(streams) | {0}) == 3


def test_larger_sizes(standin):
    device.larger_sizes(attention_on(standin), standin, dims=(24,), keys=70)
    # Of three dtypes, many queries and one.
    assert len(standin.launches) == 6
    attention = attention_on(standin)
    with pytest.raises(AssertionError, match="float16, 24 channels, 150 queries: the result is off by"):
        device.larger_sizes(lambda q, *x, **options: attention(imul(q, 2), *x, **options), standin, (24,), 70)


def test_another_device(standin):
    assert device.another_device(attention_on(standin), standin) == "there is one device"


def test_captured_graphs(standin):
    device.captured_graphs(attention_on(standin), standin, *SIZES)


def stale(standin):
    """What a graph gives if it is captured on copies of its arguments."""
    attention = attention_on(standin)
    return lambda *given, **options: attention(*(x.copy() for x in given), **options)


def unkept(standin):
    """What is captured writes to memory that nobody keeps."""
    attention = attention_on(standin)
    return lambda *given, **options: attention(*given, **options).copy()


@pytest.mark.parametrize("wrong", [stale, unkept])
def test_graphs_that_are_wrong(wrong, standin):
    with pytest.raises((AssertionError, ValueError, RuntimeError), match=r"off by|global memory|written"):
        device.captured_graphs(wrong(standin), standin, *SIZES)


def test_lengths_that_are_not_refused(standin, monkeypatch):
    monkeypatch.setattr(capture, "refuse_converted", lambda *_: None)
    with pytest.raises(AssertionError, match="memory that it has given back"):
        device.captured_graphs(attention_on(standin), standin, *SIZES)


def test_only_prepared_calls_are_captured():
    standin = Standin()
    capture.refuse_described("attention", standin)
    stream = standin.cuda.Stream()
    with stream:
        stream.begin_capture()
        for operation, said in (("attention", "first call of a kind"), ("stats", "operation 'stats'")):
            with pytest.raises(UnsupportedCallError, match=said):
                capture.refuse_described(operation, standin)
        with pytest.raises(UnsupportedCallError, match=r"dropout_seed: .* 3, which the host copies"):
            capture.refuse_converted("dropout_seed", 3, standin)
