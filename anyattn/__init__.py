"""Attention for any array library: one call, one meaning, the fastest kernel that is installed.

Importing this package imports no array library; see `attention` for the call, `masks` and `scores` for what
it may be given, `explain` and `backends` for what runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

from anyattn import errors, masks, scores
from anyattn.attention import attention, attention_stats, attention_weights
from anyattn.explain import explain
from anyattn.expr.functions import clip, exp, floor, log, maximum, minimum, sigmoid, sqrt, tanh, where
from anyattn.merge import merge
from anyattn.registry import backends
from anyattn.rope import rope
from anyattn.settings import use

if TYPE_CHECKING:
    from anyattn.compiled import compile  # noqa: A004
    from anyattn.multihead import MultiHeadAttention
    from anyattn.varlen import pack, unpack, varlen_attention

__all__ = [
    "MultiHeadAttention",
    "__version__",
    "attention",
    "attention_stats",
    "attention_weights",
    "backends",
    "clip",
    "compile",
    "errors",
    "exp",
    "explain",
    "floor",
    "log",
    "masks",
    "maximum",
    "merge",
    "minimum",
    "pack",
    "rope",
    "scores",
    "sigmoid",
    "sqrt",
    "tanh",
    "unpack",
    "use",
    "varlen_attention",
    "where",
]


def __getattr__(name: str) -> Any:
    # Modules that most callers never need: 8 ms and 5 ms of the 60 that importing anyattn may take.
    if name == "MultiHeadAttention":
        from anyattn.multihead import MultiHeadAttention

        return MultiHeadAttention
    if name == "compile":
        from anyattn.compiled import compile  # noqa: A004

        return compile
    if name in ("pack", "unpack", "varlen_attention"):
        from anyattn import varlen

        return getattr(varlen, name)
    raise AttributeError(f"module 'anyattn' has no attribute {name!r}")
