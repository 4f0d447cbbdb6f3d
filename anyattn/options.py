"""The options of the three operations: their names, and what a caller gave of them.

The front door knows a call that it has seen by these alone; what describes a new one is imported for it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ARGUMENTS", "OPTIONS", "STATS", "Options", "check_names"]

STATS = ("key_mass", "entropy", "max")
_WEIGHTS = (
    "causal",
    "window",
    "mask",
    "bias",
    "score_mod",
    "softcap",
    "sinks",
    "scale",
    "kv_lengths",
    "q_offset",
    "layout",
)
OPTIONS = {
    "attention": (*_WEIGHTS, "dropout", "dropout_seed", "return_lse"),
    "weights": (*_WEIGHTS, "rows"),
    "stats": (*_WEIGHTS, "stats"),
}


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of the three operations as the caller gave them; `anyattn.attention` documents them."""

    causal: bool = False
    window: Any = None
    mask: Any = None
    bias: Any = None
    score_mod: Any = None
    softcap: Any = None
    sinks: Any = None
    scale: Any = None
    kv_lengths: Any = None
    q_offset: Any = None
    dropout: Any = 0.0
    dropout_seed: Any = None
    layout: Any = "bhld"
    return_lse: bool = False
    # Of int8 keys and values, by a cache alone.
    k_scales: Any = None
    v_scales: Any = None
    rows: Any = None
    stats: Any = ()


# The options of `attention` in their order.
ARGUMENTS = tuple(field.name for field in fields(Options))[:-2]


def check_names(function: str, operation: str, options: dict[str, Any]) -> None:
    """Raise unless every option is one of the operation's."""
    for name in options:
        if name not in OPTIONS[operation]:
            raise TypeError(
                f"{function}: unexpected option {name!r}; it takes {', '.join(OPTIONS[operation])}"
            )
