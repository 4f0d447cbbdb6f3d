"""`anyattn.compile`: the structure fixed once, arrays given anew by name, wrong ones refused by name."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import anyattn as aa
from anyattn import dispatch, masks, registry, scores
from anyattn.backend import CAPABILITIES, Backend
from anyattn.errors import UnknownBackendError, UnsupportedCallError
from anyattn.kernels.key import KernelKey

rng = np.random.default_rng(7)
Q, K = rng.standard_normal((2, 2, 4, 9, 8)).astype("f4")
V = rng.standard_normal((2, 4, 9, 5)).astype("f4")
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], "f4")


@pytest.fixture(autouse=True)
def without_kernels():
    """What is held here does not hang on the backend, and `reference` compiles nothing and is there."""
    with aa.use(backend="reference"):
        yield


def build(**options):
    return aa.compile(**{"dtype": "float32", "head_dim": 8, "v_head_dim": 5, **options})


def dense(score_bias=0.0, seen=None):
    """Attention of Q, K, V by the definition, in float64."""
    s = Q.astype(float) @ np.swapaxes(K.astype(float), -1, -2) / np.sqrt(8) + score_bias
    s = s if seen is None else np.where(seen, s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)) @ V


def distance(slopes):
    return -np.asarray(slopes, float)[:, None, None] * abs(np.arange(9)[:, None] - np.arange(9))


def close(found, wanted):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_what_is_compiled_is_attention():
    f = build(
        mask=masks.sliding_window(3) | masks.global_tokens(1), causal=True, softcap=2.0, return_lse=True
    )
    wanted = aa.attention(
        Q,
        K,
        V,
        mask=masks.sliding_window(3) | masks.global_tokens(1),
        causal=True,
        softcap=2.0,
        return_lse=True,
    )
    for one, other in zip(f(Q, K, V), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    seen = np.tri(9, dtype=bool)
    close(build(causal=True)(Q, K, V), dense(seen=seen))
    close(build(causal=True, scale=8**-0.5)(Q, K, V), dense(seen=seen))
    x = [np.swapaxes(x, -2, -3) for x in (Q, K, V)]
    close(
        build(window=(2, 0), layout="blhd")(*x),
        np.swapaxes(dense(seen=seen & ~np.tri(9, k=-3, dtype=bool)), 1, 2),
    )


def test_sizes_may_differ_from_call_to_call():
    f = build(causal=True)
    for q, k, v in [
        (Q, K, V),
        (Q[:1, :2], K[:1, :2], V[:1, :2]),
        (Q[..., :1, :], K, V),
        (Q[0, 0], K[0, 0], V[0, 0]),
    ]:
        np.testing.assert_array_equal(f(q, k, v), aa.attention(q, k, v, causal=True))


def test_captured_arrays_are_given_anew_by_their_names():
    slopes = SLOPES.copy()
    f = build(score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j))
    close(f(Q, K, V), dense(distance(SLOPES)))
    close(f(Q, K, V, slopes=SLOPES[::-1].copy()), dense(distance(SLOPES[::-1])))
    close(f(Q, K, V, slopes=[1.0, 2, 3, 4]), dense(distance([1, 2, 3, 4])))
    close(f(Q, K, V), dense(distance(SLOPES)))
    assert f.arrays == {"slopes": "float32 (4,)"}
    np.testing.assert_array_equal(slopes, SLOPES)


def test_a_name_read_in_several_places_is_one_array():
    ramp = np.arange(9, dtype="f4")
    weights = [0.0, 1.0, 0.0, 1.0]
    f = build(
        mask=lambda b, h, i, j: ramp[j] <= ramp[i],
        score_mod=lambda s, b, h, i, j: s + weights[h] * ramp[j] - weights[h] * ramp[i],
    )
    assert f.arrays == {"ramp": "float32 (9,)", "weights": "float32 (4,)"}
    other = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5], "f4")
    bias = np.array(weights)[:, None, None] * (other[None, :] - other[:, None])
    close(f(Q, K, V, ramp=other), dense(bias, seen=other[None, :] <= other[:, None]))
    close(f(Q, K, V, ramp=other, weights=[0, 0, 0, 0]), dense(seen=other[None, :] <= other[:, None]))


def test_arrays_of_one_name_are_told_apart_by_a_number():
    f = build(score_mod=scores.alibi(SLOPES) + scores.alibi(SLOPES * 2))
    assert f.arrays == {"slopes": "float32 (4,)", "slopes_2": "float32 (4,)"}
    names = {}
    for name in f.arrays:
        names[name] = f(Q, K, V, **{name: np.zeros(4, "f4")})
    results = [dense(distance(2 * SLOPES)), dense(distance(SLOPES))]
    for found in names.values():
        assert min(abs(found - wanted).max() for wanted in results) < 2e-6
    assert abs(names["slopes"] - names["slopes_2"]).max() > 1e-3


def test_arrays_of_the_vocabulary_have_the_names_of_their_arguments():
    seen = np.tri(9, dtype=bool)
    blocks = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool)
    f = build(
        mask=masks.dense(seen)
        & masks.documents([0, 0, 0, 0, 1, 1, 1, 1, 1])
        & masks.block_sparse(~blocks | blocks, 3),
        score_mod=scores.alibi(4).then(scores.relative_bias(np.zeros((4, 7), "f4"))),
    )
    assert f.arrays == {
        "array": "bool (9, 9)",
        "ids": "int64 (9,)",
        "blocks": "bool (3, 3)",
        "slopes": "float32 (4,)",
        "table": "float32 (4, 7)",
    }
    table = rng.standard_normal((4, 7)).astype("f4")
    ids = np.array([0, 0, 1, 1, 2, 2, 0, 0, 0])
    bias = distance(SLOPES) + table[:, np.clip(np.arange(9)[:, None] - np.arange(9), -3, 3) + 3]
    all_seen = np.kron(blocks, np.ones((3, 3), bool)) & (ids[:, None] == ids)
    found = f(Q, K, V, array=np.ones((9, 9), bool), ids=ids, blocks=blocks, slopes=SLOPES, table=table)
    close(found, dense(bias, seen=all_seen))


def test_arrays_that_follow_the_batch_take_another_batch():
    f = build(mask=masks.padding([1, 2, 3]))
    close(f(Q, K, V, lengths=[9, 4]), dense(seen=np.arange(9) < np.array([9, 4])[:, None, None, None]))
    with pytest.raises(ValueError, match="lengths: wanted one entry for each of 2 batch entries"):
        f(Q, K, V, lengths=[9, 4, 1])


def test_arrays_of_other_lengths_compile_nothing():
    """Documents and the tables of functions are arguments with their sizes, which are no part of the code."""
    ramp = np.arange(9, dtype="f4")
    f = build(
        mask=masks.documents([0, 0, 1, 1, 1]) | masks.prefix([1]),
        score_mod=lambda s, b, h, i, j: s + ramp[j],
    )
    assert f(Q[:1], K[:1], V[:1], ids=[7]).shape == (1, 4, 9, 5)
    ids = np.array([0, 0, 1, 1, 2, 2, 0])
    seen = np.zeros((9, 9), bool)
    seen[:7, :7] = ids[:, None] == ids
    seen[:, 0] = True
    short = np.array([3.0, 1.0], "f4")
    found = f(Q[:1], K[:1], V[:1], ids=ids, ramp=short)
    close(found, dense(short[np.minimum(np.arange(9), 1)], seen=seen)[:1])
    other = build(mask=masks.documents(ids) | masks.prefix([1]), score_mod=lambda s, b, h, i, j: s + short[j])
    assert other.program.key == f.program.key
    rows = build(mask=masks.documents([[0, 1], [0, 0]]))
    ids = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0]])
    close(rows(Q, K, V, ids=ids), dense(seen=(ids[:, None, :] == ids[:, :, None])[:, None]))
    with pytest.raises(
        ValueError, match=r"ids: wanted shape \(any, any\) as it was compiled for, got \(9,\)"
    ):
        rows(Q, K, V, ids=ids[0])


@pytest.mark.parametrize(
    ("score", "table"),
    [
        (lambda table: lambda s, b, h, i, j: s + table[h] * table[0], SLOPES),
        (lambda table: lambda s, b, h, i, j: s + table[h] * table[0] * len(table), SLOPES),
        (lambda table: lambda s, b, h, i, j: s + table[h] * table[-1], SLOPES.tolist()),
        (lambda table: lambda s, b, h, i, j: s + table[h] * float(table.max()), SLOPES),
        (lambda table: lambda s, b, h, i, j: s + table[h] + sum(table), SLOPES),
        (lambda table: lambda s, b, h, i, j: s + table[h] + sum(table), SLOPES.tolist()),
        (lambda table: lambda s, b, h, i, j: s + table if table else s, np.array(2.0, "f4")),
    ],
)
def test_what_was_read_while_tracing_is_not_given_anew(score, table):
    f = build(score_mod=score(table))
    wanted = f(Q, K, V)
    assert f.arrays == {}
    with pytest.raises(ValueError, match="table: its values were read while the function was traced"):
        f(Q, K, V, table=SLOPES)
    np.testing.assert_array_equal(f(Q, K, V), wanted)


def test_captured_numbers_are_given_anew_unless_they_were_read():
    scale, power = np.array(2.0, "f4"), np.array(2)
    f = build(score_mod=lambda s, b, h, i, j: s - scale**2 * abs(i - j))
    close(f(Q, K, V, scale=np.array(0.5, "f4")), dense(distance([0.25] * 4)))
    g = build(score_mod=lambda s, b, h, i, j: s - abs(i - j) * sum([1] * int(power)) * power)
    close(g(Q, K, V), dense(distance([4.0] * 4)))
    with pytest.raises(ValueError, match="power: its values were read"):
        g(Q, K, V, power=np.array(3))


@pytest.mark.parametrize("table", [SLOPES, SLOPES.tolist()], ids=["array", "list"])
def test_what_one_function_read_is_not_given_anew_to_another(table):
    def sees(b, h, i, j):
        return j <= i + table[h] * 8

    def scaled(s, b, h, i, j):
        return s * float(table[0])

    def whole(s, b, h, i, j):
        return s + table[h]

    for options in (
        {"mask": sees, "score_mod": scaled},
        {"mask": masks.causal() | ~masks.from_function(sees), "score_mod": scores.softcap(3.0) + scaled},
        {"score_mod": scores.from_function(scaled).then(whole)},
    ):
        f = build(**options)
        assert f.arrays == {}
        with pytest.raises(ValueError, match="table: its values were read while the function was traced"):
            f(Q, K, V, table=SLOPES * 2)
    assert "table" in build(score_mod=whole).arrays


def test_sizes_that_a_function_used_stay():
    table = SLOPES
    f = build(score_mod=lambda s, b, h, i, j: s - table[h % len(table)] * abs(i - j))
    close(f(Q, K, V, table=SLOPES * 2), dense(distance(SLOPES * 2)))
    with pytest.raises(ValueError, match=r"table: wanted shape \(4,\) as it was compiled for, got \(3,\)"):
        f(Q, K, V, table=SLOPES[:3])


def test_lists_are_copied_and_arrays_are_not():
    numbers, array = SLOPES.tolist(), SLOPES.copy()
    f = build(score_mod=lambda s, b, h, i, j: s - (numbers[h] + array[h]) * abs(i - j))
    numbers[:] = [0.0] * 4
    array[:] = 1.0
    close(f(Q, K, V), dense(distance(SLOPES + 1.0)))


def test_lengths_given_anew_are_not_negative():
    for make, name in ((masks.prefix, "n"), (masks.padding, "lengths")):
        for value in ([3, 4], np.array([3, 4])):
            f = build(mask=make(value))
            close(f(Q, K, V, **{name: [9, 9]}), dense())
            for other in ([3, -1], np.array([3, -1])):
                with pytest.raises(ValueError, match=f"{name}: wanted 0 or more, got -1"):
                    f(Q, K, V, **{name: other})


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_relative_keys_take_the_queries_of_each_call(layout):
    table = rng.standard_normal((5, 8)).astype("f4")
    swap = (lambda x: np.swapaxes(x, -2, -3)) if layout == "blhd" else (lambda x: x)
    f = build(score_mod=scores.relative_keys(swap(Q[:1, :, :4]), table, layout=layout), layout=layout)
    assert f.arrays == {
        "q": f"float32 {swap(Q[:1, :, :4]).shape}",
        "table": "float32 (5, 8)",
    }
    for t in (table, table * 2):
        products = Q.astype(float) @ t.T.astype(float) / np.sqrt(8)
        places = np.clip(np.arange(9) - np.arange(9)[:, None], -2, 2) + 2
        bias = np.take_along_axis(products, np.broadcast_to(places, (2, 4, 9, 9)), axis=-1)
        close(swap(f(swap(Q), swap(K), swap(V), q=swap(Q), table=t)), dense(bias))
    with pytest.raises(TypeError, match="q: wanted in every call: it holds the queries of one call"):
        f(swap(Q), swap(K), swap(V))
    with pytest.raises(ValueError, match=r"q: wanted the queries of the call, of shape \(2, 4, 9, 8\), got"):
        f(swap(Q), swap(K), swap(V), q=swap(Q)[..., :4])
    with pytest.raises(ValueError, match=r"table: wanted shape \(5, 8\) as it was compiled for"):
        f(swap(Q), swap(K), swap(V), q=swap(Q), table=table[:3])


def test_what_is_declared_is_given_in_every_call():
    f = build(causal=True, bias=True, sinks=True, kv_lengths=True, q_offset=True)
    assert list(f.arrays) == ["bias", "kv_lengths", "q_offset", "sinks"]
    given = {
        "bias": rng.standard_normal((9, 9)).astype("f4"),
        "sinks": [0.0, 1.0, 2.0, 3.0],
        "kv_lengths": [9, 4],
        "q_offset": 0,
    }
    np.testing.assert_array_equal(f(Q, K, V, **given), aa.attention(Q, K, V, causal=True, **given))
    given.pop("sinks")
    with pytest.raises(TypeError, match=r"sinks: wanted in every call, as compile\(..., sinks=True\) said"):
        f(Q, K, V, **given)
    with pytest.raises(
        TypeError, match="bias: wanted True or False, whether calls will give it, got ndarray"
    ):
        build(bias=given["bias"])


def test_lengths_without_offsets_are_for_single_queries():
    f = build(causal=True, kv_lengths=True)
    q = Q[..., :1, :]
    np.testing.assert_array_equal(f(q, K, V, kv_lengths=[9, 4]), aa.attention(q, K, V, kv_lengths=[9, 4]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slope": SLOPES}, "slope: no captured array or declared argument has this name; there are slopes"),
        ({"bias": np.zeros((9, 9))}, "bias: no captured array or declared argument has this name"),
        ({"slopes": SLOPES.astype("f8")}, "slopes: wanted dtype float32 as it was compiled for, got float64"),
        ({"slopes": np.arange(4)}, "slopes: wanted dtype float32 as it was compiled for, got int64"),
        ({"slopes": SLOPES[None]}, r"slopes: wanted shape \(any,\) as it was compiled for, got \(1, 4\)"),
        ({"slopes": [[1.0], [2.0, 3.0]]}, "slopes: wanted numbers in equally long rows"),
        ({"slopes": "steep"}, "slopes: wanted an array of float32, got 'steep'"),
        ({"slopes": [True] * 4}, "slopes: wanted an array of float32"),
        ({"slopes": None}, "slopes: wanted an array of float32, got None"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(given, message):
    slopes = SLOPES
    f = build(score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j))
    with pytest.raises((TypeError, ValueError), match=message):
        f(Q, K, V, **given)


def test_masks_given_anew_are_boolean():
    f = build(mask=np.tri(9, dtype=bool))
    assert f.arrays == {"mask": "bool (9, 9)"}
    close(f(Q, K, V, mask=np.tri(9, k=1, dtype=bool)), dense(seen=np.tri(9, k=1, dtype=bool)))
    with pytest.raises(TypeError, match="mask: wanted dtype bool as it was compiled for, got float64"):
        f(Q, K, V, mask=np.tri(9))
    with pytest.raises(TypeError, match="mask: wanted an array of bool, got list"):
        f(Q, K, V, mask=[[True]])
    with pytest.raises(ValueError, match="mask: wanted a shape that broadcasts"):
        f(Q, K, V, mask=np.tri(8, dtype=bool))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q.astype("f8"), K, V), "q: wanted dtype float32 as it was compiled for, got float64"),
        ((Q, K, V.astype("f8")), "v: wanted dtype float32 as it was compiled for, got float64"),
        ((Q, K.astype("f8"), V), "k: wanted dtype float32 like q, got float64"),
        ((Q[..., :4], K[..., :4], V), "q: wanted 8 features on the last axis as it was compiled for"),
        ((Q, K[..., :4], V), "k: wanted 8 features like q, got 4"),
        ((Q, K, K), "v: wanted 5 features on the last axis as it was compiled for"),
        ((Q, K, None), "v: wanted an array, got NoneType"),
        (([1.0], K, V), "q: wanted an array, got list"),
    ],
)
def test_calls_are_held_to_what_was_compiled(arguments, message):
    f = build()
    with pytest.raises((TypeError, ValueError), match=message):
        f(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int32"}, "dtype: wanted float16, bfloat16, float32, float64, got 'int32'"),
        ({"dtype": float}, "dtype: wanted float16, bfloat16, float32, float64, got <class 'float'>"),
        ({"head_dim": 0}, "head_dim: wanted 1 or more"),
        ({"head_dim": 8.0}, "head_dim: wanted an integer"),
        ({"window": (-1, 0)}, "window: left is -1"),
        ({"softcap": 0.0}, "softcap: wanted a positive number"),
        ({"layout": "bhdl"}, "layout: wanted 'bhld' or 'blhd'"),
        ({"mask": 3}, "mask: wanted a mask of anyattn.masks"),
        ({"causal": 1}, "causal: wanted True or False"),
        (
            {"score_mod": (lambda bias: lambda s, b, h, i, j: s + bias[j])(SLOPES), "bias": True},
            "bias: calls will give attention's bias, and a function captures an array of that name",
        ),
        ({"mask": masks.padding([1, 2]) & masks.padding([1, 2, 3])}, "wanted one entry for each of"),
    ],
)
def test_wrong_options_are_found_when_compiling(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(**options)


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("f2"), "numpy.float16"])
def test_dtypes_by_name_and_by_object(dtype):
    f = build(dtype=dtype)
    assert f.dtype == "float16"
    q, k, v = (x.astype("f2") for x in (Q, K, V))
    np.testing.assert_array_equal(f(q, k, v), aa.attention(q, k, v))


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    f = build(dtype=ml_dtypes.bfloat16)
    assert f.dtype == "bfloat16"
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (Q, K, V))
    np.testing.assert_array_equal(f(q, k, v).astype("f4"), aa.attention(q, k, v).astype("f4"))


def test_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    slopes = torch.from_numpy(SLOPES)
    f = build(score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j), dtype=torch.float32)
    q, k, v = map(torch.from_numpy, (Q, K, V))
    other = torch.tensor([1.0, 2, 3, 4], requires_grad=True)
    out = f(q, k, v, slopes=other)
    close(out.detach().numpy(), dense(distance([1, 2, 3, 4])))
    (gradient,) = torch.autograd.grad(out.sum(), other)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).all()
    with pytest.raises(TypeError, match="slopes: wanted an array of torch like q, got one of numpy"):
        f(q, k, v, slopes=SLOPES)


def test_a_numpy_table_may_be_replaced_by_one_of_the_library_of_the_call():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    slopes = SLOPES
    f = build(score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j))
    q, k, v = map(torch.from_numpy, (Q, K, V))
    close(f(q, k, v, slopes=torch.from_numpy(SLOPES)).numpy(), dense(distance(SLOPES)))


def test_jax_under_jit():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    slopes = [0.5, 0.25, 0.125, 0.0625]
    f = build(score_mod=lambda s, b, h, i, j: s - slopes[h] * abs(i - j))
    run = jax.jit(lambda q, slopes: f(q, jax.numpy.asarray(K), jax.numpy.asarray(V), slopes=slopes))
    close(np.asarray(run(Q, np.float32([4, 3, 2, 1]))), dense(distance([4, 3, 2, 1])))


# The backend


class Generating(Backend):
    """Takes what `reference` takes, and says that it generates code."""

    name = "generating"
    arrays = ("numpy.ndarray",)
    devices = ("cpu",)
    capabilities = frozenset(CAPABILITIES) - {"softcap"}

    def source(self, call):
        return f"# code for D = {call.head_dim}, {sorted(call.features)}\n"

    def kernel_key(self, call):
        return KernelKey(self.name, "forward", "none", call.dtype, "float32", call.head_dim, 5, "here")

    def run(self, call):
        return np.full((*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim), 7, call.dtype), None


@pytest.fixture
def generating(monkeypatch):
    offers, status, found = registry._offers, registry._status, Generating()
    monkeypatch.setattr(registry, "_offers", lambda: {**offers(), "generating": []})
    monkeypatch.setattr(
        registry,
        "_status",
        lambda name: registry.Status(name, found, None, "1.0") if name == "generating" else status(name),
    )


def test_the_backend_is_fixed_when_compiling(generating):
    f = build(backend="generating", causal=True)
    assert f.backend == "generating"
    with aa.use(backend="reference"), dispatch.recording() as records:
        assert np.all(f(Q, K, V) == 7)
    assert [record.backend for record in records] == ["generating"]
    with aa.use(backend="generating"):
        g = build()
    assert g.backend == "generating"
    assert np.all(g(Q, K, V) == 7)
    assert build().backend == "reference"


def test_a_backend_gives_its_own_source_and_key(generating):
    f = build(backend="generating", causal=True)
    assert f.source == "# code for D = 8, ['causal']\n"
    assert f.cache_key == KernelKey("generating", "forward", "none", "float32", "float32", 8, 5, "here")


def test_a_backend_without_code_of_its_own(generating, monkeypatch):
    monkeypatch.delattr(Generating, "source")
    monkeypatch.delattr(Generating, "kernel_key")
    f = build(backend="generating", causal=True)
    head, _, rest = f.source.partition("\n")
    assert head == "# generating shows no code of its own; it computes this."
    assert "visible = j <= i" in rest
    assert (f.cache_key.backend, f.cache_key.structure) == ("generating", f.program.text)


def test_a_backend_refuses_with_its_reasons(generating):
    with pytest.raises(UnsupportedCallError, match=r"'generating' .*has no softcap"):
        build(backend="generating", softcap=1.0)
    with pytest.raises(UnknownBackendError, match="'nobody' is not installed"):
        build(backend="nobody")


def test_a_backend_without_its_device_refuses_as_attention_does():
    with pytest.raises(UnsupportedCallError) as caught:
        build(backend="cupy", causal=True)
    known = ("unavailable: pip install 'anyattn[cupy]'", "no CUDA device", "takes arrays of cupy.ndarray")
    assert caught.value.reasons["cupy"][0].startswith(known)


# What it says of itself


def test_the_key_is_of_the_structure_and_not_of_values():
    def key(**options):
        return build(**options).cache_key

    assert key(mask=masks.sliding_window(3)) == key(mask=masks.sliding_window(500))
    assert key(score_mod=scores.alibi(SLOPES)) == key(score_mod=scores.alibi(SLOPES[:2] * 3))
    assert key(causal=True) == key(mask=masks.from_function(lambda b, h, i, j: i >= j))
    keys = [
        key(),
        key(causal=True),
        key(mask=masks.strided(4)),
        key(mask=masks.strided(8)),
        key(dtype="float64"),
        key(head_dim=16),
        key(v_head_dim=16),
        key(sinks=True),
        key(bias=True),
        key(return_lse=True),
        key(score_mod=scores.alibi(SLOPES)),
        key(score_mod=scores.alibi(SLOPES.astype("f2"))),
    ]
    assert len({k.digest for k in keys}) == len(keys)
    text = str(keys[1])
    assert KernelKey.parse(text) == keys[1]
    assert '"le bool' in text
    assert '"accumulate": "float32"' in text


def test_giving_arrays_does_not_change_the_structure():
    from anyattn.describe import Options, describe
    from anyattn.expr.captures import find_captures, rebind
    from anyattn.expr.program import lower

    score = scores.alibi([1.0, 2, 3, 4]) + scores.relative_bias(np.zeros((4, 7), "f4"))
    f = build(score_mod=score)
    found = find_captures([score.expr])
    values = {found["slopes"]: SLOPES, found["table"]: np.ones((4, 7), "f4")}
    [other] = rebind([score.expr], values, "float32")
    call = describe("attention", Q, K, V, Options(score_mod=scores.Score(other, "other")))
    assert lower(call.visible, call.score).key == f.program.key


def test_source_of_the_reference_is_the_expression():
    slopes = SLOPES
    f = build(
        mask=masks.sliding_window(5) | masks.strided(3),
        score_mod=lambda s, b, h, i, j: aa.where(i - j < 4, s, s * slopes[h]),
    )
    head, names, body = f.source.partition("x0 = i - j\n")
    assert "reference evaluates this with array-API calls" in head
    assert "q, k: float32 (..., 8); v: (..., 5); scores and sums: float32" in head
    assert names
    visible, score, *arguments = body.splitlines()
    assert visible in (
        "visible = ((x0 % 3) == p0) | ((x0 <= p1) & ((j - i) <= p2))",
        "visible = (p0 == (x0 % 3)) | ((x0 <= p1) & ((j - i) <= p2))",
    )
    assert score.startswith("score = where((x0 < p3), score, (")
    assert "t0[h]" in score
    assert "# p1: int, here 5" in arguments
    assert "# t0: float32 (4,), slopes" in arguments
    assert "score unchanged, every key visible" in build().source


def test_explain_tells_of_a_sample_or_of_a_call():
    f = build(causal=True, kv_lengths=True)
    found = f.explain()
    assert found.backend == "reference"
    assert "forced by backend=" in repr(found)
    assert found.call.head_dim == 8
    assert found.call.features >= {"causal", "kv_lengths"}
    assert f.explain(Q[..., :1, :], K, V, kv_lengths=[1, 2]).call.batch_shape == (2,)
    with pytest.raises(TypeError, match="kv_lengths: wanted in every call"):
        f.explain(Q, K, V)
    with pytest.raises(TypeError, match="explain: wanted q, k and v, or nothing"):
        f.explain(kv_lengths=[1, 2])


def test_repr_tells_what_was_compiled():
    f = build(mask=masks.strided(3), score_mod=scores.alibi(4), window=(1, 1), return_lse=True)
    assert repr(f) == (
        "<compiled attention float32 D=8 Dv=5 on reference, mask=strided(3); score_mod=alibi(4); "
        f"return_lse=True; window=(1, 1); arrays: slopes; key {f.cache_key.digest}>"
    )


def test_partial_functions_and_random_blocks():
    def score(s, b, h, i, j, *, weights):
        return s * weights[h]

    f = build(score_mod=functools.partial(score, weights=SLOPES), mask=masks.random_blocks(2, 3, seed=5))
    assert list(f.arrays) == ["weights"]
    wanted = aa.attention(
        Q,
        K,
        V,
        score_mod=functools.partial(score, weights=SLOPES * 2),
        mask=masks.random_blocks(2, 3, seed=5),
    )
    np.testing.assert_array_equal(f(Q, K, V, weights=SLOPES * 2), wanted)


def test_tables_that_anyattn_makes_itself_are_not_offered():
    assert build(mask=masks.global_tokens(list(range(20)))).arrays == {}
    t5 = scores.t5_bias(np.zeros((8, 4), "f4"), True, 20)
    assert build(score_mod=t5).arrays == {"table": "float32 (8, 4)"}
