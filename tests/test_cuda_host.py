"""The kernels as programs of g++ under ASan and UBSan, and under TSan: clean, right, and able to bite."""

from __future__ import annotations

import pytest
from cuda_host import Hosted, HostError, host_source, need_sanitizers
from cuda_mutants import (
    CALLS,
    HOST_ALONE,
    MUTANTS,
    ON_THE_HOST,
    arguments,
    device_for,
    different,
    references,
    said_of,
)

import anyattn as aa
from anyattn.testing.case import Drawn, Entry, call
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_values

PLANTED = {mutant.what: mutant for mutant in MUTANTS}


@pytest.fixture(autouse=True)
def _sanitizers():
    need_sanitizers()


@pytest.fixture(scope="module")
def wanted():
    return references()


def complaint(change, name, sanitizer, wanted, install):
    """What is wrong with a call on changed kernels, in words; empty where nothing is."""
    install(Hosted(sanitizer, change=change, **device_for(name)))
    given, options = arguments(name)
    try:
        found = aa.attention(*given, **options, backend="interpreted")
    except HostError as error:
        return str(error)
    return "wrong result" if different(found, wanted[name], given[0].dtype) else ""


@pytest.mark.parametrize("name", CALLS)
def test_no_access_is_wrong(name, wanted, install):
    assert complaint(lambda source: source, name, "address", wanted, install) == ""


@pytest.mark.parametrize("name", ["float16 nan", "float16 packed", "float16 parts", "float32"])
def test_nothing_races(name, wanted, install):
    assert complaint(lambda source: source, name, "thread", wanted, install) == ""


def case(dtype, dim, **options):
    sizes = {
        "q_len": 21,
        "k_len": 70,
        "heads": 2,
        "kv_heads": 1,
        "dim": dim,
        "dtype": dtype,
        "return_lse": True,
    }
    return call(dtype, "cuda", "on the host", **sizes, **options)


@pytest.mark.parametrize("case", [
    case("float64", 9, window=(20, 3), score_mod=Entry("scores", "alibi", (2,))),
    case("bfloat16", 17, v_dim=23, bias=Drawn("bias", (21, 70)), softcap=3.0),
], ids=lambda c: c.name)  # fmt: skip
def test_conformance(case, install):
    install(Hosted("address"))
    check_values(case, LIBRARIES["numpy"], "interpreted")


def said_under(sanitizer, mutant, wanted, install):
    return said_of(mutant, lambda change: complaint(change, mutant.case, sanitizer, wanted, install))


@pytest.mark.parametrize("what", ON_THE_HOST)
def test_caught(what, wanted, install):
    sanitizer, caught = ON_THE_HOST[what]
    assert caught in said_under(sanitizer, PLANTED[what], wanted, install)


@pytest.mark.parametrize("mutant", HOST_ALONE, ids=lambda m: m.what)
def test_caught_here_alone(mutant, wanted, install):
    assert mutant.caught in said_under("address", mutant, wanted, install)


@pytest.mark.parametrize(("said", "how"), [("", pytest.skip.Exception), ("fail", pytest.fail.Exception)])
def test_a_missing_tool_fails_where_none_may_be_missing(said, how, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("ANYATTN_MISSING_TOOLS", said)
    with pytest.raises(how, match=r"g\+\+ is not installed"):
        need_sanitizers()


def test_inline_ptx_becomes_a_call():
    source = """asm volatile("a [%0], {%1};" T
        :: "r"(f(x, y ? 1 : 2)), "+l"(p) : "memory");
    asm("c;" : "=f"(z[0])); next"""
    first, second, third = host_source(source, "k", 80).splitlines()[2:5]
    read = "{host::read(f(x, y ? 1 : 2)), host::read(p)}"
    assert first == f'host::instruction(__LINE__, "a [%0], {{%1}};" T, {{}}, {read})'
    assert second == ";"
    assert third == '    host::instruction(__LINE__, "c;", {host::written(z[0])}, {}); next'
