"""Weights and their statistics, a block at a time: neither holds more than tiles beside its result.

Statistics visit the tiles of the mask's schedule twice: once for the log sum of each row, then for the
weights that it gives, which are summed up and forgotten. Weights are asked for whole, so blocks of rows are
enough. Where torch must see each operation (gradients, transforms, tracing) both are those of
`anyattn.reference`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from anyattn.call import AttentionCall
from anyattn.reference import inspect as reference
from anyattn_torch import chunks, routes
from anyattn_torch.chunks import Chunk, Keys, Rows, Work
from anyattn_torch.scores import Hidden, Scores, hide
from anyattn_torch.tiles import with_sink
from anyattn_torch.visits import Span, Visit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["notes", "stats", "weights"]


def notes(call: AttentionCall) -> tuple[str, ...]:
    """What a call holds in memory."""
    if _seen_by_torch(call):
        return (
            "runs on the operations of reference, which torch differentiates: it keeps all Lq x Lk scores",
        )
    if call.operation == "stats":
        return ("runs on own tiles, twice", "holds tiles of scores, not all Lq x Lk")
    return ("holds the scores of a block of rows beside the result",)


def weights(call: AttentionCall) -> Tensor:
    """Softmax weights (..., Hq, R, Lk) of the rows asked for, in the dtype of the call."""
    if _seen_by_torch(call):
        return reference.weights(call)
    rows = torch.arange(call.q_len, device=call.device) if call.rows is None else call.rows
    heads = math.prod(call.batch_shape) * call.num_heads
    found = torch.empty(
        *call.batch_shape, call.num_heads, len(rows), call.k_len, dtype=call.q.dtype, device=call.device
    )
    scores = chunks.CPU_SCORES if call.readable else chunks.DEVICE_SCORES
    most = max(scores // max(heads * call.k_len, 1), 1)
    for start in range(0, len(rows), most):
        block = slice(start, start + most)
        found[..., block, :] = reference.weights(replace(call, rows=rows[block]))
    return found


def stats(call: AttentionCall) -> dict[str, Tensor]:
    """The statistics asked for."""
    if _seen_by_torch(call):
        return reference.stats(call)
    # No values are read; a chunk wants an array in their place.
    work = Work(replace(call, v=call.k))
    lead = (*call.batch_shape, call.num_heads)
    place: dict[str, Any] = {"dtype": work.dtype, "device": call.device}
    found = {
        "key_mass": torch.zeros(*lead, call.k_len, **place),
        "entropy": torch.zeros(*lead, call.q_len, **place),
        "max": torch.zeros(*lead, call.q_len, **place),
    }
    joined = {name: work.join(x, 2) for name, x in found.items()}
    for chunk in work.chunks():
        _add(chunk, {name: chunk.part(x, heads=True) for name, x in joined.items()})
    return {name: found[name] for name in call.stats}


def _seen_by_torch(call: AttentionCall) -> bool:
    """Whether torch must see each operation on the arrays of a call."""
    return bool(call.features & {"gradients", "traced"}) or routes.transformed(call)


class _Scores:
    """The scores of a chunk, of whatever block of it is asked for."""

    def __init__(self, chunk: Chunk):
        work, call = chunk.work, chunk.work.call
        self.scores = Scores(chunk)
        self.q = Rows(chunk, chunk.part(work.join(call.q, 3), heads=True), call.scale)
        self.k = Keys(chunk, chunk.part(work.join(call.k, 3), heads=False))

    def of(self, visit: Visit, span: Span) -> tuple[Tensor, Hidden]:
        """(entries, query heads, rows, keys), -inf where hidden."""
        queries, keys = self.q.block(visit.first, visit.last), self.k.block(span.start, span.end)
        hidden = self.scores.hidden(visit, span)
        s = self.scores.products(queries, keys, visit.last - visit.first)
        return self.scores.masked(self.scores.changed(s, hidden, visit, span), hidden), hidden


def _add(chunk: Chunk, found: dict[str, Tensor]) -> None:
    """Add what a chunk gives."""
    work, call = chunk.work, chunk.work.call
    scores = _Scores(chunk)
    sink = None if call.sinks is None else chunk.part(work.join(call.sinks, 1), heads=True)[..., None, None]
    for visit in work.visits.of(chunk.flat, chunk.heads):
        log_sum = _log_sum(chunk, scores, visit, sink)
        here = slice(visit.first, visit.last)
        for span in visit.spans:
            s, hidden = scores.of(visit, span)
            log_p = s - log_sum
            p = log_p.exp()
            hide(p, hidden, 0.0)
            found["key_mass"][:, :, span.start : span.end] += p.sum(-2)
            found["entropy"][:, :, here] -= (p * log_p.masked_fill_(p == 0, 0.0)).sum(-1)
            peak = found["max"][:, :, here]
            torch.maximum(peak, p.amax(-1), out=peak)


def _log_sum(chunk: Chunk, scores: _Scores, visit: Visit, sink: Tensor | None) -> Tensor:
    """Log of the softmax denominator of a visit, (entries, query heads, rows, 1); 0 of rows of nothing."""
    shape = chunk.shape(visit.last - visit.first, 1)
    place: dict[str, Any] = {"dtype": chunk.work.dtype, "device": chunk.work.call.device}
    top, total = torch.full(shape, -torch.inf, **place), torch.zeros(shape, **place)
    for span in visit.spans:
        s, _ = scores.of(visit, span)
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        # -inf - -inf would be NaN.
        base = new.masked_fill(new == -torch.inf, 0.0)
        total = torch.addcmul((s - base).exp_().sum(-1, keepdim=True), total, (top - base).exp_())
        top = new
    nothing, _, log_sum = with_sink(top, total, sink)
    return log_sum.masked_fill_(nothing, 0.0)
