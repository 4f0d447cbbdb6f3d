"""Each defect that is planted in the kernels is caught by the checks of the interpreter or by the result."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_compile import need_nvrtc
from cuda_mutants import MUTANTS
from cuda_runs import Interpreted
from ptx import PtxError

import anyattn as aa
from anyattn import masks

# Of the result; the logarithm of the sum is float32 always.
TOLERANCE = {"float16": 2e-3, "float32": 3e-6}


def tensors(dtype, batch=1, q_len=70, k_len=150, heads=(2, 1)):
    """Lengths that divide nothing, and query heads that share those of the keys."""
    rng = np.random.default_rng(2)
    shapes = ((batch, heads[0], q_len, 24), (batch, heads[1], k_len, 24), (batch, heads[1], k_len, 40))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def with_nan(dtype):
    q, k, v = tensors(dtype)
    k[..., 100, 3] = v[..., 100, 3] = v[..., 149, 0] = np.nan
    return q, k, v


# Arrays and options.
CALLS = {
    "float16": lambda: (tensors("f2"), {}),
    "float16 causal": lambda: (tensors("f2"), {"causal": True}),
    "float16 bias": lambda: (
        tensors("f2"),
        {"bias": np.linspace(-1, 1, 70 * 150, dtype="f4").reshape(70, 150)},
    ),
    "float16 nan": lambda: (with_nan("f2"), {"causal": True}),
    "float16 batch": lambda: (tensors("f2", 2), {}),
    "float16 gathered": lambda: (tensors("f2"), {"mask": masks.fixed(40, 2) & masks.sliding_window(50)}),
    "float16 packed": lambda: (tensors("f2", 1, 3, 70, (6, 2)), {"causal": True}),
    "float16 parts": lambda: (tensors("f2", 2, 2, 600), {"sinks": [3.0, 4.0]}),
    "float32": lambda: (tensors("f4"), {}),
    "float32 causal": lambda: (tensors("f4"), {"causal": True}),
    "float32 sinks": lambda: (tensors("f4"), {"sinks": [0.5, -1.0]}),
    "float32 empty rows": lambda: (tensors("f4"), {"causal": True, "q_offset": -30}),
}


@pytest.fixture(scope="module")
def wanted():
    """Results of the reference in float64, by call."""
    found = {}
    for name, make in CALLS.items():
        (q, k, v), options = make()
        wide = (x.astype("f8") for x in (q, k, v))
        found[name] = aa.attention(*wide, **options, return_lse=True, backend="reference")
    return found


def complaint(change, name, wanted, install):
    """What is wrong with a call on changed kernels, in words; empty where nothing is."""
    device = Interpreted(change=change, count=True, multiprocessors=8 if "parts" in name else 1)
    install(device)
    (q, k, v), options = CALLS[name]()
    try:
        out, lse = aa.attention(q, k, v, **options, return_lse=True, backend="interpreted")
    except PtxError as error:
        return str(error)
    limits = TOLERANCE[str(q.dtype)], 3e-6
    for found, expected, limit in zip((out, lse), wanted[name], limits, strict=True):
        if not np.allclose(found, expected, rtol=limit, atol=limit, equal_nan=True):
            return "wrong result"
    for (where, space, how), traffic in device.standin.launches[0].machine.traffic.items():
        if space != "shared" or not any(
            file in where for file in ("forward_fma", "products", "tensor_cores")
        ):
            continue
        # Rows that are no power of two long do not come in without any conflict.
        if traffic.taken > traffic.least * (1 if how == "load" else 2):
            return f"bank conflicts at {where}"
    return ""


@pytest.fixture(autouse=True)
def _nvrtc():
    need_nvrtc()


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_as_they_are(name, wanted, install):
    assert complaint(lambda source: source, name, wanted, install) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_caught(mutant, wanted, install):
    planted = []

    def change(source):
        # A call in parts has two sources.
        planted.append(source.count(mutant.old))
        return source.replace(mutant.old, mutant.new)

    said = complaint(change, mutant.case, wanted, install)
    assert sum(planted) == 1, f"{mutant.old!r} occurs {sum(planted)} times"
    assert said
    assert mutant.caught in said
