"""Numba source of a program: a module of scalar functions that a kernel calls inside its loop over keys.

The text depends on the structure alone, so it may be kept under the program's key. Written for LLVM to turn
that loop into vector instructions: no branch (`_where` has both values at hand and becomes a select), no
exception (error model "numpy"), no wrap-around of negative indices (they are unsigned by then), and no call
of the C library for exp, log, tanh and sigmoid, which are those of `anyattn_numba.vector_math`. No fast-math
flag is set, because all of them that help here let NaN or infinity be assumed away; NaN at a seen key must
arrive. 16-bit floats arrive as their bits, which every processor can convert with integer operations. With
NUMBA_DISABLE_JIT=1 the module is plain Python over NumPy scalars and can be stepped through.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

from anyattn.arrays import Array
from anyattn.expr.nodes import Apply, Expr
from anyattn.expr.program import AlignedSlot, LoadSlot, Program
from anyattn.expr.statements import Body, aligned_slots, body, table_slots
from anyattn.expr.writer import ATOM, Form, Text, Writer, called

__all__ = ["numba_arguments", "numba_source"]

_WIDTH = 100
_BITS = {"float16": "uint16", "bfloat16": "uint16"}


def numba_source(
    program: Program,
    accumulate: str,
    *,
    index: str = "int64",
    split: bool = False,
    entries: bool = False,
    title: str = "",
    inline: str = 'inline = numba.njit(forceinline=True, error_model="numpy")',
) -> str:
    """A Python module with the functions `visible`, `score` and `keep` of a program, where it has them.

    `visible(b, h, row, i, j, *captured)` tells whether the key is seen,
    `score(s, b, h, row, i, j, *captured)` what becomes of the score s, and
    `keep(b, h, row, i, j, *captured)` what the weight is multiplied by. `captured` are the values of
    `numba_arguments`, of the types `CAPTURED` of the module: parameters p0, ..., tables t0, ..., aligned
    arrays a0, ...

    Parameters
    ----------
    program : Program
    accumulate : {"float32", "float64"}
        The dtype in which floats are computed; the score has it.
    index : {"int64", "int32"}
        The dtype of the indices, in which integers are computed. Integers are int64 in meaning; "int32", of
        which a vector holds twice as many, is right only where the caller has proved that no integer of the
        program, on the way too, leaves 32 bits.
    split : bool, default False
        Write each function as two: `visible_row(b, h, row, i, *captured)` gives a tuple of what is the same
        for all keys of a row, and `visible(r, b, h, row, i, j, *captured)` takes it first.
    entries : bool, default False
        Take the entries of aligned arrays at the pair instead of the arrays: a0, ... are numbers of
        `accumulate` then, 0 or 1 of a boolean array. What is the same for a row does without them.
    title : str
        A line for the reader at the top of the module, such as the mask that it was made for.
    inline : str
        The statement that names what compiles the functions.
    """
    writer = _Writer(accumulate, index, entries)
    captured = _captured_names(program)
    of_row = captured[: len(captured) - len(program.aligned)] if entries else captured
    functions = []
    for name, root in program.functions.items():
        functions.append(writer.function(name, body(root), captured, of_row, split))
    table = _HELPERS | (_HELPERS_OF_INT32 if index == "int32" else {})
    helpers = [text.format(float=accumulate) for text in called(table, functions)]
    imported = ", ".join(called({name: name for name in _functions(accumulate).values()}, functions))
    types = _types(program, accumulate, index, entries)
    head = [
        f'"""{_docstring(program, accumulate, index, title)}"""',
        "",
        "from __future__ import annotations",
        "",
    ]
    head += ["import numba", "import numpy as np", "from numba import types", ""]
    head += [f"from anyattn_numba.vector_math import {imported}", ""] if imported else []
    head += ["# Types of the captured arguments, in order.", f"CAPTURED = {types}", ""]
    head += [inline]
    return "\n".join(head) + "\n\n\n" + "\n\n\n".join([*helpers, *functions]) + "\n"


def numba_arguments(
    program: Program, accumulate: str, aligned: tuple[Array, ...], index: str = "int64"
) -> tuple[Any, ...]:
    """The captured arguments of the functions of a program whose arrays are NumPy arrays.

    `aligned` are its aligned arrays as `aligned_view` gives them. Nothing is copied; arrays are read-only
    views and 16-bit floats views of their bits, so that the types are those of `CAPTURED`.
    """
    import numpy

    kinds = {"bool": numpy.bool_, "int": getattr(numpy, index), "float": getattr(numpy, accumulate)}
    numbers = [kinds[k](p) for k, p in zip(program.parameter_kinds, program.parameters, strict=True)]
    found = [(slot.dtype, x) for slot, x in zip(table_slots(program), program.tables, strict=True)]
    found += [(slot.dtype, x) for slot, x in zip(aligned_slots(program), aligned, strict=True)]
    arrays = []
    for dtype, x in found:
        view = x.view(_BITS.get(dtype, x.dtype))
        view.flags.writeable = False
        arrays.append(view)
    return (*numbers, *arrays)


# How strongly the operators bind.
_TERNARY, _COMPARISON, _OR, _XOR, _AND, _SHIFT, _SUM, _PRODUCT, _SIGN = range(9)


def _compared(sign: str) -> Form:
    return Form(f"{{}} {sign} {{}}", _COMPARISON, (_OR, _OR))


_FORMS: dict[str, Form | str] = {
    "add": Form("{} + {}", _SUM, (_SUM, _PRODUCT)),
    "sub": Form("{} - {}", _SUM, (_SUM, _PRODUCT)),
    "mul": Form("{} * {}", _PRODUCT, (_PRODUCT, _SIGN)),
    "truediv": Form("{} / {}", _PRODUCT, (_PRODUCT, _SIGN)),
    "floordiv int": "_floordiv",
    "floordiv constant": Form("{} // {}", _PRODUCT, (_PRODUCT, _SIGN)),
    "floordiv power": Form("{} >> {}", _SHIFT, (_SHIFT, ATOM)),
    "floordiv float": "_floordiv_float",
    "mod int": "_mod",
    "mod constant": Form("{} % {}", _PRODUCT, (_PRODUCT, _SIGN)),
    "mod power": Form("{} & {}", _AND, (_AND, ATOM)),
    "mod float": "_mod_float",
    "pow 2": Form("{0} * {0}", _PRODUCT, (ATOM,)),
    "pow 3": Form("{0} * {0} * {0}", _PRODUCT, (ATOM,)),
    "pow 4": Form("{0} * {0} * {0} * {0}", _PRODUCT, (ATOM,)),
    "pow int": "_power",
    "pow float": "_power_float",
    "neg": Form("-{}", _SIGN, (ATOM,)),
    "abs": "abs",
    "minimum int": "min",
    "minimum float": "_minimum",
    "maximum int": "max",
    "maximum float": "_maximum",
    "lt": _compared("<"),
    "le": _compared("<="),
    "gt": _compared(">"),
    "ge": _compared(">="),
    "eq": _compared("=="),
    "ne": _compared("!="),
    "and": Form("{} & {}", _AND, (_AND, _AND)),
    "or": Form("{} | {}", _OR, (_OR, _OR)),
    "xor": Form("{} ^ {}", _XOR, (_XOR, _XOR)),
    "not": Form("not {}", _TERNARY, (_COMPARISON,)),
    "where": "_where",
    "sqrt": "np.sqrt",
    "floor": "np.floor",
    "philox": "_philox",
}


_WIDENED = ("add", "sub", "mul", "floordiv", "mod", "pow", "neg", "philox")


class _Writer(Writer):
    half = "_half"
    bfloat = "_bfloat"

    def __init__(self, accumulate: str, index: str, entries: bool):
        self.entries = entries
        self.float = f"np.{accumulate}"
        self.int = f"np.{index}"
        self.forms = _FORMS | _functions(accumulate)
        super().__init__(accumulate, {"int": self.int, "float": self.float}, (index, accumulate))

    def function(self, name: str, parts: Body, captured: list[str], of_row: list[str], split: bool) -> str:
        self.names = {}
        where = ["b", "h", "row", "i"]
        first = ["s"] if name == "score" else []
        row = [self.statement(*part) for part in parts.row]
        key = [self.statement(*part) for part in parts.key]
        key = [*key, f"return {self.whole(parts.result)}"]
        if not split:
            return _function(name, [*first, *where, "j", *captured], [*row, *key])
        names = [n for n, _ in parts.row]
        together = ", ".join(names) + ("," if len(names) == 1 else "")
        row.append(f"return ({together})")
        if names:
            key.insert(0, f"({together}) = r" if len(names) == 1 else f"{together} = r")
        return "\n\n\n".join(
            [
                _function(f"{name}_row", [*where, *of_row], row),
                _function(name, [*first, "r", *where, "j", *captured], key),
            ]
        )

    def statement(self, name: str, node: Expr) -> str:
        line = f"{name} = {self.whole(node)}"
        self.names[id(node)] = name
        return line

    def expression(self, node: Expr) -> Text:
        if not self.entries or not isinstance(node, AlignedSlot) or id(node) in self.names:
            return super().expression(node)
        entry = f"a{node.slot}"
        return Text(f"{entry} != 0", _COMPARISON) if node.kind == "bool" else Text(entry)

    def apply(self, node: Apply) -> Text:
        found = super().apply(node)
        # Numba gives int64 to these; the compiler takes that back where it sees the conversion.
        narrows = self.int == "np.int32" and node.kind == "int" and node.op in _WIDENED
        return Text(f"{self.int}({found.text})") if narrows else found

    def constant(self, value: float, kind: str) -> Text:
        if kind != "float":
            value = int(value) if kind == "int" else bool(value)
            return Text(repr(value), ATOM if value >= 0 else _SIGN)
        text = repr(float(value)) if math.isfinite(value) else f"np.{value}".replace("-inf", "inf")
        return Text(f"{self.float}({'-' if value == -math.inf else ''}{text})")

    def parameter(self, slot: int) -> str:
        return f"p{slot}"

    def element(self, node: LoadSlot, indices: list[str]) -> str:
        table = f"t{node.table.slot}"
        inside = [
            f"{'_inside_float' if x.kind == 'float' else '_inside'}({index}, {table}.shape[{axis}])"
            for axis, (x, index) in enumerate(zip(node.indices, indices, strict=True))
        ]
        return f"{table}[{', '.join(inside) or '()'}]"

    def entry(self, node: AlignedSlot, row: Text, j: Text) -> str:
        return f"a{node.slot}[np.uintp(b), np.uintp(h), np.uintp({row.text}), np.uintp({j.text})]"


# How an operation is written that Numba has not, or has with a branch, an exception or another meaning.
_HELPERS = {
    "_where": """\
@inline
def _where(condition, x, y):
    return x if condition else y""",
    "_inside": '''\
@inline
def _inside(index, size):
    """The nearest index of an axis."""
    return np.uintp(min(max(index, 0), size - 1))''',
    "_inside_float": '''\
@inline
def _inside_float(index, size):
    """The nearest index of an axis; NaN gives 0, and what is too large for an integer is not converted."""
    last = np.{float}(size - 1)
    index = index if index > 0 else np.{float}(0)
    return np.uintp(min(np.int64(index if index < last else last), size - 1))''',
    "_half": '''\
@inline
def _half(bits):
    """float16 from its bits: the exponent is moved, subnormal numbers come right by the multiplication."""
    bits = np.uint32(bits)
    size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    value = size.view(np.float32) * np.float32(2.0**112)
    special = np.uint32(size | np.uint32(0x7F800000)).view(np.float32)
    value = special if size >= np.uint32(0x0F800000) else value
    return -value if bits & np.uint32(0x8000) else value''',
    "_bfloat": '''\
@inline
def _bfloat(bits):
    """bfloat16 from its bits, the upper half of a float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)''',
    "_minimum": '''\
@inline
def _minimum(x, y):
    """The smaller one; NaN if either is."""
    return x if (x < y) | (x != x) else y''',
    "_maximum": '''\
@inline
def _maximum(x, y):
    """The larger one; NaN if either is."""
    return x if (x > y) | (x != x) else y''',
    "_floordiv": '''\
@inline
def _floordiv(x, y):
    """x // y; 0 where y is 0, as in NumPy."""
    quotient = x // (y if y != 0 else 1)
    return quotient if y != 0 else 0''',
    "_mod": '''\
@inline
def _mod(x, y):
    """x % y, of the sign of y; 0 where y is 0, as in NumPy."""
    return x % (y if y != 0 else 1)''',
    "_mod_float": '''\
@inline
def _mod_float(x, y):
    """x % y, of the sign of y."""
    remainder = np.fmod(x, y)
    return remainder + y if (remainder != 0) & ((remainder < 0) != (y < 0)) else remainder''',
    "_floordiv_float": '''\
@inline
def _floordiv_float(x, y):
    """x // y: the quotient of what fmod leaves, so that rounding does not make it one too many."""
    remainder = np.fmod(x, y)
    quotient = (x - remainder) / y
    quotient -= np.{float}((remainder != 0) & ((remainder < 0) != (y < 0)))
    whole = np.floor(quotient)
    whole += np.{float}(quotient - whole > np.{float}(0.5))
    return whole if y != 0 else x / y''',
    "_power": """\
@inline
def _power(x, n):
    result = np.int64(1)
    for _ in range(n):
        result *= x
    return result""",
    "_power_float": """\
@inline
def _power_float(x, y):
    return np.{float}(x**y)""",
    "_philox": '''\
@inline
def _philox(key0, key1, x, y, z, w):
    """The upper 24 bits of the first word of Philox4x32-10 (Salmon et al., 2011)."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = np.uint64(key0) & mask, np.uint64(key1) & mask
    x, y, z, w = np.uint64(x) & mask, np.uint64(y), np.uint64(z) & mask, np.uint64(w)
    for n in range(10):
        left, right = x * np.uint64(0xD2511F53), z * np.uint64(0xCD9E8D57)
        x, y = ((right >> half) ^ y ^ (key0 + np.uint64(n * 0x9E3779B9))) & mask, right
        z, w = ((left >> half) ^ w ^ (key1 + np.uint64(n * 0xBB67AE85))) & mask, left
    return np.int64(x >> np.uint64(8))''',
}

_HELPERS_OF_INT32 = {
    "_inside": '''\
@inline
def _inside(index, size):
    """The nearest index of an axis."""
    last = np.int32(min(size - 1, 0x7FFFFFFF))
    return np.uintp(min(max(index, np.int32(0)), last))''',
}


def _functions(accumulate: str) -> dict[str, str]:
    """Names in `anyattn_numba.vector_math`, by operation."""
    return {name: f"{name}_{accumulate}" for name in ("exp", "log", "tanh", "sigmoid")}


def _function(name: str, arguments: list[str], lines: list[str]) -> str:
    listed = ", ".join(arguments)
    if len(listed) > _WIDTH:
        listed = "\n" + textwrap.indent(textwrap.fill(f"{listed},", _WIDTH), "    ") + "\n"
    return "\n".join(["@inline", f"def {name}({listed}):", *(f"    {line}" for line in lines)])


def _captured_names(program: Program) -> list[str]:
    return [
        *(f"p{n}" for n in range(len(program.parameters))),
        *(f"t{n}" for n in range(len(program.tables))),
        *(f"a{n}" for n in range(len(program.aligned))),
    ]


def _types(program: Program, accumulate: str, index: str, entries: bool) -> str:
    kinds = {"bool": "boolean", "int": index, "float": accumulate}
    found = [f"types.{kinds[k]}" for k in program.parameter_kinds]
    arrays = [(slot.dtype, slot.ndim) for slot in table_slots(program)]
    if not entries:
        arrays += [(slot.dtype, 4) for slot in aligned_slots(program)]
    for dtype, ndim in arrays:
        name = "boolean" if dtype.startswith("bool") else _BITS.get(dtype, dtype)
        found.append(f'types.Array(types.{name}, {ndim}, "A", readonly=True)')
    if entries:
        found += [f"types.{accumulate}"] * len(program.aligned)
    if len(found) < 2:
        return f"({found[0]},)" if found else "()"
    return "(\n    " + ",\n    ".join(found) + ",\n)"


def _docstring(program: Program, accumulate: str, index: str, title: str) -> str:
    lines = [f"Scalar functions of program {program.key}, floats in {accumulate}."]
    if index != "int64":
        lines[0] = f"{lines[0][:-1]}, integers in {index}."
    if title:
        lines += ["", title]
    lines += [
        "",
        "Captured values are arguments: p numbers, t tables, a arrays along (b, h, row, j). Of the locals,",
        "r are the same for all keys of a row and x are of one key.",
    ]
    return "\n".join(lines) + "\n"
