"""Which key blocks a block of queries looks at, chosen from the queries and keys themselves.

Blocks stand for the means of their rows, as in the block-sparse heads of H. Jiang et al., "MInference 1.0",
2024. The choice is data for `masks.block_sparse`, so no other choice compiles anything.
"""

from __future__ import annotations

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.numbers import boolean, integer

__all__ = ["top_blocks"]


def top_blocks(q: Array, k: Array, block_size: int, count: int, *, causal: bool = False) -> Array:
    """Boolean (..., Hq, ceil(Lq / block_size), ceil(Lk / block_size)): the `count` blocks of highest score.

    The score of two blocks is the product of the mean of the queries and the mean of the keys in them; among
    equal ones the lower block is taken. With `causal`, blocks that are later than a block of queries are not.
    See `anyattn.masks.top_blocks`.
    """
    block_size = integer(block_size, "top_blocks: block_size", least=1)
    count = integer(count, "top_blocks: count", least=0)
    arrays.check_plain(q, "top_blocks: q")
    arrays.check_beside(k, "top_blocks: k", q, "q")
    for name, x in (("q", q), ("k", k)):
        if arrays.kind(x) != "float" or x.ndim < 2:
            raise ValueError(
                f"top_blocks: {name}: wanted floats of shape (..., heads, length, dim), "
                f"got {arrays.dtype_name(x)} {tuple(x.shape)}"
            )
    if (q.ndim > 2) != (k.ndim > 2) or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"top_blocks: k: wanted the axes and features of q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    xp = arrays.namespace(q)
    wide = getattr(xp, "float64" if arrays.dtype_name(q) == "float64" else "float32")
    heads = q.shape[-3] if q.ndim > 2 else 1
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"top_blocks: k: wanted a number of heads that divides {heads}, got {kv_heads}")
    with arrays.exactly(q):
        means = [_block_means(xp, arrays.cast(xp, x, wide), block_size) for x in (q, k)]
        queries, keys = means
        if heads != kv_heads:
            # Query head h reads key head h // (heads // kv_heads).
            groups = (*queries.shape[:-3], kv_heads, heads // kv_heads, *queries.shape[-2:])
            queries, keys = xp.reshape(queries, groups), xp.expand_dims(keys, axis=-3)
        scores = xp.matmul(queries, xp.matrix_transpose(keys))
        if heads != kv_heads:
            scores = xp.reshape(scores, (*scores.shape[:-4], heads, *scores.shape[-2:]))
        begun = None
        if boolean(causal, "top_blocks: causal"):
            begun = _begun(xp, q, int(k.shape[-2]), block_size)
            scores = xp.where(begun, scores, -xp.inf)
        order = xp.argsort(-scores, axis=-1, stable=True)
        chosen = xp.argsort(order, axis=-1, stable=True) < count
        return chosen if begun is None else chosen & begun


def _begun(xp: Namespace, q: Array, k_len: int, size: int) -> Array:
    """Whether a block of keys begins no later than the last query of a block stands, (query, key blocks)."""
    q_len, where = int(q.shape[-2]), arrays.device(q)
    index = arrays.index_dtype(xp, where)
    blocks = xp.arange(-(-q_len // size), dtype=index, device=where)
    last = arrays.clip(xp, (blocks + 1) * size, 0, q_len) - 1 + k_len - q_len
    first = xp.arange(-(-k_len // size), dtype=index, device=where) * size
    return first <= xp.expand_dims(last, axis=-1)


def _block_means(xp: Namespace, x: Array, size: int) -> Array:
    """Means (..., blocks, D) of blocks of rows, the last of those there are."""
    whole = int(x.shape[-2]) // size
    parts = []
    if whole:
        blocks = arrays.take_range(x, 0, whole * size, axis=-2)
        parts.append(xp.mean(xp.reshape(blocks, (*x.shape[:-2], whole, size, x.shape[-1])), axis=-2))
    rest = int(x.shape[-2]) - whole * size
    if rest:
        last = arrays.take_range(x, whole * size, rest, axis=-2)
        parts.append(xp.mean(last, axis=-2, keepdims=True))
    if not parts:
        return x
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)
