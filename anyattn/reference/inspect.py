"""The weights themselves, and statistics of them that are streamed over the keys in two passes."""

from __future__ import annotations

from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.reference.forward import advance, divided, largest, log_sum, start_state
from anyattn.reference.logits import Logits
from anyattn.reference.loop import over_keys

__all__ = ["stats", "weights"]


def weights(call: AttentionCall) -> Array:
    """Softmax weights (..., Hq, R, Lk) of the rows asked for, in the dtype of the call."""
    xp, logits = call.xp, Logits(call)
    score, visible = logits.block(0, call.k_len)
    state, _, p = advance(logits, start_state(logits), score)
    return arrays.cast(xp, _hide(logits, divided(logits, state, p), visible), call.q.dtype)


def stats(call: AttentionCall) -> dict[str, Array]:
    """The statistics asked for: a pass for the log sums, then one over the weights that they give."""
    xp, logits = call.xp, Logits(call)

    def add(state: Any, start: Any, size: int) -> tuple[Any, None]:
        score, _ = logits.block(start, size)
        return advance(logits, state, score)[0], None

    state, _ = over_keys(call, add, start_state(logits))
    lse = log_sum(logits, state)
    # Rows that saw nothing have no weight; lse = -inf, or a sink that is not finite, would make it NaN.
    base = xp.expand_dims(xp.where(state[0] == -xp.inf, 0.0, lse), axis=-1)

    def summarise(carry: tuple[Array, Array], start: Any, size: int) -> tuple[tuple[Array, Array], Array]:
        entropy, peak = carry
        score, visible = logits.block(start, size)
        log_p = score - base
        p = _hide(logits, xp.exp(log_p), visible)
        surprise = -p * xp.where(p == 0, 0.0, log_p)
        carry = entropy + xp.sum(surprise, axis=-1), xp.maximum(peak, largest(logits, p))
        return carry, xp.sum(p, axis=-2)

    zero = logits.full(logits.shape(), 0.0)
    (entropy, peak), key_mass = over_keys(call, summarise, (zero, zero))
    found = {"key_mass": key_mass, "entropy": entropy, "max": peak}
    return {name: found[name] for name in call.stats}


def _hide(logits: Logits, p: Array, visible: Array | None) -> Array:
    """`p` with the 0 of hidden keys also in rows that are NaN at a seen one."""
    return p if visible is None else logits.xp.where(visible, p, 0.0)
