"""`anyattn.compat.flash_attn` against FlashAttention's definition; its kernels need a GPU."""

from __future__ import annotations

from dataclasses import replace
from inspect import Parameter, signature
from itertools import product

import numpy as np
import pytest
from flash_attn_definition import defined

import anyattn as aa
from anyattn.compat import flash_attn
from anyattn.compat.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((2, n, heads, 8)) for n, heads in ((5, 6), (9, 3), (9, 3)))
SLOPES = RNG.uniform(0.1, 1, (2, 6))


@pytest.fixture(autouse=True)
def reference():
    """Translation is the same on every backend; the one that defines the meaning runs."""
    with aa.use(backend="reference"):
        yield


OPTIONS = list(
    product(
        (False, True),
        ((-1, -1), (2, -1), (0, 1), (-1, 0)),
        (0.0, 1.5),
        (None, SLOPES[0], SLOPES),
        (None, 0.9),
    )
)


# Of flash_attn/flash_attn_interface.py in the repository Dao-AILab/flash-attention, commit 0053002.
_USUAL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
PUBLISHED = {
    "flash_attn_func": (("q", "k", "v"), _USUAL),
    "flash_attn_kvpacked_func": (("q", "kv"), _USUAL),
    "flash_attn_qkvpacked_func": (("qkv",), _USUAL),
    "flash_attn_varlen_func": (("q", "k", "v", *_LENGTHS), {**_USUAL, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (("q", "kv", *_LENGTHS), _USUAL),
    "flash_attn_varlen_qkvpacked_func": (("qkv", "cu_seqlens", "max_seqlen"), _USUAL),
    "flash_attn_with_kvcache": (
        ("q", "k_cache", "v_cache"),
        {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        },
    ),
}


def test_signatures_are_those_of_flash_attn():
    assert sorted(flash_attn.__all__) == sorted(PUBLISHED)
    for name, (required, optional) in PUBLISHED.items():
        parameters = signature(getattr(flash_attn, name)).parameters.values()
        assert {p.kind for p in parameters} == {Parameter.POSITIONAL_OR_KEYWORD}, name
        found = [(p.name, p.default) for p in parameters]
        assert found == [*((one, Parameter.empty) for one in required), *optional.items()], name


def test_every_combination():
    for causal, window, softcap, slopes, scale in OPTIONS:
        out, lse, pattern = flash_attn_func(
            Q, K, V, 0.0, scale, causal, window, softcap, slopes, return_attn_probs=True
        )
        wanted, wanted_lse = defined(Q, K, V, scale, causal, window, softcap, slopes)
        np.testing.assert_allclose(out, wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-9, atol=1e-12)
        assert pattern is None


def test_rows_before_the_first_key():
    """Bottom-right alignment: of 9 queries on 5 keys, 4 see nothing."""
    q, k, v = Q[:, :, :3].repeat(2, axis=1)[:, :9], K[:, :5], V[:, :5]
    for window, slopes in (((-1, -1), None), ((1, 3), SLOPES[:, :3])):
        out, lse, _ = flash_attn_func(
            q, k, v, causal=True, window_size=window, alibi_slopes=slopes, return_attn_probs=True
        )
        wanted, wanted_lse = defined(q, k, v, None, True, window, 0, slopes)
        np.testing.assert_allclose(out, wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(out[:, :4], 0)
        np.testing.assert_array_equal(lse[:, :, :4], -np.inf)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-9)


def test_packed_inputs():
    options = {"causal": True, "window_size": (3, 0), "softcap": 2.0, "softmax_scale": 0.5}
    kv = np.stack([K, V], axis=2)
    got = flash_attn_kvpacked_func(Q, kv, **options, alibi_slopes=SLOPES)
    np.testing.assert_array_equal(got, flash_attn_func(Q, K, V, **options, alibi_slopes=SLOPES))
    qkv = np.stack([K, V, K[::-1]], axis=2)
    got, lse, _ = flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)
    wanted, wanted_lse, _ = flash_attn_func(K, V, K[::-1], **options, return_attn_probs=True)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)


def test_lse_is_float32_beside_16_bits():
    q, k, v = (x.astype(np.float16) for x in (Q, K, V))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.dtype, lse.dtype, lse.shape) == (np.float16, np.float32, (2, 6, 5))


def test_gradients_and_determinism():
    """A backend that does not declare a deterministic backward may not serve `deterministic`."""
    torch = pytest.importorskip("torch", reason="gradients need torch")
    q, k, v = (torch.from_numpy(x[:, :3, ::3, :2]).requires_grad_() for x in (Q, K, V))
    slopes = torch.from_numpy(SLOPES[:, :2]).requires_grad_()

    def f(q, k, v, slopes):
        return flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)

    assert torch.autograd.gradcheck(f, (q, k, v, slopes))
    with pytest.raises(aa.errors.UnsupportedCallError, match=r"^deterministic: backend 'reference'"):
        flash_attn_func(q, k, v, deterministic=True)
    with torch.no_grad():
        torch.testing.assert_close(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))


ERRORS = {
    "axes": ({"k": K[0]}, ValueError, "k: wanted axes"),
    "batch": ({"v": V[:1]}, ValueError, "v: wanted a batch of 2"),
    "heads": ({"k": K[:, :, :2], "v": V[:, :, :2]}, ValueError, None),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p: wanted a probability"),
    "scale": ({"softmax_scale": "1"}, TypeError, "softmax_scale: wanted"),
    "causal": ({"causal": 1}, TypeError, "causal: wanted True or False"),
    "window": ({"window_size": 4}, TypeError, "window_size: wanted a pair"),
    "side": ({"window_size": (4, -2)}, ValueError, "window_size: wanted -1 or more, got -2"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: wanted a positive"),
    "slopes": ({"alibi_slopes": SLOPES[:, :3]}, ValueError, "alibi_slopes: wanted floats of shape"),
    "integer slopes": ({"alibi_slopes": np.arange(6)}, ValueError, "alibi_slopes: wanted floats"),
    "no array": ({"alibi_slopes": [0.5] * 6}, TypeError, "alibi_slopes: wanted an array"),
    "deterministic": ({"deterministic": 1}, TypeError, "deterministic: wanted True or False"),
    "probs": ({"return_attn_probs": None}, TypeError, "return_attn_probs: wanted True or False"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    changes, kind, message = ERRORS[name]
    given = {"q": Q, "k": K, "v": V} | changes
    if message is None:
        given["q"], message = Q[:, :, :3], "k: wanted a number of heads that divides q's 3"
    with pytest.raises(kind, match=f"^{message}"):
        flash_attn_func(**given)


def test_packed_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"^qkv: wanted axes"):
        flash_attn_qkvpacked_func(np.stack([K, V], axis=2))
    with pytest.raises(ValueError, match=r"^kv: wanted axes"):
        flash_attn_kvpacked_func(Q, K)


def test_devices_are_asked_for_order_too(monkeypatch):
    torch = pytest.importorskip("torch")
    from anyattn.compat.flash_attn import arguments

    x = torch.zeros(1, 4, 2, 8, requires_grad=True)
    made = arguments.describe
    monkeypatch.setattr(arguments, "describe", lambda *given: replace(made(*given), device_kind="cuda"))
    with aa.use(backend="torch"):
        with pytest.raises(aa.errors.UnsupportedCallError, match="sums gradients in any order on cuda"):
            flash_attn_func(x, x, x, deterministic=True)
        # Own tiles, which take this call, add in one order everywhere.
        assert flash_attn_func(x, x, x, softcap=2.0, deterministic=True).shape == x.shape
        torch.use_deterministic_algorithms(True)
        try:
            assert flash_attn_func(x, x, x, deterministic=True).shape == x.shape
        finally:
            torch.use_deterministic_algorithms(False)
