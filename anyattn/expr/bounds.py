"""Bounds of integers: what each subexpression may be, known before anything is computed.

Integers are int64 in meaning, but a library may hold fewer bits (JAX without x64 has int32), and kernels are
faster with fewer: vectors of int32 are twice as wide. So two questions are answered here. `check_integers`
refuses a call in which an integer may leave the library's index dtype; every evaluation, printed kernel and
schedule may then compute in any dtype that holds the indices and agree. `fits` is asked by a backend that
prints 32-bit indices: do all integers of this program stay within 32 bits in this call?

Ranges are Python integers: they never wrap, so what is refused can be named, and a node takes about a
microsecond. (`schedule.intervals` bounds thousands of tiles at once, in int64 and with remainders.) Tables
are taken to hold all of their dtype first; only where that is too much are their values looked at, and only
where the host may read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.expr.nodes import Aligned, Apply, Const, Expr, Load, Symbol, walk
from anyattn.expr.program import AlignedSlot, LoadSlot, Parameter, Program

__all__ = ["Range", "check_constants", "check_integers", "fits", "holds", "index_ranges"]

Range = tuple[int, int]

# Computed integers stay this far from the ends of int64, so that the schedule may compare them by their
# difference, and move terms of two from one side to the other.
_COMPUTED = 2**62
# Powers are not written out beyond so many bits.
_WIDEST = 256
# Operands longer than this are left out of an error.
_SHOWN = 24
_BOOL = (0, 1)
_DTYPES = {
    f"{sign}int{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for bits in (8, 16, 32, 64)
    for sign in ("", "u")
}


class Sizes(Protocol):
    """The sizes of a call: an `AttentionCall`, or the `Geometry` that it is bound to."""

    @property
    def batch_shape(self) -> tuple[int, ...]: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def q_len(self) -> int: ...
    @property
    def k_len(self) -> int: ...
    @property
    def offset_host(self) -> Any: ...


def index_ranges(sizes: Sizes, *, past: int = 0, unread_offset: Range | None = None) -> dict[str, Range]:
    """The ranges of b, h, row, i and j in a call, by name.

    Parameters
    ----------
    sizes : AttentionCall or Geometry
    past : int
        A kernel computes with rows and keys up to this many beyond the last, whatever becomes of the results
        (the rest of a tile or of a vector).
    unread_offset : (int, int), optional
        The range of the position of row 0 where the host does not know it; without it, i has no range then.
    """
    rows, keys = max(sizes.q_len - 1, 0) + past, max(sizes.k_len - 1, 0) + past
    found = {
        "b": (0, max(math.prod(sizes.batch_shape) - 1, 0)),
        "h": (0, max(sizes.num_heads - 1, 0)),
        "row": (0, rows),
        "j": (0, keys),
    }
    offset = sizes.offset_host
    if offset is None:
        first = unread_offset
    elif isinstance(offset, int):
        first = offset, offset
    else:
        first = (int(offset.min()), int(offset.max())) if offset.size else (0, 0)
    if first is not None:
        found["i"] = first[0], first[1] + rows
    return found


def check_integers(root: Expr, sizes: Sizes, bits: int, argument: str, library: str) -> None:
    """Raise where an integer of a bound expression may leave the index dtype of the call.

    A table that the host can read is held to its values, wherever its dtype alone would be too wide. One on a
    device, under a tracer or lazy cannot be judged without a transfer, and should not be refused there where
    it is taken elsewhere: it is trusted, and so is all that is computed from it. The position of row 0, where
    it is not known, is taken to lie between -Lq and Lk.

    Parameters
    ----------
    root : Expr
    sizes : AttentionCall or Geometry
    bits : 32 or 64
        Width of the library's index dtype.
    argument, library : str
        For the error.

    Raises
    ------
    ValueError
        Names the argument, the subexpression, the range that it may take, and the limit.
    """
    ranges = index_ranges(sizes, unread_offset=(-sizes.q_len, sizes.k_len))
    if _beyond(root, ranges, _of_dtype, bits) is None:
        return
    found = _beyond(root, ranges, _Values(otherwise=lambda x: None), bits)
    if found is None:
        return
    node, may_be = found
    assert may_be is not None
    limit = _limit(node, bits)
    values = " to ".join(_number(end) for end in sorted(set(may_be)))
    if isinstance(node, Const):
        parent = next((p for p in walk(root) if any(child is node for child in p.children)), root)
        what = f"{values} in {_words(parent)}"
    else:
        what = f"{_words(node)} may be {values} in this call"
    hint = "; jax_enable_x64 gives them 64" if library == "jax" and bits == 32 else ""
    raise ValueError(
        f"{argument}: {what}; wanted integers from {-limit} to {limit}, "
        f"as the indices of {library} have {bits} bits{hint}"
    )


def fits(program: Program, ranges: Mapping[str, Range], *, bits: int = 32) -> bool:
    """Whether all integers of a program, on the way too, stay within signed integers of so many bits.

    Parameters
    ----------
    program : Program
    ranges : mapping of str to (int, int)
        As `index_ranges` gives them, of all indices that the kernel computes with. A symbol without a range
        may be anything.
    bits : int

    Returns
    -------
    bool
        False where it cannot be proved. The answer is that of this program's parameters and tables: integer
        tables are read whose dtype alone leaves the answer open, if the host may read them.
    """
    largest = _largest(bits)
    if any(low < -largest or high > largest for low, high in ranges.values()):
        return False
    if any(size > largest for x in program.tables for size in x.shape):
        return False
    of_values = _Values(otherwise=_of_dtype)
    for root in program.functions.values():
        if any(isinstance(node, AlignedSlot) and node.block > largest for node in walk(root)):
            return False
        if all(_beyond(root, ranges, stored, bits, program) for stored in (_of_dtype, of_values)):
            return False
    return True


def holds(least: int, most: int, bits: int) -> bool:
    """Whether signed integers of so many bits hold all from `least` to `most`."""
    return -_largest(bits) - 1 <= least and most <= _largest(bits)


def check_constants(program: Program, bits: int) -> None:
    """Raise ValueError where a constant of a program's code needs more than so many bits."""
    for root in program.functions.values():
        for node in walk(root):
            if isinstance(node, AlignedSlot):
                value = node.block
            elif isinstance(node, Const) and node.kind == "int":
                value = int(node.value)
            else:
                continue
            if abs(value) > _largest(bits):
                raise ValueError(f"{bits}-bit indices cannot hold the constant {value} of the program")


def _beyond(
    root: Expr,
    ranges: Mapping[str, Range],
    stored: Callable[[Array], Range | None],
    bits: int,
    program: Program | None = None,
) -> tuple[Expr, Range | None] | None:
    """The first integer under `root`, children first, that may leave so many bits, and its range.

    `stored` is the range of an array's integers. Where nothing is known, that counts as beyond in a program,
    and not in a bound expression.
    """
    found: dict[int, Range | None] = {}
    for node in walk(root):
        if node.kind != "int":
            found[id(node)] = _BOOL if node.kind == "bool" else None
            continue
        limit = _limit(node, bits)
        # What is stored may use the least number, which has no opposite.
        least = -limit if isinstance(node, Apply) else -limit - 1
        may_be: Range | None
        if isinstance(node, Apply):
            may_be = _computed(node, [found[id(arg)] for arg in node.args])
        elif isinstance(node, Symbol):
            may_be = ranges.get(node.name)
        elif isinstance(node, Const):
            may_be = int(node.value), int(node.value)
        elif isinstance(node, Parameter):
            assert program is not None
            may_be = int(program.parameters[node.slot]), int(program.parameters[node.slot])
        else:
            may_be = stored(_array(node, program))
        found[id(node)] = may_be
        if may_be is None:
            if program is not None:
                return node, None
        elif not least <= may_be[0] <= may_be[1] <= limit:
            return node, may_be
    return None


def _array(node: Expr, program: Program | None) -> Array:
    """The array that an integer is read from."""
    if isinstance(node, Load):
        return node.table.value
    if isinstance(node, Aligned):
        return node.value
    assert program is not None
    if isinstance(node, LoadSlot):
        return program.tables[node.table.slot]
    assert isinstance(node, AlignedSlot)
    return program.aligned[node.slot]


def _of_dtype(x: Array) -> Range | None:
    return _DTYPES[arrays.dtype_name(x)]


class _Values:
    """The least and the largest entry of an array that the host may read, else what `otherwise` says."""

    def __init__(self, otherwise: Callable[[Array], Range | None]):
        self.otherwise = otherwise
        self.known: dict[int, Range | None] = {}

    def __call__(self, x: Array) -> Range | None:
        if id(x) not in self.known:
            self.known[id(x)] = self.read(x)
        return self.known[id(x)]

    def read(self, x: Array) -> Range | None:
        if not arrays.is_concrete_cpu(x):
            return self.otherwise(x)
        values = arrays.to_host(x)
        return (int(values.min()), int(values.max())) if values.size else (0, 0)


def _computed(node: Apply, args: list[Range | None]) -> Range | None:
    """The range of an integer operation on operands of these ranges."""
    if node.op == "where":
        args = args[1:]
    if node.op == "mod" and args[1] is not None:
        return _remainder(args[0], args[1])
    known = [arg for arg in args if arg is not None]
    return _RULES[node.op](*known) if len(known) == len(args) else None


def _hull(values: Iterable[int]) -> Range:
    ordered = sorted(values)
    return ordered[0], ordered[-1]


def _product(x: Range, y: Range) -> Range:
    return _hull(a * b for a in x for b in y)


def _quotient(x: Range, y: Range) -> Range:
    # By the divisors nearest to zero and farthest from it; by zero it is 0.
    divisors = [d for d in (*y, -1, 1) if d and y[0] <= d <= y[1]]
    return _hull([a // d for a in x for d in divisors] + [0] * (y[0] <= 0 <= y[1]))


def _remainder(x: Range | None, y: Range) -> Range:
    low, high = min(y[0] + 1, 0), max(y[1] - 1, 0)
    if x is not None and x[0] >= 0:
        high = min(high, x[1])
    if x is not None and x[1] <= 0:
        low = max(low, x[0])
    return low, high


def _power(x: Range, y: Range) -> Range:
    exponent = y[0]
    size = max(map(abs, x))
    if size > 1 and exponent * size.bit_length() > _WIDEST:
        huge: int = 2**_WIDEST
        return 0 if exponent % 2 == 0 or x[0] >= 0 else -huge, huge
    ends = [a**exponent for a in x]
    return _hull([*ends, 0] if x[0] < 0 < x[1] and exponent else ends)


def _absolute(x: Range) -> Range:
    return (0 if x[0] <= 0 <= x[1] else min(map(abs, x))), max(map(abs, x))


_RULES: dict[str, Callable[..., Range]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _product,
    "floordiv": _quotient,
    "pow": _power,
    "neg": lambda x: (-x[1], -x[0]),
    "abs": _absolute,
    "minimum": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "maximum": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "where": lambda x, y: (min(x[0], y[0]), max(x[1], y[1])),
    "philox": lambda *words: (0, 2**24 - 1),
}


def _largest(bits: int) -> int:
    return (1 << bits - 1) - 1


def _limit(node: Expr, bits: int) -> int:
    return min(_largest(bits), _COMPUTED) if isinstance(node, Apply) else _largest(bits)


def _words(node: Expr) -> str:
    """How an operation reads, without operands that are long."""
    if not isinstance(node, Apply):
        return repr(node)
    sizes: dict[int, int] = {}
    for part in walk(node):  # of the text: common parts are written each time
        sizes[id(part)] = 1 + sum(sizes[id(child)] for child in part.children)
    shown = tuple(Symbol("...", a.kind) if sizes[id(a)] > _SHOWN else a for a in node.args)
    return repr(Apply(node.op, shown, node.kind))


def _number(value: int) -> str:
    return str(value) if abs(value) < 2**64 else f"{'-' * (value < 0)}2**{abs(value).bit_length() - 1}"
