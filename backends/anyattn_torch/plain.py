"""Calls that go to no other route, on the plain torch calls of `anyattn.reference`."""

from __future__ import annotations

from anyattn.arrays import Array, exactly
from anyattn.call import AttentionCall
from anyattn.reference.forward import forward

__all__ = ["attend", "memory"]


def attend(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call."""
    with exactly(call.q):
        return forward(call)


def memory(call: AttentionCall) -> tuple[str, ...]:
    """What it keeps in memory."""
    if "gradients" in call.features:
        return ("the backward keeps Lq x Lk scores: memory is quadratic",)
    return ("keeps blocks of scores, not all Lq x Lk",)
