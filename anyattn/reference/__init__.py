"""The reference backend: plain array-API calls, one block of keys at a time. It defines what is correct.

`logits` computes the scores of a block, `loop` walks over the blocks, `forward` is the streamed softmax,
`inspect` the weights and their statistics. Nothing here branches on a value, except to skip work on CPU
arrays whose values are at hand.
"""

from __future__ import annotations

from typing import Any

from anyattn.arrays import exactly
from anyattn.backend import CAPABILITIES, Backend
from anyattn.call import AttentionCall
from anyattn.reference.forward import forward
from anyattn.reference.inspect import stats, weights

__all__ = ["backend"]


class ReferenceBackend(Backend):
    """Every call, on every array-API library."""

    name = "reference"
    arrays = ("*",)
    devices = ("*",)
    capabilities = frozenset(CAPABILITIES) - {"dropout", "deterministic_backward"}

    def notes(self, call: AttentionCall) -> tuple[str, ...]:
        found = ["makes a scaled copy of q in " + call.accumulate]
        if call.dtype != call.accumulate:
            found.append(f"converts k and v from {call.dtype} to {call.accumulate} a block at a time")
        if call.features & {"gradients", "traced"}:
            found.append("gradients through it keep the scores of every block: memory grows with Lq * Lk")
        if call.operation == "weights":
            found.append("holds the scores of all rows asked for")
        return tuple(found)

    def run(self, call: AttentionCall) -> Any:
        run = {"attention": forward, "weights": weights, "stats": stats}[call.operation]
        with exactly(call.q):
            return run(call)


backend = ReferenceBackend()
