"""Torch tensors of any device, with gradients: torch's own attention where it means the same, else own tiles.

Dispatch imports this package to read the declaration below, so it imports nothing heavy. From there `routes`
says which way a call goes and why: `sdpa`, `flex`, or `tiles` of its own, whose forward may be `joined` to
Numba's; `linear` is linear attention, `inspect` weights and statistics. What `torch.compile` gets is in
`graph` and `recipes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattn.backend import CAPABILITIES, Backend
from anyattn.call import AttentionCall

if TYPE_CHECKING:
    from anyattn.linear.call import LinearCall

__all__ = ["backend"]


class TorchBackend(Backend):
    """Declaration of the `torch` backend."""

    name = "torch"
    arrays = ("torch.Tensor",)
    devices = ("*",)
    capabilities = frozenset(CAPABILITIES)
    requires = ("torch",)
    extra = "torch"

    def unsupported(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        """Why this backend does not take the call."""
        reasons = super().unsupported(call)
        if not reasons and "int8" in call.features and call.features & {"gradients", "traced"}:
            reasons = ("reads int8 keys and values of plain tensors alone, without gradients or tracing",)
        return reasons

    def notes(self, call: AttentionCall | LinearCall) -> tuple[str, ...]:
        """The route of the call, what it keeps in memory, and why other routes do not take it."""
        if call.operation == "linear":
            from anyattn_torch import linear

            return linear.notes(call)
        if call.operation != "attention":
            from anyattn_torch import inspect

            return inspect.notes(call)
        from anyattn_torch import routes

        return routes.notes(call)

    def unordered(self, call: AttentionCall) -> str | None:
        """Own tiles add in one order; torch's kernels do on CPU alone."""
        if call.operation != "attention":
            return None
        from anyattn_torch import routes

        return routes.unordered(call)

    def run(self, call: AttentionCall | LinearCall) -> Any:
        """Run a call."""
        if call.operation == "linear":
            from anyattn_torch import linear

            return linear.attend(call)
        if call.operation != "attention":
            from anyattn_torch import inspect

            return {"weights": inspect.weights, "stats": inspect.stats}[call.operation](call)
        from anyattn_torch import routes

        return routes.run(call)


backend = TorchBackend()
