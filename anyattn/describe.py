"""From the arguments of a call to its description: every check, every default, once.

The steps follow the argument list: arrays, numbers, lengths and offset, then the two expressions. Values are
read only where the host can read them without a transfer; elsewhere lengths are clamped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from anyattn import arrays, masks, scores
from anyattn.arrays import FLOAT_DTYPES, Array
from anyattn.call import AttentionCall, Operation, canonical
from anyattn.dropout import dropout_of
from anyattn.expr.bind import Geometry, batch_indices, bind, captured_arrays, check_same_place
from anyattn.expr.nodes import SCORE, Aligned, Expr, J, Table, depends_on, load
from anyattn.numbers import integers, real
from anyattn.options import STATS, Options

__all__ = ["Options", "check_shapes", "check_tensors", "describe"]


def describe(operation: Operation, q: Array, k: Array, v: Array | None, options: Options) -> AttentionCall:
    """The description of a call, or the error that says what is wrong with it."""
    tensors = {"q": q, "k": k} if operation != "attention" else {"q": q, "k": k, "v": v}
    scaled = options.k_scales is not None
    check_tensors(tensors, scaled=scaled)
    if options.layout not in ("bhld", "blhd"):
        raise ValueError(f"layout: wanted 'bhld' or 'blhd', got {options.layout!r}")
    views = {name: canonical(x, options.layout) for name, x in tensors.items()}
    batch_shape = check_shapes(views, tensors)
    if views["q"].shape[-3] == 0:
        # Without query heads no key/value head is read; heads would not line up in a product.
        views = {name: x[..., :0, :, :] for name, x in views.items()}
    k_scales, v_scales = options.k_scales, options.v_scales
    if scaled and views["q"].shape[-3] == 0:
        k_scales, v_scales = (x[..., :0, :] for x in (k_scales, v_scales))
    qc, kc, vc = views["q"], views["k"], views.get("v")
    _check_flags(options)
    scale = 1 / math.sqrt(qc.shape[-1]) if options.scale is None else real(options.scale, "scale")
    softcap = None if options.softcap is None else scores.soft_cap(options.softcap, "softcap")
    window = None if options.window is None else masks.window_bounds(options.window, "window")

    xp, dtype = arrays.namespace(q), arrays.dtype_name(q)
    place = Geometry(
        xp=xp,
        like=qc,
        library=arrays.library(q),
        device=arrays.device(q),
        accumulate="float64" if dtype == "float64" else "float32",
        batch_shape=batch_shape,
        num_heads=int(qc.shape[-3]),
        has_heads=q.ndim > 2,
        q_len=int(qc.shape[-2]),
        k_len=int(kc.shape[-2]),
        offset_host=None,
    )
    mask = None if options.mask is None else masks.as_mask(options.mask, "mask")
    score_mod = None if options.score_mod is None else scores.as_score(options.score_mod)
    bias = None if options.bias is None else _bias(options.bias)
    with arrays.exactly(q):
        lengths, lengths_host = _integers(options.kv_lengths, "kv_lengths", place, limit=place.k_len)
        visible = _visible(options.causal, window, mask, lengths, batch_shape)
        score = _score(softcap, score_mod, bias)
        positional = any(part is not None and depends_on(part, "i") for part in (visible, score))
        offset, offset_host = _offset(options.q_offset, place, lengths, lengths_host, positional)

        geometry = replace(place, offset_host=offset_host)
        visible = None if visible is None else bind(visible, geometry, "q_offset" if mask is None else "mask")
        score = None if score is None else bind(score, geometry, "score_mod")
        keep, seed = dropout_of(options.dropout, options.dropout_seed, geometry)
        sinks = _sinks(options.sinks, geometry)
        rows = _rows(options.rows, geometry)

    read = [*views.values()]
    for root in (visible, score, keep):
        read += captured_arrays(root)
    read += [x for x in (sinks, lengths, rows, offset) if arrays.is_array(x)]
    used = {
        "causal": bool(options.causal),
        "window": window is not None,
        "mask": mask is not None,
        "bias": bias is not None,
        "score_mod": score_mod is not None,
        "softcap": softcap is not None,
        "sinks": sinks is not None,
        "kv_lengths": lengths is not None,
        "q_offset": positional and not (isinstance(offset, int) and offset == place.k_len - place.q_len),
        "dropout": keep is not None,
        "grouped_heads": qc.shape[-3] != kc.shape[-3],
        "return_lse": options.return_lse,
        "int8": scaled,
        "weights": operation == "weights",
        "stats": operation == "stats",
        "gradients": any(arrays.needs_gradient(x) for x in read),
        "traced": any(arrays.is_tracer(x) or arrays.is_lazy(x) for x in read),
    }
    return AttentionCall(
        operation=operation,
        q=qc,
        k=kc,
        v=vc,
        xp=xp,
        library=geometry.library,
        array_type=arrays.array_type(q),
        device=geometry.device,
        device_kind=arrays.device_kind(q),
        dtype=dtype,
        accumulate=geometry.accumulate,
        layout=options.layout,
        has_heads=geometry.has_heads,
        batch_shape=batch_shape,
        scale=scale,
        score=score,
        visible=visible,
        keep=keep,
        k_scales=k_scales,
        v_scales=v_scales,
        sinks=sinks,
        offset=offset,
        offset_host=offset_host,
        kv_lengths=lengths,
        lengths_host=lengths_host,
        causal=bool(options.causal),
        window=window,
        mask=mask,
        softcap=softcap,
        score_mod=score_mod,
        bias=bias,
        dropout_seed=seed,
        return_lse=bool(options.return_lse),
        rows=rows,
        stats=_stats(options.stats) if operation == "stats" else (),
        features=frozenset(name for name, yes in used.items() if yes),
    )


def check_tensors(tensors: dict[str, Any], *, scaled: bool = False) -> None:
    """Arrays of one library, device and float dtype, of two axes or more; k and v are int8 where `scaled`."""
    for name, x in tensors.items():
        arrays.check_plain(x, name)
        if arrays.dtype_name(x) not in FLOAT_DTYPES and not (scaled and name != "q"):
            raise TypeError(f"{name}: wanted dtype {', '.join(FLOAT_DTYPES)}, got {x.dtype}")
        if x.ndim < 2:
            raise ValueError(
                f"{name}: wanted axes (..., heads, length, dim) or (length, dim), got shape {tuple(x.shape)}"
            )
    q = tensors["q"]
    for name, x in tensors.items():
        if x is q:
            continue
        arrays.check_beside(x, name, q, "q")
        if arrays.dtype_name(x) != arrays.dtype_name(q) and not scaled:
            raise TypeError(f"{name}: wanted dtype {arrays.dtype_name(q)} like q, got {arrays.dtype_name(x)}")


def check_shapes(views: dict[str, Array], tensors: dict[str, Array]) -> tuple[int, ...]:
    """The broadcast batch shape of consistent q, k and v."""
    shapes = _Shapes(tensors)
    for name, x in tensors.items():
        if float in map(type, x.shape):
            raise ValueError(
                f"{name}: wanted known sizes, got shape {tuple(x.shape)} (dask: compute_chunk_sizes())"
            )
        if (x.ndim == 2) != (tensors["q"].ndim == 2):
            raise ValueError(f"{name}: wanted a head axis on all of q, k, v or on none, got {shapes}")
    q, k = views["q"], views["k"]
    if q.shape[-1] < 1:
        raise ValueError(
            f"q: wanted at least one feature on the last axis, got shape {tuple(tensors['q'].shape)}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: wanted {q.shape[-1]} features like q, got {k.shape[-1]}: {shapes}")
    if "v" in views:
        v = views["v"]
        if v.shape[-3] != k.shape[-3]:
            raise ValueError(f"v: wanted {k.shape[-3]} heads like k, got {v.shape[-3]}: {shapes}")
        if v.shape[-2] != k.shape[-2]:
            raise ValueError(f"v: wanted length {k.shape[-2]} like k, got {v.shape[-2]}: {shapes}")
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"k: wanted a number of heads that divides q's {heads}, got {kv_heads}: {shapes}")
    batch: list[int] = []
    for x in views.values():
        own = list(x.shape[:-3])
        short, long = sorted((own, batch), key=len)
        joined = long[: len(long) - len(short)]
        for a, b in zip(short, long[len(long) - len(short) :], strict=True):
            if a != b and 1 not in (a, b):
                raise ValueError(f"q, k, v: batch axes do not broadcast: {shapes}")
            joined.append(b if a == 1 else a)
        batch = joined
    return tuple(batch)


class _Shapes:
    """Prints the shapes of arrays, which only an error wants to know."""

    def __init__(self, tensors: dict[str, Array]):
        self._tensors = tensors

    def __str__(self) -> str:
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in self._tensors.items())


def _check_flags(options: Options) -> None:
    for name in ("causal", "return_lse"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name}: wanted True or False, got {getattr(options, name)!r}")


def _visible(
    causal: bool,
    window: tuple[int | None, int | None] | None,
    mask: masks.Mask | None,
    lengths: Array | None,
    batch_shape: tuple[int, ...],
) -> Expr | None:
    """Everything that hides keys, as one expression."""
    parts = [masks.causal().expr] if causal else []
    if window is not None and window != (None, None):
        parts.append(masks.sliding_window(*window).expr)
    if mask is not None:
        parts.append(mask.expr)
    if lengths is not None:
        table = Table(lengths, "int", lengths.ndim, (None,) * lengths.ndim, "kv_lengths", host=False)
        parts.append(load(table, batch_indices(tuple(lengths.shape), batch_shape)) > J)
    if not parts:
        return None
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part
    return joined


def _score(softcap: float | None, score_mod: scores.Score | None, bias: Array | None) -> Expr | None:
    """What becomes of the scaled scores, as one expression: softcap, score_mod, bias."""
    expr: Expr = SCORE
    if softcap is not None:
        expr = scores.softcap(softcap).expr
    if score_mod is not None:
        expr = scores.substitute_score(score_mod.expr, expr)
    if bias is not None:
        expr = expr + Aligned(bias, "float", 1, "bias", any_rank=False)
    return None if expr is SCORE else expr


def _bias(bias: Any) -> Array:
    if not arrays.is_array(bias):
        raise TypeError(f"bias: wanted a float array, got {type(bias).__name__}")
    kind = arrays.kind(bias)
    if kind != "float":
        hint = " (which keys are seen goes to `mask`)" if kind == "bool" else ""
        raise TypeError(f"bias: wanted a float dtype, got {arrays.dtype_name(bias)}{hint}")
    return bias


def _integers(value: Any, name: str, place: Geometry, limit: int | None = None) -> tuple[Array | None, Any]:
    """An integer argument over the batch axes: an array beside q, and its values where the host has them."""
    import numpy

    if value is None:
        return None, None
    if arrays.is_array(value):
        if arrays.kind(value) != "int":
            raise TypeError(f"{name}: wanted integers, got dtype {arrays.dtype_name(value)}")
        check_same_place(value, name, place)
        host = arrays.to_host(value).copy() if arrays.is_concrete_cpu(value) else None
    else:
        host = integers(value, name)
    shape = tuple(value.shape) if host is None else host.shape
    fits = len(shape) <= len(place.batch_shape) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(place.batch_shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: wanted a shape that broadcasts to the batch axes {place.batch_shape}, got {shape}"
        )
    if host is not None and limit is not None and host.size and (host.min() < 0 or host.max() > limit):
        raise ValueError(
            f"{name}: wanted lengths between 0 and the {limit} keys, got {host.min()} to {host.max()}"
        )
    xp = place.xp
    index = arrays.index_dtype(xp, place.device)
    # Positions are sums with row and key numbers, in the same dtype.
    room = int(xp.iinfo(index).max) - place.q_len - place.k_len
    if host is not None and host.size and max(abs(int(host.min())), abs(int(host.max()))) > room:
        raise ValueError(f"{name}: wanted integers that fit {index}, got {host.min()} to {host.max()}")
    placed = value if arrays.is_array(value) else place.host_array(host)
    if host is None and limit is not None:
        # Before the cast: an unsigned length must not wrap.
        placed = arrays.clip(xp, placed, 0, min(limit, int(xp.iinfo(placed.dtype).max)))
    return arrays.cast(xp, placed, index), host if host is None else host.astype(numpy.int64)


def _offset(
    q_offset: Any, place: Geometry, lengths: Array | None, lengths_host: Any, positional: bool
) -> tuple[Any, Any]:
    """The position of row 0, and its value where the host has it."""
    if q_offset is not None:
        offset, host = _integers(q_offset, "q_offset", place)
        return (int(host), int(host)) if host is not None and host.ndim == 0 else (offset, host)
    if lengths is None or not positional or place.q_len == 0:
        return place.k_len - place.q_len, place.k_len - place.q_len
    if place.q_len > 1:
        raise ValueError(
            f"q_offset: with kv_lengths, {place.q_len} queries and an option that depends on positions "
            f"(causal, window, mask or score_mod), say where row 0 stands: q_offset=0 for "
            f"right-padded sequences, q_offset=kv_lengths - {place.q_len} for a cache "
            f"whose last keys belong to these queries"
        )
    return lengths - 1, None if lengths_host is None else lengths_host - 1


def _sinks(sinks: Any, geometry: Geometry) -> Array | None:
    import numpy

    if sinks is None:
        return None
    if arrays.is_array(sinks):
        if arrays.kind(sinks) != "float":
            raise TypeError(f"sinks: wanted a float array, got dtype {arrays.dtype_name(sinks)}")
        check_same_place(sinks, "sinks", geometry)
        placed = arrays.cast(geometry.xp, sinks, getattr(geometry.xp, geometry.accumulate))
    else:
        try:
            host = numpy.asarray(sinks)
        except ValueError as error:
            raise ValueError(f"sinks: wanted one real number a query head, got {sinks!r}") from error
        if host.dtype.kind not in "iuf" and host.size:
            raise TypeError(f"sinks: wanted real numbers, one a query head, got {sinks!r}")
        host = host.astype(geometry.accumulate)
        placed = geometry.host_array(numpy.broadcast_to(host, geometry.num_heads) if host.ndim == 0 else host)
    if tuple(placed.shape) != (geometry.num_heads,):
        raise ValueError(
            f"sinks: wanted shape ({geometry.num_heads},), one a query head, got {tuple(placed.shape)}"
        )
    return placed


def _rows(rows: Any, geometry: Geometry) -> Array | None:
    if rows is None:
        return None
    if arrays.is_array(rows):
        if arrays.kind(rows) != "int" or rows.ndim != 1:
            raise TypeError(
                f"rows: wanted integers of shape (R,), got {arrays.dtype_name(rows)} {tuple(rows.shape)}"
            )
        check_same_place(rows, "rows", geometry)
        host = arrays.to_host(rows) if arrays.is_concrete_cpu(rows) else None
        placed = rows
    else:
        host = integers(rows, "rows")
        if host.ndim > 1:
            raise ValueError(f"rows: wanted row numbers of shape (R,), got shape {host.shape}")
        host = host.reshape(-1)
        placed = geometry.host_array(host)
    if host is not None and host.size and (host.min() < 0 or host.max() >= geometry.q_len):
        raise ValueError(
            f"rows: wanted numbers of the {geometry.q_len} rows, from 0, got {host.min()} to {host.max()}"
        )
    if host is None:
        placed = arrays.clip(geometry.xp, placed, 0, max(geometry.q_len - 1, 0))
    return arrays.cast(geometry.xp, placed, arrays.index_dtype(geometry.xp, geometry.device))


def _stats(stats: Any) -> tuple[str, ...]:
    if isinstance(stats, str) or not isinstance(stats, Iterable):
        raise TypeError(f"stats: wanted a sequence of names out of {', '.join(STATS)}, got {stats!r}")
    names = tuple(stats)
    if not names or any(name not in STATS for name in names):
        raise ValueError(f"stats: wanted one or more names out of {', '.join(STATS)}, got {names!r}")
    return names
