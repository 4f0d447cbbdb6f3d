"""Dropout on torch tensors: gradients of both orders, functorch, compiled functions, generators."""

from __future__ import annotations

import pytest

import anyattn as aa
from anyattn import explain
from anyattn.compat.torch import scaled_dot_product_attention

torch = pytest.importorskip("torch", reason="torch is not installed")
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint

RATE = 0.3


def tensors(*lengths, dtype=torch.float32, requires_grad=True, sizes=(2, 4, 5)):
    generator = torch.Generator().manual_seed(1)
    batch, heads, dim = sizes
    return [
        torch.randn(batch, heads, n, dim, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for n in lengths
    ]


def dropped(q, k, v, seed):
    return aa.attention(q, k, v, causal=True, dropout=RATE, dropout_seed=seed)


def results(function, q, k, v, *rest):
    """The result and the gradients of its squares."""
    out = function(q, k, v, *rest)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize("numba", [True, False])
def test_gradients_of_both_orders(numba):
    """With the forward of Numba and with that of tiles, which backward must drop alike."""
    x = tensors(3, 4, 4, dtype=torch.float64, sizes=(1, 2, 2))
    order = ("torch", "reference", *(["numba"] if numba else []))
    with aa.use(order=order):
        assert torch.autograd.gradcheck(lambda *x: dropped(*x, 4), x)
        # Derivatives of second order are those of `reference`, whatever computed the first.
        assert numba or torch.autograd.gradgradcheck(lambda *x: dropped(*x, 4)[:, :1, 1:], x)


def test_no_route_drops_by_itself():
    text = str(explain(*tensors(5, 7, 7), dropout=RATE, dropout_seed=1))
    assert "runs on own tiles" in text
    assert "not on SDPA: it draws what it drops from a generator, not from the seed of the call" in text


def test_numba_and_torch_draw_the_same():
    """In tiles of both, on two threads; `explain` tells which of them draws."""
    pytest.importorskip("numba", reason="numba is not installed")
    x = tensors(150, 300, 300)
    wanted = results(dropped, *x, 5)
    with aa.use(threads=2):
        threaded = results(dropped, *x, 5)
    assert "note: Numba draws dropout" in str(explain(*x, dropout=RATE, dropout_seed=5))
    with aa.use(order=["torch"]):
        assert "note: dropout not drawn by Numba" in str(explain(*x, dropout=RATE, dropout_seed=5))
        alone = results(dropped, *x, 5)
    for one, other, without in zip(wanted, threaded, alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, without, rtol=1e-4, atol=1e-5)


def test_functorch():
    q, k, v = tensors(6, 7, 7, requires_grad=False)
    seeds = torch.tensor([1, 2])
    found = torch.func.vmap(lambda q, seed: dropped(q, k, v, seed))(torch.stack([q, 2 * q]), seeds)
    for n in range(2):
        torch.testing.assert_close(found[n], dropped((n + 1) * q, k, v, seeds[n]))
    grad = torch.func.grad(lambda q: dropped(q, k, v, 7).square().sum())(q)
    torch.testing.assert_close(grad, results(dropped, *tensors(6, 7, 7), 7)[1])


def test_compiled_functions_take_another_seed():
    x = tensors(6, 7, 7)
    compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    for seed in (123456789012345, 5):
        seed = torch.tensor(seed)
        for found, wanted in zip(results(compiled, *x, seed), results(dropped, *x, seed), strict=True):
            torch.testing.assert_close(found, wanted)


def test_seeds_of_the_generator():
    """Compiled, under checkpointing and alone, torch.manual_seed gives the same weights and gradients."""

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=RATE)

    def again(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False)

    x = tensors(6, 7, 7)
    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager"), again):
        torch.manual_seed(3)
        found.append(results(function, *x))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same)
    assert not torch.equal(attend(*x), found[0][0])
