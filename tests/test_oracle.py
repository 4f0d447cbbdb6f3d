"""The oracle held to hand-computed numbers, published vectors, plain loops and torch's own attention."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from anyattn.testing import oracle
from anyattn.testing.oracle import masks, scores
from anyattn.testing.oracle.functions import Captured
from anyattn.testing.oracle.philox import philox4x32

rng = np.random.default_rng(20)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def seen_by(pattern, q_len: int, k_len: int, offset: int | None = None, heads: int = 1) -> list[str]:
    """The pattern of head 0 as rows of 'x' and '.'."""
    q, k = np.zeros((heads, q_len, 1)), np.zeros((heads, k_len, 1))
    dense = oracle.Dense.of(q, k, mask=pattern, q_offset=offset)
    return ["".join(".x"[int(cell)] for cell in row) for row in dense.seen[0, 0]]


def test_shares_no_code_with_the_library():
    code = (
        "import sys, anyattn.testing.oracle\n"
        "print(*[m for m in sys.modules if m.startswith('anyattn.') and not m.startswith('anyattn.testing')])"
    )
    before = "import sys, anyattn\nprint(*[m for m in sys.modules if m.startswith('anyattn.')])"
    loaded, base = (
        set(
            subprocess.run(
                [sys.executable, "-c", c], capture_output=True, text=True, check=True
            ).stdout.split()
        )
        for c in (code, before)
    )
    assert loaded <= base


def test_two_keys_by_hand():
    q, k, v = np.array([[1.0]]), np.array([[0.0], [math.log(3)]]), np.array([[4.0], [8.0]])
    out, lse = oracle.attention(q, k, v)
    assert out == pytest.approx(np.array([[7.0]]))
    assert lse == pytest.approx(np.array([math.log(4)]))
    out, lse = oracle.attention(q, k, v, sinks=[math.log(4)])
    assert out == pytest.approx(np.array([[3.5]]))
    assert lse == pytest.approx(np.array([math.log(8)]))


def test_hidden_keys_do_not_matter_and_seen_ones_follow_ieee():
    q, k, v = normal(3, 4), normal(5, 4), normal(5, 2)
    k[4], v[4] = np.nan, np.inf
    mask = np.ones((3, 5), bool)
    mask[:2, 4] = False
    out, lse = oracle.attention(q, k, v, mask=mask)
    assert out[:2] == pytest.approx(oracle.attention(q[:2], k[:4], v[:4])[0])
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2])


def test_rows_with_nothing_to_see():
    q, k, v = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 4)
    v[0, 0, 0] = np.nan
    bias = np.zeros((3, 5))
    bias[1] = -np.inf
    mask = np.ones((3, 5), bool)
    mask[2] = False
    out, lse = oracle.attention(q, k, v, bias=bias, mask=mask, sinks=[0.25, -np.inf])
    assert (out[:, 1:] == 0).all()
    assert lse[:, 1:].tolist() == [[0.25, 0.25], [-np.inf, -np.inf]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_against_torch(causal, heads):
    torch = pytest.importorskip("torch")
    q, k, v = normal(2, heads[0], 9, 8), normal(2, heads[1], 9, 8), normal(2, heads[1], 9, 5)
    bias = None if causal else normal(1, heads[0], 9, 9)
    out, _ = oracle.attention(q, k, v, causal=causal, bias=bias, scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)),
        attn_mask=None if bias is None else torch.from_numpy(bias),
        is_causal=causal,
        scale=0.3,
        enable_gqa=True,
    )
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-12, atol=1e-13)


def test_against_a_loop_over_everything():
    """Every option at once, one scalar at a time."""
    batch, heads, kv_heads, q_len, k_len, dim = (2, 3), 4, 2, 5, 7, 3
    q, k = normal(2, 1, heads, q_len, dim), normal(3, kv_heads, k_len, dim)
    v = normal(*batch, kv_heads, k_len, 2)
    bias, sinks, slopes = normal(heads, 1, k_len), normal(heads), np.array([0.5, 1.0, 2.0, 0.25])
    lengths = np.array([[7], [4]])
    offset = np.array([[2, 0, -3]])
    mask = rng.random((q_len, k_len)) < 0.7
    options = dict(
        causal=True, window=(3, None), mask=mask, bias=bias, softcap=2.0, sinks=sinks, scale=0.7,
        kv_lengths=lengths, q_offset=offset, score_mod=scores.alibi(slopes),
    )  # fmt: skip
    out, lse = oracle.attention(q, k, v, **options)
    for x, y, h, r in np.ndindex(*batch, heads, q_len):
        i = r + offset[0, y]
        terms, values = [math.exp(sinks[h])], []
        for j in range(k_len):
            if j > i or j - i < -3 or not mask[r, j] or j >= lengths[x, 0]:
                continue
            s = 0.7 * sum(q[x, 0, h, r, d] * k[y, h // 2, j, d] for d in range(dim))
            s = 2.0 * math.tanh(s / 2.0) - slopes[h] * abs(i - j) + bias[h, 0, j]
            terms.append(math.exp(s))
            values.append(v[x, y, h // 2, j])
        expected = sum((w * value for w, value in zip(terms[1:], values, strict=True)), np.zeros(2)) / sum(
            terms
        )
        np.testing.assert_allclose(out[x, y, h, r], expected, rtol=1e-12, atol=1e-14)
        assert lse[x, y, h, r] == pytest.approx(math.log(sum(terms)), rel=1e-12)


def test_the_other_layout_and_two_axes():
    q, k, v = normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 6, 7)
    out, lse = oracle.attention(q, k, v, causal=True)
    turned, turned_lse = oracle.attention(
        *(np.swapaxes(x, 1, 2) for x in (q, k, v)), causal=True, layout="blhd"
    )
    assert (np.swapaxes(turned, 1, 2) == out).all()
    assert (turned_lse == lse).all()
    flat, flat_lse = oracle.attention(q[0, 0], k[0, 0], v[0, 0], causal=True)
    assert flat == pytest.approx(out[0, 0])
    assert flat_lse.shape == (4,)


def test_positions():
    """Default: the last query sees the last key; with lengths and one row: the last valid key."""
    assert seen_by(masks.causal(), 2, 4) == ["xxx.", "xxxx"]
    assert seen_by(masks.causal(), 4, 2) == ["..", "..", "x.", "xx"]
    assert seen_by(masks.causal(positions=False), 2, 4) == ["x...", "xx.."]
    dense = oracle.Dense.of(
        np.zeros((2, 1, 1, 1)), np.zeros((2, 1, 4, 1)), kv_lengths=[2, 4], mask=masks.sliding_window(0, 0)
    )
    assert dense.seen[:, 0, 0].tolist() == [[False, True, False, False], [False, False, False, True]]


def test_mask_pictures():
    assert seen_by(masks.sliding_window(1), 4, 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert seen_by(masks.sliding_window(None, 1), 3, 4, 0) == ["xx..", "xxx.", "xxxx"]
    assert seen_by(masks.dilated(1, 2), 4, 4) == ["x.x.", ".x.x", "x.x.", ".x.x"]
    assert seen_by(masks.strided(3), 3, 5, -1) == ["..x..", "x..x.", ".x..x"]
    assert seen_by(masks.fixed(3), 1, 7) == ["..x..x."]
    assert seen_by(masks.fixed(3, 2), 1, 7) == [".xx.xx."]
    assert seen_by(masks.global_tokens(1), 3, 4, 0) == ["xxxx", "x...", "x..."]
    assert seen_by(masks.global_tokens([2]), 3, 4, 0) == ["..x.", "..x.", "xxxx"]
    assert seen_by(masks.prefix(2), 1, 4) == ["xx.."]
    assert seen_by(masks.documents([7, 7, 3]), 4, 4, 0) == ["xx..", "xx..", "..x.", "...."]
    assert seen_by(masks.documents([7, 7, 3]), 2, 4, -1) == ["....", "xx.."]
    assert seen_by(masks.padding([3]), 1, 4) == ["xxx."]
    assert seen_by(masks.block_sparse([[True, False], [False, True]], 2), 3, 4) == ["xx..", "xx..", "..xx"]
    assert seen_by(masks.causal() & ~masks.prefix(1) | masks.strided(2), 3, 3) == ["x.x", ".x.", "xxx"]
    assert seen_by(lambda b, h, i, j: (j - i) // 2 == -1, 3, 3) == ["...", "x..", "xx."]


def test_documents_and_prefix_of_each_batch_entry():
    q, k = np.zeros((2, 1, 2, 1)), np.zeros((2, 1, 2, 1))
    both = masks.documents([[1, 1], [1, 2]]) & masks.prefix([1, 2])
    assert oracle.Dense.of(q, k, mask=both).seen[:, 0].tolist() == [
        [[True, False], [True, False]],
        [[True, False], [False, True]],
    ]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that the paper's Random123 library ships as kat_vectors."""
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == expected


def test_random_blocks_have_their_count_and_follow_the_position():
    rows = seen_by(masks.random_blocks(2, 3, seed=5), 12, 30, 0)
    assert {row.count("x") for row in rows} == {6}
    assert rows[0] == rows[2] != rows[3]
    assert seen_by(masks.random_blocks(2, 3, seed=5), 6, 30, 3) == rows[3:9]
    assert seen_by(masks.random_blocks(2, 3, seed=5, positions=False), 6, 30, 3) == rows[:6]
    assert seen_by(masks.random_blocks(99, 4, seed=5), 1, 10, -7) == ["x" * 10]


def test_alibi_slopes_of_the_paper():
    assert scores.alibi_slopes(8) == pytest.approx(np.array([2.0**-n for n in range(1, 9)]))
    assert scores.alibi_slopes(1) == pytest.approx(np.array([2.0**-8]))
    assert scores.alibi_slopes(3) == pytest.approx(np.array([2.0**-4, 2.0**-8, 2.0**-2]))
    assert scores.alibi_slopes(12)[8:] == pytest.approx(
        np.array([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5])
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (16, 20), (8, 64)])
def test_t5_buckets_against_transformers(bidirectional, buckets, far):
    """Equal but where float32 logarithms in transformers land on the wrong side of an edge that is exact."""
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-200, 201)
    theirs = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional=bidirectional, num_buckets=buckets, max_distance=far
    ).numpy()
    ours = np.array([scores.t5_bucket(int(d), buckets, bidirectional, far) for d in distances])
    half = buckets // 2 if bidirectional else buckets
    exact, grown = half // 2, half - half // 2
    on_an_edge = [
        any(abs(int(d)) ** grown * exact**n == far**n * exact**grown for n in range(1, grown))
        for d in distances
    ]
    assert (ours == theirs)[~np.array(on_an_edge)].all()
    assert (ours - theirs)[np.array(on_an_edge)].min(initial=0) >= 0


def test_score_entries_and_how_they_combine():
    q, k = np.zeros((2, 3, 1)), np.zeros((2, 4, 1))

    def final(score):
        return oracle.Dense.of(q, k, score_mod=score).final[0]

    i, j = np.arange(3)[:, None] + 1, np.arange(4)
    assert final(scores.alibi([0.5, 2.0]))[1] == pytest.approx(-2.0 * abs(i - j))
    table = normal(2, 5)
    assert final(scores.relative_bias(table))[1] == pytest.approx(table[1][np.clip(i - j, -2, 2) + 2])
    queries, keys = normal(2, 3, 6), normal(3, 6)
    shaw = final(scores.relative_keys(queries, keys))
    for row, key in np.ndindex(3, 4):
        n = max(-1, min(1, key - (row + 1))) + 1
        assert shaw[1, row, key] == pytest.approx(queries[1, row] @ keys[n] / math.sqrt(6))
    plus = scores.from_function(lambda s, b, h, i, j: s + i)
    twice = scores.from_function(lambda s, b, h, i, j: 2 * s + j)
    assert final(plus + twice)[0] == pytest.approx(i + 0 * j + j)
    assert final(plus.then(twice))[0] == pytest.approx(2 * i + j)
    assert final(plus.then(scores.softcap(2.0)))[0] == pytest.approx(2 * np.tanh((i + 0 * j) / 2))


def test_score_order():
    q, k = np.full((1, 1), 3.0), np.full((1, 1), 1.0)
    _, lse = oracle.attention(
        q, k, k, softcap=2.0, score_mod=lambda s, b, h, i, j: s * 5, bias=np.full((1, 1), 0.5)
    )
    assert lse == pytest.approx(np.array([2 * math.tanh(1.5) * 5 + 0.5]))


def test_captured_arrays_read_their_edge():
    table = Captured(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert table[np.array([-5, 0, 9]), np.array([1, -1, 7])].tolist() == [2.0, 1.0, 4.0]


def test_weights_and_stats():
    q, k = normal(2, 3, 4), normal(1, 6, 4)
    sinks = normal(2)
    p = oracle.weights(q, k, sinks=sinks, causal=True)
    out, _ = oracle.attention(q, k, np.eye(6)[None], sinks=sinks, causal=True)
    assert p == pytest.approx(out)
    assert (oracle.weights(q, k, rows=[2, 0], sinks=sinks, causal=True) == p[:, [2, 0]]).all()
    found = oracle.stats(q, k, stats=("key_mass", "entropy", "max"), sinks=sinks, causal=True)
    assert found["key_mass"] == pytest.approx(p.sum(axis=1))
    assert found["max"] == pytest.approx(p.max(axis=2))
    assert found["entropy"][1, 2] == pytest.approx(-sum(x * math.log(x) for x in p[1, 2] if x))


def test_merge_is_attention_over_the_union():
    q, k, v = normal(2, 3, 4), normal(2, 7, 4), normal(2, 7, 5)
    whole = oracle.attention(q, k, v, sinks=[0.1, -0.4])
    parts = [
        oracle.attention(q, k[:, :3], v[:, :3], sinks=[0.1, -0.4]),
        oracle.attention(q, k[:, :0], v[:, :0]),
        oracle.attention(q, k[:, 3:], v[:, 3:]),
    ]
    out, lse = oracle.merge([p[0] for p in parts], [p[1] for p in parts])
    assert out == pytest.approx(whole[0])
    assert lse == pytest.approx(whole[1])
    nothing = oracle.merge([np.full((1, 2), np.nan)], [np.array([-np.inf])])
    assert nothing[0].tolist() == [[0.0, 0.0]]
    assert nothing[1].tolist() == [-np.inf]


def slopes_by_differences(loss, x, eps=1e-6):
    found = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        found[index] = (loss(up) - loss(down)) / (2 * eps)
    return found


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_gradients_against_central_differences(layout):
    turn = (lambda x: np.swapaxes(x, -3, -2)) if layout == "blhd" else (lambda x: x)
    arrays = {
        "q": turn(normal(2, 1, 4, 3, 2)),
        "k": turn(normal(3, 2, 5, 2)),
        "v": turn(normal(2, 3, 2, 5, 3)),
        "bias": normal(4, 1, 5),
        "sinks": normal(4),
        "table": normal(4, 3),
    }
    mask = rng.random((3, 5)) < 0.7
    mask[1] = False
    dout, dlse = turn(normal(2, 3, 4, 3, 3)), normal(2, 3, 4, 3)
    dlse[..., 1] = 0.5

    def options(bias, sinks, table):
        modify = scores.relative_bias(table).then(
            scores.from_function(lambda s, b, h, i, j: s * (1 + 0.1 * s))
        )
        return dict(
            bias=bias, sinks=sinks, softcap=1.5, mask=mask, score_mod=modify, layout=layout, scale=0.8
        )

    def loss(**moved):
        now = {**arrays, **moved}
        named = {name: now[name] for name in ("bias", "sinks", "table")}
        out, lse = oracle.attention(now["q"], now["k"], now["v"], **options(**named))
        return (out * dout).sum() + (lse * dlse).sum()

    named = {name: arrays[name] for name in ("bias", "sinks", "table")}
    found = oracle.gradients(
        arrays["q"], arrays["k"], arrays["v"], dout=dout, dlse=dlse,
        parameters={"table": arrays["table"]},
        rebuild=lambda values: options(arrays["bias"], arrays["sinks"], values["table"])["score_mod"],
        **options(**named),
    )  # fmt: skip
    assert set(found) == set(arrays)
    for name, values in arrays.items():
        expected = slopes_by_differences(lambda x, name=name: loss(**{name: x}), values)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-8, err_msg=name)


def test_gradients_of_hidden_and_empty_are_zero():
    q, k, v = normal(3, 4), normal(5, 4), normal(5, 2)
    k[4], v[4] = np.nan, np.nan
    mask = np.ones((3, 5), bool)
    mask[:, 4] = False
    mask[1] = False
    bias = np.zeros((3, 5))
    bias[0, 0] = -np.inf
    found = oracle.gradients(q, k, v, mask=mask, bias=bias, dout=normal(3, 2), dlse=np.ones(3))
    assert all(np.isfinite(x).all() for x in found.values())
    assert (found["q"][1] == 0).all()
    assert (found["k"][4] == 0).all()
    assert (found["v"][4] == 0).all()
    assert found["bias"][0, 0] == 0
