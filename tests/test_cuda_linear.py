"""Linear attention on CUDA, compiled by NVRTC and run by its launch code on the PTX interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_linear_kernels import RULES, chosen
from cuda_runs import Interpreted
from cuda_standin import SHARED_MEMORY, Standin

import anyattn as aa
from anyattn.linear.describe import LinearOptions, describe
from anyattn.testing.case import Drawn, call
from anyattn.testing.cases import all_cases
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_values
from anyattn_cupy import linear_launch, linear_variants
from anyattn_cupy.linear_variants import parts_of
from anyattn_cupy.variants import Device

pytestmark = pytest.mark.usefixtures("nvrtc")

# Of the conformance kit's family "linear": each rule and dtype, and what is easily got wrong.
KIT = (
    "rule linear, bfloat16",
    "rule gated, float16",
    "rule delta, float64",
    "rule gated_delta, float32",
    "gated_delta, 0 tokens",
    "gated_delta, 67 tokens",
    "one token without a state",
    "performer, normalised",
    "elu+1, gated, float16, state and normalizer",
    "relu, a query without features",
    "softmax, delta",
    "both ways, more keys than queries, normalised",
    "both ways, no tokens",
    "blhd",
    "two axes, a decay a token",
    "batch axes that broadcast",
    "no heads",
    "reversed arrays",
    "transposed arrays",
    "packed, gated_delta",
    "packed, both ways, two axes",
    "gated_delta, decays that forget at once",
    "decay and beta of other dtypes",
)
CASES = {c.name.removeprefix("linear: "): c for c in all_cases() if c.operation == "linear"}


def case(name, rule, length, dim, v_dim, *, heads=2, kv_heads=1, each_channel=True, **options):
    """A call with what its rule needs."""
    if "gated" in rule:
        channels = (dim,) if each_channel else ()
        options["decay"] = Drawn("decay", (kv_heads, length, *channels), how="decays")
    if "delta" in rule:
        options["beta"] = Drawn("beta", (kv_heads, length), how="positive")
    return call(
        name, "cuda", "linear", operation="linear", rule=rule, q_len=length, k_len=length, dim=dim,
        v_dim=v_dim, heads=heads, kv_heads=kv_heads, return_state=True,
        recipes={"k": "unit"} if "delta" in rule else None, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", KIT)
def test_conformance(name, interpreted):
    check_values(CASES[name], LIBRARIES["numpy"], "interpreted")


@pytest.mark.parametrize("one", [
    case("float16, whole tiles", "gated_delta", 40, 64, 64, dtype="float16"),
    case("bfloat16, an odd width", "gated", 40, 33, 67, dtype="bfloat16", feature_map="elu+1",
         normalize=True),
    case("float64, some columns", "delta", 20, 40, 70, dtype="float64"),
    case("more channels than shared memory holds", "gated_delta", 9, 259, 5, each_channel=False),
    case("a step of decoding, bfloat16", "gated_delta", 1, 64, 64, dtype="bfloat16",
         state=Drawn("state", (1, 64, 64), "float32")),
], ids=lambda c: c.name)  # fmt: skip
def test_sizes(one, interpreted):
    check_values(one, LIBRARIES["numpy"], "interpreted")
    [launch] = interpreted.standin.launches
    assert ("#define WIDE 1" in launch.source) == (one.q[-1] > 256)
    assert ("#define BLOCK_ROWS 16" in launch.source) == (one.q[-2] <= 16 or one.q[-1] > 256)


@pytest.mark.parametrize("one", [
    case("linear", "linear", 90, 8, 5),
    call("both ways, other rows than keys", "cuda", "linear", operation="linear", rule="linear", causal=False,
         q_len=50, k_len=90, dim=8, v_dim=5, heads=2, kv_heads=1, return_state=True, feature_map="elu+1",
         normalize=True),
    case("gated, normalised", "gated", 90, 8, 5, feature_map="elu+1", normalize=True,
         state=(Drawn("state", (1, 8, 5), "float32"), Drawn("z", (1, 8), "float32", "positive"))),
], ids=lambda c: c.name)  # fmt: skip
def test_long_sequences_of_few_heads_run_in_parts(one, install, monkeypatch):
    monkeypatch.setattr(linear_variants, "_LEAST_CHUNKS", 1)
    device = Interpreted(multiprocessors=8)
    install(device)
    check_values(one, LIBRARIES["numpy"], "interpreted")
    first, join, second = device.standin.launches
    assert first.grid == second.grid == (3, 1)
    assert "linear_join.cu" in join.source


def test_parts_are_made_where_they_help():
    device = Device(80, SHARED_MEMORY[80], 108)
    variant = chosen("float32", 64, 64)
    assert parts_of(device, variant, 8, 65536) == 27
    assert parts_of(device, variant, 8, 1000) == 4
    assert parts_of(device, variant, 100, 65536) == 1
    for name in ("delta", "wide"):
        assert parts_of(device, replace(variant, **{name: True}), 8, 65536) == 1


def test_tiles_fit_every_device():
    for capability, room in SHARED_MEMORY.items():
        for dtype in ("float16", "float32", "float64"):
            for dim in (1, 64, 128, 256, 257, 2000):
                for rule in RULES:
                    found = chosen(dtype, dim, 64, rule=rule, capability=capability)
                    assert found.shared_memory <= room
                    assert found.wide == (found.head_dim < dim)
    assert not chosen("float32", 256, 64, rule="gated, a decay a channel").wide
    assert chosen("float32", 64, 64).columns == 64
    assert chosen("float32", 64, 64, multiprocessors=4).columns == 32
    assert chosen("float32", 64, 64, length=16).rows == 16


def given(rule, length=40, dim=5, v_dim=3):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, n)).astype("f4") for n in (dim, dim, v_dim))
    options = {"rule": rule}
    if "gated" in rule:
        options["decay"] = -rng.uniform(0.01, 0.5, k.shape).astype("f4")
    if "delta" in rule:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        options["beta"] = rng.uniform(0, 1, k.shape[:2]).astype("f4")
    return q, k, v, options


def test_what_comes_later_does_not_matter_even_if_it_is_not_finite(interpreted):
    q, k, v, options = given("gated_delta")
    clean = aa.linear_attention(q, k, v, **options, backend="interpreted")
    k[0, 36], v[1, 35, 1] = np.nan, np.inf
    out = aa.linear_attention(q, k, v, **options, backend="interpreted")
    np.testing.assert_array_equal(out[0, :36], clean[0, :36])
    np.testing.assert_array_equal(out[1, :35], clean[1, :35])
    assert not np.isfinite(out[0, 36:]).any()


def test_decays_keep_their_digits_beside_large_ones(interpreted):
    """A quotient of cumulated decays would lose what lies 1e5 below, or be 0 / 0."""
    q, k, v, options = given("gated", length=64)
    options["decay"][:, 3::7] = -3e4
    out = aa.linear_attention(q, k, v, **options, backend="interpreted")
    wide = {"rule": "gated", "decay": options["decay"].astype("f8")}
    wanted = aa.linear_attention(*(x.astype("f8") for x in (q, k, v)), **wide, backend="reference")
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6)


def test_bounds_that_nobody_has_read_stay_inside_the_arrays():
    q, k, v, options = given("linear", length=20)
    standin = Standin()
    one = describe(q, k, v, LinearOptions(**options, cu_seqlens=[0, 5, 20]))
    object.__setattr__(one, "cu_seqlens", np.array([-7, 25, 3]))
    out, state, _ = linear_launch.linear(one, standin)
    whole, last, _ = linear_launch.linear(describe(q, k, v, LinearOptions(**options)), Standin())
    np.testing.assert_array_equal(np.array(out), np.array(whole))
    np.testing.assert_array_equal(np.array(state)[0], np.array(last))
    assert not np.array(state)[1].any()


def test_no_bank_conflicts_and_no_sector_too_many():
    q, k, v, options = given("gated_delta", length=33, dim=64, v_dim=64)
    standin = Standin(count=True)
    linear_launch.linear(describe(q, k, v, LinearOptions(**options)), standin)
    traffic = standin.launches[0].machine.traffic
    shared = [t for (_, space, _), t in traffic.items() if space == "shared"]
    assert len(shared) > 25
    assert all(t.taken == t.least for t in shared)
    read = [t for at, t in traffic.items() if at[1:] == ("global", "load") and t.requests > 64]
    assert read
    assert all(t.taken == t.least for t in read)


def test_it_says_what_it_holds(interpreted):
    q, k, v, _ = given("linear", length=4)
    softmax = aa.explain(q, k, v, rule="linear", feature_map="softmax", backend="interpreted")
    assert softmax.notes == ("holds features of q and k of all tokens in float32",)
    assert aa.explain(q, k, v, rule="linear", feature_map="relu", backend="interpreted").notes == ()
    q, k, v, _ = given("linear", length=4, dim=300)
    assert aa.explain(q, k, v, rule="linear", backend="interpreted").notes == (
        "a chunk holds 64 of D = 300 channels at a time, and the state comes from global memory for each",
    )
    half = (x.astype("f2") for x in given("linear", length=4)[:3])
    assert aa.explain(*half, rule="linear", backend="interpreted").notes == (
        "multiplies float16 in float32, without tensor cores",
    )
