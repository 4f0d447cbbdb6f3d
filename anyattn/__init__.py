"""Attention for any array library: one call, one meaning, the fastest kernel that is installed.

Importing this package imports no array library; see `attention` for the call, `masks` and `scores` for what it may
be given, `explain` and `backends` for what runs it.
"""

from __future__ import annotations

__version__ = "0.1.0.dev0"

from anyattn import errors, masks, scores
from anyattn.attention import attention, attention_stats, attention_weights
from anyattn.explain import explain
from anyattn.expr.functions import clip, exp, floor, log, maximum, minimum, sigmoid, sqrt, tanh, where
from anyattn.merge import merge
from anyattn.multihead import MultiHeadAttention
from anyattn.registry import backends
from anyattn.rope import rope
from anyattn.settings import use

__all__ = [
    "MultiHeadAttention",
    "__version__",
    "attention",
    "attention_stats",
    "attention_weights",
    "backends",
    "clip",
    "errors",
    "exp",
    "explain",
    "floor",
    "log",
    "masks",
    "maximum",
    "merge",
    "minimum",
    "rope",
    "scores",
    "sigmoid",
    "sqrt",
    "tanh",
    "use",
    "where",
]
