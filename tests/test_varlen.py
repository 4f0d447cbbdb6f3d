"""Packed sequences: each computes what it computes alone, on every backend and with every option."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import anyattn as aa
from anyattn import dispatch
from anyattn.dispatch import recording
from anyattn.expr.nodes import B, Load, walk
from anyattn.expr.relocate import Relocation
from anyattn.schedule import schedule

# A sequence of nothing, one without keys, one without queries, more queries than keys, and tiles in between.
LENGTHS_Q = (5, 0, 3, 7, 130, 1)
LENGTHS_K = (9, 4, 0, 2, 141, 33)
HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 8, 5


def starts(lengths):
    return np.cumsum([0, *lengths])


def inputs(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    tq, tk = sum(LENGTHS_Q), sum(LENGTHS_K)
    shapes = (tq, HEADS, DIM), (tk, KV_HEADS, DIM), (tk, KV_HEADS, V_DIM)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def one_by_one(q, k, v, options_of):
    """Each sequence by a call of its own: outputs joined along T, lse along its last axis."""
    cq, ck = starts(LENGTHS_Q), starts(LENGTHS_K)
    parts = [
        aa.attention(
            q[cq[n] : cq[n + 1]],
            k[ck[n] : ck[n + 1]],
            v[ck[n] : ck[n + 1]],
            layout="blhd",
            return_lse=True,
            backend="reference",
            **options_of(n),
        )
        for n in range(len(LENGTHS_Q))
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts], axis=-1)


def per_sequence(numbers):
    """An array over sequences, and what it is to sequence n alone."""
    return np.asarray(numbers), lambda n: np.asarray(numbers)[n : n + 1]


PREFIXES, PREFIX_OF = per_sequence([2, 1, 0, 1, 60, 3])
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625])
BIASES = np.linspace(-1, 1, 6)

# Options of the packed call, and of sequence n alone.
OPTIONS = {
    "nothing": ({}, lambda n: {}),
    "causal": ({"causal": True}, lambda n: {"causal": True}),
    "window": ({"window": (7, 2)}, lambda n: {"window": (7, 2)}),
    "sinks, softcap, scale": (
        {"sinks": [0.5, -1.0, 2.0, 0.0], "softcap": 1.5, "scale": 0.7},
        lambda n: {"sinks": [0.5, -1.0, 2.0, 0.0], "softcap": 1.5, "scale": 0.7},
    ),
    "prefix of each sequence | causal": (
        {"mask": aa.masks.prefix(PREFIXES) | aa.masks.causal()},
        lambda n: {"mask": aa.masks.prefix(int(PREFIXES[n])) | aa.masks.causal()},
    ),
    "strided and global": (
        {"mask": aa.masks.strided(3) | aa.masks.global_tokens([0, 100])},
        lambda n: {"mask": aa.masks.strided(3) | aa.masks.global_tokens([0, 100])},
    ),
    "rows": (
        {"mask": aa.masks.sliding_window(4, 4, positions=False)},
        lambda n: {"mask": aa.masks.sliding_window(4, 4, positions=False)},
    ),
    "scores": (
        {"causal": True, "score_mod": lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j) + BIASES[b]},
        lambda n: {
            "causal": True,
            "score_mod": lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j) + BIASES[n],
        },
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_packed_sequence_computes_what_it_computes_alone(name):
    """By the reference; the kit's family `packed` holds every backend to it."""
    packed, alone = OPTIONS[name]
    q, k, v = inputs()
    with recording() as ran:
        out, lse = aa.varlen_attention(
            q,
            k,
            v,
            starts(LENGTHS_Q).tolist(),
            starts(LENGTHS_K),
            return_lse=True,
            backend="reference",
            **packed,
        )
    assert [one.backend for one in ran] == ["reference"]
    expected, expected_lse = one_by_one(q, k, v, alone)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-11, atol=1e-12)
    assert not out[5:8].any()  # the rows of the sequence without keys


def test_other_lengths_of_the_same_signature():
    _, k, v = inputs(np.float32)
    cu = starts(LENGTHS_K)
    for shift in (0, 1, -1, 0):
        moved = cu.copy()
        moved[1:-1] += shift
        out = aa.varlen_attention(k, k, v, moved, moved, causal=True, backend="numba")
        for first, last in pairwise(moved):
            if first < last:
                np.testing.assert_allclose(out[first], v[first], rtol=1e-6)
                mean = aa.attention(k[first:last], k[first:last], v[first:last], layout="blhd")[-1]
                np.testing.assert_allclose(out[last - 1], mean, rtol=1e-4, atol=1e-5)


def test_keys_of_other_sequences_are_not_computed(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "run_on", lambda backend, call: seen.append(call) or (call.q, None))
    x = np.zeros((1000, 1, 4))
    cu = [*range(0, 1000, 64), 1000]
    for causal in (False, True):
        aa.varlen_attention(x, x, x, cu, cu, causal=causal, backend="reference")
    whole, causal = (schedule(call, 64, 64) for call in seen)
    assert (whole.full.count, whole.partial.count, whole.gathered.count) == (16, 0, 0)
    assert (causal.full.count, causal.partial.count, causal.gathered.count) == (0, 16, 0)
    # Tiles within a long sequence are proved by its own positions.
    aa.varlen_attention(x, x, x, [0, 512, 1000], [0, 512, 1000], causal=True, backend="reference")
    long = schedule(seen[-1], 64, 64)
    assert (long.full.count, long.partial.count) == (28 + 28, 8 + 8)


def computed_by_reference(monkeypatch, run):
    from anyattn.reference.logits import Logits

    found, block = [], Logits.block

    def counting(self, start, size, full=False):
        found.append(self.num_rows * size)
        return block(self, start, size, full)

    monkeypatch.setattr(Logits, "block", counting)
    run(np)
    return sum(found)


def computed_by_numba(monkeypatch, run):
    template = pytest.importorskip("anyattn_numba.template")
    found, case = [], template.Template.case

    def counting(self, others, threads):
        found.append(case(self, others, threads))
        return found[-1]

    monkeypatch.setattr(template.Template, "case", counting)
    run(np)
    return found[-1].work.pairs


def computed_by_torch(monkeypatch, run):
    torch = pytest.importorskip("torch")
    scores = pytest.importorskip("anyattn_torch.scores")
    routes = pytest.importorskip("anyattn_torch.routes")
    found, products = [], scores.Scores.products

    def counting(self, q, k, rows):
        found.append(rows * k.shape[1])
        return products(self, q, k, rows)

    monkeypatch.setattr(scores.Scores, "products", counting)
    with routes.only("tiles"):
        run(torch)
    return sum(found)


COMPUTED = {"reference": computed_by_reference, "numba": computed_by_numba, "torch": computed_by_torch}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", COMPUTED)
def test_no_padding_is_computed(backend, causal, monkeypatch):
    """Scores are computed of pairs within a sequence, and of what its last tiles hold beside these."""
    lengths = (700, 1, 0, 299, 1000)

    def run(xp):
        x = xp.asarray(np.ones((sum(lengths), 1, 4), dtype=np.float32))
        out = aa.varlen_attention(x, x, x, starts(lengths).tolist(), starts(lengths).tolist(), causal=causal,
                                  backend=backend)  # fmt: skip
        assert float(abs(out - 1).max()) < 1e-5

    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    padded = len(lengths) * max(lengths) ** 2
    # Tiles of rows and keys: 256 x 256, 128 x 512, and on Numba at most 48 x 32.
    room = {"reference": 1.8, "torch": 1.7, "numba": 1.15}[backend]
    found = COMPUTED[backend](monkeypatch, run)
    assert pairs <= found < room * pairs
    assert found < padded / 2


def test_gradients_are_those_of_each_sequence():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.tensor(x, requires_grad=True) for x in inputs())
    out = aa.varlen_attention(q, k, v, starts(LENGTHS_Q).tolist(), starts(LENGTHS_K).tolist(), causal=True)
    weights = torch.tensor(np.random.default_rng(3).standard_normal(out.shape))
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    cq, ck = starts(LENGTHS_Q), starts(LENGTHS_K)
    total = 0.0
    for n in range(len(LENGTHS_Q)):
        a, b = slice(cq[n], cq[n + 1]), slice(ck[n], ck[n + 1])
        alone = aa.attention(q[a], k[b], v[b], layout="blhd", causal=True, backend="reference")
        total = total + (alone * weights[a]).sum()
    for mine, expected in zip(found, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


def test_under_jit_where_the_lengths_are_traced():
    jax = pytest.importorskip("jax")
    q, k, v = inputs(np.float32)

    @jax.jit
    def run(q, k, v, cu_q, cu_k):
        return aa.varlen_attention(q, k, v, cu_q, cu_k, causal=True)

    for first in (5, 4):
        lengths = (first, 5 - first, *LENGTHS_Q[2:])
        cu_q = starts(lengths)
        found = run(q, k, v, cu_q, starts(LENGTHS_K))
        expected = aa.varlen_attention(q, k, v, cu_q, starts(LENGTHS_K), causal=True, backend="reference")
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_pack_and_unpack():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 4, 2, 5))
    lengths = np.array([2, 0, 4])
    packed, cu = aa.pack(x, lengths)
    assert cu.tolist() == [0, 2, 2, 6]
    np.testing.assert_array_equal(packed, np.concatenate([x[0, :2], x[2]]))
    padded = aa.unpack(packed, cu, 5)
    expected = np.zeros((3, 5, 2, 5))
    expected[0, :2], expected[2, :4] = x[0, :2], x[2]
    np.testing.assert_array_equal(padded, expected)
    assert aa.unpack(packed, cu).shape == (3, 4, 2, 5)
    assert aa.unpack(packed[:0], [0, 0]).shape == (1, 0, 2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 3, 2, 6]}, "cu_seqlens_q: wanted numbers from 0 to 6 that never fall"),
        ({"cu_seqlens_q": [1, 6]}, "cu_seqlens_q: wanted numbers from 0 to 6"),
        ({"cu_seqlens_k": [0, 5]}, "cu_seqlens_k: wanted numbers from 0 to 6"),
        ({"cu_seqlens_k": [0, 6]}, "cu_seqlens_k: wanted 3 entries like cu_seqlens_q, got 2"),
        ({"cu_seqlens_q": np.array([0.0, 6.0])}, "cu_seqlens_q: wanted integers, got dtype float64"),
        ({"max_seqlen_q": 3}, "max_seqlen_q: wanted at least 4"),
        ({"q": np.zeros((1, 6, 2, 4))}, "q: wanted packed sequences"),
        ({"mask": np.ones((6, 6), dtype=bool)}, "mask: mask is an array along rows and keys"),
        ({"mask": aa.masks.random_blocks(1, 2, 0)}, "mask: random_blocks"),
        ({"mask": aa.masks.padding(np.array([1, 2, 3]))}, "wanted one entry for each of 2 sequences"),
    ],
)
def test_errors_name_the_argument(change, message):
    x = np.zeros((6, 2, 4))
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens_q": [0, 4, 6], "cu_seqlens_k": [0, 2, 6], **change}
    with pytest.raises((TypeError, ValueError), match=message):
        aa.varlen_attention(**arguments)


def test_a_relocation_gives_no_mask_the_table_of_one_that_is_gone():
    within = Relocation({"b": B}, count=2)
    for n in range(20):
        moved = within(aa.masks.prefix(np.array([n, n + 1])).expr, "mask")
        assert [x.table.value.tolist() for x in walk(moved) if isinstance(x, Load)] == [[n, n + 1]]
