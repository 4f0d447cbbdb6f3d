"""From the arguments of `linear_attention` to its description: every check, every default, once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyattn import arrays, feature_maps
from anyattn.arrays import Array, Namespace
from anyattn.call import canonical
from anyattn.describe import check_shapes, check_tensors
from anyattn.linear.call import DELTA, GATED, RULES, LinearCall
from anyattn.numbers import boolean, integers, real

__all__ = ["LinearOptions", "describe"]

FeatureMap = str | Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class LinearOptions:
    """The arguments as the caller gave them; `anyattn.linear_attention` documents them."""

    rule: Any = "linear"
    feature_map: Any = None
    decay: Any = None
    beta: Any = None
    normalize: Any = False
    causal: Any = True
    scale: Any = None
    state: Any = None
    return_state: Any = False
    cu_seqlens: Any = None
    layout: Any = "bhld"


@dataclass(frozen=True, eq=False)
class _Place:
    """What the other arrays of a call must fit."""

    xp: Namespace
    q: Array
    accumulate: Any
    batch_shape: tuple[int, ...]
    has_heads: bool
    heads: int
    length: int

    def beside(self, x: Any, label: str) -> Array:
        """`x` as a float array beside q."""
        if not arrays.is_array(x):
            raise TypeError(f"{label}: wanted a float array, got {type(x).__name__}")
        if arrays.kind(x) != "float":
            raise TypeError(f"{label}: wanted a float dtype, got {arrays.dtype_name(x)}")
        arrays.check_beside(x, label, self.q, "q")
        return x

    def check(self, x: Array, label: str, last: tuple[int, ...], batch: tuple[int, ...]) -> None:
        """Raise unless `x` is (*batch axes that broadcast, *last)."""
        shape = tuple(x.shape)
        own, rest = shape[: max(len(shape) - len(last), 0)], shape[max(len(shape) - len(last), 0) :]
        fits = len(own) <= len(batch) and all(
            a in (1, b) for a, b in zip(reversed(own), reversed(batch), strict=False)
        )
        if rest != last or not fits:
            before = f", behind axes that broadcast to {batch}" if batch else ""
            raise ValueError(f"{label}: wanted shape {last}{before}, got {shape}")


def describe(q: Array, k: Array, v: Array, options: LinearOptions) -> LinearCall:
    """The description of a call, or the error that says what is wrong with it."""
    tensors = {"q": q, "k": k, "v": v}
    check_tensors(tensors)
    if options.layout not in ("bhld", "blhd"):
        raise ValueError(f"layout: wanted 'bhld' or 'blhd', got {options.layout!r}")
    views = {name: canonical(x, options.layout) for name, x in tensors.items()}
    batch_shape = check_shapes(views, tensors)
    _check_flags(options)
    q_len, k_len = int(views["q"].shape[-2]), int(views["k"].shape[-2])
    if q_len != k_len and (options.causal or options.cu_seqlens is not None):
        raise ValueError(
            f"k: wanted the length {q_len} of q, got {k_len}; they may differ where causal=False alone"
        )
    xp, dtype = arrays.namespace(q), arrays.dtype_name(q)
    accumulate = "float64" if dtype == "float64" else "float32"
    place = _Place(
        xp=xp,
        q=q,
        accumulate=getattr(xp, accumulate),
        batch_shape=batch_shape,
        has_heads=q.ndim > 2,
        heads=int(views["k"].shape[-3]),
        length=k_len,
    )
    scale = 1 / math.sqrt(q.shape[-1]) if options.scale is None else real(options.scale, "scale")
    cu_seqlens, cu_seqlens_host = _cu_seqlens(options.cu_seqlens, place)
    decay = _decay(options.decay, options.rule, place, k.ndim, int(k.shape[-1]))
    beta = _beta(options.beta, options.rule, place, k.ndim)
    feature_map, qf, kf = _features(options.feature_map, views["q"], views["k"], place)
    if decay is not None and decay.shape[-1] not in (1, kf.shape[-1]):
        raise ValueError(
            f"decay: one for each channel is one for each of the {kf.shape[-1]} features that feature_map "
            f"gives, got shape {tuple(options.decay.shape)}"
        )
    sequences = () if cu_seqlens is None else (int(cu_seqlens.shape[0]) - 1,)
    sizes = int(kf.shape[-1]), int(v.shape[-1])
    state, normalizer = _state(options.state, options.normalize, place, (*batch_shape, *sequences), sizes)

    read = [x for x in (q, k, v, qf, kf, decay, beta, state, normalizer, cu_seqlens) if x is not None]
    used = {
        "linear_attention": True,
        "gated_rule": decay is not None,
        "delta_rule": beta is not None,
        "cu_seqlens": cu_seqlens is not None,
        "grouped_heads": qf.shape[-3] != kf.shape[-3],
        "gradients": any(arrays.needs_gradient(x) for x in read),
        "traced": any(arrays.is_tracer(x) or arrays.is_lazy(x) for x in read),
    }
    return LinearCall(
        q=qf,
        k=kf,
        v=views["v"],
        feature_map=feature_map,
        rule=options.rule,
        decay=decay,
        beta=beta,
        normalize=options.normalize,
        causal=options.causal,
        scale=scale,
        state=state,
        normalizer=normalizer,
        return_state=options.return_state,
        cu_seqlens=cu_seqlens,
        cu_seqlens_host=cu_seqlens_host,
        xp=xp,
        library=arrays.library(q),
        array_type=arrays.array_type(q),
        device=arrays.device(q),
        device_kind=arrays.device_kind(q),
        dtype=dtype,
        accumulate=accumulate,
        layout=options.layout,
        has_heads=place.has_heads,
        batch_shape=batch_shape,
        features=frozenset(name for name, yes in used.items() if yes),
    )


def _check_flags(options: LinearOptions) -> None:
    for name in ("normalize", "causal", "return_state"):
        boolean(getattr(options, name), name)
    if options.rule not in RULES:
        raise ValueError(f"rule: wanted one of {', '.join(RULES)}, got {options.rule!r}")
    if not options.causal and options.rule != "linear":
        raise ValueError(f"causal: False is for rule 'linear' alone, not for {options.rule!r}")
    if options.normalize and options.rule in DELTA:
        raise ValueError(f"normalize: is for the rules 'linear' and 'gated', not for {options.rule!r}")
    for name, rules in (("decay", GATED), ("beta", DELTA)):
        given = getattr(options, name) is not None
        if given and options.rule not in rules:
            raise ValueError(f"{name}: is for the rules {' and '.join(rules)}, not for {options.rule!r}")
        if not given and options.rule in rules:
            raise TypeError(f"{name}: rule {options.rule!r} needs it, got None")


def _decay(decay: Any, rule: str, place: _Place, ndim: int, dim: int) -> Array | None:
    """The decay as (..., Hkv, L, D) or (..., Hkv, L, 1); the rank of k tells one from the other."""
    if decay is None:
        return None
    x = place.beside(decay, "decay")
    if x.ndim not in (ndim - 1, ndim):
        raise ValueError(
            f"decay: wanted {ndim - 1} axes (..., heads, length) or {ndim} with one more for the channels of "
            f"k, got shape {tuple(x.shape)}"
        )
    each = x.ndim == ndim
    last = (place.heads, place.length) if place.has_heads else (place.length,)
    # With a feature map there may be other channels than those of k: `describe` checks their number.
    channels = (int(x.shape[-1]),) if each else ()
    place.check(x, "decay", (*last, *channels), place.batch_shape)
    x = arrays.cast(place.xp, x, place.accumulate)
    x = x if each else place.xp.expand_dims(x, axis=-1)
    return x if place.has_heads else place.xp.expand_dims(x, axis=0)


def _beta(beta: Any, rule: str, place: _Place, ndim: int) -> Array | None:
    if beta is None:
        return None
    x = place.beside(beta, "beta")
    last = (place.heads, place.length) if place.has_heads else (place.length,)
    place.check(x, "beta", last, place.batch_shape)
    x = arrays.cast(place.xp, x, place.accumulate)
    return x if place.has_heads else place.xp.expand_dims(x, axis=0)


def _features(given: Any, q: Array, k: Array, place: _Place) -> tuple[str, Array, Array]:
    """The name of the map that is left to apply, and q and k, mapped where the caller gave a function."""
    if given is None:
        return "identity", q, k
    if isinstance(given, str):
        if given not in feature_maps.NAMED:
            raise ValueError(
                f"feature_map: wanted one of {', '.join(feature_maps.NAMED)} or a function, got {given!r}"
            )
        return given, q, k
    for name, known in feature_maps.NAMED.items():
        if given is known:
            return name, q, k
    if not callable(given):
        raise TypeError(f"feature_map: wanted a name or a function, got {type(given).__name__} {given!r}")
    with arrays.exactly(place.q):
        mapped = [given(arrays.cast(place.xp, x, place.accumulate)) for x in (q, k)]
    for x, name, features in zip((q, k), "qk", mapped, strict=True):
        label = f"feature_map: of {name}"
        place.beside(features, label)
        if features.dtype != place.accumulate:
            raise TypeError(f"{label}: wanted dtype {place.accumulate}, got {features.dtype}")
        if tuple(features.shape[:-1]) != tuple(x.shape[:-1]) or features.shape[-1] < 1:
            wanted = ", ".join(map(str, x.shape[:-1]))
            raise ValueError(f"{label}: wanted shape ({wanted}, F) with F >= 1, got {tuple(features.shape)}")
    if mapped[0].shape[-1] != mapped[1].shape[-1]:
        raise ValueError(
            f"feature_map: wanted as many features of k as of q, {mapped[0].shape[-1]}, "
            f"got {mapped[1].shape[-1]}"
        )
    return "identity", mapped[0], mapped[1]


def _state(
    state: Any, normalize: bool, place: _Place, batch: tuple[int, ...], sizes: tuple[int, int]
) -> tuple[Array | None, Array | None]:
    """The state before the first token, and the normalizer that goes with it."""
    if state is None:
        return None, None
    if normalize:
        if not (isinstance(state, (tuple, list)) and len(state) == 2):
            raise TypeError(f"state: with normalize, wanted a pair (S, z), got {type(state).__name__}")
        given = {"state[0]": state[0], "state[1]": state[1]}
    else:
        given = {"state": state}
    heads = (place.heads,) if place.has_heads else ()
    found: list[Array | None] = []
    for (label, x), last in zip(given.items(), ((*heads, *sizes), (*heads, sizes[0])), strict=False):
        place.beside(x, label)
        if x.dtype != place.accumulate:
            raise TypeError(f"{label}: wanted the accumulation dtype {place.accumulate}, got {x.dtype}")
        place.check(x, label, last, batch)
        found.append(x if place.has_heads else place.xp.expand_dims(x, axis=len(x.shape) - len(last)))
    return found[0], found[1] if normalize else None


def _cu_seqlens(given: Any, place: _Place) -> tuple[Array | None, Any]:
    """The bounds of packed sequences, and their values where the host has them."""
    if given is None:
        return None, None
    if place.q.ndim > 3:
        raise ValueError(
            f"cu_seqlens: sequences are packed along the length, wanted q without batch axes, "
            f"got shape {tuple(place.q.shape)}"
        )
    xp, host = place.xp, None
    index = arrays.index_dtype(xp, arrays.device(place.q))
    if arrays.is_array(given):
        if arrays.kind(given) != "int":
            raise TypeError(f"cu_seqlens: wanted integers, got dtype {arrays.dtype_name(given)}")
        arrays.check_beside(given, "cu_seqlens", place.q, "q")
        host = arrays.to_host(given).copy() if arrays.is_concrete_cpu(given) else None
        placed = arrays.cast(xp, given, index)
    else:
        host = integers(given, "cu_seqlens")
        placed = xp.asarray(host, dtype=index, device=arrays.device(place.q))
    if placed.ndim != 1 or placed.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: wanted shape (N + 1,) for N sequences, N at least 1, got {tuple(placed.shape)}"
        )
    if host is not None:
        steps = host[1:].astype("int64") - host[:-1].astype("int64")
        if host[0] != 0 or host[-1] != place.length or (steps < 0).any():
            raise ValueError(
                f"cu_seqlens: wanted offsets that rise from 0 to the {place.length} tokens, "
                f"got {host.tolist()}"
            )
    return placed, host
