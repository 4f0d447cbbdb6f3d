"""Each defect that is planted in the kernels is caught by the checks of the interpreter or by the result."""

from __future__ import annotations

import pytest
from cuda_mutants import CALLS, MUTANTS, arguments, conflict, device_for, different, references, said_of
from cuda_runs import Interpreted
from ptx import PtxError

import anyattn as aa

pytestmark = pytest.mark.usefixtures("nvrtc")

# Files that have the main loops.
LOOPS = ("forward_fma", "products", "tensor_cores")


@pytest.fixture(scope="module")
def wanted():
    return references()


def complaint(change, name, wanted, install):
    """What is wrong with a call on changed kernels, in words; empty where nothing is."""
    device = Interpreted(change=change, count=True, **device_for(name))
    install(device)
    given, options = arguments(name)
    try:
        found = aa.attention(*given, **options, backend="interpreted")
    except PtxError as error:
        return str(error)
    if different(found, wanted[name], given[0].dtype):
        return "wrong result"
    return conflict(device.standin.launches[0].machine, LOOPS)


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_as_they_are(name, wanted, install):
    assert complaint(lambda source: source, name, wanted, install) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_caught(mutant, wanted, install):
    assert mutant.caught in said_of(mutant, lambda change: complaint(change, mutant.case, wanted, install))
