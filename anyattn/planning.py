"""From the description of a call to a plan of all calls like it (`plan`), where they have one.

A plan's backend is given the arrays of each call as that call's own description would have them: every
array besides q, k and v has a feed, which reads and checks it, or takes what all calls have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyattn import arrays, dispatch, settings
from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.dropout import key_words
from anyattn.expr.bounds import check_integers
from anyattn.expr.nodes import Aligned, walk
from anyattn.expr.structure import structure
from anyattn.options import ARGUMENTS
from anyattn.plan import MOST_KEYS, Feed, Plan, Signature

__all__ = ["plan_of"]

# Arguments whose arrays are none along the keys, or scales of a row, which a backend's `resized` counts on.
_ANY_LENGTH = {"mask", "score_mod", "sinks", "kv_lengths", "q_offset", "k_scales", "v_scales"}


def plan_of(known: Signature | None, call: AttentionCall, backend: Any) -> Plan | None:
    """The plan of calls with the signature of a call that `backend` takes, where there can be one."""
    if known is None or call.num_heads == 0:
        return None
    # Duck-typed backends may do without.
    prepare = getattr(backend, "prepare", None)
    feeds = _feeds(known, call, getattr(backend, "converted", None))
    prepared = None if prepare is None or feeds is None else prepare(call)
    if prepared is None or feeds is None:
        return None
    resized = getattr(prepared, "resized", None)
    return Plan(
        backend=backend,
        run=prepared,
        record=dispatch.Record(backend.name, call.operation, call.features),
        feeds=feeds,
        k_len=call.k_len,
        has_heads=call.has_heads,
        swapped=call.layout == "blhd",
        return_lse=call.return_lse,
        resize=resized if resized is not None and _takes_any_length(known, call, backend) else None,
    )


def _feeds(known: Signature, call: AttentionCall, converted: _Converted | None) -> tuple[Feed, ...] | None:
    """How `call.others` come from the arguments of a call; None where they do not."""
    feeds: list[Feed] = []

    def told(name: str, feed: Feed) -> Feed:
        if call.library == "cupy":
            feed = _there(name, feed)
        return feed if converted is None else _told(name, feed, converted)

    if call.kv_lengths is not None:
        of_call = "kv_lengths" in known.given
        feeds.append(told("kv_lengths", _lengths(call)) if of_call else _always(call.kv_lengths))
    if isinstance(call.offset, int):
        if "q_offset" in known.given:
            return None  # the call holds the value of an array without axes as a number
    elif not arrays.is_array(call.offset):
        return None
    elif not {"kv_lengths", "q_offset"} & known.given.keys():
        feeds.append(_always(call.offset))
    elif not _takes_any_offset(call):
        return None
    elif "q_offset" in known.given:
        feeds.append(told("q_offset", _offset(call)))
    else:
        of_list = _key_options(known)["q_offset"] is not None
        feeds.append(_always(call.offset) if of_list else told("kv_lengths", _last))
    if call.sinks is not None:
        by_array = "sinks" in known.given
        cast = told("sinks", _sinks(call.xp, call.sinks.dtype)) if by_array else _always(call.sinks)
        feeds.append(cast)
    for name in ("k_scales", "v_scales", "mask", "score_mod", "bias"):
        feeds += [_nth(name, n) for n in range(len(known.given.get(name, ())))]
    if call.dropout_seed is not None:
        feeds.append(told("dropout_seed", _seed(call.xp, call.device)))
    return tuple(feeds)


def _key_options(known: Signature) -> dict[str, Any]:
    """The options of a call by name, as its signature has them."""
    key: Any = known.key
    return dict(zip(ARGUMENTS, key[3], strict=False))


# Hears the name and the value of an argument from which a call has made an array of its own.
_Converted = Callable[[str, Any], None]


def _told(name: str, feed: Feed, converted: _Converted) -> Feed:
    def telling(given: dict[str, list[Array]], before: list[Array], k_len: int) -> Array | None:
        found = feed(given, before, k_len)
        if found is not given[name][0]:
            converted(name, given[name][0])
        return found

    return telling


def _there(name: str, feed: Feed) -> Feed:
    """What CuPy computes from an array on that array's device, whichever is current."""

    def computed(given: dict[str, list[Array]], before: list[Array], k_len: int) -> Array | None:
        value = given[name][0]
        if not arrays.is_array(value):
            return feed(given, before, k_len)  # a seed of the host
        with arrays.exactly(value):
            return feed(given, before, k_len)

    return computed


def _always(value: Array) -> Feed:
    return lambda given, before, k_len: value


def _nth(name: str, n: int) -> Feed:
    return lambda given, before, k_len: given[name][n]


def _sinks(xp: Any, dtype: Any) -> Feed:
    return lambda given, before, k_len: arrays.cast(xp, given["sinks"][0], dtype)


def _seed(xp: Any, device: Any) -> Feed:
    return lambda given, before, k_len: key_words(given["dropout_seed"][0], xp, device)


def _lengths(call: AttentionCall) -> Feed:
    assert call.kv_lengths is not None
    dtype = call.kv_lengths.dtype
    return _clamped(call.xp, dtype) if call.library == "cupy" else _between("kv_lengths", 0, dtype)


def _offset(call: AttentionCall) -> Feed:
    xp, dtype = call.xp, call.offset.dtype
    if call.library == "cupy":
        return lambda given, before, k_len: arrays.cast(xp, given["q_offset"][0], dtype)
    return _between("q_offset", -call.q_len, dtype)


def _clamped(xp: Any, dtype: Any) -> Feed:
    """Lengths on a device, whose values the host does not see."""

    def feed(given: dict[str, list[Array]], before: list[Array], k_len: int) -> Array | None:
        value = given["kv_lengths"][0]
        # Before the cast, as where calls are described: an unsigned length must not wrap.
        most = min(k_len, int(xp.iinfo(value.dtype).max))
        return arrays.cast(xp, arrays.clip(xp, value, 0, most), dtype)

    return feed


def _between(name: str, least: int, dtype: Any) -> Feed:
    """Integers from `least` to the number of keys."""

    def feed(given: dict[str, list[Array]], before: list[Array], k_len: int) -> Array | None:
        value = given[name][0].copy()
        within = not value.size or (value.min() >= least and value.max() <= k_len)
        return value.astype(dtype, copy=False) if within else None

    return feed


def _last(given: dict[str, list[Array]], before: list[Array], k_len: int) -> Array:
    """The position of the only query, from the lengths, which come first."""
    return before[0] - 1


def _takes_any_offset(call: AttentionCall) -> bool:
    """Whether the description of a call holds wherever row 0 stands, from -Lq to Lk."""
    if not all(structure(part.expr).settled for part in (call.mask, call.score_mod) if part is not None):
        return False
    return _are_integers_held(call, call.k_len)


def _takes_any_length(known: Signature, call: AttentionCall, backend: Any) -> bool:
    """Whether the description of a call, and the choice of `backend`, hold for any number of keys.

    They do where nothing lies along the keys, and no list, number or expression hangs on how many there are.
    """
    key: Any = known.key
    named, options = key[5], _key_options(known)
    if not known.given.keys() <= _ANY_LENGTH or any(
        options[name] is not None and name not in known.given for name in ("kv_lengths", "q_offset")
    ):
        return False
    bound = [part for part in (call.visible, call.score) if part is not None]
    if any(isinstance(node, Aligned) for part in bound for node in walk(part)):
        return False
    if not all(structure(part.expr).settled for part in (call.mask, call.score_mod) if part is not None):
        return False
    # One that comes before it may have refused for the number of keys.
    if settings.forced_backend(named) is None and dispatch.order_for(call)[0] != backend.name:
        return False
    return _are_integers_held(call, MOST_KEYS)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of calls in which row 0 may stand anywhere."""

    batch_shape: tuple[int, ...]
    num_heads: int
    q_len: int
    k_len: int
    offset_host: None = None


def _are_integers_held(call: AttentionCall, k_len: int) -> bool:
    """Whether the integers of a call fit its indices, with up to so many keys and wherever row 0 stands."""
    sizes = _Sizes(call.batch_shape, call.num_heads, call.q_len, k_len)
    bits = int(call.xp.iinfo(arrays.index_dtype(call.xp, call.device)).bits)
    try:
        for part in (call.visible, call.score):
            if part is not None:
                check_integers(part, sizes, bits, "", call.library)
    except ValueError:
        return False
    return True
