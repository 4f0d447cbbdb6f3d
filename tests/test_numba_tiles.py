"""Tile code of the Numba backend: every entry of a tile as the reference evaluates it.

A tile is given as a kernel gives it, by addresses: queries of two heads, the last one repeated up to whole
vectors, and keys one after the other or gathered.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import anyattn as aa
from anyattn import masks, scores
from anyattn.describe import Options, describe
from anyattn.expr.bounds import index_ranges
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.program import lower

if find_spec("numba") is None:
    pytest.skip("needs numba", allow_module_level=True)

import numba

from anyattn_numba import arguments as a
from anyattn_numba import kernels, threads, tiles
from anyattn_numba.atomics import invoke
from anyattn_numba.captures import Captures
from anyattn_numba.hostarrays import address_of
from anyattn_numba.target import host, shape_of

BATCH, HEADS, ROWS, KEYS = 2, 3, 70, 90
OFFSETS = np.array([4, -3])
RNG = np.random.default_rng(0)
BIAS = RNG.standard_normal((BATCH, HEADS, ROWS, KEYS))
SLOPES = RNG.standard_normal(HEADS).astype("f4")
TABLE = RNG.standard_normal((HEADS, 40))[:, ::2]


def biased(dtype, view=lambda x: x):
    return lambda: {"bias": view(BIAS.astype(dtype)), "causal": True}


PROGRAMS = {
    "causal": lambda: {"causal": True},
    "softcap": lambda: {"softcap": 2.0},
    "window and lengths": lambda: {"window": (7, 3), "kv_lengths": np.array([9, KEYS])},
    "alibi": lambda: {"score_mod": scores.alibi(SLOPES), "mask": masks.strided(7) | masks.prefix(3)},
    "table of heads": lambda: {"score_mod": lambda s, b, h, i, j: s * TABLE[h, (i - j) // 3]},
    "documents": lambda: {"mask": masks.documents(np.arange(KEYS) // 11), "softcap": 3.0},
    "powers": lambda: {"mask": lambda b, h, i, j: (i * i + j**3 + h) % 5 != b},
    "blocks": lambda: {"mask": masks.block_sparse(RNG.random((HEADS, 10, 13)) < 0.5, 7)},
    "dense": lambda: {"mask": RNG.random((BATCH, 1, ROWS, KEYS)) < 0.5},
    "two arrays": lambda: {"mask": RNG.random((ROWS, KEYS)) < 0.5, "bias": BIAS.astype("f4")},
    "float16": biased("f2"),
    "float32": biased("f4"),
    "float64": biased("f8"),
    "columns first": biased("f4", lambda x: np.asfortranarray(x[0, 0])),
    "every second": biased("f4", lambda x: np.repeat(x, 2, axis=-1)[..., ::2]),
    "backwards": biased("f2", lambda x: x[:, :, ::-1, ::-1]),
    "one row": biased("f4", lambda x: x[:, :, :1]),
    "one column": biased("f2", lambda x: x[..., :1]),
    "one head": biased("f4", lambda x: x[:, :1]),
}


def call_of(options, accumulate="float32"):
    x = np.zeros((BATCH, HEADS, ROWS, 8), accumulate)
    y = np.zeros((BATCH, HEADS, KEYS, 8), accumulate)
    return describe("attention", x, y, y, Options(**{"q_offset": OFFSETS, **options}))


def expected(call, accumulate, before):
    """(visible, score) at every pair, as the reference evaluates them."""
    row = np.arange(ROWS)[:, None]
    symbols = {
        "b": np.arange(BATCH)[:, None, None, None],
        "h": np.arange(HEADS)[:, None, None],
        "row": row,
        "i": row + OFFSETS[:, None, None, None],
        "j": np.arange(KEYS),
    }
    tile = Tile(np, "cpu", np.int64, np.dtype(accumulate).type, symbols, 0, KEYS, None)
    seen = True if call.visible is None else evaluate(call.visible, tile, before)
    score = before if call.score is None else evaluate(call.score, tile, before)
    return np.broadcast_to(seen, before.shape), np.broadcast_to(score, before.shape)


def run_tile(call, accumulate, index, action, before, b, heads, rows, columns, gathered):
    """What tile code makes of the scores `before` (keys, width), or of what is seen."""
    program = lower(call.visible, call.score)
    sizes = (call.batch_shape, call.num_heads, call.q_len, call.k_len)
    captures = Captures(program, accumulate, sizes, "numpy", kernels.entries_address)
    captured, _ = captures.words(())
    code = tiles_by_key(program, accumulate, index)
    keys, width = before.shape
    lanes = np.array([heads, rows, rows + OFFSETS[b]], np.int64)
    out, seen = before.copy(), np.full_like(before, 7)
    memory = np.full(tiles.tile_memory(program, accumulate, keys) * width + 64, 0xA5, np.uint8)
    columns = columns.astype(np.int32)
    words = np.zeros(a.TILE_WORDS, np.int64)
    for place, value in (
        (a.TILE_SCORES, address_of(out)),
        (a.TILE_KEYS, keys),
        (a.TILE_FIRST, 0 if gathered else columns[0]),
        (a.TILE_COLUMNS, address_of(columns) if gathered else 0),
        (a.TILE_BATCH, b),
        (a.TILE_LANES, address_of(lanes)),
        (a.TILE_WIDTH, width),
        (a.TILE_ROW_VALUES, address_of(memory)),
        (a.TILE_CAPTURED, address_of(captured)),
        (a.TILE_ACTION, action),
        (a.TILE_SEEN, address_of(seen)),
    ):
        words[place // 8] = value
    assert call_code(code, address_of(words)) == 0
    assert (memory[-64:] == 0xA5).all(), "written beyond the memory that was asked for"
    return out, seen


@numba.njit
def call_code(address, words):
    """Tile code has no wrapper for Python."""
    return invoke(address, words, 0)


def tiles_by_key(program, accumulate, index, known={}):  # noqa: B006
    """The address of `tile` of a program."""
    key = program.key, accumulate, index
    if key not in known:
        namespace = {"__name__": f"tile_{len(known)}"}
        exec(tiles.tile_source(program, accumulate, index), namespace)
        known[key] = threads.address(namespace["tile"])
    return known[key]


# Each compiles for a second.
KINDS = [
    *((name, "float32", "int32") for name in PROGRAMS),
    *((name, "float32", "int64") for name in ("alibi", "table of heads", "powers", "two arrays")),
    *(
        (name, "float64", "int32")
        for name in ("softcap", "documents", "dense", "float16", "float32", "blocks")
    ),
    *((name, "float64", "int64") for name in ("window and lengths", "float64")),
]


@pytest.mark.parametrize(("name", "accumulate", "index"), KINDS)
def test_values(name, accumulate, index):
    call = call_of(PROGRAMS[name](), accumulate)
    shape = shape_of(host(), accumulate)
    before = RNG.standard_normal((BATCH, HEADS, ROWS, KEYS)).astype(accumulate)
    with np.errstate(all="ignore"):
        visible, score = expected(call, accumulate, before)
    hidden = np.where(visible, score, -np.inf)
    tolerance = 3e-6 if accumulate == "float32" else 1e-14
    for vectors, keys, gathered in ((1, 1, False), (2, 37, True), (shape.vectors, 64, False), (1, 16, True)):
        width, b = vectors * shape.lanes, vectors % BATCH
        # Rows of two heads, the last one repeated, as in a tile that is not full.
        number = np.minimum(np.arange(width) + ROWS - 5, ROWS + width - 8)
        heads, rows = 1 + number // ROWS, number % ROWS
        columns = np.sort(RNG.choice(KEYS, keys, replace=False)) if gathered else 21 + np.arange(keys)
        at = (b, heads, rows, columns[:, None])
        for action, right in ((a.SCORE, score), (a.SCORE_AND_HIDE, hidden)):
            if (call.score if action == a.SCORE else call.visible) is None:
                continue
            out, seen = run_tile(
                call, accumulate, index, action, before[at], b, heads, rows, columns, gathered
            )
            np.testing.assert_allclose(out, right[at], rtol=tolerance, atol=tolerance)
            assert (seen == 7).all()
        if call.visible is not None:
            out, seen = run_tile(
                call, accumulate, index, a.SEEN, before[at], b, heads, rows, columns, gathered
            )
            np.testing.assert_array_equal(seen, visible[at].astype(accumulate))
            np.testing.assert_array_equal(out, before[at])


@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({"causal": True}, "int32"),
        ({"mask": masks.documents(np.arange(KEYS, dtype="i8"))}, "int32"),
        ({"mask": masks.documents(np.arange(KEYS, dtype="i8") * 2**28)}, "int64"),
        ({"mask": lambda b, h, i, j: i * 2**26 >= j}, "int64"),
        ({"mask": lambda b, h, i, j: i * 2**24 >= j}, "int32"),
        ({"causal": True, "q_offset": 2**31 - 1}, "int64"),
        ({"mask": lambda b, h, i, j: (i * j) ** 3 % 7 > 2}, "int64"),
    ],
)
def test_integers_have_32_bits_only_where_they_fit(options, index):
    call = call_of(options)
    assert tiles.index_type(lower(call.visible, call.score), index_ranges(call)) == index


def test_calls_of_one_structure_with_small_and_large_integers():
    """The second call must not get the code of the first."""
    q, k = (RNG.standard_normal((1, 2, n, 8)).astype("f4") for n in (ROWS, KEYS))
    for size in (3, 2**40):
        documents = masks.documents(np.arange(KEYS, dtype="i8") // 7 * size)
        options = {"mask": lambda b, h, i, j, s=size: (i * s + j * s) % 11 > 4, "window": (30, 30)}
        for kind in (options, {"mask": documents}):
            out = aa.attention(q, k, k, backend="numba", **kind)
            right = aa.attention(q, k, k, backend="reference", **kind)
            np.testing.assert_allclose(out, right, rtol=1e-4, atol=1e-5)


class TestCompiled:
    def test_source_is_what_runs(self):
        f = aa.compile(causal=True, softcap=5.0, dtype="float32", head_dim=8, backend="numba")
        head, _, module = f.source.partition("\n")
        assert "forward.py" in head
        assert module == tiles.tile_source(f.program, "float32", "int32")
        plain = aa.compile(dtype="bfloat16", head_dim=8, backend="numba")
        assert "bfloat16 with sums in float32, calls no generated code" in plain.source

    def test_keys_tell_code_apart(self):
        def key(**options):
            return aa.compile(**{"dtype": "float32", "head_dim": 8, "backend": "numba", **options}).cache_key

        assert key(causal=True) == key(causal=True)
        assert key(window=(1, 0)) == key(window=(2, 0)), "a window is an argument"
        assert key(causal=True, head_dim=16) == key(causal=True), "kernels serve all sizes"
        kinds = [{}, {"causal": True}, {"window": (1, 0)}, {"softcap": 1.0}, {"dtype": "float64"}]
        kinds += [{"dtype": "float16"}, {"mask": lambda b, h, i, j: i * 2**40 >= j * 2**40}]
        kinds += [{"mask": lambda b, h, i, j: i * 3 >= j * 3}]
        keys = [key(**kind) for kind in kinds]
        assert len({k.digest for k in keys}) == len(keys)
        assert keys[1].backend == "numba"
        assert keys[1].kernel == "attention"
        assert keys[1].target == key().target != ""
