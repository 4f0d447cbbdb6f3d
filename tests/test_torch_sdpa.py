"""SDPA gives what `reference` gives, results and gradients, in every form in which it is called."""

from __future__ import annotations

import pytest

import anyattn as aa
from anyattn.describe import Options, describe

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from anyattn_torch import routes, sdpa  # noqa: E402

GENERATOR = torch.Generator().manual_seed(1)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def tensors(*batch, heads=4, kv_heads=4, q_len=7, k_len=7, dtype=torch.float32):
    shapes = (heads, q_len), (kv_heads, k_len), (kv_heads, k_len)
    return [draw(*batch, *shape, 8, dtype=dtype) for shape in shapes]


some = draw(7, 7) > 0
some[2] = False  # a row that sees nothing
CALLS = {
    "plain": (tensors(2), {}),
    "no batch": (tensors(), {"scale": 0.7}),
    "two batch axes": (tensors(2, 3), {"causal": True}),
    "causal": (tensors(2), {"causal": True}),
    "causal, one query": (tensors(2, q_len=1), {"causal": True}),
    "more keys": (tensors(2, k_len=11), {}),
    "grouped heads": (tensors(2, kv_heads=2), {"causal": True}),
    "mask of two axes": (tensors(2), {"mask": some}),
    "mask of four axes": (tensors(2), {"mask": draw(2, 1, 7, 7) > -0.5}),
    "mask of keys": (tensors(2), {"mask": draw(2, 1, 1, 7) > -0.5}),
    "bias": (tensors(2), {"bias": draw(1, 4, 7, 7)}),
    "bias of -inf": (tensors(2), {"bias": torch.where(some, draw(7, 7), -torch.inf)}),
    "bfloat16": (tensors(2, dtype=torch.bfloat16), {"causal": True}),
    "float64": (tensors(2, dtype=torch.float64), {"causal": True}),
}


@pytest.mark.parametrize(("arrays", "options"), CALLS.values(), ids=CALLS)
def test_agrees_with_reference(arrays, options):
    leaves = [x.clone().requires_grad_() for x in arrays]
    assert routes.choose(describe("attention", *leaves, Options(**options))).name == "sdpa"

    def results(backend):
        out = aa.attention(*leaves, backend=backend, **options)
        return out, *torch.autograd.grad(out.sin().sum(), leaves)

    close = {"atol": 3e-2, "rtol": 3e-2} if arrays[0].dtype == torch.bfloat16 else {}
    for found, wanted in zip(results("torch"), results("reference"), strict=True):
        torch.testing.assert_close(found, wanted, **close)


def test_the_layout_of_the_caller_is_kept():
    q, k, v = tensors(2, kv_heads=2)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    assert routes.choose(describe("attention", *swapped, Options(layout="blhd"))).name == "sdpa"
    found = aa.attention(*swapped, layout="blhd", backend="torch")
    torch.testing.assert_close(found.transpose(1, 2), aa.attention(q, k, v, backend="reference"))


def test_autocast_does_not_reach_it():
    q, k, v = tensors(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = aa.attention(q, k, v, backend="torch")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, aa.attention(q, k, v, backend="reference"))


def test_the_plain_kernel_is_never_taken(monkeypatch):
    """It keeps all scores. torch says beforehand which kernel it will run."""
    call = describe("attention", *tensors(2), Options())
    assert sdpa.refusal(call) is None
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **options: 0)
    assert sdpa.refusal(call) == "has no fused kernel for this call"
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert sdpa.refusal(call) == "does not tell which kernel it would run"


def test_a_mask_of_keys_stays_one_of_keys():
    """torch makes numbers of a boolean mask: of as many entries as it is given."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    q = torch.randn(1, 1, 600, 8, requires_grad=True)
    seen = torch.arange(600) < 500
    with Largest(), routes.only("sdpa"):
        out = aa.attention(q, q, q, mask=seen[None, None, None], backend="torch")
        out.sum().backward()
    assert largest < 600 * 600
    torch.testing.assert_close(out, aa.attention(q, q, q, kv_lengths=500, backend="reference"))


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "options"),
    [
        (torch.float64, 8, {"causal": True}),
        (torch.float32, 2, {"causal": True}),
        (torch.bfloat16, 2, {"mask": True}),
    ],
)
def test_no_plain_kernel_in_graphs_for_cuda(dtype, kv_heads, options):
    with FakeTensorMode():
        q, k = (torch.empty(1, n, 64, 64, dtype=dtype, device="cuda") for n in (8, kv_heads))
        if "mask" in options:
            options = {"mask": torch.ones(64, 64, dtype=torch.bool, device="cuda")}
        call = describe("attention", q, k, k, Options(**options))
        assert routes.choose(call).name != "sdpa"
