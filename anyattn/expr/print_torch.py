"""torch functions of a program, as FlexAttention takes them: `mask_mod` and `score_mod` over scalar tensors.

They are lists of torch operations that FlexAttention can trace, built once; running one is a loop that
`torch.compile` unrolls. Everything captured, numbers too, is a tensor: FlexAttention makes tensors arguments
of its kernel and would compile again for another Python number. FlexAttention counts rows and has int32
indices; here they become positions and int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anyattn.arrays import Array
from anyattn.expr.nodes import Apply, Const, Expr, Symbol, walk
from anyattn.expr.program import AlignedSlot, LoadSlot, Parameter, Program
from anyattn.expr.statements import computed_in
from anyattn.philox import upper_bits

if TYPE_CHECKING:
    import torch

__all__ = ["torch_functions"]

# An operation, the places of its operands in the list of values, and numbers that follow them.
Step = tuple[Callable[..., Any], tuple[int, ...], tuple[float, ...]]


def torch_functions(
    program: Program, accumulate: str, aligned: tuple[Array, ...], offset: int | Array, device: Any
) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """`mask_mod(b, h, q_idx, kv_idx)` and `score_mod(score, b, h, q_idx, kv_idx)`, None where there is none.

    Parameters
    ----------
    program : Program
        Its tables are tensors on `device`.
    accumulate : {"float32", "float64"}
        The dtype in which floats are computed.
    aligned : tuple of tensor
        The aligned arrays as `aligned_view` gives them.
    offset : int or tensor
        The position of query row 0, or one for each b.
    device : torch.device
    """
    import torch

    kinds = {"bool": torch.bool, "int": torch.int64, "float": getattr(torch, accumulate)}
    # Filled where they lie: a copy from the host would wait for the device.
    if isinstance(offset, int):
        first = torch.full((), offset, dtype=torch.int64, device=device)
    else:
        first = torch.as_tensor(offset, dtype=torch.int64, device=device)
    numbers = [
        torch.full((), value, dtype=kinds[kind], device=device)
        for kind, value in zip(program.parameter_kinds, program.parameters, strict=True)
    ]
    captured = (*numbers, *program.tables, *aligned)
    mask_mod = score_mod = None

    if program.visible is not None:
        seen = _Steps(program, program.visible, accumulate)

        def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return seen.run(None, b, h, q_idx, kv_idx, first, captured)

    if program.score is not None:
        changed = _Steps(program, program.score, accumulate)

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            s = score.to(kinds["float"])
            return changed.run(s, b, h, q_idx, kv_idx, first, captured).to(score.dtype)

    return mask_mod, score_mod


class _Steps:
    """An expression as operations on a list of values: symbols, captured tensors, then the results so far."""

    def __init__(self, program: Program, root: Expr, accumulate: str):
        import torch

        self.cast = {"int": _to_int64, "float": _to_float64 if accumulate == "float64" else _to_float32}
        self.operations = _operations(torch)
        self.first_table = len(_SYMBOLS) + len(program.parameters)
        self.first_aligned = self.first_table + len(program.tables)
        self.length = self.first_aligned + len(program.aligned)
        self.steps: list[Step] = []
        self.known: dict[Step, int] = {}
        places: dict[int, int] = {}
        for node in walk(root):
            if not isinstance(node, Const):
                places[id(node)] = self.place(node, places)
        self.result = places[id(root)]

    def run(self, s: Any, b: Any, h: Any, row: Any, j: Any, offset: Any, captured: tuple[Any, ...]) -> Any:
        b, h, row, j = _to_int64(b), _to_int64(h), _to_int64(row), _to_int64(j)
        i = row + (offset[b] if offset.ndim else offset)
        values = [b, h, row, i, j, s, *captured]
        for function, operands, numbers in self.steps:
            values.append(function(*[values[n] for n in operands], *numbers))
        return values[self.result]

    def step(self, function: Callable[..., Any], *operands: int, numbers: tuple[float, ...] = ()) -> int:
        """Where the result of an operation is found."""
        step = (function, operands, numbers)
        if step not in self.known:
            self.known[step] = self.length + len(self.steps)
            self.steps.append(step)
        return self.known[step]

    def place(self, node: Expr, places: dict[int, int]) -> int:
        """Where the value of `node` is found, those of its children being at `places`."""
        if isinstance(node, Symbol):
            return _SYMBOLS.index(node.name)
        if isinstance(node, Parameter):
            return len(_SYMBOLS) + node.slot
        if isinstance(node, LoadSlot):
            table = self.first_table + node.table.slot
            indices = [
                self.step(
                    _inside_float if index.kind == "float" else _inside,
                    places[id(index)],
                    table,
                    numbers=(axis,),
                )
                for axis, index in enumerate(node.indices)
            ]
            return self.converted(self.step(_read, table, *indices) if indices else table, node.kind)
        if isinstance(node, AlignedSlot):
            row, j = (_SYMBOLS.index(name) for name in ("row", "j"))
            if node.block > 1:
                row, j = (self.step(self.operations["floordiv"], n, numbers=(node.block,)) for n in (row, j))
            array = self.first_aligned + node.slot
            return self.converted(self.step(_read, array, 0, 1, row, j), node.kind)
        if isinstance(node, Apply):
            return self.apply(node, places)
        raise TypeError(f"{type(node).__name__} must be lowered before it is run")

    def converted(self, place: int, kind: str) -> int:
        return place if kind == "bool" else self.step(self.cast[kind], place)

    def apply(self, node: Apply, places: dict[int, int]) -> int:
        inner = computed_in(node)
        args, first = node.args, []
        if node.op == "where":
            first, args = [places[id(args[0])]], args[1:]
        operands = [
            places[id(a)] if a.kind == inner else self.converted(places[id(a)], inner)
            for a in args
            if not isinstance(a, Const)
        ]
        numbers = tuple(
            float(a.value) if inner == "float" else int(a.value) for a in args if isinstance(a, Const)
        )
        op = node.op
        if op in ("floordiv", "mod") and inner == "int" and not any(numbers):
            op = f"{op}_or_zero"
        return self.step(self.operations[op], *first, *operands, numbers=numbers)


_SYMBOLS = ("b", "h", "row", "i", "j", "score")


def _to_int64(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x.to(torch.int64)


def _to_float32(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x.to(torch.float32)


def _to_float64(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x.to(torch.float64)


def _read(array: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
    return array[indices]


def _inside(index: torch.Tensor, table: torch.Tensor, axis: int) -> torch.Tensor:
    """The nearest index of an axis."""
    return _to_int64(index).clamp(0, table.shape[axis] - 1)


def _inside_float(index: torch.Tensor, table: torch.Tensor, axis: int) -> torch.Tensor:
    """The nearest index of an axis; NaN gives 0."""
    import torch

    last = table.shape[axis] - 1
    low = torch.where(index > 0, index, torch.zeros_like(index)).clamp(max=last)
    # float32 may round the last index up.
    return _to_int64(low).clamp(max=last)


def _floordiv_or_zero(x: torch.Tensor, y: Any) -> torch.Tensor:
    """x // y; 0 where y is 0, as in NumPy: torch raises."""
    import torch

    y = torch.as_tensor(y)
    return torch.where(y != 0, torch.floor_divide(x, torch.where(y != 0, y, 1)), 0)


def _mod_or_zero(x: torch.Tensor, y: Any) -> torch.Tensor:
    """x % y; 0 where y is 0, as in NumPy: torch raises."""
    import torch

    y = torch.as_tensor(y)
    return torch.remainder(x, torch.where(y != 0, y, 1))


def _operations(torch: Any) -> dict[str, Callable[..., Any]]:
    return {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "truediv": torch.div,
        "floordiv": torch.floor_divide,
        "floordiv_or_zero": _floordiv_or_zero,
        "mod": torch.remainder,
        "mod_or_zero": _mod_or_zero,
        "pow": torch.pow,
        "neg": torch.neg,
        "abs": torch.abs,
        "minimum": torch.minimum,
        "maximum": torch.maximum,
        "lt": torch.lt,
        "le": torch.le,
        "gt": torch.gt,
        "ge": torch.ge,
        "eq": torch.eq,
        "ne": torch.ne,
        "and": torch.logical_and,
        "or": torch.logical_or,
        "xor": torch.logical_xor,
        "not": torch.logical_not,
        "where": torch.where,
        "exp": torch.exp,
        "log": torch.log,
        "tanh": torch.tanh,
        "sqrt": torch.sqrt,
        "sigmoid": torch.sigmoid,
        "floor": torch.floor,
        "philox": upper_bits,
    }
