"""The Numba engine inside programs that JAX traces: forward on the host, gradient by JAX.

Compiled code of JAX calls the engine through `jax.pure_callback`. The gradient takes `reference` apart: of a
block of keys it has the scores and their product with the values, and JAX their derivatives. With the log of
the softmax denominator from the forward pass, blocks need nothing of each other (Dao et al.,
"FlashAttention", 2022), so that memory grows with the lengths times the block and not with their product.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from anyattn import dispatch, registry, settings
from anyattn.arrays import Array
from anyattn.attention import attention
from anyattn.compat.jax import as_options
from anyattn.describe import Options, describe
from anyattn.errors import UnsupportedCallError
from anyattn.reference.logits import Logits
from anyattn.reference.loop import over_keys

__all__ = ["call_host"]

Given = dict[str, Any]
FLOATS = ("query", "key", "value", "bias")


@dataclass(frozen=True)
class HostCall:
    """All of a call that is no array; JAX compares it with those of calls that it has compiled."""

    scale: float | None
    causal: bool
    window: Any
    threads: int | None

    def options(self, given: Given) -> dict[str, Any]:
        """Arguments of `anyattn.attention`."""
        return {**as_options(given), "scale": self.scale, "causal": self.causal, "window": self.window}

    def __call__(self, given: Given) -> tuple[Any, Any]:
        """(out, lse) on the host, for arrays with axes of `jax.vmap`, of size 1 or n, before all others."""
        # Callbacks come on threads of XLA as well as on the caller's.
        return contextvars.Context().run(self._run, given)

    def _run(self, given: Given) -> tuple[Any, Any]:
        host: Given = {name: None if x is None else numpy.asarray(x) for name, x in given.items()}
        query, lengths = host["query"], host["query_seq_lengths"]
        own = {"query_seq_lengths": 1, "key_value_seq_lengths": 1}
        mapped = [x.shape[: x.ndim - own.get(name, 4)] for name, x in host.items() if x is not None]
        batch = (*numpy.broadcast_shapes(*mapped), query.shape[-4])
        host["query"] = numpy.broadcast_to(query, (*batch, *query.shape[-3:]))
        if lengths is not None:
            host["query_seq_lengths"] = numpy.broadcast_to(lengths, batch).reshape(-1)
        with settings.use(threads=self.threads):
            found: tuple[Any, Any] = attention(**self.options(host), return_lse=True, backend="numba")
        return found


def call_host(given: Given, scale: Any, causal: Any, window: Any) -> tuple[Array, Array]:
    """(out, lse) of traced arrays; what is wrong with the call is told now, not when it runs."""
    threads = settings.current().threads
    call = _describe(HostCall(scale, causal, window, threads), given)
    how = HostCall(call.scale, causal, call.window, threads)
    status = registry.find("numba", "implementation")
    config: Any = jax.config
    where = config.jax_default_device or jax.devices()[0]
    platform = where if isinstance(where, str) else where.platform
    reason = None if status.available else f"unavailable: {status.reason}"
    if platform != "cpu":
        reason = f"runs on cpu, and JAX computes on {platform}"
    if reason is not None:
        raise UnsupportedCallError(
            f"backend 'numba' (from implementation=) does not take this call: {reason}", {"numba": (reason,)}
        )
    lengths = given["key_value_seq_lengths"]
    if lengths is not None:
        # An error on the host would come after the program has started.
        lengths = jnp.clip(lengths, 0, given["key"].shape[-3])
    out: tuple[Array, Array] = _attend(how, {**given, "key_value_seq_lengths": lengths})
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: HostCall, given: Given) -> tuple[Array, Array]:
    """(out, lse) by the Numba engine."""
    call = _describe(how, given)
    if not call.traced:
        with settings.use(threads=how.threads):
            found: tuple[Array, Array] = attention(**how.options(given), return_lse=True, backend="numba")
        return found
    dispatch.record(dispatch.Record("numba", "attention", call.features))
    rows = (*call.batch_shape, call.num_heads, call.q_len)
    struct: Any = jax.ShapeDtypeStruct
    shapes = (
        struct((*given["query"].shape[:-1], call.v_head_dim), call.q.dtype),
        struct(rows, getattr(jnp, call.accumulate)),
    )
    out: tuple[Array, Array] = jax.pure_callback(how, shapes, given, vmap_method="expand_dims")
    return out


def _forward(how: HostCall, given: Given) -> tuple[Any, Any]:
    # By the function itself, so that what is kept has derivatives of its own.
    out, lse = _attend(how, given)
    return (out, lse), (given, out, lse)


def _backward(how: HostCall, kept: Any, cotangents: Any) -> tuple[Given]:
    found = _gradients(how, *kept, *cotangents)
    return ({name: found.get(name) for name in kept[0]},)


_attend.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)
def _gradients(how: HostCall, given: Given, out: Array, lse: Array, dout: Array, dlse: Array) -> Given:
    """Gradients by the float arrays, from out, lse and the gradients by them."""
    wide = lse.dtype
    floats = {name: given[name].astype(wide) for name in FLOATS if given[name] is not None}

    def logits(floats: Given) -> Logits:
        return Logits(_describe(how, {**given, **floats}))

    dout, out = (jnp.moveaxis(x, -3, -2).astype(wide) for x in (dout, out))
    # Of rows that see nothing, every weight is exp(-inf - 0).
    base = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    shift = (dlse - jnp.sum(dout * out, axis=-1))[..., None]

    def step(total: Given, start: Any, size: int) -> tuple[Given, None]:
        score, by_score, visible = jax.vjp(lambda x: logits(x).block(start, size), floats, has_aux=True)
        p = jnp.exp(score - base)
        _, by_sum = jax.vjp(lambda p, x: logits(x).weigh(p, visible, start, size), p, floats)
        dp, through_sum = by_sum(dout)
        ds = p * (dp + shift)
        (through_score,) = by_score(ds if visible is None else jnp.where(visible, ds, 0.0))
        return jax.tree.map(lambda *x: sum(x), total, through_sum, through_score), None

    call = _describe(how, given)
    found, _ = over_keys(call, step, jax.tree.map(jnp.zeros_like, floats))
    return {name: x.astype(given[name].dtype) for name, x in found.items()}


def _describe(how: HostCall, given: Given) -> Any:
    options = how.options(given)
    q, k, v = (options.pop(name) for name in "qkv")
    return describe("attention", q, k, v, Options(**options, return_lse=True))
