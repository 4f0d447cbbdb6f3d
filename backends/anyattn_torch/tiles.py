"""Attention in tiles of plain torch operations, for tensors of any device, and its registration for autograd.

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
Rows keep their largest score so far, the sum of exp(score - largest), and the sum of these times v; a sink
joins them at the end. No array has more than a tile of scores. `backward` has the way back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anyattn import arrays
from anyattn.call import AttentionCall
from anyattn_torch import backward, routes
from anyattn_torch.chunks import Chunk, Keys, Rows, Work
from anyattn_torch.scores import Hidden, Scores, all_finite, cleaned, hide
from anyattn_torch.tensors import Template, fold, has_tangents, put_together, take_apart

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attend", "forward", "with_sink"]


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a call, differentiable by `anyattn_torch.tensors.differentiable(call)`."""
    if call.k_scales is not None:
        out, lse = forward(call)
        return out, lse if call.return_lse else None
    if has_tangents(call):
        # torch asks for no rule of ours where it sees each operation.
        out, lse = backward.reference(call)
        return out, lse if call.return_lse else None
    template, tensors = take_apart(call)
    out, lse = _Attend.apply(template, *tensors)
    return out, lse if call.return_lse else None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, as constants for automatic differentiation."""
    with torch.no_grad(), arrays.exactly(call.q):
        work = Work(call)
        out, lse = _results(call)
        joined = work.join(out, 3), work.join(lse, 2)
        deciding = call.v if call.v_scales is None else call.v_scales
        careful = call.visible is not None and not (work.readable and all_finite(deciding))
        for chunk in work.chunks():
            _forward(chunk, careful, *joined)
        return out, lse


def _results(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Room for out, in the caller's layout, and lse."""
    lead, rest = call.batch_shape, (call.num_heads, call.q_len)
    dtype = getattr(torch, call.accumulate)
    lse = torch.empty(*lead, *rest, dtype=dtype, device=call.device)
    swapped = call.layout == "blhd"
    shape = (*lead, *(rest[::-1] if swapped else rest), call.v_head_dim)
    out = torch.empty(shape, dtype=call.q.dtype, device=call.device)
    return out.transpose(-2, -3) if swapped else out, lse


def _forward(chunk: Chunk, careful: bool, out: Tensor, lse: Tensor) -> None:
    """Fill the part of out and lse that belongs to a chunk."""
    work, call = chunk.work, chunk.work.call
    scores = Scores(chunk)
    q = Rows(chunk, chunk.part(work.join(call.q, 3), heads=True), call.scale)
    k, v = _keys(chunk, call.k, call.k_scales), _keys(chunk, call.v, call.v_scales)
    sink = None if call.sinks is None else chunk.part(work.join(call.sinks, 1), heads=True)[..., None, None]
    out, lse = chunk.part(out, heads=True), chunk.part(lse, heads=True)

    for visit in work.visits.of(chunk.flat, chunk.heads):
        rows = visit.last - visit.first
        queries = q.block(visit.first, visit.last)
        state = _start(chunk, rows)
        for span in visit.spans:
            hidden = scores.hidden(visit, span)
            s = scores.products(queries, k.block(span.start, span.end), rows)
            s = scores.masked(scores.changed(s, hidden, visit, span), hidden)
            state, p = _advance(chunk, state, s, hidden)
            kept = scores.kept(visit, span)
            if kept is not None:
                p.view(s.shape).mul_(kept)
            values = v.block(span.start, span.end)
            if hidden and careful:
                _add_seen_nonfinite(state[2], p, _seen(s.shape, hidden, s.device).reshape(p.shape), values)
                values = cleaned(values)
            state[2].baddbmm_(p, values)
        top, total, acc = state
        acc = acc.view(chunk.shape(rows, call.v_head_dim))
        nothing, total, log_sum = with_sink(top, total, sink, acc)
        out[:, :, visit.first : visit.last] = (acc / total).masked_fill_(nothing, 0.0)
        lse[:, :, visit.first : visit.last] = log_sum[..., 0]


def with_sink(
    top: Tensor, total: Tensor, sink: Tensor | None, acc: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows have seen nothing, the sum with the sink, and its log, which for such rows is the sink.

    `acc` is scaled as the sum is.
    """
    nothing = top == -torch.inf
    base = top.masked_fill(nothing, 0.0)
    if sink is None:
        return nothing, total, base + total.log()
    larger = torch.maximum(base, sink)
    factor = (base - larger).exp_()
    total = torch.addcmul((sink - larger).exp_(), total, factor)
    if acc is not None:
        acc *= factor
    return nothing, total, torch.where(nothing, sink, larger + total.log())


def _keys(chunk: Chunk, x: Tensor, scales: Tensor | None) -> Keys:
    work = chunk.work
    factors = None if scales is None else chunk.part(work.join(scales[..., None], 3), heads=False)[..., 0]
    return Keys(chunk, chunk.part(work.join(x, 3), heads=False), factors)


State = tuple["Tensor", "Tensor", "Tensor"]


def _start(chunk: Chunk, rows: int) -> State:
    """The largest score, the sum and the weighted values of rows that have seen no key yet."""
    work = chunk.work
    place: dict[str, Any] = {"dtype": work.dtype, "device": work.call.device}
    shape = chunk.shape(rows, 1)
    acc = torch.zeros(chunk.packed(rows, work.call.v_head_dim), **place)
    return torch.full(shape, -torch.inf, **place), torch.zeros(shape, **place), acc


def _advance(chunk: Chunk, state: State, s: Tensor, hidden: Hidden) -> tuple[State, Tensor]:
    """The state before the values of a tile of scores are added, and exp(s - largest), packed."""
    top, total, acc = state
    new = torch.maximum(top, s.amax(-1, keepdim=True))
    # Rows without a score above -inf keep -inf; -inf - -inf would be NaN.
    base = new.masked_fill(new == -torch.inf, 0.0)
    p = torch.sub(s, base, out=chunk.work.buffer("scores", tuple(s.shape)))
    # Of -inf, exp takes 20 times as long on a CPU.
    hide(p, hidden, 0.0)
    p.exp_()
    hide(p, hidden, 0.0)
    decay = (top - base).exp_()
    total = torch.addcmul(p.sum(-1, keepdim=True), total, decay)
    acc *= decay.reshape(*acc.shape[:2], 1)
    return (new, total, acc), p.reshape(*acc.shape[:2], -1)


def _seen(shape: tuple[int, ...], hidden: Hidden, device: torch.device) -> Tensor:
    """Which keys of a tile of scores the rows see."""
    seen = torch.ones(shape, dtype=torch.bool, device=device)
    hide(seen, hidden, False)
    return seen


def _add_seen_nonfinite(acc: Tensor, p: Tensor, seen: Tensor, v: Tensor) -> None:
    """Add what the NaN and infinite values at seen keys give in P . V: NaN, inf, -inf, or 0 for nothing."""

    def meets(weights: Tensor, values: Tensor) -> Tensor:
        return torch.bmm(weights.to(p.dtype), values.to(p.dtype)) > 0

    positive = seen & (p > 0)
    up, down = meets(positive, v == torch.inf), meets(positive, v == -torch.inf)
    undefined = meets(seen, v.isnan()) | meets(seen & (p == 0), ~v.isfinite()) | (up & down)
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    acc += torch.where(undefined, torch.nan, torch.where(up, torch.inf, torch.where(down, -torch.inf, zero)))


class _Attend(torch.autograd.Function):  # type: ignore[misc]
    """`forward` as an operation of autograd and functorch, on the tensors of a call."""

    @staticmethod
    def forward(template: Template, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return routes.forward(put_together(template, tensors), template.call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        template, *tensors = inputs
        ctx.template = template
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(torch._C._functorch.is_legacy_batchedtensor(x) for x in grads if x is not None):
            raise NotImplementedError(
                "is_grads_batched=True (vectorize=True in torch.autograd.functional) maps by an old vmap of "
                "torch's, which own tiles have no rule for; wanted torch.func.vmap, jacrev or hessian"
            )
        out, lse, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        count = ctx.template.differentiable
        found = backward.differentiably(ctx.template, needed[:count], (out, lse), grads, tensors)
        return (None, *found, *(None,) * (len(tensors) - count))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], template: Template, *tensors: Tensor) -> Any:
        folded, own = fold(template, tensors, in_dims[1:], info.batch_size, every=False)
        return _Attend.apply(folded, *own), (0, 0)
