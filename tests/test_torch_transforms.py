"""`torch.func` around all that computes attention, against each call by itself and finite differences.

`attention` in the layout of its own is in `test_torch_gradients.py`, to the second order.
"""

from __future__ import annotations

import pytest

import anyattn as aa

torch = pytest.importorskip("torch", reason="tests transforms of torch")

# torch's compiler and forward mode import parts of torch that warn of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def torch_alone():
    """Numba, which computes no call that is transformed, compiles nothing for the others."""
    with aa.use(order=("torch", "reference")):
        yield


GENERATOR = torch.Generator().manual_seed(4)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


Q, K, V, SHARES = draw(2, 2, 7, 4), draw(2, 2, 7, 4), draw(2, 2, 7, 3), draw(2, 2, 7).sigmoid()


def swapped(*tensors):
    return (x.transpose(-2, -3) for x in tensors)


FUNCTIONS = {
    "weights": (lambda q, k: aa.attention_weights(q, k, causal=True), (Q, K)),
    "statistics": (
        lambda q, k: torch.cat(list(aa.attention_stats(q, k, stats=("key_mass", "entropy")).values()), -1),
        (Q, K),
    ),
    "linear": (lambda q, k, v: aa.linear_attention(q, k, v), (Q, K, V)),
    "delta rule": (lambda q, k, v, b: aa.linear_attention(q, k, v, rule="delta", beta=b), (Q, K, V, SHARES)),
    "linear, blhd": (lambda *x: aa.linear_attention(*swapped(*x), layout="blhd"), (Q, K, V)),
    "attention, blhd": (lambda *x: aa.attention(*swapped(*x), window=(2, 0), layout="blhd"), (Q, K, V)),
    "packed sequences": (
        lambda *x: aa.varlen_attention(*swapped(*(y[0] for y in x)), [0, 4, 7], [0, 2, 7], causal=True),
        (Q, K, V),
    ),
    "rotary": (lambda x: aa.rope(x, torch.arange(7)), (Q,)),
}


def gradients(function, *tensors):
    """Of the sines of the result, by each tensor."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves).sin().sum(), leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name):
    function, given = FUNCTIONS[name]
    several = tuple(torch.stack([x, x / 2]) for x in given)
    calls = [tuple(x[n] for x in several) for n in range(2)]
    mapped = torch.func.vmap(function)(*several)
    torch.testing.assert_close(mapped, torch.stack([function(*call) for call in calls]))
    gradient = torch.func.grad(lambda *x: function(*x).sin().sum(), argnums=tuple(range(len(given))))
    found = torch.func.vmap(gradient)(*several)
    for one, *wanted in zip(found, *(gradients(function, *call) for call in calls), strict=True):
        torch.testing.assert_close(one, torch.stack(wanted))
    towards = tuple(draw(*x.shape) for x in given)
    ahead, behind = (
        function(*(x + step * t for x, t in zip(given, towards, strict=True))) for step in (1e-6, -1e-6)
    )
    tangent = torch.func.jvp(function, given, towards)[1]
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


def pushed(function, given):
    return lambda *x: torch.func.jvp(function, x[: len(given)], x[len(given) :])[1]


TRANSFORMS = {
    "map": lambda function, given: torch.func.vmap(function),
    "gradient of each": lambda function, given: torch.func.vmap(
        torch.func.grad(lambda *x: function(*x).sin().sum(), argnums=tuple(range(len(given))))
    ),
    "tangent": pushed,
}


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("weights", "gradient of each"),
        ("statistics", "map"),
        ("delta rule", "tangent"),
        ("rotary", "tangent"),
    ],
)
def test_transforms_in_compiled_code(name, transform):
    """Of `attention` itself they are refused there (`test_torch_compile.py`)."""
    function, given = FUNCTIONS[name]
    run = TRANSFORMS[transform](function, given)
    inputs = tuple(torch.stack([x, x / 2]) for x in given)
    if transform == "tangent":
        inputs = (*given, *(x.cos() for x in given))
    torch._dynamo.reset()
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, run(*inputs))
