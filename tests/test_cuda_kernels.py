"""The kernels of the `cupy` backend, compiled by NVRTC and run by its launch code on the PTX interpreter."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cuda_compile import ADDED
from cuda_runs import Interpreted, described, placed_arrays
from cuda_standin import Standin
from ptx import Arena, PtxError

import anyattn as aa
from anyattn import masks, scores
from anyattn.describe import Options, describe
from anyattn.testing.case import Drawn, Entry, Function, Given, Plant, call
from anyattn.testing.cases import all_cases
from anyattn.testing.libraries import LIBRARIES
from anyattn.testing.running import check_values
from anyattn_cupy import backend, launch
from anyattn_cupy.filling import tensors_of
from anyattn_cupy.source import OPTIONS
from anyattn_cupy.variants import Device, choose

pytestmark = pytest.mark.usefixtures("nvrtc")

NAN, INF = float("nan"), float("inf")

# Of the conformance kit: at least one case of each option, and of what is easily got wrong.
KIT = (
    "mask of all axes, float16",
    "score_mod function, bfloat16",
    "kv_lengths, float16",
    "blhd, bfloat16",
    "one key/value head, float16",
    "D = 257, float32",
    "D = 1, Dv = 8",
    "Lq = 13, Lk = 1, causal = False",
    "Lq = 5, Lk = 0, sinks and bias",
    "batch: three axes, bhld",
    "inf in k and v, hidden from some rows by negated mask",
    "nan in k and v, hidden from some rows, float16",
    "inf at a seen key",
    "rows that see nothing, float64",
    "bias of -inf, and a mask",
    "logits of 1e4 with sinks and causal, bfloat16",
    "a cache, score_mod",
    "reversed arrays, bhld, float16",
    "sinks that are not finite and no key",
    "dropout, float64",
    "dropout and everything, float16",
    "dropout and a decoding step, bfloat16",
    "dropout over several tiles",
    "dropout and gathered keys",
    "dropout, nan is hidden from some rows",
    "caches: buffer: int8, options",
    "caches: ring: int8, bfloat16, 2 queries",
    "caches: ring: options",
    "caches: pages: int8, options",
    "caches: pages: int8, float64, 11 queries",
    "caches: pages: float16",
)


def long(name, dtype, dim, **options):
    """A call over several tiles of queries and keys that divide nothing."""
    sizes = {"q_len": 70, "k_len": 150, "heads": 2, "kv_heads": 1}
    return call(name, "cuda", "several tiles", dim=dim, dtype=dtype, return_lse=True, **(sizes | options))


def plant(*at, value=NAN, arrays="kv"):
    """A value in k and v at a key."""
    return tuple(Plant(x, (0, *at, 1), value) for x in arrays)


ALIBI = Entry("scores", "alibi", (2,))
GATHERED = Entry("masks", "fixed", (40, 2))
DOCUMENTS = Entry("masks", "documents", (Given("ids", tuple(n // 40 for n in range(150))),))
FUNCTION = Function(lambda f, t: lambda b, h, i, j: (i + t[j % 7]) % 3 != 0, (Given("t", tuple(range(7))),))
LENGTHS = {"kv_lengths": Given("n", (150, 65, 0)), "q_offset": Given("at", (130, 50, 0))}
LONG = (
    long("float32, causal", "float32", 40, v_dim=20, causal=True, sinks=Drawn("sinks", (2,))),
    long("float64, window and score", "float64", 24, window=(20, 3), score_mod=ALIBI),
    long("float16, no mask", "float16", 64, v_dim=48),
    long("float16, causal", "float16", 72, causal=True, softcap=3.0),
    long("bfloat16, gathered columns", "bfloat16", 16, mask=GATHERED),
    long("float16, documents", "float16", 32, batch=(2,), q_len=150, mask=DOCUMENTS),
    long("float16, bias and an odd width", "float16", 17, v_dim=23, bias=Drawn("bias", (70, 150))),
    long("bfloat16, nan is hidden", "bfloat16", 24, causal=True, plants=plant(100) + plant(149, value=INF)),
    long("float32, nan is hidden", "float32", 8, causal=True, plants=plant(100) + plant(149, value=-INF)),
    long("float16, lengths and offsets", "float16", 24, batch=(3,), q_len=20, causal=True, **LENGTHS),
    long("float16, a function", "float16", 8, q_len=20, mask=FUNCTION),
    long("float32, a length for all", "float32", 8, q_len=1, batch=(2,), causal=True, kv_lengths=65),
    # The widest that a tile holds whole.
    *(
        long(
            f"{dtype}, D = {dim}", dtype, dim, v_dim=v_dim, q_len=20, k_len=75, causal=True, plants=plant(60)
        )
        for dtype, dim, v_dim in (("float16", 250, 201), ("float32", 161, 255), ("float64", 256, 129))
    ),
    # A weight that is kept is more than float16 holds, once it is divided by 1 - p.
    long("float16, nearly all is dropped", "float16", 8, v_dim=1, dropout=1 - 2**-17, dropout_seed=0),
)


# Few queries of many heads, on a device with more multiprocessors than there are items.
FEW = (
    long("float16, a cache", "float16", 24, q_len=1, heads=8, kv_heads=2, batch=(3,), k_len=600,
         kv_lengths=Given("n", (150, 65, 0)), sinks=Drawn("sinks", (8,))),
    long("float32, causal and packed", "float32", 8, q_len=3, k_len=300, heads=6, kv_heads=2, causal=True),
    long("float16, heads told apart", "float16", 8, q_len=5, heads=4, kv_heads=2, k_len=600,
         score_mod=Entry("scores", "alibi", (4,)), mask=Drawn("mask", (4, 5, 600), "bool", "mostly true")),
    long("float64, gathered in parts", "float64", 8, q_len=4, heads=2, kv_heads=1, k_len=600, mask=GATHERED),
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in all_cases() if c.name in KIT], ids=lambda c: c.name)
def test_conformance(case, interpreted):
    check_values(case, LIBRARIES["numpy"], "interpreted")


@pytest.mark.parametrize("case", LONG, ids=lambda c: c.name)
def test_several_tiles(case, interpreted):
    check_values(case, LIBRARIES["numpy"], "interpreted")
    kernel = "forward_mma.cu" if "16" in case.dtype else "forward_fma.cu"
    assert kernel in interpreted.standin.launches[0].source


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_few_queries(case, install):
    device = Interpreted(multiprocessors=32)
    install(device)
    check_values(case, LIBRARIES["numpy"], "interpreted")
    assert len(device.standin.launches) == 2
    packed = "#define PACKED 1" in device.standin.launches[0].source
    assert packed == (case.name != "float16, heads told apart")


def test_every_case_that_is_named_exists():
    assert set(KIT) <= {c.name for c in all_cases()}


@pytest.mark.parametrize(("dtype", "kernel"), [("float16", "forward_mma.cu"), ("bfloat16", "forward_fma.cu")])
def test_compute_capability_7_5(dtype, kernel, install):
    """float16 by products of half the depth and copies that are there at once; bfloat16 by multiply-adds."""
    device = Interpreted(capability=75)
    install(device)
    for name, dim in (("causal", 24), ("causal, odd", 9)):
        case = long(f"{dtype}, {name}", dtype, dim, causal=True, plants=plant(100))
        check_values(case, LIBRARIES["numpy"], "interpreted")
        assert kernel in device.standin.launches[0].source
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    q, k, v = (np.zeros((2, 4, 8), kind) for _ in range(3))
    notes = aa.explain(q, k, v, backend="interpreted").notes
    assert any("bfloat16" in note for note in notes) == (dtype == "bfloat16")


@pytest.mark.parametrize(("capability", "dim", "stages"), [(86, 64, 2), (90, 64, 3), (90, 128, 3)])
def test_tiles_that_are_on_their_way(capability, dim, stages, install):
    """One more where the shared memory of a multiprocessor holds as many blocks as before."""
    device = Interpreted(capability)
    install(device)
    case = long(f"{dim} channels", "float16", dim, q_len=20, k_len=400, causal=True)
    check_values(case, LIBRARIES["numpy"], "interpreted")
    assert f"#define STAGES {stages}" in device.standin.launches[0].source


@pytest.mark.parametrize(
    ("dtype", "dim", "v_dim"), [("float32", 300, 20), ("float16", 20, 260), ("bfloat16", 259, 257)]
)
def test_more_channels_than_a_tile_holds(dtype, dim, v_dim, interpreted):
    case = long(
        f"{dtype}, D = {dim}", dtype, dim, v_dim=v_dim, q_len=20, k_len=70, causal=True, plants=plant(60)
    )
    check_values(case, LIBRARIES["numpy"], "interpreted")
    [launch] = interpreted.standin.launches
    assert launch.grid[1] == -(-v_dim // 128)
    q, k, v = (np.zeros((2, 4, n), "f2") for n in (dim, dim, v_dim))
    [note] = aa.explain(q, k, v, backend="interpreted").notes
    assert f"D = {dim} channels" in note
    assert f"Dv = {v_dim} columns" in note


@pytest.mark.parametrize(("dtype", "mask"), [
    ("float32", masks.sliding_window(10)), ("float16", masks.sliding_window(10)),
    ("float16", masks.fixed(64, 2) & masks.causal()),
])  # fmt: skip
def test_empty_tiles_are_never_read(dtype, mask):
    standin = Standin()
    q, k, v = placed_arrays(standin, dtype, 100, 400, 16)
    made = described(q, k, v, mask=mask)
    spans = aa.schedule.schedule(made, rows=64, keys=64 if dtype == "float16" else 32).spans
    read = np.zeros(400, bool)
    for (first, end), kind in zip(spans.ends, spans.kinds, strict=True):
        read[spans.columns[first:end] if kind & 2 else slice(first, end)] = True
    assert not read.all()
    for x in (k, v):
        known = np.repeat(np.broadcast_to(read[:, None], x.shape[1:]).reshape(-1), x.dtype.itemsize)
        at = x.data.ptr - Arena.BASE
        standin.arena.known[at : at + x.nbytes] = np.tile(known, 2)
    launch.attend(made, standin)
    first = np.flatnonzero(read)[0]
    at = k.data.ptr - Arena.BASE + first * 16 * k.dtype.itemsize
    standin.arena.known[at] = False
    with pytest.raises(PtxError, match="nobody has written"):
        launch.attend(made, standin)


UNREAD = {
    "float32": ({}, (70, 1, 1)),
    "float16": ({"window": (90, 5), "q_offset": 60}, (70, 2, 1)),
    "float16 packed, in parts": ({"causal": True}, (1, 4, 2)),
}


@pytest.mark.parametrize("limit", ["a.lengths[item.batch]", "a.lengths[item.batch] + 1", "end"])
@pytest.mark.parametrize("name", UNREAD)
def test_keys_beyond_lengths_that_the_host_does_not_know_are_never_read(name, limit, monkeypatch):
    """And a kernel that reads one more of them, or all, is found out."""
    right = "end = min(end, a.lengths[item.batch]);"
    count = 32 if "parts" in name else 3
    standin = Standin(multiprocessors=count, change=lambda source: source.replace(right, f"end = {limit};"))
    options, (rows, heads, kv_heads) = UNREAD[name]
    rng, lengths = np.random.default_rng(1), np.array([130, 7, 0])
    shapes = (heads, rows, 8), (kv_heads, 600, 8), (kv_heads, 600, 8)
    host = [rng.standard_normal((3, *shape)).astype(name.split()[0]) for shape in shapes]
    monkeypatch.setattr("anyattn.arrays.is_concrete_cpu", lambda x: False)
    call = described(*map(standin.asarray, host), kv_lengths=lengths, **options)
    for x in (call.k, call.v):
        at = x.data.ptr - Arena.BASE
        known = np.arange(600) < lengths[:, None, None]
        bytes_of_rows = np.broadcast_to(known[..., None], (3, kv_heads, 600, x.strides[-2]))
        standin.arena.known[at : at + x.nbytes] = bytes_of_rows.reshape(-1)
    if limit != "a.lengths[item.batch]":
        with pytest.raises(PtxError, match="nobody has written"):
            launch.attend(call, standin)
        return
    found = np.array(launch.attend(call, standin)[0])
    assert len(standin.launches) == 1 + ("parts" in name)
    monkeypatch.undo()
    wanted = aa.attention(*host, kv_lengths=lengths, **options, backend="reference")
    np.testing.assert_allclose(found, wanted, atol=1e-6 if name == "float32" else 2e-3)


@pytest.mark.parametrize(
    ("dtype", "files", "loads"),
    [("float32", ("forward_fma.cu", "products.cuh"), 4), ("float16", ("tensor_cores.cuh",), 2)],
)
def test_main_loops_have_no_bank_conflicts(dtype, files, loads):
    standin = Standin(count=True)
    launch.attend(described(*placed_arrays(standin, dtype, 64, 128, 64)), standin)
    traffic = standin.launches[0].machine.traffic
    shared = [
        t
        for (where, space, how), t in traffic.items()
        if (space, how) == ("shared", "load") and any(file in where for file in files)
    ]
    assert len(shared) >= loads
    assert all(t.taken == t.least for t in shared)
    read = [t for where, t in traffic.items() if where[1:] == ("global", "load") and t.requests > 32]
    assert read
    assert all(t.taken == t.least for t in read)


def test_tests_compile_what_cupy_compiles(monkeypatch):
    """Its options are those of the caller and its own, and one of these changes what a kernel computes."""
    from cupy.cuda import compiler

    class Program:
        def __init__(self, *arguments, **options):
            pass

        def compile(self, options, log):
            raise LookupError(options)

    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: ("-arch=sm_80", "cubin"))
    monkeypatch.setattr(compiler, "_preprocess", lambda *_: "")
    with pytest.raises(LookupError) as caught:
        compiler._compile_with_cache_cuda("", OPTIONS, "80", backend="nvrtc", cache_in_memory=True)
    # Precompiled headers change nothing where there are none.
    used = [x for x in caught.value.args[0] if x not in ("-arch=sm_80", "--pch")]
    assert used == [*OPTIONS, *ADDED]


def test_subnormal_numbers_of_16_bits_count(interpreted):
    """CuPy lets the device take subnormal float32 for 0: none of 16 bits must become one on its way."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 8)).astype("f4") for n in (5, 20, 20))
    tiny = np.array([2.0**-24, 3e-6, 0, 2.0**-15, -3e-6], "f2")
    options = {
        "mask": lambda b, h, i, j: tiny[j % 5] != 0,
        "score_mod": lambda s, b, h, i, j: s + 1e5 * tiny[(i + j) % 5],
    }
    found = aa.attention(q, k, v, **options, backend="interpreted")
    np.testing.assert_allclose(found, aa.attention(q, k, v, **options, backend="reference"), atol=1e-5)


def test_a_launch_keeps_to_the_limits_of_the_device():
    for dim in (64, 128, 256):
        for dtype in ("float16", "float32"):
            for capability, room in ((75, 65536), (80, 166912), (86, 101376)):
                found = choose(Device(capability, room), dtype, dim, dim, True)
                assert found.shared_memory <= room
                assert (found.kernel == "forward_mma") == (dtype == "float16")
    for dtype, capability in (("float16", 70), ("bfloat16", 75)):
        assert choose(Device(capability, 65536), dtype, 64, 64, True).kernel == "forward_fma"
    assert choose(Device(75, 65536), "float64", 256, 256, True).wide
    assert not choose(Device(80, 166912), "float64", 256, 256, True).wide
    for dtype in ("float16", "float32", "float64"):
        found = choose(Device(75, 65536), dtype, 1000, 3000, True)
        assert found.wide
        assert found.shared_memory <= 65536


def test_blocks_with_most_to_do_are_handed_out_first():
    standin = Standin()
    call = described(*placed_arrays(standin, "float32", 200, 200, 8), causal=True)
    made = launch.chosen(call, tensors_of(call, standin), standin).spans.arrays(standin)
    starts, ends = (np.array(made[name]) for name in ("span_starts", "span_ends"))
    keys = [np.diff(ends[first:end]).sum() for first, end in pairwise(starts)]
    work = [keys[n % len(keys)] for n in np.array(made["order"])]
    assert len(set(work)) > 2
    assert work == sorted(work, reverse=True)


def test_batch_axes_are_joined_where_memory_allows():
    x = np.zeros((2, 3, 4, 1, 5, 6), "f4")
    broadcast = np.broadcast_to(np.zeros((3, 1, 1, 5, 6), "f4"), (3, 1, 1, 5, 6))
    assert launch.batch_axes((2, 3, 4), (x,)) == ((24,), [(30,)])
    sizes, (of_x, of_y) = launch.batch_axes((2, 3, 4), (x, broadcast))
    assert (sizes, of_x, of_y) == ((2, 3, 4), (360, 120, 30), (0, 30, 0))
    assert launch.batch_axes((3, 2, 4), (np.swapaxes(x, 0, 1),))[0] == (3, 2, 4)
    assert launch.batch_axes((), (x[0, 0, 0],)) == ((1,), [(0,)])


def test_without_a_device_it_refuses_in_one_line():
    from anyattn_cupy.devices import absent

    if absent() is None:
        pytest.skip("there is a CUDA device")
    [reason] = backend.unsupported(describe("attention", *np.zeros((3, 4, 8), "f4"), Options()))
    assert reason.startswith("no CUDA device")
    assert "\n" not in reason


def test_scores_and_masks_compile_nothing_again(interpreted):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 8)).astype("f2") for n in (5, 20, 20))
    sources = set()
    for window, slopes in ((3, [0.5]), (7, [0.25])):
        aa.attention(
            q, k, v, mask=masks.sliding_window(window), score_mod=scores.alibi(slopes), backend="interpreted"
        )
        sources |= {x.source for x in interpreted.standin.launches}
    assert len(sources) == 1


def test_compile_shows_the_kernel_and_its_key(interpreted):
    options = {"dtype": "float16", "head_dim": 24, "backend": "interpreted"}
    window = aa.compile(mask=masks.sliding_window(10), **options)
    assert "forward_mma.cu" in window.source
    assert "#define STAGES 2" in window.source
    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, 70, 24)).astype("f2") for _ in range(3))
    window(q, k, v)
    assert interpreted.standin.launches[0].source == window.source
    key = window.cache_key
    assert (key.backend, key.kernel, key.target) == ("cupy", "forward_mma", "sm_80")
    assert dict(key.tiles) == {"rows": 64, "keys": 64, "stages": 2}
    assert aa.compile(mask=masks.sliding_window(30), **options).cache_key == key
    assert aa.compile(mask=masks.sliding_window(30), softcap=2.0, **options).cache_key != key
