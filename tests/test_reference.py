"""The reference backend as a program: memory, real loops, laziness, derivatives, functional transforms.

What it computes is held to the float64 oracle by the conformance kit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import anyattn as aa
from anyattn.describe import Options, describe
from anyattn.reference import loop, spans

KEYS = 2 * loop.BLOCK + 37


def arrays(q_len=9, k_len=KEYS, heads=4, kv_heads=2, dim=8, dtype="f8", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim + 3)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def test_blocks_do_not_change_the_result(monkeypatch):
    q, k, v = arrays()
    options = dict(causal=True, softcap=3.0, sinks=[0.1, 0.2, 0.3, 0.4], return_lse=True)
    out, lse = aa.attention(q, k, v, **options)
    for block in (1, 7, KEYS):
        monkeypatch.setattr(loop, "BLOCK", block)
        other, other_lse = aa.attention(q, k, v, **options)
        np.testing.assert_allclose(other, out, rtol=1e-12)
        np.testing.assert_allclose(other_lse, lse, rtol=1e-12)


def test_the_same_call_gives_the_same_bits():
    q, k, v = arrays(dtype="f4")
    np.testing.assert_array_equal(aa.attention(q, k, v, causal=True), aa.attention(q, k, v, causal=True))


def test_inputs_are_not_written_to():
    tensors = arrays()
    copies = [x.copy() for x in tensors]
    bias = np.zeros((9, KEYS))
    aa.attention(*tensors, bias=bias, causal=True)
    assert not bias.any()
    for x, copy in zip(tensors, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


RNG = np.random.default_rng(7)


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True),
        dict(causal=True, window=(20, 0), sinks=[0.1, -1.0, 0.3, 2.0]),
        dict(mask=aa.masks.sliding_window(9, 9) | aa.masks.global_tokens(5)),
        dict(mask=aa.masks.causal() & (aa.masks.sliding_window(12) | aa.masks.fixed(17))),
        dict(mask=aa.masks.documents([*[0] * 50, *[1] * 7, *[2] * 90, *[3] * 83]), causal=True),
        dict(mask=lambda b, h, i, j: (h == 2) & (b == 0) & (j < 30) | (i - j == 100)),
        dict(mask=RNG.random((2, 1, 7, 230)).repeat(31, axis=2)[:, :, :200] < 0.02),
        dict(mask=aa.masks.block_sparse(RNG.random((4, 13, 15)) < 0.2, 16)),
        dict(causal=True, kv_lengths=[40, 230], q_offset=[-100, 30]),
        dict(mask=lambda b, h, i, j: i < 0),
        dict(causal=True, bias=RNG.standard_normal((200, 230)), score_mod=aa.scores.alibi(4), softcap=3.0),
    ],
    ids=[
        "causal",
        "window and sinks",
        "global",
        "fixed",
        "documents",
        "heads and entries",
        "dense",
        "blocks",
        "lengths",
        "nothing",
        "scores",
    ],
)
def test_what_is_skipped_does_not_matter(monkeypatch, options):
    q, k, v = (np.stack([x, x[:, ::-1]]) for x in arrays(200, 230))
    out, lse = aa.attention(q, k, v, return_lse=True, **options)
    monkeypatch.setattr(spans, "FEW_SCORES", 0)
    for tile in (16, 37, 64):
        monkeypatch.setattr(spans, "TILE", tile)
        other, other_lse = aa.attention(q, k, v, return_lse=True, **options)
        np.testing.assert_allclose(other, out, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(other_lse, lse, rtol=1e-12)


def test_empty_tiles_are_not_computed(monkeypatch):
    """A window of 16 in 230 keys needs two tiles of 32 keys a block of rows, at most three."""
    monkeypatch.setattr(spans, "FEW_SCORES", 0)
    monkeypatch.setattr(spans, "TILE", 32)
    q, k, v = arrays(230, 230)
    call = describe("attention", q, k, v, Options(causal=True, window=(16, 0)))
    visits = spans.visits(call)
    assert [(visit.first, visit.last) for visit in visits] == [
        (n, min(n + 32, 230)) for n in range(0, 230, 32)
    ]
    assert max(sum(span.end - span.start for span in visit.spans) for visit in visits) <= 64


def peak(length, call):
    q, k, v = arrays(length, length, dtype="f4")
    call(q[:, :2], k, v)  # imports and caches
    tracemalloc.start()
    try:
        call(q, k, v)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: aa.attention(q, k, v, mask=aa.masks.causal() | aa.masks.global_tokens(5)),
        lambda q, k, v: aa.attention_stats(q, k, stats=("key_mass", "entropy", "max"), causal=True),
    ],
    ids=["attention", "stats"],
)
def test_memory_grows_with_the_length_not_its_square(call):
    assert peak(4096, call) < 2.3 * peak(2048, call)


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self):
        return pytest.importorskip("jax", reason="JAX is not installed")

    def test_jit_has_one_loop_whatever_the_length(self, jax):
        def size(length):
            shapes = [jax.ShapeDtypeStruct((4, length, 8), "float32")] * 3
            program = jax.make_jaxpr(lambda q, k, v: aa.attention(q, k, v, causal=True))(*shapes)
            return len(program.eqns), sum(e.primitive.name == "scan" for e in program.eqns)

        assert size(16 * loop.BLOCK) == size(64 * loop.BLOCK)
        assert size(16 * loop.BLOCK)[1] == 1

    def test_jit_memory_grows_with_the_length(self, jax):
        def temporary(length):
            shapes = [jax.ShapeDtypeStruct((8, length, 64), "float32")] * 3
            compiled = jax.jit(lambda q, k, v: aa.attention(q, k, v, causal=True)).lower(*shapes).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert temporary(4096) < 160e6  # one score matrix of 8 heads would be 537 MB
        assert temporary(8192) < 2.3 * temporary(4096)

    def test_jit_grad_vmap_equal_numpy(self, jax):
        wanted = aa.attention(*arrays(dtype="f4"), causal=True, softcap=2.0)
        q, k, v = map(jax.numpy.asarray, arrays(dtype="f4"))

        def call(q, k, v):
            return aa.attention(q, k, v, causal=True, softcap=2.0)

        np.testing.assert_allclose(jax.jit(call)(q, k, v), wanted, rtol=2e-5, atol=1e-6)
        batched = jax.vmap(call)(*(jax.numpy.stack([x, x[:, ::-1]]) for x in (q, k, v)))
        np.testing.assert_allclose(batched[0], wanted, rtol=2e-5, atol=1e-6)
        eager = jax.grad(lambda q: call(q, k, v).sum())(q)
        traced = jax.jit(jax.grad(lambda q: call(q, k, v).sum()))(q)
        np.testing.assert_allclose(traced, eager, rtol=2e-4, atol=1e-5)
        assert np.abs(eager).max() > 1e-3

    def test_arrays_on_several_devices(self, jax):
        code = """
import jax, numpy as np, anyattn as aa
from jax.sharding import Mesh, NamedSharding, PartitionSpec
halves = NamedSharding(Mesh(np.array(jax.devices()), ("b",)), PartitionSpec("b"))
q, k, v = (np.random.default_rng(n).standard_normal((2, 2, n, 8), dtype="f4") for n in (5, 9, 9))
call = dict(causal=True, kv_lengths=[7, 9], q_offset=0, score_mod=aa.scores.alibi(2))
out = aa.attention(*(jax.device_put(x, halves) for x in (q, k, v)), **call)
assert len(out.sharding.device_set) == 2
np.testing.assert_allclose(out, aa.attention(q, k, v, **call), rtol=1e-5, atol=1e-6)
"""
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    def test_lengths_under_a_tracer_are_clamped(self, jax):
        q, k, v = arrays(dtype="f4", k_len=11)
        call = jax.jit(lambda n: aa.attention(*map(jax.numpy.asarray, (q, k, v)), kv_lengths=n))
        np.testing.assert_allclose(call(99), aa.attention(q, k, v), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(call(-3), np.zeros_like(aa.attention(q, k, v)))


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", reason="torch is not installed")

    def test_first_and_second_derivatives(self, torch):
        q, k, v = (torch.tensor(x, requires_grad=True) for x in arrays(3, 5, dim=2))
        bias = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
        slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)

        def call(q, k, v, bias, sinks, slopes):
            return aa.attention(
                q, k, v, bias=bias, sinks=sinks, causal=True, softcap=2.0, return_lse=True,
                score_mod=lambda s, b, h, i, j: aa.tanh(s) - slopes[h] * abs(i - j),
            )  # fmt: skip

        inputs = (q, k, v, bias, sinks, slopes)
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)

    def test_vmap_equals_a_loop(self, torch):
        tensors = [torch.from_numpy(np.stack([x, 2 * x])) for x in arrays(dtype="f4")]
        found = torch.func.vmap(lambda q, k, v: aa.attention(q, k, v, causal=True))(*tensors)
        for n in range(2):
            alone = aa.attention(*(x[n] for x in tensors), causal=True)
            torch.testing.assert_close(found[n], alone)

    def test_a_meta_tensor_has_a_shape_and_no_values(self, torch):
        q, k, v = (torch.empty(4, n, 8, device="meta") for n in (3, 700, 700))
        out = aa.attention(q, k, v, causal=True)
        assert out.shape == (4, 3, 8)
        assert out.device.type == "meta"


class TestDask:
    @pytest.fixture(autouse=True)
    def dask(self):
        return pytest.importorskip("dask.array", reason="dask is not installed")

    def test_nothing_is_computed_before_it_is_asked_for(self, dask):
        import dask as root

        def refuse(*args, **kwargs):
            raise AssertionError("a graph was computed")

        q, k, v = arrays(dtype="f4")
        lazy = [dask.from_array(x, chunks=(2, chunk, 4)) for x, chunk in ((q, 4), (k, 100), (v, 90))]
        with root.config.set(scheduler=refuse):
            out, lse = aa.attention(*lazy, causal=True, return_lse=True)
            weights = aa.attention_weights(*lazy[:2], rows=[0, 3], causal=True)
        wanted, wanted_lse = aa.attention(q, k, v, causal=True, return_lse=True)
        np.testing.assert_allclose(out.compute(), wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse.compute(), wanted_lse, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            weights.compute(), aa.attention_weights(q, k, rows=[0, 3], causal=True), rtol=1e-4
        )

    def test_rows_stay_in_their_chunks(self, dask):
        q, k, v = arrays(64, 64, dtype="f4")
        lazy = [dask.from_array(x, chunks=(2, 16, 8)) for x in (q, k, v)]
        assert aa.attention(*lazy).chunks[-2] == (16, 16, 16, 16)

    def test_unknown_lengths_are_refused(self, dask):
        x = dask.from_array(np.zeros((4, 6, 2), "f4"), chunks=2)
        unknown = x[:, dask.from_array(np.arange(6), chunks=2) > 2]
        with pytest.raises(ValueError, match="wanted known sizes"):
            aa.attention(x, unknown, unknown)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_with_sinks_that_are_not_finite_are_undefined_but_at_hidden_keys(backend):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.standard_normal((3, 4, 5))).requires_grad_() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, 2] = mask[1] = False
    sinks = torch.asarray([np.inf, np.nan, 0.5], dtype=torch.float64).requires_grad_()
    out, lse = aa.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True, backend=backend)
    np.testing.assert_array_equal(lse[:, 1].detach(), sinks.detach())
    assert not out[:, 1].any()
    assert torch.isnan(out[:2, [0, 2, 3]]).all()
    assert torch.isfinite(out[2]).all()
    for x in torch.autograd.grad(out.sum() + lse.sum(), (k, v), retain_graph=True):
        assert not x[:, 2].any()
        assert torch.isnan(x[:2, [0, 1, 3]]).all()
        assert torch.isfinite(x[2]).all()
    for result in (out, lse):
        (of_sinks,) = torch.autograd.grad(result.sum(), sinks, retain_graph=True)
        assert of_sinks.isnan().tolist() == [True, True, False]
