"""What FlashAttention's functions have in common: how they write windows, slopes and promises."""

from __future__ import annotations

from typing import Any

from anyattn import arrays, dispatch, scores
from anyattn.arrays import Array
from anyattn.backend import Backend
from anyattn.describe import Options, describe
from anyattn.dynamo import leave_out
from anyattn.errors import UnsupportedCallError
from anyattn.numbers import integer
from anyattn.scores import Score

__all__ = ["NAMES", "alibi", "check_deterministic", "unpacked", "window_bounds"]

# Arguments of anyattn in the words of FlashAttention.
NAMES = {
    "scale": "softmax_scale",
    "dropout": "dropout_p",
    "window": "window_size",
    "alibi: slopes": "alibi_slopes",
    "score_mod": "alibi_slopes",
}


def window_bounds(window_size: Any) -> tuple[int | None, int | None]:
    """A window with None where FlashAttention writes -1."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size: wanted a pair (left, right), got {window_size!r}")
    left, right = (integer(side, "window_size", least=-1) for side in window_size)
    return (None if left == -1 else left), (None if right == -1 else right)


def alibi(slopes: Array, q: Array, batch: int, heads: int) -> Score:
    """The bias of slopes of each head, or of each head and sequence."""
    arrays.check_beside(slopes, "alibi_slopes", q, "q")
    if tuple(slopes.shape) not in ((heads,), (batch, heads)) or arrays.kind(slopes) != "float":
        raise ValueError(
            f"alibi_slopes: wanted floats of shape ({heads},) or ({batch}, {heads}), "
            f"got {arrays.dtype_name(slopes)} {tuple(slopes.shape)}"
        )
    if slopes.ndim == 1:
        return scores.alibi(slopes)
    # One index: what reads a function for torch.compile meets the symbols of a tuple too late.
    flat = arrays.namespace(slopes).reshape(slopes, (batch * heads,))
    return scores.from_function(lambda s, b, h, i, j: s - flat[b * heads + h] * abs(i - j))


def check_deterministic(q: Array, k: Array, v: Array, options: dict[str, Any]) -> None:
    """Raise where gradients are wanted and the backend may sum them in another order each time."""
    call = describe("attention", q, k, v, Options(**options))
    if "gradients" not in call.features:
        return
    chosen = dispatch.choose(call, None)
    # Duck-typed backends may do without an answer of their own.
    ask = getattr(chosen, "unordered", None)
    reason = Backend.unordered(chosen, call) if ask is None else ask(call)
    if reason is not None:
        raise UnsupportedCallError(
            f"deterministic: backend {chosen.name!r}, which would run this call, {reason}",
            {chosen.name: (reason,)},
        )


leave_out(
    check_deterministic,
    "deterministic=True asks for the backend that runs; call it outside of the compiled function",
)


def unpacked(packed: Array, name: str, lead: tuple[str, ...], count: int) -> tuple[Array, ...]:
    """Views of the `count` arrays that lie along the axis behind those of `lead`."""
    arrays.check_plain(packed, name)
    if packed.ndim != len(lead) + 3 or packed.shape[len(lead)] != count:
        wanted = ", ".join((*lead, str(count), "heads", "dim"))
        raise ValueError(f"{name}: wanted axes ({wanted}), got shape {tuple(packed.shape)}")
    before = (slice(None),) * len(lead)
    return tuple(packed[(*before, n, ...)] for n in range(count))
