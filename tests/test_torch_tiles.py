"""Torch's own tiles: the kit's cases in tiny tiles, what they visit and hold, what they may not read."""

from __future__ import annotations

import contextlib
import math

import pytest

import anyattn as aa
from anyattn.describe import Options, describe
from anyattn.testing.cases import all_cases, gradient_cases
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_gradients, check_values

torch = pytest.importorskip("torch", reason="tests the tiles of the torch backend")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from anyattn_torch import chunks, routes, tiles, visits  # noqa: E402

UNREAD = property(lambda call: False)


@pytest.fixture(autouse=True)
def own():
    """No other route, and no forward of Numba."""
    with routes.only("tiles"), aa.use(order=("torch", "reference")):
        yield


@pytest.fixture
def tiny(monkeypatch):
    """Tiles of 3 x 4, in chunks of one or two of them, by a schedule of 3 x 2."""
    for name in ("CPU", "DEVICE"):
        monkeypatch.setattr(chunks, f"{name}_TILE", (3, 4))
        monkeypatch.setattr(chunks, f"{name}_SCORES", 24)
    monkeypatch.setattr(visits, "KEYS", 2)
    monkeypatch.setattr(visits, "FEW_SCORES", 0)


def qkv(*shape, v_dim=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape, (*shape[:-1], v_dim or shape[-1]))
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def described(q, k, v, **options):
    return describe("attention", q, k, v, Options(**options))


FAMILIES = ("each option", "hidden", "softmax", "shapes", "positions")


@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
@pytest.mark.usefixtures("tiny")
def test_values_in_tiny_tiles(read, monkeypatch):
    """What the kit asks of results, with every call in several chunks, blocks of rows and spans of keys."""
    if not read:
        monkeypatch.setattr(chunks.AttentionCall, "readable", UNREAD)
    families = FAMILIES if read else ("hidden",)
    kinds = ("attention", "weights", "stats")
    cases = [c for c in all_cases() if c.family in families and c.operation in kinds and c.q[-2] < 40]
    assert len(cases) > 20
    for case in cases:
        check_values(case, LIBRARIES["torch"], "torch")


@pytest.mark.parametrize("read", [True, False], ids=["read", "not read"])
@pytest.mark.usefixtures("tiny")
def test_gradients_in_tiny_tiles(read, monkeypatch):
    """What the kit asks of gradients, the same bits twice."""
    if not read:
        monkeypatch.setattr(chunks.AttentionCall, "readable", UNREAD)
    for case in gradient_cases():
        if case.k[-2] < 40 and (read or "nan" in case.name or "-inf" in case.name):
            check_gradients(case, LIBRARIES["torch"], "torch", twice=True)


@pytest.mark.usefixtures("tiny")
def test_infinities_of_both_signs_meet():
    """At seen keys of one row they make NaN, and only there."""
    q, k, v = (x.detach() for x in qkv(1, 1, 6, 2))
    v[..., 4, 0], v[..., 5, 0] = math.inf, -math.inf
    out = tiles.forward(described(q, k, v, causal=True))[0][0, 0]
    assert bool(out[:4].isfinite().all())
    assert out[4, 0] == math.inf
    assert bool(out[5, 0].isnan())
    assert bool(out[:, 1].isfinite().all())


@pytest.mark.usefixtures("tiny")
def test_scores_that_broadcast():
    """A score function that gives one number a head is masked like any other."""
    q, k, v = (x.detach() for x in qkv(1, 2, 6, 2))
    table = torch.tensor([1.0, 2.0])
    out = tiles.forward(described(q, k, v, causal=True, score_mod=lambda s, b, h, i, j: table[h]))[0]
    torch.testing.assert_close(out, v.cumsum(-2) / torch.arange(1.0, 7.0)[:, None])


class Sizes(TorchDispatchMode):
    """The largest tensor that is made, and the elements of all results of products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.untyped_storage().nbytes() // made.element_size())
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
                self.products += made.numel()
        return made


def test_no_array_is_quadratic():
    """Forward and backward, with an option of each kind, hold a tile of scores and arrays like the inputs."""
    length = 1000
    q, k, v = qkv(2, 2, length, 8)
    slopes = torch.rand(2, requires_grad=True)
    lengths = torch.tensor([length, length - 100])
    call = described(
        q, k, v, score_mod=aa.scores.alibi(slopes), softcap=5.0, sinks=slopes, kv_lengths=lengths, q_offset=0,
        causal=True, return_lse=True,
    )  # fmt: skip
    with Sizes() as sizes:
        out, lse = tiles.attend(call)
        torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, slopes))
    assert sizes.largest == chunks.CPU_SCORES
    assert sizes.largest < 4 * length**2 / 8


def test_statistics_and_weights_of_rows_are_not_quadratic():
    """Statistics compute each tile that is seen twice, and weights those rows that are asked for."""
    length = 1000
    q, k = (x.detach() for x in qkv(2, 2, length, 8)[:2])
    with Sizes() as sizes:
        found = aa.attention_stats(q, k, causal=True, backend="torch")
    assert sizes.largest == chunks.CPU_SCORES
    assert sizes.products / (2 * 4 * length**2) == pytest.approx(0.56, abs=0.03)
    assert float(found["key_mass"].sum()) == pytest.approx(4 * length, rel=1e-5)
    with Sizes() as sizes:
        rows = aa.attention_weights(q, k, causal=True, rows=[999, 3, 500], backend="torch")
    assert rows.shape == (2, 2, 3, length)
    assert sizes.largest == q.numel()


def test_weights_and_statistics_have_gradients():
    q, k = (x.double().detach().requires_grad_() for x in qkv(1, 2, 5, 3)[:2])

    def both(q, k):
        stats = aa.attention_stats(q, k, stats=("entropy",), causal=True, backend="torch")
        return aa.attention_weights(q, k, causal=True, backend="torch"), stats["entropy"]

    assert torch.autograd.gradcheck(both, (q, k))
    assert "torch differentiates" in repr(aa.explain(q, k, causal=True, stats=("entropy",), backend="torch"))


def test_shared_keys_are_not_expanded():
    """Neither by heads nor by batch entries that share them, in no direction."""
    q = qkv(6, 4, 60, 8)[0]
    k, v = (x[0].detach()[:1].requires_grad_() for x in qkv(1, 1, 40000, 8)[1:])
    call = described(q, k, v)
    with Sizes() as sizes:
        torch.autograd.grad(tiles.attend(call)[0].sum(), (q, k, v))
    assert sizes.largest <= 40000 * 8


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"causal": True}, 0.56),
        ({"window": (100, 0)}, 0.22),
        ({"kv_lengths": [128, 1024], "q_offset": 0}, 0.57),
        ({"mask": aa.masks.documents([n // 256 for n in range(1024)])}, 0.25),
    ],
)
def test_only_scheduled_tiles_are_computed(options, share):
    """The products of scores are those of tiles of 128 x 128 in which something is seen."""
    q, k, v = qkv(2, 4, 1024, 3, v_dim=2)
    with Sizes() as every:
        tiles.forward(described(q, k, v))
    with Sizes() as some:
        tiles.forward(described(q, k, v, **options))
    assert some.products / every.products == pytest.approx(share, abs=0.03)


def test_a_span_is_masked_where_a_head_does_not_see_all():
    """One head's mask is another's partial tile."""
    q, k, v = qkv(1, 2, 512, 4)
    call = described(q, k, v, mask=lambda b, h, i, j: (h == 0) | (j < 300))
    found = visits.Visits(call, 128, 512)
    both = found.of([0], range(2))[0].spans
    assert [(s.start, s.end, s.masked) for s in both] == [(0, 512, ((256, 512),))]
    one = found.of([0], range(1))[0].spans
    assert [(s.start, s.end, s.masked) for s in one] == [(0, 512, ())]
    halves = visits.Visits(call, 128, 256).of([0], range(2))[0].spans
    assert [(s.start, s.end, s.masked) for s in halves] == [(0, 256, ()), (256, 512, ((256, 512),))]


def test_batch_axes_are_joined_where_arrays_agree():
    q = torch.randn(2, 3, 1, 5, 1, 4, 8)
    k, v = torch.randn(2, 3, 1, 1, 1, 4, 8), torch.randn(3, 1, 5, 1, 4, 8)
    work = chunks.Work(described(q, k, v))
    assert work.sizes == (2, 3, 5)
    assert work.inner == 2
    assert chunks.Work(described(q, q, q)).sizes == (30,)
    assert chunks.Work(described(q, q, q, bias=torch.randn(2, 3, 1, 1, 1, 4, 4))).sizes == (6, 5)


@pytest.mark.usefixtures("tiny")
def test_nothing_is_read_of_values_that_are_not_there():
    """Fake tensors with masks, lengths and tables go through forward and backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, 7, 2, 4, requires_grad=True) for _ in range(3))
        lengths, slopes = torch.empty(2, dtype=torch.int64), torch.empty(2, requires_grad=True)
        call = described(
            q, k, v, kv_lengths=lengths, q_offset=lengths - 3, causal=True, sinks=slopes, return_lse=True,
            score_mod=aa.scores.alibi(slopes), mask=torch.empty(7, 7, dtype=torch.bool), layout="blhd",
        )  # fmt: skip
        out, lse = tiles.attend(call)
        found = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, slopes))
    assert call.restore(out).shape == q.shape
    assert lse.shape == (2, 2, 7)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape, slopes.shape]


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.usefixtures("tiny")
def test_what_make_fx_records_runs_on_other_values(mode):
    """No value of the recorded call is in the graph: lengths, offsets and NaN may be others."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def derivatives(q, k, v, lengths, slopes):
        call = described(
            q, k, v, kv_lengths=lengths, q_offset=lengths - 3, causal=True, return_lse=True,
            score_mod=aa.scores.alibi(slopes),
        )  # fmt: skip
        out, lse = tiles.attend(call)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse[..., 3:].sum(), (q, k, v, slopes))

    q, k, v = qkv(2, 2, 5, 4)
    slopes = torch.tensor([0.5, 0.25], requires_grad=True)
    recorded = make_fx(derivatives, tracing_mode=mode)(q, k, v, torch.tensor([6, 6]).clamp(max=5), slopes)
    q, k, v = (x.detach().flip(0).requires_grad_() for x in (q, k, v))
    with torch.no_grad():
        v[0, :, 4], k[0, :, 4] = math.nan, math.inf
    lengths = torch.tensor([4, 5])
    wanted = derivatives(q, k, v, lengths, slopes)
    for got, want in zip(recorded(q, k, v, lengths, slopes), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_rounds_nothing():
    """Under autocast tiles of float32 stay float32."""
    q, k, v = qkv(1, 2, 33, 8)
    plain = tiles.forward(described(q, k, v))[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        assert torch.equal(tiles.forward(described(q, k, v))[0], plain)


def test_result_lies_in_the_layout_of_the_caller():
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv(2, 3, 5, 4))
    call = described(q, k, v, layout="blhd")
    assert call.restore(tiles.forward(call)[0]).is_contiguous()
