"""Linear attention in the reference backend: chunks of tokens one after the other, and a state between them.

`chunk` is the mathematics of one; here are feature maps, packed sequences, normalisation, the loop. The
normalizer z is carried as one more column of the state, that of a value that is always 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.linear.call import LinearCall
from anyattn.linear.recurrence import recurrence
from anyattn.reference.chunk import advance
from anyattn.reference.loop import over_keys

__all__ = ["CHUNK", "initial", "linear", "tokens"]

# Tokens a chunk. Work is L (2 F Dv + CHUNK (F + Dv)): beyond the feature sizes in use, longer ones cost more.
CHUNK = 64
# Tokens of a task where arrays are lazy.
LAZY_CHUNK = 1024
# The axis of the tokens in the arrays of `advance`.
_TOKENS = {"q": -3, "k": -2, "v": -2, "decay": -2, "beta": -1}

Result = tuple[Array, Array, Array | None]


def linear(call: LinearCall) -> Result:
    """(out, state, normalizer) of a call: out in its dtype, the others in the accumulation dtype."""
    if call.cu_seqlens is None:
        out, state = tokens(call, initial(call), 0, call.k_len)
    elif call.cu_seqlens_host is not None:
        out, state = _packed(call)
    else:
        out, state = _packed_unread(call)
    out = arrays.cast(call.xp, out, call.v.dtype)
    return (out, state[..., :-1], state[..., -1]) if call.normalize else (out, state, None)


def initial(call: LinearCall) -> Array:
    """The state before the first token, (..., N, Hkv, F, Dv) with packed sequences; z is its last column."""
    xp = call.xp
    sequences = () if call.cu_seqlens is None else (call.num_sequences,)
    lead = (*call.batch_shape, *sequences, call.num_kv_heads, call.head_dim)
    columns = call.v_head_dim + call.normalize
    if call.state is None:
        return xp.zeros((*lead, columns), dtype=getattr(xp, call.accumulate), device=call.device)
    state = xp.broadcast_to(call.state, (*lead, call.v_head_dim))
    if call.normalizer is None:
        return state
    column = xp.expand_dims(xp.broadcast_to(call.normalizer, lead), axis=-1)
    return xp.concat([state, column], axis=-1)


def _packed(call: LinearCall) -> tuple[Array, Array]:
    """Each sequence by itself."""
    xp, start = call.xp, initial(call)
    bounds = call.cu_seqlens_host.tolist()  # type: ignore[union-attr]
    found = [tokens(call, start[n, ...], first, end) for n, (first, end) in enumerate(pairwise(bounds))]
    out = xp.concat([out for out, _ in found], axis=-2)
    return out, xp.stack([state for _, state in found], axis=0)


def _packed_unread(call: LinearCall) -> tuple[Array, Array]:
    """Each sequence over all tokens, others' tokens changing nothing: N times the work, and no value read."""
    xp, count = call.xp, call.num_sequences
    bounds = call.cu_seqlens
    token = xp.arange(call.k_len, dtype=bounds.dtype, device=call.device)  # type: ignore[union-attr]
    first, end = (xp.reshape(bounds[part], (count, 1, 1)) for part in (slice(0, -1), slice(1, None)))  # type: ignore[index]
    own = (token >= first) & (token < end)
    rows = xp.expand_dims(own, axis=-1)

    def alone(x: Array | None, inside: Array) -> Array | None:
        return None if x is None else xp.where(inside, x, xp.zeros_like(x))

    wide = _features(call, call.k, 0, call.k_len)
    one = replace(
        call,
        q=_features(call, call.q, 0, call.q_len),
        k=alone(wide, rows),
        v=alone(call.v, rows),
        decay=alone(call.decay, rows),
        beta=alone(call.beta, own),
        feature_map="identity",
        cu_seqlens=None,
        batch_shape=(count,),
    )
    out, state = tokens(one, initial(call), 0, call.k_len)
    return xp.sum(xp.where(rows, out, xp.zeros_like(out)), axis=0), state


def tokens(call: LinearCall, state: Array, first: int, end: int) -> tuple[Array, Array]:
    """Rows (..., Hq, L, Dv) of the tokens [first, end) and the state after them."""
    if not call.causal:
        return _both_ways(call, state, first, end)

    def step(state: Array, start: Any, size: int) -> tuple[Array, Array]:
        q, k = _grouped(call, _features(call, call.q, start, size)), _features(call, call.k, start, size)
        v = _values(call, start, size)
        decay, beta = _slice(call.decay, start, size, -2), _slice(call.beta, start, size, -1)
        if decay is not None or beta is not None or call.library == "dask":
            q, k, v = _whole_batch(call, q, 4), _whole_batch(call, k, 3), _whole_batch(call, v, 3)
            decay = None if decay is None else _whole_batch(call, decay, 3)
            beta = None if beta is None else _whole_batch(call, beta, 2)
        rows, state = _advanced(call, q, k, v, state, decay, beta)
        return state, _finish(call, rows)

    block = LAZY_CHUNK if call.library == "dask" else CHUNK
    state, rows = over_keys(call, step, state, first, end, block=block, axis=-2)
    return rows, state


def _advanced(
    call: LinearCall, q: Array, k: Array, v: Array, state: Array, decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    """What `advance` gives, or `recurrence` where 0 times NaN or infinity may have reached earlier rows."""
    if call.library == "dask":
        return _lazily(call.xp, q, k, v, state, decay, beta)
    run = _compiled() if call.library == "jax" else advance
    found = run(call.xp, q, k, v, state, decay, beta)
    if call.readable and not all(bool(call.xp.all(call.xp.isfinite(x))) for x in found):
        return recurrence(call.xp, q, k, v, state, decay, beta)
    return found


@cache
def _compiled() -> Callable[..., tuple[Array, Array]]:
    """`advance` under `jax.jit`: by themselves, its 200 operations would each be compiled for every shape.

    Gradients of one chunk of 64 took 140 s so, and memory of gigabytes.
    """
    compiled: Callable[..., tuple[Array, Array]] = sys.modules["jax"].jit(advance, static_argnums=0)
    return compiled


def _lazily(
    xp: Namespace, q: Array, k: Array, v: Array, state: Array, decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    """`advance` of dask arrays as one task: its concatenations would cut dask's chunks."""
    names = ["q", "k", "v", "state", "decay", "beta"]
    axes = dict(zip(names, ("(l,g,f)", "(l,f)", "(l,d)", "(f,d)", "(l,e)", "(l)"), strict=True))
    given = dict(zip(names, (q, k, v, state, decay, beta), strict=True))
    given = {name: x for name, x in given.items() if x is not None}

    def run(*parts: Array) -> tuple[Array, Array]:
        found = dict(zip(given, parts, strict=True))
        own, state, rows = arrays.namespace(parts[0]), found.pop("state"), []
        with arrays.exactly(parts[0]):
            for start in range(0, max(found["k"].shape[-2], 1), CHUNK):
                chunk = {
                    name: arrays.take_range(x, start, CHUNK, axis=_TOKENS[name]) for name, x in found.items()
                }
                piece, state = advance(own, **chunk, state=state)
                rows.append(piece)
            return own.concat(rows, axis=-3), state

    # `allow_rechunk` of dask 2026.8 would do that, but divides by the length of an axis, which may be 0.
    heads = v.chunks[:-2]
    whole = [x.rechunk((*heads, *((n,) for n in x.shape[len(heads) :]))) for x in given.values()]
    signature = ",".join(axes[name] for name in given) + "->(l,g,d),(f,d)"
    apply = sys.modules["dask.array"].apply_gufunc
    result: tuple[Array, Array] = apply(run, signature, *whole, output_dtypes=[v.dtype, v.dtype])
    return result


def _both_ways(call: LinearCall, state: Array, first: int, end: int) -> tuple[Array, Array]:
    """All rows after all keys."""
    xp = call.xp
    k, v = _features(call, call.k, first, end - first), _values(call, first, end - first)
    state = state + xp.matmul(xp.matrix_transpose(k), v)
    rows = end - first if call.cu_seqlens is not None else call.q_len
    q = _grouped(call, _features(call, call.q, first, rows))
    return _finish(call, xp.matmul(q, xp.expand_dims(state, axis=-3))), state


def _slice(x: Array | None, start: Any, size: int, axis: int) -> Array | None:
    return None if x is None else arrays.take_range(x, start, size, axis=axis)


def _features(call: LinearCall, x: Array, start: Any, size: int) -> Array:
    """Features of queries or keys of a chunk."""
    chunk = arrays.take_range(x, start, size, axis=-2)
    return call.mapped(arrays.cast(call.xp, chunk, getattr(call.xp, call.accumulate)))


def _values(call: LinearCall, start: Any, size: int) -> Array:
    xp = call.xp
    v = arrays.cast(xp, arrays.take_range(call.v, start, size, axis=-2), getattr(xp, call.accumulate))
    if not call.normalize:
        return v
    ones = xp.ones((*v.shape[:-1], 1), dtype=v.dtype, device=call.device)
    return xp.concat([v, ones], axis=-1)


def _grouped(call: LinearCall, q: Array) -> Array:
    """(..., Hq, L, F) -> (..., Hkv, L, G, F): the queries of a state side by side, none expanded."""
    *lead, _, length, n = q.shape
    q = call.xp.reshape(q, (*lead, call.num_kv_heads, call.group_size, length, n))
    return arrays.moveaxis(call.xp, q, -3, -2)


def _whole_batch(call: LinearCall, x: Array, axes: int) -> Array:
    """A chunk with all batch axes: blocks of one are joined with those of others."""
    return call.xp.broadcast_to(x, (*call.batch_shape, *x.shape[-axes:]))


def _finish(call: LinearCall, rows: Array) -> Array:
    """(..., Hkv, L, G, Dv) -> (..., Hq, L, Dv), scaled and normalised."""
    xp = call.xp
    *lead, heads, length, group, columns = rows.shape
    out = xp.reshape(arrays.moveaxis(xp, rows, -3, -2), (*lead, heads * group, length, columns))
    out = xp.broadcast_to(out, (*call.batch_shape, *out.shape[-3:]))
    if call.normalize:
        total = out[..., -1:]
        seen = total != 0
        out = xp.where(seen, out[..., :-1] / xp.where(seen, total, 1.0), 0.0)
    return out * call.scale
