"""What Numba's kernels compute for tiles, being several times as fast: their forward, and dropout.

Tiles and kernels speak of out and lse, so that gradients come from the one as from the other, and drop the
same weights. `routes` says when.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anyattn import registry
from anyattn.call import AttentionCall
from anyattn.dropout import drawn_from, kept_scale
from anyattn.expr.evaluate import Tile, evaluate_all
from anyattn.expr.nodes import Expr

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fill_kept", "forward", "missing", "refusal"]


def refusal(call: AttentionCall) -> str | None:
    """Why Numba does not compute the forward of a call, whose gradients it need not know; None if it does."""
    reason = missing()
    if reason is not None:
        return reason
    if call.sinks is not None and call.sinks.ndim > 1:
        return "takes one sink a head, not the mapped ones of torch.func.vmap"
    reasons: tuple[str, ...] = registry.find("numba").backend.unsupported(_plain(call))
    return reasons[0] if reasons else None


def missing() -> str | None:
    """Why there is no Numba."""
    if "numba" not in registry.names():
        return "is not installed"
    status = registry.find("numba")
    return None if status.available else f"is unavailable: {status.reason}"


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that has no `refusal`."""
    pair: tuple[Tensor, Tensor] = registry.find("numba").backend.run(_plain(call))
    return pair


def _plain(call: AttentionCall) -> AttentionCall:
    """The call as one that wants its lse and no gradients."""
    return replace(call, return_lse=True, features=call.features - {"gradients"} | {"return_lse"})


def fill_kept(kept: Tensor, keep: Expr, tile: Tile) -> None:
    """Write what dropout multiplies the weights of a tile by, (entries, heads, rows, keys)."""
    from anyattn_numba.philox import fill_kept as fill

    words, least = drawn_from(keep)
    found = evaluate_all(words, tile)
    wide = [x.reshape((1,) * (4 - x.ndim) + tuple(x.shape)).numpy() for x in found]
    fill(kept.numpy(), wide, least, kept_scale(keep))
