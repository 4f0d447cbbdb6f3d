"""Tracing: a user's Python function, called once with symbols, gives the expression that it computes.

What the function captures is swapped for stand-ins (`standins`) whose indexing builds `Load` nodes; the
function itself is not changed, a copy of it with other captures is called. Nothing is evaluated from text;
source is parsed only to word an error (`untraceable`, `definition`).
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from anyattn import arrays
from anyattn.errors import TraceError
from anyattn.expr.definition import Definition
from anyattn.expr.nodes import (
    SCORE,
    Apply,
    B,
    Expr,
    H,
    I,
    J,
    Load,
    NoValueError,
    apply,
    as_expr,
    load,
    walk,
)
from anyattn.expr.nodes import rewrite as rewritten
from anyattn.expr.standins import CapturedArray, Holder, Use, WholeArrayError
from anyattn.expr.tables import is_numbers
from anyattn.expr.untraceable import Place, advice, place_of, whole_array

__all__ = ["Read", "trace_mask", "trace_score", "words"]

Read = tuple[str, Any]


def trace_mask(function: Callable[..., Any], reads: list[Read] | None = None) -> Expr:
    """The expression of a mask function (b, h, i, j) -> bool.

    `reads` gets the captured arrays (name, array) whose values were read while it was traced.
    """
    traced = _Tracing(function, "mask", (B, H, I, J))
    result = traced.result("a condition", reads)
    if result.kind != "bool":
        raise traced.wrong_result(
            f"gives {result.kind}; wanted a condition: write {{result}} != 0, or give it to bias or score_mod"
        )
    return result


def trace_score(function: Callable[..., Any], reads: list[Read] | None = None) -> Expr:
    """The expression of a score function (score, b, h, i, j) -> score; `reads` as of `trace_mask`."""
    traced = _Tracing(function, "score_mod", (SCORE, B, H, I, J))
    result = traced.result("a score", reads)
    if result.kind == "bool":
        raise traced.wrong_result(
            "gives a condition; wanted a score: give the condition to mask, or write aa.where({result}, x, y)"
        )
    return result if result.kind == "float" else apply("truediv", result, 1)


# How deep arrays are looked for in captured objects: a dict in an object in a dict.
_DEPTH = 3


class Captures:
    """What one traced function sees in the place of what it captures."""

    def __init__(self) -> None:
        self._functions: dict[int, tuple[types.FunctionType, Any]] = {}
        self._holders: dict[int, Holder] = {}
        # By identity; a use keeps its array, so that the identity is not given to another.
        self._uses: dict[int, Use] = {}
        self.files: set[str] = set()

    def prepare(self, function: Any) -> Callable[..., Any]:
        """A callable as it is to be traced."""
        if isinstance(function, functools.partial):
            keywords = {name: self.swap(value, name) for name, value in function.keywords.items()}
            args = tuple(self.swap(value, f"argument {n}") for n, value in enumerate(function.args))
            return functools.partial(self.prepare(function.func), *args, **keywords)
        if isinstance(function, types.MethodType):
            return types.MethodType(self.prepare(function.__func__), self.swap(function.__self__, "self"))
        if isinstance(function, types.FunctionType):
            copy: Callable[..., Any] = self.function(function)
            return copy
        method = None if isinstance(function, type) else getattr(type(function), "__call__", None)  # noqa: B004
        if isinstance(method, types.FunctionType):
            return types.MethodType(self.function(method), self.swap(function, "self"))
        traced: Callable[..., Any] = function
        return traced

    def swap(self, value: Any, label: str) -> Any:
        """`value` as the traced function is to see it."""
        if isinstance(value, types.FunctionType):
            return value if _is_library(value.__module__) else self.function(value)
        if arrays.is_array(value) or is_numbers(value):
            return CapturedArray(self._uses.setdefault(id(value), Use(value, label)), label, self)
        if id(value) in self._holders:
            return self._holders[id(value)]
        if _holds_arrays(value, _DEPTH):
            self._holders[id(value)] = Holder(value, label, self)
            return self._holders[id(value)]
        return value

    def reads(self) -> list[Read]:
        """The arrays whose values the function read."""
        return [(use.label, use.value) for use in self._uses.values() if use.fixed == "values"]

    def noted(self, root: Expr) -> Expr:
        """`root`, whose tables say what the function made of them while it was traced."""
        noted = {
            id(table): replace(table, fixed=use.fixed)
            for use in self._uses.values()
            for table in use.tables.values()
            if use.fixed
        }

        def note(node: Expr) -> Expr:
            if isinstance(node, Load) and id(node.table) in noted:
                return load(noted[id(node.table)], node.indices)
            return node

        return rewritten(root, note) if noted else root

    def function(self, function: Any) -> Any:
        """A copy of `function` that sees what `swap` gives; `function` itself where that is the same."""
        if not isinstance(function, types.FunctionType):
            return function
        if id(function) not in self._functions:
            if not (self._functions and _is_library(function.__module__)):
                self.files.add(function.__code__.co_filename)
            # Recursive functions meet themselves unchanged.
            self._functions[id(function)] = (function, function)
            self._functions[id(function)] = (function, self._copy(function))
        return self._functions[id(function)][1]

    def _copy(self, function: types.FunctionType) -> types.FunctionType:
        code = function.__code__
        names = _used_names(code)
        known = function.__globals__
        scope = {n: self._global(known[n], n, names) for n in sorted(names) if n in known}
        changed = any(value is not known[n] for n, value in scope.items())
        cells = []
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # assigned after the function was made
                cells.append(cell)
                continue
            new = self._global(content, name, names)
            changed = changed or new is not content
            cells.append(cell if new is content else types.CellType(new))
        given = function.__defaults__ or ()
        first = code.co_argcount - len(given)
        defaults = tuple(self.swap(value, code.co_varnames[first + n]) for n, value in enumerate(given))
        changed = changed or any(a is not b for a, b in zip(defaults, given, strict=True))
        given_keywords = function.__kwdefaults__ or {}
        keywords = {name: self.swap(value, name) for name, value in given_keywords.items()}
        changed = changed or any(value is not given_keywords[name] for name, value in keywords.items())
        if not changed:
            return function
        copy = types.FunctionType(code, {**known, **scope}, function.__name__, defaults, tuple(cells))
        copy.__kwdefaults__ = keywords
        copy.__module__ = function.__module__
        return copy

    def _global(self, value: Any, label: str, names: set[str]) -> Any:
        if not isinstance(value, types.ModuleType) or _is_library(value.__name__):
            return self.swap(value, label)
        parts = [getattr(value, n) for n in names if n in vars(value)]
        if any(arrays.is_array(part) or self._is_traced(part, value) for part in parts):
            return self._holders.setdefault(id(value), Holder(value, label, self))
        return value

    def _is_traced(self, part: Any, module: types.ModuleType) -> bool:
        """Whether a function of a module reads captured arrays itself."""
        own = isinstance(part, types.FunctionType) and part.__module__ == module.__name__
        return own and self.function(part) is not part


# Their functions read no arrays of the user's, and are many: they are called as they are.
_LIBRARIES = sys.stdlib_module_names | {
    *("anyattn", "array_api_compat", "array_api_extra", "array_api_strict", "cupy", "cupyx", "dask", "jax"),
    *("jaxlib", "numpy", "scipy", "torch"),
}


def _is_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _LIBRARIES


def _holds_arrays(value: Any, depth: int) -> bool:
    if isinstance(value, (Expr, CapturedArray, type, types.ModuleType, types.FunctionType)):
        return False
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = getattr(value, "__dict__", {}).values()
        slots = getattr(type(value), "__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        parts = [*parts, *(getattr(value, name, None) for name in names)]
    return any(
        arrays.is_array(part) or is_numbers(part) or (depth > 1 and _holds_arrays(part, depth - 1))
        for part in parts
    )


def _used_names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes that a function and those inside it use."""
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _used_names(const)
    return names


# Longer expressions are not shown in the place of a lambda's name.
_SHOWN = 40


def words(function: Any, expr: Expr) -> str:
    """How a traced function is shown: its name, or what it computes where it is a small lambda."""
    name = getattr(function, "__name__", type(function).__name__)
    if name != "<lambda>":
        return str(name)
    sizes: dict[int, int] = {}
    for node in walk(expr):  # of the text: common parts are written each time
        sizes[id(node)] = 1 + sum(sizes[id(child)] for child in node.children)
    if sizes[id(expr)] > _SHOWN:
        return str(name)
    text = repr(expr)
    if isinstance(expr, Apply) and text.startswith("("):
        text = text[1:-1]
    names = "score, b, h, i, j" if expr.kind == "float" else "b, h, i, j"
    return f"lambda {names}: {text}"


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    return str(getattr(function, "__qualname__", None) or repr(function))


class _Tracing:
    """One tracing of a function, and the errors that say what is wrong with it."""

    def __init__(self, function: Callable[..., Any], argument: str, symbols: tuple[Expr, ...]):
        self._head = f"{argument} function {_name(function)}"
        self._names = ", ".join(s.name for s in symbols)  # type: ignore[attr-defined]
        self._definition = Definition(function)
        self._captures = Captures()
        self._function = function
        self._symbols = symbols

    def result(self, wanted: str, reads: list[Read] | None) -> Expr:
        """The expression that the function gives."""
        try:
            found = self._captures.prepare(self._function)(*self._symbols)
        except Exception as error:
            files = self._captures.files
            place = place_of(error, files)
            if place is None:  # the function was not entered
                unlike = self._definition.refuses(self._names)
                if unlike is not None:
                    raise self._untraceable(self._definition.place, unlike) from error
            raise self._untraceable(place, _message(error, place)) from error
        if found is None:
            raise self.wrong_result(f"gives None; wanted {wanted}: is a `return` missing?")
        try:
            if reads is not None:
                reads += self._captures.reads()
            return self._captures.noted(as_expr(found))
        except WholeArrayError as error:
            raise self.wrong_result(f"gives an array; wanted {wanted}: {error}") from error
        except TraceError as error:
            kind = f"{type(found).__module__}.{type(found).__qualname__}"
            raise self.wrong_result(f"gives {kind}; wanted {wanted}, an expression or a number") from error

    def wrong_result(self, words: str) -> TraceError:
        """The error about what the function returns; `{result}` in its words is that in the source."""
        place, returned = self._definition.result
        return TraceError(f"{self._head}{_line(place)}: {words.format(result=f'({returned})')}")

    def _untraceable(self, place: Place | None, words: str) -> TraceError:
        return TraceError(f"{self._head} could not be traced with ({self._names}){_line(place)}: {words}")


def _line(place: Place | None) -> str:
    return "" if place is None else f"\n  {place.file}:{place.line}: {place.text}\n "


# What other libraries say of an index or operand that is no number of theirs, and Python of an attribute.
_REFUSALS = re.compile(r"\b(Symbol|Apply|Load|Const|Aligned|CapturedArray)\b|only integers|must be integers")


def _message(error: Exception, place: Place | None) -> str:
    """What is wrong where an error arose, and what to write there."""
    words = None
    if isinstance(error, WholeArrayError):
        words = whole_array(place, error.label)
    elif _asks_for_a_value(error):
        words = advice(place)
    if words is not None:
        return words
    return str(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"


def _asks_for_a_value(error: Exception) -> bool:
    """Whether an error came from using an expression as if it were a number."""
    if isinstance(error, TraceError):
        return isinstance(error, NoValueError)
    return isinstance(error, (TypeError, ValueError, AttributeError, IndexError)) and bool(
        _REFUSALS.search(str(error))
    )
