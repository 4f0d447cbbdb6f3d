"""Which weights the kernels of `cupy` drop: those of the definition, bit for bit, on the PTX interpreter.

Queries of zeros make all weights equal, and values are powers of two, so that a channel of the result is the
set of the keys that were kept of eight.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import anyattn as aa
from anyattn.testing.oracle.philox import philox4x32

pytestmark = pytest.mark.usefixtures("nvrtc", "interpreted")

SEED = 0x123456789ABCDEF0
EIGHT = 2.0 ** np.arange(8)


def kept(seed, rate, b, h, row, j):
    """Which pairs the definition keeps."""
    counter = [x.astype(np.uint64) for x in np.broadcast_arrays(b, h, row, j)]
    word = philox4x32((*counter,), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]
    return (word >> np.uint64(8)) >= math.ceil(rate * 2**24)


def powers(keys, dtype, *lead):
    """Values (*lead, keys, ceil(keys / 8)): key 8 c + n has 2**n in channel c."""
    values = np.zeros((-(-keys // 8), 8, -(-keys // 8)))
    values[np.arange(len(values)), :, np.arange(len(values))] = EIGHT
    values = values.reshape(-1, len(values))[:keys]
    return np.broadcast_to(values, (*lead, *values.shape)).astype(dtype)


def read_back(out, seen, rate):
    """The kept keys (..., rows, keys) of rows that see so many."""
    sums = out.astype(np.float64) * np.asarray(seen)[..., None] * (1 - rate)
    whole = np.rint(sums).astype(np.int64)
    # 8 bits of a result that has 11 or more.
    assert abs(sums - whole).max() < 0.4
    return (whole[..., None] >> np.arange(8) & 1).astype(bool).reshape(*out.shape[:-1], -1)


CASES = {
    "float32": ("float32", (2, 4, 2, 6, 11), 0.4, SEED, {}),
    "float16, causal, tiles": ("float16", (1, 3, 1, 70, 130), 0.1, 2**63 + 12345, {"causal": True}),
    "float16, an offset": (
        "float16", (2, 2, 2, 5, 40), 0.5, -7, {"causal": True, "q_offset": np.array([3, 33])},
    ),
    "float32, a step over a long cache": (
        "float32", (2, 8, 2, 1, 300), 0.7, 5, {"kv_lengths": np.array([300, 131])},
    ),
    "float32, gathered keys": (
        "float32", (1, 2, 1, 37, 150), 0.4, 9, {"mask": aa.masks.fixed(40, 2), "q_offset": 7},
    ),
    "float64, tiles": ("float64", (1, 2, 1, 40, 70), 0.9, SEED, {"window": (50, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_keep_what_the_definition_keeps(name):
    dtype, (batch, heads, kv_heads, rows, keys), rate, seed, options = CASES[name]
    q = np.zeros((batch, heads, rows, 8), dtype)
    k = np.random.default_rng(0).standard_normal((batch, kv_heads, keys, 8)).astype(dtype)
    v = powers(keys, dtype, batch, kv_heads)
    visible = aa.attention_weights(q, k, backend="reference", **options) > 0
    out = aa.attention(q, k, v, dropout=rate, dropout_seed=seed, backend="interpreted", **options)
    found = read_back(out, visible.sum(axis=-1), rate)[..., :keys]
    wanted = kept(seed, rate, *np.ix_(range(batch), range(heads), range(rows), range(keys))) & visible
    assert wanted.any()
    assert (visible & ~wanted).any()
    np.testing.assert_array_equal(found, wanted)


def test_packed_sequences_and_rings_count_their_own_rows_and_tokens():
    rate = 0.4
    starts = [0, 9, 9, 30]
    x = np.zeros((30, 2, 8), np.float32)
    v = np.moveaxis(powers(30, np.float32, 2), 0, 1)
    options = {"dropout": rate, "dropout_seed": SEED, "backend": "interpreted"}
    out = aa.varlen_attention(x, x, v, starts, starts, causal=True, **options)
    for n in (0, 2):
        part, count = slice(starts[n], starts[n + 1]), starts[n + 1] - starts[n]
        found = read_back(np.moveaxis(out[part], 0, 1), np.arange(1, count + 1), rate)[..., part]
        numbers = np.ix_([n], range(2), range(count), range(count))
        np.testing.assert_array_equal(found, kept(SEED, rate, *numbers)[0] & np.tri(count, dtype=bool))

    tokens = powers(21, np.float32, 1, 2)
    ring = aa.KVCache(tokens[:, :, :0], tokens[:, :, :0], window=8, sink_tokens=3)
    for n in range(21):
        ring.append(tokens[:, :, n : n + 1], tokens[:, :, n : n + 1])
    out = aa.attention(np.zeros((1, 2, 1, tokens.shape[-1]), np.float32), ring, **options)
    numbers = np.array([0, 1, 2, *range(13, 21)])
    wanted = kept(SEED, rate, *np.ix_([0], range(2), [0], numbers))
    np.testing.assert_array_equal(read_back(out, 11, rate)[..., numbers], wanted)
