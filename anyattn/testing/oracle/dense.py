"""Attention by its definition: dense, in float64, one row at a time (contract sections 1 and 2).

A hidden key cannot touch a row here because the row's sums run over its seen keys only; there is no masking
by large negative numbers and no cleaning of non-finite values to get right. At seen keys NaN and infinity
behave as IEEE says.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattn.testing.oracle.masks import Pattern
from anyattn.testing.oracle.masks import from_function as mask_from_function
from anyattn.testing.oracle.pairs import Pairs
from anyattn.testing.oracle.philox import philox4x32
from anyattn.testing.oracle.scores import Score
from anyattn.testing.oracle.scores import from_function as score_from_function

Array = Any
STATS = ("key_mass", "entropy", "max")


@dataclass(frozen=True)
class Dense:
    """One call with every score written out.

    Arrays are ordered (B, Hq, rows, ...): B counts the batch entries in row-major order (1 if there is no
    batch axis), key/value heads are repeated for the query heads that share them, and two-axis arrays have
    one head.
    """

    q: Array
    k: Array
    v: Array
    pairs: Pairs
    product: Array
    """scale * (q . k), (B, Hq, Lq, Lk)."""
    capped: Array
    modified: Array
    final: Array
    """The scores that softmax sees."""
    seen: Array
    """Boolean (B, Hq, Lq, Lk)."""
    kept: Array
    """What dropout multiplies weights by before they meet the values, (B, Hq, Lq, Lk)."""
    sinks: Array | None
    """(Hq,) or None."""
    scale: float
    score_mod: Score | None
    softcap: float | None
    batch_shape: tuple[int, ...]
    has_heads: bool
    layout: str

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array | None = None,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        mask: Any = None,
        bias: Array | None = None,
        score_mod: Any = None,
        softcap: float | None = None,
        sinks: Any = None,
        scale: float | None = None,
        kv_lengths: Any = None,
        q_offset: Any = None,
        dropout: float = 0.0,
        dropout_seed: Any = None,
        layout: str = "bhld",
    ) -> Dense:
        """Write out the scores and the visibility of one call; arguments as in `anyattn.attention`."""
        q, k = np.asarray(q), np.asarray(k)
        v = np.zeros((*k.shape[:-1], 1)) if v is None else np.asarray(v)
        has_heads = q.ndim > 2
        if not has_heads:
            q, k, v = q[None], k[None], v[None]
        elif layout == "blhd":
            q, k, v = (np.swapaxes(x, -3, -2) for x in (q, k, v))
        q, k, v = (x.astype(np.float64) for x in (q, k, v))

        batch_shape = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        batch = math.prod(batch_shape)
        group = q.shape[-3] // k.shape[-3] if k.shape[-3] else 1
        k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
        q, k, v = (
            np.broadcast_to(x, batch_shape + x.shape[-3:]).reshape(batch, *x.shape[-3:]) for x in (q, k, v)
        )
        heads, q_len, head_dim = q.shape[1:]
        k_len = k.shape[2]

        lengths = None if kv_lengths is None else _one_per_batch(kv_lengths, batch_shape)
        offset = _offset(q_offset, lengths, batch_shape, q_len, k_len)
        pairs = Pairs.of(batch, heads, q_len, k_len, offset)

        with np.errstate(all="ignore"):
            scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
            product = scale * np.einsum("bhrd,bhjd->bhrj", q, k)
            capped = product if softcap is None else softcap * np.tanh(product / softcap)
            modify = None if score_mod is None else _as_score(score_mod)
            modified = capped if modify is None else pairs.fill(modify(capped, pairs))
            result_shape = (*batch_shape, heads, q_len, k_len) if has_heads else (q_len, k_len)
            final = modified
            if bias is not None:
                final = modified + np.broadcast_to(np.asarray(bias, np.float64), result_shape).reshape(
                    pairs.shape
                )

        seen = np.ones(pairs.shape, bool)
        if causal:
            seen = seen & (pairs.j <= pairs.i)
        if window is not None:
            left, right = window
            if left is not None:
                seen = seen & (pairs.j - pairs.i >= -left)
            if right is not None:
                seen = seen & (pairs.j - pairs.i <= right)
        if mask is not None:
            seen = seen & _mask_values(mask, pairs, result_shape)
        if lengths is not None:
            seen = seen & (pairs.j < lengths.reshape(-1, 1, 1, 1))

        return cls(
            q, k, v, pairs, product, capped, modified, final, seen, _kept(pairs, dropout, dropout_seed),
            None if sinks is None else np.asarray(sinks, np.float64).reshape(heads), scale, modify, softcap,
            batch_shape, has_heads, layout,
        )  # fmt: skip

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Every (batch entry, query head, row)."""
        return iter(np.ndindex(self.pairs.shape[:3]))

    def softmax(self) -> tuple[Array, Array]:
        """Weights (B, Hq, Lq, Lk), 0 at hidden keys, and lse (B, Hq, Lq)."""
        weights = np.zeros(self.pairs.shape)
        lse = np.empty(self.pairs.shape[:3])
        for at in self.rows():
            seen = self.seen[at]
            sink = None if self.sinks is None else self.sinks[at[1]]
            weights[at][seen], lse[at] = _softmax_row(self.final[at][seen], sink)
        return weights, lse

    def output(self, weights: Array) -> Array:
        """Σ of what dropout leaves of a weight times value over the seen keys, (B, Hq, Lq, Dv)."""
        out = np.zeros((*self.pairs.shape[:3], self.v.shape[-1]))
        for at in self.rows():
            seen = self.seen[at]
            if np.all(self.final[at][seen] == -np.inf):
                continue
            with np.errstate(all="ignore"):
                left = weights[at][seen] * self.kept[at][seen]
                out[at] = (left[:, None] * self.v[at[:2]][seen]).sum(axis=0)
        return out

    def as_result(self, x: Array, *, rows_and_features: bool = False) -> Array:
        """Give (B, Hq, ...) the caller's axes, and (..., L, D) with `rows_and_features` the layout."""
        x = x.reshape(*self.batch_shape, *x.shape[1:]) if self.has_heads else x[0, 0]
        if rows_and_features and self.has_heads and self.layout == "blhd":
            x = np.swapaxes(x, -3, -2)
        return x


def attention(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Array]:
    """Output and lse of `anyattn.attention` in float64; see there for the arguments."""
    dense = Dense.of(q, k, v, **options)
    weights, lse = dense.softmax()
    return dense.as_result(dense.output(weights), rows_and_features=True), dense.as_result(lse)


def weights(q: Array, k: Array, *, rows: Sequence[int] | None = None, **options: Any) -> Array:
    """Weights (..., Hq, R, Lk) of all rows or of the chosen ones."""
    dense = Dense.of(q, k, **options)
    every = dense.softmax()[0]
    return dense.as_result(every if rows is None else every[:, :, np.asarray(rows, np.int64)])


def stats(q: Array, k: Array, *, stats: Sequence[str] = ("key_mass",), **options: Any) -> dict[str, Array]:
    """`key_mass` (..., Hq, Lk), `entropy` and `max` (..., Hq, Lq) of the weights."""
    dense = Dense.of(q, k, **options)
    p = dense.softmax()[0]
    with np.errstate(all="ignore"):
        p_log_p = np.where(p == 0, 0.0, p * np.log(p))
    values = {
        "key_mass": p.sum(axis=2),
        "entropy": -p_log_p.sum(axis=3),
        "max": p.max(axis=3, initial=0.0),
    }
    return {name: dense.as_result(values[name]) for name in stats}


def merge(outs: Sequence[Array], lses: Sequence[Array], layout: str = "bhld") -> tuple[Array, Array]:
    """Attention over the union of disjoint key sets from its parts, as `anyattn.merge`."""
    lse = np.stack([np.asarray(x, np.float64) for x in lses])
    parts = [np.asarray(x, np.float64) for x in outs]
    if layout == "blhd" and parts[0].ndim > 2:
        parts = [np.swapaxes(x, -3, -2) for x in parts]
    largest = lse.max(axis=0)
    empty = largest == -np.inf
    with np.errstate(all="ignore"):
        total = np.where(empty, -np.inf, largest + np.log(np.exp(lse - largest).sum(axis=0)))
        shares = np.where(lse == -np.inf, 0.0, np.exp(lse - total))
    out = sum(
        (
            np.where(share[..., None] == 0, 0.0, share[..., None] * part)
            for share, part in zip(shares, parts, strict=True)
        ),
        np.zeros(()),
    )
    if layout == "blhd" and parts[0].ndim > 2:
        out = np.swapaxes(out, -3, -2)
    return out, total


def _softmax_row(scores: Array, sink: float | None) -> tuple[Array, float]:
    """Weights of one row's seen keys and the log of the denominator, which holds the sink's logit too."""
    if np.all(scores == -np.inf):
        return np.zeros(scores.shape), -np.inf if sink is None else float(sink)
    terms = scores if sink is None else np.append(scores, sink)
    largest = terms.max()
    with np.errstate(all="ignore"):
        total = np.exp(terms - largest).sum()
        return np.exp(scores - largest) / total, float(largest + np.log(total))


def _one_per_batch(values: Any, batch_shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.asarray(values, np.int64), batch_shape).reshape(-1)


def _offset(
    q_offset: Any, lengths: Array | None, batch_shape: tuple[int, ...], q_len: int, k_len: int
) -> Array:
    """Position of row 0 of each batch entry, (B,)."""
    if q_offset is not None:
        return _one_per_batch(q_offset, batch_shape)
    if lengths is not None and q_len == 1:
        return lengths - 1
    return _one_per_batch(k_len - q_len, batch_shape)


def _kept(pairs: Pairs, probability: float, seed: Any) -> Array:
    """0 or 1 / (1 - p) for each pair: the first word of Philox, of which 24 bits count, decides."""
    if probability == 0:
        return np.ones(pairs.shape)
    number = operator.index(seed)
    key = (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF)
    b, h, row, j = (x.astype(np.uint64) for x in (pairs.b, pairs.h, pairs.row, pairs.j))
    word = philox4x32((b, h, row, j), key)[0]
    stays = pairs.fill(word >> 8) >= math.ceil(probability * 2**24)
    return np.where(stays, 1 / (1 - probability), 0.0)


def _as_score(score_mod: Score | Callable[..., Any]) -> Score:
    return score_mod if isinstance(score_mod, Score) else score_from_function(score_mod)


def _mask_values(mask: Any, pairs: Pairs, result_shape: tuple[int, ...]) -> Array:
    if isinstance(mask, np.ndarray):
        return np.broadcast_to(mask, result_shape).reshape(pairs.shape)
    pattern = mask if isinstance(mask, Pattern) else mask_from_function(mask)
    return pattern(pairs)
