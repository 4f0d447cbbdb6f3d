"""Attention for any array library: one call, one meaning, the fastest kernel that is installed.

Importing this package imports no array library; see `attention` for the call, `masks` and `scores` for what
it may be given, `explain` and `backends` for what runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

from anyattn import errors, masks, scores
from anyattn.attention import attention, attention_stats, attention_weights
from anyattn.dynamo import install as _install
from anyattn.explain import explain
from anyattn.expr.functions import clip, exp, floor, log, maximum, minimum, sigmoid, sqrt, tanh, where
from anyattn.kv_cache import KVCache
from anyattn.merge import merge
from anyattn.registry import backends
from anyattn.rope import rope, rope_2d
from anyattn.settings import use

if TYPE_CHECKING:
    from anyattn import feature_maps
    from anyattn.compiled import compile  # noqa: A004
    from anyattn.linear.front import linear_attention
    from anyattn.multihead import MultiHeadAttention
    from anyattn.paged_cache import PagedKVCache
    from anyattn.varlen import pack, unpack, varlen_attention

# Before `torch.compile` reads a function that calls one of these.
_install()

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
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
    "feature_maps",
    "floor",
    "linear_attention",
    "log",
    "masks",
    "maximum",
    "merge",
    "minimum",
    "pack",
    "rope",
    "rope_2d",
    "scores",
    "sigmoid",
    "sqrt",
    "tanh",
    "unpack",
    "use",
    "varlen_attention",
    "where",
]


# What most callers never need, of the 60 ms that importing anyattn may take (8 and 5 for the first two).
_ON_DEMAND = {
    "MultiHeadAttention": "multihead",
    "compile": "compiled",
    "linear_attention": "linear.front",
    "PagedKVCache": "paged_cache",
    "pack": "varlen",
    "unpack": "varlen",
    "varlen_attention": "varlen",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        import importlib

        return getattr(importlib.import_module(f"anyattn.{_ON_DEMAND[name]}"), name)
    if name == "feature_maps":
        import importlib

        return importlib.import_module("anyattn.feature_maps")
    raise AttributeError(f"module 'anyattn' has no attribute {name!r}")
