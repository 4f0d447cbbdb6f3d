"""Expressions: tracing Python functions, kinds, captured arrays, and values that equal Python's."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import math
import statistics
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import anyattn as aa
from anyattn.errors import TraceError
from anyattn.expr import nodes
from anyattn.expr.evaluate import Tile, evaluate
from anyattn.expr.program import lower
from anyattn.expr.trace import trace_mask, trace_score

SLOPES = np.array([0.5, 0.25])
PAIR = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
LISTS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
ZERO = np.array(2)
SET = {2, 5}
NAMED = types.SimpleNamespace(slopes=SLOPES)


def values(expr, rows=range(-4, 5), keys=range(7), heads=2, score=0.0):
    """`expr` at every (h, i, j), through the array-API evaluator."""
    i = np.asarray(rows, dtype=np.int64)[:, None]
    symbols = {
        "b": np.zeros((1, 1, 1), dtype=np.int64),
        "h": np.arange(heads)[:, None, None],
        "row": i - i.min(),
        "i": i,
        "j": np.asarray(keys, dtype=np.int64),
    }
    tile = Tile(np, "cpu", np.int64, np.float64, symbols, 0, len(keys), None)
    shape = (heads, len(rows), len(keys))
    return np.broadcast_to(evaluate(expr, tile, np.full(shape, score)), shape)


def expected(function, rows=range(-4, 5), keys=range(7), heads=2):
    return np.array([[[function(0, h, i, j) for j in keys] for i in rows] for h in range(heads)])


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, i, j: (i - j) // 3 == -1,
        lambda b, h, i, j: (i - j) % 3 == 2,
        lambda b, h, i, j: (i - j) % -3 == -2,
        lambda b, h, i, j: (j <= i) & ~(j == 2) | (h == 1),
        lambda b, h, i, j: (j < i) ^ (h == 0),
        lambda b, h, i, j: (i**2 > j) == (j < 3),
        lambda b, h, i, j: abs(i) - -j != 4,
        lambda b, h, i, j: i + 2 * j <= 3,
    ],
)
def test_masks_mean_what_python_means(function):
    expr = trace_mask(function)
    assert expr.kind == "bool"
    # Python's ~ on a bool is not logical: compare through NumPy bools.
    plain = expected(lambda *index: function(*map(np.int64, index)))
    np.testing.assert_array_equal(values(expr), plain.astype(bool))


@pytest.mark.parametrize(
    ("traced", "plain"),
    [
        (
            lambda s, b, h, i, j: aa.where(j > i, j / (i + 10), -j),
            lambda b, h, i, j: j / (i + 10) if j > i else -j,
        ),
        (lambda s, b, h, i, j: aa.exp(-abs(i - j)), lambda b, h, i, j: math.exp(-abs(i - j))),
        (lambda s, b, h, i, j: aa.log(1 + abs(i)), lambda b, h, i, j: math.log(1 + abs(i))),
        (lambda s, b, h, i, j: aa.tanh(i * 0.1), lambda b, h, i, j: math.tanh(i * 0.1)),
        (lambda s, b, h, i, j: aa.sqrt(j), lambda b, h, i, j: math.sqrt(j)),
        (lambda s, b, h, i, j: aa.sigmoid(i), lambda b, h, i, j: 1 / (1 + math.exp(-i))),
        (lambda s, b, h, i, j: aa.floor(i / 3), lambda b, h, i, j: math.floor(i / 3)),
        (lambda s, b, h, i, j: aa.clip(i, -2, 1), lambda b, h, i, j: min(max(i, -2), 1)),
        (lambda s, b, h, i, j: aa.minimum(i, j) + aa.maximum(i, 2), lambda b, h, i, j: min(i, j) + max(i, 2)),
        (lambda s, b, h, i, j: SLOPES[h] * (i - j), lambda b, h, i, j: SLOPES[h] * (i - j)),
        (lambda s, b, h, i, j: 2.0 ** (i - j), lambda b, h, i, j: 2.0 ** (i - j)),
    ],
)
def test_scores_mean_what_python_means(traced, plain):
    np.testing.assert_allclose(values(trace_score(traced)), expected(plain), rtol=1e-14)


def test_sigmoid_of_large_scores_does_not_overflow():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = values(trace_score(lambda s, b, h, i, j: aa.sigmoid(s * 1000)), score=-5.0)
    assert np.all(found == 0)


def test_sigmoid_of_low_scores_keeps_its_digits():
    found = values(trace_score(lambda s, b, h, i, j: aa.log(aa.sigmoid(s))), score=-50.0)
    np.testing.assert_allclose(found, -50.0, rtol=1e-14)


class TestCapture:
    """Arrays reach an expression from wherever a function may hold them."""

    def check(self, function):
        bound = aa.attention_weights(np.ones((2, 3, 4)), np.ones((2, 3, 4)), score_mod=function, q_offset=0)
        logits = -np.array([0.5, 0.25])[:, None, None] * np.abs(np.arange(3)[:, None] - np.arange(3))
        p = np.exp(logits)
        np.testing.assert_allclose(bound, p / p.sum(-1, keepdims=True), rtol=1e-14)

    def test_global(self):
        self.check(lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j))

    def test_closure(self):
        slopes = SLOPES.copy()
        self.check(lambda s, b, h, i, j: s - slopes[h] * abs(i - j))

    def test_default(self):
        self.check(lambda s, b, h, i, j, slopes=SLOPES: s - slopes[h] * abs(i - j))

    def test_sequence(self):
        slopes = [0.5, 0.25]
        self.check(lambda s, b, h, i, j: s - slopes[h] * abs(i - j))

    def test_helper_function(self):
        def slope(h):
            return SLOPES[h]

        self.check(lambda s, b, h, i, j: s - slope(h) * abs(i - j))

    def test_partial(self):
        def score(s, b, h, i, j, slopes):
            return s - slopes[h] * abs(i - j)

        self.check(functools.partial(score, slopes=SLOPES))

    def test_two_axes_at_once_and_one_by_one(self):
        table = SLOPES[:, None] * np.arange(3)
        self.check(lambda s, b, h, i, j: s - table[h, abs(i - j)])
        self.check(lambda s, b, h, i, j: s - table[h][abs(i - j)])

    def test_parts_known_before_the_call(self):
        both = np.stack([np.zeros(2), SLOPES])
        self.check(lambda s, b, h, i, j: s - both[1][h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - aa.where(h == 0, SLOPES[0], SLOPES[1]) * abs(i - j))

    def test_size_of_a_captured_array(self):
        self.check(lambda s, b, h, i, j: s - SLOPES[h % len(SLOPES)] * abs(i - j) * (3 - SLOPES.shape[0]))

    def test_method(self):
        class Holder:
            def score(self, s, b, h, i, j):
                return s - SLOPES[h] * abs(i - j)

        self.check(Holder().score)

    def test_floor_may_index(self):
        self.check(lambda s, b, h, i, j: s - SLOPES[aa.floor(h / 1)] * abs(i - j))

    def test_out_of_range_reads_the_nearest_edge(self):
        table = np.array([1.0, 2.0, 3.0])
        got = aa.attention_weights(
            np.zeros((1, 5, 4)), np.zeros((1, 5, 4)), score_mod=lambda s, b, h, i, j: s + table[j - 1]
        )
        logits = np.array([1.0, 1.0, 2.0, 3.0, 3.0])
        np.testing.assert_allclose(got[0, 0], np.exp(logits) / np.exp(logits).sum(), rtol=1e-14)

    def test_the_function_itself_is_not_changed(self):
        slopes = SLOPES

        def score(s, b, h, i, j):
            return s - slopes[h]

        trace_score(score)
        assert score(1.0, 0, 1, 0, 0) == 0.75

    def test_objects_modules_and_containers(self):
        class Holder:
            def __init__(self):
                self.slopes = SLOPES
                self.inner = {"both": [SLOPES * 0, SLOPES]}

            def slope(self, h):
                return self.slopes[h]

            def score(self, s, b, h, i, j):
                return s - self.slopes[h] * abs(i - j)

            def __getitem__(self, h):
                return self.slopes[h]

            def __call__(self, s, b, h, i, j):
                return s - self.slope(h) * abs(i - j)

        class Heir(Holder):
            def score(self, s, b, h, i, j):
                assert isinstance(self, Heir)
                return super().score(s, b, h, i, j)

        held, pair, named = Holder(), (SLOPES * 0, SLOPES), {"slopes": SLOPES}
        module = types.ModuleType("tables")
        module.slopes = SLOPES
        self.check(held.score)
        self.check(held)
        self.check(Heir().score)
        self.check(lambda s, b, h, i, j: s - held.slopes[h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - held[h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - held.slope(h) * abs(i - j))
        self.check(lambda s, b, h, i, j: s - held.inner["both"][1][h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - pair[1][h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - sum(x[h] for x in pair) * abs(i - j))
        self.check(lambda s, b, h, i, j: s - named["slopes"][h] * abs(i - j))
        self.check(lambda s, b, h, i, j: s - module.slopes[h] * abs(i - j))

    def test_function_of_a_module(self, tmp_path):
        path = tmp_path / "penalties.py"
        path.write_text(
            "SLOPES = [0.5, 0.25]\n\n\ndef penalty(h, i, j):\n    return SLOPES[h] * abs(i - j)\n"
        )
        spec = importlib.util.spec_from_file_location("penalties", path)
        penalties = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(penalties)
        self.check(lambda s, b, h, i, j: s - penalties.penalty(h, i, j))

    def test_module_of_torch(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")

        class Penalty(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.slopes = torch.nn.Parameter(torch.tensor(SLOPES))

            def forward(self, s, b, h, i, j):
                return s - self.slopes[h] * abs(i - j)

        assert repr(trace_score(Penalty())) == "(score - (self.slopes[h] * abs((i - j))))"

    @pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict", "dask.array"])
    def test_arrays_of_other_libraries(self, library):
        xp = pytest.importorskip(library, reason=f"{library} is not installed")
        slopes = xp.asarray([0.5, 0.25])
        named = types.SimpleNamespace(slopes=slopes)
        for function in (
            lambda s, b, h, i, j: s - slopes[h] * abs(i - j),
            lambda s, b, h, i, j: s - named.slopes[h] * abs(i - j),
        ):
            expr = trace_score(function)
            (read,) = (node for node in nodes.walk(expr) if isinstance(node, nodes.Load))
            assert read.table.value is slopes

    def test_objects_without_arrays_stay_themselves(self):
        marker, mode = object(), types.SimpleNamespace(kind=None)
        mode.kind = marker

        def score(s, b, h, i, j):
            assert mode.kind is marker
            assert type(mode) is types.SimpleNamespace
            return s if mode.kind is marker else -s

        assert trace_score(score) is nodes.SCORE

    def test_threads_get_one_expression(self):
        def score(s, b, h, i, j):
            return aa.where(i > j, aa.tanh(s * SLOPES[h] + i * j), s - abs(i - j) % 7)

        def key(_):
            barrier.wait()
            return [lower(None, trace_score(score)).key for _ in range(20)]

        barrier = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            keys = {k for found in pool.map(key, range(4)) for k in found}
        assert len(keys) == 1


def helper_with_if(i, j):
    if i > j:
        return i
    return j


class TestRefusals:
    """What cannot be traced is said with the line and what to write."""

    @pytest.mark.parametrize(
        ("function", "hint"),
        [
            (lambda s, b, h, i, j: s if i > j else -s, "write aa.where(i > j, s, -s)"),
            (lambda s, b, h, i, j: s + max(i, j), "write aa.maximum(i, j)"),
            (lambda s, b, h, i, j: s + min(i, j, 3), "write aa.minimum(aa.minimum(i, j), 3)"),
            (lambda s, b, h, i, j: s * (i > j and i > 3), "write (i > j) & (i > 3)"),
            (lambda s, b, h, i, j: s * (i > j or i > 3), "write (i > j) | (i > 3)"),
            (lambda s, b, h, i, j: s * (not i > j), "write ~(i > j)"),
            (lambda s, b, h, i, j: aa.where(0 < j < i, s, 0.0), "write (0 < j) & (j < i)"),
            (lambda s, b, h, i, j: s * (i in (1, 2)), "write (i == 1) | (i == 2)"),
            (lambda s, b, h, i, j: s * (i not in [1, 2]), "write ~((i == 1) | (i == 2))"),
            (lambda s, b, h, i, j: s * (i in SLOPES), "flags[i]"),
            (lambda s, b, h, i, j: s * (i in {1, 2}), "write (i == 1) | (i == 2)"),
            (lambda s, b, h, i, j: s * (j not in SET), "flags[j]"),
            (lambda s, b, h, i, j: s * (ZERO in SET), "unhashable type"),
            (lambda s, b, h, i, j: s * {0: 1}.get(i, 2), "{0: 1}.get cannot be traced"),
            (lambda s, b, h, i, j: s * {0: 1}[i], "{0: 1} cannot be read at [i]"),
            (lambda s, b, h, i, j: s * len({i, j}), "compare it with each entry and join"),
            (lambda s, b, h, i, j: s + (j if i else 0), "write aa.where(i, j, 0)"),
            (lambda s, b, h, i, j: s + max([i, j]), "write aa.maximum(i, j)"),
            (lambda s, b, h, i, j: s + min((i, j, 3)), "write aa.minimum(aa.minimum(i, j), 3)"),
            (lambda s, b, h, i, j: s + math.exp(i), "write aa.exp(i)"),
            (lambda s, b, h, i, j: s + math.floor(i / 2), "write aa.floor(i / 2)"),
            (lambda s, b, h, i, j: s + math.fabs(i - j), "write abs(i - j)"),
            (lambda s, b, h, i, j: s + np.exp(i), "np.exp cannot be traced; write aa.exp(i)"),
            (lambda s, b, h, i, j: s + np.where(i > j, 1, 0), "write aa.where(i > j, 1, 0)"),
            (lambda s, b, h, i, j: s * np.logical_and(i > j, i > 3), "write (i > j) & (i > 3)"),
            (lambda s, b, h, i, j: s + np.clip(i - j, 0, 3), "write aa.clip(i - j, 0, 3)"),
            (lambda s, b, h, i, j: s + math.hypot(i, j), "math.hypot cannot be traced: it is not made for"),
            (lambda s, b, h, i, j: s + i.clip(0, 3), "i is a number, not an array; write aa.clip(...)"),
            (lambda s, b, h, i, j: s + i.shape[0], "i is a number and has no attributes"),
            (lambda s, b, h, i, j: s + int(i / 2), "write aa.floor(i / 2)"),
            (lambda s, b, h, i, j: s + float(i), "leave it out"),
            (lambda s, b, h, i, j: s + bool(i), "write (i) != 0"),
            (lambda s, b, h, i, j: s + round(i / 2), "write aa.floor(i / 2 + 0.5)"),
            (lambda s, b, h, i, j: s + sum(n for n in range(i)), "range() asks for a number"),
            (lambda s, b, h, i, j: s + sum(n for n in i), "i cannot be looped over"),
            (lambda s, b, h, i, j: s + [n for n in i][0], "i cannot be looped over"),  # noqa: C416, RUF015
            (lambda s, b, h, i, j: s + sum([1 for n in (1, 2) if i > n]), "write aa.where(i > n, x, y)"),
            (lambda s, b, h, i, j: s * any([i > j, i > 3]), "join conditions with |"),
            (lambda s, b, h, i, j: s + len(f"{i}"), "an f-string needs values"),
            (lambda s, b, h, i, j: s + np.arange(4)[i], "make it outside the function"),
            (lambda s, b, h, i, j: s + [SLOPES, SLOPES][h][0], "stack a list of arrays"),
            (lambda s, b, h, i, j: s + helper_with_if(i, j), "write aa.where(i > j, x, y)"),
            (lambda s, b, h, i, j: s + max(i @ j, 2), "unsupported operand type(s) for @"),
            (lambda s, b, h, i, j: s + NAMED, "combined with types.SimpleNamespace"),
            (lambda s, b, h, i, j: s + SLOPES, "index every axis (SLOPES[j])"),
            (lambda s, b, h, i, j: s + PAIR[h], "index every axis (PAIR[h][j])"),
            (
                lambda s, b, h, i, j: s + PAIR[h].max(),
                "PAIR[h] is read while the kernel runs and has no .max",
            ),
            (lambda s, b, h, i, j: s + (SLOPES * 2)[h], "outside the function, or write SLOPES[h] * 2"),
            (lambda s, b, h, i, j: s + (SLOPES * SLOPES[0])[h], "or write SLOPES[h] * SLOPES[0]"),
            (lambda s, b, h, i, j: s + (-NAMED.slopes)[h], "or write -NAMED.slopes[h]"),
            (lambda s, b, h, i, j: s + abs(PAIR + 1)[h, j], "or write abs(PAIR[h, j] + 1)"),
            (lambda s, b, h, i, j: s + PAIR[-1, j], "write PAIR[PAIR.shape[0] - 1, j]"),
            (lambda s, b, h, i, j: s + PAIR[h][-2], "write PAIR[h][PAIR.shape[1] - 2]"),
            (lambda s, b, h, i, j: s + LISTS[h, -1], "write LISTS[h, len(LISTS[0]) - 1]"),
            (lambda s, b, h, i, j: s + SLOPES[..., h], "write SLOPES[h]"),
            (lambda s, b, h, i, j: s + PAIR[..., j], "write PAIR[n, j] with an index n"),
            (lambda s, b, h, i, j: s + PAIR[:, j], "PAIR[:, j] is a part of an array"),
            (lambda s, b, h, i, j: s + PAIR[None, h, j], "write PAIR[h, j]"),
            (lambda s, b, h, i, j: s + SLOPES[i:j], "write SLOPES[n] with an index n"),
            (lambda s, b, h, i, j: s + (i >> 1), "write i // 2"),
            (lambda s, b, h, i, j: s + (i - j << 3), "write (i - j) * 8"),
            (lambda s, b, h, i, j: s + (i >> h), "write i // 2 ** h"),
            (lambda s, b, h, i, j: s + (ZERO >> 1), "write ZERO // 2"),
            (lambda s, b, h, i, j: s + i * 2**63, "9223372036854775808 in a mask or score: wanted integers"),
            (lambda s, b, h, i, j: s + (s if ZERO > 1 else j), "write aa.where(ZERO > 1, s, j)"),
            (lambda s, b, h, i, j: s + round(ZERO), "write aa.floor(ZERO + 0.5)"),
            (lambda s, b, h, i, j: s + range(PAIR[h])[0], "loop over known bounds"),
            (lambda s, b, h, i, j: s + SLOPES[s], "aa.floor"),
            (lambda s, b, h, i, j: s + SLOPES[h, i], "2 indices for an array of 1 axes"),
            (lambda s, b, h, i, j: s + "x", "builtins.str"),
            (lambda s, b, h, i, j: s + 1 / 0, "ZeroDivisionError: division by zero"),
            (lambda s, b, h, i, j: s + {}["missing"], "KeyError: 'missing'"),
            (lambda s, b, h, i, j: s + [1][3], "IndexError: list index out of range"),
        ],
    )
    def test_score(self, function, hint):
        with pytest.raises(TraceError, match="score_mod function") as error:
            trace_score(function)
        message = str(error.value)
        # The line that is shown holds the hint too.
        assert hint in message.rpartition("\n")[2]
        in_helper = "helper_with_if" in function.__code__.co_names
        line = helper_with_if.__code__.co_firstlineno + 1 if in_helper else function.__code__.co_firstlineno
        assert f"test_expressions.py:{line}: " in message
        assert linecache.getline(__file__, line).strip() in message
        assert isinstance(error.value.__cause__, Exception)

    def test_statements(self):
        def writes(s, b, h, i, j):
            SLOPES[h] = 1
            return s

        def writes_an_attribute(s, b, h, i, j):
            held.slopes = SLOPES
            return s

        def loops(s, b, h, i, j):
            while i > j:
                s = s + 1
            return s

        def asserts(s, b, h, i, j):
            assert i > j
            return s

        def branches(s, b, h, i, j):
            if s > 0 and i > j:
                return s
            return -s

        def makes(s, b, h, i, j):
            out = np.zeros(3)
            out[i] = s
            return out

        def shifts(s, b, h, i, j):
            i >>= 2
            return s + i

        def matches(s, b, h, i, j):
            match i:
                case 0:
                    return s
            return -s

        held = types.SimpleNamespace(slopes=SLOPES)
        for function, offset, hint in (
            (writes, 1, "SLOPES is written to"),
            (
                writes_an_attribute,
                1,
                "held.slopes is written to: a traced function must not change what it captures",
            ),
            (loops, 1, "`while` needs one truth value, and i > j has one at each index"),
            (asserts, 1, "`assert` needs one truth value"),
            (branches, 1, "write (s > 0) & (i > j)"),
            (makes, 2, "out is written to"),
            (shifts, 1, "write i = i // 4"),
            (matches, 2, "write aa.where(i == value, x, y) for each case"),
        ):
            with pytest.raises(TraceError) as error:
                trace_score(function)
            assert hint in str(error.value).rpartition("\n")[2]
            assert f"test_expressions.py:{function.__code__.co_firstlineno + offset}: " in str(error.value)
        assert SLOPES.tolist() == [0.5, 0.25]

    @pytest.mark.parametrize("library", ["torch", "jax.numpy", "statistics"])
    def test_functions_of_libraries(self, library):
        """The line shown is the user's, not the library's, whose functions are not looked into."""
        xp = pytest.importorskip(library, reason=f"{library} is not installed")
        mean = statistics.mean
        functions = {
            "torch": [
                (lambda s, b, h, i, j: xp.where(i > j, s, -s), "write aa.where(i > j, s, -s)"),
                (lambda s, b, h, i, j: s + xp.exp(i), "write aa.exp(i)"),
                (lambda s, b, h, i, j: xp.nn.functional.relu(s), "functional.relu cannot be traced"),
            ],
            "jax.numpy": [
                (lambda s, b, h, i, j: xp.where(i > j, s, -s), "write aa.where(i > j, s, -s)"),
                (lambda s, b, h, i, j: s + xp.exp(i), "write aa.exp(i)"),
            ],
            "statistics": [
                (lambda s, b, h, i, j: s + xp.mean([i, j]), "xp.mean cannot be traced"),
                (lambda s, b, h, i, j: s + mean([i, j]), "mean cannot be traced"),
            ],
        }
        for function, hint in functions[library]:
            with pytest.raises(TraceError) as error:
                trace_score(function)
            assert hint in str(error.value).rpartition("\n")[2]
            assert f"test_expressions.py:{function.__code__.co_firstlineno}: " in str(error.value)

    def test_what_a_function_is_written_in_is_none_of_its_code(self):
        for score in [lambda s, b, h, i, j: s + len({i, j})]:
            with pytest.raises(TraceError, match="compare it with each entry"):
                trace_score(score)

    def test_without_source(self):
        """As typed into `python -c`: no line to show, all hints."""
        scope = {}
        exec(compile("score = lambda s, b, h, i, j: s if i > j else -s", "<nowhere>", "exec"), scope)
        with pytest.raises(TraceError, match=r"Write aa\.where"):
            trace_score(scope["score"])

    def test_logic_on_numbers(self):
        with pytest.raises(TraceError, match="join conditions"):
            trace_mask(lambda b, h, i, j: i & j)

    def test_results(self):
        """What is wrong with all of a function is shown at its `return`, or where the function begins."""

        def number(b, h, i, j):
            n = i - j
            return n + 1

        def branches(b, h, i, j):
            if SLOPES[0] > 1:
                return i
            return j

        @functools.cache
        def nothing(b, h, i, j):
            i < j  # noqa: B015

        for function, offset, hint in (
            (number, 2, "gives int; wanted a condition: write (n + 1) != 0, or give it to bias or score_mod"),
            (branches, 0, "gives int; wanted a condition: write (result) != 0"),
            (lambda b, h, i, j: i - j, 0, "gives int; wanted a condition: write (i - j) != 0"),
            (lambda b, h, i, j: PAIR > 1, 0, "PAIR is an array of 2 axes, used as one number"),
            (lambda b, h, i, j: PAIR, 0, "gives an array; wanted a condition: PAIR is an array of 2 axes"),
            (lambda b, h, i, j: (i, j), 0, "gives builtins.tuple; wanted a condition, an expression or"),
            (nothing.__wrapped__, 1, "gives None; wanted a condition: is a `return` missing?"),
        ):
            with pytest.raises(TraceError, match="mask function") as error:
                trace_mask(function)
            assert hint in str(error.value).rpartition("\n")[2]
            line = function.__code__.co_firstlineno + offset
            assert f"test_expressions.py:{line}: {linecache.getline(__file__, line).strip()}\n" in str(
                error.value
            )
        with pytest.raises(
            TraceError, match=r"wanted a score: give .* mask, or write aa.where\(\(i > j\), x, y"
        ):
            trace_score(lambda s, b, h, i, j: i > j)

    def test_wrong_parameters(self):
        class Holder:
            def mask(self, q, k):
                return q > k

        def mask(i, j, *, table=PAIR):
            return table[i, j] > 0

        for function, got, write in (
            (lambda i, j: i > j, "i, j", "lambda b, h, i, j: i > j"),
            (mask, "i, j", "def mask(b, h, i, j, table=...):"),
            (functools.partial(mask, table=PAIR), "i, j", "def mask(b, h, i, j, table=...):"),
            (Holder().mask, "q, k", "def mask(self, b, h, i, j):"),
        ):
            with pytest.raises(TraceError) as error:
                trace_mask(function)
            code = getattr(getattr(function, "func", function), "__code__", Holder.mask.__code__)
            assert f"test_expressions.py:{code.co_firstlineno}: " in str(error.value)
            words = f"wanted the parameters (b, h, i, j), got ({got}); write {write}"
            assert str(error.value).endswith(words)
        with pytest.raises(TraceError, match=r"got \(s, q, k\); write lambda s, b, h, i, j: s \+ q"):
            trace_score(lambda s, q, k: s + q)
        with pytest.raises(TraceError, match="could not be traced"):
            trace_mask(math.hypot)


def test_repr_reads_like_code():
    assert (
        repr(trace_mask(lambda b, h, i, j: (j <= i) & ((i - j) % 4 == 0)))
        == "((j <= i) & (((i - j) % 4) == 0))"
    )
    assert (
        repr(trace_score(lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j)))
        == "(score - (SLOPES[h] * abs((i - j))))"
    )


def test_functions_are_shown_by_name_or_by_what_they_compute():
    def every_other(b, h, i, j):
        return (i - j) % 2 == 0

    mask = aa.masks.from_function
    assert repr(mask(every_other)) == "from_function(every_other)"
    assert repr(mask(lambda b, h, q, k: k <= q)) == "from_function(lambda b, h, i, j: j <= i)"
    assert repr(aa.masks.causal() & (lambda b, h, i, j: i < 5)) == (
        "causal() & from_function(lambda b, h, i, j: i < 5)"
    )
    score = aa.scores.from_function(lambda s, b, h, i, j: aa.tanh(s) * SLOPES[h])
    assert repr(score) == "from_function(lambda score, b, h, i, j: tanh(score) * SLOPES[h])"

    def power(s):
        for _ in range(40):
            s = s * s
        return s

    assert repr(aa.scores.from_function(lambda s, b, h, i, j: power(s))) == "from_function(<lambda>)"


def test_a_power_of_one_half_is_a_square_root_in_every_library():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    x = np.zeros((1, 2, 4), "f4")
    roots = np.array([-np.inf, 4.0], "f4")
    found = [
        aa.attention_weights(
            a, a, score_mod=lambda s, b, h, i, j, t=t: s + aa.where(t[j] ** 0.5 > -1, 1.0, 2.0)
        )
        for a, t in ((x, roots), (jax.numpy.asarray(x), jax.numpy.asarray(roots)))
    ]
    np.testing.assert_allclose(found[0][0, 0], [np.e / (np.e + 1), 1 / (np.e + 1)], rtol=1e-6)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_walk_visits_shared_nodes_once():
    shared = nodes.I + nodes.J
    root = shared * shared
    assert sum(node is shared for node in nodes.walk(root)) == 1


@pytest.mark.parametrize("flag", [np.array([False]), np.array(True), [0], []], ids=str)
def test_a_captured_value_has_its_own_truth(flag):
    """Python's `if` on a captured array is decided while tracing, by the array and not by its length."""
    found = trace_mask(lambda b, h, i, j: (i < j) if flag else (j <= i))
    assert repr(found) == ("(i < j)" if flag else "(j <= i)")


def test_captured_numbers_compute_as_numbers():
    half, flag = np.array(0.5), np.array(True)
    found = trace_score(lambda s, b, h, i, j: aa.where(~flag ^ flag, -half, +(half**2)) + 2**half * abs(half))
    np.testing.assert_allclose(values(found), -0.5 + 2**0.5 * 0.5, rtol=1e-15)
    assert repr(trace_score(lambda s, b, h, i, j: s * -half)) == "(score * (-half))"
    # What Python must know while it traces is read then.
    found = trace_score(
        lambda s, b, h, i, j: sum(SLOPES[n] for n in range(ZERO)) + int(ZERO) + float(half) + j
    )
    np.testing.assert_allclose(values(found)[0, 0], 0.75 + 2 + 0.5 + np.arange(7), rtol=1e-15)
    assert repr(trace_score(lambda s, b, h, i, j: s + [1, 2, 3][ZERO])) == "(score + 3)"


def test_negative_indices_of_known_parts_count_from_the_end():
    assert values(trace_score(lambda s, b, h, i, j: PAIR[-1][h]))[1, 0, 0] == 5.0
    assert values(trace_score(lambda s, b, h, i, j: PAIR[-1, -1] + s))[1, 0, 0] == 6.0
    assert values(trace_score(lambda s, b, h, i, j: sum(row[h] for row in PAIR)))[1, 0, 0] == 7.0
    assert values(trace_score(lambda s, b, h, i, j: PAIR[h][len(PAIR[h]) - 1]))[1, 0, 0] == 6.0


def test_unsigned_tables_on_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    table = torch.tensor([1, 0, 3]).to(torch.uint16)
    x = torch.zeros(1, 3, 2, dtype=torch.float64)
    found = aa.attention_weights(x, x, score_mod=lambda s, b, h, i, j: s + table[j])
    logits = np.exp([1.0, 0.0, 3.0])
    np.testing.assert_allclose(found[0, 0], logits / logits.sum(), rtol=1e-14)
