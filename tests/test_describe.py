"""What a call makes of its arguments: odd but right ones are taken, wrong ones are named.

The conformance kit holds every backend to the common errors; here are the corners.
"""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn.describe import Options, describe
from anyattn.errors import UnknownBackendError

RNG = np.random.default_rng(0)
Q = RNG.standard_normal((2, 4, 5, 8)).astype("f4")
K = RNG.standard_normal((2, 2, 9, 8)).astype("f4")
V = RNG.standard_normal((2, 2, 9, 3)).astype("f4")


def call(**options):
    return aa.attention(Q, K, V, **options)


def test_numpy_scalars_are_numbers():
    scale, slope = np.float32(0.5), np.float32(0.25)
    found = call(
        kv_lengths=np.int64(7),
        q_offset=np.int32(2),
        scale=scale,
        sinks=np.float32(0.5),
        causal=True,
        mask=aa.masks.prefix(np.int8(6)),
        score_mod=lambda s, b, h, i, j: s + (-slope) * abs(i - j),
    )
    wanted = call(
        kv_lengths=7,
        q_offset=2,
        scale=0.5,
        sinks=[0.5] * 4,
        causal=True,
        mask=aa.masks.prefix(6),
        score_mod=lambda s, b, h, i, j: s - 0.25 * abs(i - j),
    )
    np.testing.assert_array_equal(found, wanted)


def test_description_of_a_call():
    found = describe("attention", Q, K, V, Options(causal=True, kv_lengths=[3, 9], q_offset=[0, 4]))
    assert found.features == {"causal", "kv_lengths", "q_offset", "grouped_heads"}
    assert (found.group_size, found.q_len, found.k_len, found.head_dim, found.v_head_dim) == (2, 5, 9, 8, 3)
    assert found.lengths_host.tolist() == [3, 9]
    assert found.offset_host.tolist() == [0, 4]
    assert found.accumulate == "float32"
    assert repr(found.visible) == "((j <= i) & (kv_lengths[b] > j))" or found.visible.kind == "bool"


def test_the_default_offset_is_no_feature():
    assert "q_offset" not in describe("attention", Q, K, V, Options(causal=True, q_offset=4)).features
    assert "q_offset" not in describe("attention", Q, K, V, Options(q_offset=3)).features
    assert "q_offset" in describe("attention", Q, K, V, Options(causal=True, q_offset=3)).features


def test_a_copy_of_the_lengths_is_kept():
    lengths = np.array([3, 9])
    found = describe("attention", Q, K, V, Options(kv_lengths=lengths))
    lengths[:] = 0
    assert found.lengths_host.tolist() == [3, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_lengths": np.zeros((0,), int)},
        {"kv_lengths": []},
        {"mask": aa.masks.prefix(np.zeros((0,), int)) | aa.masks.documents(np.zeros((0, 9), int))},
        {"score_mod": aa.scores.relative_keys(Q[:0], np.ones((3, 8), "f4"))},
    ],
)
def test_an_empty_batch_needs_no_entries(options):
    assert aa.attention(Q[:0], K[:0], V[:0], **options).shape == (0, 4, 5, 3)


def test_no_keys_need_no_documents():
    out = aa.attention(Q, K[:, :, :0], V[:, :, :0], mask=aa.masks.documents(np.zeros(0, int)))
    np.testing.assert_array_equal(out, np.zeros((2, 4, 5, 3), "f4"))


def test_a_hidden_nan_indexes_nothing():
    spoiled = K.copy()
    spoiled[..., -1, :] = np.nan
    table = RNG.standard_normal((4, 6)).astype("f4")

    def score(s, b, h, i, j):
        return s + table[h, aa.floor(s)]

    found = aa.attention(Q, spoiled, V, kv_lengths=8, score_mod=score)
    np.testing.assert_array_equal(found, call(kv_lengths=8, score_mod=score))


def test_a_hidden_key_has_weight_zero_in_a_row_that_is_nan():
    q, k = np.ones((1, 1, 1), "f4"), np.array([[[np.nan], [1.0]]], "f4")
    np.testing.assert_array_equal(aa.attention_weights(q, k, kv_lengths=1), [[[np.nan, 0]]])
    np.testing.assert_array_equal(aa.attention_stats(q, k, kv_lengths=1)["key_mass"], [[np.nan, 0]])


def test_stats_may_come_from_a_generator():
    assert list(aa.attention_stats(Q, K, stats=(name for name in ("max", "entropy")))) == ["max", "entropy"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q_offset": 10**19}, ValueError, "q_offset: wanted integers of 64 bits"),
        ({"q_offset": 2**63 - 3}, ValueError, "q_offset: wanted integers that fit int64"),
        ({"q_offset": 2**62}, None, ""),
        (
            {"q_offset": np.array([2**63 + 5] * 2, "u8")},
            ValueError,
            "q_offset: wanted integers that fit int64",
        ),
        ({"window": (10**30, 0)}, None, ""),
        (
            {"mask": lambda b, h, i, j: i + 10**30 > j},
            TypeError,
            "wanted integers of at most 9223372036854775807",
        ),
        ({"sinks": [[1, 2], [3]]}, ValueError, "sinks: wanted one real number a query head"),
        (
            {"kv_lengths": [[1, 2], [3], [4, 5, 6]]},
            ValueError,
            "kv_lengths: wanted integers in equally long rows",
        ),
        ({"kv_lengths": [True, 2]}, TypeError, "kv_lengths: wanted an integer, got bool"),
        ({"kv_lengths": [[1], [2, 3]]}, ValueError, "kv_lengths: wanted integers in equally long rows"),
        ({"kv_lengths": np.ma.array([3, 4], mask=[1, 0])}, TypeError, "kv_lengths: MaskedArray is not taken"),
        ({"mask": np.ma.array(np.ones((5, 9), bool))}, TypeError, "mask: MaskedArray is not taken"),
        ({"bias": np.ma.array(np.ones((5, 9)))}, TypeError, "bias: MaskedArray is not taken"),
        ({"scale": np.array("0.5")}, TypeError, "scale: wanted a real number, got ndarray"),
        ({"softcap": np.ones(())}, TypeError, "softcap: wanted a real number, got ndarray"),
        ({"causal": 1}, TypeError, "causal: wanted True or False, got 1"),
        ({"layout": "bnsd"}, ValueError, "layout: wanted 'bhld' or 'blhd', got 'bnsd'"),
        ({"dropout": 0.1}, ValueError, "dropout_seed: wanted an integer to draw dropout=0.1 from"),
        ({"dropout_seed": 1.0}, TypeError, "dropout_seed: wanted an integer, got float"),
        ({"dropout": 1.0}, ValueError, r"dropout: wanted a probability in \[0, 1\)"),
        ({"mask": np.ones((4, 5, 9), bool)}, ValueError, "mask: wanted 2 axes"),
    ],
)
def test_values_that_do_not_fit(options, error, message):
    if error is None:
        assert call(**options).shape == (2, 4, 5, 3)
        return
    with pytest.raises(error, match=message):
        call(**{"causal": True, **options})


def test_block_sparse_takes_every_rank_that_broadcasts():
    blocks = RNG.random((4, 5, 9)) < 0.5
    np.testing.assert_array_equal(
        call(mask=aa.masks.block_sparse(blocks, 1)), call(mask=np.broadcast_to(blocks, (2, 4, 5, 9)))
    )


def test_without_heads_a_mask_has_two_axes():
    with pytest.raises(ValueError, match="mask: wanted 2 axes"):
        aa.attention(Q[0, 0], K[0, 0], V[0, 0], mask=np.ones((1, 5, 9), bool))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stats": 5}, TypeError, "stats: wanted a sequence of names"),
        ({"stats": "max"}, TypeError, "stats: wanted a sequence of names"),
        ({"stats": ("mean",)}, ValueError, "stats: wanted one or more names"),
        ({"return_lse": True}, TypeError, "attention_stats: unexpected option 'return_lse'"),
    ],
)
def test_stats_refuses(options, error, message):
    with pytest.raises(error, match=message):
        aa.attention_stats(Q, K, **options)


def test_explain_takes_what_the_call_takes():
    assert aa.explain(Q, K, stats=("max",)).call.operation == "stats"
    assert aa.explain(Q, K, rows=[0]).call.operation == "weights"
    with pytest.raises(TypeError, match="explain: unexpected option 'rows'"):
        aa.explain(Q, K, V, rows=[0])


def test_the_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("ANYATTN_BACKEND", "refrence")
    with pytest.raises(UnknownBackendError, match="ANYATTN_BACKEND: 'refrence' is not installed"):
        call()


@pytest.mark.parametrize("rows", [[[1], [2]], [0, 5], [-1], 5, 1.5, "0"])
def test_rows_that_are_not_there(rows):
    with pytest.raises((TypeError, ValueError), match="rows: wanted"):
        aa.attention_weights(Q, K, rows=rows)


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", reason="torch is not installed")

    def test_autocast_does_not_lower_the_precision(self, torch):
        tensors = [torch.from_numpy(x) for x in (Q, K, V)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = aa.attention(*tensors, causal=True)
        torch.testing.assert_close(found, torch.from_numpy(call(causal=True)), rtol=1e-5, atol=1e-6)

    def test_sparse_tensors_are_refused(self, torch):
        tensors = [torch.from_numpy(x) for x in (Q, K, V)]
        with pytest.raises(TypeError, match=r"q: Tensor is not taken, its layout is torch\.sparse_coo"):
            aa.attention(tensors[0].to_sparse(), *tensors[1:])

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
    def test_tensors_of_jit_trace_are_refused(self, torch):
        """What Numba computes would be a constant of the traced function."""
        tensors = [torch.from_numpy(x) for x in (Q, K, V)]
        with pytest.raises(TypeError, match=r"q: Tensor is not taken, torch\.jit\.trace would keep"):
            torch.jit.trace(lambda *given: aa.attention(*given, causal=True), tensors)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    def test_nested_tensors_are_refused(self, torch):
        nested = torch.nested.nested_tensor([torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)])
        with pytest.raises(TypeError, match=r"q: Tensor is not taken, it is nested"):
            aa.attention(nested, nested, nested)

    def test_tensors_are_no_numbers(self, torch):
        tensors = [torch.from_numpy(x) for x in (Q, K, V)]
        with pytest.raises(TypeError, match="softcap: wanted a real number, got Tensor"):
            aa.attention(*tensors, softcap=torch.tensor(2.0))
        with pytest.raises(TypeError, match="window: left: wanted an integer, got Tensor"):
            aa.attention(*tensors, window=(torch.tensor(2), 0))


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self):
        return pytest.importorskip("jax", reason="JAX is not installed")

    def test_integers_that_32_bits_do_not_hold_are_refused(self, jax):
        tensors = [jax.numpy.asarray(x) for x in (Q, K, V)]
        with pytest.raises(ValueError, match="q_offset: wanted integers that fit int32"):
            aa.attention(*tensors, causal=True, q_offset=[2**32 - 9] * 2)
        far = aa.attention(*tensors, window=(2**40, 0))
        np.testing.assert_allclose(far, call(window=(None, 0)), rtol=1e-5, atol=1e-6)

    def test_unread_unsigned_lengths_do_not_wrap(self, jax):
        tensors = [jax.numpy.asarray(x) for x in (Q, K, V)]
        program = jax.jit(lambda lengths: aa.attention(*tensors, kv_lengths=lengths))
        found = program(jax.numpy.asarray([4000000000, 3], dtype="uint32"))
        np.testing.assert_allclose(found, call(kv_lengths=[9, 3]), rtol=1e-5, atol=1e-6)

    def test_the_loop_is_real_when_only_keys_are_traced(self, jax):
        q, long = jax.numpy.ones((1, 1, 16, 8)), jax.numpy.ones((1, 1, 4096, 8))
        program = jax.make_jaxpr(lambda k: aa.attention(q, k, k))(long)
        assert sum(e.primitive.name == "scan" for e in program.eqns) == 1

    def test_unread_rows_stay_inside(self, jax):
        tensors = [jax.numpy.asarray(x) for x in (Q, K)]
        found = jax.jit(lambda rows: aa.attention_weights(*tensors, rows=rows))(jax.numpy.asarray([-3, 99]))
        np.testing.assert_allclose(found, aa.attention_weights(Q, K, rows=[0, 4]), rtol=1e-5)
