"""Expression nodes: immutable, typed, built by Python operators.

An expression is a graph over six symbols (batch entry b, query head h, query row, query position i, key j,
score), constants and captured arrays. Every node has a kind, "bool", "int" or "float"; an operator whose
operands have the wrong kind is refused when it is written, not when it runs. Operators mean what they mean on
Python numbers: `//` and `%` floor, `/` is true division, comparisons give "bool", and `& | ^ ~` are logic on
"bool" only.

Equal nodes over equal children are one object, so common parts are computed once. Constants are the
exception: they may become arguments of a kernel, and two that happen to be equal today must not change its
structure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakValueDictionary

from anyattn.errors import TraceError
from anyattn.forks import held_over_forks

__all__ = [
    "Aligned",
    "Apply",
    "Const",
    "Deferred",
    "Expr",
    "Load",
    "Size",
    "Symbol",
    "Table",
    "apply",
    "as_expr",
    "walk",
]


class NoValueError(TraceError):
    """Python asked an expression for a value, which it has at each index only."""


class Expr:
    """Base of all nodes; `kind` is "bool", "int" or "float"."""

    kind: str
    # NumPy then leaves `array + expr` and `scalar + expr` to the operators below.
    __array_ufunc__ = None

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        """The same node over other children."""
        return self

    # fmt: off
    def __add__(self, other: Any) -> Expr: return apply("add", self, other)
    def __radd__(self, other: Any) -> Expr: return apply("add", other, self)
    def __sub__(self, other: Any) -> Expr: return apply("sub", self, other)
    def __rsub__(self, other: Any) -> Expr: return apply("sub", other, self)
    def __mul__(self, other: Any) -> Expr: return apply("mul", self, other)
    def __rmul__(self, other: Any) -> Expr: return apply("mul", other, self)
    def __truediv__(self, other: Any) -> Expr: return apply("truediv", self, other)
    def __rtruediv__(self, other: Any) -> Expr: return apply("truediv", other, self)
    def __floordiv__(self, other: Any) -> Expr: return apply("floordiv", self, other)
    def __rfloordiv__(self, other: Any) -> Expr: return apply("floordiv", other, self)
    def __mod__(self, other: Any) -> Expr: return apply("mod", self, other)
    def __rmod__(self, other: Any) -> Expr: return apply("mod", other, self)
    def __pow__(self, other: Any) -> Expr: return apply("pow", self, other)
    def __rpow__(self, other: Any) -> Expr: return apply("pow", other, self)
    def __neg__(self) -> Expr: return apply("neg", self)
    def __pos__(self) -> Expr: return self
    def __abs__(self) -> Expr: return apply("abs", self)
    def __invert__(self) -> Expr: return apply("not", self)
    def __and__(self, other: Any) -> Expr: return apply("and", self, other)
    def __rand__(self, other: Any) -> Expr: return apply("and", other, self)
    def __or__(self, other: Any) -> Expr: return apply("or", self, other)
    def __ror__(self, other: Any) -> Expr: return apply("or", other, self)
    def __xor__(self, other: Any) -> Expr: return apply("xor", self, other)
    def __rxor__(self, other: Any) -> Expr: return apply("xor", other, self)
    def __lt__(self, other: Any) -> Expr: return apply("lt", self, other)
    def __le__(self, other: Any) -> Expr: return apply("le", self, other)
    def __gt__(self, other: Any) -> Expr: return apply("gt", self, other)
    def __ge__(self, other: Any) -> Expr: return apply("ge", self, other)
    def __eq__(self, other: Any) -> Expr: return apply("eq", self, other)  # type: ignore[override]
    def __ne__(self, other: Any) -> Expr: return apply("ne", self, other)  # type: ignore[override]
    # fmt: on

    def __bool__(self) -> NoReturn:
        raise NoValueError(
            "a traced condition has no truth value: it is traced once for all indices. Write "
            "aa.where(condition, x, y) instead of `if`, `&` `|` `~` instead of `and` `or` `not`, "
            "aa.minimum and aa.maximum instead of `min` and `max`, "
            "and (a <= b) & (b < c) instead of a chained comparison"
        )

    # A set or a dict would find nothing, as `==` with an entry is not known yet, and say so as False.
    def __hash__(self) -> NoReturn:
        raise NoValueError(
            "a traced value is not a number yet, so a set or a dict cannot look it up: read a captured "
            "array by it, or compare it with each entry and join the conditions with |"
        )

    def _no_number(self, *args: Any) -> NoReturn:
        raise NoValueError(
            "a traced value is not a number yet: use aa.exp, aa.log, aa.tanh, aa.sqrt, aa.sigmoid, aa.floor, "
            "aa.minimum, aa.maximum, aa.clip and aa.where instead of other libraries' functions"
        )

    def __format__(self, spec: str) -> NoReturn:
        self._no_number()

    __float__ = __int__ = __index__ = __complex__ = __iter__ = __len__ = __contains__ = _no_number


@dataclass(frozen=True, eq=False, repr=False)
class Const(Expr):
    """A Python number."""

    value: bool | int | float
    kind: str

    def __repr__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, eq=False, repr=False)
class Symbol(Expr):
    """One of the indices, or the score."""

    name: str
    kind: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Expr):
    """An operator or function of `OPERATIONS` on expressions."""

    op: str
    args: tuple[Expr, ...]
    kind: str

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return _only(Apply(self.op, children, self.kind))

    def __repr__(self) -> str:
        form = OPERATIONS[self.op].form
        return form.format(*self.args) if form else f"{self.op}({', '.join(map(repr, self.args))})"


@dataclass(frozen=True, eq=False)
class Table:
    """A captured array, read through `Load`.

    `axes` names what each axis must match in the call: "b" the number of batch entries, "h" the query heads,
    None anything. `value` is an array of the user's library, or host data (`host`) that every library gets a
    copy of.

    `fixed` says what of it expressions were built from, so that an array that takes its place must agree: ""
    its dtype and rank only, "shape" also its sizes (but along "b" and "h"), "values" all of it, so that none
    may. Entries that the host can read are at least `least`. `known` are integers of host data once they are
    bound, wherever `value` lies then.
    """

    value: Any
    kind: str
    ndim: int
    axes: tuple[str | None, ...]
    label: str
    host: bool
    fixed: str = "shape"
    least: int | None = None
    known: Any = None


@dataclass(frozen=True, eq=False, repr=False)
class Load(Expr):
    """An element of a captured array; an index out of range reads the nearest edge."""

    table: Table
    indices: tuple[Expr, ...]

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.table.kind

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.indices

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return load(self.table, children)

    def __repr__(self) -> str:
        return (
            f"{self.table.label}[{', '.join(map(repr, self.indices))}]" if self.indices else self.table.label
        )


@dataclass(frozen=True, eq=False, repr=False)
class Size(Expr):
    """The size of one axis of a captured array; binding makes it a constant."""

    table: Table
    axis: int
    kind: str = "int"

    def __repr__(self) -> str:
        return f"{self.table.label}.shape[{self.axis}]"


@dataclass(frozen=True, eq=False, repr=False)
class Aligned(Expr):
    """An array along (..., h, row, j) that broadcasts there, each entry serving `block` rows and keys.

    `any_rank` takes every number of axes that broadcasts, otherwise two or all of the result's.
    """

    value: Any
    kind: str
    block: int
    label: str
    any_rank: bool

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False, repr=False)
class Deferred(Expr):
    """A part that only the sizes of the call can settle (`masks.random_blocks`, `scores.relative_keys`).

    `settle` gets the sizes, and the values of `tables`, which is where others can take their places.
    `parameters` are what it depends on besides the sizes and the position of row 0, None where that is more
    than can be compared. `local` says that at each index it means the same in every size of call.

    Where `settle` reads an array that it computes from those values, `derive` computes it from the namespace,
    the accumulation dtype and the values; `settle` takes it after them, from one table more.
    """

    settle: Callable[..., Expr]
    kind: str
    inputs: tuple[Expr, ...]
    label: str
    tables: tuple[Table, ...] = ()
    parameters: tuple[int, ...] | None = None
    local: bool = False
    derive: Callable[..., Any] | None = None

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.inputs

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Operation:
    """What an operator takes and gives: `takes` is "number" or "bool", `gives` a kind or "promote"."""

    arity: int
    takes: str
    gives: str
    form: str | None = None


OPERATIONS: dict[str, Operation] = {
    "add": Operation(2, "number", "promote", "({0!r} + {1!r})"),
    "sub": Operation(2, "number", "promote", "({0!r} - {1!r})"),
    "mul": Operation(2, "number", "promote", "({0!r} * {1!r})"),
    "truediv": Operation(2, "number", "float", "({0!r} / {1!r})"),
    "floordiv": Operation(2, "number", "promote", "({0!r} // {1!r})"),
    "mod": Operation(2, "number", "promote", "({0!r} % {1!r})"),
    "pow": Operation(2, "number", "promote", "({0!r} ** {1!r})"),
    "neg": Operation(1, "number", "promote", "(-{0!r})"),
    "abs": Operation(1, "number", "promote"),
    "minimum": Operation(2, "number", "promote"),
    "maximum": Operation(2, "number", "promote"),
    "lt": Operation(2, "number", "bool", "({0!r} < {1!r})"),
    "le": Operation(2, "number", "bool", "({0!r} <= {1!r})"),
    "gt": Operation(2, "number", "bool", "({0!r} > {1!r})"),
    "ge": Operation(2, "number", "bool", "({0!r} >= {1!r})"),
    "eq": Operation(2, "number", "bool", "({0!r} == {1!r})"),
    "ne": Operation(2, "number", "bool", "({0!r} != {1!r})"),
    "and": Operation(2, "bool", "bool", "({0!r} & {1!r})"),
    "or": Operation(2, "bool", "bool", "({0!r} | {1!r})"),
    "xor": Operation(2, "bool", "bool", "({0!r} ^ {1!r})"),
    "not": Operation(1, "bool", "bool", "(~{0!r})"),
    "where": Operation(3, "number", "promote"),
    "exp": Operation(1, "number", "float"),
    "log": Operation(1, "number", "float"),
    "tanh": Operation(1, "number", "float"),
    "sqrt": Operation(1, "number", "float"),
    "sigmoid": Operation(1, "number", "float"),
    # Counts in whole numbers but keeps the range of floats; the only float that may index a table.
    "floor": Operation(1, "number", "float"),
    # The upper 24 bits of the first word of Philox4x32-10 (`anyattn.philox`): two words of the key, four of
    # the counter, of each its lower 32 bits. For dropout; functions of users cannot call it.
    "philox": Operation(6, "number", "int"),
}

COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))
# Indices are int64 in meaning, and so is what is computed from them.
_LARGEST = 2**63 - 1

_RANK = {"bool": 0, "int": 1, "float": 2}


def as_expr(value: Any) -> Expr:
    """`value` as a node: expressions as they are, Python and NumPy scalars as constants."""
    if isinstance(value, Expr):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return Const(value, "bool")
    if isinstance(value, int):
        return Const(value, "int")
    if isinstance(value, float):
        return Const(value, "float")
    as_node = getattr(value, "__anyattn_expr__", None)
    if as_node is not None:
        node: Expr = as_node()
        return node
    raise TraceError(
        f"an expression was combined with {type(value).__module__}.{type(value).__qualname__}; wanted a "
        f"number or an expression (an array is read by indexing it with index expressions: table[h, i - j])"
    )


def apply(op: str, *values: Any) -> Expr:
    """The operation `op` on nodes or numbers, its kinds checked."""
    args = tuple(as_expr(v) for v in values)
    if op == "pow" and isinstance(args[1], Const) and args[1].value == 0.5:
        # Of -inf, NumPy's power is NaN and that of C and XLA is inf.
        op, args = "sqrt", args[:1]
    rule = OPERATIONS[op]
    for a in args:
        # A bound beyond all indices bounds nothing, and compares rightly.
        if isinstance(a, Const) and a.kind == "int" and abs(a.value) > _LARGEST and op not in COMPARISONS:
            raise ValueError(
                f"{a.value} in a mask or score: wanted integers of at most {_LARGEST}, or a float"
            )
    numbers = args
    if op == "where":
        if args[0].kind != "bool":
            raise TraceError(
                f"where: the condition {args[0]!r} is {args[0].kind}; wanted a comparison or mask"
            )
        numbers = args[1:]
    elif op in ("eq", "ne") and all(a.kind == "bool" for a in args):
        return _only(Apply(op, args, "bool"))
    if rule.takes == "bool":
        for a in args:
            if a.kind != "bool":
                raise TraceError(f"{op}: {a!r} is {a.kind}; `& | ^ ~` join conditions (bool) only")
    kind = rule.gives
    if kind == "promote":
        kind = max((a.kind for a in numbers), key=_RANK.__getitem__)
        if kind == "bool" and op != "where":
            kind = "int"
        if op == "pow" and kind == "int" and not (isinstance(args[1], Const) and args[1].value >= 0):
            kind = "float"
    return _only(Apply(op, args, kind))


def load(table: Table, indices: tuple[Expr, ...]) -> Expr:
    """The element of `table` at `indices`."""
    return _only(Load(table, indices))


_nodes: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()
_lock = held_over_forks(threading.Lock())


def _only(node: Apply | Load) -> Expr:
    """`node`, or the equal one that exists already."""
    own: Any = (node.op, node.kind) if isinstance(node, Apply) else id(node.table)
    with _lock:  # two threads would make two nodes of one
        return _nodes.setdefault((type(node), own, *map(id, node.children)), node)


def walk(root: Expr) -> Iterator[Expr]:
    """Every node under `root` once, children before parents."""
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        if type(node) is tuple:  # its children are done
            yield node[0]
        elif id(node) not in seen:
            seen.add(id(node))
            children = node.children
            if children:
                stack.append((node,))
                stack.extend(reversed(children))
            else:
                yield node


def rewrite(root: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """`root` with `change` applied to every node, children first; shared nodes are changed once."""
    done: dict[int, Expr] = {}
    for node in walk(root):
        children = node.children
        if children:
            new = tuple([done[id(c)] for c in children])
            if any(a is not b for a, b in zip(new, children, strict=True)):
                done[id(node)] = change(node.rebuild(new))
                continue
        done[id(node)] = change(node)
    return done[id(root)]


def depends_on(root: Expr, *names: str) -> bool:
    """Whether a symbol of one of these names occurs in `root`."""
    return any(isinstance(node, Symbol) and node.name in names for node in walk(root))


B = Symbol("b", "int")
H = Symbol("h", "int")
ROW = Symbol("row", "int")
I = Symbol("i", "int")  # noqa: E741  the contract's name
J = Symbol("j", "int")
SCORE = Symbol("score", "float")
TRUE = Const(True, "bool")
