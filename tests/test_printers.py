"""Printers: random expressions as each renders them, against a definition of their values of its own.

Conditions and integers must be equal, floats within the error that `random_expressions` derives, NaN and
infinity at the same entries. Numba's compiler takes a third of a second a function, so it gets a part of the
expressions; all of them run through its text as plain Python.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import re
import shutil
import subprocess
import textwrap

import ml_dtypes
import numpy as np
import pytest
from cuda_compile import need_nvrtc
from missing import missing
from random_expressions import (
    BATCH,
    HEADS,
    KEYS,
    OFFSETS,
    OPERATIONS,
    ROWS,
    Undecided,
    points,
    random_mask,
    random_score,
)

import anyattn as aa
from anyattn import arrays, masks, scores
from anyattn.describe import Options, describe
from anyattn.expr import nodes
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.nodes import Const, Table, apply, load, walk
from anyattn.expr.print_cuda import cuda_arguments, cuda_source
from anyattn.expr.print_numba import numba_arguments, numba_source
from anyattn.expr.print_torch import torch_functions
from anyattn.expr.program import lower
from anyattn.expr.statements import aligned_slots, aligned_view, body
from anyattn.testing.oracle.philox import philox4x32

SEEDS = range(150)
POINTS = 12
FLAGSHIP = masks.causal() & masks.sliding_window(512) | masks.global_tokens(64)


@functools.cache
def drawn(seed):
    """A mask, a score, finite for even seeds, and their program."""
    mask, score = (draw(seed, 4, finite=seed % 2 == 0) for draw in (random_mask, random_score))
    return mask, score, lower(mask.expr(), score.expr())


def test_every_operation_is_drawn():
    terms = itertools.chain.from_iterable(term.terms() for seed in SEEDS for term in drawn(seed)[:2])
    assert {term.op for term in terms} >= OPERATIONS


def views(program, xp=np, convert=lambda x: x):
    """The aligned arrays of a drawn program along (b, h, row, j)."""
    return tuple(
        aligned_view(xp, convert(x), slot.block, (BATCH,), HEADS, ROWS, KEYS)
        for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
    )


def entries(seed, dtype):
    """Indices (b, h, row, i, j) of the points of a seed, and their scores in `dtype`."""
    at = points(seed, POINTS)
    return (
        np.array([(p.b, p.h, p.row, p.i, p.j) for p in at], np.int64),
        np.array([p.score for p in at], dtype),
    )


def call_views(call, program, xp=np):
    """The aligned arrays of a call's program along (b, h, row, j)."""
    sizes = (call.batch_shape, call.num_heads, call.q_len, call.k_len)
    return tuple(
        aligned_view(xp, x, slot.block, *sizes)
        for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
    )


def flagship_program():
    x = np.zeros((2, 4, 2048, 8), "f4")
    call = describe("attention", x, x, x, Options(mask=FLAGSHIP, score_mod=scores.alibi(4)))
    return lower(call.visible, call.score)


def varied():
    """Calls of one structure: other windows, offsets, lengths, sizes, contents, strides and writability."""
    rng = np.random.default_rng(5)
    for length, window, lengths, offset in ((16, 5, [7, 12], 0), (40, 9, [40, 3], -2), (16, 0, [0, 16], 7)):
        x = np.zeros((2, 2, length, 8), "f4")
        bias = rng.integers(-5, 5, (length, length)).astype("f4")
        slopes = np.repeat(rng.integers(-5, 5, 2), 2).astype("f4")[::2]
        if length == 40:
            bias, slopes = np.asfortranarray(bias), slopes.copy()
            bias.flags.writeable = slopes.flags.writeable = False
        options = Options(
            causal=True,
            window=(window, None),
            kv_lengths=np.array(lengths),
            q_offset=offset,
            score_mod=scores.alibi(slopes),
            bias=bias,
        )
        call = describe("attention", x, x, x, options)
        at = np.array([(b, h, r, r + offset, j) for b, h, r, j in np.ndindex(2, 2, length, length)])
        b, h, r, i, j = at.T
        seen = (j <= i) & (i - j <= window) & (j < np.array(lengths)[b])
        yield call, at, seen, 1 - slopes[h] * abs(i - j) + bias[r, j]


class Comparison:
    """Holds rendered values to their definition; most must be decided."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.compared = self.undecided = 0

    def __call__(self, seed, seen, changed):
        mask, score, _ = drawn(seed)
        for n, p in enumerate(points(seed, POINTS)):
            for term, found in ((mask, seen[n]), (score, changed[n])):
                try:
                    value, error = term.value(p, self.dtype)
                except Undecided:
                    self.undecided += 1
                    continue
                self.compared += 1
                equal = found == value or (found != found and value != value)
                assert equal or abs(float(found) - float(value)) <= error, (
                    f"seed {seed} at {p}: {found!r}, wanted {value!r} within {error:.1e}: {term.expr()!r}"
                )

    def finish(self, seeds):
        assert self.compared + self.undecided == len(seeds) * POINTS * 2
        assert self.compared > 0.85 * len(seeds) * POINTS * 2


class TestArrayApi:
    """`evaluate`, which the reference runs."""

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_values(self, dtype):
        compare = Comparison(dtype)
        row = np.arange(ROWS)[:, None]
        symbols = {
            "b": np.arange(BATCH)[:, None, None, None],
            "h": np.arange(HEADS)[:, None, None],
            "row": row,
            "i": row + np.array(OFFSETS)[:, None, None, None],
            "j": np.arange(KEYS),
        }
        tile = Tile(np, "cpu", np.int64, np.dtype(dtype).type, symbols, 0, KEYS, None)
        shape = (BATCH, HEADS, ROWS, KEYS)
        for seed in SEEDS:
            mask, score, _ = drawn(seed)
            at, s = entries(seed, dtype)
            where = tuple(at[:, [0, 1, 2, 4]].T)
            whole = np.zeros(shape, dtype)
            whole[where] = s
            with np.errstate(all="ignore"):
                found = [evaluate(term.expr(), tile, whole) for term in (mask, score)]
            compare(seed, *(np.broadcast_to(x, shape)[where] for x in found))
        compare.finish(SEEDS)

    @pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy", "array_api_strict", "dask.array"])
    def test_whole_numbers_divided_by_zero(self, library):
        module = pytest.importorskip(library, reason=f"{library} is not installed")
        j = module.arange(-4, 5)
        xp = arrays.namespace(j)
        tile = Tile(xp, arrays.device(j), j.dtype, xp.float32, {"j": j}, 0, 9, None)
        by = nodes.J % 3  # 2 0 1 2 0 1 2 0 1
        for root, wanted in (
            (nodes.J // by, [-2, 0, -2, -1, 0, 1, 1, 0, 4]),
            (nodes.J % by, [0, 0, 0, 1, 0, 0, 0, 0, 0]),
            (nodes.J // 0, [0] * 9),
            (nodes.J % 0, [0] * 9),
            ((nodes.J > 2) // (nodes.J > 3), [0] * 8 + [1]),
        ):
            np.testing.assert_array_equal(np.asarray(evaluate(root, tile)), wanted, err_msg=repr(root))

    def test_float_index_that_is_nan_or_rounds_past_the_end(self):
        x = np.arange(2**24 + 4)
        table = Table(x, "int", 1, (None,), "x", host=False)
        index = apply("floor", nodes.SCORE)
        tile = Tile(np, "cpu", np.int64, np.float32, {}, 0, 1, None)
        score = np.array([np.nan, -3.0, np.inf, 1e30, 7.5], np.float32)
        found = evaluate(load(table, (index,)), tile, score)
        np.testing.assert_array_equal(found, [0, 0, len(x) - 1, len(x) - 1, 7])


# What `anyattn_numba.vector_math` computes.
FUNCTIONS = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}


def load_module(source, path, wrap=None):
    """The module of a Numba source, kept in a file; with `wrap`, its functions are wrapped in it instead."""
    if wrap is not None:
        line = 'inline = numba.njit(forceinline=True, error_model="numpy")'
        assert line in source
        source = source.replace(line, "inline = WRAP").replace("import numba\n", "")
        source = re.sub(r"from anyattn_numba.*\n", "", source)
        source = source.replace("from numba import types\n", "").replace("CAPTURED = ", "CAPTURED = lambda: ")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    if wrap is not None:
        module.WRAP = wrap
        for dtype in ("float32", "float64"):
            vars(module).update({f"{name}_{dtype}": f for name, f in FUNCTIONS.items()})
    spec.loader.exec_module(module)
    return module


class TestAlignedView:
    @pytest.mark.parametrize("shape", [(37, 53), (1, 53), (1, 1, 4, 1, 53), (2, 3, 4, 37, 53), (37, 1)])
    def test_axes_of_one_entry_are_repeated_without_a_copy(self, shape):
        x = np.arange(np.prod(shape)).reshape(shape)
        view = aligned_view(np, x, 1, (2, 3), 4, 37, 53)
        np.testing.assert_array_equal(view, np.broadcast_to(x, (2, 3, 4, 37, 53)).reshape(6, 4, 37, 53))
        assert np.shares_memory(view, x)

    def test_batch_axes_that_are_broadcast_in_part_are_copied(self):
        x = np.arange(3 * 3 * 4).reshape(3, 1, 3, 4)
        view = aligned_view(np, x, 16, (2, 3), 4, 37, 53)
        np.testing.assert_array_equal(view, np.broadcast_to(x, (2, 3, 4, 3, 4)).reshape(6, 4, 3, 4))

    def test_empty_batch(self):
        assert aligned_view(np, np.zeros((37, 53)), 1, (2, 0), 4, 37, 53).shape == (0, 4, 37, 53)


class TestNumbaText:
    """The generated module as plain Python over NumPy scalars."""

    @pytest.mark.parametrize(
        ("dtype", "split", "index", "seeds"),
        [
            ("float32", False, "int64", SEEDS),
            ("float64", True, "int64", SEEDS),
            ("float64", False, "int32", SEEDS[:50]),
        ],
    )
    def test_values(self, dtype, split, index, seeds, tmp_path):
        compare = Comparison(dtype)
        for seed in seeds:
            program = drawn(seed)[2]
            source = numba_source(program, dtype, index=index, split=split)
            module = load_module(source, tmp_path / f"m{seed}.py", wrap=lambda f: f)
            captured = numba_arguments(program, dtype, views(program), index)
            at, scores = entries(seed, dtype)
            seen, changed = [], []
            with np.errstate(all="ignore"):
                for (b, h, row, i, j), s in zip(at.astype(index), scores, strict=True):
                    first = [(), ()]
                    if split:
                        rows = (module.visible_row, module.score_row)
                        first = [(f(b, h, row, i, *captured),) for f in rows]
                    seen.append(module.visible(*first[0], b, h, row, i, j, *captured))
                    changed.append(module.score(s, *first[1], b, h, row, i, j, *captured))
            compare(seed, seen, changed)
        compare.finish(seeds)

    def test_parts_of_a_row_read_no_key_and_shared_parts_have_names(self):
        for seed in SEEDS:
            for root in (drawn(seed)[2].visible, drawn(seed)[2].score):
                parts = body(root)
                for _, node in parts.row:
                    assert not nodes.depends_on(node, "j", "score")
                named = {id(node) for _, node in (*parts.row, *parts.key)}
                uses = [id(child) for node in walk(root) for child in node.children if child.children]
                twice = {n for n in uses if uses.count(n) > 1}
                assert twice <= named

    def test_listing(self):
        """What a reader of a kernel meets."""
        text = numba_source(flagship_program(), "float32", title=f"mask {FLAGSHIP!r}, score_mod alibi(4)")
        assert text == textwrap.dedent(NUMBA_LISTING).lstrip().replace("KEY", flagship_program().key)

    def test_only_what_exists_is_written(self):
        x = np.zeros((1, 4, 8), "f4")
        call = describe("attention", x, x, x, Options(causal=True))
        source = numba_source(lower(call.visible, call.score), "float32")
        assert "def visible(" in source
        assert "def score(" not in source


class TestNumba:
    """The generated module, compiled."""

    def kernel(self, module, dtype, split=False, index="int64"):
        numba = pytest.importorskip("numba", reason="numba is not installed")
        visible, score = module.visible, module.score
        if split:
            visible_row, score_row = module.visible_row, module.score_row

            def run(at, scores, seen, changed, captured):
                for n in range(at.shape[0]):
                    b, h, row, i, j = at[n, 0], at[n, 1], at[n, 2], at[n, 3], at[n, 4]
                    seen[n] = visible(visible_row(b, h, row, i, *captured), b, h, row, i, j, *captured)
                    r = score_row(b, h, row, i, *captured)
                    changed[n] = score(scores[n], r, b, h, row, i, j, *captured)
        else:

            def run(at, scores, seen, changed, captured):
                for n in range(at.shape[0]):
                    b, h, row, i, j = at[n, 0], at[n, 1], at[n, 2], at[n, 3], at[n, 4]
                    seen[n] = visible(b, h, row, i, j, *captured)
                    changed[n] = score(scores[n], b, h, row, i, j, *captured)

        real, integer = getattr(numba.types, dtype)[::1], getattr(numba.types, index)[:, ::1]
        arguments = (integer, real, numba.boolean[::1], real, numba.types.Tuple(module.CAPTURED))
        return numba.njit(numba.void(*arguments), error_model="numpy")(run)

    @pytest.mark.parametrize(
        ("dtype", "split", "index", "seeds"),
        [
            ("float32", False, "int64", SEEDS[:20]),
            ("float64", True, "int64", SEEDS[20:28]),
            ("float32", True, "int32", SEEDS[28:34]),
        ],
    )
    def test_values(self, dtype, split, index, seeds, tmp_path):
        pytest.importorskip("numba", reason="numba is not installed")
        compare = Comparison(dtype)
        helpers = {}
        for seed in seeds:
            program = drawn(seed)[2]
            source = numba_source(program, dtype, index=index, split=split)
            module = load_module(source, tmp_path / f"m{seed}.py")
            for name, function in list(vars(module).items()):
                # Helpers of equal text are compiled once.
                if name.startswith("_") and hasattr(function, "py_func"):
                    text = inspect.getsource(function.py_func)
                    setattr(module, name, helpers.setdefault(text, function))
            captured = numba_arguments(program, dtype, views(program), index)
            at, s = entries(seed, dtype)
            seen, changed = np.zeros(len(at), bool), np.zeros(len(at), dtype)
            self.kernel(module, dtype, split, index)(at.astype(index), s, seen, changed, captured)
            compare(seed, seen, changed)
        compare.finish(seeds)

    def test_other_values_compile_nothing(self, tmp_path):
        numba = pytest.importorskip("numba", reason="numba is not installed")
        from numba.core import event

        kernel = None
        with event.install_recorder("numba:compile") as recorder:
            for call, at, seen, changed in varied():
                program = lower(call.visible, call.score)
                source = numba_source(program, "float32")
                if kernel is None:
                    first, kernel = source, self.kernel(load_module(source, tmp_path / "m.py"), "float32")
                    compiled = len(recorder.buffer)
                    assert compiled
                assert source == first
                found = np.zeros(len(at), bool), np.zeros(len(at), "f4")
                captured = numba_arguments(program, "float32", call_views(call, program))
                kernel(at, np.ones(len(at), "f4"), *found, captured)
                np.testing.assert_array_equal(found[0], seen)
                np.testing.assert_array_equal(found[1], changed)
        assert len(recorder.buffer) == compiled
        assert len(kernel.signatures) == 1
        assert numba.extending.is_jitted(kernel)

    @pytest.mark.parametrize("index", ["int64", "int32"])
    def test_loops_over_keys_become_vector_instructions(self, index, tmp_path):
        """Of integers of the wanted size: Numba makes int64 of int32 wherever the text lets it."""
        numba = pytest.importorskip("numba", reason="numba is not installed")
        module = load_module(numba_source(flagship_program(), "float32", index=index), tmp_path / "m.py")
        visible, score, integer = module.visible, module.score, getattr(np, index)

        def run(h, i, scores, seen, captured):
            for n in range(len(seen)):
                j = integer(n)
                seen[n] = visible(h, h, i, i, j, *captured)
                scores[n] = score(scores[n], h, h, i, i, j, *captured)

        kind = getattr(numba.types, index)
        arguments = (kind, kind, numba.float32[::1], numba.boolean[::1], numba.types.Tuple(module.CAPTURED))
        kernel = numba.njit(numba.void(*arguments), error_model="numpy")(run)
        text = kernel.inspect_llvm(kernel.signatures[0])
        compared = re.findall(r"icmp (?:samesign )?\w+ <\d+ x i(\d+)>", text)
        assert set(compared) == {index[3:]}

    def test_special_values(self, tmp_path):
        pytest.importorskip("numba", reason="numba is not installed")
        for number, (program, at, wanted) in enumerate(special_programs()):
            module = load_module(numba_source(program, "float32"), tmp_path / f"m{number}.py")
            seen, changed = np.zeros(len(at), bool), np.zeros(len(at), "f4")
            captured = numba_arguments(program, "float32", ())
            self.kernel(module, "float32")(at, np.zeros(len(at), "f4"), seen, changed, captured)
            np.testing.assert_array_equal(changed, wanted)


def special_programs():
    """Programs with entries and values that random ones seldom meet."""
    visible = nodes.J <= nodes.I
    # Every bit pattern of the 16-bit floats.
    at = np.zeros((2**16, 5), np.int64)
    at[:, 4] = np.arange(2**16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = np.arange(2**16, dtype=np.uint16).view(dtype)
        yield lower(visible, load(Table(x, "float", 1, (None,), "x", False), (nodes.J,))), at, x.astype("f4")
    # Divisors of zero give 0, as in NumPy.
    at = at[:9].copy()
    for divide in ("floordiv", "mod"):
        found = apply(divide, nodes.J, nodes.J % 3)
        j = np.arange(9)
        with np.errstate(all="ignore"):
            wanted = (np.floor_divide if divide == "floordiv" else np.mod)(j, j % 3)
        yield lower(visible, found / 1), at, wanted.astype("f4")
        yield lower(visible, apply(divide, nodes.J, Const(0, "int")) / 1), at, 0 * wanted.astype("f4")
    # Floats: NaN on either side, quotients that are whole but for rounding, infinite operands, zero divisors.
    rng = np.random.default_rng(0)
    x = rng.integers(-50, 50, 600).astype("f4") * np.float32(0.1)
    y = rng.choice(np.array([0.1, -0.1, 0.3, 0.7, np.inf, np.nan, 0.0, -2.5], "f4"), 600)
    x[:20] = [np.nan, np.inf, -np.inf, 0.0] * 5
    at = np.zeros((600, 5), np.int64)
    at[:, 4] = np.arange(600)
    operands = [load(Table(v, "float", 1, (None,), "v", False), (nodes.J,)) for v in (x, y)]
    for op in ("floor_divide", "mod", "minimum", "maximum"):
        with np.errstate(all="ignore"):
            wanted = getattr(np, op)(x, y)
        yield lower(visible, apply({"floor_divide": "floordiv"}.get(op, op), *operands)), at, wanted
    # The power of one half is the square root, which -inf has not.
    with np.errstate(all="ignore"):
        yield lower(visible, operands[0] ** 0.5), at, np.sqrt(x)
    # A float index: NaN, infinity, too large for an integer.
    x = np.arange(5, 10)
    table = Table(x, "int", 1, (None,), "x", False)
    odd = load(
        Table(np.array([np.nan, -np.inf, np.inf, 1e30, 2.5, -1.0]), "float", 1, (None,), "y", False),
        (nodes.J,),
    )
    yield lower(visible, load(table, (apply("floor", odd),)) / 1), at[:6], np.array([5, 5, 9, 9, 7, 5], "f4")
    # Words of Philox, which have 32 bits whatever their sign.
    at = np.array([(b, h, row, row, j) for b, h, row, j in np.ndindex(2, 3, 5, 7)])
    for low, high in ((-1, 7), (-(2**31), 2**31 - 1)):
        key = (low & 0xFFFFFFFF, high & 0xFFFFFFFF)
        wanted = [philox4x32((b, h, row, j), key)[0] >> 8 for b, h, row, _, j in at.tolist()]
        words = (Const(low, "int"), Const(high, "int"), nodes.B, nodes.H, nodes.ROW, nodes.J)
        yield lower(visible, apply("philox", *words) / 1), at, np.array(wanted, "f4")


CUDA_RUN = """
extern "C" {qualifier} void run_{name}(
    const {name}::Captured* c, int count, const long long* at, const {name}::Real* s, bool* seen,
    {name}::Real* changed) {{
    for (int n = 0; n < count; ++n) {{
        const long long* p = at + 5 * n;
        seen[n] = {name}::visible(*c, p[0], p[1], p[2], p[3], p[4]);
        changed[n] = {name}::score(s[n], *c, p[0], p[1], p[2], p[3], p[4]);
    }}
}}
"""


def cuda_unit(programs, dtype, index, qualifier=""):
    """One translation unit of many programs, each in a namespace of its own."""
    parts = []
    for n, program in enumerate(programs):
        text = cuda_source(program, dtype, index=index)
        text = text.replace("namespace program", f"namespace program{n}")
        text += "#undef ANYATTN_VISIBLE\n#undef ANYATTN_SCORE\n#undef ANYATTN_KEEP\n"
        parts.append(text + CUDA_RUN.format(name=f"program{n}", qualifier=qualifier))
    return "\n".join(parts)


def host_library(source, folder):
    """The functions of a CUDA source, compiled by g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        missing("g++ is not installed")
    path = folder / "unit.cpp"
    path.write_text(source)
    library = folder / "unit.so"
    # What nvcc declares by itself, and no fused multiply-add, which would round less often.
    as_nvcc = ["-D__device__=", "-include", "math.h", "-ffp-contract=off"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-tautological-compare", "-Wno-overflow"]
    warnings += ["-Wno-unused-parameter"]
    command = [compiler, "-std=c++14", "-O1", "-shared", "-fPIC", *as_nvcc, *warnings, "-o", library, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


def run_on_host(library, n, program, dtype, index, at, s, aligned):
    seen, changed = np.zeros(len(at), bool), np.zeros(len(at), dtype)
    tables = [np.ascontiguousarray(x) for x in program.tables]
    addresses = tuple(x.ctypes.data for x in (*tables, *aligned))
    captured = np.asarray(cuda_arguments(program, dtype, aligned, addresses, index))
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (captured, at, s, seen, changed)]
    getattr(library, f"run_program{n}")(pointers[0], len(at), *pointers[1:])
    return seen, changed


class TestCuda:
    def test_listing(self):
        text = cuda_source(flagship_program(), "float32", title=f"mask {FLAGSHIP!r}, score_mod alibi(4)")
        assert text == textwrap.dedent(CUDA_LISTING).lstrip().replace("KEY", flagship_program().key)

    @pytest.mark.parametrize(
        ("dtype", "index", "seeds"), [("float32", "long long", SEEDS), ("float64", "int", SEEDS[:50])]
    )
    def test_values_on_the_host(self, dtype, index, seeds, tmp_path):
        programs = [drawn(seed)[2] for seed in seeds]
        library = host_library(cuda_unit(programs, dtype, index), tmp_path)
        compare = Comparison(dtype)
        for n, (seed, program) in enumerate(zip(seeds, programs, strict=True)):
            at, s = entries(seed, dtype)
            compare(seed, *run_on_host(library, n, program, dtype, index, at, s, views(program)))
        compare.finish(seeds)

    def test_special_values(self, tmp_path):
        special = list(special_programs())
        library = host_library(cuda_unit([p for p, *_ in special], "float32", "long long"), tmp_path)
        for n, (program, at, wanted) in enumerate(special):
            s = np.zeros(len(at), "f4")
            _, changed = run_on_host(library, n, program, "float32", "long long", at, s, ())
            np.testing.assert_array_equal(changed, wanted)

    def test_other_values_compile_nothing(self, tmp_path):
        library = None
        for call, at, seen, changed in varied():
            program = lower(call.visible, call.score)
            source = cuda_unit([program], "float32", "long long")
            if library is None:
                first, library = source, host_library(source, tmp_path)
            assert source == first
            ones, aligned = np.ones(len(at), "f4"), call_views(call, program)
            found = run_on_host(library, 0, program, "float32", "long long", at, ones, aligned)
            np.testing.assert_array_equal(found[0], seen)
            np.testing.assert_array_equal(found[1], changed)

    def test_nvrtc_compiles_it(self):
        need_nvrtc()
        from cupy.cuda import nvrtc

        programs = [drawn(seed)[2] for seed in SEEDS[:12]]
        for dtype, index in (("float32", "long long"), ("float64", "int")):
            source = cuda_unit(programs, dtype, index, "__global__")
            unit = nvrtc.createProgram(source, "unit.cu", (), ())
            try:
                nvrtc.compileProgram(unit, ("-arch=compute_75", "-std=c++14"))
                assert nvrtc.getPTX(unit).count(b".entry") == len(programs)
            finally:
                nvrtc.destroyProgram(unit)


def tensors(torch, program):
    """A drawn program over tensors, and its aligned arrays."""

    def convert(x):
        if x.dtype == ml_dtypes.bfloat16:
            return torch.tensor(x.astype("f4")).to(torch.bfloat16)
        return torch.tensor(np.asarray(x))

    program = dataclasses.replace(program, tables=tuple(map(convert, program.tables)))
    return program, views(program, torch, convert)


class TestTorch:
    """`mask_mod` and `score_mod`, called as FlexAttention calls them."""

    def mapped(self, torch, function, *arguments):
        # Under this mode FlexAttention maps its functions: indexing by a scalar becomes an operation.
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        with TransformGetItemToIndex():
            return torch.func.vmap(function)(*arguments)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_values(self, dtype):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        compare = Comparison(dtype)
        for seed in SEEDS:
            program, aligned = tensors(torch, drawn(seed)[2])
            functions = torch_functions(program, dtype, aligned, torch.tensor(OFFSETS), "cpu")
            at, s = entries(seed, dtype)
            indices = [torch.tensor(at[:, n], dtype=torch.int32) for n in (0, 1, 2, 4)]
            seen = self.mapped(torch, functions[0], *indices)
            changed = self.mapped(torch, functions[1], torch.tensor(s), *indices)
            compare(seed, seen.numpy(), changed.numpy())
        compare.finish(SEEDS)

    def test_special_values(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        for program, at, wanted in special_programs():
            program, _ = tensors(torch, program)
            _, score_mod = torch_functions(program, "float32", (), 0, "cpu")
            indices = [torch.tensor(at[:, n], dtype=torch.int32) for n in (0, 1, 2, 4)]
            changed = self.mapped(torch, score_mod, torch.zeros(len(at)), *indices)
            np.testing.assert_array_equal(changed.numpy(), wanted)

    def test_flex_attention(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

        generator = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(2, 4, 37, 16, generator=generator) for _ in range(3))
        bias = torch.randn(37, 37, generator=generator)
        lengths = torch.tensor([37, 20])
        options = dict(
            mask=masks.strided(3) | masks.sliding_window(7) | masks.block_sparse(torch.eye(3).bool(), 16),
            score_mod=scores.alibi(4),
            softcap=5.0,
            bias=bias,
            kv_lengths=lengths,
            q_offset=lengths - 37,
        )
        call = describe("attention", q, k, v, Options(**options))
        program = lower(call.visible, call.score)
        aligned = call_views(call, program, torch)
        mask_mod, score_mod = torch_functions(program, "float32", aligned, call.offset, "cpu")
        whole = create_mask(mask_mod, 2, 4, 37, 37, device="cpu")
        blocks = create_block_mask(mask_mod, 2, 4, 37, 37, device="cpu", BLOCK_SIZE=16)
        with pytest.warns(UserWarning, match="torch.compile"):
            found = flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks)
        weights = aa.attention_weights(q, k, backend="reference", **options)
        assert not whole.all()
        torch.testing.assert_close(weights > 0, whole, rtol=0, atol=0)
        torch.testing.assert_close(found, aa.attention(q, k, v, backend="reference", **options))

    def test_other_values_compile_nothing(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile(
            lambda function, *indices: function(*indices), backend=counter, dynamic=False
        )
        # Of one size and order of memory: torch compiles again for another.
        for call, at, seen, changed in (case for case in varied() if case[0].q_len == 16):
            program = lower(call.visible, call.score)
            program = dataclasses.replace(program, tables=tuple(torch.tensor(x) for x in program.tables))
            aligned = tuple(torch.tensor(np.array(x)) for x in call_views(call, program))
            mask_mod, score_mod = torch_functions(program, "float32", aligned, call.offset, "cpu")
            b, h, r, _, j = torch.tensor(at.T.copy())
            found = compiled(mask_mod, b, h, r, j)
            np.testing.assert_array_equal(found.numpy(), seen)
            found = compiled(score_mod, torch.ones(len(at)), b, h, r, j)
            np.testing.assert_array_equal(found.numpy(), changed)
        assert counter.frame_count == 2


NUMBA_LISTING = '''
    """Scalar functions of program KEY, floats in float32.

    mask causal() & sliding_window(512) | global_tokens(64), score_mod alibi(4)

    Captured values are arguments: p numbers, t tables, a arrays along (b, h, row, j). Of the locals,
    r are the same for all keys of a row and x are of one key.
    """

    from __future__ import annotations

    import numba
    import numpy as np
    from numba import types

    # Types of the captured arguments, in order.
    CAPTURED = (
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        types.int64,
        types.Array(types.float32, 1, "A", readonly=True),
    )

    inline = numba.njit(forceinline=True, error_model="numpy")


    @inline
    def _inside(index, size):
        """The nearest index of an axis."""
        return np.uintp(min(max(index, 0), size - 1))


    @inline
    def visible(b, h, row, i, j, p0, p1, p2, p3, p4, t0):
        r0 = (i < p1) & (p2 <= i)
        return (j < p0) | r0 | (j <= i) & (i - j <= p3) & (j - i <= p4)


    @inline
    def score(s, b, h, row, i, j, p0, p1, p2, p3, p4, t0):
        r0 = t0[_inside(h, t0.shape[0])]
        return s - np.float32(abs(i - j)) * r0
'''

CUDA_LISTING = """
    // Device functions of program KEY, floats in float32.
    // mask causal() & sliding_window(512) | global_tokens(64), score_mod alibi(4)
    // Captured values: p numbers, t tables (row-major, with their sizes), a arrays along
    // (b, h, row, j) with their strides, 0 where one entry serves all. Of the locals, r are the same
    // for all keys of a row and x are of one key.

    #define ANYATTN_VISIBLE 1
    #define ANYATTN_SCORE 1
    #define ANYATTN_KEEP 0

    namespace program {

    typedef float Real;
    typedef long long Index;

    struct Captured {
        Index p0;
        Index p1;
        Index p2;
        Index p3;
        Index p4;
        const float* t0;
        Index t0_n0;
    };

    // The nearest index of an axis.
    __device__ inline long long inside(Index index, Index size) {
        const Index low = index > 0 ? index : 0;
        return low < size - 1 ? low : size - 1;
    }

    __device__ inline Index absolute(Index x) { return x < 0 ? -x : x; }

    __device__ inline bool visible(const Captured& c, Index b, Index h, Index row, Index i, Index j) {
        const bool r0 = (i < c.p1) & (c.p2 <= i);
        return (j < c.p0) | r0 | ((j <= i) & (i - j <= c.p3) & (j - i <= c.p4));
    }

    __device__ inline Real score(Real s, const Captured& c, Index b, Index h, Index row, Index i, Index j) {
        const Real r0 = c.t0[inside(h, c.t0_n0)];
        return s - Real(absolute(i - j)) * r0;
    }

    }  // namespace program
"""
