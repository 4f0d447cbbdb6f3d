"""Tracing: a user's Python function, called once with symbols, gives the expression that it computes.

Arrays and number sequences that the function captures (closure, globals, defaults, also through helper
functions) are swapped for stand-ins whose indexing builds `Load` nodes; the function itself is not changed, a
copy of it with other captures is called. Nothing is parsed and nothing is evaluated from text.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyattn import arrays
from anyattn.errors import TraceError
from anyattn.expr.nodes import SCORE, Apply, B, Expr, H, I, J, Table, apply, as_expr, load

__all__ = ["table_of", "trace_mask", "trace_score"]


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
            return _capture(self._value[key], f"{self._label}[{key!r}]")
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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)

    def __len__(self) -> int:
        return len(self._value)

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


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return False
    return all(isinstance(v, (bool, int, float)) or _is_numbers(v) for v in value)


def _capture(value: Any, label: str) -> Any:
    """`value` as the traced function is to see it."""
    if arrays.is_array(value) or _is_numbers(value):
        return _Captured(value, label)
    return value


def _with_captures(function: types.FunctionType, seen: dict[int, types.FunctionType]) -> types.FunctionType:
    """A copy of `function` that sees stand-ins for captured arrays; `function` itself if it has none."""
    if id(function) in seen:
        return seen[id(function)]
    seen[id(function)] = function
    changed = False

    def swap(value: Any, label: str) -> Any:
        nonlocal changed
        if isinstance(value, types.FunctionType) and not value.__module__.startswith("anyattn."):
            new: Any = _with_captures(value, seen)
        else:
            new = _capture(value, label)
        changed = changed or new is not value
        return new

    names = _global_names(function.__code__)
    scope = {n: swap(function.__globals__[n], n) for n in sorted(names) if n in function.__globals__}
    cells = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # assigned after the function was made
            cells.append(cell)
            continue
        cells.append(types.CellType(swap(content, name)))
    arguments = function.__code__.co_varnames
    first_default = function.__code__.co_argcount - len(function.__defaults__ or ())
    defaults = tuple(
        swap(value, arguments[first_default + n]) for n, value in enumerate(function.__defaults__ or ())
    )
    keyword_defaults = {name: swap(value, name) for name, value in (function.__kwdefaults__ or {}).items()}
    if not changed:
        return function
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **scope}, function.__name__, defaults, tuple(cells)
    )
    copy.__kwdefaults__ = keyword_defaults
    copy.__module__ = function.__module__
    seen[id(function)] = copy
    return copy


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _global_names(const)
    return names


def _prepare(function: Any) -> Callable[..., Any]:
    if isinstance(function, functools.partial):
        keywords = {name: _capture(value, name) for name, value in function.keywords.items()}
        args = tuple(_capture(value, f"argument {n}") for n, value in enumerate(function.args))
        return functools.partial(_prepare(function.func), *args, **keywords)
    if isinstance(function, types.MethodType):
        return types.MethodType(_prepare(function.__func__), function.__self__)
    if isinstance(function, types.FunctionType):
        return _with_captures(function, {})
    traced: Callable[..., Any] = function
    return traced


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))


def _call(function: Any, argument: str, symbols: tuple[Expr, ...]) -> Expr:
    names = ", ".join(s.name for s in symbols)  # type: ignore[attr-defined]
    try:
        return as_expr(_prepare(function)(*symbols))
    except Exception as error:
        where = _user_line(function, error)
        raise TraceError(
            f"{argument} function {_name(function)} could not be traced with ({names}){where}: {error}"
        ) from error


def _user_line(function: Any, error: Exception) -> str:
    """The last line of the user's file that the error passed through."""
    import linecache
    import traceback

    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == code.co_filename and frame.lineno:
            line = linecache.getline(frame.filename, frame.lineno).strip()
            return f"\n  {frame.filename}:{frame.lineno}: {line}\n "
    return ""
