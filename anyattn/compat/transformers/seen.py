"""Which keys are seen: the mask of a forward pass, as options of `anyattn.attention`.

transformers asks once a forward pass for each kind of layer and hands the answer to every layer's attention
function. Models look at it on the way, and those that compute attention themselves add it to their scores. So
the answer is a tensor of shape (B, 1, Lq, Lk), as of transformers' `eager_mask`, to whoever looks, whose
entries are computed only then; what the attention function takes from it are the `options`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from anyattn import masks
from anyattn.compat.transformers.traced import conditions
from anyattn.errors import TraceError
from anyattn.expr.nodes import Expr, I
from anyattn.expr.structure import structure
from anyattn.masks import Mask

__all__ = ["SeenKeys", "seen_keys"]


class SeenKeys(torch.Tensor):  # type: ignore[misc]
    """A mask that is added to scores, (B, 1, Lq, Lk), computed when somebody looks at its entries.

    Attributes
    ----------
    options : dict
        What it says, as keyword arguments of `anyattn.attention`.
    """

    options: dict[str, Any]
    dense: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls: type[SeenKeys],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        options: dict[str, Any],
        dense: Callable[[], torch.Tensor],
    ) -> SeenKeys:
        self: SeenKeys = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.options = options
        self.dense = functools.cache(dense)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(SeenKeys, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


def seen_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask of one kind of layer; the signature is that of transformers' own, `eager_mask`.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        B, Lq and Lk.
    q_offset, kv_offset : int
        What transformers calls row 0 and key 0 of the call.
    mask_function : callable
        (batch_idx, head_idx, q_idx, kv_idx) -> bool.
    attention_mask : tensor of bool, shape (B, number of tokens), optional
        False where a token is padding.
    local_size : int, optional
        The window or chunk of `mask_function`.
    use_vmap : bool
        Whether `mask_function` may only be called with single indices.
    device, dtype : torch.device or str; torch.dtype
        Of the model's hidden states.

    Returns
    -------
    tensor of `dtype`, shape (B, 1, Lq, Lk)
        `SeenKeys`, or the entries themselves while a graph is being traced.
    """
    arguments: dict[str, Any] = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
    )
    dense = functools.partial(masking_utils.eager_mask, **arguments, dtype=dtype)
    if is_tracing(attention_mask):
        return dense()
    first_query, first_key = _number(q_offset), _number(kv_offset)
    if q_length == 1 and isinstance(first_query, torch.Tensor):
        # A static cache on a device: its row is computed there, and nothing waits for a position to be read.
        return dense()
    try:
        options = _pattern(mask_function, local_size, first_key)
    except TraceError as error:
        warnings.warn(
            f"anyattn: {error}; the mask is evaluated at all {q_length} x {kv_length} pairs", stacklevel=2
        )
        options = {"mask": masks.dense(masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False))}
    else:
        options = _and(options, _unpadded(attention_mask, kv_length, first_key))
    options["q_offset"] = first_query - first_key
    options = _without_idle(options, q_length, kv_length)
    shape = (batch_size, 1, q_length, kv_length)
    return SeenKeys(shape, dtype, torch.device(device), options, dense)


def _number(value: int | torch.Tensor) -> Any:
    """Static caches count in tensors, which are read where that is no transfer."""
    return int(value) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


def _pattern(mask_function: Callable[..., Any], local_size: int | None, first_key: Any) -> dict[str, Any]:
    """The options that say what a mask function says."""
    if mask_function is masking_utils.causal_mask_function:
        return {"causal": True}
    named = _named(local_size)
    known = [named.get(structure(part).text or "") for part in conditions(mask_function)]
    found: dict[str, Any] = {}
    for option in known:
        found |= option or {}
    if None not in known:
        return found
    # What is not a causal order or a window may read tables at its indices: these count from the first key.
    shifted = conditions(mask_function, first_key)
    for part, option in zip(shifted, known, strict=True):
        if option is None:
            found = _and(found, {"mask": Mask(part, repr(part))})
    return found


@functools.cache
def _named(local_size: int | None) -> dict[str, dict[str, Any]]:
    """Conditions of transformers that have an option of their own, by their structure."""
    everywhere: Expr = I >= 0
    causal, both = masking_utils.causal_mask_function, masking_utils.sliding_window_bidirectional_overlay
    named: list[tuple[Expr, dict[str, Any]]] = [(everywhere, {})]
    named += [(part, {"causal": True}) for part in conditions(causal)]
    if local_size is not None:
        left = masking_utils.sliding_window_overlay(local_size)
        named += [(part, {"window": (local_size - 1, None)}) for part in conditions(left)]
        named += [(part, {"window": (local_size, local_size)}) for part in conditions(both(local_size))]
    return {structure(part).text or "": option for part, option in named}


def _unpadded(attention_mask: torch.Tensor | None, kv_length: int, first_key: Any) -> dict[str, Any]:
    """The options that hide padding: lengths and first keys where the rest is in one piece."""
    if attention_mask is None:
        return {}
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask: wanted shape (batch, tokens), or (batch, 1, queries, keys) of pairs, "
            f"got {tuple(attention_mask.shape)}"
        )
    padded = masking_utils.prepare_padding_mask(attention_mask, kv_length, first_key)
    kept = padded[:, first_key : first_key + kv_length].to(torch.bool)
    if kept.all():
        return {}
    counts = kept.sum(dim=1)
    numbers = torch.arange(kv_length, device=kept.device)
    starts = torch.where(kept, numbers, kv_length).amin(dim=1)
    stops = torch.where(kept, numbers + 1, 0).amax(dim=1)
    starts = torch.minimum(starts, stops)
    # One transfer for all answers where the mask is on a device.
    answers = [stops - starts == counts, starts == 0, stops == kv_length]
    one_piece, from_first, to_last = torch.stack(answers).all(dim=1).tolist()
    if not one_piece:
        return {"mask": masks.dense(kept[:, None, None, :])}
    options: dict[str, Any] = {} if from_first else {"mask": ~masks.prefix(starts)}
    return options if to_last else options | {"kv_lengths": stops}


def _and(options: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Both; only masks may be in both."""
    joined = options | others
    if "mask" in options and "mask" in others:
        joined["mask"] = options["mask"] & others["mask"]
    return joined


def _without_idle(options: dict[str, Any], q_length: int, kv_length: int) -> dict[str, Any]:
    """Without a causal order or a window that hides nothing in this call, as while decoding."""
    options = dict(options)
    first = options["q_offset"]
    if not isinstance(first, int):
        return options
    last = first + q_length - 1
    if options.get("causal") and first >= kv_length - 1:
        del options["causal"]
    if "window" in options:
        left, right = options["window"]
        if last <= left and (right is None or right >= kv_length - 1 - first):
            del options["window"]
    return options
