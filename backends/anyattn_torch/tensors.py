"""A call taken apart into a template and its tensors, and put together again with others.

What torch differentiates, maps or traces are the arguments of an operation, so every tensor of a call must be
one. `differentiable` fixes the order of those that have gradients: q, k, v, the sinks, and the float arrays
of the score (bias and captured arrays) in the order in which the expression reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.call import AttentionCall
from anyattn.expr.nodes import Aligned, B, Const, Expr, Load, Table, load, rewrite, walk

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Template",
    "differentiable",
    "fold",
    "has_tangents",
    "put_together",
    "score_arrays",
    "take_apart",
]

Captured = Table | Aligned


@dataclass(frozen=True, eq=False)
class Template:
    """A call without its tensors.

    `call` holds none of them; its expressions have the number of a tensor in the place of each captured one.
    The first `differentiable` tensors are those of `differentiable(call)`.
    """

    call: AttentionCall
    score: tuple[Captured, ...]
    visible: tuple[Captured, ...]
    keep: tuple[Captured, ...]
    has_sinks: bool
    has_offset: bool
    differentiable: int


def score_arrays(call: AttentionCall) -> tuple[Captured, ...]:
    """The float arrays that the score of a call reads, each once."""
    return tuple(part for part in _captured(call.score) if part.kind == "float")


def differentiable(call: AttentionCall) -> tuple[Tensor, ...]:
    """The tensors of a call that have gradients: q, k, v, sinks if any, then `score_arrays`."""
    sinks = () if call.sinks is None else (call.sinks,)
    return (call.q, call.k, call.v, *sinks, *(part.value for part in score_arrays(call)))


def has_tangents(call: AttentionCall) -> bool:
    """Whether derivatives may be taken through a call by forward mode (`torch.func.jvp`, dual tensors)."""
    from torch._C import _functorch
    from torch.autograd import forward_ad

    around = _functorch.get_interpreter_stack() or ()
    if any(level.key() == _functorch.TransformType.Jvp for level in around):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in differentiable(call))


def take_apart(call: AttentionCall) -> tuple[Template, tuple[Tensor, ...]]:
    """The template of a call and all its tensors, those with gradients first."""
    floats = score_arrays(call)
    score = (*floats, *(part for part in _captured(call.score) if part.kind != "float"))
    visible, keep = _captured(call.visible), _captured(call.keep)
    tensors = [*differentiable(call), *(part.value for part in (*score[len(floats) :], *visible, *keep))]
    has_offset = arrays.is_array(call.offset)
    if has_offset:
        tensors.append(call.offset)
    bare = replace(
        call,
        q=None,
        k=None,
        v=None,
        sinks=None,
        offset=None if has_offset else call.offset,
        score=_with_values(call.score, score, range(len(score))),
        visible=_with_values(call.visible, visible, range(len(visible))),
        keep=_with_values(call.keep, keep, range(len(keep))),
        kv_lengths=None,
        lengths_host=None,
        mask=None,
        score_mod=None,
        bias=None,
        dropout_seed=None,
    )
    template = Template(
        call=bare,
        score=_captured(bare.score, score),
        visible=_captured(bare.visible, visible),
        keep=_captured(bare.keep, keep),
        has_sinks=call.sinks is not None,
        has_offset=has_offset,
        differentiable=len(differentiable(call)),
    )
    return template, tuple(tensors)


def put_together(template: Template, tensors: Sequence[Tensor]) -> AttentionCall:
    """The call of a template with these tensors."""
    given = list(tensors)
    q, k, v = given[:3]
    rest = given[3:]
    sinks = rest.pop(0) if template.has_sinks else None
    offset: Any = rest.pop() if template.has_offset else template.call.offset
    count = len(template.score)
    last = count + len(template.visible)
    host = template.call.offset_host
    if host is None and arrays.is_concrete_cpu(offset):
        host = arrays.to_host(offset).copy()
    # Inside a transform of functorch the tensors have values that those of the caller did not have.
    changing = {
        "traced": any(arrays.is_tracer(x) for x in tensors),
        "gradients": any(arrays.needs_gradient(x) for x in tensors[: template.differentiable]),
    }
    features = template.call.features - set(changing) | {name for name, yes in changing.items() if yes}
    return replace(
        template.call,
        q=q,
        k=k,
        v=v,
        sinks=sinks,
        offset=offset,
        offset_host=host,
        score=_with_values(template.call.score, template.score, rest[:count]),
        visible=_with_values(template.call.visible, template.visible, rest[count:last]),
        keep=_with_values(template.call.keep, template.keep, rest[last:]),
        features=frozenset(features),
    )


def fold(
    template: Template, tensors: Sequence[Tensor], mapped: Sequence[int | None], size: int, *, every: bool
) -> tuple[Template, list[Tensor]]:
    """`size` calls as one, with a batch axis more in front, for `torch.func.vmap`.

    `mapped` are the axes along which tensors differ from call to call, None where they do not. With `every`,
    no tensor with a gradient is shared by the calls.
    """
    batch = template.call.batch_shape
    entries = max(math.prod(batch), 1)
    moved: list[Tensor] = []
    for n, (x, axis) in enumerate(zip(tensors, mapped, strict=True)):
        if axis is not None:
            moved.append(x.movedim(axis, 0))
        else:
            moved.append(x.expand(size, *x.shape) if every and n < template.differentiable else x)
    own = [axis is not None or (every and n < template.differentiable) for n, axis in enumerate(mapped)]

    def front(n: int, rest: int) -> Tensor:
        """Tensor `n` with its new axis before all batch axes and the last `rest` ones."""
        x = moved[n]
        if not own[n]:
            return x
        return x.reshape(size, *(1,) * (len(batch) + rest - (x.ndim - 1)), *x.shape[1:])

    folded = [front(n, 3) for n in range(3)]
    if template.has_sinks:
        folded.append(front(3, 1))
    first = len(folded)
    parts = (*template.score, *template.visible, *template.keep)
    new: dict[int, Captured] = {}
    for n, part in enumerate(parts, start=first):
        if isinstance(part, Aligned):
            folded.append(front(n, 3))
        else:
            folded.append(moved[n])
            if own[n]:
                new[id(part)] = replace(part, ndim=part.ndim + 1, axes=(None, *part.axes))
    if template.has_offset:
        folded.append(front(len(folded), 0))
    call = template.call
    bare = replace(
        call,
        batch_shape=(size, *batch),
        score=_folded(call.score, new, entries),
        visible=_folded(call.visible, new, entries),
        keep=_folded(call.keep, new, entries),
    )
    return replace(
        template,
        call=bare,
        score=tuple(new.get(id(part), part) for part in template.score),
        visible=tuple(new.get(id(part), part) for part in template.visible),
        keep=tuple(new.get(id(part), part) for part in template.keep),
    ), folded


def _folded(root: Expr | None, new: dict[int, Captured], entries: int) -> Expr | None:
    """An expression whose batch index counts `entries` for each of the calls that became one."""
    if root is None:
        return None

    def change(node: Expr) -> Expr:
        if isinstance(node, Load) and id(node.table) in new:
            table = new[id(node.table)]
            assert isinstance(table, Table)
            return load(table, (B // Const(entries, "int"), *node.indices))
        return B % Const(entries, "int") if node is B else node

    return rewrite(root, change)


def _captured(root: Expr | None, like: tuple[Captured, ...] | None = None) -> tuple[Captured, ...]:
    """The arrays that an expression reads, each once; with `like`, in the order of the numbers in them."""
    found: dict[int, Captured] = {}
    if root is not None:
        for node in walk(root):
            if isinstance(node, Load):
                found.setdefault(id(node.table), node.table)
            elif isinstance(node, Aligned):
                found.setdefault(id(node), node)
    parts = tuple(found.values())
    return parts if like is None else tuple(sorted(parts, key=lambda part: part.value))


def _with_values(root: Expr | None, parts: Sequence[Captured], values: Sequence[Any]) -> Expr | None:
    """An expression with other values in its arrays."""
    if root is None or not parts:
        return root
    new = {id(part): replace(part, value=value) for part, value in zip(parts, values, strict=True)}

    def change(node: Expr) -> Expr:
        if isinstance(node, Load):
            table = new[id(node.table)]
            assert isinstance(table, Table)
            return load(table, node.indices)
        found = new.get(id(node), node)
        assert isinstance(found, Expr)
        return found

    return rewrite(root, change)
