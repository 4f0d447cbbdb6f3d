"""The cases, one module a family: `all_cases()` compare values, `gradient_cases()` derivatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from anyattn.testing.case import Case
from anyattn.testing.cases import (
    around,
    cached,
    derivatives,
    dropout,
    each_option,
    functions,
    hidden,
    linear,
    memory,
    merging,
    packed,
    pairwise,
    positions,
    shapes,
    softmax,
    vocabulary,
)

__all__ = ["all_cases", "gradient_cases", "repeatable_cases", "seldom_cases"]


def all_cases() -> tuple[Case, ...]:
    """Every case whose results are compared with the oracle."""
    families = (
        each_option, shapes, hidden, softmax, positions, vocabulary, functions, memory, around, merging,
        pairwise, linear, cached, packed, dropout,
    )  # fmt: skip
    return _distinct(case for family in families for case in family.cases())


def seldom_cases() -> tuple[Case, ...]:
    """More of the kind, which run where they are asked for (`plugin.SELDOM`)."""
    return _distinct(cached.every())


def gradient_cases() -> tuple[Case, ...]:
    """Every case that is differentiated by each of its float arrays."""
    return _distinct((*derivatives.cases(), *linear.gradient_cases()))


def repeatable_cases() -> tuple[Case, ...]:
    """Cases that are run twice and must give the same bits."""
    families = ("each option", "long")
    return tuple(case for case in all_cases() if case.family in families and case.dtype == "float32")


def _distinct(cases: Iterable[Case]) -> tuple[Case, ...]:
    found = tuple(cases)
    twice = [name for name, count in Counter(case.name for case in found).items() if count > 1]
    if twice:
        raise AssertionError(f"cases share a name and so their values: {twice}")
    return found
