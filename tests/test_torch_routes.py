"""Which way a call goes on torch, and that `explain` says so before it goes."""

from __future__ import annotations

import pytest

import anyattn as aa
from anyattn import registry
from anyattn.describe import Options, describe

torch = pytest.importorskip("torch", reason="torch is not installed")

from anyattn_torch import joined, routes, tiles  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


Q, K = draw(2, 4, 5, 8), draw(2, 2, 5, 8)
SEEN = draw(5, 5) > 0


def described(q=Q, k=K, v=None, **options):
    return describe("attention", q, k, k if v is None else v, Options(**options))


SDPA = {
    "nothing": {},
    "causal order from corner to corner": {"causal": True},
    "a last query that sees all": {"causal": True, "q_offset": 4},
    "a mask as an array": {"mask": SEEN},
    "a bias": {"bias": draw(4, 5, 5)[None]},
}
OTHER = {
    "lse": ({"return_lse": True}, "lse"),
    "softcap": ({"softcap": 2.0}, "softcap"),
    "sinks": ({"sinks": [0.0] * 4}, "sinks"),
    "score_mod": ({"score_mod": aa.scores.alibi(4)}, "score_mod"),
    "window": ({"window": (2, 0)}, "window"),
    "lengths": ({"kv_lengths": [3, 5]}, "kv_lengths"),
    "causal order elsewhere": ({"causal": True, "q_offset": 1}, "aligns"),
    "a mask as an expression": ({"mask": aa.masks.prefix(3)}, "expression"),
    "mask and causal order": ({"mask": SEEN, "causal": True}, "one of causal"),
    "a bias of another dtype": ({"bias": draw(5, 5, dtype=torch.float64)}, "rounds"),
    "a bias with a gradient": ({"bias": draw(5, 5).requires_grad_()}, "gradient of a bias"),
    "a negative scale": ({"scale": -1.0}, "scale"),
    "no keys": ({"k": K[:, :, :0]}, "empty"),
    "values of another width": ({"v": draw(2, 2, 5, 6)}, "channels"),
    "batch axes that no view joins": (
        {"q": draw(2, 1, 4, 5, 8), "k": draw(1, 3, 2, 5, 8)},
        "would copy",
    ),
    "a batch that broadcasts, in a mask": (
        {"q": draw(2, 3, 4, 5, 8), "k": draw(2, 3, 2, 5, 8), "mask": SEEN.expand(2, 1, 1, 5, 5)},
        "mask or bias",
    ),
}


@pytest.mark.parametrize("options", SDPA.values(), ids=SDPA)
def test_sdpa_takes_what_it_means_the_same_by(options):
    assert routes.choose(described(**options)).name == "sdpa"


@pytest.mark.parametrize(("options", "word"), OTHER.values(), ids=OTHER)
def test_tiles_take_the_rest_and_explain_says_why(options, word):
    call = described(**options)
    assert routes.choose(call).name == "tiles"
    assert any(note.startswith("not on SDPA") and word in note for note in routes.notes(call))


def test_explain_tells_the_route_and_the_memory():
    q = Q.clone().requires_grad_()
    notes = aa.explain(q, K, K, causal=True).notes
    assert notes[0] == "runs on SDPA"
    assert "not all Lq x Lk" in notes[1]
    notes = aa.explain(q, K, K, causal=True, softcap=1.0).notes
    assert notes[0] == "runs on own tiles"
    assert any("second order keep all Lq x Lk" in note for note in notes)


class TestStrictMasking:
    def call(self):
        k, v = K.clone(), K.clone()
        k[:, :, 4], v[:, :, 3] = torch.nan, torch.inf
        return aa.attention(Q, k, v, causal=True, backend="torch")

    def test_is_kept_where_it_is_asked_for(self):
        with aa.use(strict=True):
            seen = self.call()[:, :, :3]
        torch.testing.assert_close(seen, aa.attention(Q, K, K, causal=True, backend="reference")[:, :, :3])

    def test_sdpa_does_not_keep_it_and_explain_says_so(self):
        assert self.call()[:, :, :3].isnan().any()
        notes = aa.explain(Q, K, K, causal=True, backend="torch").notes
        assert any("a NaN at a hidden key may reach the result" in note for note in notes)

    def test_costs_nothing_where_no_key_is_hidden(self):
        with aa.use(strict=True):
            assert routes.choose(described()).name == "sdpa"


def test_a_deterministic_backward_leaves_the_devices_kernels_out():
    q, k = Q.to("meta"), K.to("meta")
    torch.use_deterministic_algorithms(True)
    try:
        [sdpa, *_] = routes.choose(described(q, k)).passed
    finally:
        torch.use_deterministic_algorithms(False)
    assert sdpa[0] == "sdpa"
    assert "use_deterministic_algorithms" in sdpa[1]


BITS = {
    "sdpa": {"causal": True},
    "tables, by index": {"score_mod": "table", "softcap": 2.0},
    "dropout": {"causal": True, "dropout": 0.2, "dropout_seed": 3},
}


@pytest.mark.parametrize("order", [None, ("torch",)], ids=["numba", "torch"])
@pytest.mark.parametrize("name", BITS)
def test_threads_and_places_in_memory_change_no_bit(name, order):
    """What `deterministic_backward` promises: each gradient the same, on two threads and from copies."""
    inputs = [draw(2, 4, 130, 16) for _ in range(3)] + [draw(4, 9)]
    threads = torch.get_num_threads()

    def gradients():
        *qkv, table = [x.clone().requires_grad_() for x in inputs]
        scores = {"score_mod": aa.scores.relative_bias(table)} if "score_mod" in BITS[name] else {}
        out = aa.attention(*qkv, **BITS[name] | scores)
        return torch.autograd.grad(out.sin().sum(), (*qkv, table), allow_unused=True, materialize_grads=True)

    try:
        torch.set_num_threads(2)
        with aa.use(threads=2, order=order):
            first, *others = [gradients() for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_transform_goes_to_tiles():
    def mapped(x):
        routes_seen.append(routes.choose(described(x, x)).name)
        return aa.attention(x, x, x, backend="torch")

    routes_seen: list[str] = []
    x = draw(3, 2, 5, 8)
    found = torch.func.vmap(mapped)(x)
    assert routes_seen == ["tiles"]
    torch.testing.assert_close(found, aa.attention(x, x, x, backend="reference"))


def test_only_leaves_routes_out():
    with routes.only("tiles"):
        assert routes.choose(described()).name == "tiles"
    with pytest.raises(ValueError, match="no route 'math'; there are sdpa, flex, tiles"), routes.only("math"):
        pass


class TestNumbaForward:
    """Where a gradient is wanted on CPU, Numba computes the forward of tiles."""

    @pytest.fixture
    def ran(self, monkeypatch):
        seen: list[str] = []
        for name, module in (("numba", joined), ("tiles", tiles)):
            real = module.forward
            monkeypatch.setattr(
                module, "forward", lambda call, real=real, name=name: seen.append(name) or real(call)
            )
        return seen

    def gradient(self, **options):
        q = Q.clone().requires_grad_()
        out = aa.attention(q, K, K, softcap=2.0, causal=True, **options)
        return torch.autograd.grad(out.sin().sum(), q)[0]

    def test_gives_the_gradients_of_tiles(self, ran):
        pytest.importorskip("numba", reason="numba is not installed")
        joint = self.gradient()
        with aa.use(order=["torch"]):
            own = self.gradient()
        assert ran == ["numba", "tiles"]
        torch.testing.assert_close(joint, own)
        torch.testing.assert_close(joint, self.gradient(backend="reference"))

    def test_is_left_where_numba_is_missing(self, ran, monkeypatch):
        monkeypatch.setattr(registry, "names", lambda: ("reference", "torch"))
        assert self.gradient().isfinite().all()
        assert ran == ["tiles"]
        q = Q.clone().requires_grad_()
        notes = aa.explain(q, K, K, softcap=2.0).notes
        assert "forward not on Numba: it is not installed" in notes

    def test_is_told(self):
        pytest.importorskip("numba", reason="numba is not installed")
        q = Q.clone().requires_grad_()
        assert "Numba computes the forward" in aa.explain(q, K, K, softcap=2.0).notes


def test_shared_keys_with_gradients_are_not_expanded():
    q, k = torch.zeros(3, 2, 5, 8), torch.zeros(1, 2, 9, 8, requires_grad=True)
    call = describe("attention", q, k, k, Options())
    assert dict(routes.choose(call).passed)["sdpa"].startswith("makes a gradient of k for each")
    call = describe("attention", q, k.detach(), k.detach(), Options())
    assert routes.choose(call).name == "sdpa"
