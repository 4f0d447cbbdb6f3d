"""A program: the structure of a call's expressions, apart from the values that they capture.

Code is generated from the structure and kept under its key; captured arrays, floats and integers are
arguments, so that another window, length or table of slopes compiles nothing. Divisors of `//` and `%` and
exponents stay in the structure: a constant divisor is a multiplication, a variable one some 25 cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.expr.nodes import Aligned, Apply, Const, Expr, Load, Symbol, apply, walk

__all__ = ["Parameter", "Program", "TableSlot", "canonical", "lower"]

# Hash of the structure under a node; the node is kept, so that its id is not given to another.
_Hashes = dict[int, tuple[Expr, str]]

_STRUCTURAL = {("floordiv", 1), ("mod", 1), ("pow", 1)}
_COMMUTATIVE = {"add", "mul", "minimum", "maximum", "eq", "ne", "and", "or", "xor"}
_SWAPPED = {"gt": "lt", "ge": "le"}
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True, eq=False, repr=False)
class Parameter(Expr):
    """A number that a kernel gets as an argument."""

    slot: int
    kind: str

    def __repr__(self) -> str:
        return f"p{self.slot}"


@dataclass(frozen=True)
class TableSlot:
    """An array that a kernel gets as an argument, in the place of the `Table` of a `Load`."""

    slot: int
    kind: str
    ndim: int
    dtype: str


@dataclass(frozen=True, eq=False, repr=False)
class LoadSlot(Expr):
    """An element of a table argument; an index out of range reads the nearest edge."""

    table: TableSlot
    indices: tuple[Expr, ...]
    kind: str

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.indices

    def __repr__(self) -> str:
        return f"t{self.table.slot}[{', '.join(map(repr, self.indices))}]"


@dataclass(frozen=True, eq=False, repr=False)
class AlignedSlot(Expr):
    """The entry at (b, h, row // block, j // block) of an array argument; axes of one entry have stride 0."""

    slot: int
    kind: str
    dtype: str
    block: int

    def __repr__(self) -> str:
        return f"a{self.slot}"


@dataclass(frozen=True, eq=False)
class Program:
    """The expressions of a call with their captured values taken out.

    Attributes
    ----------
    visible, score, keep : Expr or None
        Over symbols, `Parameter`, `LoadSlot` and `AlignedSlot`, and constants that are part of the structure.
    parameters : tuple of number
        Values of the `Parameter` nodes by slot.
    tables, aligned : tuple of array
        Arrays of the `LoadSlot` and `AlignedSlot` nodes by slot.
    key : str
        Hash of the structure: equal keys mean equal code.
    text : str
        The structure in full, a line a node, for people.
    """

    visible: Expr | None
    score: Expr | None
    parameters: tuple[bool | int | float, ...]
    tables: tuple[Array, ...]
    aligned: tuple[Array, ...]
    key: str
    text: str
    keep: Expr | None = None

    @property
    def functions(self) -> dict[str, Expr]:
        """The expressions that there are, by name."""
        named = {"visible": self.visible, "score": self.score, "keep": self.keep}
        return {name: root for name, root in named.items() if root is not None}

    @property
    def parameter_kinds(self) -> tuple[str, ...]:
        """Kinds of the parameters by slot."""
        return tuple(
            "bool" if isinstance(p, bool) else "int" if isinstance(p, int) else "float"
            for p in self.parameters
        )


def canonical(root: Expr) -> Expr:
    """An equal expression in one of the forms that mean the same.

    Comparisons point left (`<`, `<=`), a negation of integers' comparison is the opposite one, double
    negations, constant conditions and operations on constants only are gone, and operands of commutative
    operators are in the order of their structure.
    """
    done: dict[int, Expr] = {}
    order: _Hashes = {}
    for node in walk(root):
        children = tuple(done[id(c)] for c in node.children)
        same = all(a is b for a, b in zip(children, node.children, strict=True))
        new = node if same else node.rebuild(children)
        done[id(node)] = _simplify(new, order) if isinstance(new, Apply) else new
    return done[id(root)]


def lower(visible: Expr | None, score: Expr | None, keep: Expr | None = None) -> Program:
    """The program of bound expressions."""
    names: dict[int, int] = {}
    built: dict[int, Expr] = {}
    lines: list[str] = []
    parameters: list[Any] = []
    tables: dict[int, TableSlot] = {}
    table_values: list[Array] = []
    aligned: list[Array] = []

    def name(node: Expr, line: str) -> None:
        names[id(node)] = len(lines)
        lines.append(line)

    def place(node: Expr) -> None:
        if isinstance(node, Const):
            built[id(node)] = Parameter(len(parameters), node.kind)
            name(node, f"parameter {len(parameters)} {node.kind}")
            parameters.append(node.value)
        elif isinstance(node, Load):
            if id(node.table) not in tables:
                dtype = arrays.dtype_name(node.table.value)
                tables[id(node.table)] = TableSlot(len(tables), node.kind, node.table.ndim, dtype)
                table_values.append(node.table.value)
            slot = tables[id(node.table)]
            built[id(node)] = LoadSlot(slot, tuple(built[id(c)] for c in node.indices), node.kind)
            refs = " ".join(f"%{names[id(c)]}" for c in node.indices)
            name(node, f"load {slot.slot} {slot.dtype} {refs}")
        elif isinstance(node, Aligned):
            dtype = arrays.dtype_name(node.value)
            built[id(node)] = AlignedSlot(len(aligned), node.kind, dtype, node.block)
            name(node, f"aligned {len(aligned)} {dtype} block {node.block}")
            aligned.append(node.value)
        elif isinstance(node, Apply):
            structural = _structural(node)
            args = [c if n in structural else built[id(c)] for n, c in enumerate(node.args)]
            refs = " ".join(
                f"{c!r}:{c.kind}" if n in structural else f"%{names[id(c)]}" for n, c in enumerate(node.args)
            )
            built[id(node)] = Apply(node.op, tuple(args), node.kind)
            name(node, f"{node.op} {node.kind} {refs}")
        elif isinstance(node, Symbol):
            built[id(node)] = node
            name(node, node.name)
        else:
            raise TypeError(f"{type(node).__name__} must be bound before it is lowered")

    roots: list[Expr | None] = []
    named = {"visible": visible, "score": score} | ({} if keep is None else {"keep": keep})
    # All forms live until the end: nodes are told apart by their ids, which others get once they are gone.
    forms = {role: None if root is None else canonical(root) for role, root in named.items()}
    for role, root in forms.items():
        if root is None:
            roots.append(None)
            lines.append(f"{role} none")
            continue
        # A constant divisor is part of its operation; what else reads the same constant reads an argument.
        read = {id(root)}
        for node in walk(root):
            inline = _structural(node) if isinstance(node, Apply) else ()
            read.update(id(child) for n, child in enumerate(node.children) if n not in inline)
        for node in walk(root):
            if id(node) in read and id(node) not in built:
                place(node)
        roots.append(built[id(root)])
        lines.append(f"{role} %{names[id(root)]}")
    text = "\n".join(lines)
    key = _digest(text)[:32]
    visible, score, keep = (*roots, None)[:3]
    values = tuple(parameters), tuple(table_values), tuple(aligned)
    return Program(visible, score, *values, key, text, keep)


def _structural(node: Apply) -> set[int]:
    """Which arguments of an operation are constants that belong to the code."""
    return {n for n, a in enumerate(node.args) if isinstance(a, Const) and (node.op, n) in _STRUCTURAL}


def _simplify(node: Apply, order: _Hashes) -> Expr:
    op, args = node.op, node.args
    if op in _SWAPPED:
        op, args = _SWAPPED[op], args[::-1]
    if op == "not":
        return _negation(args[0], node, order)
    if op in ("and", "or"):
        neutral = op == "and"
        for n, a in enumerate(args):
            if isinstance(a, Const):
                return args[1 - n] if a.value is neutral else a
        if args[0] is args[1]:
            return args[0]
    if op == "where" and isinstance(args[0], Const) and args[1].kind == args[2].kind:
        return args[1] if args[0].value else args[2]
    if op in _COMMUTATIVE:
        args = tuple(sorted(args, key=lambda a: _structure(a, order)))
    same = op == node.op and all(a is b for a, b in zip(args, node.args, strict=True))
    return node if same else apply(op, *args)


def _negation(inner: Expr, node: Apply, order: _Hashes) -> Expr:
    if isinstance(inner, Const):
        return Const(not inner.value, "bool")
    if isinstance(inner, Apply) and inner.op == "not":
        return inner.args[0]
    # Not so for floats: neither comparison holds for NaN.
    if isinstance(inner, Apply) and inner.op in _OPPOSITE and all(a.kind == "int" for a in inner.args):
        opposite = apply(_OPPOSITE[inner.op], *inner.args)
        return _simplify(opposite, order) if isinstance(opposite, Apply) else opposite
    return node


def _structure(root: Expr, known: _Hashes) -> str:
    """A hash of the structure of `root` that no captured value has a part in."""
    for node in walk(root):
        if id(node) in known:
            continue
        if isinstance(node, Apply):
            fixed = [repr(node.args[n]) for n in sorted(_structural(node))]
            own = f"{node.op} {node.kind} {fixed}"
        elif isinstance(node, Symbol):
            own = node.name
        elif isinstance(node, Load):
            own = f"load {arrays.dtype_name(node.table.value)} {node.table.ndim}"
        elif isinstance(node, Aligned):
            own = f"aligned {arrays.dtype_name(node.value)} {node.block}"
        else:
            own = f"{type(node).__name__} {node.kind}"
        parts = [own, *(known[id(c)][1] for c in node.children)]
        known[id(node)] = (node, _digest("|".join(parts)))
    return known[id(root)][1]


def _digest(text: str) -> str:
    # It loads OpenSSL, a tenth of what importing anyattn would take.
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
