"""What torch's users do around a call: defaults, hooks, checkpoints, 16 bits, tensors of other kinds.

Each on SDPA and on own tiles, whose forward Numba computes where it is installed.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import anyattn as aa
from anyattn.dynamo import keep_outside

torch = pytest.importorskip("torch", reason="torch is not installed")
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint

GENERATOR = torch.Generator().manual_seed(5)
ROUTES = {"sdpa": {"causal": True}, "tiles": {"causal": True, "softcap": 2.0}}


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def by(out, *inputs):
    return torch.autograd.grad(out.double().sin().sum(), inputs)


@pytest.fixture(params=ROUTES.values(), ids=ROUTES)
def options(request):
    return request.param


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.nested.nested_tensor([draw(4, 5, 8), draw(4, 7, 8)]), "is nested"),
        (lambda: draw(2, 4, 5, 8).to_sparse(), "sparse"),
        (lambda: draw(2, 4, 5, 8, dtype=torch.complex64), "wanted dtype .*, got torch.complex64"),
        (lambda: draw(2, 4, 5, 8, dtype=torch.float8_e4m3fn), "wanted dtype .*, got torch.float8"),
        (lambda: draw(2, 4, 5, 8, dtype=torch.int32), "wanted dtype .*, got torch.int32"),
    ],
    ids=["nested", "sparse", "complex", "float8", "integers"],
)
def test_what_is_no_plain_tensor_of_floats_is_refused(make, word):
    x = make()
    with pytest.raises(TypeError, match=f"^q: .*{word}"):
        aa.attention(x, x, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_16_bits(dtype, options):
    """As exact as one rounding of each input, of out and of the gradient lets them be."""
    given = [draw(2, 4, 9, 8, dtype=dtype) for _ in range(3)]
    inputs = [x.clone().requires_grad_() for x in given]
    wide = [x.double().requires_grad_() for x in given]
    found = by(aa.attention(*inputs, **options), *inputs)
    wanted = by(aa.attention(*wide, **options, backend="reference"), *wide)
    tolerance = 8 * torch.finfo(dtype).eps
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_one_gradient_alone_and_through_views(options):
    """Of each argument by itself, as a slice of a packed tensor and as what is spread over heads."""
    packed = draw(2, 9, 3, 4, 8)
    wanted_of = packed.clone().requires_grad_()
    wanted = by(
        aa.attention(*wanted_of.permute(2, 0, 3, 1, 4).contiguous(), **options, backend="reference"),
        wanted_of,
    )[0]
    for n in range(3):
        views = [x.transpose(1, 2) for x in packed.unbind(2)]
        views[n] = views[n].detach().requires_grad_()
        found = by(aa.attention(*views, **options), views[n])[0]
        torch.testing.assert_close(found, wanted[:, :, n].transpose(1, 2))
    head = draw(2, 1, 9, 8).requires_grad_()
    spread = by(aa.attention(views[0], head.expand(2, 4, 9, 8), views[1], **options), head)
    whole = by(
        aa.attention(views[0], head.repeat(1, 4, 1, 1), views[1], **options, backend="reference"), head
    )
    torch.testing.assert_close(spread, whole)


def test_defaults_of_torch_change_nothing(options):
    """Its default device and dtype are for what its users make, not for what is made here."""
    x = draw(2, 4, 9, 8)
    more = {"dropout": 0.2, "dropout_seed": 1, "kv_lengths": [7, 9], "q_offset": 0, "sinks": [0.0] * 4}

    def results():
        found = []
        for given in (options, options | more):
            q = x.clone().requires_grad_()
            out = aa.attention(q, x, x, **given)
            found += [out.detach(), *by(out, q)]
        return found

    wanted = results()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = results()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, wanted, strict=True):
        assert (a.device.type, a.dtype) == ("cpu", torch.float32)
        assert torch.equal(a, b)


def test_what_is_kept_for_the_backward_can_be_put_elsewhere(options):
    """By hooks on saved tensors, and by checkpoints of both kinds."""
    q, k = draw(2, 4, 9, 8).requires_grad_(), draw(2, 4, 9, 8)
    wanted = by(aa.attention(q, k, k, **options), q)[0]
    kept = []

    def put(x):
        kept.append(x.shape)
        return x.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(put, torch.from_numpy):
        out = aa.attention(q, k, k, **options)
    assert kept
    assert all(shape.numel() <= q.numel() for shape in kept), "scores were kept"
    assert torch.equal(by(out, q)[0], wanted)
    for reentrant in (True, False):
        again = q.detach().clone().requires_grad_()
        out = checkpoint(lambda q: aa.attention(q, k, k, **options), again, use_reentrant=reentrant)
        out.double().sin().sum().backward()
        # The first kind computes out without gradients, so Numba does where SDPA computes it again.
        torch.testing.assert_close(again.grad, wanted)


def test_nothing_is_recorded_where_torch_records_nothing(options):
    q = draw(2, 4, 9, 8).requires_grad_()
    wanted = aa.attention(q, q, q, **options).detach()
    with torch.no_grad():
        out = aa.attention(q, q, q, **options)
    with torch.inference_mode():
        inferred = aa.attention(q, q, q, **options)
    assert not out.requires_grad
    assert inferred.is_inference()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(inferred.clone(), wanted)


def test_a_tensor_that_changes_before_the_backward_is_found_out(options):
    q, k = draw(2, 4, 9, 8).requires_grad_(), draw(2, 4, 9, 8)
    out = aa.attention(q, k, k, **options)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        by(out, q)


def test_a_tensor_that_is_negated_lazily(options):
    lazy = draw(2, 4, 9, 8, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    q = draw(2, 4, 9, 8).requires_grad_()
    for found, wanted in (
        (
            aa.attention(q, lazy, lazy, **options),
            aa.attention(q, lazy.resolve_neg(), lazy.resolve_neg(), **options),
        ),
        (aa.attention(lazy, lazy, lazy, **options), aa.attention(*[lazy.resolve_neg()] * 3, **options)),
    ):
        torch.testing.assert_close(found, wanted)


def test_another_torch_may_name_its_private_parts_otherwise(monkeypatch):
    renamed = SimpleNamespace(_FrameAction=SimpleNamespace(SKIP=0))
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.eval_frame", renamed)
    keep_outside()
