"""One chunk of linear attention as matrix products, for all four rules.

With no decay and no beta it is causal attention without softmax plus what the state adds. Decay comes in by
halving: of two neighbouring blocks, queries are scaled by what is kept since the border between them and keys
by what is kept until it. Both exponents are sums of the decays themselves, so that for decays <= 0 nothing
overflows, nothing cancels, and -inf means 0 (a quotient of cumulated decays would be 0 / 0).

The delta rules write u = beta (v - recalled), and a token recalls what earlier ones of the chunk wrote: that
is (I + N) U = R with N strictly lower triangular (the UT transform of Yang et al., "Parallelizing Linear
Transformers with the Delta Rule over Sequence Length", 2024, section 3.2), inverted by the same halving.
"""

from __future__ import annotations

from anyattn import arrays
from anyattn.arrays import Array, Namespace

__all__ = ["advance"]


def advance(
    xp: Namespace,
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    decay: Array | None = None,
    beta: Array | None = None,
) -> tuple[Array, Array]:
    """What `anyattn.linear.recurrence.recurrence` gives: rows (..., L, G, Dv) and the state after them."""
    length, group = q.shape[-3:-1]
    if length > 0 and (decay is not None or beta is not None):
        padded = 1 << (length - 1).bit_length()
        q, k, v = _pad(xp, q, padded, -3), _pad(xp, k, padded, -2), _pad(xp, v, padded, -2)
        decay = None if decay is None else _pad(xp, decay, padded, -2)
        beta = None if beta is None else _pad(xp, beta, padded, -1)

    sums = _sums(xp, decay) if decay is not None and length > 0 else None
    kept, left = (None, None) if sums is None else map(xp.exp, sums[-1])
    if beta is not None and length > 0:
        recalled = xp.matmul(k if kept is None else k * kept, state)
        column = xp.expand_dims(beta, axis=-1)
        below = _blocks_below(xp, xp.expand_dims(k, axis=-2), k, sums)
        v = xp.matmul(_unit_inverse(xp, column, below), column * (v - recalled))

    reading = _rows(xp, q if kept is None else q * xp.expand_dims(kept, axis=-2))
    if sums is None:
        weights = _lower(xp, xp.matmul(_rows(xp, q), xp.matrix_transpose(k)), group)
    else:
        weights = _assembled(xp, _own(xp, q, k), _blocks_below(xp, q, k, sums))
    out = xp.matmul(weights, v) + xp.matmul(reading, state)
    if kept is not None:
        state = xp.matrix_transpose(kept[..., -1:, :]) * state
    keys = k if left is None else k * left
    state = state + xp.matmul(xp.matrix_transpose(keys), v)
    out = xp.reshape(out, (*out.shape[:-2], k.shape[-2], group, out.shape[-1]))
    return arrays.take_range(out, 0, length, axis=-3), state


def _pad(xp: Namespace, x: Array, length: int, axis: int) -> Array:
    """Zeros behind `x`: tokens that keep everything, write nothing and are not asked for."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=arrays.device(x))], axis=axis)


def _rows(xp: Namespace, x: Array) -> Array:
    """(..., L, G, F) -> (..., L * G, F)."""
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def _lower(xp: Namespace, weights: Array, group: int) -> Array:
    """Weights (..., L * G, L) with 0 at later tokens."""
    rows, length = weights.shape[-2:]
    where = arrays.device(weights)
    token = xp.arange(length, dtype=arrays.index_dtype(xp, where), device=where)
    own = xp.reshape(xp.broadcast_to(xp.reshape(token, (length, 1)), (length, group)), (rows, 1))
    return xp.where(token <= own, weights, 0.0)


def _split(xp: Namespace, x: Array, size: int, axis: int) -> tuple[Array, Array]:
    """Left and right of each pair of blocks of `size` tokens on a negative axis: (..., pairs, size, ...)."""
    shape, at = list(x.shape), x.ndim + axis
    shape[at : at + 1] = [shape[at] // (2 * size), 2, size]
    pairs = xp.reshape(x, tuple(shape))
    after = (slice(None),) * (pairs.ndim - at - 2)
    return pairs[(..., 0, *after)], pairs[(..., 1, *after)]


def _sums(xp: Namespace, decay: Array) -> list[tuple[Array, Array]]:
    """Sums of the decays (..., L, F) since the start and until the end of blocks of 1, 2, 4, ..., L tokens.

    A token's own decay counts since the start, not until the end.
    """
    found = [(decay, xp.zeros_like(decay))]
    size = 1
    while size < decay.shape[-2]:
        (left, right), (left_until, right_until) = (_split(xp, x, size, -2) for x in found[-1])
        since = xp.concat([left, left[..., -1:, :] + right], axis=-2)
        until = xp.concat([left_until + right[..., -1:, :], right_until], axis=-2)
        found.append((xp.reshape(since, decay.shape), xp.reshape(until, decay.shape)))
        size *= 2
    return found


def _own(xp: Namespace, q: Array, k: Array) -> Array:
    """Each token's weight for its own key, (..., L, G, 1)."""
    return xp.sum(q * xp.expand_dims(k, axis=-2), axis=-1, keepdims=True)


def _blocks_below(xp: Namespace, q: Array, k: Array, sums: list[tuple[Array, Array]] | None) -> list[Array]:
    """For blocks of n = 1, 2, 4, ... tokens: the right's weights for the left of a pair, (..., n * G, n)."""
    found = []
    for level in range((k.shape[-2] - 1).bit_length()):
        size = 1 << level
        right, left = _split(xp, q, size, -3)[1], _split(xp, k, size, -2)[0]
        if sums is not None:
            since, until = sums[level]
            right = right * xp.expand_dims(xp.exp(_split(xp, since, size, -2)[1]), axis=-2)
            left = left * xp.exp(_split(xp, until, size, -2)[0])
        found.append(xp.matmul(_rows(xp, right), xp.matrix_transpose(left)))
    return found


def _assembled(xp: Namespace, own: Array, below: list[Array]) -> Array:
    """The lower triangular weights (..., L * G, L) of their diagonal (..., L, G, 1) and blocks below it."""
    blocks = own
    for block in below:
        upper, lower = _pairs(xp, blocks)
        blocks = _joined(xp, upper, block, lower)
    return blocks[..., 0, :, :]


def _unit_inverse(xp: Namespace, beta: Array, below: list[Array]) -> Array:
    """The inverse (..., L, L) of I + N, where N is beta (..., L, 1) times the blocks below the diagonal.

    ((A, 0), (X, B))^-1 = ((A^-1, 0), (-B^-1 X A^-1, B^-1)): each step solves by blocks, as stable as forward
    substitution, which powers of N (a Neumann series) would not be.
    """
    blocks = xp.expand_dims(xp.ones_like(beta), axis=-1)
    for level, block in enumerate(below):
        upper, lower = _pairs(xp, blocks)
        scaled = _split(xp, beta, 1 << level, -2)[1] * block
        blocks = _joined(xp, upper, -xp.matmul(lower, xp.matmul(scaled, upper)), lower)
    return blocks[..., 0, :, :]


def _pairs(xp: Namespace, blocks: Array) -> tuple[Array, Array]:
    """The even and the odd ones of (..., blocks, rows, columns)."""
    *lead, count, rows, columns = blocks.shape
    pairs = xp.reshape(blocks, (*lead, count // 2, 2, rows, columns))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _joined(xp: Namespace, upper: Array, corner: Array, lower: Array) -> Array:
    """((upper, 0), (corner, lower))."""
    top = xp.concat([upper, xp.zeros_like(upper)], axis=-1)
    return xp.concat([top, xp.concat([corner, lower], axis=-1)], axis=-2)
