"""Items whose memory begins beyond 2**31 elements, as the last ones of large calls do.

Nobody has that much memory: the last item of a batch of 2**30 is launched alone, with addresses from which
its offsets lead to what there is.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_standin import Standin
from ptx import PtxError

from anyattn.describe import Options, describe
from anyattn.reference import backend as reference
from anyattn_cupy import filling, inspect_launch, launch

pytestmark = pytest.mark.usefixtures("nvrtc")

BATCH, HEADS, STRIDE = 1 << 30, 2, 5000
CONTIGUOUS = ("lse", "entropy", "part_out", "part_lse")

# Dtypes of q and of k; what makes parts.
KINDS = {"float16": ("f2", "f2", 1), "float32 in parts": ("f4", "f4", 8), "float32, int8": ("f4", "i1", 1)}


def last_item(name, change, monkeypatch, operation="attention"):
    """Launch the last item of a call as that of a large batch; the result, and the reference."""
    of_q, of_k, multiprocessors = KINDS[name]
    sizes = dict.fromkeys(("q", "out"), np.dtype(of_q).itemsize) | dict.fromkeys(
        "kv", np.dtype(of_k).itemsize
    )
    sizes |= {"k_scales": 4, "v_scales": 4}

    def compiled(cupy, device, kernel, source, memory):
        function = filling.compiled(cupy, device, kernel, source, memory)

        def run(grid, threads, arguments, shared_mem=0):
            if kernel == "combine":
                return
            a, _ = arguments
            for field in (x for x in sizes if a[x]):
                a[f"{field}_batch"] = STRIDE
                a[field] -= np.uint64(sizes[field] * STRIDE * (BATCH - 1))
            for field in (x for x in CONTIGUOUS if a[x]):
                width = int(a["v_head_dim"]) if field == "part_out" else 1
                a[field] -= np.uint64(4 * (BATCH - 1) * HEADS * int(a["q_len"]) * width)
            order = cupy.asarray(np.array([BATCH * HEADS - 1], "i4"))
            a["order"], a["batch_size"], a["batch_sizes"] = order.data.ptr, BATCH, BATCH
            function((1,), threads, arguments, shared_mem=shared_mem)

        return run

    for module in (launch, inspect_launch):
        monkeypatch.setattr(module, "compiled", compiled)
    rng = np.random.default_rng(0)
    host = [rng.standard_normal((1, HEADS, n, 8)) for n in (5, 300, 300)]
    options = {"return_lse": operation == "attention"}
    if of_k == "i1":
        host[1:] = (np.round(30 * x) for x in host[1:])
        options |= {x: rng.uniform(0, 0.05, (1, HEADS, 300)).astype("f4") for x in ("k_scales", "v_scales")}
    host = [host[0].astype(of_q), *(x.astype(of_k) for x in host[1:])]
    if operation != "attention":
        host[2], options = None, {"stats": ("entropy",)} if operation == "stats" else {}
    call = describe(operation, *host, Options(**options))
    standin = Standin(multiprocessors=multiprocessors, change=change)
    wanted = reference.run(call)
    for field in ("q", "k", "v", "k_scales", "v_scales"):
        x = getattr(call, field)
        object.__setattr__(call, field, None if x is None else standin.asarray(x))
    runs = {"attention": launch.attend, "weights": inspect_launch.weights, "stats": inspect_launch.stats}
    found = runs[operation](call, standin)
    assert len(standin.launches) == 1
    return found, wanted


@pytest.mark.parametrize("name", KINDS)
def test_attention(name, monkeypatch):
    found, wanted = last_item(name, str, monkeypatch)
    # Of parts the first one alone has run, and nothing has merged it.
    for x, y in zip(found, wanted, strict=True) if "parts" not in name else ():
        np.testing.assert_allclose(np.array(x)[0, 1], y[0, 1], atol=2e-3 if name == "float16" else 1e-5)


@pytest.mark.parametrize("operation", ["weights", "stats"])
def test_weights_and_statistics(operation, monkeypatch):
    found, wanted = last_item("float16", str, monkeypatch, operation)
    if operation == "stats":
        found, wanted = found["entropy"], wanted["entropy"]
    np.testing.assert_allclose(np.array(found)[0, 1], wanted[0, 1], atol=1e-3)


# What the kernels say, the same in 32 bits, and a call that finds it out.
NARROW = {
    "long long q, k, v, out;": ("int q, k, v, out;", "float16"),
    "    long long offset;\n    float": ("    int offset;\n    float", "float16"),
    "item.out + row.head * a.out_head +": ("int(item.out) + row.head * a.out_head +", "float16"),
    "to[head * a.q_len + row.row]": ("to[int(head) * a.q_len + row.row]", "float16"),
    "[(head * a.q_len + row.row) *": ("[(int(head) * a.q_len + row.row) *", "float32 in parts"),
    "index * a.k_scales_batch[axis]": ("index * int(a.k_scales_batch[axis])", "float32, int8"),
}


@pytest.mark.parametrize("right", NARROW)
def test_narrow_offsets_are_found_out(right, monkeypatch):
    wrong, name = NARROW[right]

    def change(source):
        assert source.count(right) == 1
        return source.replace(right, wrong)

    with pytest.raises(PtxError):
        last_item(name, change, monkeypatch)
