"""Calls of `attention` on CuPy's arrays by the front door: dispatch, plans, `CupyBackend.prepare`, launches.

Each is made twice, the second time by the plan of the first, which asks the backend nothing and copies
nothing from the host. No value on a device is read.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_posing import HostWaitsError, ndarray, pose, unpose
from cuda_standin import Standin

import anyattn as aa
from anyattn import scores
from anyattn_cupy import CupyBackend, backend

pytestmark = pytest.mark.usefixtures("nvrtc")

# (..., H, L, D) of q, k and v.
SHAPES = (2, 4, 5, 8), (2, 2, 40, 8), (2, 2, 40, 8)
ONE_QUERY = ((2, 4, 1, 8), *SHAPES[1:])
SWAPPED = (2, 5, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8)
TWO_AXES = (5, 8), (40, 8), (40, 8)


@pytest.fixture
def standin(install, monkeypatch):
    """A device whose arrays are CuPy's; only `prepare` launches what computes attention."""
    install(backend)
    found = Standin(size=1 << 22)
    pose(monkeypatch, found)
    yield found
    unpose(found)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def function(n, put):
    shown = put(numbers(7, seed=n))
    return {"mask": lambda b, h, i, j: (shown[(i + j) % 7] > -0.5) | (i == j)}


# Shapes, a dtype, and options of the n-th call: of one signature, with other arrays, which `put` places.
CALLS = {
    "plain": (SHAPES, "f4", lambda n, put: {}),
    "two axes": (TWO_AXES, "f4", lambda n, put: {"return_lse": True}),
    "float16, causal": (SHAPES, "f2", lambda n, put: {"causal": True}),
    "blhd": (SWAPPED, "f4", lambda n, put: {"layout": "blhd", "causal": True, "return_lse": True}),
    "lengths": (ONE_QUERY, "f4", lambda n, put: {"causal": True, "kv_lengths": put(np.array([7 + n, 20]))}),
    "lengths and offsets": (SHAPES, "f4", lambda n, put: {
        "causal": True, "kv_lengths": put(np.array([7, 30 + n], "u1")),
        "q_offset": put(np.array([2, 15 + n], "i4")),
    }),
    "sinks": (SHAPES, "f4", lambda n, put: {"sinks": put(np.arange(4, dtype="f2") - n)}),
    "sinks in a list": (SHAPES, "f4", lambda n, put: {"sinks": [0.0, 1.0, 2.0, 3.0], "softcap": 3.0}),
    "dropout": (SHAPES, "f4", lambda n, put: {"dropout": 0.5, "dropout_seed": put(np.array(-3 - n))}),
    "bias": (SHAPES, "f4", lambda n, put: {"bias": put(numbers(2, 4, 5, 40, seed=n))}),
    "mask": (SHAPES, "f4", lambda n, put: {"mask": put(numbers(5, 40, seed=n) > 0)}),
    "function": (SHAPES, "f4", function),
    "slopes": (SHAPES, "f4", lambda n, put: {
        "window": (9, 0), "score_mod": scores.alibi(put(numbers(4, seed=n))),
    }),
    "int8": (SHAPES, "f2", lambda n, put: {"causal": True}),
}  # fmt: skip


def arguments(name, n, put):
    """Arrays and options of the n-th call of a name; those of int8 in a cache."""
    shapes, dtype, options = CALLS[name]
    q, k, v = (put(numbers(*shape, seed=9 * n + m).astype(dtype)) for m, shape in enumerate(shapes))
    given = (q, aa.KVCache(k, v, quantize="int8")) if name == "int8" else (q, k, v)
    return given, options(n, put)


def check(found, wanted, atol):
    for x, y in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True):
        np.testing.assert_allclose(np.array(x), y, atol=atol)


@pytest.mark.parametrize("name", CALLS)
def test_second_calls_go_by_the_plan(name, standin, monkeypatch):
    given = [arguments(name, n, standin.asarray) for n in range(2)]
    for n, (tensors, options) in enumerate(given):
        copies = len(standin.arena.copies)
        found = aa.attention(*tensors, **options, backend="cupy")
        host, options = arguments(name, n, lambda x: x)
        check(
            found,
            aa.attention(*host, **options, backend="reference"),
            2e-3 if CALLS[name][1] == "f2" else 1e-5,
        )
        monkeypatch.setattr(CupyBackend, "unsupported", None)
    # A cache says how long its sequences are.
    assert len(standin.arena.copies) == copies + (name == "int8")


def test_arrays_of_another_device_are_computed_on_it(standin):
    """Not where the caller is, and each device has a module of its own."""
    for number in (1, 0):
        for name in ("lengths and offsets", "sinks", "dropout"):
            before = len(standin.launches)
            with standin.cuda.Device(number):
                tensors, options = arguments(name, number, standin.asarray)
            found = aa.attention(*tensors, **options, backend="cupy")
            assert found.number == number
            assert {x.where for x in standin.launches[before:]} == {(number, 0)}
            host, options = arguments(name, number, lambda x: x)
            check(found, aa.attention(*host, **options, backend="reference"), 1e-5)
    assert standin.where == [(0, 0)]


def test_weights_statistics_and_what_is_told_of_a_call(standin):
    with standin.cuda.Device(1):
        (q, k, _), options = arguments("lengths and offsets", 0, standin.asarray)
        rows = standin.asarray(np.array([3, 1], "i4"))
    (host_q, host_k, _), host_options = arguments("lengths and offsets", 0, lambda x: x)
    found = aa.attention_weights(q, k, rows=rows, **options, backend="cupy")
    check(found, aa.attention_weights(host_q, host_k, rows=[3, 1], **host_options), 1e-5)
    found = aa.attention_stats(q, k, **options, backend="cupy")
    for name, wanted in aa.attention_stats(host_q, host_k, **host_options).items():
        check(found[name], wanted, 1e-4)
    assert {x.where for x in standin.launches} == {(1, 0)}
    told = aa.explain(q, k, k, **options, backend="cupy")
    assert (told.backend, told.notes) == ("cupy", ())
    aa.attention(q, k, k, **options, backend="cupy")
    assert backend.source(told.call) == standin.launches[-1].source
    assert backend.kernel_key(told.call).target == "sm_80"


def test_arrays_that_pose_do_not_tell_their_values(standin):
    x = standin.asarray(np.arange(3))
    for read in (int, float, bool, ndarray.item, lambda y: list(x), lambda y: x[x > y]):
        with pytest.raises(HostWaitsError):
            read(x[1])
    with standin.cuda.Device(1), pytest.raises(ValueError, match="device 0"):
        x + 1
