"""Plans: a call like one seen before runs without being described again.

To describe a call and to choose its backend takes some 100 us, several times what a small problem takes
itself. Both depend on the signature of the call alone: types, shapes and strides of arrays, values of
options, structure of expressions, settings, installed backends. So the first call of a signature leaves a
plan behind, with what its backend's `prepare` gave, and the next one finds it by one look-up.

Decoding gives each step a signature of its own, as keys are one more each time. So a plan may also belong to
a family: calls that differ in the number of keys alone, which its backend then makes room for in what it has.

No array is part of a signature or a plan, nor is the identity of any object that can change; the values in
arrays are read in every call. Where one does not pass a check, and for whatever has no signature (tracers,
subclasses, gradients, expressions that only the call can settle), the call is described as if there were no
plans.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyattn import arrays, dispatch, registry, settings
from anyattn.arrays import Array
from anyattn.expr.structure import is_given, is_read, structure
from anyattn.forks import held_over_forks
from anyattn.masks import Mask
from anyattn.options import ARGUMENTS
from anyattn.scores import Score

__all__ = ["MOST_KEYS", "Feed", "Plan", "Signature", "keep", "run", "signature"]

_MOST_PLANS = 256
# Integers of the expressions of a family are checked for so many keys.
MOST_KEYS = 1 << 24
# Integers and host data of more bytes than this are not compared, but described.
_MOST_CONTENTS = 4096


@dataclass(slots=True)
class Signature:
    """What finds a plan, and the arrays of the call besides q, k and v by argument."""

    key: Hashable
    given: dict[str, list[Array]]


def signature(q: Any, k: Any, v: Any, options: tuple[Any, ...], backend: Any) -> Signature | None:
    """The signature of a call of `attention`, or None; `options` are in the order of `ARGUMENTS`."""
    tensors = arrays.signature(q), arrays.signature(k), arrays.signature(v)
    if None in tensors or not (backend is None or type(backend) is str):
        return None
    types = tuple(map(type, options))
    kinds = _kinds.get(types)
    if kinds is None:
        readers = _find_readers(types)
        if readers is None:
            return None
        kinds = _kinds.setdefault(types, _Kinds(readers))
    given: dict[str, list[Array]] = {}
    values: Any = options
    if kinds.readers:
        values = list(options)
        for n, read in kinds.readers:
            loose: list[Array] = []
            values[n] = part = read(options[n], loose)
            if part is None:
                return None
            if loose:
                given[ARGUMENTS[n]] = loose
        same = [id(x) for part in given.values() for x in part]
        # Which arrays are one and the same, so that a backend may tell arrays of a call apart by identity.
        values = (*values, *map(same.index, same))
    key = (*tensors, values, kinds, backend, settings.signature(), registry.generation())
    return Signature(key, given)


# Turns an option into its part of a signature, None where there is none, and collects its arrays.
_Reader = Callable[[Any, list[Array]], Hashable]


class _Kinds:
    """Types of options, which are told apart (True is 1 to a dict), and how such options are read."""

    __slots__ = ("readers",)

    def __init__(self, readers: tuple[tuple[int, _Reader], ...]):
        self.readers = readers


_kinds: dict[tuple[type, ...], _Kinds] = {}
_PLAIN = (type(None), bool, int, str)
_LAYOUT = ARGUMENTS.index("layout")
_SCALES = ARGUMENTS.index("k_scales")


def _find_readers(types: tuple[type, ...]) -> tuple[tuple[int, _Reader], ...] | None:
    """Readers by the places of those options that are no plain values; None if one cannot be read."""
    found: list[tuple[int, _Reader]] = []
    for n, (name, cls) in enumerate(zip(ARGUMENTS, types, strict=True)):
        if name == "dropout_seed" and cls is int:
            found.append((n, _read_seed))
            continue
        if cls in _PLAIN or (name == "dropout" and cls is float):
            continue
        if cls is float or (cls.__module__ == "numpy" and cls.__name__ == "float64"):
            found.append((n, _read_float))
        elif cls is tuple and name == "window":
            found.append((n, _read_window))
        elif cls in (tuple, list) and name in ("sinks", "kv_lengths", "q_offset"):
            found.append((n, _read_numbers))
        elif cls not in (tuple, list) and name in _ARRAY_READERS:
            found.append((n, _ARRAY_READERS[name]))
        else:
            return None
    return tuple(found)


def _read_float(value: float, given: list[Array]) -> Hashable:
    return value.hex()  # tells -0.0 from 0.0


def _read_window(value: tuple[Any, ...], given: list[Array]) -> Hashable:
    return value if all(type(side) in (int, type(None)) for side in value) else None


def _read_numbers(value: Sequence[Any], given: list[Array]) -> Hashable:
    return repr(value) if all(type(number) in (int, float) for number in value) else None


def _read_array(value: Any, given: list[Array]) -> Hashable:
    given.append(value)
    return arrays.signature(value)


def _read_seed(value: int, given: list[Array]) -> Hashable:
    """A seed, which each call may have another of: no part of the signature."""
    given.append(value)
    return -(1 << 63) <= value < 1 << 64 or None


def _read_integers(value: Any, given: list[Array]) -> Hashable:
    """Lengths and offsets, whose values have checks: those that the host reads at once, or never."""
    given.append(value)
    found = arrays.signature(value)
    return found if found is not None and arrays.library(value) in ("numpy", "cupy") else None


def _read_expression(value: Any, given: list[Array]) -> Hashable:
    if not isinstance(value, (Mask, Score)):
        return _read_array(value, given) if arrays.is_array(value) else None
    found = structure(value.expr)
    if found.text is None or not found.arrays:
        return found.text
    parts: list[Hashable] = [found.text]
    for array in found.arrays:
        own = arrays.signature(array.value)
        if own is None:
            return None
        parts.append(own)
        if is_given(array):
            given.append(array.value)
        if is_read(array):
            if arrays.library(array.value) != "numpy" or array.value.nbytes > _MOST_CONTENTS:
                return None
            parts.append(array.value.tobytes())
    return tuple(parts)


_ARRAY_READERS: dict[str, _Reader] = {
    "mask": _read_expression,
    "bias": _read_array,
    "score_mod": _read_expression,
    "dropout_seed": _read_array,
    "sinks": _read_array,
    "k_scales": _read_array,
    "v_scales": _read_array,
    "kv_lengths": _read_integers,
    "q_offset": _read_integers,
}

# Gives one of `AttentionCall.others`, from the arrays of a call by argument, the others before it and the
# number of keys; None where a value fails a check.
Feed = Callable[[dict[str, list[Array]], list[Array], int], Array | None]


# What `Backend.prepare` gives.
Prepared = Callable[..., tuple[Array, Array | None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How calls of one signature run.

    `resize` gives, from keys and values, what runs calls with as many of these, or None; it is None itself
    where the plan says nothing of them.
    """

    backend: Any
    run: Prepared
    record: dispatch.Record
    feeds: tuple[Feed, ...]
    k_len: int
    has_heads: bool
    swapped: bool
    return_lse: bool
    resize: Callable[[Array, Array], Prepared | None] | None

    def __call__(self, q: Array, k: Array, v: Array, given: dict[str, list[Array]]) -> Any:
        """What `attention` returns, or None where the values of an array need a description of the call."""
        others: list[Array] = []
        for feed in self.feeds:
            other = feed(given, others, self.k_len)
            if other is None:
                return None
            others.append(other)
        if not self.has_heads:
            q, k, v = q[None], k[None], v[None]
        elif self.swapped:
            q, k, v = q.swapaxes(-3, -2), k.swapaxes(-3, -2), v.swapaxes(-3, -2)
        dispatch.record(self.record)
        result = self.run(q, k, v, *others)
        dispatch.check_pair(self.backend, result)
        out, lse = result
        if not self.has_heads:
            out, lse = out[0], None if lse is None else lse[0]
        elif self.swapped:
            out = out.swapaxes(-3, -2)
        return (out, lse) if self.return_lse else out

    def resized(self, k: Array, v: Array) -> Plan | None:
        """The plan of calls with another number of keys, where the backend can tell."""
        if self.resize is None:
            return None
        if not self.has_heads:
            k, v = k[None], v[None]
        elif self.swapped:
            k, v = k.swapaxes(-3, -2), v.swapaxes(-3, -2)
        prepared = self.resize(k, v)
        return None if prepared is None else replace(self, run=prepared, k_len=int(k.shape[-2]))


@dataclass(slots=True)
class _Family:
    """Calls that differ in the number of keys alone: a plan of some, and the key of the last ones'."""

    plan: Plan
    last: Hashable = None


_plans: dict[Hashable, Plan] = {}
_families: dict[Hashable, _Family] = {}
_lock = held_over_forks(threading.Lock())


def run(known: Signature | None, q: Array, k: Array, v: Array) -> Any:
    """What `attention` returns, if there is a plan that serves the call; otherwise None."""
    if known is None:
        return None
    plan = _plans.get(known.key)
    if plan is None:
        plan = _resized(known.key, k, v)
    return None if plan is None else plan(q, k, v, known.given)


def _resized(key: Any, k: Array, v: Array) -> Plan | None:
    """A plan made from that of a call with another number of keys."""
    family = _families.get(_without_keys(key))
    if family is None:
        return None
    plan = family.plan.resized(k, v)
    if plan is not None:
        with _lock:
            # A loop that decodes has one plan of this kind at a time, and leaves those of others alone.
            _plans.pop(family.last, None)
            family.last = key
            _keep(_plans, key, plan)
    return plan


def _without_keys(key: Any) -> Hashable:
    """The key of a signature without the number of keys; None where k and v differ in it."""
    q, k, v, values, *others = key
    axis = -3 if values[_LAYOUT] == "blhd" and len(q[1]) > 2 else -2
    if min(len(k[1]), len(v[1])) < -axis:
        return None
    count = k[1][axis]
    if count != v[1][axis] or not 0 < count <= MOST_KEYS:
        return None
    if values[_SCALES] is not None:
        # Those of caches, along the keys; a plan of another number of keys has their strides.
        scales = ((arrays.without_length(x, -1), x[2]) for x in values[_SCALES : _SCALES + 2])
        values = (*values[:_SCALES], *scales, *values[_SCALES + 2 :])
    return (q, arrays.without_length(k, axis), arrays.without_length(v, axis), values, *others)


def _keep(plans: dict[Hashable, Any], key: Hashable, plan: Any) -> None:
    while len(plans) >= _MOST_PLANS:
        del plans[next(iter(plans))]
    plans[key] = plan


def keep(known: Signature, plan: Plan) -> None:
    """Let calls of a signature run by a plan."""
    with _lock:
        _keep(_plans, known.key, plan)
        if plan.resize is not None and (key := _without_keys(known.key)) is not None:
            _keep(_families, key, _Family(plan))
