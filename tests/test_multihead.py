"""MultiHeadAttention against torch.nn.MultiheadAttention and against the formula in plain NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import anyattn as aa
from anyattn.dispatch import recording

LIBRARIES = ("numpy", "torch", "jax.numpy", "array_api_strict", "dask.array")


def sample(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def module(library: str) -> Any:
    return pytest.importorskip(library, reason=f"{library} not installed")


def array(library: str, values: Any) -> Any:
    xp = module(library)
    return xp.from_array(values, chunks=values.shape) if library == "dask.array" else xp.asarray(values)


def weights(
    width=10, kv_width=10, heads=4, kv_heads=2, size=6, v_size=3, out=7, dtype=np.float32
) -> dict[str, Any]:
    """Weights with every number different, so that no exchanged axis goes unseen."""
    shapes = {
        "wq": (width, heads * size),
        "wk": (kv_width, kv_heads * size),
        "wv": (kv_width, kv_heads * v_size),
        "wo": (heads * v_size, out),
    }
    return {
        name: sample(*shape, seed=seed, dtype=dtype) / 3 for seed, (name, shape) in enumerate(shapes.items())
    }


def biases(given: dict[str, Any], keys: str = "qkvo") -> dict[str, Any]:
    return {key: sample(given[f"w{key}"].shape[1], seed=9, dtype=given["wq"].dtype) for key in keys}


def by_formula(x, y, p, b, heads, kv_heads, seen=None):
    """Each head on its own, in float64; `seen` is a boolean (Lq, Lk)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size, v_size = p["wq"].shape[1] // heads, p["wv"].shape[1] // kv_heads
    parts, maps = [], []
    for h in range(heads):
        g = h * kv_heads // heads
        q = (
            x @ p["wq"][:, h * size : (h + 1) * size]
            + b.get("q", np.zeros(heads * size))[h * size : (h + 1) * size]
        )
        k = (
            y @ p["wk"][:, g * size : (g + 1) * size]
            + b.get("k", np.zeros(heads * size))[g * size : (g + 1) * size]
        )
        v = (
            y @ p["wv"][:, g * v_size : (g + 1) * v_size]
            + b.get("v", np.zeros(heads * v_size))[g * v_size : (g + 1) * v_size]
        )
        s = q @ np.swapaxes(k, -1, -2) / math.sqrt(size)
        if seen is not None:
            s = np.where(seen, s, -np.inf)
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        maps.append(e / e.sum(axis=-1, keepdims=True))
        parts.append(maps[-1] @ v)
    return np.concatenate(parts, axis=-1) @ p["wo"] + b.get("o", 0.0), np.stack(maps, axis=-3)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1), (1, 1)])
def test_is_the_formula_on_every_library(library, heads, kv_heads):
    p = weights(heads=heads, kv_heads=kv_heads)
    b = biases(p)
    x = sample(2, 5, 10, seed=20)
    expected, maps = by_formula(x, x, p, b, heads, kv_heads, np.tri(5, dtype=bool))
    layer = aa.MultiHeadAttention(
        *(array(library, w) for w in p.values()),
        num_heads=heads,
        num_kv_heads=kv_heads,
        biases={key: array(library, value) for key, value in b.items()},
    )
    assert (layer.head_dim, layer.v_head_dim) == (6, 3)
    given = array(library, x)
    with recording() as records:
        out, found = layer(given, causal=True, return_weights=True, backend="reference")
    assert [(r.backend, r.operation) for r in records] == [
        ("reference", "attention"),
        ("reference", "weights"),
    ]
    assert type(out) is type(given)
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found), maps, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("keys", ["", "q", "k", "v", "o", "qv"])
def test_each_bias_goes_to_its_projection(keys):
    p = weights(dtype=np.float64)
    b = biases(p, keys)
    x = sample(3, 10, dtype=np.float64)
    layer = aa.MultiHeadAttention(**p, num_heads=4, num_kv_heads=2, biases=b)
    np.testing.assert_allclose(layer(x), by_formula(x, x, p, b, 4, 2)[0], atol=1e-12, rtol=0)
    assert set(layer.parameters) == {"wq", "wk", "wv", "wo"} | {f"b{key}" for key in keys}


def test_cross_attention_has_widths_and_batches_of_its_own():
    p = weights(kv_width=8, dtype=np.float64)
    x, y = sample(2, 3, 4, 10, dtype=np.float64), sample(3, 9, 8, seed=5, dtype=np.float64)
    layer = aa.MultiHeadAttention(**p, num_heads=4, num_kv_heads=2)
    out, found = layer(x, y, return_weights=True)
    expected, maps = by_formula(x, y, p, {}, 4, 2)
    assert out.shape == (2, 3, 4, 7)
    assert found.shape == (2, 3, 4, 4, 9)
    np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(found, maps, atol=1e-12, rtol=0)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_is_torchs_layer_with_transposed_weights(library):
    torch = module("torch")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 4, bias=True, batch_first=True, dtype=torch.float32)
    with torch.no_grad():
        theirs.in_proj_bias.uniform_(-1, 1)
        theirs.out_proj.bias.uniform_(-1, 1)
    x = torch.asarray(sample(3, 7, 24))
    lengths = [7, 1, 4]
    hidden = torch.arange(7)[None, :] >= torch.tensor(lengths)[:, None]
    expected, maps = theirs(x, x, x, key_padding_mask=hidden, average_attn_weights=False)

    wq, wk, wv = (array(library, w.detach().numpy().T) for w in theirs.in_proj_weight.chunk(3))
    bq, bk, bv = (array(library, b.detach().numpy()) for b in theirs.in_proj_bias.chunk(3))
    wo = array(library, theirs.out_proj.weight.detach().numpy().T)
    bo = array(library, theirs.out_proj.bias.detach().numpy())
    ours = aa.MultiHeadAttention(wq, wk, wv, wo, num_heads=4, biases={"q": bq, "k": bk, "v": bv, "o": bo})
    out, found = ours(array(library, x.numpy()), kv_lengths=lengths, return_weights=True)
    np.testing.assert_allclose(np.asarray(out), expected.detach().numpy(), atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found), maps.detach().numpy(), atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_torchs_layer():
    torch = module("torch")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(24, 4, bias=False, batch_first=True, dtype=torch.float64)
    x = torch.asarray(sample(2, 5, 24, dtype=np.float64)).requires_grad_()
    expected, _ = theirs(x, x, x)
    (expected**2).sum().backward()
    wanted_x, x.grad = x.grad, None

    split = [
        w.detach().T.clone().requires_grad_()
        for w in (*theirs.in_proj_weight.chunk(3), theirs.out_proj.weight)
    ]
    ours = aa.MultiHeadAttention(*split, num_heads=4)
    (ours(x) ** 2).sum().backward()
    wanted = [*theirs.in_proj_weight.grad.chunk(3), theirs.out_proj.weight.grad]
    for name, weight, gradient in zip(ours.parameters, split, wanted, strict=True):
        np.testing.assert_allclose(weight.grad, gradient.T, atol=1e-12, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(x.grad, wanted_x, atol=1e-12, rtol=1e-9)


def test_parameters_are_a_pytree_for_jax():
    """jax.grad under jit, through rope, grouped heads and biases, against torch's autograd."""
    jax, torch = module("jax"), module("torch")
    p = weights()
    options = {"num_heads": 4, "num_kv_heads": 2, "rope": {"dims": 4}}
    x = sample(2, 5, 10, seed=20)

    ours = aa.MultiHeadAttention(
        **{name: jax.numpy.asarray(w) for name, w in p.items()},
        biases={key: jax.numpy.asarray(b) for key, b in biases(p).items()},
        **options,
    )

    @jax.jit
    def loss(parameters, x):
        return (ours.with_parameters(parameters)(x, causal=True) ** 2).sum()

    gradients = jax.grad(loss)(ours.parameters, x)
    assert gradients.keys() == ours.parameters.keys()

    leaves = {name: torch.asarray(np.array(w)).requires_grad_() for name, w in ours.parameters.items()}
    theirs = aa.MultiHeadAttention(
        *(leaves[name] for name in p), biases={key: leaves[f"b{key}"] for key in "qkvo"}, **options
    )
    (theirs(torch.asarray(x), causal=True) ** 2).sum().backward()
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-3 or name == "bk", name
        np.testing.assert_allclose(gradient, leaves[name].grad, atol=2e-4, rtol=2e-4, err_msg=name)


def test_with_parameters_leaves_the_layer_alone():
    layer = aa.MultiHeadAttention.init(8, num_heads=2, rope=True, biases=True, xp=np, seed=0)
    x = sample(3, 8)
    before = layer(x)
    doubled = layer.with_parameters({name: 2 * value for name, value in layer.parameters.items()})
    assert not np.allclose(doubled(x), before)
    assert np.array_equal(layer(x), before)
    assert doubled.rope == layer.rope
    layer.parameters["wq"] = None
    assert np.array_equal(layer(x), before)
    with pytest.raises(ValueError, match=r"parameters: wanted the names .*got \['wq'\]"):
        layer.with_parameters({"wq": layer.parameters["wq"]})


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bit_weights(library, name):
    ml_dtypes = module("ml_dtypes")
    dtype = np.dtype(np.float16 if name == "float16" else ml_dtypes.bfloat16)
    p = {key: (w / 2).astype(dtype) for key, w in weights().items()}
    x = sample(2, 5, 10, seed=20).astype(dtype)
    expected, _ = by_formula(x, x, {key: w.astype(np.float64) for key, w in p.items()}, {}, 4, 2)
    if library == "torch":
        torch = module("torch")

        def convert(values):
            return torch.asarray(values.astype(np.float32)).to(getattr(torch, name))
    else:

        def convert(values):
            return array(library, values)

    layer = aa.MultiHeadAttention(*map(convert, p.values()), num_heads=4, num_kv_heads=2)
    out = layer(convert(x))
    assert str(out.dtype).endswith(name)
    found = out.to(torch.float32).numpy() if library == "torch" else np.asarray(out).astype(np.float32)
    # Five roundings (three projections, heads, result) of values of some units.
    np.testing.assert_allclose(found, expected, atol=0.01 if name == "float16" else 0.08, rtol=0)


@pytest.fixture
def rotary():
    return aa.MultiHeadAttention.init(
        24, num_heads=4, num_kv_heads=2, rope=True, xp=np, seed=3, dtype=np.float64
    )


def test_rope_turns_queries_and_keys(rotary):
    x = sample(2, 6, 24, dtype=np.float64)
    p = rotary.parameters
    heads = {key: aa.rope((x @ p[f"w{key}"]).reshape(2, 6, -1, 6), range(6), layout="blhd") for key in "qk"}
    v = (x @ p["wv"]).reshape(2, 6, 2, 6)
    expected = aa.attention(heads["q"], heads["k"], v, causal=True, layout="blhd").reshape(2, 6, 24) @ p["wo"]
    np.testing.assert_allclose(rotary(x, causal=True), expected, atol=1e-12, rtol=0)
    plain = aa.MultiHeadAttention(*p.values(), num_heads=4, num_kv_heads=2)
    assert np.abs(rotary(x, causal=True) - plain(x, causal=True)).max() > 0.01


def test_the_last_rows_alone_stand_where_they_stood(rotary):
    """Default positions are those of the default q_offset, Lk − Lq: the last query sees the last key."""
    x = sample(2, 6, 24, dtype=np.float64)
    whole = rotary(x, causal=True)
    for rows in (1, 2, 6):
        np.testing.assert_allclose(
            rotary(x[:, 6 - rows :], x, causal=True), whole[:, 6 - rows :], atol=1e-12, rtol=0
        )


def test_positions_follow_q_offset_and_kv_lengths(rotary):
    """A cache with room left over: one batch entry has 4 keys, the other 6."""
    x = sample(2, 6, 24, dtype=np.float64)
    whole = rotary(x, causal=True)
    lengths = [4, 6]
    cache = x.copy()
    cache[0, 4:] = np.nan
    last = np.stack([x[0, 3:4], x[1, 5:6]])
    expected = np.stack([whole[0, 3:4], whole[1, 5:6]])
    np.testing.assert_allclose(
        rotary(last, cache, causal=True, kv_lengths=lengths), expected, atol=1e-12, rtol=0
    )
    two = np.stack([x[0, 2:4], x[1, 4:6]])
    expected = np.stack([whole[0, 2:4], whole[1, 4:6]])
    for offset in ([2, 4], np.array([2, 4])):
        out = rotary(two, cache, causal=True, kv_lengths=lengths, q_offset=offset)
        np.testing.assert_allclose(out, expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(
        rotary(x[:, 1:3], x, causal=True, q_offset=1), whole[:, 1:3], atol=1e-12, rtol=0
    )
    with pytest.raises(ValueError, match=r"q_offset: .*0 \(right-padded.*kv_lengths - Lq \(a cache\)"):
        rotary(two, cache, kv_lengths=lengths)


def test_given_positions_are_the_keys_too_unless_they_have_their_own(rotary):
    x = sample(2, 6, 24, dtype=np.float64)
    far = np.arange(6) + 1000
    np.testing.assert_allclose(rotary(x, positions=far), rotary(x), atol=1e-9, rtol=0)
    apart = rotary(x, positions=far, kv_positions=range(6))
    assert np.abs(apart - rotary(x)).max() > 1e-3
    np.testing.assert_allclose(rotary(x[:, 5:], x, positions=[5]), rotary(x)[:, 5:], atol=1e-12, rtol=0)


def test_rope_options_reach_rope():
    x = sample(5, 24, dtype=np.float64)
    common = {"num_heads": 4, "xp": np, "seed": 3, "dtype": np.float64}
    base = aa.MultiHeadAttention.init(24, rope=True, **common)(x)
    for options in (
        {"base": 100.0},
        {"dims": 2},
        {"interleaved": True},
        {"scaling": {"type": "linear", "factor": 2}},
    ):
        layer = aa.MultiHeadAttention.init(24, rope=options, **common)
        p = layer.parameters
        q, k = (
            aa.rope((x @ p[n]).reshape(5, 4, 6), range(5), layout="blhd", **options) for n in ("wq", "wk")
        )
        heads = aa.attention(q, k, (x @ p["wv"]).reshape(5, 4, 6), layout="blhd")
        np.testing.assert_allclose(layer(x), heads.reshape(5, 24) @ p["wo"], atol=1e-12, rtol=0)
        assert np.abs(layer(x) - base).max() > 1e-4, options


def test_dynamic_scaling_turns_queries_and_keys_at_one_speed():
    """One row against 12 keys: its own positions would tell another length than the keys' do."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    layer = aa.MultiHeadAttention.init(
        24, num_heads=4, rope={"scaling": scaling}, xp=np, seed=3, dtype=np.float64
    )
    x = sample(12, 24, dtype=np.float64)
    np.testing.assert_allclose(layer(x[2:3], x, positions=[2]), layer(x)[2:3], atol=1e-12, rtol=0)


def test_options_go_to_attention_as_they_are(rotary):
    x = sample(2, 6, 24, dtype=np.float64)
    seen = np.tri(6, dtype=bool)
    np.testing.assert_allclose(rotary(x, mask=seen), rotary(x, causal=True), atol=1e-12, rtol=0)
    out, lse, found = rotary(x, causal=True, return_lse=True, return_weights=True)
    assert lse.shape == (2, 4, 6)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, atol=1e-12)
    np.testing.assert_allclose(out, rotary(x, causal=True), atol=0, rtol=0)
    np.testing.assert_array_equal(found, rotary.weights(x, causal=True))
    np.testing.assert_array_equal(found[:, :, [5, 1]], rotary.weights(x, causal=True, rows=[5, 1]))
    with pytest.raises(
        TypeError,
        match=r"^MultiHeadAttention: unexpected option 'cauzal'; it takes causal, .*return_lse, backend$",
    ):
        rotary(x, cauzal=True)
    with pytest.raises(
        TypeError, match=r"^MultiHeadAttention\.weights: .* 'return_lse'; it takes .*rows, backend$"
    ):
        rotary.weights(x, return_lse=True)
    with pytest.raises(ValueError, match="referense"):
        rotary(x, backend="referense")
    with pytest.raises(TypeError, match="layout: "):
        rotary(x, layout="bhld")


def test_weights_are_returned_whatever_attention_is_told_of_dropout(rotary):
    x = sample(2, 6, 24, dtype=np.float64)
    out, found = rotary(x, causal=True, return_weights=True, dropout=0.0, dropout_seed=3)
    np.testing.assert_array_equal(out, rotary(x, causal=True))
    np.testing.assert_array_equal(found, rotary.weights(x, causal=True))


def test_right_padded_sequences_stand_at_zero(rotary):
    x = sample(2, 6, 24, dtype=np.float64)
    short = rotary(x[:1, :4])
    np.testing.assert_allclose(rotary(x, kv_lengths=[4, 6])[0, :4], short[0], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="q_offset: with kv_lengths"):
        rotary(x, kv_lengths=[4, 6], causal=True)
    said = rotary(x, kv_lengths=[4, 6], causal=True, q_offset=0)
    np.testing.assert_allclose(said[0, :4], rotary(x, causal=True)[0, :4], atol=1e-12, rtol=0)


def test_narrow_offsets_and_lengths_do_not_wrap(rotary):
    """Row 250 + 5 still fits uint8, row 250 + 6 does not."""
    x, cache = sample(2, 8, 24, dtype=np.float64), sample(2, 300, 24, seed=5, dtype=np.float64)
    wide = rotary(x, cache, causal=True, q_offset=[250, 3])
    narrow = rotary(x, cache, causal=True, q_offset=np.array([250, 3], dtype=np.uint8))
    np.testing.assert_array_equal(narrow, wide)
    empty = rotary(x[:, :1], cache, kv_lengths=np.array([0, 200], dtype=np.uint8), return_weights=True)
    wide = rotary(x[:, :1], cache, kv_lengths=[0, 200], return_weights=True)
    np.testing.assert_array_equal(empty[1], wide[1])
    assert empty[1][1, 0, 0, 199] > 0


def test_lengths_that_the_host_cannot_read_are_clamped_for_rope_too():
    jax = module("jax")
    layer = aa.MultiHeadAttention.init(24, num_heads=4, rope=True, xp=jax.numpy, seed=3)
    x, cache = jax.numpy.asarray(sample(2, 1, 24)), jax.numpy.asarray(sample(2, 6, 24, seed=5))
    out = jax.jit(lambda lengths: layer(x, cache, causal=True, kv_lengths=lengths))(np.array([4, 90]))
    np.testing.assert_allclose(out, layer(x, cache, causal=True, kv_lengths=[4, 6]), atol=1e-6, rtol=0)


def test_autocast_changes_nothing():
    torch = module("torch")
    layer = aa.MultiHeadAttention.init(24, num_heads=4, rope=True, biases=True, xp=torch, seed=3)
    x = torch.asarray(sample(2, 6, 24))
    plain = layer(x, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, causal=True)
    assert out.dtype == torch.float32
    assert torch.equal(out, plain)


@pytest.mark.parametrize("library", LIBRARIES)
def test_init_draws_the_same_numbers_for_every_library(library):
    layer = aa.MultiHeadAttention.init(
        12, num_heads=4, num_kv_heads=2, biases=True, xp=module(library), seed=7
    )
    wq = np.asarray(layer.parameters["wq"])
    assert wq.dtype == np.float32
    limit = math.sqrt(6 / 24)
    expected = np.random.default_rng(7).uniform(-limit, limit, (12, 12))
    np.testing.assert_array_equal(wq, expected.astype(np.float32))
    assert np.asarray(layer.parameters["wk"]).shape == (12, 6)
    np.testing.assert_array_equal(np.asarray(layer.parameters["bv"]), np.zeros(6))


def test_init_takes_sizes_dtype_and_device():
    torch = module("torch")
    layer = aa.MultiHeadAttention.init(
        10,
        num_heads=3,
        head_dim=4,
        v_head_dim=5,
        kv_width=6,
        xp=torch,
        seed=0,
        dtype=torch.bfloat16,
        device="cpu",
    )
    assert [tuple(w.shape) for w in layer.parameters.values()] == [(10, 12), (6, 12), (6, 15), (15, 10)]
    assert layer.parameters["wq"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_heads: wanted a divisor of d_model, 10, or a head_dim, got 3"):
        aa.MultiHeadAttention.init(10, num_heads=3, xp=np, seed=0)
    with pytest.raises(TypeError, match="xp: wanted the module of an array library"):
        aa.MultiHeadAttention.init(10, num_heads=2, xp="numpy", seed=0)


def test_repr_tells_what_is_not_the_default():
    layer = aa.MultiHeadAttention.init(64, num_heads=4, xp=np, seed=0)
    assert repr(layer) == "MultiHeadAttention(64 -> 64, num_heads=4, head_dim=16, numpy float32)"
    full = aa.MultiHeadAttention(
        **weights(kv_width=8), num_heads=4, num_kv_heads=2, biases=biases(weights(), "o"), rope={"dims": 4}
    )
    assert repr(full) == (
        "MultiHeadAttention(10, kv 8 -> 7, num_heads=4, num_kv_heads=2, head_dim=6, v_head_dim=3, biases=o, "
        "rope={'dims': 4}, numpy float32)"
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "num_heads: wanted 1 or more"),
        ({"num_heads": 4.0}, TypeError, "num_heads: wanted an integer"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: wanted a divisor of num_heads, 4, got 3"),
        ({"wq": [[1.0]]}, TypeError, "wq: wanted an array, got list"),
        ({"wq": np.ones((10, 24), dtype=int)}, TypeError, "wq: wanted a dtype of float16.*got int64"),
        ({"wk": np.ones((10, 12))}, TypeError, "wk: wanted dtype float32 like wq, got float64"),
        ({"wk": np.ma.ones((10, 12), dtype="f4")}, TypeError, "wk: MaskedArray is not taken"),
        (
            {"biases": {"q": np.ma.ones(24, dtype="f4")}},
            TypeError,
            r"biases\['q'\]: MaskedArray is not taken",
        ),
        (
            {"wq": sample(10, 25)},
            ValueError,
            r"wq: wanted columns for num_heads=4 equal heads, got \(10, 25\)",
        ),
        ({"wk": sample(10, 14)}, ValueError, "wk: wanted 2 heads of 6, as in wq, so 12 columns"),
        ({"wv": sample(9, 6)}, ValueError, "wv: wanted 10 rows, as in wk"),
        ({"wo": sample(13, 7)}, ValueError, "wo: wanted 12 rows, 4 heads of the 3 features"),
        ({"wo": sample(12)}, ValueError, r"wo: wanted shape \(in, out\)"),
        ({"biases": {"x": sample(24)}}, ValueError, "biases: wanted any of .*got 'x'"),
        ({"biases": {"k": sample(24)}}, ValueError, r"biases\['k'\]: wanted shape \(12,\)"),
        ({"biases": {"k": np.ones(12)}}, TypeError, r"biases\['k'\]: wanted dtype float32 like wq"),
        ({"biases": True}, TypeError, "biases: wanted a mapping"),
        ({"rope": "yes"}, TypeError, "rope: wanted True, None or a mapping"),
        ({"rope": {"layout": "bhld"}}, ValueError, "rope: wanted any of .*got 'layout'"),
        ({"rope": {"dims": 8}}, ValueError, "rope: wanted an even number of the 6 features"),
        ({"rope": {"base": "x"}}, TypeError, "base: wanted a real number"),
    ],
)
def test_weights_that_do_not_fit_are_named(changed, error, message):
    given = {**weights(), "num_heads": 4, "num_kv_heads": 2, **changed}
    with pytest.raises(error, match=message):
        aa.MultiHeadAttention(**given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"x": sample(5, 9)}, ValueError, r"x: wanted shape \(\.\.\., L, 10\), as wq has rows, got \(5, 9\)"),
        ({"x": sample(10)}, ValueError, r"x: wanted shape \(\.\.\., L, 10\)"),
        ({"x": sample(5, 10, dtype=np.float64)}, TypeError, "x: wanted dtype float32 like the weights"),
        (
            {"x": np.ma.array(sample(5, 10))},
            TypeError,
            "x: MaskedArray is not taken, masked entries would be",
        ),
        ({"x": sample(5, 10), "kv": [[1.0] * 8]}, TypeError, "kv: wanted an array, got list"),
        (
            {"x": sample(5, 10), "kv": sample(5, 8), "return_weights": 1},
            TypeError,
            "return_weights: wanted True",
        ),
        ({"x": sample(5, 10), "kv": sample(5, 10)}, ValueError, r"kv: wanted shape \(\.\.\., L, 8\)"),
        ({"x": sample(5, 10)}, ValueError, "kv: wanted an array of width 8, got None"),
        ({"x": sample(5, 10), "kv": sample(5, 8), "positions": [1]}, ValueError, "positions: .*has no rope"),
        (
            {"x": sample(5, 10), "kv": sample(5, 8), "kv_positions": 1},
            ValueError,
            "kv_positions: .*has no rope",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, error, message):
    layer = aa.MultiHeadAttention(**weights(kv_width=8), num_heads=4, num_kv_heads=2)
    with pytest.raises(error, match=message):
        layer(**call)


def test_arrays_of_two_libraries_are_refused():
    torch = module("torch")
    p = weights()
    with pytest.raises(TypeError, match="wk: wanted an array of numpy like wq, got one of torch"):
        aa.MultiHeadAttention(**{**p, "wk": torch.asarray(p["wk"])}, num_heads=4, num_kv_heads=2)
    layer = aa.MultiHeadAttention(**p, num_heads=4, num_kv_heads=2)
    with pytest.raises(TypeError, match="x: wanted an array of numpy like the weights, got one of torch"):
        layer(torch.ones((5, 10)))


def test_stays_on_a_device_that_is_not_the_default():
    xp = module("array_api_strict")
    other = xp.Device("device1")
    layer = aa.MultiHeadAttention.init(
        6, num_heads=2, rope={"dims": 2}, biases=True, xp=xp, seed=0, device=other
    )
    x = xp.asarray(sample(2, 5, 6), device=other)
    assert layer(x, causal=True, q_offset=[0, 0]).device == other
    assert layer(x[:, :1, :], x, causal=True, kv_lengths=[3, 5]).device == other
    with pytest.raises(ValueError, match=r"x: wanted an array on device .*device1.* like the weights"):
        layer(xp.asarray(sample(2, 5, 6)))


def test_no_rows_and_no_keys():
    layer = aa.MultiHeadAttention(**weights(), num_heads=4, num_kv_heads=2, biases=biases(weights(), "o"))
    assert layer(sample(2, 0, 10)).shape == (2, 0, 7)
    out = layer(sample(3, 10), sample(0, 10))
    np.testing.assert_array_equal(out, np.broadcast_to(layer.parameters["bo"], (3, 7)))


def test_torch_modules_parameters_are_taken():
    torch = module("torch")
    linear = torch.nn.Linear(8, 8, bias=False)
    layer = aa.MultiHeadAttention(*([linear.weight.T] * 4), num_heads=2)
    layer(torch.ones((3, 8))).sum().backward()
    assert linear.weight.grad is not None
