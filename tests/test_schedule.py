"""Schedules equal brute force, are kept by contents, read nothing that they may not, and cost little."""

from __future__ import annotations

import itertools

import array_api_compat.numpy as xp
import numpy as np
import pytest

from anyattn import masks
from anyattn.describe import Options, describe
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.schedule import EMPTY, FULL, PARTIAL, make
from anyattn.schedule.make import build


def parts(mask, q_len, k_len, batch=(), heads=1, **options):
    q = np.zeros((*batch, heads, q_len, 1), "f4")
    k = np.zeros((*batch, heads, k_len, 1), "f4")
    call = describe("attention", q, k, k, Options(mask=mask, **options))
    return make.parts_of(call)


def dense(p):
    """What every row sees, (batch, heads, rows, keys), by evaluating all of it."""
    b = np.arange(p.batch_size).reshape(*p.batch_shape, 1, 1, 1)
    row = np.arange(p.q_len)[:, None]
    symbols = {
        "b": b,
        "h": np.arange(p.num_heads)[:, None, None],
        "row": row,
        "i": row + np.asarray(p.offset).reshape(*np.shape(p.offset), *(1,) * 3),
        "j": np.arange(p.k_len),
    }
    tile = Tile(xp, "cpu", np.dtype("int64"), np.dtype(p.accumulate), symbols, 0, p.k_len, None)
    with np.errstate(all="ignore"):
        seen = evaluate(p.visible, tile)
    seen = np.broadcast_to(seen, (*p.batch_shape, p.num_heads, p.q_len, p.k_len))
    return seen.reshape(p.batch_size, p.num_heads, p.q_len, p.k_len)


def tiled(seen, rows, keys):
    """Verdicts of the tiles of (rows, keys) of one head."""
    q, k = np.arange(0, seen.shape[0], rows), np.arange(0, seen.shape[1], keys)
    some = np.logical_or.reduceat(np.logical_or.reduceat(seen, q, axis=0), k, axis=1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(seen, q, axis=0), k, axis=1)
    return np.where(every, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)


def check(p, rows, keys):
    """The schedule of `p`, after comparing all of it with brute force."""
    made, seen = build(p, rows, keys), dense(p)
    for b, h in np.ndindex(p.batch_size, p.num_heads):
        expected = tiled(seen[b, h], rows, keys)
        found = made.verdicts(b, h)
        assert np.array_equal(found, expected), f"{rows} x {keys}\n{found}\n{expected}"
        check_blocks(made, seen[b, h], expected, b, h)
    return made


def check_blocks(made, seen, expected, b, h):
    """Runs and columns of every block of queries say what the tiles hold."""
    for q in range(made.shape[0]):
        block = made.block(q, b, h)
        rows = seen[slice(*block.rows)]
        visited = np.zeros(made.shape[1] * made.keys, int)
        for first, end in block.full:
            visited[first * made.keys : end * made.keys] += 1
            assert rows[:, first * made.keys : end * made.keys].all()
        for first, end in block.partial:
            visited[first * made.keys : end * made.keys] += 1
            assert (expected[q, first:end] == PARTIAL).all()
        columns = np.concatenate([block.columns, block.masked_columns])
        visited[columns] += 1
        assert visited.max(initial=0) <= 1
        assert rows[:, block.columns].all()
        assert (np.diff(block.columns) > 0).all()
        assert (np.diff(block.masked_columns) > 0).all()
        assert not rows[:, visited[: made.k_len] == 0].any()
        tiles, number = np.unique(columns // made.keys, return_counts=True)
        assert (number * 4 <= made.keys).all(), tiles


Q_LEN, K_LEN = 301, 333
_rng = np.random.default_rng(7)
VOCABULARY = {
    "causal": masks.causal(),
    "causal rows": masks.causal(positions=False),
    "window 37": masks.sliding_window(37),
    "window 64, 20": masks.sliding_window(64, 20),
    "window left open": masks.sliding_window(None, 70),
    "window 0": masks.sliding_window(0),
    "dilated": masks.dilated(9, 5),
    "dilated 40": masks.dilated(3, 40),
    "strided 2": masks.strided(2),
    "strided 100": masks.strided(100),
    "fixed": masks.fixed(64),
    "fixed 3 of 50": masks.fixed(50, 3),
    "global 5": masks.global_tokens(5),
    "global some": masks.global_tokens([3, 150, 290]),
    "global many": masks.global_tokens([0, 9, 17, 77, 90, 91, 128, 129, 210, 300, 332]),
    "prefix": masks.prefix(100),
    "prefix 0": masks.prefix(0),
    "documents sorted": masks.documents(np.sort(_rng.integers(0, 6, K_LEN))),
    "documents mixed": masks.documents(_rng.integers(0, 40, K_LEN)),
    "documents with gaps": masks.documents(np.repeat([5, 9, 5, 100], 80)),
    "padding": masks.padding(211),
    "block_sparse": masks.block_sparse(_rng.random((10, 11)) < 0.4, 32),
    "block_sparse 100": masks.block_sparse(_rng.random((4, 4)) < 0.5, 100),
    "random_blocks": masks.random_blocks(2, 32, 5),
    "dense": masks.dense(_rng.random((Q_LEN, K_LEN)) < 0.002),
    "dense keys": masks.dense(_rng.random((1, K_LEN)) < 0.02),
    "function": masks.from_function(lambda b, h, i, j: (i + j) % 90 < 7),
    "nothing": masks.causal() & ~masks.causal(),
}
NEGATED = {f"~{name}": ~mask for name, mask in VOCABULARY.items()}


@pytest.mark.parametrize("name", [*VOCABULARY, *NEGATED])
def test_every_entry_equals_brute_force(name):
    mask = {**VOCABULARY, **NEGATED}[name]
    for offset in (None, 0, -40):
        p = parts(mask, Q_LEN, K_LEN, q_offset=offset)
        for rows, keys in ((16, 16), (64, 64), (128, 128), (256, 256), (128, 64), (48, 80)):
            check(p, rows, keys)


@pytest.mark.parametrize("name", [*VOCABULARY, *NEGATED])
def test_every_pair_equals_brute_force(name):
    entries = list({**VOCABULARY, **NEGATED}.items())
    first = [n for n, _ in entries].index(name)
    sizes = itertools.cycle([(64, 64), (16, 16), (128, 128), (32, 96), (256, 256)])
    for (_, other), (rows, keys) in zip(entries[first:], sizes, strict=False):
        for mask in (entries[first][1] & other, entries[first][1] | other):
            p = parts(mask, Q_LEN, K_LEN)
            found = build(p, rows, keys).verdicts()
            assert np.array_equal(found, tiled(dense(p)[0, 0], rows, keys)), (mask, rows, keys)
