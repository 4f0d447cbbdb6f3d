"""`jax.nn.dot_product_attention`, argument by argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattn import arrays, masks
from anyattn.arrays import Array
from anyattn.attention import attention
from anyattn.compat.renaming import renaming

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["dot_product_attention"]

_TENSORS = ("query", "key", "value")


@renaming(
    {
        "q": "query",
        "k": "key",
        "v": "value",
        "causal": "is_causal",
        "kv_lengths": "key_value_seq_lengths",
        "window": "local_window_size",
        "backend": "implementation",
    }
)
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Sequence[int] | Array | None = None,
    key_value_seq_lengths: Sequence[int] | Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Stand in for `jax.nn.dot_product_attention`.

    Parameters
    ----------
    query : array, shape (B, T, N, H) or (T, N, H)
        JAX arrays, traced or not, or arrays of any library. Beside a JAX array, others become JAX arrays.
    key : array, shape (B, S, K, H) or (S, K, H)
        K divides N; query head n reads head n // (N // K).
    value : array, shape (B, S, K, Hv) or (S, K, Hv)
        Hv may differ from H.
    bias : float array, broadcastable to (B, N, T, S), optional
        Added to the scores. Leading axes may be missing.
    mask : boolean array, broadcastable to (B, N, T, S), optional
        True where a key takes part. Leading axes may be missing.
    scale : float, optional
        Default 1 / sqrt(H).
    is_causal : bool, default False
        Row t sees the keys 0, ..., t: the *upper left* corner of the scores, where `anyattn.attention` aligns
        the lower right one.
    query_seq_lengths : integer array (B,), optional
        Rows at or beyond give 0.
    key_value_seq_lengths : integer array (B,), optional
        Keys at or beyond never matter.
    local_window_size : int or (int, int), optional
        (left, right): row t sees the keys t - left, ..., t + right. One number stands for both.
    implementation : str, optional
        None chooses a backend as `anyattn.attention` does: `numba` for arrays on CPU that have values, and
        `reference`, which XLA compiles, for traced ones. "xla" is `reference`. "numba" takes traced arrays
        too, see the notes. Other names are those of backends; "cudnn" is refused.
    return_residual : bool, default False
        Also return the logarithm of the softmax denominator.

    Returns
    -------
    out : array, shape (B, T, N, Hv) or (T, N, Hv)
        A row that sees no key is 0.
    residual : array, shape (B, T, N) or (T, N)
        Only with `return_residual`, in the dtype of `key`, without a gradient; -inf for a row that sees no
        key.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.
    anyattn.errors.UnsupportedCallError
        If the implementation that was asked for refuses, or if none takes the call.

    Notes
    -----
    What differs from JAX 0.10: a row that sees no key is the mean of all values there, unless it is at or
    beyond `query_seq_lengths`; float64 scores are rounded to float32 there before the softmax; NaN at hidden
    keys does not matter here. `scale` is a number, not traced, and `bias` has a float dtype.

    With "numba", compiled programs call the host for the forward pass (`jax.pure_callback`) and compute the
    gradient by JAX, key blocks at a time with the weights computed again: memory grows with T + S times the
    block of 256 keys. Gradients of gradients work; forward-mode derivatives (`jax.jvp`, `jax.hessian`) do
    not. The settings of `anyattn.use` hold as they were when the function was traced.
    """
    if implementation == "cudnn":
        raise ValueError("implementation: wanted None, 'xla', 'numba' or 'reference', got 'cudnn'")
    backend = "reference" if implementation == "xla" else implementation
    given = _in_one_library(
        {
            "query": query,
            "key": key,
            "value": value,
            "bias": bias,
            "mask": mask,
            "query_seq_lengths": query_seq_lengths,
            "key_value_seq_lengths": key_value_seq_lengths,
        }
    )
    has_batch = given["query"].ndim == 4
    _check_axes(given)
    for name in (*_TENSORS, "bias", "mask"):
        if given[name] is not None:
            given[name] = _with_axes(given[name], 4)
    _check_query_lengths(given)
    window = local_window_size
    if isinstance(window, int) and not isinstance(window, bool):
        window = (window, window)
    options: dict[str, Any] = {"scale": scale, "causal": is_causal, "window": window}
    if backend == "numba" and any(arrays.is_array(x) and arrays.is_tracer(x) for x in given.values()):
        from anyattn.compat.jax_numba import call_host

        out, lse = call_host(given, **options)
    else:
        found = attention(**as_options(given), **options, return_lse=return_residual, backend=backend)
        out, lse = found if return_residual else (found, None)
    if return_residual:
        xp = arrays.namespace(lse)
        lse = arrays.cast(xp, xp.moveaxis(arrays.stop_gradient(lse), -2, -1), given["key"].dtype)
    if not has_batch:
        out, lse = out[0, ...], lse[0, ...] if return_residual else None
    return (out, lse) if return_residual else out


def as_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a call, with axes (..., B, T, N, H), as arguments of `anyattn.attention`."""
    mask, lengths = given["mask"], given["query_seq_lengths"]
    if lengths is not None:
        rows = masks.from_function(lambda b, h, i, j: i < lengths[b])
        mask = rows if mask is None else rows & masks.dense(mask)
    return {
        "q": given["query"],
        "k": given["key"],
        "v": given["value"],
        "bias": given["bias"],
        "mask": mask,
        "kv_lengths": given["key_value_seq_lengths"],
        "q_offset": 0,
        "layout": "blhd",
    }


def _in_one_library(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, as JAX arrays where query, key or value is one."""
    for name in ("bias", "mask"):
        if isinstance(given[name], masks.Mask) or callable(given[name]):
            raise TypeError(
                f"{name}: wanted an array, got {type(given[name]).__name__}; `anyattn.attention` takes "
                "expressions and functions"
            )
    if any(arrays.is_array(given[name]) and arrays.library(given[name]) == "jax" for name in _TENSORS):
        import jax.numpy as jnp

        for name, x in given.items():
            if x is not None and (not arrays.is_array(x) or arrays.library(x) == "numpy"):
                given[name] = jnp.asarray(x)
    for name in (*_TENSORS, "bias", "mask"):
        if name in _TENSORS or given[name] is not None:
            arrays.check_plain(given[name], name)
    return given


def _check_axes(given: dict[str, Any]) -> None:
    for name, last in (("query", "T, N, H"), ("key", "S, K, H"), ("value", "S, K, H")):
        shape = tuple(given[name].shape)
        if len(shape) not in (3, 4):
            raise ValueError(f"{name}: wanted axes (B, {last}) or ({last}), got shape {shape}")


def _check_query_lengths(given: dict[str, Any]) -> None:
    """Make an integer array (B,) of them."""
    query, lengths = given["query"], given["query_seq_lengths"]
    if lengths is None:
        return
    xp = arrays.namespace(query)
    if not arrays.is_array(lengths):
        lengths = xp.asarray(lengths, device=arrays.device(query))
    if arrays.kind(lengths) != "int" or tuple(lengths.shape) != (query.shape[0],):
        raise ValueError(
            f"query_seq_lengths: wanted integers of shape ({query.shape[0]},), "
            f"got {arrays.dtype_name(lengths)} {tuple(lengths.shape)}"
        )
    given["query_seq_lengths"] = lengths


def _with_axes(x: Array, rank: int) -> Array:
    """`x` with leading axes of size 1 up to a rank."""
    return x[(None,) * (rank - x.ndim) + (...,)] if x.ndim < rank else x
