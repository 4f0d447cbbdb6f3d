"""Mask functions of transformers as expressions of anyattn.

They are written for torch: they take index tensors, make constants with `q_idx.new_ones`, and index captured
tensors with what they are given. Here they are called once with `Index` objects, which build expressions; a
`TorchFunctionMode` sees what torch is asked to do with them, of which indexing a tensor is the one that torch
would refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anyattn.errors import TraceError
from anyattn.expr.nodes import Apply, B, Const, Expr, H, I, J, Table, apply, as_expr, load
from anyattn.expr.tables import table_of

__all__ = ["conditions"]


def conditions(mask_function: Callable[..., Any], kv_offset: int = 0) -> list[Expr]:
    """The conditions that a mask function joins with "and", as expressions.

    Parameters
    ----------
    mask_function : callable
        (batch_idx, head_idx, q_idx, kv_idx) -> bool, index-based.
    kv_offset : int
        What transformers calls the first key of the call. In the expressions it is key 0, and positions of
        queries are counted from there too.

    Raises
    ------
    TraceError
        If the function does what an expression cannot say.
    """
    symbols = (B, H, I + kv_offset, J + kv_offset) if kv_offset else (B, H, I, J)
    try:
        with _Tracing():
            result = mask_function(*map(Index, symbols))
            found = as_expr(_operand(result))
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise TraceError(f"mask function {mask_function!r}: {type(error).__name__}: {error}") from error
    if found.kind != "bool":
        raise TraceError(f"mask function {mask_function!r} gives {found.kind}; wanted a condition")
    return _joined_by_and(found)


def _joined_by_and(expr: Expr) -> list[Expr]:
    if isinstance(expr, Apply) and expr.op == "and":
        return _joined_by_and(expr.args[0]) + _joined_by_and(expr.args[1])
    return [] if isinstance(expr, Const) and expr.value is True else [expr]


class Index:
    """What a mask function sees in the place of an index tensor, or of what it computes from one."""

    dtype = torch.int64
    device = torch.device("cpu")
    ndim = 0
    shape = torch.Size()

    def __init__(self, expr: Expr):
        self.expr = expr

    def new_ones(self, size: tuple[int, ...], dtype: Any = None) -> Index:
        return _constant(1, size, dtype)

    def new_zeros(self, size: tuple[int, ...], dtype: Any = None) -> Index:
        return _constant(0, size, dtype)

    def to(self, *args: Any, **kwargs: Any) -> Index:
        """Itself on any device; another dtype would be another expression."""
        if kwargs.keys() - {"device"} or any(isinstance(a, torch.dtype) for a in args):
            raise TraceError("a traced index was converted to another dtype")
        return self

    def __bool__(self) -> bool:
        return bool(self.expr)  # raises, and says what to write

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _torch_call(func, args, kwargs or {})


def _constant(value: int, size: tuple[int, ...], dtype: Any) -> Index:
    if size != () or dtype is not torch.bool:
        raise TraceError(f"a traced index was asked for ones or zeros of shape {size}, {dtype}")
    return Index(as_expr(bool(value)))


class _Tracing(TorchFunctionMode):  # type: ignore[misc]
    """Torch calls with an `Index` among their arguments build expressions, the others run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keys = args[1] if len(args) == 2 and isinstance(args[1], tuple) else ()
        if any(isinstance(x, Index) for x in (*args, *keys)):
            return _torch_call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _torch_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.__name__.strip("_")
    if name == "getitem" and isinstance(args[0], torch.Tensor):
        return _element(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
    if name not in _NAMES or kwargs:
        raise TraceError(f"torch's {func.__name__} is not known in a traced mask function")
    return _applied(name, args)


def _applied(name: str, values: tuple[Any, ...]) -> Index:
    operands = [_operand(x) for x in (reversed(values) if name in _REFLECTED else values)]
    op = _NAMES[name]
    if op in _NEUTRAL:
        # `and_masks` and `or_masks` begin with a constant.
        for one, other in (operands, operands[::-1]):
            if isinstance(one, Const) and one.value is _NEUTRAL[op]:
                return Index(as_expr(other))
    return Index(apply(op, *operands))


def _element(tensor: torch.Tensor, keys: tuple[Any, ...]) -> Index:
    if len(keys) != tensor.ndim:
        raise TraceError(f"a tensor of {tensor.ndim} axes was read at {len(keys)} indices")
    return Index(load(_table(tensor), tuple(as_expr(_operand(k)) for k in keys)))


def _table(tensor: torch.Tensor) -> Table:
    return table_of(tensor, f"tensor{tuple(tensor.shape)}", fixed="")


def _operand(value: Any) -> Any:
    """A number or expression for an operand; a tensor without axes is read when the call is made."""
    if isinstance(value, Index):
        return value.expr
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return load(_table(value), ())
    return value


_OPERATORS = {
    **{name: name for name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "neg", "abs")},
    **{name: name for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "invert": "not",
}
_REFLECTED = {f"r{name}" for name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor")}
_NAMES = {
    **_OPERATORS,
    **{name: name[1:] for name in _REFLECTED},
    "where": "where",
    "minimum": "minimum",
    "maximum": "maximum",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_not": "not",
}


_NEUTRAL = {"and": True, "or": False}


def _method(name: str) -> Callable[..., Any]:
    def method(self: Index, *others: Any) -> Any:
        return _applied(name, (self, *others))

    return method


for _name in (*_OPERATORS, *_REFLECTED):
    setattr(Index, f"__{_name}__", _method(_name))
