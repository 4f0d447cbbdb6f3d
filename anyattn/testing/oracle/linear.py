"""Linear attention by its recurrence: one token, one head, one sequence at a time, in float64.

A *strand* is one sequence of one key/value head of one batch entry, with the query heads that read its state.
`LinearDense` cuts a call into strands and puts what each gives together; `recur` is the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyattn.testing.oracle import feature_maps

Array = Any


@dataclass(frozen=True)
class Strand:
    """Arrays q (G, Lq, F), k (L, F), v (L, Dv), decay (L, F) or None, beta (L,) or None, state, z."""

    q: Array
    k: Array
    v: Array
    decay: Array | None
    beta: Array | None
    state: Array
    z: Array
    normalize: bool
    causal: bool
    scale: float


@dataclass(frozen=True)
class LinearDense:
    """One call with every axis written out: q (B, Hq, Lq, F), the others with Hkv heads."""

    q: Array
    k: Array
    v: Array
    decay: Array | None
    beta: Array | None
    state: Array
    """(B, N, Hkv, F, Dv)."""
    z: Array
    """(B, N, Hkv, F)."""
    bounds: tuple[int, ...]
    """The first tokens of the N sequences, and the end of the last."""
    packed: bool
    feature_map: Any
    normalize: bool
    causal: bool
    scale: float
    batch_shape: tuple[int, ...]
    has_heads: bool
    layout: str
    unmapped: tuple[Array, Array]
    """q and k before the feature map."""

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array,
        *,
        rule: str = "linear",
        feature_map: Any = None,
        decay: Array | None = None,
        beta: Array | None = None,
        normalize: bool = False,
        causal: bool = True,
        scale: float | None = None,
        state: Any = None,
        cu_seqlens: Any = None,
        layout: str = "bhld",
    ) -> LinearDense:
        """Write out one call; arguments as in `anyattn.linear_attention`."""
        q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
        has_heads, rank = q.ndim > 2, k.ndim
        if not has_heads:
            q, k, v = q[None], k[None], v[None]
        elif layout == "blhd":
            q, k, v = (np.swapaxes(x, -3, -2) for x in (q, k, v))
        assert (decay is not None) == (rule in ("gated", "gated_delta"))
        assert (beta is not None) == (rule in ("delta", "gated_delta"))
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        unmapped = q, k
        q, k = feature_maps.apply(feature_map, q), feature_maps.apply(feature_map, k)
        features, v_features = k.shape[-1], v.shape[-1]

        batch_shape = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        batch, heads, length = math.prod(batch_shape), k.shape[-3], k.shape[-2]

        def full(x: Any, *last: int) -> Array:
            x = np.asarray(x).astype(np.float64)
            return np.broadcast_to(x, (*batch_shape, *last)).reshape(batch, *last)

        if decay is not None:
            wide = np.asarray(decay).astype(np.float64)
            wide = wide if wide.ndim == rank else wide[..., None]
            wide = wide if has_heads else wide[None]
            decay = full(np.broadcast_to(wide, (*wide.shape[:-1], features)), heads, length, features)
        if beta is not None:
            wide = np.asarray(beta)
            beta = full(wide if has_heads else wide[None], heads, length)
        sequences = (0, length) if cu_seqlens is None else tuple(int(n) for n in np.asarray(cu_seqlens))
        count = len(sequences) - 1
        lead = (*batch_shape, *(() if cu_seqlens is None else (count,)))
        s, z = (state if normalize else (state, None)) if state is not None else (None, None)

        def start(x: Any, *last: int) -> Array:
            x = np.zeros((*lead, heads, *last)) if x is None else np.asarray(x).astype(np.float64)
            x = x if has_heads or x.ndim > len(last) + len(lead) else np.expand_dims(x, -len(last) - 1)
            return np.broadcast_to(x, (*lead, heads, *last)).reshape(batch, count, heads, *last)

        return cls(
            full(q, *q.shape[-3:]), full(k, heads, length, features), full(v, heads, length, v_features),
            decay, beta, start(s, features, v_features), start(z, features), sequences,
            cu_seqlens is not None, feature_map, normalize, causal, scale, batch_shape, has_heads, layout,
            unmapped,
        )  # fmt: skip

    def strands(self) -> Iterator[tuple[tuple[int, int, int], slice, slice, Strand]]:
        """(batch entry, sequence, head), its rows, the query heads, and the strand."""
        heads = self.k.shape[1]
        group = self.q.shape[1] // heads if heads else 1
        for b, n, h in np.ndindex(self.k.shape[0], len(self.bounds) - 1, heads):
            keys = slice(self.bounds[n], self.bounds[n + 1])
            rows = keys if self.packed else slice(0, self.q.shape[2])
            own = slice(h * group, (h + 1) * group)
            yield (
                (b, n, h),
                rows,
                own,
                Strand(
                    self.q[b, own, rows], self.k[b, h, keys], self.v[b, h, keys],
                    None if self.decay is None else self.decay[b, h, keys],
                    None if self.beta is None else self.beta[b, h, keys],
                    self.state[b, n, h], self.z[b, n, h], self.normalize, self.causal, self.scale,
                ),
            )  # fmt: skip

    def together(self, run: Callable[[Strand], tuple[Array, Array, Array]]) -> dict[str, Array]:
        """What `run` gives for each strand as results of the call: "out", "state" and "normalizer"."""
        out = np.zeros((*self.q.shape[:3], self.v.shape[-1]))
        state, z = np.zeros(self.state.shape), np.zeros(self.z.shape)
        for at, rows, heads, strand in self.strands():
            out[at[0], heads, rows], state[at], z[at] = run(strand)
        lead = (*self.batch_shape, *((len(self.bounds) - 1,) if self.packed else ()))
        out = out.reshape(*self.batch_shape, *out.shape[1:])
        state, z = state.reshape(*lead, *state.shape[2:]), z.reshape(*lead, *z.shape[2:])
        if not self.has_heads:
            out, state, z = out[0], state[..., 0, :, :], z[..., 0, :]
        elif self.layout == "blhd":
            out = np.swapaxes(out, -3, -2)
        return {"out": out, "state": state, "normalizer": z}


def recur(strand: Strand) -> tuple[Array, Array, Array]:
    """Rows (G, Lq, Dv), the last state and the last normalizer."""
    state, z = strand.state.copy(), strand.z.copy()
    group, rows, _ = strand.q.shape
    out = np.zeros((group, rows, strand.v.shape[-1]))
    with np.errstate(all="ignore"):
        for t in range(strand.k.shape[0]):
            key, value = strand.k[t], strand.v[t]
            if strand.decay is not None:
                kept = np.exp(strand.decay[t])
                state, z = kept[:, None] * state, kept * z
            if strand.beta is not None:
                value = strand.beta[t] * (value - state.T @ key)
            state = state + np.outer(key, value)
            z = z + key
            if strand.causal:
                for g in range(group):
                    out[g, t] = _read(strand, strand.q[g, t], state, z)
        if not strand.causal:
            for g, r in np.ndindex(group, rows):
                out[g, r] = _read(strand, strand.q[g, r], state, z)
    return out, state, z


def _read(strand: Strand, query: Array, state: Array, z: Array) -> Array:
    row = strand.scale * (state.T @ query)
    if not strand.normalize:
        return row
    total = query @ z
    return np.zeros_like(row) if total == 0 else row / total


def linear_attention(q: Array, k: Array, v: Array, **options: Any) -> dict[str, Array]:
    """The results "out", "state" and "normalizer" of `anyattn.linear_attention` in float64."""
    return LinearDense.of(q, k, v, **options).together(recur)
