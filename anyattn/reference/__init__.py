"""The reference backend: plain array-API calls, one block of keys at a time. It defines what is correct.

`logits` computes the scores of a block, `loop` walks over the blocks, `forward` is the streamed softmax,
`inspect` the weights and their statistics; `linear` is linear attention, `chunk` its mathematics. Nothing
here branches on a value, except to skip work on CPU arrays whose values are at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattn.arrays import exactly
from anyattn.backend import CAPABILITIES, Backend
from anyattn.call import AttentionCall
from anyattn.reference.forward import forward
from anyattn.reference.inspect import stats, weights

if TYPE_CHECKING:
    from anyattn.linear.call import LinearCall

__all__ = ["backend"]


class ReferenceBackend(Backend):
    """Every call, on every array-API library."""

    name = "reference"
    arrays = ("*",)
    devices = ("*",)
    capabilities = frozenset(CAPABILITIES) - {"deterministic_backward"}

    def notes(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        if call.operation == "linear":
            return _linear_notes(call)
        found = ["makes a scaled copy of q in " + call.accumulate]
        stored = "int8" if "int8" in call.features else call.dtype
        if stored != call.accumulate:
            found.append(f"converts k and v from {stored} to {call.accumulate} a block at a time")
        if call.features & {"gradients", "traced"}:
            found.append("gradients through it keep the scores of every block: memory grows with Lq * Lk")
        if call.operation == "weights":
            found.append("holds the scores of all rows asked for")
        return tuple(found)

    def run(self, call: AttentionCall | LinearCall) -> Any:
        with exactly(call.q):
            if call.operation == "linear":
                # Most programs never call it: 3 ms of the first call of `attention`.
                from anyattn.reference.linear import linear

                return linear(call)
            return {"attention": forward, "weights": weights, "stats": stats}[call.operation](call)


def _linear_notes(call: LinearCall) -> tuple[str, ...]:
    found = []
    if call.dtype != call.accumulate:
        found.append(f"converts q, k and v from {call.dtype} to {call.accumulate} a chunk at a time")
    if call.features & {"gradients", "traced"}:
        found.append("gradients through it keep the state and the weights of every chunk")
    if call.cu_seqlens is not None and call.cu_seqlens_host is None:
        found.append("runs every sequence over all tokens, as the host cannot read cu_seqlens")
    return tuple(found)


backend = ReferenceBackend()
