"""The forward of tiles by Numba's kernels, which are several times as fast; their own backward follows.

Both speak of out and lse, so that gradients come from the one as from the other. `routes` says when.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anyattn import registry
from anyattn.call import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["forward", "refusal"]


def refusal(call: AttentionCall) -> str | None:
    """Why Numba does not compute the forward of a call, whose gradients it need not know; None if it does."""
    if "numba" not in registry.names():
        return "is not installed"
    status = registry.find("numba")
    if not status.available:
        return f"is unavailable: {status.reason}"
    if call.sinks is not None and call.sinks.ndim > 1:
        return "takes one sink a head, not the mapped ones of torch.func.vmap"
    reasons: tuple[str, ...] = status.backend.unsupported(_plain(call))
    return reasons[0] if reasons else None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that has no `refusal`."""
    pair: tuple[Tensor, Tensor] = registry.find("numba").backend.run(_plain(call))
    return pair


def _plain(call: AttentionCall) -> AttentionCall:
    """The call as one that wants its lse and no gradients."""
    return replace(call, return_lse=True, features=call.features - {"gradients"} | {"return_lse"})
