"""What `prepare` keeps of a call, and what a call that is prepared still does: launches alone.

A graph that is being captured takes no copies from the host and loads no module.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cuda_runs import Interpreted, described, placed_arrays
from cuda_standin import Standin, ndarray
from ptx import Arena

import anyattn as aa
from anyattn import masks, planning, scores
from anyattn.describe import describe
from anyattn.errors import UnsupportedCallError
from anyattn.options import ARGUMENTS, Options
from anyattn.reference import backend as reference
from anyattn_cupy import launch

pytestmark = pytest.mark.usefixtures("nvrtc")


class Preparing(Interpreted):
    """All calls of a signature on one device."""

    def prepare(self, call):
        self.standin = self.make(self.capability, **self.options)
        prepared = launch.prepare(call, self.standin)

        def run(*arrays):
            out, lse = prepared(*(self.standin.asarray(x) for x in arrays))
            return np.array(out), None if lse is None else np.array(lse)

        return None if prepared is None else run


@pytest.mark.parametrize("options", [{"causal": True, "layout": "blhd"}, {"mask": masks.sliding_window(20)}])
def test_calls_of_one_signature_are_described_once(options, install, monkeypatch):
    device = Preparing(multiprocessors=8)
    install(device)
    monkeypatch.setattr(device, "run", None)
    rng = np.random.default_rng(0)
    for _ in range(2):
        q, k, v = (rng.standard_normal((2, n, 2, 12)).astype("f4") for n in (2, 300, 300))
        if "layout" not in options:
            q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))
        found = aa.attention(q, k, v, **options, return_lse=True, backend="interpreted")
        wanted = aa.attention(q, k, v, **options, return_lse=True, backend="reference")
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
    # Both in parts, whose results are merged.
    assert len(device.standin.launches) == 4


def test_what_is_prepared_serves_arrays_that_are_aligned_otherwise():
    standin = Standin()
    q, k, v = placed_arrays(standin, "float16", 5, 20, 8)
    call = described(q, k, v)
    prepared = launch.prepare(call, standin)
    wanted = np.array(prepared(q, k, v)[0])
    moved = standin.asarray(np.concatenate([np.zeros(1, "f2"), np.array(k).reshape(-1)]))
    np.testing.assert_array_equal(np.array(prepared(q, moved[1:].reshape(k.shape), v)[0]), wanted)
    vectors = ["#define VECTOR_LOADS 1" in x.source for x in standin.launches]
    assert vectors == [True, False]


@pytest.mark.parametrize("moved", [False, True])
def test_a_result_is_described_without_its_memory(moved):
    made = launch.Results((2, 4, 5, 3), moved, np.dtype("f2"), None)
    standin = Standin()
    out, _ = made.make(standin)
    assert (made.like_out.shape, made.like_out.strides) == (out.shape, out.strides)
    large = launch.Results((1 << 20, 8, 1 << 20, 128), moved, np.dtype("f2"), None)
    assert large.like_out.size == 1 << 50


# Options of two calls of one signature.
OTHERS = {
    "lengths": lambda n: {"causal": True, "kv_lengths": np.array([20 - n]), "q_offset": np.array([9 * n])},
    "bias": lambda n: {"bias": np.full((5, 20), n, "f4") * np.arange(20, dtype="f4")},
    "sinks": lambda n: {"sinks": np.array([n, 1.0 - n])},
    "slopes": lambda n: {"score_mod": scores.alibi(np.array([0.5, 0.25 * n])), "window": (9, 0)},
    "mask": lambda n: {"mask": np.arange(20) % 3 == np.array([[n]] * 5)},
    "dropout": lambda n: {"dropout": 0.5, "dropout_seed": np.array(n)},
    "scales": lambda n: dict.fromkeys(("k_scales", "v_scales"), np.full((1, 2, 20), 0.02 + 0.02 * n, "f4")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_prepared_serves_other_arrays(name, monkeypatch):
    """Nothing is kept of those of the first call, whose values the host does not know on a device."""
    standin = Standin()
    q, k, v = (x[None] for x in placed_arrays(standin, "float32", 5, 20, 8))
    if name == "scales":
        k, v = (standin.asarray(np.round(np.array(x) * 30).astype("i1")) for x in (k, v))
    with monkeypatch.context() as patch:
        patch.setattr("anyattn.arrays.is_concrete_cpu", lambda x: False)
        prepared = launch.prepare(described(q, k, v, **OTHERS[name](0)), standin)
        second = described(q, k, v, **OTHERS[name](1))
    before = standin.arena.top
    found, _ = prepared(q, k, v, *(standin.asarray(x) for x in second.others))
    wanted, _ = reference.run(described(*(np.array(x) for x in (q, k, v)), **OTHERS[name](1)))
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-5)
    assert standin.arena.top - before < 4096


class Capturing(Standin):
    """A device that copies nothing from the host and loads no module while a graph is captured."""

    def __init__(self, **options):
        super().__init__(**options)
        make = self.RawModule

        def module(**given):
            assert not self.graphs, "loads a module"
            return make(**given)

        self.RawModule = module

    def asarray(self, x):
        assert not self.graphs or isinstance(x, ndarray), "copies from the host"
        return super().asarray(x)


CAPTURED = {
    "window": {"mask": masks.sliding_window(9) | masks.global_tokens([3, 40]), "score_mod": scores.alibi(1)},
    "seed": {"causal": True, "dropout": 0.5, "dropout_seed": 3, "sinks": [0.5]},
    "lengths": {"causal": True, "kv_lengths": np.array([290, 200]), "q_offset": np.array([280, 190])},
    "a length for all": {"kv_lengths": np.array([290])},
    "an offset for all": {"causal": True, "q_offset": np.array([280])},
}


def captured(standin, name, pool=None):
    """Prepare a call, capture it, run the graph on other queries; what it gave, and the reference."""
    q, k, v = (x[:, None] for x in placed_arrays(standin, "float32", 5, 300, 8))
    call = described(q, k, v, **CAPTURED[name])
    prepared, others = launch.prepare(call, standin), [standin.asarray(x) for x in call.others]
    prepared(q, k, v, *others)
    stream = standin.cuda.Stream(non_blocking=True)
    standin.synchronize()
    with stream, standin.cuda.using_allocator((pool or standin.get_default_memory_pool()).malloc):
        stream.begin_capture()
        try:
            out, _ = prepared(q, k, v, *others)
        finally:
            graph = stream.end_capture()
        before = len(standin.launches)
        q *= 2
        graph.launch()
    # In parts, and their merge.
    assert len(standin.launches) == before + 2
    return np.array(out), reference.run(described(*(np.array(x) for x in (q, k, v)), **CAPTURED[name]))[0]


@pytest.mark.parametrize("name", ["window", "seed", "lengths"])
def test_what_is_prepared_can_be_captured(name):
    """After a first call: a replay touches no memory but that of arguments and the result."""
    np.testing.assert_allclose(*captured(Capturing(multiprocessors=8), name), atol=1e-5)


@pytest.mark.parametrize(("name", "said"), [("a length", "kv_lengths"), ("an offset", "q_offset")])
def test_what_is_converted_is_captured_with_memory_of_the_graphs_own(name, said):
    """A copy of what a kernel reads otherwise is gone before the graph runs, but for one of its own pool."""
    name, standin = f"{name} for all", Capturing(multiprocessors=8)
    with pytest.raises(UnsupportedCallError, match=f"{said} is converted in every call"):
        captured(standin, name)
    pool = standin.cuda.MemoryPool()
    np.testing.assert_allclose(*captured(standin, name, pool), atol=1e-5)
    assert pool.kept


def test_pages_of_others_are_not_read(monkeypatch):
    """The host knows which pages a sequence has, wherever the pool lies; they are read where they lie."""
    standin, rng = Standin(), np.random.default_rng(0)
    cache = aa.PagedKVCache(*(np.zeros((30, 4, 2, 8), "f4") for _ in "kv"))
    first, second = cache.add(), cache.add()
    for number, tokens in ((first, 64), (second, 50)):
        cache.append(number, *(rng.standard_normal((2, tokens, 8)).astype("f4") for _ in "kv"))
    q = rng.standard_normal((1, 2, 1, 8)).astype("f4")
    wanted = aa.attention(q, cache[[first]], backend="reference")
    pools = [standin.asarray(x) for x in (cache.k_pages, cache.v_pages)]
    for pool in pools:
        at = pool.data.ptr - Arena.BASE
        standin.arena.known[at + pool[:16].nbytes : at + pool.nbytes] = False
    monkeypatch.setattr("anyattn.arrays.is_concrete_cpu", lambda x: False)
    given = Options()
    k, v, found = cache[[first]].arguments(q, tuple(getattr(given, name) for name in ARGUMENTS))
    call = describe("attention", q, k, v, Options(**dict(zip(ARGUMENTS, found, strict=True))))
    placed = (standin.asarray(q), *(np.moveaxis(x.reshape(120, 2, 8), 1, 0) for x in pools))
    for name, x in zip("qkv", placed, strict=True):
        object.__setattr__(call, name, x)
    before = standin.arena.top
    np.testing.assert_allclose(np.array(launch.attend(call, standin)[0]), wanted, atol=1e-6)
    assert standin.arena.top - before < pools[0].nbytes


def test_lengths_on_a_device_have_a_plan():
    """The host reads none of them: they are clamped, as where a call is described."""
    call = SimpleNamespace(
        library="cupy", xp=np, kv_lengths=np.zeros(2, "i8"), offset=np.zeros(2, "i8"), q_len=1
    )
    given = {"kv_lengths": [np.array([200, 7], "u1")], "q_offset": [np.array([-30, 7], "i4")]}
    for feed, wanted in ((planning._lengths(call), [100, 7]), (planning._offset(call), [-30, 7])):
        found = feed(given, [], 100)
        assert found.dtype == np.int64
        assert found.tolist() == wanted
