"""Defects in the kernels of linear attention are caught, by the interpreter or by g++ and its sanitizers."""

from __future__ import annotations

import pytest
from cuda_host import Hosted, HostError, need_sanitizers
from cuda_mutants import conflict, said_of
from cuda_mutants_linear import CALLS, DEVICE, LIMITS, MUTANTS, ON_THE_HOST, different, perform, references
from cuda_runs import Interpreted
from ptx import PtxError

from anyattn_cupy import linear_variants

PLANTED = {mutant.what: mutant for mutant in MUTANTS}


@pytest.fixture(scope="module")
def wanted():
    return references()


@pytest.fixture
def complaint(wanted, install, monkeypatch):
    """A function that says what is wrong with a call on changed kernels; nothing where nothing is."""

    def find(device, name):
        for limit, value in LIMITS.get(name, {}).items():
            monkeypatch.setattr(linear_variants, limit, value)
        install(device)
        try:
            found = perform(name, "interpreted")
        except (PtxError, HostError) as error:
            return str(error)
        return "wrong result" if different(found, wanted[name]) else ""

    return find


@pytest.fixture
def interpreting(nvrtc, complaint):
    """The same of kernels on the interpreter, which counts what they read."""

    def find(change, name):
        device = Interpreted(change=change, count=True, **DEVICE)
        said = complaint(device, name)
        machine = device.standin.launches[0].machine if not said else None
        return said or conflict(machine, ("linear_chunk", "linear_forward"))

    return find


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_as_they_are(name, interpreting):
    assert interpreting(lambda source: source, name) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_caught(mutant, interpreting):
    assert mutant.caught in said_of(mutant, lambda change: interpreting(change, mutant.case))


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        *(
            (name, "address")
            for name in ("gated delta", "delta, packed", "gated, parts", "gated, many channels")
        ),
        ("gated", "thread"),
    ],
)
def test_as_a_program_of_the_host(name, sanitizer, complaint):
    need_sanitizers()
    assert complaint(Hosted(sanitizer, **DEVICE), name) == ""


@pytest.mark.parametrize("what", ON_THE_HOST)
def test_caught_on_the_host(what, complaint):
    need_sanitizers()
    sanitizer, caught = ON_THE_HOST[what]
    mutant = PLANTED[what]
    said = said_of(mutant, lambda change: complaint(Hosted(sanitizer, change=change, **DEVICE), mutant.case))
    assert caught in said
