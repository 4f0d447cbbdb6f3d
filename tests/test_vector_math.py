"""exp, log, tanh and sigmoid of the Numba engine against wider arithmetic.

Errors are in units in the last place of the true value. float32 is sampled over all its bit patterns and held
to float64; float64 is held to the C library's long double where that is wider. Bounds are what was measured
with and without fused multiply-add, rounded up.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="numba is not installed")

from anyattn_numba import vector_math  # noqa: E402

BOUNDS = {"exp": 1.07, "log": 0.81, "tanh": 2.5, "sigmoid": 2.33}
TRUE = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}
KINDS = [(name, dtype) for name in BOUNDS for dtype in ("float32", "float64")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "_".join(kind))
def kernel(request):
    name, dtype = request.param
    function = getattr(vector_math, f"{name}_{dtype}")

    def run(x, out):
        for n in range(len(x)):
            out[n] = function(x[n])

    array = getattr(numba.types, dtype)[::1]
    return name, np.dtype(dtype).type, numba.njit(numba.void(array, array), error_model="numpy")(run)


def values(kernel, x):
    _, dtype, run = kernel
    x = np.asarray(x, dtype)
    out = np.empty_like(x)
    run(x, out)
    return out


def sample(dtype):
    """Numbers of every size and sign, with more of the sizes that matter."""
    rng = np.random.default_rng(0)
    bits = np.uint32 if dtype is np.float32 else np.uint64
    step = 4001 if dtype is np.float32 else 2**64 // 10**6
    spread = np.arange(0, 2 ** (8 * bits().itemsize), step, dtype=np.uint64 if step > 4001 else np.int64)
    ranges = [(-1, 1), (0.5, 2), (-30, 30), (-110, 95), (-760, 720), (-1e-3, 1e-3)]
    drawn = [rng.uniform(low, high, 10**5).astype(dtype) for low, high in ranges]
    return np.concatenate([spread.astype(bits).view(dtype), *drawn])


def test_error(kernel):
    name, dtype, _ = kernel
    wide = np.float64 if dtype is np.float32 else np.longdouble
    if np.finfo(wide).nmant <= np.finfo(dtype).nmant:
        pytest.skip("long double is float64 here, and nothing is left to hold float64 to")
    with np.errstate(all="ignore"):
        x = sample(dtype)
        found = values(kernel, x)
        wanted = TRUE[name](x.astype(wide))
        rounded = wanted.astype(dtype)
        whole = np.isfinite(rounded)
        errors = np.abs(found.astype(wide) - wanted)[whole] / np.spacing(np.abs(rounded[whole])).astype(wide)
        # The largest float and infinity are neighbours.
        wrong = (found != rounded) & ~(np.isnan(found) & np.isnan(rounded)) & ~whole
    assert whole.sum() > 3 * 10**5
    worst = errors.argmax()
    assert errors[worst] < BOUNDS[name], f"{errors[worst]} at {x[whole][worst]!r}"
    np.testing.assert_array_equal(found[wrong], rounded[wrong])


def test_special_values(kernel):
    name, dtype, _ = kernel
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, 1e4, -1e4], dtype)
    nan, inf = np.nan, np.inf
    wanted = {
        "exp": [1, 1, inf, 0, nan, 1, 1, inf, 0],
        "log": [-inf, -inf, inf, nan, nan, np.log(np.longdouble(tiny)), nan, np.log(1e4), nan],
        "tanh": [0.0, -0.0, 1, -1, nan, tiny, -tiny, 1, -1],
        "sigmoid": [0.5, 0.5, 1, 0, nan, 0.5, 0.5, 1, 0],
    }[name]
    found = values(kernel, x)
    np.testing.assert_array_equal(found, np.array(wanted, dtype))
    np.testing.assert_array_equal(np.signbit(found[:2]), np.signbit(np.array(wanted[:2])))


@pytest.mark.parametrize("kernel", [("exp", "float32"), ("exp", "float64")], indirect=True)
def test_exp_ends_where_floats_end(kernel):
    _, dtype, _ = kernel
    largest, least = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    high, low = np.log(np.longdouble(largest)), np.log(np.longdouble(least) / 2)
    last, infinite, first, zero = values(
        kernel, [high * 0.99999, high * 1.00001, low * 0.99999, low * 1.00001]
    )
    assert 0.98 * largest < last < largest
    assert np.isinf(infinite)
    assert first == least
    assert zero == 0


def test_loops_become_vector_instructions_without_calls(kernel):
    _, dtype, run = kernel
    text = run.inspect_llvm(run.signatures[0])
    kind = {"float32": "float", "float64": "double"}[dtype.__name__]
    loop = text[text.index("vector.body") :]
    assert re.search(rf"fmul \w* ?<\d+ x {kind}>", loop)
    assert not re.search(r"@(exp|log|tanh)f?\b|llvm\.(exp|log|tanh)\.", text)
