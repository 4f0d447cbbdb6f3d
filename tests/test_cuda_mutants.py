"""Each defect that is planted in the kernels is caught by the checks of the interpreter or by the result."""

from __future__ import annotations

import pytest
from cuda_compile import need_nvrtc
from cuda_mutants import CALLS, MUTANTS, device_for, different, references
from cuda_runs import Interpreted
from ptx import PtxError

import anyattn as aa

# Files that have the main loops.
LOOPS = ("forward_fma", "products", "tensor_cores")


@pytest.fixture(scope="module")
def wanted():
    return references()


def complaint(change, name, wanted, install):
    """What is wrong with a call on changed kernels, in words; empty where nothing is."""
    device = Interpreted(change=change, count=True, **device_for(name))
    install(device)
    arrays, options = CALLS[name]()
    try:
        found = aa.attention(*arrays, **options, return_lse=True, backend="interpreted")
    except PtxError as error:
        return str(error)
    if different(found, wanted[name], arrays[0].dtype):
        return "wrong result"
    for (where, space, how), traffic in device.standin.launches[0].machine.traffic.items():
        if space != "shared" or not any(file in where for file in LOOPS):
            continue
        # Rows that are no power of two long do not come in without any conflict.
        if traffic.taken > traffic.least * (1 if how == "load" else 2):
            return f"bank conflicts at {where}"
    return ""


@pytest.fixture(autouse=True)
def _nvrtc():
    need_nvrtc()


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_as_they_are(name, wanted, install):
    assert complaint(lambda source: source, name, wanted, install) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_caught(mutant, wanted, install):
    planted = []

    def change(source):
        # A call in parts has two sources.
        planted.append(source.count(mutant.old))
        return source.replace(mutant.old, mutant.new)

    said = complaint(change, mutant.case, wanted, install)
    assert sum(planted) == 1, f"{mutant.old!r} occurs {sum(planted)} times"
    assert said
    assert mutant.caught in said
