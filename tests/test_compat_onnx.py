"""`anyattn.compat.onnx` gives what onnx's own cases want, and what the operators' text says beyond them."""

from __future__ import annotations

from collections import Counter
from inspect import Parameter, signature

import numpy as np
import pytest
from docs_scripts import need_docs, script

import anyattn as aa
from anyattn.compat.onnx import attention, linear_attention

onnx = pytest.importorskip("onnx", reason="runs the cases that onnx ships")
need_docs(whole_module=True)
shipped = script("onnx_cases")

RNG = np.random.default_rng(0)
Q, K, V = (
    RNG.standard_normal((2, heads, n, dim)).astype(np.float32)
    for heads, n, dim in ((6, 5, 8), (3, 7, 8), (3, 7, 4))
)
WHOLE = np.full(2, 7)


@pytest.fixture(autouse=True)
def reference():
    """Translation is the same on every backend; only the shipped cases are run on each."""
    with aa.use(backend="reference"):
        yield


@pytest.mark.parametrize(("backend", "library"), shipped.COLUMNS)
def test_shipped_cases(backend, library):
    cases = shipped.cases()
    assert Counter(map(shipped.opset, cases.values())) == {23: 69, 24: 13, 25: 11}
    wrong = {name: shipped.outcome(case, backend, library) for name, case in cases.items()}
    assert {name: what for name, what in wrong.items() if what} == {}


@pytest.mark.parametrize(("backend", "library"), shipped.COLUMNS)
def test_shipped_linear_cases(backend, library):
    cases = shipped.cases("LinearAttention")
    assert len(cases) == 14
    wrong = {name: shipped.outcome(case, backend, library) for name, case in cases.items()}
    assert {name: what for name, what in wrong.items() if what} == {}


def test_page_of_shipped_cases_is_current():
    """Every case passes in every column, as the tests above and `test_cuda_onnx` hold."""
    every = dict.fromkeys([*shipped.cases(), *shipped.cases("LinearAttention")])
    text = shipped.page(dict.fromkeys(shipped.SHOWN, every))
    assert shipped.PAGE.read_text(encoding="utf-8") == text, "run python docs/onnx_cases.py"


@pytest.mark.parametrize(
    ("function", "operator", "opset"),
    [(attention, "Attention", 25), (linear_attention, "LinearAttention", 27)],
)
def test_signatures_are_the_operators(function, operator, opset):
    schema = onnx.defs.get_schema(operator, opset)
    parameters = signature(function).parameters.values()
    inputs = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    assert inputs == [each.name for each in schema.inputs]
    keywords = {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}
    assert keywords.keys() - {"num_outputs", "opset", "backend"} == schema.attributes.keys()
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name:
            default = onnx.helper.get_attribute_value(attribute.default_value)
            assert keywords[name] == (default.decode() if isinstance(default, bytes) else default)


def test_integer_masks_are_added():
    mask = RNG.integers(-3, 4, (5, 7))
    [got] = attention(Q, K, V, mask.astype(np.int8))
    np.testing.assert_array_equal(got, attention(Q, K, V, mask.astype(np.float32))[0])
    assert not np.allclose(got, attention(Q, K, V)[0])


@pytest.mark.parametrize(
    ("of_qk", "of_v"), [("float16", "float32"), ("float32", "float16"), ("float32", "float64")]
)
def test_values_of_another_dtype(of_qk, of_v):
    """Wider values, some beyond the range of float16, are not squeezed into the dtype of Q."""
    q, k, v = Q.astype(of_qk), K.astype(of_qk), V.astype(of_v) * (1 if of_v == "float16" else 30_000)
    y, present_key, present_value = attention(q, k, v, num_outputs=3, scale=0.1)
    assert (y.dtype, present_key.dtype, present_value.dtype) == (q.dtype, q.dtype, v.dtype)
    wanted = aa.attention(*(x.astype(np.float64) for x in (q, k, v)), scale=0.1).astype(of_qk)
    np.testing.assert_allclose(y, wanted, rtol=3 * np.finfo(of_qk).eps, atol=1e-6)


def test_scores_before_the_cap_are_not_capped():
    """onnx 1.23's reference implementation caps them; its function body and the text do not."""
    plain = np.einsum("bhgid,bhjd->bhgij", Q.reshape(2, 3, 2, 5, 8), K).reshape(2, 6, 5, 7) * 0.5
    mask = RNG.standard_normal((5, 7)) < 0.5
    options = {"scale": 0.5, "softcap": 2.0, "is_causal": 1, "num_outputs": 4}
    raw, capped, masked, weights = (
        attention(Q, K, V, mask, **options, qk_matmul_output_mode=mode)[3] for mode in range(4)
    )
    cap = 2 * np.tanh(plain / 2)
    seen = mask & np.tri(5, 7, dtype=bool)
    np.testing.assert_allclose(raw, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(capped, cap, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked, np.where(seen, cap, -np.inf), rtol=1e-5, atol=1e-6)
    p = np.where(seen, np.exp(cap), 0)
    total = p.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, np.divide(p, total, where=total > 0, out=np.zeros_like(p)), atol=1e-6)


@pytest.mark.parametrize("mask", [np.array([True]), np.zeros(1, np.float32)])
def test_a_mask_of_one_key(mask):
    """From opset 24 on the other keys are padding; opset 23 broadcasts."""
    np.testing.assert_allclose(
        attention(Q, K, V, mask)[0], attention(Q, K[:, :, :1], V[:, :, :1])[0], rtol=1e-5
    )
    np.testing.assert_array_equal(attention(Q, K, V, mask, opset=23)[0], attention(Q, K, V)[0])


def test_softmax_precision():
    """DOUBLE computes in float64; the others ask for no more than is done anyway."""
    q = (300 * Q).astype(np.float32)
    [plain] = attention(q, K, V)
    [wide] = attention(q, K, V, softmax_precision=onnx.TensorProto.DOUBLE)
    wanted = aa.attention(*(x.astype(np.float64) for x in (q, K, V))).astype(np.float32)
    np.testing.assert_array_equal(wide, wanted)
    assert (plain != wide).any()
    np.testing.assert_array_equal(attention(q, K, V, softmax_precision=onnx.TensorProto.FLOAT16)[0], plain)


def test_windows_and_causal_order_stand_on_the_offset():
    lengths = np.array([7, 4])
    [got] = attention(Q, K, V, None, None, None, lengths, is_causal=1, left_window_size=2)
    i = np.arange(5)[:, None] + lengths[:, None, None, None] - 5
    j = np.arange(7)
    seen = (j <= i) & (j >= i - 2) & (j < lengths[:, None, None, None])
    np.testing.assert_allclose(got, aa.attention(Q, K, V, mask=seen), rtol=1e-5, atol=1e-6)
    assert (got[1, :, 0] == 0).all()


def test_causal_order_beside_a_mask_of_one_row():
    """onnx 1.23's reference implementation gives all rows the causal order of the first."""
    mask = np.linspace(-1, 1, 7, dtype=np.float32)[None]
    got = attention(Q, K, V, mask, is_causal=1)[0]
    np.testing.assert_array_equal(got, attention(Q, K, V, np.tile(mask, (5, 1)), is_causal=1)[0])
    np.testing.assert_allclose(got[:, :, 0], np.repeat(V[:, :, 0], 2, axis=1), rtol=1e-5)


def test_gradients_reach_the_past_and_the_mask():
    torch = pytest.importorskip("torch", reason="gradients need torch")
    x = {name: torch.from_numpy(a).double().requires_grad_() for name, a in (("q", Q), ("k", K), ("v", V))}
    past = [x[name][:, :, :3].detach().clone().requires_grad_() for name in "kv"]
    mask = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    y = attention(*x.values(), mask, *past, opset=24)[0]
    (y**2).sum().backward()
    grown = [
        torch.cat([a, b], 2).detach().requires_grad_() for a, b in zip(past, (x["k"], x["v"]), strict=True)
    ]
    bias = torch.nn.functional.pad(mask.detach(), (0, 4), value=-torch.inf)
    (aa.attention(x["q"].detach(), *grown, bias=bias) ** 2).sum().backward()
    for got, wanted in zip(past, grown, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad[:, :, :3])
    assert mask.grad.abs().max() > 0


P3 = {"Q": Q.transpose(0, 2, 1, 3).reshape(2, 5, 48), "K": K.reshape(2, 7, 24), "V": V.reshape(2, 7, 12)}
PAST = {"past_key": K, "past_value": V}
ERRORS = {
    "rank": ({"K": K[0]}, ValueError, "K: wanted 4 axes"),
    "batch": ({"V": V[:1]}, ValueError, "V: wanted a batch of 2"),
    "dtype": ({"K": K.astype(np.float16)}, TypeError, "K: wanted dtype float32 like Q"),
    "keys": ({"K": K[..., :4]}, ValueError, "K: wanted 8 features like Q"),
    "heads": ({"K": K[:, :2]}, ValueError, "V: wanted 2 heads like K"),
    "no heads": (P3, TypeError, "q_num_heads: Q, K and V have 3 axes: wanted an integer"),
    "odd heads": (
        P3 | {"q_num_heads": 5, "kv_num_heads": 3},
        ValueError,
        "Q: wanted a last axis that 5 heads",
    ),
    "heads twice": ({"q_num_heads": 6}, ValueError, "q_num_heads: wanted none"),
    "other heads": ({"q_num_heads": 3, "opset": 24}, ValueError, "q_num_heads: wanted none or 6"),
    "one past": ({"past_key": K}, ValueError, "past_value: wanted past_key and past_value together"),
    "past shape": (PAST | {"past_value": V[..., :2]}, ValueError, "past_value: wanted shape"),
    "past dtype": (PAST | {"past_key": K.astype(float)}, TypeError, "past_key: wanted dtype float32 like K"),
    "two caches": (PAST | {"nonpad_kv_seqlen": WHOLE}, ValueError, "nonpad_kv_seqlen: wanted none"),
    "lengths": ({"nonpad_kv_seqlen": WHOLE[:1]}, ValueError, "nonpad_kv_seqlen: wanted integers of shape"),
    "long": (
        {"nonpad_kv_seqlen": WHOLE + 1},
        ValueError,
        "nonpad_kv_seqlen: wanted lengths between 0 and the 7",
    ),
    "early lengths": (
        {"nonpad_kv_seqlen": WHOLE, "opset": 23},
        ValueError,
        "nonpad_kv_seqlen: wanted opset 24",
    ),
    "early window": ({"left_window_size": 1, "opset": 24}, ValueError, "left_window_size, right.*opset 25"),
    "window": ({"left_window_size": -2}, ValueError, "left_window_size: wanted -1 or more"),
    "mask": ({"attn_mask": np.zeros((5, 8), bool)}, ValueError, "attn_mask: wanted a shape that broadcasts"),
    "short mask": (
        {"attn_mask": np.zeros((5, 4)), "opset": 23},
        ValueError,
        "attn_mask: wanted a shape that",
    ),
    "mask axes": ({"attn_mask": np.zeros((1, 1, 1, 5, 7))}, ValueError, "attn_mask: wanted 1 to 4 axes"),
    "causal": ({"is_causal": 2}, ValueError, "is_causal: wanted one of 0, 1, got 2"),
    "mode": ({"qk_matmul_output_mode": 4}, ValueError, "qk_matmul_output_mode: wanted one of"),
    "precision": ({"softmax_precision": 7}, ValueError, "softmax_precision: wanted one of"),
    "outputs": ({"num_outputs": 0}, ValueError, "num_outputs: wanted one of"),
    "opset": ({"opset": 22}, ValueError, "opset: wanted one of 23, 24, 25, got 22"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: wanted a positive"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    changes, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"^{message}"):
        attention(**{"Q": Q, "K": K, "V": V} | changes)


LINEAR_ERRORS = {
    "heads": ({"query": RNG.standard_normal((2, 5, 14))}, r"query: wanted shape \(B, T, 4 \* D\)"),
    "decay": ({"decay": np.zeros((2, 5, 3))}, r"decay: wanted shape \(B, T, 2\) or \(B, T, 6\), got"),
    "no beta": ({"beta": None}, "beta: update_rule 'gated_delta' needs it"),
    "rule": ({"update_rule": "rwkv"}, "update_rule: wanted one of linear"),
    "state": ({"past_state": np.zeros((2, 2, 3, 5))}, r"past_state: wanted shape \(2, 3, 4\)"),
    "outputs": ({"num_outputs": 3}, "num_outputs: wanted one of 1, 2, got 3"),
}


@pytest.mark.parametrize("name", LINEAR_ERRORS)
def test_errors_of_linear_attention_name_the_argument(name):
    changes, message = LINEAR_ERRORS[name]
    given = {
        "query": np.zeros((2, 5, 12)), "key": np.zeros((2, 5, 6)), "value": np.zeros((2, 5, 8)),
        "decay": np.zeros((2, 5, 2)), "beta": np.zeros((2, 5, 1)), "q_num_heads": 4, "kv_num_heads": 2,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        linear_attention(**given | changes)


def test_a_state_of_16_bits_comes_back_so():
    q, k, v = (RNG.standard_normal((2, 3, 8)).astype(np.float32) for _ in range(3))
    state = RNG.standard_normal((2, 2, 4, 4)).astype(np.float16)
    heads = {"q_num_heads": 2, "kv_num_heads": 2, "update_rule": "linear"}
    _, present = linear_attention(q, k, v, state, num_outputs=2, **heads)
    wide = linear_attention(q, k, v, state.astype(np.float32), num_outputs=2, **heads)[1]
    assert present.dtype == np.float16
    np.testing.assert_array_equal(present, wide.astype(np.float16))
