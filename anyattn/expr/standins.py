"""What a traced function sees in the place of captured arrays, and of objects that hold them.

Indexing a stand-in by an index expression builds a `Load`, which a call gives a value to. Everything else is
Python's, done once while tracing, with the values that are there: the stand-in notes it, so that a compiled
function is not given another array for one that its structure was made from (`Table.fixed`).
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from anyattn import arrays
from anyattn.errors import TraceError
from anyattn.expr.nodes import Apply, Const, Expr, NoValueError, Table, apply, as_expr, load
from anyattn.expr.tables import is_numbers, table_of

if TYPE_CHECKING:
    from anyattn.expr.trace import Captures

__all__ = ["CapturedArray", "Holder", "Use", "WholeArrayError"]


class WholeArrayError(TraceError):
    """An array was used where one number is wanted; `label` is what the function calls it."""

    def __init__(self, message: str, label: str):
        super().__init__(message)
        self.label = label


@dataclass(eq=False)
class Use:
    """What one tracing made of one captured array; `fixed` as of `Table`."""

    value: Any
    label: str
    fixed: str = ""
    tables: dict[str, Table] = field(default_factory=dict)

    def table(self, label: str) -> Table:
        """The table node of the array under this name."""
        if label not in self.tables:
            self.tables[label] = table_of(self.value, label, fixed="")
        return self.tables[label]


# What holds for every array that may take a captured one's place.
_SHARED = frozenset({"dtype", "ndim", "device"})
_SIZES = frozenset({"shape", "size"})


class CapturedArray:
    """Stands for a captured array, or for a part that some index expressions choose of it."""

    __array_ufunc__ = None

    def __init__(self, use: Use, label: str, captures: Captures, indices: tuple[Expr, ...] = ()):
        self._use = use
        self._label = label
        self._captures = captures
        self._indices = indices

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if not self._indices and not any(map(_is_traced, keys)):
            return self._part(self._whole()[key], f"{self._label}[{_shown(keys)}]")
        table = self._use.table(self._label)
        indices = list(self._indices)
        for k in keys:
            if k is None or k is Ellipsis or isinstance(k, slice):
                raise TraceError(self._not_one_number(keys))
            index = as_expr(k)
            whole = index.kind == "int" or (isinstance(index, Apply) and index.op == "floor")
            if not whole:
                raise TraceError(
                    f"{self._label}: index {index!r} is {index.kind}; wanted an integer (aa.floor gives one)"
                )
            if isinstance(index, Const) and index.value < 0:
                raise TraceError(self._negative(keys, k, len(indices)))
            indices.append(index)
        if len(indices) > table.ndim:
            raise TraceError(f"{self._label}: {len(indices)} indices for an array of {table.ndim} axes")
        if len(indices) == table.ndim:
            return load(table, tuple(indices))
        return CapturedArray(self._use, self._label, self._captures, tuple(indices))

    def __anyattn_expr__(self) -> Expr:
        table = self._use.table(self._label)
        if len(self._indices) < table.ndim:
            names = ("b", "h", "i", "j")
            left = table.ndim - len(self._indices)
            example = f"{self._name()}[{', '.join(names[-left:])}]" if left <= len(names) else "an element"
            raise WholeArrayError(
                f"{self._name()} is an array of {left} axes, used as one number; "
                f"index every axis ({example}), or compute with the array outside the function",
                self._label,
            )
        return load(table, self._indices)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise NoValueError(f"{self._label}: a traced function may read captured arrays, not change them")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and self._indices:
            raise AttributeError(name)
        if name == "shape":
            return self._sizes()
        if name == "ndim":
            return len(self._sizes(fix=False))
        if not self._indices and name in _SIZES | _SHARED:
            self._fix("shape" if name in _SIZES else "")
            return getattr(self._use.value, name)
        if self._indices:
            raise TraceError(
                f"{self._name()} is read while the kernel runs and has no .{name} before; index every axis, "
                f"or compute with the array outside the function"
            )
        return getattr(self._whole(), name)

    def __len__(self) -> int:
        sizes = self._sizes()
        if not sizes:
            raise TypeError(f"{self._name()} is one number and has no length")
        return sizes[0]

    def __bool__(self) -> bool:
        return bool(self._whole())

    def __hash__(self) -> int:
        return hash(self._whole())

    def __iter__(self) -> Iterator[Any]:
        parts = list(self._whole())
        return (self._part(part, f"{self._label}[{n}]") for n, part in enumerate(parts))

    # fmt: off
    def __float__(self) -> float: return float(self._whole())
    def __int__(self) -> int: return int(self._whole())
    def __index__(self) -> int: return operator.index(self._whole())
    def __neg__(self) -> Expr: return apply("neg", self)
    def __pos__(self) -> Expr: return as_expr(self)
    def __abs__(self) -> Expr: return apply("abs", self)
    def __invert__(self) -> Expr: return apply("not", self)
    # fmt: on

    def _name(self) -> str:
        """The part as it is written."""
        return f"{self._label}[{_shown(self._indices)}]" if self._indices else self._label

    def _fix(self, fixed: str) -> None:
        if self._use.fixed != "values":
            self._use.fixed = fixed or self._use.fixed

    def _whole(self) -> Any:
        """The array, for Python to do with as the function says."""
        if self._indices:
            raise NoValueError(
                f"{self._name()} is read while the kernel runs, at every index, and has no value yet"
            )
        self._fix("values")
        return self._use.value

    def _sizes(self, fix: bool = True) -> tuple[int, ...]:
        """The sizes of the axes that are not indexed yet."""
        if fix:
            self._fix("shape")
        value = self._use.value
        whole = value if arrays.is_array(value) else self._use.table(self._label).value
        return tuple(whole.shape)[len(self._indices) :]

    def _part(self, value: Any, label: str) -> Any:
        """What a concrete index or a loop gives, as the function is to see it."""
        return self._captures.swap(value, label) if arrays.is_array(value) or is_numbers(value) else value

    def _not_one_number(self, keys: tuple[Any, ...]) -> str:
        """What to write in the place of a slice, an ellipsis or a new axis."""
        given = [k for k in keys if not (k is None or k is Ellipsis)]
        left = self._use.table(self._label).ndim - len(self._indices) - len(given)
        parts: list[str] = []
        for k in keys:
            if isinstance(k, slice):
                parts.append("n")
            elif k is Ellipsis:
                parts += ["n"] * left
            elif k is not None:
                parts.append(repr(k))
        read, written = (f"{self._name()}[{x}]" for x in (_shown(keys), ", ".join(parts)))
        if "n" not in parts:
            return f"{read}: a traced function reads one number; write {written}"
        return (
            f"{read} is a part of an array, and a traced function computes one number at "
            f"each index; write {written} with an index n, or take the part outside the function"
        )

    def _negative(self, keys: tuple[Any, ...], key: Any, axis: int) -> str:
        size = f"{self._label}.shape[{axis}]"
        if not arrays.is_array(self._use.value):
            size = f"len({self._label}{'[0]' * axis})"
        written = ", ".join(f"{size} - {-int(k)}" if k is key else _shown((k,)) for k in keys)
        read = f"{self._name()}[{_shown(keys)}]"
        return (
            f"{read}: beside index expressions {int(key)} does not count from the end: "
            f"an index out of range reads the nearest edge; write {self._name()}[{written}]"
        )


def _is_traced(key: Any) -> bool:
    parts = (key.start, key.stop, key.step) if isinstance(key, slice) else (key,)
    return any(isinstance(part, (Expr, CapturedArray)) for part in parts)


def _shown(keys: tuple[Any, ...]) -> str:
    """Indices as they are written."""

    def one(k: Any) -> str:
        if isinstance(k, slice):
            start, stop = ("" if x is None else repr(x) for x in (k.start, k.stop))
            return f"{start}:{stop}" + ("" if k.step is None else f":{k.step!r}")
        if isinstance(k, CapturedArray):
            return k._name()
        return "..." if k is Ellipsis else repr(k)

    return ", ".join(map(one, keys))


for _op, _names in {
    "add": ("__add__", "__radd__"),
    "sub": ("__sub__", "__rsub__"),
    "mul": ("__mul__", "__rmul__"),
    "truediv": ("__truediv__", "__rtruediv__"),
    "floordiv": ("__floordiv__", "__rfloordiv__"),
    "mod": ("__mod__", "__rmod__"),
    "pow": ("__pow__", "__rpow__"),
    "and": ("__and__", "__rand__"),
    "or": ("__or__", "__ror__"),
    "xor": ("__xor__", "__rxor__"),
    "lt": ("__lt__", "__gt__"),
    "le": ("__le__", "__ge__"),
    "eq": ("__eq__", "__eq__"),
    "ne": ("__ne__", "__ne__"),
}.items():
    setattr(CapturedArray, _names[0], lambda self, other, op=_op: apply(op, self, other))
    setattr(CapturedArray, _names[1], lambda self, other, op=_op: apply(op, other, self))


class Holder:
    """Stands for a captured object, module or container that holds arrays: what is read of it is captured.

    It passes for the object itself (`isinstance`, `super()`), whose methods see it as `self`.
    """

    def __init__(self, value: Any, label: str, captures: Captures):
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
        return bool(self._value == (other._value if type(other) is Holder else other))

    def __hash__(self) -> int:
        return hash(self._value)

    def __anyattn_expr__(self) -> Expr:
        return as_expr(self._value)

    def _part(self, value: Any, label: str) -> Any:
        if isinstance(value, types.MethodType) and value.__self__ is self._value:
            return types.MethodType(self._captures.function(value.__func__), self)
        return self._captures.swap(value, label)
