"""Attention in one pass over the keys, with a running maximum and sum.

Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe & Staats, "Self-attention does
not need O(n^2) memory", 2021. The state of a row is (m, l, acc): the largest score so far, and the sums of
exp(s - m) and of exp(s - m) v. A sink joins m and l at the end, so that a row without keys is known by
m = -inf whatever its sink is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.merge import merge
from anyattn.reference.logits import Logits
from anyattn.reference.loop import over_keys
from anyattn.reference.spans import Visit, visits

__all__ = ["advance", "divided", "forward", "largest", "log_sum", "start_state"]

# Keys of a chunk that are taken at a time where a lazy array has larger chunks.
LAZY_BLOCK = 1024

State = tuple[Array, Array]


def forward(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call; lse is None unless it is asked for."""
    if call.library == "dask":
        out, lse = _merged_chunks(Logits(call))
    else:
        parts = [_rows(call, visit) for visit in visits(call)]
        out = _joined(call, [part[0] for part in parts], axis=-2)
        lse = _joined(call, [part[1] for part in parts], axis=-1)
    return arrays.cast(call.xp, out, call.q.dtype), lse if call.return_lse else None


def _rows(call: AttentionCall, visit: Visit) -> tuple[Array, Array]:
    """(out, lse) of the rows of a visit."""
    logits = Logits(call, (visit.first, visit.last))
    carry = _zero(logits)
    for span in visit.spans:

        def step(carry: Any, start: Any, size: int, full: bool = span.full) -> tuple[Any, None]:
            return _step(logits, carry, start, size, full), None

        carry, _ = over_keys(call, step, carry, span.start, span.end)
    return _finish(logits, *carry)


def _joined(call: AttentionCall, parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else call.xp.concat(parts, axis=axis)


def start_state(logits: Logits) -> State:
    """(m, l) of rows that have seen no key yet."""
    return logits.full(logits.shape(), -logits.xp.inf), logits.full(logits.shape(), 0.0)


def advance(logits: Logits, state: State, score: Array) -> tuple[State, Array, Array]:
    """The state after a block of scores, the factor for earlier sums, and exp(s - m) of the block."""
    xp = logits.xp
    top, total = state
    new = xp.maximum(top, arrays.stop_gradient(largest(logits, score)))
    # Rows without a score above -inf keep m = -inf; -inf - -inf would be NaN.
    base = xp.where(new == -xp.inf, 0.0, new)
    decay = xp.exp(top - base)
    p = xp.exp(score - xp.expand_dims(base, axis=-1))
    total = total * decay + xp.sum(p, axis=-1)
    if logits.undefined is not None:
        p = p * xp.where(score == -xp.inf, 1.0, logits.undefined)
    return (new, total), decay, p


def largest(logits: Logits, x: Array) -> Array:
    """The maximum over the last axis, -inf of nothing."""
    if 0 in x.shape:
        return logits.full(x.shape[:-1], -logits.xp.inf)
    return logits.xp.max(x, axis=-1)


def log_sum(logits: Logits, state: State) -> Array:
    """Log of the softmax denominator; of rows that saw nothing the sink, or -inf."""
    xp = logits.xp
    seen, base, total, _ = _joined_by_sink(logits, state)
    sink = -xp.inf if logits.call.sinks is None else _sink(logits)
    total = xp.log(total)
    if logits.undefined is not None:
        lost = seen & xp.isnan(logits.undefined[..., 0])
        total = total * logits.undefined[..., 0] + _undoing(logits, lost, _sink(logits))
    return xp.where(seen, base + total, sink)


def divided(logits: Logits, state: State, sums: Array) -> Array:
    """Sums (..., n) of exp(s - m) and something by the softmax denominator; 0 where rows saw nothing."""
    xp = logits.xp
    seen, _, total, factor = (
        None if x is None else xp.expand_dims(x, axis=-1) for x in _joined_by_sink(logits, state)
    )
    sums = sums if factor is None else sums * factor
    found = sums / total
    if logits.undefined is not None:
        lost = xp.isnan(sums) & xp.isnan(logits.undefined)
        found = found + _undoing(logits, lost, xp.expand_dims(_sink(logits), axis=-1))
    return xp.where(seen, found, 0.0)


def _joined_by_sink(logits: Logits, state: State) -> tuple[Array, Array, Array, Array | None]:
    """Which rows saw a key, m and l with the sink, and exp(m without - m with it); 0, 1 and 1 elsewhere."""
    xp = logits.xp
    top, total = state
    seen = top != -xp.inf
    base, total = xp.where(seen, top, 0.0), xp.where(seen, total, 1.0)
    if logits.call.sinks is None:
        return seen, base, total, None
    # Where it is all that there is, it may be of any value, and this branch still has a derivative.
    counts = seen if logits.undefined is None else seen & ~xp.isnan(logits.undefined[..., 0])
    sink = xp.where(counts, _sink(logits), -xp.inf)
    larger = xp.maximum(base, arrays.stop_gradient(sink))
    factor = xp.exp(base - larger)
    return seen, larger, total * factor + xp.exp(sink - larger), factor


def _undoing(logits: Logits, lost: Array, sink: Array) -> Array:
    """NaN with the derivative NaN by the sink where a sink of NaN or infinity is met, 0 elsewhere.

    `Logits.undefined`, which is NaN there too, has no derivative by the sink.
    """
    xp = logits.xp
    zero = xp.zeros_like(sink)
    return xp.where(lost, sink, zero) * xp.where(lost, xp.nan, zero)


def _sink(logits: Logits) -> Array:
    return logits.xp.broadcast_to(logits.xp.expand_dims(logits.call.sinks, axis=-1), logits.shape())


def _zero(logits: Logits) -> tuple[State, Array]:
    return start_state(logits), logits.full(logits.shape(logits.call.v_head_dim), 0.0)


def _step(
    logits: Logits, carry: tuple[State, Array], start: Any, size: int, full: bool = False
) -> tuple[State, Array]:
    state, acc = carry
    score, visible = logits.block(start, size, full)
    state, decay, p = advance(logits, state, score)
    return state, acc * logits.xp.expand_dims(decay, axis=-1) + logits.weigh(p, visible, start, size)


def _finish(logits: Logits, state: State, acc: Array) -> tuple[Array, Array]:
    return divided(logits, state, acc), log_sum(logits, state)


def _merged_chunks(logits: Logits) -> tuple[Array, Array]:
    """Partial attention over each chunk of the keys, merged: a chain of blocks would hold them all."""
    plain = Logits(replace(logits.call, sinks=None))
    parts = (_finish(plain, *_step(plain, _zero(plain), start, size)) for start, size in _chunks(logits.call))
    out, lse = next(parts)
    for part in parts:
        out, lse = merge([out, part[0]], [lse, part[1]])
    if logits.call.sinks is None:
        return out, lse
    seen = lse != -logits.xp.inf
    if logits.undefined is not None:
        out = out * logits.xp.where(logits.xp.expand_dims(seen, axis=-1), logits.undefined, 1.0)
    return _finish(logits, (lse, logits.xp.astype(seen, logits.dtype)), out)


def _chunks(call: AttentionCall) -> Iterator[tuple[int, int]]:
    start = 0
    for chunk in call.k.chunks[-2]:
        for first in range(start, start + max(chunk, 1), LAZY_BLOCK):
            yield first, min(LAZY_BLOCK, start + chunk - first)
        start += chunk
