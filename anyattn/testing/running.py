"""Run a case on a library and a backend, and hold what comes back to what the case must give."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from anyattn.testing.case import Case, Value
from anyattn.testing.expected import (
    Expected,
    cotangents,
    differentiable,
    expected,
    expected_gradients,
    mismatch,
)
from anyattn.testing.libraries import Library

Array = Any


def skip_reason(case: Case, backend: Any, library: Library) -> tuple[str, str] | None:
    """Who does not have what the case needs ("library" or "backend") and a sentence that says what, or None.

    Read from declarations alone: a call that a backend refuses without having declared so fails the case.
    """
    absent = library.missing() or library.lacks(case)
    if absent is not None:
        return "library", absent
    if "*" not in backend.arrays and library.array_type not in backend.arrays:
        return "backend", f"{backend.name} does not take {library.array_type}"
    if "*" not in backend.devices and library.device not in backend.devices:
        return "backend", f"{backend.name} does not run on {library.device}"
    if case.dtype not in backend.dtypes:
        return "backend", f"{backend.name} does not take {case.dtype}"
    needs = case.needs | ({"traced"} if library.traced else set())
    undeclared = sorted(needs - backend.capabilities)
    return ("backend", f"{backend.name} does not declare {', '.join(undeclared)}") if undeclared else None


def perform(case: Case, arrays: Mapping[str, Array], backend: str) -> dict[str, Array]:
    """The call of a case on arrays of a library; results by name."""
    import anyattn

    vocabulary = SimpleNamespace(
        masks=anyattn.masks, scores=anyattn.scores, functions=anyattn, capture=lambda array: array
    )
    arguments, keywords = case.arguments(arrays, vocabulary)
    if case.operation == "weights":
        return {"weights": anyattn.attention_weights(*arguments, **keywords, backend=backend)}
    if case.operation == "stats":
        return dict(anyattn.attention_stats(*arguments, **keywords, backend=backend))
    result = anyattn.attention(*arguments, **keywords, backend=backend)
    return {"out": result[0], "lse": result[1]} if keywords.get("return_lse") else {"out": result}


def check_values(case: Case, library: Library, backend: str) -> None:
    """Run a case and compare all that it returns; inputs must be as they were and the backend must have run."""
    values = case.arrays()
    with library.session():
        arrays = library.arrays(case, values)
        results = _recorded(case, library, backend, arrays)
        wanted = expected(case, values)
        assert set(results) == set(wanted), (
            f"{case.name}: returned {sorted(results)}, wanted {sorted(wanted)}"
        )
        _compare(case, library, results, wanted)
        _assert_untouched(case, library, arrays, values)


def check_same_bits(case: Case, library: Library, backend: str) -> None:
    """Two runs of the same call give the same bits."""
    with library.session():
        arrays = library.arrays(case, case.arrays())
        first = _recorded(case, library, backend, arrays)
        second = _recorded(case, library, backend, arrays)
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

        found = _with_record(case, backend, differentiate)
        wanted = expected_gradients(case, values)
        _compare(case, library, found, {name: wanted[name] for name in found}, what="gradient of ")
        if twice:
            again = differentiate()
            for name, array in found.items():
                same = library.numpy(array).tobytes() == library.numpy(again[name]).tobytes()
                assert same, f"{case.name}: the gradient of {name} differs between two runs"


def _recorded(case: Case, library: Library, backend: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return _with_record(case, backend, lambda: library.run(lambda x: perform(case, x, backend), arrays))


def _with_record(case: Case, backend: str, action: Any) -> dict[str, Array]:
    """Run, and assert from the dispatch record that the backend under test and no other ran."""
    from anyattn.dispatch import recording

    with recording() as records:
        results: dict[str, Array] = action()
    ran = sorted({record.backend for record in records})
    assert ran == [backend], (
        f"{case.name}: the dispatch record shows {ran or 'no backend'}, not {backend} alone"
    )
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
