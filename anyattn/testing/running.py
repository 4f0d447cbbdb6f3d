"""Run a case on a library and a backend, and hold what comes back to what the case must give."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from anyattn.testing.bad_input import BadCall
from anyattn.testing.case import CACHES, Case, Value, arrays_in, draw, resolve
from anyattn.testing.expected import (
    Expected,
    cotangents,
    differentiable,
    expected,
    expected_gradients,
    mismatch,
)
from anyattn.testing.libraries import LIBRARIES, Library

Array = Any


def skip_reason(case: Case | BadCall, backend: Any, library: Library) -> tuple[str, str] | None:
    """Who does not have what the case needs ("library" or "backend") and a sentence that says what, or None.

    Read from declarations alone: a call that a backend refuses without having declared so fails the case.
    """
    absent = library.missing() or (
        library.cannot_refuse(case) if isinstance(case, BadCall) else library.lacks(case)
    )
    if absent is not None:
        return "library", absent
    if isinstance(case, BadCall):
        return None
    if "*" not in backend.arrays and library.array_type not in backend.arrays:
        return "backend", f"{backend.name} does not take {library.array_type}"
    if "*" not in backend.devices and library.device not in backend.devices:
        return "backend", f"{backend.name} does not run on {library.device}"
    if case.dtype not in backend.dtypes:
        return "backend", f"{backend.name} does not take {case.dtype}"
    undeclared = sorted(library.needs(case) - backend.capabilities)
    return ("backend", f"{backend.name} does not declare {', '.join(undeclared)}") if undeclared else None


def run_instead(case: Case | BadCall, backend: Any, library: Library, chosen: Collection[str]) -> str | None:
    """A sentence that names the variant, of those `chosen`, that makes a case's operations, or None."""
    name = None if isinstance(case, BadCall) else library.instead(case)
    if name is None or name not in chosen or skip_reason(case, backend, LIBRARIES[name]) is not None:
        return None
    return f"{name} runs the same operations"


def perform(case: Case, arrays: Mapping[str, Array], backend: str) -> dict[str, Array]:
    """The call of a case on arrays of a library; results by name."""
    import anyattn

    with anyattn.use(strict="strict_masking" in case.needs):
        return _perform(case, arrays, backend)


def _perform(case: Case, arrays: Mapping[str, Array], backend: str) -> dict[str, Array]:
    import anyattn

    if case.operation == "merge":
        return _in_parts(case, arrays, backend)
    arguments, keywords = case.arguments(arrays, _vocabulary())
    if case.operation == "weights":
        return {"weights": anyattn.attention_weights(*arguments, **keywords, backend=backend)}
    if case.operation == "stats":
        return dict(anyattn.attention_stats(*arguments, **keywords, backend=backend))
    if case.operation == "linear":
        return _linear(anyattn.linear_attention(*arguments, **keywords, backend=backend), keywords)
    attend: Callable[..., Any] = anyattn.attention
    if case.operation in CACHES:
        lengths, _ = keywords.pop("kv_lengths", None), keywords.pop("q_offset", None)
        q, k, v = arguments
        arguments = [q, _cache(case, k, v, lengths)]
    elif case.operation == "packed":
        attend = anyattn.varlen_attention
        arguments += [keywords.pop("cu_seqlens_q"), keywords.pop("cu_seqlens_k")]
        del keywords["layout"]
    result = attend(*arguments, **keywords, backend=backend)
    return {"out": result[0], "lse": result[1]} if keywords.get("return_lse") else {"out": result}


def _linear(result: Any, keywords: Mapping[str, Any]) -> dict[str, Array]:
    """The results of `linear_attention` by name."""
    if not keywords.get("return_state"):
        return {"out": result}
    out, state = result
    if keywords.get("normalize"):
        return {"out": out, "state": state[0], "normalizer": state[1]}
    return {"out": out, "state": state}


def _vocabulary() -> SimpleNamespace:
    import anyattn

    return SimpleNamespace(
        masks=anyattn.masks,
        scores=anyattn.scores,
        feature_maps=anyattn.feature_maps,
        functions=anyattn,
        capture=lambda array: array,
    )


def _in_parts(case: Case, arrays: Mapping[str, Array], backend: str) -> dict[str, Array]:
    """Attention over each part of the keys, with sinks in the first, joined by `anyattn.merge`."""
    import anyattn

    k_len, edges = case.k[-2], (0, *case.cuts, case.k[-2])
    parts: list[tuple[Array, Array]] = []
    for start, stop in pairwise(edges):

        def keys(name: str, start: int = start, stop: int = stop) -> Array:
            array = arrays[name]
            if name in ("k", "v"):
                return array[..., start:stop, :, :] if case.layout == "blhd" else array[..., start:stop, :]
            sliced = name in ("mask", "bias") and array.shape[-1] == k_len
            return array[..., start:stop] if sliced else array

        arguments, keywords = case.arguments({name: keys(name) for name in arrays}, _vocabulary())
        keywords["q_offset"] = k_len - case.q[-2] - start
        if start > 0 or parts:
            keywords["sinks"] = None
        parts.append(anyattn.attention(*arguments, **keywords, return_lse=True, backend=backend))
    out, lse = anyattn.merge([part[0] for part in parts], [part[1] for part in parts], layout=case.layout)
    return {"out": out, "lse": lse}


def _cache(case: Case, k: Array, v: Array, lengths: Any) -> Any:
    """A cache that the tokens of a case went into, part by part; of each sequence all or so many."""
    from array_api_compat import array_namespace, device

    import anyattn

    xp = array_namespace(k)
    if case.layout == "blhd":
        k, v = (xp.moveaxis(x, -3, -2) for x in (k, v))
    edges = list(pairwise((0, *case.cuts, case.k[-2])))
    parts = [tuple(x[..., start:stop, :] for x in (k, v)) for start, stop in edges]
    every = [case.k[-2]] * case.k[0] if lengths is None else lengths
    added = [[min(max(n - start, 0), stop - start) for n in every] for start, stop in edges]
    quantize = "int8" if "int8" in case.needs else None
    if case.operation != "pages":
        # Room that nothing has been written to.
        kept: dict[str, Any] = {"capacity": case.k[-2] + 5}
        if case.operation == "ring":
            kept = {"window": 6, "sink_tokens": 2}
        empty = (x[..., :0, :] for x in (k, v))
        cache = anyattn.KVCache(*empty, quantize=quantize, **kept)
        for (keys, values), counts in zip(parts, added, strict=True):
            cache.append(keys, values, None if lengths is None else counts)
        return cache
    # Pages of 3 tokens, of which those of one sequence do not follow each other.
    dtype = xp.int8 if quantize else k.dtype
    heads = k.shape[-3]
    pools = (xp.zeros((20, 3, heads, x.shape[-1]), dtype=dtype, device=device(k)) for x in (k, v))
    paged = anyattn.PagedKVCache(*pools)
    numbers = [paged.add() for _ in range(k.shape[0])]
    for part, counts in zip(parts, added, strict=True):
        for n in reversed(numbers):
            paged.append(n, *(x[n, :, : counts[n], :] for x in part))
    return paged


def check_values(case: Case, library: Library, backend: str) -> None:
    """Run a case and compare all that it returns; the backend must have run and inputs be as they were.

    Where a backend prepares calls of one signature together, the call is one like another before it.
    """
    values = case.arrays()
    with library.session():
        if case.operation == "attention" and _prepares(backend):
            # What is kept of these arrays shows in the results of the next call, of the same signature.
            perform(case, library.arrays(case, _turned(values)), backend)
        arrays = library.arrays(case, values)
        results = _recorded(case, library, backend, arrays)
        wanted = expected(case, values)
        assert set(results) == set(wanted), (
            f"{case.name}: returned {sorted(results)}, wanted {sorted(wanted)}"
        )
        _compare(case, library, results, wanted)
        _assert_untouched(case, library, arrays, values)


def _prepares(backend: str) -> bool:
    """Whether a backend has something of its own that serves several calls."""
    from anyattn import backends
    from anyattn.backend import Backend

    return getattr(type(backends()[backend].backend), "prepare", Backend.prepare) is not Backend.prepare


def _turned(values: Mapping[str, Value]) -> dict[str, Value]:
    """Other arrays of the same kinds: from the last entry to the first along every axis."""
    return {name: Value(np.array(np.flip(value.values)), value.dtype) for name, value in values.items()}


def check_same_bits(case: Case, library: Library, backend: str) -> None:
    """Two runs of the same call give the same bits."""
    with library.session():
        arrays = library.arrays(case, case.arrays())
        program = library.prepare(lambda x: perform(case, x, backend))
        first, second = program(arrays), program(arrays)
        for name, array in first.items():
            same = library.numpy(array).tobytes() == library.numpy(second[name]).tobytes()
            assert same, f"{case.name}: {name} differs between two runs of one call"


def check_gradients(case: Case, library: Library, backend: str, *, twice: bool = False) -> None:
    """Differentiate a case by every float array and compare; `twice` also demands the same bits again."""
    values = case.arrays()
    names = differentiable(case, values)
    given = cotangents(case)
    weights = {"out": Value(given.dout, "float32" if case.dtype != "float64" else "float64")}
    if given.dlse is not None:
        weights["lse"] = Value(given.dlse, weights["out"].dtype)
    with library.session():
        arrays = library.arrays(case, values)

        def differentiate() -> dict[str, Array]:
            return library.gradients(lambda x: perform(case, x, backend), arrays, names, weights)

        found = _with_record(case, library, backend, differentiate)
        wanted = expected_gradients(case, values)
        _compare(case, library, found, {name: wanted[name] for name in found}, what="gradient of ")
        if twice:
            again = differentiate()
            for name, array in found.items():
                same = library.numpy(array).tobytes() == library.numpy(again[name]).tobytes()
                assert same, f"{case.name}: the gradient of {name} differs between two runs"


def check_refused(bad: BadCall, library: Library, backend: str) -> None:
    """A bad call raises its error, in words that say what is wrong, before any backend runs."""
    import anyattn
    from anyattn.dispatch import recording

    with library.session():
        specifications = bad.specifications() | {spec.name: spec for spec in arrays_in(bad.options)}
        arrays = {}
        for name, spec in specifications.items():
            value = draw(bad.name, spec)
            if name == bad.foreign:
                arrays[name] = library.foreign(value)
            elif name == bad.elsewhere:
                arrays[name] = library.elsewhere(value)
            else:
                arrays[name] = library.array(value)
        keywords = {name: resolve(value, arrays, _vocabulary()) for name, value in bad.options.items()}
        positional = [keywords.pop(name, arrays.get(name)) for name in bad.specifications() if name in "qkv"]
        functions: dict[str, Callable[..., Any]] = {
            "attention": anyattn.attention,
            "weights": anyattn.attention_weights,
            "stats": anyattn.attention_stats,
            "linear": anyattn.linear_attention,
        }
        if bad.operation == "merge":
            counts = (keywords["outs"], keywords["lses"])

            def refused() -> Any:
                return anyattn.merge([arrays["outs"]] * counts[0], [arrays["lses"]] * counts[1])
        else:
            keywords.setdefault("backend", backend)

            def refused() -> Any:
                return functions[bad.operation](*positional, **keywords)

        with recording() as records:
            message = _message(bad, refused)
    # One letter must stand alone; "int" may be the start of int64 or of int32, as the library has it.
    endings = {word: r"(?!\w)" if len(word) == 1 else "" for word in bad.mentions}
    missing = [
        word for word, end in endings.items() if not re.search(rf"(?<!\w){re.escape(word)}{end}", message)
    ]
    assert not missing, f"{bad.name}: the message does not say {missing}: {message}"
    assert not records, f"{bad.name}: {records[0].backend} ran before the call was refused"


def _message(bad: BadCall, refused: Callable[[], Any]) -> str:
    import anyattn.errors

    wanted = getattr(builtins, bad.error, None) or getattr(anyattn.errors, bad.error)
    try:
        result = refused()
    except wanted as error:
        return str(error)
    raise AssertionError(f"{bad.name}: wanted a {bad.error}, got {type(result).__name__}")


def _recorded(case: Case, library: Library, backend: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    program = library.prepare(lambda x: perform(case, x, backend))
    return _with_record(case, library, backend, lambda: program(arrays))


def _with_record(
    case: Case, library: Library, backend: str, action: Callable[[], dict[str, Array]]
) -> dict[str, Array]:
    """Run, and assert from the dispatch record that the backend under test and no other ran.

    Skips are computed from what the case says that it needs, so the call must not turn out to need more.
    """
    from anyattn.dispatch import recording

    with recording() as records:
        results = action()
    ran = sorted({record.backend for record in records})
    assert ran == [backend], (
        f"{case.name}: the dispatch record shows {ran or 'no backend'}, not {backend} alone"
    )
    more = frozenset().union(*(record.features for record in records)) - library.needs(case)
    assert not more, f"{case.name}: the call needs {sorted(more)}, and the case does not say so"
    return results


def _compare(
    case: Case, library: Library, results: Mapping[str, Array], wanted: Mapping[str, Expected], what: str = ""
) -> None:
    wrong = []
    for name, expectation in wanted.items():
        array, label = results[name], f"{case.name}: {what}{name}"
        if not library.owns(array):
            wrong.append(f"{label}: {type(array)} is not an array of {library.name}")
            continue
        dtype = library.dtype(array)
        if dtype != expectation.dtype:
            wrong.append(f"{label}: dtype {dtype}, wanted {expectation.dtype}")
        found = mismatch(library.numpy(array), expectation, label)
        if found is not None:
            wrong.append(found)
    assert not wrong, "\n".join([*wrong, f"why the case exists: {case.why}", repr(case)])


def _assert_untouched(
    case: Case, library: Library, arrays: Mapping[str, Array], values: Mapping[str, Value]
) -> None:
    for name, value in values.items():
        now = library.numpy(arrays[name])
        assert np.array_equal(now, value.values, equal_nan=value.dtype not in ("int", "bool")), (
            f"{case.name}: {name} was written to"
        )
