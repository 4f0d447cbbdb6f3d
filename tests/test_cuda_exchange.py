"""Arrays of torch and JAX on the `cupy` backend: where it launches, and what it hands back.

There is no device: arrays, both libraries and CuPy are stand-ins, kernels run on the PTX interpreter.
"""

from __future__ import annotations

import sys
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_compile import need_nvrtc
from cuda_standin import Standin

import anyattn as aa
from anyattn.describe import Options, describe
from anyattn.linear.describe import LinearOptions
from anyattn.linear.describe import describe as describe_linear
from anyattn_cupy import backend, devices, exchange

STREAM = 0xABC0


class Foreign:
    """An array of another library over memory of the stand-in, which notes the streams it is asked for."""

    def __init__(self, memory, number=1):
        self.memory = memory
        self.number = number
        self.asked = []
        self.detached = False
        self.shape, self.ndim, self.dtype = memory.shape, memory.ndim, memory.dtype
        self.device = SimpleNamespace(type="cuda", index=number)

    def __dlpack_device__(self):
        return 2, self.number

    def __dlpack__(self, *, stream):
        if isinstance(self, Tensor) and not self.detached:
            raise BufferError("Can't export tensors that require gradient")
        self.asked.append(stream)
        return self.memory

    def detach(self):
        found = copy(self)
        found.detached = True
        return found

    def is_neg(self):
        return False


Tensor = type("Tensor", (Foreign,), {"__module__": "torch"})
ArrayImpl = type("ArrayImpl", (Foreign,), {"__module__": "jaxlib._jax"})


@pytest.fixture
def standin(monkeypatch):
    """CuPy, torch and JAX as far as they are used."""
    need_nvrtc()
    found = Standin()
    current = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(cuda_stream=STREAM + device.index)
    )
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=current, from_dlpack=Tensor))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(dlpack=SimpleNamespace(from_dlpack=ArrayImpl)))
    monkeypatch.setattr(exchange, "_held", type(exchange._held)())
    return found


def described(standin, kind, operation="attention", batch=(), **options):
    """A call with foreign arrays, and the same with those of NumPy."""
    rng = np.random.default_rng(0)
    host = [rng.standard_normal((*batch, 2, n, 8)).astype("f4") for n in (5, 20, 20)]
    if operation != "attention":
        host[2] = None
    call = describe(operation, *host, Options(**options))
    foreign = [None if x is None else kind(standin.asarray(x)) for x in host]
    library = {Tensor: "torch", ArrayImpl: "jax"}[kind]
    for name, x in zip("qkv", foreign, strict=True):
        object.__setattr__(call, name, x)
    object.__setattr__(call, "library", library)
    return call, host


@pytest.mark.parametrize(("kind", "stream"), [(Tensor, STREAM + 1), (ArrayImpl, 0)])
def test_launches_where_the_caller_computes(kind, stream, standin):
    call, host = described(standin, kind, causal=True, return_lse=True)
    found = backend.run(call)
    assert [launch.where for launch in standin.launches] == [(1, stream)]
    assert standin.where == [(0, 0)]
    # 1 is the default stream in the words of the protocol.
    assert [x.asked for x in (call.q, call.k, call.v)] == [[stream or 1]] * 3
    wanted = aa.attention(*host, causal=True, return_lse=True, backend="reference")
    for x, y in zip(found, wanted, strict=True):
        assert type(x) is kind
        np.testing.assert_allclose(np.array(x.memory), y, atol=1e-6)


@pytest.mark.parametrize("kind", [Tensor, ArrayImpl])
def test_weights_and_statistics(kind, standin):
    call, host = described(standin, kind, "weights", rows=[3, 1])
    np.testing.assert_allclose(
        np.array(backend.run(call).memory), aa.attention_weights(*host[:2], rows=[3, 1]), atol=1e-6
    )
    call, host = described(standin, kind, "stats", stats=("max",))
    found = backend.run(call)["max"]
    assert type(found) is kind
    np.testing.assert_allclose(
        np.array(found.memory), aa.attention_stats(*host[:2], stats=("max",))["max"], atol=1e-6
    )


def test_arrays_of_jax_are_held_until_what_reads_them_has_run(standin):
    """JAX knows nothing of a kernel on CuPy's stream, and would give the memory to others."""
    calls = [described(standin, ArrayImpl)[0] for _ in range(3)]
    for call in calls[:2]:
        backend.run(call)
    assert len(exchange._held) == 2
    assert all(not event.timed for event in standin.events)
    standin.events[0].done = True
    backend.run(calls[2])
    assert len(exchange._held) == 2
    held = [x for _, arrays in exchange._held for x in arrays]
    assert any(x is calls[1].q.memory for x in held)
    assert not any(x is calls[0].q.memory for x in held)
    for event in standin.events:
        event.done = True
    # Whoever calls next lets go of what a loop has left behind.
    backend.run(described(standin, Tensor)[0])
    assert not exchange._held


def test_arrays_of_jax_are_held_until_copies_of_them_are_made(standin):
    """Kernels read sinks, offsets and rows in their own types: the copy has not run when the call returns."""
    lengths = np.array([7, 20], np.int32)
    options = {"causal": True, "kv_lengths": lengths, "q_offset": lengths - 5, "sinks": np.zeros(2, "f4")}
    rows = np.array([3, 1], np.int32)
    for operation, names in (("attention", ("sinks", "offset")), ("weights", ("sinks", "offset", "rows"))):
        chosen = {"rows": rows} if operation == "weights" else {}
        call, host = described(standin, ArrayImpl, operation, (2,), **options, **chosen)
        given = {name: ArrayImpl(standin.asarray(getattr(call, name))) for name in names}
        for name, x in given.items():
            object.__setattr__(call, name, x)
        found = backend.run(call)
        _, held = exchange._held[-1]
        assert [name for name, x in given.items() if not any(y is x.memory for y in held)] == []
        if operation == "weights":
            wanted = aa.attention_weights(*host[:2], **options, rows=rows)
            np.testing.assert_allclose(np.array(found.memory), wanted, atol=1e-6)


def test_torch_orders_its_memory_itself(standin):
    backend.run(described(standin, Tensor)[0])
    assert not exchange._held


def test_results_for_jax_have_the_order_of_their_axes(standin):
    for kind, contiguous in ((ArrayImpl, True), (Tensor, False)):
        call, _ = described(standin, kind)
        object.__setattr__(call, "layout", "blhd")
        assert backend.run(call)[0].memory.flags.c_contiguous == contiguous


def refused(call, monkeypatch, **changes):
    """Reasons against a call of CUDA arrays, changed so, where there is a device."""
    monkeypatch.setattr(devices, "absent", lambda: None)
    names = {"torch": "torch.Tensor", "jax": "jax.Array"}
    for name, value in {"device_kind": "cuda", "array_type": names[call.library], **changes}.items():
        object.__setattr__(call, name, value)
    return backend.unsupported(call)


def test_what_is_refused_says_why(standin, monkeypatch):
    for array in (Tensor, ArrayImpl):
        monkeypatch.setattr(array, "sharding", SimpleNamespace(device_set={0}), raising=False)
        assert refused(described(standin, array)[0], monkeypatch) == ()
    call = described(standin, ArrayImpl)[0]
    reasons = refused(call, monkeypatch, features=frozenset({"traced"}), device_kind="unknown")
    assert any("jit" in reason and "stream" in reason for reason in reasons)
    monkeypatch.setattr(ArrayImpl, "sharding", SimpleNamespace(device_set={0, 1}))
    [reason] = refused(described(standin, ArrayImpl)[0], monkeypatch)
    assert reason == "takes arrays on one device, not spread over 2"
    monkeypatch.setattr(Tensor, "is_neg", lambda self: True)
    [reason] = refused(described(standin, Tensor)[0], monkeypatch)
    assert "resolve_neg" in reason
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", Standin(capability=61))
    [reason] = refused(described(standin, Tensor)[0], monkeypatch)
    assert reason == "wants compute capability 7.0, and device 1 has 6.1"


def test_gradients_are_refused(standin, monkeypatch):
    reasons = refused(described(standin, Tensor)[0], monkeypatch, features=frozenset({"gradients"}))
    assert any("gradients" in reason for reason in reasons)


@pytest.mark.parametrize(("kind", "stream"), [(Tensor, STREAM + 1), (ArrayImpl, 0)])
def test_linear_attention(kind, stream, standin, monkeypatch):
    rng = np.random.default_rng(0)
    host = [rng.standard_normal((2, 12, 8)).astype("f4") for _ in range(3)]
    options = {
        "rule": "gated_delta",
        "decay": -rng.uniform(0, 1, (2, 12)).astype("f4"),
        "beta": rng.uniform(0, 0.2, (2, 12)).astype("f4"),
        "state": rng.standard_normal((2, 8, 8)).astype("f4"),
        "cu_seqlens": np.array([0, 5, 12], np.int32),
    }
    call = describe_linear(*host, LinearOptions(**options))
    arrays = {
        name: kind(standin.asarray(getattr(call, name))) for name in ("q", "k", "v", *list(options)[1:])
    }
    for name, x in (arrays | {"library": {Tensor: "torch", ArrayImpl: "jax"}[kind]}).items():
        object.__setattr__(call, name, x)
    found = backend.run(call)
    assert [launch.where for launch in standin.launches] == [(1, stream)]
    wanted = aa.linear_attention(*host, **options, return_state=True, backend="reference")
    for x, y in zip(found, wanted, strict=False):
        assert type(x) is kind
        np.testing.assert_allclose(np.array(x.memory), y, atol=1e-5)
    assert found[2] is None
    if kind is ArrayImpl:
        held = exchange._held[-1][1]
        missing = [n for n, x in arrays.items() if not any(np.shares_memory(x.memory, y) for y in held)]
        assert missing == []
    else:
        assert refused(call, monkeypatch) == ()
        monkeypatch.setattr(arrays["beta"], "is_neg", lambda: True)
        [reason] = refused(call, monkeypatch)
        assert "resolve_neg" in reason
