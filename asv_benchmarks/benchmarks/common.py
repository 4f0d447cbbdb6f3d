"""One call of attention as a function without arguments, by a backend of anyattn or by a peer (`peers`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

import anyattn as aa

from . import peers

BACKENDS = ("numba", "reference")
PEER = peers.SDPA
WHO = (*BACKENDS, PEER)
# For calls of attention with a mask or without.
ALL = (*WHO, peers.FLEX, peers.ORT)
_PEERS = {peers.SDPA: peers.sdpa, peers.FLEX: peers.flex, peers.ORT: peers.onnxruntime}


class Timed:
    """How often to measure: samples of at least 10 ms for about a second, in one process."""

    rounds = 1
    repeat = (3, 10, 1.0)
    sample_time = 0.01
    warmup_time = 0.1
    timeout = 600


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
        One of `ALL`.
    q_shape, kv_shape : tuple of int
        (batch, heads, length, dim) of the queries, and of keys and values where these differ.
    dtype : str
    called : bool
        Whether to call it once, so that everything is compiled.
    options
        Of `anyattn.attention`. The peers know causal, mask and kv_lengths.

    Raises
    ------
    NotImplementedError
        If `who` or the dtype is not installed, or `who` has no such call.
    """
    require(who)
    random = np.random.default_rng(0)
    shapes = (q_shape, kv_shape or q_shape, kv_shape or q_shape)
    tensors = [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
    if who in _PEERS:
        function = _PEERS[who](*tensors, dtype, **options)
    else:
        q, k, v = (x.astype(_numpy_dtype(dtype), copy=False) for x in tensors)

        def function() -> Any:
            return aa.attention(q, k, v, backend=who, **options)

    if called:
        function()
    return function


def require(who: str) -> None:
    """Raise `NotImplementedError`, which asv shows as n/a, if `who` is not installed."""
    if who in _PEERS:
        peers.require(who)
    elif who not in aa.backends() or not aa.backends()[who].available:
        raise NotImplementedError(f"{who} is not installed")


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    if find_spec("ml_dtypes") is None:
        raise NotImplementedError("NumPy has no bfloat16 without ml_dtypes")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
