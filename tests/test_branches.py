"""Gradients through score functions that have none where a branch is not picked or a key is hidden."""

from __future__ import annotations

import numpy as np
import pytest

import anyattn as aa
from anyattn import scores
from anyattn.describe import Options, describe
from anyattn.expr.branches import hold_unpicked

torch = pytest.importorskip("torch", reason="torch is not installed")

rng = np.random.default_rng(0)
Q, K, V = (rng.standard_normal((2, 5, 3)) for _ in range(3))
TABLE = np.array([0.0, 0.5, 1.5, 2.0, 0.25])

# Each multiplies the score or a table by something infinite or NaN where that is not picked or not seen.
FUNCTIONS = {
    "sqrt of a negative": lambda t: lambda s, b, h, i, j: aa.where(i > j, aa.sqrt(i - j) * s, s),
    "sqrt at its pole": lambda t: lambda s, b, h, i, j: aa.where(i != j, aa.sqrt(s * s * abs(i - j)), s),
    "log of the score": lambda t: lambda s, b, h, i, j: aa.where(s > 0, aa.log(s) * s, s * s),
    "division on the diagonal": lambda t: lambda s, b, h, i, j: aa.where(i == j, s**3, s * s / (i - j)),
    "nested": lambda t: (
        lambda s, b, h, i, j: aa.where(
            i > j, aa.where(s > 0, aa.sqrt(s), s / (i - j)), aa.where(i < j, s / (j - i), t[h] * s)
        )
    ),
    "a table": lambda t: lambda s, b, h, i, j: aa.where(i > j, t[j + 1] * aa.log(i - j) * s, s * t[1]),
    "a power of a table": lambda t: lambda s, b, h, i, j: aa.where(t[j] > 0, s * t[j] ** 0.5, s),
    "a table at hidden keys": lambda t: lambda s, b, h, i, j: s + aa.log(t[j]),
    "a table far away": lambda t: lambda s, b, h, i, j: s * t[j] / (i - j + 1),
}
# These are undefined where nothing hides them.
HIDDEN_ONLY = {
    "a table at hidden keys": lambda b, h, i, j: j > 0,
    "a table far away": lambda b, h, i, j: j <= i,
}


def options(name):
    return {"mask": HIDDEN_ONLY[name]} if name in HIDDEN_ONLY else {}


def torch_inputs():
    return [torch.tensor(x, requires_grad=True) for x in (Q, K, V, TABLE)]


def derivatives(loss, inputs):
    """First derivatives, and those of the sum of their squares; 0 for what is not used."""
    zeros = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(loss, inputs, create_graph=True, **zeros)
    return first, torch.autograd.grad(sum((g * g).sum() for g in first), inputs, **zeros)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_to_second_order(name):
    def attend(q, k, v, table):
        return aa.attention(q, k, v, score_mod=FUNCTIONS[name](table), backend="reference", **options(name))

    q, k, v, table = torch_inputs()
    assert torch.isfinite(attend(q, k, v, table)).all()
    # The pole of the table itself stays out of reach of the differences.
    inner = torch.tensor(np.maximum(TABLE, 0.05), requires_grad=True)
    assert torch.autograd.gradcheck(attend, (q, k, v, inner))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, inner), fast_mode=True)
    first, second = derivatives(attend(q, k, v, table).sin().sum(), (q, k, v, table))
    for g in (*first, *second):
        assert torch.isfinite(g).all()


# Compiling each takes seconds.
@pytest.mark.parametrize("name", ["nested", "a table", "a table at hidden keys"])
def test_jax_agrees_with_torch(name):
    jax = pytest.importorskip("jax", reason="JAX is not installed")

    def loss(xp, sin, q, k, v, table):
        out = aa.attention(q, k, v, score_mod=FUNCTIONS[name](table), backend="reference", **options(name))
        return xp.sum(sin(out))

    inputs = torch_inputs()
    first, second = derivatives(loss(torch, torch.sin, *inputs), inputs)
    with jax.enable_x64(True):
        jnp = jax.numpy

        def jax_loss(*x):
            return loss(jnp, jnp.sin, *x)

        def square(*x):
            return sum(jnp.sum(g * g) for g in jax.grad(jax_loss, argnums=range(4))(*x))

        arrays = [jnp.asarray(x) for x in (Q, K, V, TABLE)]
        for a, b in zip(jax.grad(jax_loss, argnums=range(4))(*arrays), first, strict=True):
            np.testing.assert_allclose(a, b.detach(), rtol=1e-9, atol=1e-12)
        for a, b in zip(jax.jit(jax.grad(square, argnums=range(4)))(*arrays), second, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_the_same_to_the_bit(name):
    inputs = torch_inputs()
    plain = [x.detach() for x in inputs]
    with_gradient, without = (
        aa.attention(*x[:3], score_mod=FUNCTIONS[name](x[3]), backend="reference", **options(name))
        for x in (inputs, plain)
    )
    assert torch.equal(with_gradient.detach(), without)


@pytest.mark.parametrize(
    "score_mod",
    [
        scores.alibi(2),
        scores.softcap(2.0),
        lambda s, b, h, i, j: aa.where(i > j, s - 2.0 * abs(i - j), s / 3.0),
        lambda s, b, h, i, j: aa.where(i > j, aa.minimum(s, 4.0), -s) * s,
    ],
)
def test_what_cannot_go_wrong_is_left_alone(score_mod):
    q, k, v, _ = torch_inputs()
    score = describe("attention", q, k, v, Options(score_mod=score_mod, causal=True)).score
    assert hold_unpicked(score, masked=True) is score
