"""The kernel of `attention_weights` and `attention_stats`, run by its launch code on the PTX interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_host import Hosted, need_sanitizers
from cuda_mutants import conflict, said_of
from cuda_mutants_inspect import CALLS, MUTANTS, different, perform, references
from cuda_runs import Interpreted
from cuda_standin import Standin
from ptx import Arena, PtxError

import anyattn as aa
from anyattn.describe import Options, describe
from anyattn.testing.case import Drawn, Entry, Given, Plant, call
from anyattn.testing.cases import all_cases
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_values
from anyattn_cupy import inspect_launch, launch
from anyattn_cupy.variants import Device, choose_inspect, chunks_of

pytestmark = pytest.mark.usefixtures("nvrtc")

# Of the conformance kit.
KIT = (
    "weights: mask of all axes",
    "weights: bfloat16",
    "weights: Lq = 4, Lk = 0",
    "weights: Lq = 3, Lk = 7",
    "weights: two axes",
    "weights: rows [4, 1]",
    "weights: rows []",
    "stats: float64",
    "stats: Lq = 0, Lk = 4",
    "stats: max alone",
    "stats: entropy alone",
    "stats: default",
    "nan in weights and hidden keys",
    "inf in weights and hidden keys",
    "nan in stats and hidden keys",
    "-inf in stats and hidden keys",
    "rows that see nothing, weights",
    "rows that see nothing, stats",
    "logits of 1e4, weights",
    "logits of 1e4, stats",
)
ALL = ("key_mass", "entropy", "max")


def long(name, operation, dtype, dim, **options):
    """A call over several tiles of queries and keys that divide nothing."""
    sizes = {"q_len": 70, "k_len": 150, "heads": 2, "kv_heads": 1}
    wanted = {"stats": ALL} if operation == "stats" else {}
    made = {"dim": dim, "dtype": dtype, "operation": operation} | sizes | wanted | options
    return call(name, "cuda", "several tiles", **made)


GATHERED = Entry("masks", "fixed", (40, 2))
LENGTHS = {"kv_lengths": Given("n", (150, 65, 0)), "q_offset": Given("at", (130, 50, 0))}
LONG = (
    long("weights, gathered, float16", "weights", "float16", 24, mask=GATHERED, sinks=Drawn("sinks", (2,))),
    long("weights, lengths, batch, odd width", "weights", "float32", 9, batch=(3,), q_len=20, causal=True,
         **LENGTHS),
    long("weights, rows, all of a function", "weights", "float32", 8, rows=[69, 3, 3, 40], batch=(2,),
         score_mod=Entry("scores", "alibi", (2,)), window=(30, 2)),
    long("weights, more channels than a tile", "weights", "float16", 264, q_len=20, k_len=40, causal=True),
    long("stats, causal", "stats", "float32", 24, causal=True, sinks=Drawn("sinks", (2,))),
    long("stats, documents, bfloat16", "stats", "bfloat16", 16, q_len=150,
         mask=Entry("masks", "documents", (Given("ids", tuple(n // 40 for n in range(150))),))),
    long("stats, gathered, a nan is hidden", "stats", "float32", 8, mask=GATHERED, causal=True,
         plants=(Plant("k", (0, 1, 1), float("nan")), Plant("k", (0, 149, 1), float("inf")))),
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in all_cases() if c.name in KIT], ids=lambda c: c.name)
def test_conformance(case, interpreted):
    check_values(case, LIBRARIES["numpy"], "interpreted")


def test_every_case_that_is_named_exists():
    assert set(KIT) <= {c.name for c in all_cases()}


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_several_tiles(case, install):
    device = Interpreted(multiprocessors=2)
    install(device)
    check_values(case, LIBRARIES["numpy"], "interpreted")
    [launch] = device.standin.launches
    assert "inspect.cu" in launch.source
    assert ("#define WIDE 1" in launch.source) == (case.q[-1] > 256)


def test_keys_beyond_lengths_that_the_host_does_not_know_are_never_read(monkeypatch):
    standin, rng, lengths = Standin(), np.random.default_rng(0), np.array([40, 0])
    q, k = (rng.standard_normal((2, 1, n, 8)).astype("f4") for n in (5, 90))
    options = {"causal": True, "kv_lengths": lengths, "q_offset": np.array([35, -5])}
    with monkeypatch.context() as patch:
        patch.setattr("anyattn.arrays.is_concrete_cpu", lambda x: False)
        call = describe("weights", q, k, None, Options(**options))
        placed = standin.asarray(k)
        at = placed.data.ptr - Arena.BASE
        standin.arena.known[at + placed[:1, :, :40].nbytes : at + placed.nbytes] = False
        for name, x in (("q", standin.asarray(q)), ("k", placed)):
            object.__setattr__(call, name, x)
        found = inspect_launch.weights(call, standin)
    np.testing.assert_allclose(np.array(found), aa.attention_weights(q, k, **options), atol=1e-6)


def test_sums_over_rows_do_not_depend_on_who_is_first(install):
    """Chunks of blocks of rows have sums of their own, which are added in order."""
    q, k = (np.random.default_rng(0).standard_normal((1, 1, n, 8)).astype("f4") for n in (200, 40))
    found = []
    for multiprocessors in (1, 1, 4):
        device = Interpreted(multiprocessors=multiprocessors)
        install(device)
        found.append(aa.attention_stats(q, k, backend="interpreted")["key_mass"])
        assert device.standin.launches[0].grid == (min(2 * multiprocessors, 4),)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-6)


def test_tiles_fit_and_chunks_are_as_many_as_there_is_work():
    for capability, room in ((75, 65536), (80, 166912)):
        for dtype in ("float16", "float32", "float64"):
            for dim in (8, 128, 256, 1000):
                found = choose_inspect(Device(capability, room), dtype, dim, True)
                assert found.shared_memory <= room
                assert found.wide == (dim == 1000)
    for heads, blocks, nbytes, chunks in (
        (3, 100, 1 << 10, 64),
        (3, 10, 1 << 10, 10),
        (300, 10, 1 << 10, 1),
        # A million keys of 8 heads, and so many that one part takes more.
        (8, 100, 32_000_000, 4),
        (8, 100, 1 << 30, 1),
    ):
        assert chunks_of(Device(80, 166912, 108), heads, blocks, nbytes) == chunks


@pytest.fixture(scope="module")
def wanted():
    return references()


def complaint(change, name, wanted, install):
    """What is wrong with a call on changed kernels, in words; empty where nothing is."""
    device = Interpreted(change=change, count=True, multiprocessors=1)
    install(device)
    try:
        found = perform(name, "interpreted")
    except PtxError as error:
        return str(error)
    if different(found, wanted[name]):
        return "wrong result"
    return conflict(device.standin.launches[0].machine, ("products",), ("load",))


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_as_it_is(name, wanted, install):
    assert complaint(lambda source: source, name, wanted, install) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_caught(mutant, wanted, install):
    assert mutant.caught in said_of(mutant, lambda change: complaint(change, mutant.case, wanted, install))


@pytest.mark.parametrize(
    ("name", "sanitizer"), [("weights rows", "address"), ("stats", "address"), ("stats", "thread")]
)
def test_as_a_program_of_the_host(name, sanitizer, wanted, install):
    need_sanitizers()
    install(Hosted(sanitizer, multiprocessors=2))
    assert not different(perform(name, "interpreted"), wanted[name])


@pytest.mark.parametrize(("operation", "options"), [("weights", {}), ("stats", {"stats": ("max",)})])
def test_wide_calls_say_so(operation, options):
    for dim, count in ((64, 0), (300, 1)):
        q = np.zeros((2, 5, dim), "f4")
        remarks = launch.remarks(describe(operation, q, q, None, Options(**options)), Standin())
        assert ["of D = 300 channels" in remark for remark in remarks] == [True] * count
