"""Rotary embeddings against written-out complex rotation and against transformers' own numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import anyattn as aa
from anyattn.rope_scaling import frequencies

LIBRARIES = ("numpy", "torch", "jax.numpy", "array_api_strict", "dask.array")


def rotated(x, positions, dims, interleaved=False, base=10000.0):
    """The definition: pair m as a complex number times exp(i · position · base^(−2m / dims)), in float64."""
    x = np.asarray(x, dtype=np.float64)
    angle = np.asarray(positions, dtype=np.float64)[..., None] * base ** (-2.0 * np.arange(dims // 2) / dims)
    part, rest = x[..., :dims], x[..., dims:]
    if interleaved:
        z = (part[..., 0::2] + 1j * part[..., 1::2]) * np.exp(1j * angle)
        turned = np.stack([z.real, z.imag], axis=-1).reshape(part.shape)
    else:
        half = dims // 2
        z = (part[..., :half] + 1j * part[..., half:]) * np.exp(1j * angle)
        turned = np.concatenate([z.real, z.imag], axis=-1)
    return np.concatenate([turned, rest], axis=-1)


def array(library: str, values: Any) -> Any:
    xp = pytest.importorskip(library, reason=f"{library} not installed")
    if library == "dask.array":
        return xp.from_array(values, chunks=values.shape)
    return xp.asarray(values)


def host(x: Any) -> Any:
    return np.asarray(x)


def sample(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "dims"), [(10, None), (10, 6), (2, None), (7, 4)])
def test_is_a_complex_rotation(library, interleaved, head_dim, dims):
    x = sample(2, 3, 5, head_dim)
    positions = [0, 1, 7, 100, 3]
    out = aa.rope(array(library, x), positions, dims=dims, interleaved=interleaved)
    assert type(out) is type(array(library, x))
    assert str(out.dtype).endswith("float32")
    expected = rotated(x, positions, dims or head_dim, interleaved)
    np.testing.assert_allclose(host(out), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_layout_blhd_is_the_same_with_axes_exchanged(library):
    x = sample(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])
    out = aa.rope(array(library, x), array(library, positions), layout="blhd")
    expected = rotated(np.swapaxes(x, 1, 2), positions[:, None, :], 8)
    np.testing.assert_allclose(host(out), np.swapaxes(expected, 1, 2), atol=1e-6, rtol=0)


def test_features_beyond_dims_pass_bit_for_bit():
    x = sample(4, 9).astype(np.float16)
    x[0, 8] = np.inf
    out = aa.rope(x, range(4), dims=8)
    assert np.array_equal(out[:, 8], x[:, 8])
    assert not np.array_equal(out[1:, :8], x[1:, :8])


@pytest.mark.parametrize(
    ("positions", "meaning"),
    [
        (7, [[7] * 4] * 2),
        ([3], [[3] * 4] * 2),
        (range(4), [[0, 1, 2, 3]] * 2),
        ((0.5, 1.25, -2.0, 3.0), [[0.5, 1.25, -2.0, 3.0]] * 2),
        ([[1], [2]], [[1] * 4, [2] * 4]),
        (np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.uint8), [[1, 2, 3, 4], [5, 6, 7, 8]]),
    ],
    ids=["scalar", "one", "range", "floats", "one a batch entry", "all"],
)
def test_positions_broadcast_to_batch_and_rows(positions, meaning):
    x = sample(2, 3, 4, 6)
    out = aa.rope(x, positions)
    np.testing.assert_allclose(out, rotated(x, np.array(meaning)[:, None, :], 6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (0, 2, 4, 6), (2, 3, 2, 4, 6)])
def test_any_number_of_axes(shape):
    x = sample(*shape)
    np.testing.assert_allclose(aa.rope(x, range(4)), rotated(x, range(4), 6), atol=1e-6, rtol=0)


def test_no_rows():
    assert aa.rope(sample(3, 0, 6), []).shape == (3, 0, 6)


def test_scores_depend_on_distance_alone():
    q, k = sample(2, 5, 16).astype(np.float64), sample(2, 6, 16, seed=1).astype(np.float64)

    def scores(start):
        return aa.rope(q, range(start, start + 5)) @ np.swapaxes(aa.rope(k, range(start, start + 6)), -1, -2)

    np.testing.assert_allclose(scores(0), scores(1000), atol=1e-11, rtol=0)
    assert np.abs(scores(0) - q @ np.swapaxes(k, -1, -2)).max() > 0.1


@pytest.mark.parametrize("library", LIBRARIES)
def test_angles_hold_at_large_positions(library):
    """A float32 product of position and frequency is off by 0.06 at 1e6 and by whole turns at 2**31."""
    x = sample(5, 64)
    positions = [0, -1_000_000, 1_000_000, 123_456_789, 2**31 - 1]
    out = host(aa.rope(array(library, x), positions))
    np.testing.assert_allclose(out, rotated(x, positions, 64), atol=5e-6, rtol=0)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "float32"])
def test_positions_of_any_number_type(library, dtype):
    x = sample(3, 4, 6)
    positions = np.array([3, 127, 1, 100], dtype=dtype)
    out = host(aa.rope(array(library, x), array(library, positions)))
    np.testing.assert_allclose(out, rotated(x, positions, 6), atol=1e-6, rtol=0)


def test_float_positions_hold_without_float64():
    jnp = pytest.importorskip("jax.numpy", reason="jax not installed")
    x = sample(3, 64)
    positions = np.array([1_000_000.5, -4096.25, 4095.75])
    out = aa.rope(jnp.asarray(x), jnp.asarray(positions, dtype=jnp.float32))
    np.testing.assert_allclose(host(out), rotated(x, positions, 64), atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_16_bit_is_rotated_in_float32(library, name):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes not installed")
    dtype = np.dtype(np.float16 if name == "float16" else ml_dtypes.bfloat16)
    x = sample(3, 5, 8).astype(dtype)
    if library == "torch":
        torch = pytest.importorskip("torch", reason="torch not installed")
        given = torch.asarray(x.astype(np.float32)).to(getattr(torch, name))
        out = aa.rope(given, range(5))
        assert out.dtype == given.dtype
        out = out.to(torch.float32).numpy()
    else:
        out = aa.rope(array(library, x), range(5))
        assert out.dtype == dtype
        out = host(out).astype(np.float32)
    expected = rotated(x.astype(np.float32), range(5), 8).astype(dtype).astype(np.float32)
    # The float32 result may fall on the other side of a rounding edge: one unit in the last place.
    np.testing.assert_allclose(out, expected, rtol=2.0 ** (-10 if name == "float16" else -7), atol=1e-7)
    assert np.mean(out == expected) > 0.95


def test_float64_stays_float64():
    x = sample(4, 6).astype(np.float64)
    out = aa.rope(x, range(4))
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, rotated(x, range(4), 6), atol=1e-15, rtol=0)


def test_runs_under_jit_with_traced_positions():
    jax = pytest.importorskip("jax", reason="jax not installed")
    x = sample(2, 4, 6)
    out = jax.jit(lambda x, p: aa.rope(x, p))(x, np.array([3, 5, 1_000_000, 0]))
    np.testing.assert_allclose(host(out), rotated(x, [3, 5, 1_000_000, 0], 6), atol=2e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lower", ["bfloat16", "float16"])
def test_autocast_changes_nothing(lower, interleaved):
    torch = pytest.importorskip("torch", reason="torch not installed")
    x = torch.asarray(sample(3, 4, 6))
    positions = torch.tensor([3, 5, 1_000_000, 0])
    plain = aa.rope(x, positions, interleaved=interleaved)
    with torch.autocast("cpu", dtype=getattr(torch, lower)):
        out = aa.rope(x, positions, interleaved=interleaved)
    assert out.dtype == torch.float32
    assert torch.equal(out, plain)


def test_rows_are_turned_with_autocast_off():
    """What autocast lowers differs from release to release of torch."""
    torch = pytest.importorskip("torch", reason="torch not installed")
    seen = {}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen[function.__name__] = torch.is_autocast_enabled("cpu")
            return function(*args, **(kwargs or {}))

    x = torch.ones((4, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        aa.rope(x, range(4))
    assert {seen[name] for name in ("cos", "sin", "mul", "sub")} == {False}


def test_infinite_entries_give_no_warning():
    """Warnings are errors in these tests."""
    x = sample(4, 6)
    x[1, 0] = np.inf
    x[1, 3] = np.inf
    out = aa.rope(x, range(4))
    np.testing.assert_array_equal(np.isfinite(out).all(axis=-1), [True, False, True, True])


def test_is_lazy_on_dask():
    dask = pytest.importorskip("dask", reason="dask not installed")

    def refuse(*_args, **_options):
        raise AssertionError("computed")

    x = array("dask.array", sample(2, 4, 6))
    with dask.config.set(scheduler=refuse):
        out = aa.rope(x, range(4), dims=4)
    np.testing.assert_allclose(out.compute(), rotated(sample(2, 4, 6), range(4), 4), atol=1e-6, rtol=0)


def test_gradient_is_the_rotation_back():
    torch = pytest.importorskip("torch", reason="torch not installed")
    x = torch.asarray(sample(4, 6)).requires_grad_()
    upstream = torch.asarray(sample(4, 6, seed=1))
    (gradient,) = torch.autograd.grad(aa.rope(x, range(4)), x, upstream)
    np.testing.assert_allclose(gradient, rotated(upstream, [0, -1, -2, -3], 6), atol=1e-6, rtol=0)


def test_stays_on_a_device_that_is_not_the_default():
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict not installed")
    other = xp.Device("device1")
    x = xp.asarray(sample(2, 4, 6), device=other)
    for positions in (range(4), [0.5, 1.0, 1.5, 2.0], xp.asarray([0, 1, 2, 3], device=other)):
        assert aa.rope(x, positions, dims=4).device == other
    with pytest.raises(
        ValueError, match=r"positions: wanted an array on device .*device1.* like x, got one on .*CPU"
    ):
        aa.rope(x, xp.asarray([0, 1, 2, 3]))


def test_takes_read_only_and_strided_and_writes_nothing():
    whole = sample(3, 8, 12)
    before = whole.copy()
    whole.flags.writeable = False
    x = whole[:, ::-2, ::2]
    np.testing.assert_allclose(aa.rope(x, range(4)), rotated(x, range(4), 6), atol=1e-6, rtol=0)
    assert np.array_equal(whole, before)


# Configurations in the wild: Code Llama (linear), Qwen and DeepSeek (yarn), Llama 3.1 (llama3).
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 512,
        "beta_fast": 24,
        "beta_slow": 2,
    },
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 131072},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


def transformers_frequencies(monkeypatch, base, dims, scaling, seq_len=None, **config):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("torch", reason="torch not installed")
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = transformers.LlamaConfig(
        hidden_size=4 * dims,
        num_attention_heads=4,
        head_dim=dims,
        rope_parameters={**scaling, "rope_theta": base},
        **config,
    )
    if scaling["rope_type"] == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(made)
        return rotary.inv_freq.numpy(), rotary.attention_scaling
    found, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](made, "cpu", seq_len=seq_len)
    return found.numpy(), amplitude


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("dims", [64, 22])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_frequencies_are_those_of_transformers(monkeypatch, scaling, dims, base):
    expected, amplitude = transformers_frequencies(
        monkeypatch,
        base,
        dims,
        scaling,
        max_position_embeddings=8 * scaling.get("original_max_position_embeddings", 8),
    )
    found = frequencies(dims, base, scaling)
    np.testing.assert_allclose(found.radians, expected, rtol=2e-6)
    assert found.amplitude == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.parametrize("seq_len", [100, 2048, 2049, 6000])
def test_dynamic_frequencies_are_those_of_transformers(monkeypatch, seq_len):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    expected, _ = transformers_frequencies(
        monkeypatch, 10000.0, 64, scaling, seq_len=seq_len, max_position_embeddings=2048
    )
    found = frequencies(
        64, 10000.0, {**scaling, "original_max_position_embeddings": 2048, "seq_len": seq_len}
    )
    np.testing.assert_allclose(found.radians, expected, rtol=2e-6)
    assert (found.radians == frequencies(64).radians) == (seq_len <= 2048)


def test_ntk_turns_the_slowest_pair_as_interpolation_does_and_the_fastest_as_before():
    plain, stretched = (
        frequencies(64).radians,
        frequencies(64, scaling={"rope_type": "ntk", "factor": 4.0}).radians,
    )
    assert stretched[0] == plain[0] == 1.0
    assert stretched[-1] == pytest.approx(plain[-1] / 4.0, rel=1e-12)


def test_dynamic_takes_its_length_from_the_positions():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    x = sample(12, 8)
    grown = aa.rope(x, range(12), scaling=scaling)
    assert np.array_equal(grown, aa.rope(x, range(12), scaling={**scaling, "seq_len": 12}))
    assert not np.allclose(grown, aa.rope(x, range(12)))
    assert np.array_equal(aa.rope(x[:8], range(8), scaling=scaling), aa.rope(x[:8], range(8)))


def test_yarn_amplitude_scales_cosine_and_sine():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    x = sample(3, 8).astype(np.float64)
    lengths = np.linalg.norm(aa.rope(x, [0, 5, 9], scaling=scaling), axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(lengths, 0.1 * math.log(4.0) + 1.0, rtol=1e-12)


def test_whole_rotation_is_that_of_transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="torch not installed")
    pytest.importorskip("transformers", reason="transformers not installed")
    from transformers.models.llama.modeling_llama import (
        LlamaConfig,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    scaling = SCALINGS[-1]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=65536,
        rope_parameters={**scaling, "rope_theta": 500000.0},
    )
    q, k = torch.asarray(sample(2, 4, 7, 32)), torch.asarray(sample(2, 2, 7, 32, seed=1))
    positions = torch.asarray([[0, 1, 2, 3, 4, 5, 6], [90, 91, 92, 93, 94, 95, 96]])
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions))
    for x, wanted in zip((q, k), expected, strict=True):
        found = aa.rope(x, positions, base=500000.0, scaling=scaling)
        np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dims": 3}, ValueError, "dims: wanted an even number"),
        ({"dims": 8}, ValueError, "dims: wanted at most the 6 features"),
        ({"dims": 2.0}, TypeError, "dims: wanted an integer"),
        ({"base": 1}, ValueError, "base: wanted a number greater than 1"),
        ({"base": math.nan}, ValueError, "base: wanted a finite number"),
        ({"interleaved": "yes"}, TypeError, "interleaved: wanted True or False"),
        ({"layout": "bld"}, ValueError, "layout: wanted 'bhld' or 'blhd', got 'bld'"),
        ({"scaling": "linear"}, TypeError, "scaling: wanted None or a mapping"),
        ({"scaling": {"factor": 2.0}}, ValueError, "'rope_type'.*wanted one of 'default', 'linear'"),
        ({"scaling": {"rope_type": "longrope"}}, ValueError, "got 'longrope'"),
        ({"scaling": {"rope_type": "linear"}}, ValueError, "'linear' needs 'factor'"),
        ({"scaling": {"rope_type": "linear", "factor": 0}}, ValueError, "'factor'.*greater than 0"),
        ({"scaling": {"rope_type": "linear", "factor": 2, "facter": 3}}, ValueError, "knows no 'facter'"),
        ({"scaling": {"type": "default", "rope_theta": 5e5}}, ValueError, "'rope_theta'.*wanted 10000.0"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        aa.rope(sample(4, 6), range(4), **options)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([0, 1], ValueError, r"positions: wanted a shape that broadcasts to \(2, 4\).*got \(2,\)"),
        (np.zeros((3, 4), dtype=int), ValueError, r"got \(3, 4\)"),
        ([True] * 4, TypeError, "positions: wanted a real number, got bool True"),
        ([1, 2, True, 3], TypeError, "positions: wanted a real number, got bool True"),
        ([0.5, 2.0, np.True_, 3.0], TypeError, "positions: wanted a real number, got bool"),
        ([0.5, math.nan, 2.0, 3.0], ValueError, "positions: wanted a finite number, got nan"),
        ([np.arange(4)] * 2, TypeError, "positions: wanted a real number, got ndarray"),
        (np.ma.arange(4), TypeError, "positions: MaskedArray is not taken, masked entries would be ignored"),
        (np.zeros(4, dtype=bool), TypeError, "positions: wanted integers or floats, got dtype bool"),
        ("here", TypeError, "positions: wanted a real number, got str 'here'"),
        ([[0, 1], [2]], ValueError, "positions: wanted integers in equally long rows"),
        ([[0.5, 1], [2]], ValueError, "positions: wanted numbers in equally long rows"),
        (2**70, ValueError, "positions: wanted integers of 64 bits"),
        (range(2**63, 2**63 + 4), ValueError, "positions: wanted integers of 64 bits"),
    ],
)
def test_wrong_positions_are_named(positions, error, message):
    with pytest.raises(error, match=message):
        aa.rope(sample(2, 3, 4, 6), positions)


def test_arrays_of_two_libraries_are_refused():
    torch = pytest.importorskip("torch", reason="torch not installed")
    with pytest.raises(TypeError, match="positions: wanted an array of numpy like x, got one of torch"):
        aa.rope(sample(4, 6), torch.arange(4))


def test_positions_beyond_the_integers_of_jax_are_refused():
    jnp = pytest.importorskip("jax.numpy", reason="jax not installed")
    with pytest.raises(ValueError, match="positions: wanted integers from -2147483648 to 2147483647"):
        aa.rope(jnp.ones((1, 6)), 2**31)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "x: wanted an array, got list"),
        (np.ma.ones((4, 6)), TypeError, "x: MaskedArray is not taken, masked entries would be ignored"),
        (np.ones((4, 6), dtype=int), TypeError, "x: wanted a dtype of float16.*got int64"),
        (np.ones(6), ValueError, r"x: wanted shape \(..., H, L, D\) or \(L, D\), got \(6,\)"),
    ],
)
def test_wrong_x_is_named(x, error, message):
    with pytest.raises(error, match=message):
        aa.rope(x, range(4))


def test_dynamic_under_jit_asks_for_the_length():
    jax = pytest.importorskip("jax", reason="jax not installed")
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    x = sample(12, 8)
    with pytest.raises(ValueError, match=r"give scaling\['seq_len'\]"):
        jax.jit(lambda x, p: aa.rope(x, p, scaling=scaling))(x, np.arange(12))
    known = jax.jit(lambda x: aa.rope(x, range(12), scaling=scaling))(x)
    np.testing.assert_allclose(host(known), aa.rope(x, range(12), scaling=scaling), atol=2e-6, rtol=0)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_images_turn_by_row_and_column(layout):
    rng = np.random.default_rng(0)
    rows, columns = np.divmod(np.arange(12), 4)
    x = rng.standard_normal((2, 3, 12, 8))
    given = x if layout == "bhld" else np.moveaxis(x, 1, 2)
    found = aa.rope_2d(given, rows, columns, layout=layout)
    found = found if layout == "bhld" else np.moveaxis(found, 2, 1)
    for half, positions in ((slice(0, 4), rows), (slice(4, 8), columns)):
        for pair in range(2):
            angle = positions * 100.0 ** (-2 * pair / 4)
            a, b = x[..., half][..., pair], x[..., half][..., pair + 2]
            np.testing.assert_allclose(
                found[..., half][..., pair], a * np.cos(angle) - b * np.sin(angle), rtol=1e-6, atol=1e-9
            )
    # A product depends on the distance in each direction alone.
    q, k = rng.standard_normal((2, 1, 8))
    product = [
        (aa.rope_2d(q, [r], [c]) @ aa.rope_2d(k, [r + 2], [c - 1]).T).item() for r, c in ((0, 1), (5, 9))
    ]
    assert product[0] == pytest.approx(product[1])
    with pytest.raises(ValueError, match="x: wanted a number of features that 4 divides"):
        aa.rope_2d(x[..., :6], rows, columns)
    with pytest.raises(ValueError, match=r"columns: wanted a shape that broadcasts to \(2, 12\).*got \(5,\)"):
        aa.rope_2d(x, rows, columns[:5])


def test_two_directions_as_in_vision_transformers():
    """Neighbours turn together, the first half by columns, pair m by 100**(-4 m / D) (Heo et al., 2024)."""
    height, width, dim = 3, 4, 8
    x = np.random.default_rng(0).standard_normal((2, height * width, dim))
    rows, columns = np.arange(height * width) // width, np.arange(height * width) % width
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    steps = 100.0 ** (-4 * np.arange(dim // 4) / dim)
    turns = np.concatenate([np.outer(columns, steps), np.outer(rows, steps)], axis=-1)
    wanted = pairs * np.exp(1j * turns)
    found = aa.rope_2d(x, columns, rows, interleaved=True)
    np.testing.assert_allclose(found[..., 0::2] + 1j * found[..., 1::2], wanted, atol=1e-12)
