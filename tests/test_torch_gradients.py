"""Derivatives of torch's own tiles: against finite differences to the second order, and under torch.func.

Tiles are made tiny, so that small calls have several chunks, blocks of rows and spans of keys.
"""

from __future__ import annotations

from functools import partial

import pytest
from docs_scripts import DOCS, need_docs

import anyattn as aa
from anyattn import dispatch
from anyattn.describe import Options, describe

torch = pytest.importorskip("torch", reason="tests the tiles of the torch backend")

from anyattn_torch import backward, chunks, joined, tensors, tiles, visits  # noqa: E402

B, HQ, HKV, LQ, LK, D, DV = 2, 2, 1, 5, 7, 3, 2


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiles of 2 x 4, in chunks of two of them, by a schedule of 2 x 2; Numba computes no forward."""
    monkeypatch.setattr(chunks, "CPU_TILE", (2, 4))
    monkeypatch.setattr(chunks, "CPU_SCORES", 32)
    monkeypatch.setattr(chunks, "DEVICE_TILE", (3, 4))
    monkeypatch.setattr(chunks, "DEVICE_SCORES", 48)
    monkeypatch.setattr(visits, "KEYS", 2)
    monkeypatch.setattr(visits, "FEW_SCORES", 0)
    with aa.use(order=("torch", "reference")):
        yield


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(batch=(B,), heads=HQ, kv_heads=HKV, q_len=LQ, k_len=LK):
    return (
        draw(*batch, heads, q_len, D),
        draw(*batch, kv_heads, k_len, D, seed=1),
        draw(*batch, kv_heads, k_len, DV, seed=2),
    )


def attend(q, k, v, **options):
    """Attention by the tiles, whatever route such a call takes."""
    call = describe("attention", q, k, v, Options(return_lse=True, **options))
    out, lse = tiles.attend(call)
    return call.restore(out), call.restore_rows(lse)


def affine(factor, shift):
    return lambda s, b, h, i, j: aa.where(i >= j, s * factor[h], s * s / 4) + shift[b, j] * (i - j)


def logarithm(scale):
    """Its derivatives, by the score too, are NaN and infinite at 0, which hidden scores are taken for."""
    return lambda s, b, h, i, j: scale[h] * aa.log(s * s)


DENSE = torch.tensor([[(3 * i + j) % 4 != 0 and i != 2 for j in range(LK)] for i in range(LQ)])
COMBINATIONS = {
    "plain": (qkv(), {}, {}),
    "causal, grouped": (qkv(heads=4, kv_heads=2), {}, {"causal": True}),
    "window, softcap": (qkv(), {}, {"window": (2, 1), "softcap": 1.5}),
    "boolean array with an empty row": (qkv(), {}, {"mask": DENSE}),
    "mask expression of the batch entry": (qkv(), {}, {"mask": lambda b, h, i, j: (i + j + b) % 3 != 0}),
    "bias of everything": (qkv(), {"bias": draw(B, HQ, LQ, LK)}, {"causal": True}),
    "bias of keys": (qkv(), {"bias": draw(1, LK)}, {}),
    "bias of the batch": (qkv(), {"bias": draw(B, 1, LQ, 1)}, {"softcap": 2.0}),
    "sinks, some rows see nothing": (qkv(), {"sinks": draw(HQ)}, {"mask": DENSE}),
    "kv_lengths, q_offset": (qkv(), {}, {"kv_lengths": [4, 7], "q_offset": [0, 2], "causal": True}),
    "batch axes that broadcast unlike each other": (
        (draw(2, 1, HQ, LQ, D), draw(1, 3, HKV, LK, D), draw(3, HKV, LK, DV)),
        {"bias": draw(2, 3, 1, 1, LK)},
        {"causal": True},
    ),
    "one sequence of keys for all": ((qkv()[0], *(x[0] for x in qkv()[1:])), {}, {"causal": True}),
    "layout blhd, negative scale": (
        tuple(x.transpose(1, 2) for x in qkv()),
        {},
        {"layout": "blhd", "scale": -0.7},
    ),
    "two axes": (tuple(x[0, 0] for x in qkv()), {}, {"causal": True}),
    "ALiBi": (qkv(), {"slopes": draw(HQ).abs()}, {"causal": True}),
    "relative bias": (qkv(), {"table": draw(HQ, 5)}, {"softcap": 2.0}),
    "relative keys, q captured too": (qkv(), {"keys": draw(5, D)}, {}),
    "function, infinite where hidden": (qkv(), {"scale": draw(HQ)}, {"causal": True}),
    "function of captured arrays, beside a bias": (
        qkv(),
        {"factor": draw(HQ), "shift": draw(B, LK)},
        {"bias": draw(LQ, LK), "causal": True},
    ),
}


def function_of(name, attend=attend):
    """Its float arrays, and a function of these that gives out and lse."""
    (q, k, v), arrays, options = COMBINATIONS[name]

    def run(q, k, v, *values):
        given = dict(zip(arrays, values, strict=True))
        scores = {
            "slopes": lambda: aa.scores.alibi(given.pop("slopes")),
            "table": lambda: aa.scores.relative_bias(given.pop("table")),
            "keys": lambda: aa.scores.relative_keys(q, given.pop("keys")),
            "scale": lambda: logarithm(given.pop("scale")),
            "factor": lambda: affine(given.pop("factor"), given.pop("shift")),
        }
        score_mod = next((make() for key, make in scores.items() if key in given), None)
        return attend(q, k, v, score_mod=score_mod, **given, **options)

    return run, tuple(x.clone().requires_grad_() for x in (q, k, v, *arrays.values()))


# Of the others one random projection is compared, which is as sharp but tells less.
ELEMENTWISE = ("two axes", "bias of keys")


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradcheck(name):
    """First derivatives, through out and lse, are those of finite differences."""
    run, inputs = function_of(name)

    def finite(*inputs):
        out, lse = run(*inputs)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(finite, inputs, fast_mode=name not in ELEMENTWISE)


SECOND = (
    "causal, grouped",
    "boolean array with an empty row",
    "bias of the batch",
    "sinks, some rows see nothing",
    "batch axes that broadcast unlike each other",
    "function of captured arrays, beside a bias",
)


@pytest.mark.parametrize("name", SECOND)
def test_gradgradcheck(name):
    run, inputs = function_of(name)

    def finite(*inputs):
        out, lse = run(*inputs)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradgradcheck(finite, inputs, fast_mode=True)


# Each is a kernel of Numba's for float64, which takes seconds.
JOINED = ("sinks, some rows see nothing", "function of captured arrays, beside a bias")


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("name", JOINED)
def test_gradcheck_with_numbas_forward(name, compiled, monkeypatch):
    """As a function of autograd, and as the operation of a compiled graph."""
    pytest.importorskip("numba", reason="numba is not installed")
    ran = []
    monkeypatch.setattr(joined, "forward", lambda call, real=joined.forward: ran.append(1) or real(call))
    run, inputs = function_of(name, partial(aa.attention, return_lse=True) if compiled else attend)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)

    def finite(*inputs):
        out, lse = run(*inputs)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    with aa.use(order=("numba", "torch")), dispatch.recording() as records:
        assert torch.autograd.gradcheck(finite, inputs, fast_mode=True)
    assert {record.backend for record in records} == {"numba"} if compiled else ran


def test_the_page_shows_what_is_checked():
    lines = [
        "| call | first order | second | Numba's forward, eager and compiled |",
        "| --- | --- | --- | --- |",
    ]
    for name in COMBINATIONS:
        ticks = (" ✓ " if name in checked else " " for checked in (COMBINATIONS, SECOND, JOINED))
        lines.append(f"| {name} |{'|'.join(ticks)}|")
    need_docs()
    page = (DOCS / "torch.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page, "wanted in docs/torch.md:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    "name",
    ["causal, grouped", "boolean array with an empty row", "function of captured arrays, beside a bias"],
)
def test_values_that_are_not_read(name, monkeypatch):
    """Where the host may not read values, every tile is taken with care: the same derivatives."""
    run, inputs = function_of(name)
    wanted = torch.autograd.grad(run(*inputs)[0].square().sum(), inputs)
    monkeypatch.setattr(chunks.AttentionCall, "readable", property(lambda call: False))
    for got, want in zip(torch.autograd.grad(run(*inputs)[0].square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_order_of_gradients():
    """q, k, v, sinks, then what the score reads, in the order of `differentiable`; None where not needed."""
    q, k, v = qkv()
    slopes, bias, sinks = draw(HQ).abs(), draw(LQ, LK), draw(HQ)
    call = describe(
        "attention", q, k, v,
        Options(sinks=sinks, bias=bias, score_mod=aa.scores.alibi(slopes), mask=lambda b, h, i, j: i > j),
    )  # fmt: skip
    inputs = tensors.differentiable(call)
    assert [x.shape for x in inputs] == [x.shape for x in (q, k, v, sinks, slopes, bias)]
    out, lse = tiles.forward(call)
    every = backward.gradients(call, out, lse, torch.ones_like(out), None)
    assert [x.shape for x in every] == [x.shape for x in inputs]
    some = backward.gradients(
        call, out, lse, torch.ones_like(out), None, [False, True, False, False, True, False]
    )
    assert [x is None for x in some] == [True, False, True, True, False, True]
    assert torch.equal(some[1], every[1])
    assert torch.equal(some[4], every[4])


def test_rows_without_keys_pass_nothing_back():
    """NaN that comes back to a row that saw nothing goes nowhere."""
    run, inputs = function_of("boolean array with an empty row")
    out, lse = run(*inputs)
    assert bool((out[..., 2, :] == 0).all())
    assert bool((lse[..., 2] == -torch.inf).all())
    back = torch.ones_like(out), torch.ones_like(lse)
    clean = torch.autograd.grad((out, lse), inputs, back, retain_graph=True)
    for x in back:
        x[:, :, 2] = torch.nan
    for got, want in zip(torch.autograd.grad((out, lse), inputs, back), clean, strict=True):
        assert torch.equal(got, want)
    assert bool((clean[0][..., 2, :] == 0).all())


@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
def test_what_is_hidden_reaches_no_gradient(read, monkeypatch):
    """NaN and infinity in k, v and bias where hidden, and in q of a row that sees nothing."""
    if not read:
        monkeypatch.setattr(chunks.AttentionCall, "readable", property(lambda call: False))
    q, k, v = qkv(kv_heads=2)
    bias = draw(B, HQ, LQ, LK)
    hidden = torch.zeros(LQ, LK, dtype=torch.bool)
    hidden[:, [1, 4]] = True
    hidden[3] = True
    hidden[0, 5:] = True

    def gradients(*inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        q, k, v, bias = inputs
        out, lse = attend(q, k, v, bias=bias, mask=~hidden, softcap=3.0)
        return torch.autograd.grad((out.square().sum() + lse[..., [0, 1, 2, 4]].sum()), inputs)

    clean = gradients(q, k, v, bias)
    q[:, :, 3], k[..., 1, :], k[..., 4, 0] = torch.nan, torch.nan, torch.inf
    v[..., 1, :], v[..., 4, :] = -torch.inf, torch.nan
    bias[..., 0, 6], bias[..., 3, :] = torch.nan, torch.inf
    for got, want in zip(gradients(q, k, v, bias), clean, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_same_bits():
    """With reads of a table at indices that many pairs share."""
    run, inputs = function_of("relative bias")
    first, second = (torch.autograd.grad(run(*inputs)[0].sum(), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_func_grad_and_hessian():
    """`torch.func` in reverse, to the second order, gives what autograd gives."""
    run, inputs = function_of("function of captured arrays, beside a bias")
    plain = [x.detach() for x in inputs]
    positions = tuple(range(len(inputs)))
    wanted = torch.autograd.grad(run(*inputs)[0].sin().sum(), inputs)
    got = torch.func.grad(lambda *x: run(*x)[0].sin().sum(), positions)(*plain)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)

    def of_slopes(slopes):
        q, k, v = (x.detach() for x in qkv())
        return attend(q, k, v, score_mod=aa.scores.alibi(slopes))[0].sin().sum()

    slopes = draw(HQ).abs()
    wanted = torch.autograd.functional.hessian(of_slopes, slopes)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(of_slopes))(slopes), wanted)
    assert bool((wanted != 0).any())


MAPPED = {
    "all": {"q": 0, "k": 2, "v": -1, "bias": 1, "sinks": 1, "slopes": 0, "lengths": 0, "offset": 0},
    "queries": {"q": 0},
    "keys and the score": {"k": 0, "v": 0, "slopes": 1},
    "bias and sinks": {"bias": 0, "sinks": 0},
    "lengths": {"lengths": 1, "offset": 0},
}


@pytest.mark.parametrize("mapped", MAPPED)
def test_vmap(mapped):
    """Mapped calls are one call with a batch axis more: values, and gradients of each call by itself."""
    size = 3
    q, k, v = qkv()
    plain = {
        "q": q, "k": k, "v": v, "bias": draw(1, HQ, LQ, LK), "sinks": draw(HQ), "slopes": draw(HQ).abs(),
        "lengths": torch.tensor([5, 7]), "offset": torch.tensor(1),
    }  # fmt: skip
    axes = {name: MAPPED[mapped].get(name) for name in plain}
    stacked = {
        name: x if axes[name] is None else torch.stack([x + n for n in range(size)], axes[name])
        for name, x in plain.items()
    }
    stacked["lengths"] = stacked["lengths"].clamp(max=LK)

    def loss(q, k, v, bias, sinks, slopes, lengths, offset):
        out, lse = attend(
            q, k, v, bias=bias, sinks=sinks, score_mod=aa.scores.alibi(slopes), kv_lengths=lengths,
            q_offset=offset, causal=True, mask=lambda b, h, i, j: (i + j + b) % 4 != 3,
        )  # fmt: skip
        return out.sin().sum() + lse.cos().sum(), (out, lse)

    gradient = torch.func.grad(loss, argnums=tuple(range(6)), has_aux=True)
    got = torch.func.vmap(gradient, in_dims=tuple(axes.values()))(*stacked.values())
    for n in range(size):
        one = [x if axes[name] is None else x.select(axes[name], n) for name, x in stacked.items()]
        wanted = gradient(*one)
        for found, want in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(found[n], want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # functorch's own
class TestForwardMode:
    """Tangents go through the operations of reference, also those of what a call would give to SDPA."""

    @pytest.mark.parametrize("name", ["plain", "causal", "slopes"])
    def test_has_the_values_of_finite_differences(self, name):
        from torch.autograd import forward_ad

        q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)

        def attend(x):
            if name == "slopes":
                return aa.attention(q, k, v, score_mod=aa.scores.alibi(x), softcap=2.0)
            return aa.attention(x, k, v, causal=name == "causal")

        x = torch.rand(2, dtype=torch.float64) if name == "slopes" else q
        towards = torch.randn_like(x)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(attend(forward_ad.make_dual(x, towards))).tangent
        step = 1e-6
        ahead, behind = (attend(x + s * step * towards) for s in (1, -1))
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(torch.func.jvp(attend, (x,), (towards,))[1], found)

    def test_over_reverse_mode_is_the_hessian(self):
        k, v = torch.randn(2, 1, 5, 3, dtype=torch.float64)
        q = torch.randn(1, 2, 3, dtype=torch.float64)

        def function(backend, x):
            return aa.attention(x, k, v, window=(1, 0), backend=backend).sin().sum()

        found = torch.func.hessian(partial(function, None))(q)
        wanted = torch.autograd.functional.hessian(partial(function, "reference"), q)
        torch.testing.assert_close(found, wanted)

    def test_explain_says_so(self):
        from torch.autograd import forward_ad

        q = torch.randn(1, 2, 5, 4)
        with forward_ad.dual_level():
            found = str(aa.explain(forward_ad.make_dual(q, q), q, q))
        assert "note: forward mode goes through the operations of reference" in found
        assert "not on SDPA: it has no forward mode" in found
        assert (
            "note: forward mode holds tiles of scores; with reverse mode through it all Lq x Lk are kept"
            in found
        )
        assert "not all Lq x Lk" not in found


def test_the_older_vmap_is_refused_by_name():
    run, inputs = function_of("plain")
    batched = torch.ones(3, B, HQ, LQ, DV, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.*torch\.func\.vmap"):
        torch.autograd.grad(run(*inputs)[0], inputs[0], batched, is_grads_batched=True)
