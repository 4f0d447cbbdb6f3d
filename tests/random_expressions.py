"""Random masks and scores with a definition of their values that shares no code with the library.

A `Term` is drawn once and read twice: `Term.expr()` builds the library's expression of it, `Term.value(...)`
computes one entry with NumPy scalars. Everything is a function of the seed.

Floats are compared with a bound that is computed, not chosen: arithmetic is correctly rounded and adds no
error, functions (exp, log, tanh, sigmoid, pow, and sqrt, which torch approximates) a few units in the last
place, and errors grow through what follows. An entry whose decisions (a comparison, floor, a remainder) lie
within the error is `Undecided`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from anyattn.expr import nodes
from anyattn.expr.nodes import Aligned, Const, Expr, Table, apply, load

# The geometry in which terms are drawn: sizes that no block divides, positions before and beyond the keys.
BATCH, HEADS, ROWS, KEYS = 3, 4, 37, 53
OFFSETS = (-5, 0, 16)
LARGEST_SCORE = 8.0

INT_DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "int64")
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Functions of users do not call philox, and tests/test_philox.py holds the printers to it.
OPERATIONS = frozenset(nodes.OPERATIONS) - {"philox"}

_SYMBOLS = {"b": nodes.B, "h": nodes.H, "row": nodes.ROW, "i": nodes.I, "j": nodes.J, "score": nodes.SCORE}
_RANGES = {
    "b": BATCH,
    "h": HEADS,
    "row": ROWS,
    "i": ROWS + max(OFFSETS),
    "j": KEYS,
}
# So that every library's default integers, int32 too, hold all values.
_LARGEST_INT = 2**30
_LARGEST_FLOAT = 1e6


class Undecided(Exception):  # noqa: N818  not an error: the entry has no value to compare with
    """Rounding decides what the value is."""


@dataclass(frozen=True)
class Point:
    """An entry of the attention matrix and its score."""

    b: int
    h: int
    row: int
    j: int
    score: float

    @property
    def i(self) -> int:
        return self.row + OFFSETS[self.b]


@dataclass(frozen=True, eq=False)
class Term:
    """A drawn expression: a constant, symbol, table or aligned array (`value`), or an operation on `args`.

    `bound` is the largest absolute value that it may have, infinite where it is not known.
    """

    op: str
    kind: str
    args: tuple[Term, ...] = ()
    content: Any = None
    block: int = 1
    bound: float = math.inf
    _expr: list[Expr] = field(default_factory=list, repr=False)

    def expr(self) -> Expr:
        """The library's expression, bound: its arrays are NumPy arrays."""
        if not self._expr:
            self._expr.append(self._build())
        return self._expr[0]

    def _build(self) -> Expr:
        if self.op == "const":
            return Const(self.content, self.kind)
        if self.op == "symbol":
            return _SYMBOLS[self.content]
        args = tuple(a.expr() for a in self.args)
        if self.op == "table":
            x = self.content
            table = Table(x, self.kind, x.ndim, (None,) * x.ndim, f"table{x.shape}", host=False)
            return load(table, args)
        if self.op == "aligned":
            label = f"array{self.content.shape}"
            return Aligned(self.content, self.kind, self.block, label, any_rank=False)
        return apply(self.op, *args)

    def terms(self) -> Iterator[Term]:
        """Every term below this one, once."""
        seen = {}
        stack = [self]
        while stack:
            term = stack.pop()
            if id(term) not in seen:
                seen[id(term)] = term
                stack.extend(term.args)
        return iter(seen.values())

    def value(self, point: Point, dtype: str = "float64") -> tuple[Any, float]:
        """The value at `point` with floats computed in `dtype`, and a bound on the error of another's."""
        with np.errstate(all="ignore"):
            return _Scalar(point, np.dtype(dtype).type)(self)


def points(seed: int, count: int) -> list[Point]:
    """Different entries at random places, the corners among them."""
    rng = np.random.default_rng((seed, 1))
    found = {(0, 0, 0, 0): 0.5, (BATCH - 1, HEADS - 1, ROWS - 1, KEYS - 1): -0.5}
    while len(found) < count:
        place = tuple(int(rng.integers(n)) for n in (BATCH, HEADS, ROWS, KEYS))
        # Exact in every float dtype.
        found.setdefault(place, float(rng.integers(-64, 65)) / 64 * LARGEST_SCORE)
    return [Point(*place, score) for place, score in found.items()]


def random_mask(seed: int, depth: int = 4, **options: Any) -> Term:
    """A condition of at most `depth` operations above one another; `options` are those of `Draw`."""
    return Draw(seed, **options)("bool", depth)


def random_score(seed: int, depth: int = 4, **options: Any) -> Term:
    """A float of at most `depth` operations above one another that may read the score."""
    return Draw(seed, score=True, **options)("float", depth)


class Draw:
    """Draws terms.

    Parameters
    ----------
    seed : int
    score : bool
        Whether the score may occur.
    finite : bool
        Whether floats stay finite (and defined: no log of a negative number) at every point.
    arrays : bool
        Whether captured tables and aligned arrays may occur.
    operations : set of str
        Operations of `nodes.OPERATIONS` that may occur.
    symbols : sequence of str
        Index symbols that may occur.
    """

    def __init__(
        self,
        seed: int,
        *,
        score: bool = False,
        finite: bool = True,
        arrays: bool = True,
        operations: frozenset[str] | set[str] = OPERATIONS,
        symbols: tuple[str, ...] = ("b", "h", "row", "i", "j"),
    ):
        self.rng = np.random.default_rng((seed, score, finite))
        self.score, self.finite, self.arrays = score, finite, arrays
        self.operations, self.symbols = operations, symbols
        self.pool: dict[str, list[tuple[Term, int]]] = {"bool": [], "int": [], "float": []}

    def __call__(self, kind: str, depth: int) -> Term:
        known = [term for term, height in self.pool[kind] if height <= depth]
        if depth > 0 and known and self.rng.random() < 0.1:
            return self.pick(known)
        term = self.leaf(kind) if depth == 0 or self.rng.random() < 0.08 else self.operation(kind, depth)
        term = self.limited(term)
        self.pool[kind].append((term, depth))
        return term

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def number(self, depth: int) -> Term:
        return self(self.pick(["int", "int", "int", "float", "bool"]), depth)

    def limited(self, term: Term) -> Term:
        """`term`, kept within the range of its kind."""
        if term.kind == "int" and term.bound > _LARGEST_INT:
            modulus = self.pick([97, 64, -31])
            return Term("mod", "int", (term, self.const(modulus)), bound=abs(modulus))
        if term.kind == "float" and self.finite and not term.bound <= _LARGEST_FLOAT:
            return self.clipped(term, _LARGEST_FLOAT)
        return term

    def clipped(self, term: Term, limit: float) -> Term:
        """`term` within [-limit, limit]."""
        if term.bound <= limit:
            return term
        low = Term("maximum", "float", (term, self.const(-limit)))
        return Term("minimum", "float", (low, self.const(limit)), bound=limit)

    def const(self, value: bool | int | float) -> Term:
        kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
        return Term("const", kind, content=value, bound=abs(float(value)))

    def leaf(self, kind: str) -> Term:
        if self.arrays and self.rng.random() < 0.25:
            return self.table(kind)
        if self.arrays and kind != "int" and self.rng.random() < 0.25:
            return self.aligned(kind)
        if kind == "int":
            if self.rng.random() < 0.25:
                return self.const(int(self.rng.integers(-20, 40)))
            name = self.pick(self.symbols)
            return Term("symbol", "int", content=name, bound=_RANGES[name])
        if kind == "float":
            if self.score and self.rng.random() < 0.6:
                return Term("symbol", "float", content="score", bound=LARGEST_SCORE)
            if not self.finite and self.rng.random() < 0.15:
                return self.const(self.pick([math.inf, -math.inf, math.nan]))
            return self.const(float(self.rng.integers(-40, 40)) / 8)
        if self.rng.random() < 0.2:
            return self.const(bool(self.rng.integers(2)))
        op = self.pick(["le", "lt", "ge", "gt", "eq", "ne"])
        return Term(op, "bool", (self.leaf("int"), self.leaf("int")))

    def table(self, kind: str) -> Term:
        """An entry of a small array; indices may lie outside."""
        ndim = self.pick([0, 1, 1, 1, 2, 3])
        shape = tuple(int(self.rng.integers(1, 24 if ndim == 1 else 7)) for _ in range(ndim))
        indices = []
        for _ in range(ndim):
            # A table in an index of a table is wanted too, not whole chains of them.
            self.arrays = bool(self.rng.random() < 0.15)
            index = self("int", 1)
            self.arrays = True
            if self.rng.random() < 0.15 and "floor" in self.operations:
                quotient = Term("truediv", "float", (index, self.const(self.pick([3, -2.5, 8.0]))))
                index = Term("floor", "float", (quotient,), bound=index.bound)
            indices.append(index)
        x = self.entries(kind, shape)
        return Term("table", kind, tuple(indices), x, bound=_largest(x))

    def aligned(self, kind: str) -> Term:
        """An array along (b, h, row, j) or (row, j), in blocks or not, any axis of one entry for all."""
        block = self.pick([1, 1, 5, 16])
        full = (BATCH, HEADS, -(-ROWS // block), -(-KEYS // block))
        full = full[self.pick([0, 2]) :]
        shape = tuple(self.pick([n, n, 1]) for n in full)
        x = self.entries(kind, shape)
        return Term("aligned", kind, content=x, block=block, bound=_largest(x))

    def entries(self, kind: str, shape: tuple[int, ...]) -> Any:
        if kind == "bool":
            return self.rng.integers(0, 2, shape).astype(bool)
        if kind == "int":
            dtype = self.pick(INT_DTYPES)
            return np.asarray(self.rng.integers(0 if dtype[0] == "u" else -60, 100, shape)).astype(dtype)
        x = np.asarray(self.rng.standard_normal(shape) * 2)
        if not self.finite:
            special = self.rng.choice([0.0, math.inf, -math.inf, math.nan], shape)
            x = np.where(self.rng.random(shape) < 0.1, special, x)
        name = self.pick(FLOAT_DTYPES)
        return x.astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

    def operation(self, kind: str, depth: int) -> Term:
        forms = [name for name in _FORMS[kind] if name in self.operations]
        return _build(self, self.pick(forms), kind, depth - 1) if forms else self.leaf(kind)

    def positive(self, kind: str, depth: int) -> Term:
        """A number of a kind that is never below a half, computed from one that may be anything."""
        x = self(kind, depth)
        size = Term("abs", kind, (x,), bound=x.bound)
        return Term("add", kind, (size, self.const(1 if kind == "int" else 0.5)), bound=x.bound + 1)

    def divisor(self, kind: str, depth: int) -> Term:
        """A number that is never zero; of floats and where `finite`, never small either."""
        if self.rng.random() < 0.6 or not {"abs", "add", "neg"} <= self.operations:
            whole = [1, 2, 3, 4, 7, 8, 16, 24, -1, -2, -3, -8, -13]
            return self.const(self.pick(whole if kind == "int" else [0.5, 2.0, 2.5, -0.75, -4.0]))
        x = self.positive(kind, depth)
        return Term("neg", kind, (x,), bound=x.bound) if self.rng.random() < 0.5 else x


_FORMS = {
    "bool": ["lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "not", "where"],
    "int": ["add", "sub", "mul", "floordiv", "mod", "pow", "neg", "abs", "minimum", "maximum", "where"],
    "float": ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs", "minimum", "maximum"],
}
_FORMS["float"] += ["where", "exp", "log", "tanh", "sqrt", "sigmoid", "floor"]


def _largest(x: Any) -> float:
    return float(np.max(np.abs(x.astype(float))))


def _build(draw: Draw, op: str, kind: str, depth: int) -> Term:
    """The operation `op` that gives `kind` on terms that it is defined for."""
    if op in ("and", "or", "xor"):
        return Term(op, kind, (draw("bool", depth), draw("bool", depth)))
    if op == "not":
        return Term(op, kind, (draw("bool", depth),))
    if op == "where":
        x, y = draw(kind, depth), draw(kind, depth)
        if kind == "float" and draw.rng.random() < 0.3:
            y = draw("int", depth)
        return Term(op, kind, (draw("bool", depth), x, y), bound=max(x.bound, y.bound))
    if kind == "bool":
        if op in ("eq", "ne") and draw.rng.random() < 0.2:
            return Term(op, kind, (draw("bool", depth), draw("bool", depth)))
        return Term(op, kind, (draw.number(depth), draw.number(depth)))
    if op in ("floordiv", "mod", "truediv"):
        return _quotient(draw, op, kind, depth)
    if op == "pow":
        return _power(draw, kind, depth)
    if op in ("exp", "log", "tanh", "sqrt", "sigmoid", "floor"):
        return _function(draw, op, depth)
    x = draw(kind, depth)
    if op in ("neg", "abs"):
        if kind == "int" and draw.rng.random() < 0.1:
            x = draw("bool", depth)
        return Term(op, kind, (x,), bound=x.bound)
    y = draw(kind, depth) if draw.rng.random() < 0.7 else draw.number(depth)
    if _RANK[y.kind] > _RANK[kind]:
        y = draw(kind, depth)
    x, y = (x, y) if draw.rng.random() < 0.5 else (y, x)
    bounds = [1.0 if t.kind == "bool" else t.bound for t in (x, y)]
    bound = {"add": sum(bounds), "sub": sum(bounds), "mul": bounds[0] * bounds[1]}.get(op, max(bounds))
    return Term(op, kind, (x, y), bound=bound)


_RANK = {"bool": 0, "int": 1, "float": 2}


def _quotient(draw: Draw, op: str, kind: str, depth: int) -> Term:
    below = kind if op != "truediv" or draw.rng.random() < 0.5 else "int"
    x, y = draw(below, depth), draw.divisor(below, depth)
    if below == "float" and not draw.finite and draw.rng.random() < 0.2 and op == "truediv":
        y = draw("float", depth)
    if op == "mod":
        return Term(op, kind, (x, y), bound=y.bound)
    return Term(op, kind, (x, y), bound=2 * x.bound + 1)


def _power(draw: Draw, kind: str, depth: int) -> Term:
    if kind == "int":
        x = draw("int", depth)
        most = max(n for n in (0, 1, 2, 3) if x.bound**n <= _LARGEST_INT)
        n = int(draw.rng.integers(0, most + 1))
        return Term("pow", "int", (x, draw.const(n)), bound=max(1.0, x.bound**n))
    if not draw.finite:
        base = draw("float", depth)
        exponent = draw.const(draw.pick([2, 3, 0.5, -1, -2.0, 0, 1])) if draw.rng.random() < 0.7 else None
        return Term("pow", "float", (base, exponent or draw("float", 0)))
    if draw.rng.random() < 0.3:
        # Negative whole bases: their power is as exact as a product.
        base = draw.clipped(draw("float", depth), 100.0)
        return Term("pow", "float", (base, draw.const(draw.pick([2, 3, 2.0]))), bound=1e6)
    base = draw.positive(draw.pick(["int", "float"]), min(depth, 1))
    base = Term("minimum", base.kind, (base, draw.const(50)), bound=50)
    base = Term("add", "float", (base, draw.const(0.5)), bound=51)
    exponent = draw.const(draw.pick([0.5, -1, -2, 1.5, -0.25, 3]))
    if draw.rng.random() < 0.3:
        exponent = Term("mod", "int", (draw("int", depth), draw.const(4)), bound=3)
    return Term("pow", "float", (base, exponent), bound=51.0**3)


def _function(draw: Draw, op: str, depth: int) -> Term:
    x = draw(draw.pick(["float", "float", "int"]), depth)
    if op in ("tanh", "sigmoid"):
        return Term(op, "float", (x,), bound=1)
    if op == "floor":
        return Term(op, "float", (x,), bound=x.bound + 1)
    if not draw.finite:
        return Term(op, "float", (x,))
    if op == "exp":
        return Term(op, "float", (draw.clipped(x, 6.0),), bound=math.exp(6))
    size = Term("abs", x.kind, (x,), bound=x.bound)
    size = Term("add", "float", (size, draw.const(0.25)), bound=size.bound + 1)
    return Term(op, "float", (size,), bound=size.bound + 2)


class _Scalar:
    """Values of terms at one point, each with an error: Python ints and bools, NumPy floats of one dtype."""

    def __init__(self, point: Point, dtype: type[Any]):
        self.point, self.dtype = point, dtype
        self.eps, self.tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
        self.done: dict[int, tuple[Any, float]] = {}

    def __call__(self, term: Term) -> tuple[Any, float]:
        if id(term) not in self.done:
            self.done[id(term)] = self.compute(term)
        return self.done[id(term)]

    def compute(self, term: Term) -> tuple[Any, float]:
        if term.op == "const":
            return self.typed(term.content, term.kind), 0.0
        if term.op == "symbol":
            return self.typed(getattr(self.point, term.content), term.kind), 0.0
        if term.op == "table":
            return self.typed(self.entry(term), term.kind), 0.0
        if term.op == "aligned":
            return self.typed(self.cell(term), term.kind), 0.0
        args = [self(a) for a in term.args]
        if term.op == "where":
            value, error = args[1] if args[0][0] else args[2]
            return self.typed(value, term.kind), error
        kinds = [a.kind for a in term.args]
        inner = term.kind if term.kind != "bool" else max(kinds, key=_RANK.__getitem__)
        values = [self.typed(value, inner) for value, _ in args]
        errors = [error for _, error in args]
        if inner != "float":
            return self.typed(_WHOLE[term.op](*values), term.kind), 0.0
        if term.kind == "bool":
            if any(errors) and abs(values[0] - values[1]) <= sum(errors):
                raise Undecided
            return bool(_WHOLE[term.op](*values)), 0.0
        return self.float(term.op, values, errors)

    def typed(self, value: Any, kind: str) -> Any:
        return {"bool": bool, "int": int, "float": lambda x: self.dtype(float(x))}[kind](value)

    def entry(self, term: Term) -> Any:
        where = []
        for arg, size in zip(term.args, term.content.shape, strict=True):
            index, error = self(arg)
            if error:
                raise Undecided
            where.append(0 if index != index else int(min(max(index, 0), size - 1)))
        return term.content[tuple(where)]

    def cell(self, term: Term) -> Any:
        p, n = self.point, term.block
        where = (p.b, p.h, p.row // n, p.j // n)[-term.content.ndim :]
        return term.content[tuple(0 if s == 1 else w for w, s in zip(where, term.content.shape, strict=True))]

    def float(self, op: str, values: list[Any], errors: list[float]) -> tuple[Any, float]:
        if any(errors) and op in ("floordiv", "mod"):
            raise Undecided
        result = self.dtype(_FLOAT[op](*values))
        if not math.isfinite(result):
            # An operand with an error might have given a finite value.
            if any(errors) and all(math.isfinite(v) for v in values):
                raise Undecided
            return result, 0.0
        error = self.carried(op, values, errors, float(result))
        if op in _INEXACT:
            error += 8 * self.eps * abs(float(result)) + self.tiny
        elif error:
            error += self.eps * abs(float(result)) + self.tiny
        if error and abs(float(result)) > float(np.finfo(self.dtype).max) / 4:
            raise Undecided
        return result, error

    def carried(self, op: str, values: list[Any], errors: list[float], result: float) -> float:
        """What errors of the operands make of the result."""
        if not any(errors):
            return 0.0
        sizes = [abs(float(v)) for v in values]
        if op in ("truediv", "log", "sqrt", "pow"):
            last = -1 if op == "truediv" else 0
            if errors[last] * 4 > sizes[last]:
                raise Undecided
        if op == "floor":
            if math.floor(values[0] - errors[0]) != math.floor(values[0] + errors[0]):
                raise Undecided
            return 0.0
        if op == "exp" and errors[0] > 0.1:
            raise Undecided
        if op == "pow":
            relative = sizes[1] * errors[0] / sizes[0] * 2 + abs(math.log(sizes[0])) * errors[1] * 2
            if relative > 0.1:
                raise Undecided
            return 2 * abs(result) * relative
        return _CARRIED[op](sizes, errors, abs(result))


def _python_divmod(x: Any, y: Any) -> tuple[Any, Any]:
    """CPython's float_divmod for y != 0, in the dtype of x."""
    remainder = np.fmod(x, y)
    quotient = (x - remainder) / y
    if remainder != 0 and (y < 0) != (remainder < 0):
        remainder, quotient = remainder + y, quotient - type(x)(1)
    whole = np.floor(quotient)
    if quotient - whole > 0.5:
        whole = whole + type(x)(1)
    return whole, remainder


def _extreme(less: bool) -> Callable[[Any, Any], Any]:
    def pick(x: Any, y: Any) -> Any:
        if x != x or y != y:
            return type(x)(math.nan)
        return x if (x < y) == less else y

    return pick


_WHOLE: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "floordiv": lambda x, y: x // y,
    "mod": lambda x, y: x % y,
    "pow": lambda x, y: x**y,
    "neg": lambda x: -x,
    "abs": abs,
    "minimum": min,
    "maximum": max,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "xor": lambda x, y: x != y,
    "not": lambda x: not x,
}

_FLOAT: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "truediv": lambda x, y: x / y,
    "floordiv": lambda x, y: _python_divmod(x, y)[0],
    "mod": lambda x, y: _python_divmod(x, y)[1],
    "pow": lambda x, y: np.float64(x) ** np.float64(y),
    "neg": lambda x: -x,
    "abs": abs,
    "minimum": _extreme(True),
    "maximum": _extreme(False),
    "exp": lambda x: np.exp(np.float64(x)),
    "log": lambda x: np.log(np.float64(x)),
    "tanh": lambda x: np.tanh(np.float64(x)),
    "sqrt": np.sqrt,
    "sigmoid": lambda x: 1 / (1 + np.exp(-np.float64(x))),
    "floor": np.floor,
}
_INEXACT = {"sqrt", "pow", "exp", "log", "tanh", "sigmoid"}

_CARRIED: dict[str, Callable[[list[float], list[float], float], float]] = {
    "add": lambda s, e, r: e[0] + e[1],
    "sub": lambda s, e, r: e[0] + e[1],
    "mul": lambda s, e, r: s[0] * e[1] + s[1] * e[0] + e[0] * e[1],
    "truediv": lambda s, e, r: (e[0] + r * e[1]) / (s[1] - e[1]),
    "neg": lambda s, e, r: e[0],
    "abs": lambda s, e, r: e[0],
    "minimum": lambda s, e, r: max(e),
    "maximum": lambda s, e, r: max(e),
    "exp": lambda s, e, r: 2 * r * e[0],
    "log": lambda s, e, r: e[0] / (s[0] - e[0]),
    "tanh": lambda s, e, r: e[0],
    "sqrt": lambda s, e, r: e[0] / math.sqrt(s[0] - e[0]),
    "sigmoid": lambda s, e, r: e[0] / 4,
}
