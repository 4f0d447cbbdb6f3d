"""`flash_attn_with_kvcache`: new tokens are rotated, written into a cache, and attend to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.attention import attention
from anyattn.compat.flash_attn.arguments import NAMES, alibi, window_bounds
from anyattn.compat.flash_attn.pages import check_pages, check_table, of_table
from anyattn.compat.renaming import renaming
from anyattn.dynamo import leave_out
from anyattn.expr.nodes import B, Expr, J, load
from anyattn.expr.tables import table_of
from anyattn.kv_cache import write
from anyattn.lookup import Cache, Lookup
from anyattn.masks import Mask
from anyattn.numbers import boolean, integer
from anyattn.rope import rotate

__all__ = ["flash_attn_with_kvcache"]


@renaming(NAMES)
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Stand in for `flash_attn.flash_attn_with_kvcache`; **writes into `k_cache` and `v_cache`**.

    Parameters
    ----------
    q : array, shape (batch, Lq, Hq, D)
    k_cache : array, shape (cache batch, S, Hkv, D), or (pages, page_size, Hkv, D) with `block_table`
    v_cache : array, shape (cache batch, S, Hkv, Dv), or (pages, page_size, Hkv, Dv)
    k, v : arrays, shape (batch, n, Hkv, D) and (batch, n, Hkv, Dv), optional
        New tokens, written behind the first `cache_seqlens` ones. There must be room; where the host cannot
        read the lengths that is not checked.
    rotary_cos, rotary_sin : arrays, shape (positions, dims / 2), optional
        Rotate k by its positions, and q by those of its rows with `causal` or a window, else by that of the
        first new token.
    cache_seqlens : int or integer array, shape (batch,), optional
        Tokens in the cache before the call; default all S.
    cache_batch_idx : integer array, shape (batch,), optional
        Entry of the cache of each sequence.
    cache_leftpad : integer array, shape (batch,), optional
        Keys at the beginning that are padding.
    block_table : integer array, shape (batch, most pages of a sequence), optional
        Pages of each sequence, in order; as for `flash_attn_varlen_func`.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As for `flash_attn_func`; the last query sees the last key.
    rotary_interleaved : bool, default True
        Turn features 2m and 2m + 1 together, else m and m + dims / 2.
    num_splits : int, default 0
        How FlashAttention splits keys; kernels here decide that themselves.
    return_softmax_lse : bool, default False

    Returns
    -------
    out : array, shape (batch, Lq, Hq, Dv)
    softmax_lse : array, shape (batch, Hq, Lq)
        Only with `return_softmax_lse`.
    k_cache, v_cache : arrays
        Only where tokens were written and the library cannot write into arrays (JAX): the new cache.
    """
    _check(q, k_cache, v_cache, k, v, block_table, cache_batch_idx)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_sin: wanted an array with rotary_cos, and None without")
    integer(num_splits, "num_splits", least=0)
    batch, q_len, heads = (int(n) for n in q.shape[:3])
    xp, device = arrays.namespace(q), arrays.device(q)
    index = arrays.index_dtype(xp, device)
    with arrays.exactly(q):
        size = int(k_cache.shape[1])
        table = block_table if cache_batch_idx is None else xp.expand_dims(cache_batch_idx, axis=-1)
        if table is not None:
            table = arrays.cast(xp, table, index)
        room = size * (1 if table is None else int(table.shape[1]))
        before = _lengths(room if cache_seqlens is None else cache_seqlens, "cache_seqlens", batch, q, index)
        new = 0 if k is None else int(k.shape[1])
        bounds = window_bounds(window_size)
        moving = boolean(causal, "causal") or bounds != (None, None)
        if rotary_cos is not None:
            _check_rotations(rotary_cos, rotary_sin, before, max(q_len if moving else 1, new))
            at = xp.expand_dims(before, axis=-1)
            rows = xp.arange(max(q_len, new), dtype=index, device=device)
            q = _turn(q, at + rows[:q_len] if moving else at, rotary_cos, rotary_sin, rotary_interleaved)
            if k is not None:
                k = _turn(k, at + rows[:new], rotary_cos, rotary_sin, rotary_interleaved)
        _check_room(before, new, room)
        if table is not None:
            name = "block_table" if cache_batch_idx is None else "cache_batch_idx"
            check_pages(table, before + new, k_cache, name)
        if k is not None and new:
            place = _places(before, new, table, size, xp, index, device)
            k_cache, v_cache = write(k_cache, place, k), write(v_cache, place, v)
        lengths = before + new
        found = _lookup(k_cache, v_cache, table, lengths, index)
        mask = None
        if cache_leftpad is not None:
            mask = _padded(_lengths(cache_leftpad, "cache_leftpad", batch, q, index))
    options: dict[str, Any] = {
        "causal": boolean(causal, "causal"),
        "window": bounds,
        "mask": mask,
        "score_mod": None if alibi_slopes is None else alibi(alibi_slopes, q, batch, heads),
        "softcap": softcap or None,
        "scale": softmax_scale,
        "layout": "blhd",
        "return_lse": boolean(return_softmax_lse, "return_softmax_lse"),
    }
    result = attention(q, _Given(found), **options)
    parts = result if return_softmax_lse else (result,)
    if k is not None and arrays.library(k_cache) == "jax":
        parts = (*parts, k_cache, v_cache)
    return parts if len(parts) > 1 else parts[0]


leave_out(
    flash_attn_with_kvcache,
    "flash_attn_with_kvcache writes into a cache; call it outside of the compiled function",
)


@dataclass(frozen=True, eq=False)
class _Given(Cache):
    """The caller's arrays as a cache."""

    found: Lookup

    def lookup(self) -> Lookup:
        return self.found


def _lookup(k_cache: Array, v_cache: Array, table: Array | None, lengths: Array, index: Any) -> Lookup:
    if table is None:
        xp = arrays.namespace(k_cache)
        k, v = (arrays.moveaxis(xp, x, 1, 2) for x in (k_cache, v_cache))
        return Lookup(k, v, lengths)
    return of_table(k_cache, v_cache, table, lengths, index)


def _places(
    before: Array, new: int, table: Array | None, size: int, xp: Any, index: Any, device: Any
) -> tuple[Array, Array]:
    """Entry (or page) and token in it of each new token, (batch, new)."""
    token = xp.expand_dims(before, axis=-1) + xp.arange(new, dtype=index, device=device)
    batch = int(before.shape[0])
    if table is None:
        entry = xp.arange(batch, dtype=index, device=device)
        return xp.broadcast_to(xp.expand_dims(entry, axis=-1), (batch, new)), token
    page = arrays.clip(xp, token // size, 0, int(table.shape[1]) - 1)
    row = xp.expand_dims(xp.arange(batch, dtype=index, device=device), axis=-1) * int(table.shape[1])
    flat = arrays.take(xp, xp.reshape(table, (-1,)), xp.reshape(row + page, (-1,)), axis=-1)
    return xp.reshape(flat, (batch, new)), token % size


def _turn(x: Array, positions: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """`x` (batch, L, H, D) turned by rows `positions` of the tables."""
    xp = arrays.namespace(x)
    wide = xp.float64 if arrays.dtype_name(x) == "float64" else xp.float32

    def rows(table: Array) -> Array:
        arrays.check_beside(table, "rotary_cos", x, "q")
        found = arrays.take(xp, table, xp.reshape(positions, (-1,)), axis=-2)
        return arrays.cast(xp, xp.reshape(found, (*positions.shape, table.shape[-1])), wide)

    dims = 2 * int(cos.shape[-1])
    if dims > x.shape[-1]:
        raise ValueError(
            f"rotary_cos: wanted at most {x.shape[-1] // 2} columns, got shape {tuple(cos.shape)}"
        )
    return rotate(xp, x, rows(cos), rows(sin), dims, boolean(interleaved, "rotary_interleaved"), "blhd")


def _padded(leftpad: Array) -> Mask:
    first: Expr = load(table_of(leftpad, "cache_leftpad", ("b",)), (B,))
    return Mask(first <= J, "behind cache_leftpad")


def _lengths(given: Any, name: str, batch: int, q: Array, index: Any) -> Array:
    """Integers of each sequence beside `q`."""
    xp, device = arrays.namespace(q), arrays.device(q)
    if not arrays.is_array(given):
        return xp.full((batch,), integer(given, name, least=0), dtype=index, device=device)
    arrays.check_beside(given, name, q, "q")
    if arrays.kind(given) != "int" or tuple(given.shape) != (batch,):
        raise ValueError(
            f"{name}: wanted integers of shape ({batch},), got {arrays.dtype_name(given)} "
            f"{tuple(given.shape)}"
        )
    return arrays.cast(xp, given, index)


def _check_rotations(cos: Array, sin: Array | None, before: Array, count: int) -> None:
    """Raise where the host can read that a table ends before the last position."""
    if arrays.is_concrete_cpu(before):
        host = arrays.to_host(before)
        last = int(host.max(initial=0)) + count
        for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
            if table is not None and arrays.is_array(table) and table.shape[0] < last:
                raise ValueError(
                    f"{name}: wanted {last} rows, one for each position, got shape {tuple(table.shape)}"
                )


def _check_room(before: Array, new: int, room: int) -> None:
    if arrays.is_concrete_cpu(before):
        host = arrays.to_host(before)
        if host.size and (host.min() < 0 or host.max() + new > room):
            raise ValueError(
                f"cache_seqlens: wanted 0 to {room - new}, so that {new} new tokens fit, "
                f"got {host.min()} to {host.max()}"
            )


def _check(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None,
    v: Array | None,
    block_table: Array | None,
    cache_batch_idx: Array | None,
) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        arrays.check_beside(x, name, q, "q")
        if x.ndim != 4:
            raise ValueError(f"{name}: wanted four axes, got shape {tuple(x.shape)}")
    if (k is None) != (v is None):
        raise ValueError("v: wanted an array with k, and None without")
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is None:
            continue
        arrays.check_beside(new, name, q, "q")
        if arrays.dtype_name(new) != arrays.dtype_name(cache):
            raise TypeError(
                f"{name}: wanted dtype {arrays.dtype_name(cache)} like {name}_cache, "
                f"got {arrays.dtype_name(new)}"
            )
        if arrays.library(cache) == "numpy" and not cache.flags.writeable:
            raise ValueError(f"{name}_cache: wanted an array that can be written to, got a read-only one")
        strides = arrays.strides(cache) or ()
        # NumPy writes 0 for all axes of an array without entries.
        if 0 not in cache.shape and any(
            n > 1 and step == 0 for n, step in zip(cache.shape, strides, strict=False)
        ):
            raise ValueError(
                f"{name}_cache: wanted an array whose entries all have memory of their own, for new tokens, "
                f"got strides {strides} for {tuple(cache.shape)}; copy it first"
            )
        if new.ndim != 4 or new.shape[0] != q.shape[0] or tuple(new.shape[2:]) != tuple(cache.shape[2:]):
            wanted = (int(q.shape[0]), "n", *(int(n) for n in cache.shape[2:]))
            raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(new.shape)}")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: wanted None with block_table, which says where sequences lie")
    for name, table, rank in (("block_table", block_table, 2), ("cache_batch_idx", cache_batch_idx, 1)):
        if table is not None:
            check_table(table, name, rank, int(q.shape[0]), q)
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache: wanted {q.shape[0]} sequences like q, or cache_batch_idx, got {k_cache.shape[0]}"
        )
