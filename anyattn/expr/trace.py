"""Tracing: a user's Python function, called once with symbols, gives the expression that it computes.

Arrays and number sequences that the function captures (closure, globals, defaults, also through helper
functions, objects, modules and containers that hold them) are swapped for stand-ins whose indexing builds
`Load` nodes; the function itself is not changed, a copy of it with other captures is called. Nothing is
evaluated from text; source is parsed only to word an error (`untraceable`).
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from anyattn import arrays
from anyattn.errors import TraceError
from anyattn.expr.nodes import SCORE, Apply, B, Expr, H, I, J, NoValueError, Table, apply, as_expr, load, walk
from anyattn.expr.untraceable import advice, place_of

__all__ = ["table_of", "trace_mask", "trace_score", "words"]


def trace_mask(function: Callable[..., Any]) -> Expr:
    """The expression of a mask function (b, h, i, j) -> bool."""
    result = _call(function, "mask", (B, H, I, J))
    if result.kind != "bool":
        raise TraceError(
            f"mask function {_name(function)} gives {result.kind}; wanted a condition "
            f"(a number goes to bias or score_mod)"
        )
    return result


def trace_score(function: Callable[..., Any]) -> Expr:
    """The expression of a score function (score, b, h, i, j) -> score."""
    result = _call(function, "score_mod", (SCORE, B, H, I, J))
    if result.kind == "bool":
        raise TraceError(
            f"score_mod function {_name(function)} gives a condition; wanted a score "
            f"(a condition goes to mask)"
        )
    return result if result.kind == "float" else apply("truediv", result, 1)


def table_of(
    value: Any, label: str, axes: tuple[str | None, ...] | None = None, *, host: bool = False
) -> Table:
    """The table node of a captured array, or of numbers that every library gets a copy of.

    Rectangular sequences of numbers are such `host` data, and so are NumPy arrays that anyattn made itself.
    """
    if arrays.is_array(value) and arrays.refused_type(value):
        raise TypeError(f"{label}: {type(value).__name__} is not taken, {arrays.refused_type(value)}")
    if not arrays.is_array(value):
        import numpy

        host = True
        try:
            value = numpy.asarray(value)
        except ValueError as error:
            raise ValueError(f"{label}: wanted numbers in equally long rows, got {value!r}") from error
        if value.size == 0:
            value = value.astype(int)
    kind = arrays.kind(value)
    if kind not in ("bool", "int", "float"):
        raise TypeError(f"{label}: wanted a bool, integer or real float array, got dtype {kind}")
    if axes is not None and value.ndim != len(axes):
        raise ValueError(f"{label}: wanted {len(axes)} axes, got shape {tuple(value.shape)}")
    return Table(value, kind, value.ndim, axes or (None,) * value.ndim, label, host)


class _Captured:
    """Stands for a captured array in a traced function: indexing builds a `Load`, the rest is the array's."""

    __array_ufunc__ = None

    def __init__(self, value: Any, label: str, indices: tuple[Expr, ...] = ()):
        self._value = value
        self._label = label
        self._indices = indices

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if not self._indices and not any(isinstance(k, (Expr, _Captured)) for k in keys):
            part = self._value[key]
            known = arrays.is_array(part) or _is_numbers(part)
            return _Captured(part, f"{self._label}[{key!r}]") if known else part
        indices = list(self._indices)
        for k in keys:
            index = as_expr(k)
            whole = index.kind == "int" or (isinstance(index, Apply) and index.op == "floor")
            if not whole:
                raise TraceError(
                    f"{self._label}: index {index!r} is {index.kind}; wanted an integer (aa.floor gives one)"
                )
            indices.append(index)
        table = table_of(self._value, self._label)
        if len(indices) > table.ndim:
            raise TraceError(f"{self._label}: {len(indices)} indices for an array of {table.ndim} axes")
        if len(indices) == table.ndim:
            return load(table, tuple(indices))
        return _Captured(self._value, self._label, tuple(indices))

    def __anyattn_expr__(self) -> Expr:
        table = table_of(self._value, self._label)
        if len(self._indices) < table.ndim:
            raise TraceError(
                f"{self._label}: an array of {table.ndim} axes was used with "
                f"{len(self._indices)} indices; index every axis"
            )
        return load(table, self._indices)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise NoValueError(f"{self._label}: a traced function may read captured arrays, not change them")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        if self._indices:
            raise NoValueError(
                f"{self._label}: an element that is read while the kernel runs has no truth value yet"
            )
        return bool(self._value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value)


for _op, _names in {
    "add": ("__add__", "__radd__"),
    "sub": ("__sub__", "__rsub__"),
    "mul": ("__mul__", "__rmul__"),
    "truediv": ("__truediv__", "__rtruediv__"),
    "floordiv": ("__floordiv__", "__rfloordiv__"),
    "mod": ("__mod__", "__rmod__"),
    "and": ("__and__", "__rand__"),
    "or": ("__or__", "__ror__"),
    "lt": ("__lt__", "__gt__"),
    "le": ("__le__", "__ge__"),
    "eq": ("__eq__", "__eq__"),
    "ne": ("__ne__", "__ne__"),
}.items():
    setattr(_Captured, _names[0], lambda self, other, op=_op: apply(op, self, other))
    setattr(_Captured, _names[1], lambda self, other, op=_op: apply(op, other, self))


class _Holder:
    """Stands for a captured object, module or container that holds arrays: what is read of it is captured.

    It passes for the object itself (`isinstance`, `super()`), whose methods see it as `self`.
    """

    def __init__(self, value: Any, label: str, captures: _Captures):
        self.__dict__.update({"_value": value, "_label": label, "_captures": captures})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        return self._part(getattr(self._value, name), f"{self._label}.{name}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise NoValueError(f"{self._label}.{name}: a traced function may not change what it captures")

    def __getitem__(self, key: Any) -> Any:
        method = getattr(type(self._value), "__getitem__", None)
        if isinstance(method, types.FunctionType):
            return self._captures.function(method)(self, key)
        return self._part(self._value[key], f"{self._label}[{key!r}]")

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        method = type(self._value).__call__
        own = isinstance(method, types.FunctionType)
        return (
            self._captures.function(method)(self, *args, **keywords)
            if own
            else self._value(*args, **keywords)
        )

    def __iter__(self) -> Iterator[Any]:
        return (self._part(value, f"{self._label}[{n}]") for n, value in enumerate(self._value))

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __contains__(self, key: Any) -> bool:
        return key in self._value

    def __eq__(self, other: object) -> bool:
        return bool(self._value == (other._value if type(other) is _Holder else other))

    def __hash__(self) -> int:
        return hash(self._value)

    def __anyattn_expr__(self) -> Expr:
        return as_expr(self._value)

    def _part(self, value: Any, label: str) -> Any:
        if isinstance(value, types.MethodType) and value.__self__ is self._value:
            return types.MethodType(self._captures.function(value.__func__), self)
        return self._captures.swap(value, label)


# How deep arrays are looked for in captured objects: a dict in an object in a dict.
_DEPTH = 3


class _Captures:
    """What one traced function sees in the place of what it captures."""

    def __init__(self) -> None:
        self._functions: dict[int, tuple[types.FunctionType, Any]] = {}
        self._holders: dict[int, _Holder] = {}
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
        if arrays.is_array(value) or _is_numbers(value):
            return _Captured(value, label)
        if id(value) in self._holders:
            return self._holders[id(value)]
        if _holds_arrays(value, _DEPTH):
            self._holders[id(value)] = _Holder(value, label, self)
            return self._holders[id(value)]
        return value

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
            return self._holders.setdefault(id(value), _Holder(value, label, self))
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


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, range)) or not value:
        return False
    return all(isinstance(v, (bool, int, float)) or _is_numbers(v) for v in value)


def _holds_arrays(value: Any, depth: int) -> bool:
    if isinstance(value, (Expr, _Captured, type, types.ModuleType, types.FunctionType)):
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
        arrays.is_array(part) or _is_numbers(part) or (depth > 1 and _holds_arrays(part, depth - 1))
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
    return str(getattr(function, "__qualname__", None) or repr(function))


def _call(function: Any, argument: str, symbols: tuple[Expr, ...]) -> Expr:
    names = ", ".join(s.name for s in symbols)  # type: ignore[attr-defined]
    captures = _Captures()
    try:
        return as_expr(captures.prepare(function)(*symbols))
    except Exception as error:
        place = place_of(error, captures.files)
        words = advice(place) if _asks_for_a_value(error) else None
        if words is None:
            words = str(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"
        where = "" if place is None else f"\n  {place.file}:{place.line}: {place.text}\n "
        raise TraceError(
            f"{argument} function {_name(function)} could not be traced with ({names}){where}: {words}"
        ) from error


# What other libraries say of an index or operand that is no number of theirs, and Python of an attribute.
_REFUSALS = re.compile(r"\b(Symbol|Apply|Load|Const|Aligned|_Captured)\b|only integers|must be integers")


def _asks_for_a_value(error: Exception) -> bool:
    """Whether an error came from using an expression as if it were a number."""
    if isinstance(error, TraceError):
        return isinstance(error, NoValueError)
    return isinstance(error, (TypeError, ValueError, AttributeError, IndexError)) and bool(
        _REFUSALS.search(str(error))
    )
