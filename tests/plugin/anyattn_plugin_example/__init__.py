"""A backend written from the documentation alone: NumPy's `einsum` and a softmax, one batch entry at a time.

It takes part of the contract and declares which. What it leaves out (masks and scores as expressions, strict
masking, weights, statistics) is refused by the base class, from the declaration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyattn.backend import Backend

if TYPE_CHECKING:
    import numpy as np

    from anyattn.call import AttentionCall

__all__ = ["backend"]

# The whole (heads, Lq, Lk) block of scores of a batch entry is held at once.
_LARGEST = 2**26


class EinsumBackend(Backend):
    """Attention on NumPy arrays with all scores of a batch entry in memory."""

    name = "einsum"
    arrays = ("numpy.ndarray",)
    dtypes = frozenset({"float16", "float32", "float64"})
    devices = ("cpu",)
    capabilities = frozenset(
        {
            "bias",
            "causal",
            "grouped_heads",
            "kv_lengths",
            "q_offset",
            "return_lse",
            "sinks",
            "softcap",
            "window",
        }
    )
    requires = ("numpy",)

    def unsupported(self, call: AttentionCall) -> tuple[str, ...]:
        """Return the reasons from the declaration, and one of its own."""
        reasons = super().unsupported(call)
        scores = call.num_heads * call.q_len * call.k_len
        if scores > _LARGEST:
            reasons += (f"holds {_LARGEST} scores of a batch entry at most, this call has {scores}",)
        return reasons

    def run(self, call: AttentionCall) -> tuple[np.ndarray, np.ndarray | None]:
        """Run a call that `unsupported` has no reason against."""
        from anyattn_plugin_example.kernel import attend

        return attend(call)


backend = EinsumBackend()
