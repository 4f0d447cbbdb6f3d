"""`linear_attention` beyond the conformance kit: chunk sizes, steps, derivatives, loops, packing, Performer.

What each call means is held to the recurrence of the float64 oracle by the kit's family `linear`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
import time

import numpy as np
import pytest
from docs_scripts import DOCS, need_docs, script

import anyattn as aa
from anyattn import dispatch
from anyattn.linear.recurrence import recurrence
from anyattn.reference import chunk, linear

RULES = ("linear", "gated", "delta", "gated_delta")


def given(rule, length=11, heads=4, kv_heads=2, dim=5, v_dim=3, dtype="f8", seed=0):
    """q, k, v and the options that a rule needs."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((heads, length, dim)).astype(dtype)
    k = rng.standard_normal((kv_heads, length, dim)).astype(dtype)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((kv_heads, length, v_dim)).astype(dtype)
    options = {"rule": rule}
    if rule.startswith("gated"):
        options["decay"] = -rng.uniform(0.01, 0.5, k.shape).astype(dtype)
    if rule.endswith("delta"):
        options["beta"] = rng.uniform(0, 1, k.shape[:2]).astype(dtype)
    return q, k, v, options


@pytest.mark.parametrize("rule", RULES)
def test_the_definition_and_one_step_at_a_time_give_the_same(rule):
    q, k, v, options = given(rule, length=9)
    out, last = aa.linear_attention(q, k, v, return_state=True, **options)
    rows, state = recurrence(
        np, np.moveaxis(q.reshape(2, 2, 9, 5), 1, 2), k, v, np.zeros((2, 5, 3)), options.get("decay"),
        options.get("beta"),
    )  # fmt: skip
    np.testing.assert_allclose(np.moveaxis(rows, 2, 1).reshape(4, 9, 3) / math.sqrt(5), out, rtol=1e-12)
    np.testing.assert_allclose(state, last, rtol=1e-12)
    state, steps = None, []
    for t in range(9):
        now = {name: x[:, t : t + 1] if name != "rule" else x for name, x in options.items()}
        step, state = aa.linear_attention(
            *(x[:, t : t + 1] for x in (q, k, v)), state=state, return_state=True, **now
        )
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), out, rtol=1e-12)
    np.testing.assert_allclose(state, last, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_chunks_do_not_change_the_result(monkeypatch, rule):
    q, k, v, options = given(rule, length=37)
    out = aa.linear_attention(q, k, v, backend="reference", **options)
    for size in (1, 3, 16, 37):
        monkeypatch.setattr(linear, "CHUNK", size)
        other = aa.linear_attention(q, k, v, backend="reference", **options)
        np.testing.assert_allclose(other, out, rtol=1e-11, atol=1e-13)


def test_decays_keep_their_digits_beside_large_ones():
    """A quotient of cumulated decays would lose what lies 1e5 below, or be 0 / 0."""
    q, k, v, options = given("gated", length=64, dtype="f4")
    options["decay"][:, 3::7] = -3e4
    out = aa.linear_attention(q, k, v, **options)
    wide = {"rule": "gated", "decay": options["decay"].astype("f8")}
    wanted = aa.linear_attention(q.astype("f8"), k.astype("f8"), v.astype("f8"), **wide)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_what_comes_later_does_not_matter_even_if_it_is_not_finite(backend):
    if not aa.backends()[backend].available:
        pytest.skip(f"{backend} is not installed")
    for rule in RULES:
        q, k, v, options = given(rule)
        options["backend"] = backend
        out = aa.linear_attention(q, k, v, **options)
        k[0, 7], v[1, 8, 1] = np.nan, np.inf
        got = aa.linear_attention(q, k, v, **options)
        np.testing.assert_allclose(got[:2, :7], out[:2, :7], rtol=1e-12)
        np.testing.assert_allclose(got[2:, :8], out[2:, :8], rtol=1e-12)
        assert np.isnan(got[:2, 7:]).all()
        assert not np.isfinite(got[2:, 8:, 1]).any()
    np.testing.assert_allclose(got[2:, 8:, 0], out[2:, 8:, 0], rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(
    ("rule", "what", "value"),
    [
        ("gated", "decay", np.nan),
        ("delta", "beta", np.inf),
        ("gated_delta", "beta", np.nan),
        ("gated_delta", "decay", np.nan),
        # What is written overflows, though all that was given is finite.
        ("delta", "beta", 1e308),
    ],
)
def test_later_decays_and_writes_that_are_not_finite_do_not_matter(backend, rule, what, value):
    if not aa.backends()[backend].available:
        pytest.skip(f"{backend} is not installed")
    q, k, v, options = given(rule, length=40)
    v *= 10
    options |= {"backend": backend, "return_state": True}
    out, _ = aa.linear_attention(q, k, v, **options)
    options[what][0, 21] = value
    got, state = aa.linear_attention(q, k, v, **options)
    np.testing.assert_allclose(got[:2, :21], out[:2, :21], rtol=1e-12)
    np.testing.assert_allclose(got[2:], out[2:], rtol=1e-12)
    assert not np.isfinite(state[0]).any()


def test_the_delta_rule_holds_what_it_was_told_last():
    """With beta = 1 and keys of length 1, a key recalls the value that was written with it last."""
    k = np.repeat(np.eye(4)[None], 2, axis=1)  # each key twice
    v = np.random.default_rng(0).standard_normal((1, 8, 3))
    out, state = aa.linear_attention(
        k, k, v, rule="delta", beta=np.ones((1, 8)), scale=1.0, return_state=True
    )
    np.testing.assert_allclose(out, v, atol=1e-14)
    np.testing.assert_allclose(state[0], v[0, 1::2], atol=1e-14)


def test_normalised_without_order_is_attention_by_features():
    q, k, v, _ = given("linear")
    features = [np.maximum(x, 0) + 0.1 for x in (q, k)]
    weights = features[0] @ np.swapaxes(np.repeat(features[1], 2, axis=0), 1, 2)
    wanted = weights / weights.sum(axis=-1, keepdims=True) @ np.repeat(v, 2, axis=0)
    got = aa.linear_attention(
        q, k, v, feature_map=lambda x: np.maximum(x, 0) + 0.1, normalize=True, causal=False, scale=1.0
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dim", "v_dim"), [(37, 70), (32, 48)], ids=["copied", "read in place"])
def test_numba_equals_the_reference_beyond_one_block_of_columns_and_tokens(rule, dim, v_dim):
    """Chunks have 16 or 32 tokens, blocks 12 to 48 columns: these need several, the last ones partial.

    Rows of whole vectors are read and written where they lie, but for the last chunk: here backwards, and
    between those of other heads.
    """
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    q, k, v, needed = given(rule, length=101, heads=6, kv_heads=2, dim=dim, v_dim=v_dim, dtype="f4")
    q, k, v = (x[:, ::-1] for x in (q, k, v))
    more = {
        "linear": [{"feature_map": "elu+1", "normalize": True}, {"causal": False}, {}],
        "gated": [
            {"decay": needed.get("decay", v)[..., 0]},
            {"feature_map": "relu", "normalize": True},
            {},
        ],
        "gated_delta": [{"decay": needed.get("decay", v)[..., 0]}, {}],
    }
    for options in more.get(rule, [{}]):
        options = needed | options | {"return_state": True}
        wanted = aa.linear_attention(q, k, v, backend="reference", **options)
        apart = [np.ascontiguousarray(np.swapaxes(x[:, ::-1], 0, 1))[::-1] for x in (q, k, v)]
        found = aa.linear_attention(*apart, layout="blhd", backend="numba", **options)
        rows = np.swapaxes(found[0], 0, 1)
        for got, right in zip((rows, *found[1]), (wanted[0], *wanted[1]), strict=True):
            np.testing.assert_allclose(got, right, rtol=0, atol=2e-5 * np.abs(right).max())


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_numba_reads_numbers_that_do_not_lie_side_by_side(which):
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    arrays = list(given("linear", length=32, dim=32, v_dim=48, dtype="f4")[:3])
    wanted = aa.linear_attention(*arrays, backend="numba")
    arrays[which] = np.repeat(arrays[which], 2, axis=-1)[..., ::2]
    np.testing.assert_array_equal(aa.linear_attention(*arrays, backend="numba"), wanted)


@pytest.mark.parametrize("heads", [8, 1])
def test_numba_takes_threads_and_every_result_is_the_same(heads):
    """Heads are shared out, and the columns of their states where there are fewer heads than threads."""
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    sizes = {"heads": heads, "kv_heads": heads, "dim": 16, "v_dim": 64}
    q, k, v, options = given("gated_delta", length=24000 // heads, dtype="f4", **sizes)
    options |= {"backend": "numba", "return_state": True, "state": np.full((heads, 16, 64), 0.5, "f4")}
    with aa.use(threads=1):
        alone = aa.linear_attention(q, k, v, **options)
    with aa.use(threads=4):
        for got, right in zip(aa.linear_attention(q, k, v, **options), alone, strict=True):
            np.testing.assert_array_equal(got, right)


def test_numba_keeps_its_pace_where_decays_make_products_subnormal():
    """Arithmetic with subnormal numbers takes a hundred times as long, so none may be left."""
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    q, k, v, options = given("gated", length=4000, heads=1, kv_heads=1, dim=64, v_dim=64, dtype="f4")

    def seconds(decay):
        options["decay"][...] = decay
        found = []
        for _ in range(3):
            start = time.process_time()
            aa.linear_attention(q, k, v, backend="numba", **options)
            found.append(time.process_time() - start)
        return min(found)

    with aa.use(threads=1):
        assert seconds(-2.5) < 2 * seconds(-0.1)


@pytest.mark.parametrize("rule", RULES)
def test_time_grows_as_the_length(rule):
    """Twice the tokens take twice as long on Numba, to a million; `docs/linear_table.py` prints how long."""
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    sizes = {"heads": 1, "kv_heads": 1, "dim": 8, "v_dim": 8, "dtype": "f4"}
    doublings = (15, 17, 20)
    q, k, v, options = given(rule, length=2 ** doublings[-1], **sizes)

    def seconds(length):
        now = {name: x[:, :length] if name != "rule" else x for name, x in options.items()}
        start = time.process_time()
        aa.linear_attention(*(x[:, :length] for x in (q, k, v)), backend="numba", **now)
        return time.process_time() - start

    with aa.use(threads=1):
        found = [[seconds(2**n) for n in doublings] for _ in range(6)][1:]
    for (n, short), (m, long) in itertools.pairwise(zip(doublings, np.min(found, axis=0), strict=True)):
        assert long < 2.3 ** (m - n) * short


def test_memory_grows_with_the_length():
    """The largest array that a chunk makes is one of chunks, not of the sequence."""
    import tracemalloc

    def peak(length):
        q, k, v, options = given("gated_delta", length=length, dtype="f4")
        aa.linear_attention(q[:, :2], k[:, :2], v[:, :2])
        tracemalloc.start()
        try:
            aa.linear_attention(q, k, v, **options)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(4096) < 2.2 * peak(2048)


def test_explain_says_what_runs_and_what_it_holds():
    q, k, v, options = given("delta")
    if not aa.backends()["numba"].available:
        pytest.skip("numba is not installed")
    with dispatch.recording() as records:
        aa.linear_attention(q, k, v, **options)
    assert [record.backend for record in records] == ["numba"]
    shown = repr(aa.explain(q, k, v, **options))
    assert re.search(r"^numba +runs$", shown, re.MULTILINE)
    shown = repr(aa.explain(q, k, v, rule="linear", feature_map="relu"))
    assert re.search(r"^numba +runs$", shown, re.MULTILINE)
    assert "note: holds features of q and k, and v, of all tokens in float64" in shown
    with pytest.raises(TypeError, match=r"^explain: unexpected option 'window'; it takes rule, feature_map"):
        aa.explain(q, k, v, rule="linear", window=(1, 0))


def test_the_examples_of_the_page_run():
    need_docs()
    names = {}
    page = (DOCS / "linear-attention.md").read_text(encoding="utf-8")
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(source, names)
    q, k, v, beta = (names[name] for name in ("q", "k", "v", "beta"))
    whole, state = aa.linear_attention(q, k, v, rule="delta", beta=beta, return_state=True)
    joined = np.concatenate([names["first"], names["last"]], axis=-2)
    np.testing.assert_allclose(joined, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(names["state"], state, rtol=0, atol=1e-5)
    assert names["states"].shape == (3, 4, 16, 16)
    wanted = aa.attention(q, k, v, causal=True)
    assert np.mean((names["estimate"] - wanted) ** 2) < 0.7 * np.mean((names["positive"] - wanted) ** 2)


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", reason="torch is not installed")

    @pytest.mark.parametrize("rule", RULES)
    def test_derivatives(self, torch, rule, monkeypatch):
        call, inputs = self.differentiable(torch, rule, monkeypatch)
        assert torch.autograd.gradcheck(call, inputs)

    @pytest.mark.parametrize("rule", ["gated", "gated_delta"])
    def test_derivatives_of_second_order(self, torch, rule, monkeypatch):
        call, inputs = self.differentiable(torch, rule, monkeypatch)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)

    def differentiable(self, torch, rule, monkeypatch):
        """A call of packed sequences, one of them empty, in chunks of 4, and its tensors."""
        for module in (linear, importlib.import_module("anyattn_torch.linear")):
            monkeypatch.setattr(module, "CHUNK", 4)
        q, k, v, options = given(rule, length=7, dim=2, v_dim=2, heads=2, kv_heads=1)
        names = [name for name in options if name != "rule"]
        inputs = [torch.tensor(x, requires_grad=True) for x in (q, k, v, *(options[n] for n in names))]
        normalize = rule in ("linear", "gated")
        place = {"dtype": torch.float64, "requires_grad": True}
        inputs += [torch.rand(3, 1, 2, **place)] * normalize + [torch.randn(3, 1, 2, 2, **place)]

        def call(q, k, v, *rest):
            *others, state = rest
            state = (state, others.pop()) if normalize else state
            more = dict(zip(names, others, strict=True))
            out, state = aa.linear_attention(
                q, k, v, rule=rule, state=state, feature_map="elu+1", return_state=True, normalize=normalize,
                cu_seqlens=[0, 6, 6, 7], backend="torch", **more,
            )  # fmt: skip
            return (out, *state) if normalize else (out, state)

        return call, inputs

    def test_the_backward_keeps_no_chunk(self, torch):
        """Beside the arguments, what autograd saves does not hang on how they are cut."""
        q, k, v, options = given("gated_delta", length=300, dtype="f4")
        tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v, options["decay"], options["beta"])]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            out = aa.linear_attention(*tensors[:3], rule="gated_delta", decay=tensors[3], beta=tensors[4])
        assert sum(x.numel() for x in saved) <= sum(x.numel() for x in tensors)
        found = torch.autograd.grad(out.square().sum(), tensors)
        again = aa.linear_attention(
            *tensors[:3], rule="gated_delta", decay=tensors[3], beta=tensors[4], backend="reference"
        )
        wanted = torch.autograd.grad(again.square().sum(), tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def test_shared_keys_get_one_gradient_and_others_none(self, torch):
        """Batch axes that broadcast, bfloat16, and an argument without a gradient."""
        q, k, v, options = given("gated", length=70)
        q = torch.tensor(np.stack([q, -q, 2 * q])).bfloat16().requires_grad_()
        k = torch.tensor(k).bfloat16().requires_grad_()
        v, decay = torch.tensor(v).bfloat16(), torch.tensor(options["decay"]).float().requires_grad_()
        found, wanted = (
            torch.autograd.grad(
                aa.linear_attention(q, k, v, rule="gated", decay=decay, backend=backend).float().sum(),
                (q, k, decay),
            )
            for backend in ("torch", "reference")
        )
        for got, right in zip(found, wanted, strict=True):
            assert (got.shape, got.dtype) == (right.shape, right.dtype)
            torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    def test_compiled_code_has_its_gradients(self, torch):
        def loss(q, k, v, decay):
            return aa.linear_attention(q, k, v, rule="gated", decay=decay).square().sum()

        q, k, v, options = given("gated", length=70, dtype="f4")
        tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v, options["decay"])]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, wanted = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, loss))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    def test_transforms_see_it_as_one_piece(self, torch):
        q, k, v, _ = given("linear", length=9)
        tensors = [torch.tensor(x) for x in (q, k, v)]
        tangents = tuple(torch.ones_like(x) for x in tensors)
        call = torch.func.jvp(aa.linear_attention, tuple(tensors), tangents)
        step = [x + 1e-6 * y for x, y in zip(tensors, tangents, strict=True)]
        wanted = (aa.linear_attention(*step) - aa.linear_attention(*tensors)) / 1e-6
        torch.testing.assert_close(call[1], wanted, rtol=1e-4, atol=1e-4)
        stacked = [torch.stack([x, 2 * x]) for x in tensors]
        mapped = torch.func.vmap(torch.func.grad(lambda *x: aa.linear_attention(*x).sum()))(*stacked)
        alone = torch.func.grad(lambda *x: aa.linear_attention(*x).sum())(*(x[1] for x in stacked))
        torch.testing.assert_close(mapped[1], alone)

    def test_explain_says_how_it_runs(self, torch):
        q = torch.randn(2, 9, 4, requires_grad=True)
        shown = repr(aa.explain(q, q, q, rule="linear"))
        assert re.search(r"^torch +runs$", shown, re.MULTILINE)
        assert "note: gradients keep no chunk: each is computed again" in shown
        if aa.backends()["numba"].available:
            assert "note: Numba computes the forward" in shown
            plain = q.detach()
            shown = repr(aa.explain(plain, plain, plain, rule="linear"))
            assert re.search(r"^numba +runs$", shown, re.MULTILINE)
        shown = repr(aa.explain(q, q, q, rule="linear", causal=False))
        assert "note: runs as one piece: it has no chunks without order" in shown

    def test_normalised_rows_of_nothing_have_no_gradient(self, torch):
        q, k, v = (torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
        with torch.no_grad():
            q[0, 2] = -1.0
        out = aa.linear_attention(q, k, v, feature_map="relu", normalize=True)
        assert (out[0, 2] == 0).all()
        out.sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
        assert (q.grad[0, 2] == 0).all()

    def test_the_gradient_of_elu_survives_large_values(self, torch):
        x = torch.tensor([[[200.0, -1.0, 0.5]]], requires_grad=True)
        aa.feature_maps.elu_plus_one(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor([[[1.0, math.exp(-1.0), 1.0]]]))


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self):
        return pytest.importorskip("jax", reason="JAX is not installed")

    def test_jit_has_one_loop_whatever_the_length(self, jax):
        def size(length):
            shapes = [jax.ShapeDtypeStruct((2, length, 4), "float32")] * 3
            return len(jax.make_jaxpr(aa.linear_attention)(*shapes).eqns)

        assert size(4 * linear.CHUNK) == size(64 * linear.CHUNK)

    def test_bounds_that_nobody_can_read(self, jax):
        q, k, v, options = given("gated", length=12, dtype="f4")
        wanted, states = aa.linear_attention(q, k, v, cu_seqlens=[0, 3, 3, 12], return_state=True, **options)
        decay = jax.numpy.asarray(options["decay"])

        @jax.jit
        def call(bounds, q, k, v):
            return aa.linear_attention(
                q, k, v, rule="gated", decay=decay, cu_seqlens=bounds, return_state=True
            )

        out, found = call(*map(jax.numpy.asarray, (np.array([0, 3, 3, 12]), q, k, v)))
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found, states, rtol=1e-5, atol=1e-6)

    def test_gradients_through_the_loop_are_those_of_the_recurrence(self, jax, monkeypatch):
        monkeypatch.setattr(linear, "CHUNK", 2)
        q, k, v, options = given("gated_delta", length=5, dim=3, v_dim=2, heads=1, kv_heads=1, dtype="f4")
        arrays = [jax.numpy.asarray(x) for x in (q, k, v, options["decay"], options["beta"])]

        def chunked(q, k, v, decay, beta):
            return aa.linear_attention(q, k, v, rule="gated_delta", decay=decay, beta=beta, scale=1.0).sum()

        def plain(q, k, v, decay, beta):
            zero = jax.numpy.zeros((1, 3, 2))
            return recurrence(jax.numpy, q[:, :, None], k, v, zero, decay, beta)[0].sum()

        found, wanted = (jax.jit(jax.grad(f, argnums=range(5)))(*arrays) for f in (chunked, plain))
        for got, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)
            assert np.abs(right).max() > 1e-2


def test_dask_computes_nothing_before_it_is_asked_for():
    dask = pytest.importorskip("dask", reason="dask is not installed")
    array = pytest.importorskip("dask.array", reason="dask.array is not installed")

    def refuse(*args, **kwargs):
        raise AssertionError("a graph was computed")

    q, k, v, options = given("gated_delta", length=9)
    lazy = [array.from_array(x, chunks=4) for x in (q, k, v, options["decay"], options["beta"])]
    with dask.config.set(scheduler=refuse):
        out = aa.linear_attention(*lazy[:3], rule="gated_delta", decay=lazy[3], beta=lazy[4])
    np.testing.assert_allclose(out.compute(), aa.linear_attention(q, k, v, **options), rtol=1e-12)


class TestPerformer:
    def test_the_mean_of_many_drawings_is_the_softmax_kernel(self):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((2, 8)) * 0.7
        products = [
            float(phi(x[None])[0] @ phi(y[None])[0])
            for phi in (aa.feature_maps.performer(8, 16, seed=seed) for seed in range(400))
        ]
        wanted = math.exp(x @ y / math.sqrt(8))
        spread = np.std(products) / math.sqrt(len(products))
        assert abs(np.mean(products) - wanted) < 4 * spread
        assert spread < 0.05 * wanted

    def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(self):
        directions = aa.feature_maps.performer(16, 4000).directions
        block = directions[16:32]
        lengths = np.sqrt((directions**2).sum(axis=1))
        np.testing.assert_allclose(block @ block.T, np.diag(lengths[16:32] ** 2), atol=1e-10)
        assert abs((lengths**2).mean() - 16) < 0.5
        assert lengths.std() > 0.5

    def test_the_error_against_softmax_attention_is_that_of_the_page(self):
        """It falls with the features, as 1 / sqrt(m) where scores are small, and grows with the scores."""
        need_docs()
        table = script("performer_table")
        errors = {(size, m): table.error(size, m) for size in table.SIZES for m in table.FEATURES}
        for size in table.SIZES:
            of_size = [errors[size, m] for m in table.FEATURES]
            assert all(later < earlier for earlier, later in itertools.pairwise(of_size))
        assert errors[0.5, 1024] < 0.6 * errors[0.5, 256] < 0.4 * errors[0.5, 64]
        assert errors[0.5, 1024] < 0.08
        for m in table.FEATURES:
            assert errors[0.5, m] < errors[1.0, m] < errors[1.5, m]
        page = table.PAGE.read_text(encoding="utf-8")
        shown = [float(x) for x in re.findall(r"([\d.]+) %", page)]
        found = [100 * errors[size, m] for m in table.FEATURES for size in table.SIZES]
        np.testing.assert_allclose(shown, found, rtol=0, atol=0.2, err_msg="run docs/performer_table.py")

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match=r"^features: wanted 1 or more, got 0"):
            aa.feature_maps.performer(8, 0)
        with pytest.raises(ValueError, match=r"^feature_map: performer was made for 8 features, got 5"):
            aa.linear_attention(*given("linear")[:3], feature_map=aa.feature_maps.performer(8, 4))
        with pytest.raises(ValueError, match=r"^feature_map: of q: wanted shape \(4, 11, F\)"):
            aa.linear_attention(*given("linear")[:3], feature_map=lambda x: x[:, 1:])


def test_the_triangular_inverse_is_as_stable_as_substitution():
    """Keys that hardly differ make N of entries near 1, whose powers reach 1e17 before they vanish."""
    rng = np.random.default_rng(0)
    k = np.ones((64, 8)) + 1e-3 * rng.standard_normal((64, 8))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    beta = np.full((64, 1), 0.99)
    below = chunk._blocks_below(np, k[:, None, :].astype("f4"), k.astype("f4"), None)
    found = chunk._unit_inverse(np, beta.astype("f4"), below)
    wanted = np.linalg.inv(np.eye(64) + np.tril(beta * (k @ k.T), -1))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)
