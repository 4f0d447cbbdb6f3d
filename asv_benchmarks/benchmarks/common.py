"""One call of attention as a function without arguments, by a backend of anyattn or by torch's SDPA.

The peer is torch's own `scaled_dot_product_attention` on the same numbers, not anyattn's backend `torch`. It
takes no mask expression, so it gets the same mask as a boolean array, made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

import anyattn as aa

BACKENDS = ("numba", "reference")
PEER = "torch SDPA (peer)"
WHO = (*BACKENDS, PEER)


class Timed:
    """How often to measure: samples of at least 10 ms for about a second, in one process."""

    rounds = 1
    repeat = (3, 10, 1.0)
    sample_time = 0.01
    warmup_time = 0.1
    timeout = 180


def call(
    who: str,
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...] | None = None,
    dtype: str = "float32",
    *,
    called: bool = True,
    **options: Any,
) -> Callable[[], Any]:
    """Attention on random numbers.

    Parameters
    ----------
    who : str
        One of `WHO`.
    q_shape, kv_shape : tuple of int
        (batch, heads, length, dim) of the queries, and of keys and values where these differ.
    dtype : str
    called : bool
        Whether to call it once, so that everything is compiled.
    options
        Of `anyattn.attention`. The peer knows causal, mask and kv_lengths.

    Raises
    ------
    NotImplementedError
        If `who` or the dtype is not installed, or `who` has no such call.
    """
    require(who)
    random = np.random.default_rng(0)
    shapes = (q_shape, kv_shape or q_shape, kv_shape or q_shape)
    tensors = [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
    if who == PEER:
        function = _peer(*tensors, dtype, **options)
    else:
        q, k, v = (x.astype(_numpy_dtype(dtype), copy=False) for x in tensors)

        def function() -> Any:
            return aa.attention(q, k, v, backend=who, **options)

    if called:
        function()
    return function


def require(who: str) -> None:
    """Raise `NotImplementedError`, which asv shows as n/a, if `who` is not installed."""
    if who == PEER:
        installed = find_spec("torch") is not None
    else:
        installed = who in aa.backends() and aa.backends()[who].available
    if not installed:
        raise NotImplementedError(f"{who} is not installed")


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    if find_spec("ml_dtypes") is None:
        raise NotImplementedError("NumPy has no bfloat16 without ml_dtypes")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _peer(q: Any, k: Any, v: Any, dtype: str, *, causal: bool = False, **options: Any) -> Callable[[], Any]:
    """Torch's SDPA with the same meaning."""
    import torch

    grouped = q.shape[1] != k.shape[1]
    mask = None
    if options:
        mask = torch.from_numpy(visible(q.shape[2], k.shape[2], q.shape[0], causal=causal, **options))
        causal = False
    elif causal and q.shape[2] != k.shape[2]:
        raise NotImplementedError("the peer aligns causal masks at the other end")
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (q, k, v))

    def function() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )

    return function


def visible(q_len: int, k_len: int, batch: int = 1, **options: Any) -> np.ndarray[Any, Any]:
    """Which keys each query sees, (batch, 1, q_len, k_len), for masks that are the same for all heads."""
    q, k = np.zeros((batch, 1, q_len, 1), np.float32), np.zeros((batch, 1, k_len, 1), np.float32)
    return aa.attention_weights(q, k, backend="reference", **options) > 0
