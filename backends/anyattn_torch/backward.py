"""Gradients of attention in tiles of plain torch operations: weights are computed again, nothing is kept.

With p = exp(score - lse), delta = sum(dout * out) - dlse (Dao et al., "FlashAttention", 2022, section 3.1):
dv = p^T . dout, dscore = p * (dout . v^T - delta), dq = scale * dscore . k, dk = scale * dscore^T . q, and
dsink = -sum(exp(sink - lse) * delta). With dropout, p is times what is kept of it in dv, and dout . v^T in
dscore; delta is as it was. The compiler's derivatives take dscore through the score function to
the scores and to captured arrays (`captured`).

Chunks, rows and keys come in one order and no two threads add to one element, so gradients have the same bits
every time where torch's own operations have (`captured` says which).

Derivatives of higher order go through `anyattn.reference`, which torch differentiates: that keeps the scores
of all tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from anyattn import arrays
from anyattn.call import AttentionCall
from anyattn.reference.forward import forward
from anyattn_torch.captured import Captured
from anyattn_torch.chunks import Chunk, Keys, KeySum, Rows, Work
from anyattn_torch.scores import Scores, all_finite, cleaned, hide
from anyattn_torch.tensors import Template, differentiable, fold, put_together

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["differentiably", "gradients", "reference"]


def gradients(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    needed: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients by `anyattn_torch.tensors.differentiable(call)`: q, k, v, sinks, arrays of the score.

    Parameters
    ----------
    call : AttentionCall
    out, lse : tensors (..., Hq, Lq, Dv), (..., Hq, Lq)
        Its results; lse also where the call does not return it.
    grad_out, grad_lse : tensors of these shapes, or None for zeros
    needed : sequence of bool, optional
        Which gradients to compute; None stands for the others. By default all.
    """
    inputs = differentiable(call)
    wanted = (True,) * len(inputs) if needed is None else tuple(needed)
    with torch.no_grad(), arrays.exactly(call.q):
        work = Work(call)
        found = _Gradients(work, wanted)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        delta = (grad_out.to(work.dtype) * out.to(work.dtype)).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        # Rows without keys have no gradient, whatever comes back to them.
        dead = lse == -torch.inf
        delta, base = delta.masked_fill(dead, 0.0), lse.masked_fill(dead, 0.0)
        grad_out = grad_out.masked_fill(dead[..., None], 0.0)
        careful = call.visible is not None and not (
            work.readable and all_finite(call.q, call.k, call.v, grad_out, delta, base)
        )
        rows = work.join(grad_out, 3), work.join(delta, 2), work.join(base, 2)
        for chunk in work.chunks():
            _backward(chunk, careful, found, rows)
        return found.results(inputs)


class _Gradients:
    """The sums of a call's gradients, in the dtype of its tiles."""

    def __init__(self, work: Work, wanted: tuple[bool, ...]):
        call = work.call
        self.work, self.wanted = work, wanted
        self.q, self.k, self.v = (
            self._zeros(work.join(x, 3)) if yes else None
            for x, yes in zip((call.q, call.k, call.v), wanted, strict=False)
        )
        has_sinks = call.sinks is not None
        self.sinks = self._zeros(work.join(call.sinks, 1)) if has_sinks and wanted[3] else None
        self.captured = Captured(work, wanted[3 + has_sinks :])

    def _zeros(self, x: Tensor) -> Tensor:
        # The entries of a chunk side by side in memory: `Chunk.whole` of a sum must not be a copy of it.
        last = len(self.work.sizes) - 1
        shape = x.movedim(self.work.inner, last).shape
        return torch.zeros(shape, dtype=self.work.dtype, device=x.device).movedim(last, self.work.inner)

    def results(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients in the shapes and dtypes of the arrays."""
        sums = [self.q, self.k, self.v]
        if self.work.call.sinks is not None:
            sums.append(self.sinks)
        sums += self.captured.sums
        return tuple(
            None if x is None else x.reshape(like.shape).to(like.dtype)
            for x, like in zip(sums, inputs, strict=True)
        )


def _backward(chunk: Chunk, careful: bool, found: _Gradients, rows: tuple[Tensor, ...]) -> None:
    """Add what a chunk gives."""
    work, call = chunk.work, chunk.work.call
    scores = Scores(chunk)
    q = Rows(chunk, chunk.part(work.join(call.q, 3), heads=True), call.scale)
    k = Keys(chunk, chunk.part(work.join(call.k, 3), heads=False))
    v = Keys(chunk, chunk.part(work.join(call.v, 3), heads=False))
    dq = None if found.q is None else chunk.part(found.q, heads=True)
    dk, dv = (None if x is None else KeySum(chunk, chunk.part(x, heads=False)) for x in (found.k, found.v))
    grad_out, delta, base = (chunk.part(x, heads=True) for x in rows)
    dout = Rows(chunk, grad_out)
    if found.sinks is not None:
        _add_sinks(chunk, found.sinks, delta, base)
    delta, base = delta[..., None], base[..., None]
    # Derivatives of a score function need the products again.
    weights = "scores" if call.score is None else "weights"

    for visit in work.visits.of(chunk.flat, chunk.heads):
        here = slice(visit.first, visit.last)
        count = visit.last - visit.first
        queries, g = q.block(visit.first, visit.last), dout.block(visit.first, visit.last)
        row_delta, row_base = delta[:, :, here], base[:, :, here]
        clean_queries = cleaned(queries) if careful else queries
        grad_q = queries.new_zeros(queries.shape)
        for span in visit.spans:
            keys, values = k.block(span.start, span.end), v.block(span.start, span.end)
            hidden = scores.hidden(visit, span)
            plain = scores.products(queries, keys, count)
            s = scores.changed(plain, hidden, visit, span)
            p = torch.sub(s, row_base, out=work.buffer(weights, tuple(s.shape))).exp_()
            hide(p, hidden, 0.0)
            packed = chunk.packed(count, span.end - span.start)
            kept = scores.kept(visit, span)
            if dv is not None:
                left = p if kept is None else torch.mul(p, kept, out=work.buffer("left", tuple(p.shape)))
                dv.add(span.start, span.end, left.reshape(packed), g)
            ds = torch.bmm(g, values.transpose(1, 2), out=work.buffer("slopes", packed)).view(p.shape)
            if kept is not None:
                ds.mul_(kept)
            ds.sub_(row_delta).mul_(p)
            right = queries
            if careful and hidden:
                ds.masked_fill_(p == 0, 0.0)
                keys, right = cleaned(keys), clean_queries
            if call.score is not None:
                ds = found.captured.through(chunk, scores.tile(visit, span.start, span.end), ds, plain)
            ds = ds.reshape(packed)
            if dq is not None:
                grad_q.baddbmm_(ds, keys)
            if dk is not None:
                dk.add(span.start, span.end, ds, right)
        if dq is not None:
            grad_q = grad_q.mul_(call.scale).view(chunk.shape(count, call.head_dim))
            dq[:, :, here] += grad_q if dq.shape[0] == chunk.entries else grad_q.sum(0, keepdim=True)


def _add_sinks(chunk: Chunk, total: Tensor, delta: Tensor, base: Tensor) -> None:
    call = chunk.work.call
    sink = chunk.part(chunk.work.join(call.sinks, 1), heads=True)[..., None]
    grad = -(torch.exp(sink - base) * delta).sum(-1)
    part = chunk.part(total, heads=True)
    part += grad if part.shape[0] == chunk.entries else grad.sum(0, keepdim=True)


def differentiably(
    template: Template,
    needed: Sequence[bool],
    results: tuple[Tensor, Tensor],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """`gradients` of a call that was taken apart, as something that autograd and functorch differentiate."""
    out, lse = results
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    grad_lse = torch.zeros_like(lse) if grads[1] is None else grads[1]
    found = list(_Backward.apply(template, tuple(needed), out, lse, grad_out, grad_lse, *tensors))
    return tuple(found.pop(0) if yes else None for yes in needed)


class _Backward(torch.autograd.Function):  # type: ignore[misc]
    """`gradients` as an operation on the tensors of a call; gives those that are needed."""

    @staticmethod
    def forward(template: Template, needed: tuple[bool, ...], *given: Tensor) -> tuple[Tensor, ...]:
        call = put_together(template, given[4:])
        out, lse, grad_out, grad_lse = given[:4]
        found = gradients(call, out, lse, grad_out, grad_lse, needed)
        return tuple(x for x in found if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.template, ctx.needed, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, *tensors = ctx.saved_tensors
        count = ctx.template.differentiable
        fixed = tensors[count:]

        def first_order(*moving: Tensor) -> tuple[Tensor, ...]:
            def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
                return reference(put_together(ctx.template, (*inputs, *fixed)))

            found = torch.func.vjp(attend, *moving[2:])[1](moving[:2])
            return tuple(x for x, yes in zip(found, ctx.needed, strict=True) if yes)

        moved = torch.func.vjp(first_order, grad_out, grad_lse, *tensors[:count])[1](grads)
        return (None, None, None, None, *moved, *(None,) * len(fixed))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], template: Template, needed: tuple[bool, ...], *given: Tensor
    ) -> Any:
        size = info.batch_size
        results = [
            x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(given[:4], in_dims[2:6], strict=True)
        ]
        folded, tensors = fold(template, given[4:], in_dims[6:], size, every=True)
        found = _Backward.apply(folded, needed, *results, *tensors)
        shapes = [
            x.shape if axis is None else x.select(axis, 0).shape
            for x, axis, yes in zip(given[4:], in_dims[6:], needed, strict=False)
            if yes
        ]
        return tuple(x.reshape(size, *own) for x, own in zip(found, shapes, strict=True)), (0,) * len(found)


def reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The call as torch differentiates it, to any order."""
    with arrays.exactly(call.q):
        out, lse = forward(replace(call, return_lse=True))
    assert lse is not None
    return out, lse
