"""Evaluation of a bound expression with array-API calls, for all rows and one block of keys at a time.

Index symbols are arrays of broadcastable shapes, b (..., 1, 1, 1), h (H, 1, 1), row and i (..., R, 1), j (K),
so a part of the expression costs the product of the axes that it depends on and no more. Integers are
computed in the library's default integer dtype, floats in the accumulation dtype; no branch looks at a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.expr.branches import Held
from anyattn.expr.nodes import Aligned, Apply, Const, Expr, Load, Symbol, walk
from anyattn.philox import upper_bits, upper_bits_of_32

__all__ = ["Tile", "evaluate", "evaluate_all", "flat_index"]


@dataclass(frozen=True, eq=False)
class Tile:
    """Where an expression is evaluated: all batch entries and heads, some rows, a block of keys.

    The rows are those listed in `rows`, or those from `first_row` on; the keys are `size` from `start` on.
    Where the symbols are those of some batch entries and heads only, `aligned` has the parts of aligned
    arrays that belong to these, by the id of their node.
    """

    xp: Namespace
    device: Any
    index: Any
    accumulate: Any
    symbols: dict[str, Array]
    start: Any
    size: int
    rows: Array | None
    first_row: int = 0
    aligned: Mapping[int, Array] = field(default_factory=dict)

    def dtype(self, kind: str) -> Any:
        """The dtype in which values of a kind are computed."""
        return {"bool": self.xp.bool, "int": self.index, "float": self.accumulate}[kind]

    def cast(self, x: Array, kind: str) -> Array:
        return arrays.cast(self.xp, x, self.dtype(kind))


def evaluate(root: Expr, tile: Tile, score: Array | None = None) -> Array:
    """The values of `root`, of a shape that broadcasts to (..., H, R, K) and the dtype of its kind."""
    return evaluate_all((root,), tile, score)[0]


def evaluate_all(roots: Iterable[Expr], tile: Tile, score: Array | None = None) -> list[Array]:
    """The values of several expressions; what they have in common is computed once."""
    values: dict[int, Array] = {}
    return [_evaluate(root, tile, score, values) for root in roots]


def _evaluate(root: Expr, tile: Tile, score: Array | None, values: dict[int, Array]) -> Array:
    for node in walk(root):
        if id(node) in values:
            continue
        args = [values[id(child)] for child in node.children]
        if isinstance(node, Const):
            value = tile.xp.asarray(node.value, dtype=tile.dtype(node.kind), device=tile.device)
        elif isinstance(node, Symbol):
            value = score if node.name == "score" else tile.symbols[node.name]
        elif isinstance(node, Load):
            value = _load(node, args, tile)
        elif isinstance(node, Aligned):
            value = tile.cast(_aligned(node, tile), node.kind)
        elif isinstance(node, Apply):
            value = _apply(node, args, tile)
        elif isinstance(node, Held):
            value = arrays.stop_gradient(args[0])
        else:
            raise TypeError(f"{type(node).__name__} must be bound before it is evaluated")
        values[id(node)] = value
    return values[id(root)]


def flat_index(node: Load, indices: list[Array], tile: Tile) -> Array | None:
    """Where a read finds its element in the flattened table; None in a table without axes."""
    xp = tile.xp
    flat: Array | None = None
    for kind, index, size in zip(
        (i.kind for i in node.indices), indices, node.table.value.shape, strict=True
    ):
        if kind == "float":
            # NaN reads entry 0, and beyond 2**24 entries float32 rounds the last one up.
            index = tile.cast(arrays.clip(xp, xp.where(index > 0, index, 0.0), 0, max(size - 1, 0)), "int")
        inside = tile.cast(arrays.clip(xp, index, 0, max(size - 1, 0)), "int")
        flat = inside if flat is None else flat * size + inside
    return flat


def _load(node: Load, indices: list[Array], tile: Tile) -> Array:
    # n-d integer indexing is missing in dask and restricted in the standard; take on the flattened table is
    # everywhere.
    xp, table = tile.xp, node.table.value
    flat = flat_index(node, indices, tile)
    if flat is None:
        return tile.cast(table, node.kind)
    if 0 in table.shape or 0 in flat.shape:  # of an empty call; dask does not reshape all empty arrays
        return arrays.full(xp, flat.shape, 0, tile.dtype(node.kind), tile.device)
    if arrays.dtype_name(table) in ("uint16", "uint32", "uint64"):
        table = tile.cast(table, "int")  # torch gathers signed integers only
    values = arrays.take(xp, xp.reshape(table, (-1,)), xp.reshape(flat, (-1,)), axis=-1)
    return tile.cast(xp.reshape(values, flat.shape), node.kind)


def _aligned(node: Aligned, tile: Tile) -> Array:
    xp, x = tile.xp, tile.aligned.get(id(node), node.value)
    if x.shape[-2] > 1:
        if node.block > 1:
            x = arrays.take(xp, x, tile.symbols["row"][:, 0] // node.block, axis=-2)
        elif tile.rows is not None:
            x = arrays.take(xp, x, tile.rows, axis=-2)
        else:
            x = arrays.take_range(x, tile.first_row, tile.symbols["row"].shape[0], axis=-2)
    if x.shape[-1] > 1:
        if node.block > 1:
            x = arrays.take(xp, x, tile.symbols["j"] // node.block, axis=-1)
        else:
            x = arrays.take_range(x, tile.start, tile.size, axis=-1)
    return x


def _apply(node: Apply, args: list[Array], tile: Tile) -> Array:
    if node.op == "where":
        condition, x, y = args
        return tile.xp.where(condition, tile.cast(x, node.kind), tile.cast(y, node.kind))
    operation = _OPERATIONS[node.op]
    if node.op in _WHOLE_QUOTIENTS and node.kind == "int":
        divisor = node.args[1]
        if not (isinstance(divisor, Const) and divisor.value):
            operation = _WHOLE_QUOTIENTS[node.op]
    return operation(tile.xp, *(tile.cast(x, _operand_kind(node)) for x in args))


def _operand_kind(node: Apply) -> str:
    """The kind that the operands of an operation have in common."""
    if node.kind != "bool":
        return node.kind
    kinds = {child.kind for child in node.args}
    if kinds == {"bool"} and node.op in ("lt", "le", "gt", "ge"):
        return "int"  # the standard does not order bools
    return "float" if "float" in kinds else "int" if "int" in kinds else "bool"


def _sigmoid(xp: Namespace, x: Array) -> Array:
    # 1 / (1 + exp(-x)) would overflow, and NumPy warn, for x < -88; (1 + tanh(x / 2)) / 2 has no digits left
    # below -17. The selections, not abs(x), keep the derivative at 0.
    low = x < 0
    t = xp.exp(xp.where(low, x, -x))
    return xp.where(low, t, 1.0) / (1 + t)


def _floordiv_or_zero(xp: Namespace, x: Array, y: Array) -> Array:
    zero = y == 0
    return xp.where(zero, 0, x // xp.where(zero, 1, y))


def _mod_or_zero(xp: Namespace, x: Array, y: Array) -> Array:
    return x % xp.where(y == 0, 1, y)


def _philox(xp: Namespace, *words: Array) -> Array:
    index = words[0].dtype
    if xp.iinfo(index).bits == 64:
        return upper_bits(*words)
    return arrays.cast(xp, upper_bits_of_32(*(arrays.cast(xp, x, xp.uint32) for x in words)), index)


# By a whole number that may be 0, where NumPy gives 0 and warns, torch raises and XLA gives something else.
_WHOLE_QUOTIENTS: dict[str, Callable[..., Array]] = {"floordiv": _floordiv_or_zero, "mod": _mod_or_zero}

_OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": lambda xp, x, y: x + y,
    "sub": lambda xp, x, y: x - y,
    "mul": lambda xp, x, y: x * y,
    "truediv": lambda xp, x, y: x / y,
    "floordiv": lambda xp, x, y: x // y,
    "mod": lambda xp, x, y: x % y,
    "pow": lambda xp, x, y: x**y,
    "neg": lambda xp, x: -x,
    "abs": lambda xp, x: xp.abs(x),
    "minimum": lambda xp, x, y: xp.minimum(x, y),
    "maximum": lambda xp, x, y: xp.maximum(x, y),
    "lt": lambda xp, x, y: x < y,
    "le": lambda xp, x, y: x <= y,
    "gt": lambda xp, x, y: x > y,
    "ge": lambda xp, x, y: x >= y,
    "eq": lambda xp, x, y: x == y,
    "ne": lambda xp, x, y: x != y,
    "and": lambda xp, x, y: x & y,
    "or": lambda xp, x, y: x | y,
    "xor": lambda xp, x, y: x ^ y,
    "not": lambda xp, x: ~x,
    "exp": lambda xp, x: xp.exp(x),
    "log": lambda xp, x: xp.log(x),
    "tanh": lambda xp, x: xp.tanh(x),
    "sqrt": lambda xp, x: xp.sqrt(x),
    "sigmoid": _sigmoid,
    "floor": lambda xp, x: xp.floor(x),
    "philox": _philox,
}
