"""The attention function of transformers, in terms of `anyattn.attention`.

Models pass what transformers' own functions take (`sdpa_attention_forward`, `eager_attention_forward`):
queries (B, Hq, Lq, D), keys and values of fewer heads as they are in the cache, and by name what the model
has of soft caps, sinks and position biases.
"""

from __future__ import annotations

from typing import Any

import torch

import anyattn
from anyattn.compat.autocast import autocast
from anyattn.compat.seeds import drawn_seed
from anyattn.compat.transformers.seen import SeenKeys

__all__ = ["attention_forward"]

# What chooses keys or adds to the softmax in a way that no option of a call says.
_REFUSED = {
    "cache": "continuous batching (a paged cache)",
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
    "sinks": "sinks that differ from query to query",
}


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer of a model of transformers.

    Parameters
    ----------
    module : torch.nn.Module
        The layer; its `is_causal` counts where there is no mask and `is_causal` is not given.
    query : tensor, shape (B, Hq, Lq, D)
    key, value : tensor, shape (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv)
    attention_mask : tensor, optional
        What `seen_keys` gave, or the user's own: booleans, True = seen, or floats that are added.
    dropout : float
        Probability with which a weight is dropped, which models give in training; the seed comes from torch's
        generator, so that `torch.manual_seed` repeats it.
    scaling : float, optional
        Default 1 / sqrt(D).
    softcap, s_aux : float; tensor, shape (Hq,); optional
        `softcap` and `sinks` of `anyattn.attention`.
    position_bias : tensor, broadcastable to (B, Hq, Lq, Lk), optional
        Added to the scores.
    output_attentions : bool
        Also compute the weights, (B, Hq, Lq, Lk), those before dropout.

    Returns
    -------
    out : tensor, shape (B, Lq, Hq, Dv)
    weights : tensor, shape (B, Hq, Lq, Lk), or None

    Raises
    ------
    NotImplementedError
        For what only some models pass and no option says; the message names it.
    ValueError
        Where there is no mask, a causal layer and as many keys as could mean two things.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: {what} is not what attn_implementation='anyattn' computes yet"
            )
    query, key, value = autocast(query, key, value)
    options = _seen(module, query, key, attention_mask, is_causal)
    if position_bias is not None:
        options["bias"] = position_bias + options["bias"] if "bias" in options else position_bias
    options |= {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    # Rows and heads in the order of the result save its copy.
    out = anyattn.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        layout="blhd",
        dropout=dropout,
        dropout_seed=drawn_seed(dropout, query, "dropout"),
        **options,
    )
    return out, anyattn.attention_weights(query, key, **options) if output_attentions else None


def _seen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
) -> dict[str, Any]:
    """The options that say which keys are seen."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(attention_mask, SeenKeys):
        if attention_mask.shape[2:] != (q_length, kv_length):
            raise ValueError(
                f"attention_mask: wanted {q_length} rows and {kv_length} keys, got a mask of shape "
                f"{tuple(attention_mask.shape)}"
            )
        return dict(attention_mask.options)
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise TypeError(f"attention_mask: wanted booleans or floats, got {attention_mask.dtype}")
        return {"mask" if attention_mask.dtype == torch.bool else "bias": attention_mask}
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not is_causal or q_length == 1:
        return {}
    if q_length != kv_length:
        raise ValueError(
            f"attention_mask: {type(module).__name__} is causal and gave none for {q_length} queries and "
            f"{kv_length} keys; wanted a mask, which says where the queries stand"
        )
    return {"causal": True}
