"""What to write instead of a line that cannot be traced.

A traced function runs once with symbols, so an error tells which instruction refused them, not which
construct the user wrote. The instruction's place in the source (PEP 657) is looked up in the syntax tree of
the file, and the construct around it is shown as it could be written. The tree is only read.
"""

from __future__ import annotations

import ast
import linecache
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Place", "advice", "place_of", "tree_of", "whole_array"]

_FUNCTIONS = ("exp", "log", "tanh", "sqrt", "floor")
_SAME = {
    **{name: f"aa.{name}" for name in _FUNCTIONS},
    "min": "aa.minimum",
    "max": "aa.maximum",
    "minimum": "aa.minimum",
    "maximum": "aa.maximum",
    "fmin": "aa.minimum",
    "fmax": "aa.maximum",
    "where": "aa.where",
    "clip": "aa.clip",
    "clamp": "aa.clip",
    "sigmoid": "aa.sigmoid",
    "expit": "aa.sigmoid",
    "abs": "abs",
    "fabs": "abs",
    "absolute": "abs",
}
_LOGIC = {"logical_and": "&", "logical_or": "|", "logical_xor": "^"}
# CPython 3.11 counts the depth of a tree for all threads together, and fails where two parse at once.
_parsing = threading.Lock()
_KNOWN = (
    "operators, abs, aa.where, aa.clip, aa.minimum, aa.maximum, aa.exp, aa.log, aa.tanh, aa.sqrt, "
    "aa.sigmoid, aa.floor and captured arrays indexed by index expressions"
)


@dataclass(frozen=True)
class Place:
    """Where in the user's source an error arose: a range of lines and of bytes in them."""

    file: str
    line: int
    end_line: int
    start: int
    end: int

    @property
    def text(self) -> str:
        """The offending line."""
        return linecache.getline(self.file, self.line).strip()

    def within(self, node: ast.AST) -> bool:
        """Whether the place lies in the source of `node`."""
        first = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
        last = (getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0))
        return first <= (self.line, self.start) and (self.end_line, self.end) <= last

    def is_all_of(self, node: ast.expr | ast.stmt) -> bool:
        """Whether the place is the source of `node`."""
        own = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
        return own == (self.line, self.start, self.end_line, self.end)


def place_of(error: BaseException, files: set[str]) -> Place | None:
    """The last place in one of `files` that the error passed through."""
    found = None
    entry = error.__traceback__
    while entry is not None:
        code = entry.tb_frame.f_code
        if code.co_filename in files:
            found = _place(code, entry.tb_lasti, entry.tb_lineno)
        entry = entry.tb_next
    return found


def _place(code: types.CodeType, instruction: int, line: int | None) -> Place | None:
    positions = list(code.co_positions())[instruction // 2] if instruction >= 0 else (line, line, None, None)
    first, last, start, end = positions
    if first is None:
        return None if line is None else Place(code.co_filename, line, line, 0, 0)
    return Place(code.co_filename, first, last or first, start or 0, end or 0)


def advice(place: Place | None) -> str | None:
    """How the construct at a place can be written, or None where it is not one that is known."""
    if place is None:
        return None
    for node in reversed(_around(place)):
        rule = _RULES.get(type(node))
        words = None if rule is None else rule(node, place)
        if words is not None:
            return words
    return None


def whole_array(place: Place | None, label: str) -> str | None:
    """How `(label * 2)[h]` can be written: index first, then compute."""
    for node in reversed([] if place is None else _around(place)):
        if isinstance(node, ast.Subscript) and place is not None and place.within(node.value):
            computed = _write(node.value)
            parsed = ast.parse(computed, mode="eval").body
            written = _write(_Indexed(label, node.slice).visit(parsed))
            if written != computed:
                return (
                    f"{computed} computes with a whole array; compute it outside the function, "
                    f"or write {written}"
                )
    return None


class _Indexed(ast.NodeTransformer):
    """Puts an index behind every use of an array."""

    def __init__(self, label: str, index: ast.expr):
        self.label = label
        self.index = index

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and _write(node) == self.label:
            return ast.Subscript(node, self.index)
        if isinstance(node, ast.Subscript) and _write(node.value) == self.label:
            return node
        return self.generic_visit(node)


def _around(place: Place) -> list[ast.AST]:
    """The constructs of a function that a place lies in, the outer ones first."""
    tree = tree_of(place.file)
    # `walk` goes by depth: what contains comes before what is contained.
    found = [] if tree is None else [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    around = [node for node in found if place.within(node)]
    # What a function is written in, a list or a loop over functions, is none of its code.
    functions = [n for n, node in enumerate(around) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    return around[functions[-1] :] if functions else around


def tree_of(file: str) -> ast.Module | None:
    """The syntax tree of a source file, or None where there is none that can be read."""
    source = "".join(linecache.getlines(file))
    try:
        with _parsing:
            return ast.parse(source) if source else None
    except SyntaxError:  # a file that changed, or a notebook cell with magics
        return None


def _write(node: ast.AST) -> str:
    return ast.unparse(node)


def _joined(parts: list[ast.expr], sign: str) -> str:
    return f" {sign} ".join(f"({_write(part)})" for part in parts)


def _if_expression(node: ast.IfExp, place: Place) -> str | None:
    # A test that is one name has the place of all of it.
    if not (place.within(node.test) or place.is_all_of(node)):
        return None
    parts = ", ".join(map(_write, (node.test, node.body, node.orelse)))
    return f"`if` decides once for all indices; write aa.where({parts})"


def _statement(node: ast.If | ast.While | ast.Assert, place: Place) -> str | None:
    # pytest puts all of an `assert` in the place of its condition.
    if not (place.within(node.test) or place.is_all_of(node)):
        return None
    word = type(node).__name__.lower()
    if isinstance(node, ast.If):
        return f"`if` decides once for all indices; write aa.where({_write(node.test)}, x, y)"
    return f"`{word}` needs one truth value, and {_write(node.test)} has one at each index"


def _match(node: ast.Match, place: Place) -> str | None:
    cases = [part for case in node.cases for part in (case.pattern, case.guard) if part is not None]
    if not any(place.within(part) for part in cases):
        return None
    subject = _write(node.subject)
    return f"`match` decides once for all indices; write aa.where({subject} == value, x, y) for each case"


def _logic(node: ast.BoolOp, place: Place) -> str:
    word, sign = ("and", "&") if isinstance(node.op, ast.And) else ("or", "|")
    return f"`{word}` asks for one truth value; write {_joined(node.values, sign)}"


def _shift(node: ast.BinOp, place: Place) -> str | None:
    """`i >> 1` is `i // 2`; the other operators that symbols refuse have no other form."""
    if not (place.is_all_of(node) and isinstance(node.op, (ast.RShift, ast.LShift))):
        return None
    return f"indices are not shifted; write {_write(_unshifted(node.left, node.op, node.right))}"


def _shift_in_place(node: ast.AugAssign, place: Place) -> str | None:
    if not (place.is_all_of(node) and isinstance(node.op, (ast.RShift, ast.LShift))):
        return None
    target = ast.parse(_write(node.target), mode="eval").body
    written = _write(_unshifted(target, node.op, node.value))
    return f"indices are not shifted; write {_write(node.target)} = {written}"


def _unshifted(value: ast.expr, op: ast.operator, by: ast.expr) -> ast.expr:
    power: ast.expr = ast.BinOp(ast.Constant(2), ast.Pow(), by)
    if isinstance(by, ast.Constant) and isinstance(by.value, int) and 0 <= by.value < 64:
        power = ast.Constant(2**by.value)
    return ast.BinOp(value, ast.FloorDiv() if isinstance(op, ast.RShift) else ast.Mult(), power)


def _not(node: ast.UnaryOp, place: Place) -> str | None:
    if not isinstance(node.op, ast.Not):
        return None
    return f"`not` asks for one truth value; write ~({_write(node.operand)})"


def _comparison(node: ast.Compare, place: Place) -> str | None:
    if isinstance(node.ops[0], (ast.In, ast.NotIn)):
        return _membership(node)
    if len(node.ops) == 1:
        return None
    terms = [node.left, *node.comparators]
    pairs: list[ast.expr] = [
        ast.Compare(left, [op], [right])
        for left, op, right in zip(terms[:-1], node.ops, terms[1:], strict=True)
    ]
    return f"a chained comparison asks for one truth value; write {_joined(pairs, '&')}"


def _membership(node: ast.Compare) -> str:
    word = "in" if isinstance(node.ops[0], ast.In) else "not in"
    container = node.comparators[0]
    if isinstance(container, (ast.Tuple, ast.List, ast.Set)) and container.elts:
        equal: list[ast.expr] = [ast.Compare(node.left, [ast.Eq()], [item]) for item in container.elts]
        written = _joined(equal, "|")
        return f"`{word}` asks for one truth value; write {written if word == 'in' else f'~({written})'}"
    return (
        f"`{word}` asks for one truth value; read a captured boolean array, "
        f"flags[{_write(node.left)}], or compare with each value and join with |"
    )


def _call(node: ast.Call, place: Place) -> str | None:
    if not place.is_all_of(node):
        return None
    name = _write(node.func)
    own = name.rpartition(".")[2]
    arguments = ", ".join(map(_write, node.args))
    if name.startswith(("aa.", "anyattn.")):
        return None
    numbers = node.args
    if name in ("min", "max") and len(numbers) == 1 and isinstance(numbers[0], (ast.List, ast.Tuple)):
        numbers = numbers[0].elts
    if own in ("min", "max", "minimum", "maximum", "fmin", "fmax") and len(numbers) > 1:
        written = _write(numbers[0])
        for other in numbers[1:]:
            written = f"{_SAME[own]}({written}, {_write(other)})"
        return f"{name} cannot be traced; write {written}"
    if own in _SAME:
        return f"{name} cannot be traced; write {_SAME[own]}({arguments})"
    if own in _LOGIC:
        return f"{name} cannot be traced; write {_joined(node.args, _LOGIC[own])}"
    if own == "logical_not":
        return f"{name} cannot be traced; write ~({arguments})"
    if own == "pow":
        return f"{name} cannot be traced; write {' ** '.join(f'({_write(a)})' for a in node.args[:2])}"
    if name in _BUILTINS:
        return _BUILTINS[name].format(arguments)
    return f"{name} cannot be traced: it is not made for symbols; a traced function may use {_KNOWN}"


_BUILTINS = {
    "int": "int() asks for a number and {0} has none yet; write aa.floor({0}), or // instead of /",
    "float": "float() asks for a number and {0} has none yet; leave it out, or divide by 1",
    "bool": "bool() asks for one truth value; write ({0}) != 0",
    "round": "round() asks for a number and {0} has none yet; write aa.floor({0} + 0.5)",
    "range": "range() asks for a number and {0} has none yet; loop over known bounds",
    "any": "any() asks for one truth value; join conditions with |",
    "all": "all() asks for one truth value; join conditions with &",
    "len": "{0} has no length: it stands for one number at each index",
    "sum": "sum() needs numbers that are known while tracing; add them with +",
    "str": "{0} is not a number yet, so there is nothing to write out",
}


def _loop(node: ast.For, place: Place) -> str | None:
    return _no_loop(node.iter) if place.within(node.iter) else None


def _no_loop(iterable: ast.expr) -> str:
    return (
        f"{_write(iterable)} cannot be looped over: it stands for one number at each index, "
        f"and the function is called once for all of them"
    )


def _comprehension(
    node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, place: Place
) -> str | None:
    for part in node.generators:
        for condition in part.ifs:
            if place.within(condition):
                return f"`if` decides once for all indices; write aa.where({_write(condition)}, x, y)"
        # Python 3.11 puts all of a comprehension in the place of what it loops over.
        if place.within(part.iter) or place.is_all_of(node):
            return _no_loop(part.iter)
    return None


def _format(node: ast.JoinedStr, place: Place) -> str:
    return "an f-string needs values, and a traced value has none yet ({x!r} shows the expression)"


def _attribute(node: ast.Attribute, place: Place) -> str | None:
    if not place.is_all_of(node):
        return None
    value = _write(node.value)
    if isinstance(node.ctx, (ast.Store, ast.Del)):
        return f"{value}.{node.attr} is written to: a traced function must not change what it captures"
    if node.attr in _SAME:
        return f"{value} is a number, not an array; write {_SAME[node.attr]}(...)"
    return f"{value} is a number and has no attributes; a traced function may use {_KNOWN}"


def _subscript(node: ast.Subscript, place: Place) -> str | None:
    if not place.is_all_of(node):
        return None
    array, index = _write(node.value), _write(node.slice)
    if isinstance(node.ctx, (ast.Store, ast.Del)):
        return f"{array} is written to: a traced function may read arrays and must not change them"
    return (
        f"{array} cannot be read at [{index}]: only arrays that the function captures can be (a variable or "
        f"default, an attribute or item of one); make it outside the function, and stack a list of arrays "
        f"to one array"
    )


_RULES: dict[type[ast.AST], Callable[..., str | None]] = {
    ast.IfExp: _if_expression,
    ast.If: _statement,
    ast.While: _statement,
    ast.Assert: _statement,
    ast.Match: _match,
    ast.BoolOp: _logic,
    ast.BinOp: _shift,
    ast.AugAssign: _shift_in_place,
    ast.UnaryOp: _not,
    ast.Compare: _comparison,
    ast.Call: _call,
    ast.For: _loop,
    ast.ListComp: _comprehension,
    ast.SetComp: _comprehension,
    ast.DictComp: _comprehension,
    ast.GeneratorExp: _comprehension,
    ast.JoinedStr: _format,
    ast.Subscript: _subscript,
    ast.Attribute: _attribute,
}
