"""The conformance tests: each case, on each chosen library, by the backend under test.

Drawn calls take longest and come first. So of several workers none is left with them at the end, and variants
of a library, which draw the same calls, follow each other on one worker, which compiles for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from anyattn.testing.bad_input import bad_calls
from anyattn.testing.case import Case, call
from anyattn.testing.cases import all_cases, gradient_cases, repeatable_cases, seldom_cases
from anyattn.testing.linear_strategies import linear_calls
from anyattn.testing.plugin import Run
from anyattn.testing.running import check_gradients, check_refused, check_same_bits, check_values
from anyattn.testing.strategies import calls

BY_LIBRARY = {"traced"}
"""Capabilities that hang on the library of a run, not on its case."""


def one_drawing() -> tuple[Case, ...]:
    """The name under which drawn calls appear among the cases."""
    return (call("drawn calls", "drawn", "whole calls, drawn"),)


def one_linear_drawing() -> tuple[Case, ...]:
    """The same of `linear_attention`."""
    return (call("drawn linear calls", "linear", "whole calls, drawn", operation="linear"),)


@pytest.mark.anyattn_cases.with_args(one_drawing)
def test_drawn_calls(anyattn_run: Run, pytestconfig: pytest.Config) -> None:
    """Whole calls drawn by hypothesis, the same ones in every run."""
    _draw(anyattn_run, pytestconfig, calls, 1)


@pytest.mark.anyattn_cases.with_args(one_linear_drawing)
def test_drawn_linear_calls(anyattn_run: Run, pytestconfig: pytest.Config) -> None:
    """The same of `linear_attention`, half as many: there are fewer options."""
    _draw(anyattn_run, pytestconfig, linear_calls, 2)


def _draw(run: Run, config: pytest.Config, strategy: Callable[..., SearchStrategy[Case]], part: int) -> None:
    backend, library = run.backend, run.library
    most, examples = config.getoption("anyattn_examples"), library.examples // part
    drawn = strategy(dtypes=backend.dtypes & library.dtypes, capabilities=backend.capabilities)

    @settings(
        max_examples=examples if most is None else min(most, examples),
        derandomize=True,
        database=None,
        deadline=None,
        # To explain a failure takes longer than to find and shrink it.
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def matches(case: Case) -> None:
        check_values(case, library, backend.name)

    matches()


@pytest.mark.anyattn_cases.with_args(all_cases)
def test_values(anyattn_run: Run) -> None:
    """Results are near the oracle, of the right dtype and library, and inputs are untouched."""
    check_values(anyattn_run.case, anyattn_run.library, anyattn_run.backend.name)


@pytest.mark.anyattn_cases.with_args(seldom_cases)
def test_values_seldom(anyattn_run: Run) -> None:
    """The same of cases that run where they are asked for."""
    check_values(anyattn_run.case, anyattn_run.library, anyattn_run.backend.name)


@pytest.mark.anyattn_cases.with_args(repeatable_cases)
def test_same_bits(anyattn_run: Run) -> None:
    """The same call twice gives the same bits."""
    check_same_bits(anyattn_run.case, anyattn_run.library, anyattn_run.backend.name)


@pytest.mark.anyattn_cases.with_args(gradient_cases)
def test_gradients(anyattn_run: Run) -> None:
    """Gradients by every float array are within their bounds, 0 where they should be, and never NaN."""
    twice = "deterministic_backward" in anyattn_run.case.needs
    check_gradients(anyattn_run.case, anyattn_run.library, anyattn_run.backend.name, twice=twice)


@pytest.mark.anyattn_cases.with_args(bad_calls)
def test_bad_input(anyattn_run: Run) -> None:
    """Bad input raises an error that names the argument, what came and what was wanted, and nothing runs."""
    check_refused(anyattn_run.case, anyattn_run.library, anyattn_run.backend.name)


def test_every_capability_has_a_case() -> None:
    """A capability that no case needs would be declared without ever being held to anything."""
    from anyattn.backend import CAPABILITIES

    exercised = frozenset().union(*(case.needs for case in (*all_cases(), *gradient_cases())))
    missing = set(CAPABILITIES) - exercised - BY_LIBRARY
    assert not missing, f"no case needs {sorted(missing)}"
    unknown = exercised - set(CAPABILITIES)
    assert not unknown, f"cases need capabilities that do not exist: {sorted(unknown)}"
