"""`anyattn.compat.torch` does what torch's own function does, and refuses what that refuses."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import signature

import pytest

import anyattn as aa
from anyattn import arrays
from anyattn.compat.flash_attn import flash_attn_func
from anyattn.compat.torch import scaled_dot_product_attention

torch = pytest.importorskip("torch", reason="compares with torch's own function")
theirs = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def reference():
    """Translation is the same on every backend; the one that defines the meaning runs."""
    with aa.use(backend="reference"):
        yield


def tensors(q, k, v, dtype=torch.float64):
    """Random tensors of these shapes that want gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in (q, k, v)]


def same(inputs, *others, rtol=1e-10, **options):
    """Outputs and gradients agree with torch's."""
    wanted, got = theirs(*inputs, **options), scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)
    leaves = [*inputs, *others]
    seed = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    for a, b in zip(*(torch.autograd.grad(y, leaves, seed) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


SHAPES = {
    "4 axes": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "2 axes": ((5, 8), (7, 8), (7, 6)),
    "3 axes": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "5 axes": ((1, 3, 4, 5, 8), (2, 1, 4, 7, 8), (2, 3, 4, 7, 6)),
    "one key head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "one query head": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "one head in k": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 6)),
    "batch axes": ((2, 1, 2, 5, 8), (2, 2, 2, 7, 8), (1, 2, 2, 7, 6)),
    "axes missing": ((5, 8), (4, 7, 8), (2, 4, 7, 6)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
}
MASKS = {
    "4 axes": [(5, 7), (5, 1), (1, 7), (4, 1, 7), (2, 1, 5, 7)],
    "2 axes": [(5, 7)],
    "5 axes": [(3, 1, 5, 7)],
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, backend):
    with aa.use(backend=backend):
        check_shapes(name)


def check_shapes(name):
    """With no mask, in causal order, and with masks that broadcast."""
    inputs = tensors(*SHAPES[name])
    same(inputs)
    same(inputs, is_causal=True)
    for shape in MASKS.get(name, []):
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        same(inputs, bias.requires_grad_(), attn_mask=bias, scale=0.7)
        same(inputs, attn_mask=bias > -0.5)


def test_grouped_heads():
    inputs = tensors((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    same(inputs, enable_gqa=True, is_causal=True)
    same(tensors((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 6)), enable_gqa=True, scale=-0.3)


def test_causal_order_starts_in_the_upper_left():
    """The first query sees the first key, where the contract lets the last one see the last."""
    q, k, v = tensors((1, 2, 9, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    same([q, k, v], is_causal=True)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
    assert (aa.attention(q, k, v, causal=True)[:, :, 0] == 0).all()


@pytest.mark.parametrize("floating", [False, True])
def test_rows_that_see_no_key(floating):
    """They are 0 with gradient 0, in torch 2.13 too."""
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    if floating:
        mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    inputs = tensors(*SHAPES["4 axes"])
    same(inputs, attn_mask=mask)
    assert (scaled_dot_product_attention(*inputs, attn_mask=mask)[:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    """16-bit results are torch's within two units in the last place; float32 masks are taken beside them."""
    q, k, v = (x.detach() for x in tensors(*SHAPES["4 axes"], dtype=dtype))
    mask = torch.linspace(-1, 1, 35).reshape(5, 7)
    got, wanted = (f(q, k, v, mask) for f in (scaled_dot_product_attention, theirs))
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, wanted, rtol=2 * eps, atol=eps)


def test_nan_at_hidden_keys_does_not_matter():
    """In torch it does: a documented difference."""
    q, k, v = (x.detach() for x in tensors(*SHAPES["4 axes"]))
    mask = torch.arange(7) < 6
    mask = mask.expand(5, 7)
    wanted = scaled_dot_product_attention(q, k, v, mask)
    v[..., 6, :] = torch.nan
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), wanted)
    assert theirs(q, k, v, mask).isnan().any()


def test_compiled_without_breaks(monkeypatch):
    """Also where nothing was called before: filling a cache in a trace would break it."""
    for cache in ("_dtype_names", "_libraries"):
        monkeypatch.setattr(arrays, cache, {})
    q, k, v = (x.detach() for x in tensors((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), torch.float32))
    mask, slopes = torch.arange(35).reshape(5, 7) % 3 > 0, torch.rand(2, 5)

    def call(q, k, v, mask, slopes):
        first = scaled_dot_product_attention(q, k[:, :1], v, mask)
        return first + flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes).sum()

    with aa.use(backend="torch"):
        # The same arrays are five heads to flash-attn.
        inputs = q, k[:, :, :5], v[:, :, :5], mask[:, :5], slopes
        compiled = torch.compile(call, backend="eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, call(*inputs))


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6)], ids=str)
@pytest.mark.parametrize("corner", ["causal_upper_left", "causal_lower_right"])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_torchs_own_words_for_causal_order(corner, lengths):
    """They are tensors of memory that nobody wrote: what they say is asked for."""
    q_len, k_len = lengths
    q, k, v = tensors((2, 4, q_len, 8), (2, 4, k_len, 8), (2, 4, k_len, 6))
    bias = getattr(import_module("torch.nn.attention.bias"), corner)(q_len, k_len)
    found = scaled_dot_product_attention(q, k, v, bias, scale=0.3)
    seen = torch.ones(q_len, k_len).tril(k_len - q_len if corner == "causal_lower_right" else 0) > 0
    wanted = theirs(q, k, v, seen, scale=0.3)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(TypeError, match=r"^bias: CausalBias is not taken, it has no entries"):
        aa.attention(q, k, v, bias=bias)
    with pytest.raises(ValueError, match="attn_mask: wanted a CausalBias of"):
        scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:], bias)
    with pytest.raises(ValueError, match="is_causal: wanted False"):
        scaled_dot_product_attention(q, k, v, bias, is_causal=True)


def test_signature_is_torchs():
    named = re.search(r"scaled_dot_product_attention\((.*?)\)", theirs.__doc__, re.DOTALL).group(1)
    ours = [str(each).split(":")[0] for each in signature(scaled_dot_product_attention).parameters.values()]
    assert [each.split("=")[0].strip() for each in named.split(",")] == ours
    defaults = {name: p.default for name, p in signature(scaled_dot_product_attention).parameters.items()}
    assert list(defaults.values())[3:] == [None, 0.0, False, None, False]
    q = torch.ones(1, 2, 3, 4)
    for function in (theirs, scaled_dot_product_attention):
        with pytest.raises(TypeError, match="takes from 3 to 6 positional arguments"):
            function(q, q, q, None, 0.0, False, 0.5)


Q, K, V = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
REFUSED = {
    "mask and causal": (
        (Q, K, V),
        {"attn_mask": torch.ones(5, 7), "is_causal": True},
        "is_causal: wanted False",
    ),
    "1 axis": (((8,), (8,), (6,)), {}, "query: wanted axes"),
    "2 axes, grouped": (((5, 8), (7, 8), (7, 6)), {"enable_gqa": True}, "query: wanted axes"),
    "heads": ((Q, (2, 2, 7, 8), (2, 2, 7, 6)), {}, "key: wanted 4 heads or 1, got 2"),
    "groups": ((Q, (2, 3, 7, 8), (2, 3, 7, 6)), {"enable_gqa": True}, "key: wanted a number of heads"),
    "features": ((Q, (2, 4, 7, 4), V), {}, "key: wanted 8 features like query"),
    "length": ((Q, K, (2, 4, 3, 6)), {}, "value: wanted length 7 like key"),
    "batch": ((Q, (3, 4, 7, 8), V), {}, "query, key, value: batch axes"),
    "mask shape": ((Q, K, V), {"attn_mask": torch.ones(5, 3)}, "attn_mask: wanted a shape"),
    "mask axes": ((Q, K, V), {"attn_mask": torch.ones(1, 1, 1, 5, 7)}, "attn_mask: wanted 2 axes"),
    "mask of 1 axis": ((Q, K, V), {"attn_mask": torch.ones(7)}, "attn_mask: wanted"),
    "integer mask": (
        (Q, K, V),
        {"attn_mask": torch.ones(5, 7, dtype=torch.int64)},
        "attn_mask: wanted dtype",
    ),
    "wide mask": ((Q, K, V), {"attn_mask": torch.ones(5, 7, dtype=torch.float64)}, "attn_mask: wanted dtype"),
    "flag": ((Q, K, V), {"is_causal": 1}, "is_causal: wanted True or False"),
    "dropout": ((Q, K, V), {"dropout_p": 1.5}, "dropout_p: wanted a probability"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_by_name(name):
    shapes, options, message = REFUSED[name]
    inputs = [torch.zeros(shape) for shape in shapes]
    with pytest.raises((RuntimeError, IndexError, TypeError)):
        theirs(*inputs, **options)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        scaled_dot_product_attention(*inputs, **options)


def test_dropout_is_repeated_by_the_seed_of_torch():
    inputs = tensors(Q, K, V)
    torch.manual_seed(4)
    found = [scaled_dot_product_attention(*inputs, dropout_p=0.5) for _ in range(2)]
    torch.manual_seed(4)
    again = scaled_dot_product_attention(*inputs, dropout_p=0.5)
    seed = torch.randint(0, 2**63 - 1, (), generator=torch.Generator().manual_seed(4))
    wanted = aa.attention(*inputs, q_offset=0, dropout=0.5, dropout_seed=seed)
    assert torch.equal(found[0], again)
    assert torch.equal(found[0], wanted)
    assert not torch.equal(*found)


def test_stands_in_by_replacing_the_function_itself(monkeypatch):
    """Modules of torch call it by its name, and the backend `torch` must not call itself."""
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 7, 16)
    hidden = torch.arange(7) > torch.tensor([[3], [6]])
    wanted = layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    plain = layer(x, x, x, need_weights=False)[0]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product_attention)
    with aa.use(backend="torch"), aa.dispatch.recording() as records:
        torch.testing.assert_close(layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0], wanted)
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], plain)
    assert len(records) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_casts_under_autocast_what_torch_casts(dtype):
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=dtype)
    bias = torch.randn(5, 5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = theirs(q, k, v, bias)
        found = scaled_dot_product_attention(q, k, v, bias)
        mixed = scaled_dot_product_attention(q.bfloat16(), k, v) if dtype == torch.float32 else None
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert found.dtype == (torch.bfloat16 if dtype == torch.float32 else torch.float64)
    assert mixed is None or mixed.dtype == torch.bfloat16
