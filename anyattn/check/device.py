"""What the kit does not see of a backend on a CUDA device: sizes of models, streams, graphs, torch and JAX.

`python -m anyattn.check.device PART BACKEND` runs one part, as a process of its own: what goes wrong on a
device ends it. Libraries are arguments of the functions, so that tests run them where there is no device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy

import anyattn
from anyattn import masks, scores
from anyattn.errors import UnsupportedCallError
from anyattn.testing.libraries import LIBRARIES

__all__ = [
    "NOT_RUN", "PARTS", "another_device", "captured_graphs", "jax_arrays", "larger_sizes", "torch_arrays",
    "torch_graph", "two_streams",
]  # fmt: skip

# The exit status of a part that cannot run here.
NOT_RUN = 77

# Elements that keep a device busy for some 0.1 ms when each is added to.
_BUSY = 1 << 24
_TOLERANCE = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4, "float64": 1e-10}
_MASKED: dict[str, Any] = {
    "mask": masks.sliding_window(50) | masks.global_tokens([3, 150]),
    "score_mod": scores.alibi(4),
}

Attention = Callable[..., Any]


def _tensors(q_len: int, k_len: int, seed: int = 7, dim: int = 32) -> list[Any]:
    """q, k and v of two batch entries, four query heads and two others."""
    rng = numpy.random.default_rng(seed)
    shapes = ((2, 4, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, dim))
    return [rng.standard_normal(shape, numpy.float32) for shape in shapes]


def _compare(what: str, found: Any, host: list[Any], options: dict[str, Any], dtype: str = "float32") -> None:
    wide = [numpy.asarray(x, numpy.float64) for x in host]
    wanted = anyattn.attention(*wide, **options, backend="reference")
    difference = float(numpy.abs(numpy.asarray(found, numpy.float64) - wanted).max())
    if not difference <= _TOLERANCE[dtype]:
        raise AssertionError(f"{what}: the result is off by {difference:.1e}")


def larger_sizes(
    attention: Attention, cupy: Any, dims: tuple[int, ...] = (64, 96, 128, 200, 256), keys: int = 1000
) -> None:
    """Channels of usual models, of which the kit has few: tiles of each, and keys split into parts."""
    dtypes = ["float16", "float32", *(["bfloat16"] if find_spec("ml_dtypes") is not None else [])]
    for dtype in dtypes:
        if dtype == "bfloat16":
            import ml_dtypes

            kind = ml_dtypes.bfloat16
        else:
            kind = numpy.dtype(dtype)
        for dim in dims:
            for rows, options in ((150, {"causal": True, "softcap": 5.0}), (1, {"sinks": [0.5, 1, -1, 0]})):
                host = [x.astype(kind) for x in _tensors(rows, keys, dim=dim)]
                out = attention(*map(cupy.asarray, host), **options)
                what = f"{dtype}, {dim} channels, {rows} queries"
                _compare(what, cupy.asnumpy(out), host, options, dtype)


def another_device(attention: Attention, cupy: Any) -> str | None:
    """Arrays of a device that is not current; the reason where there is one alone."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        return "there is one device"
    host, lengths = _tensors(70, 200), numpy.array([150, 80])
    with cupy.cuda.Device(1):
        given, placed = [cupy.asarray(x) for x in host], cupy.asarray(lengths)
        offset = cupy.asarray(lengths - 70)
    out = attention(*given, causal=True, kv_lengths=placed, q_offset=offset)
    with cupy.cuda.Device(1):
        options = {"causal": True, "kv_lengths": lengths, "q_offset": lengths - 70}
        _compare("arrays of another device", cupy.asnumpy(out), host, options)
    return None


def two_streams(attention: Attention, cupy: Any, rows: int = 150, busy: int = _BUSY) -> None:
    """Calls of one kind on two streams, the first of which is behind when the second one asks."""
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    made = []
    for n, stream in enumerate((first, second, first)):
        host = _tensors(rows, 200, seed=n)
        with stream:
            given = [cupy.zeros(x.shape, "float32") for x in host]
            if stream is first:
                work = cupy.zeros((busy,), "float32")
                for _ in range(200):
                    work += 1
            # A kernel on another stream would find zeros.
            for x, values in zip(given, host, strict=True):
                x += cupy.asarray(values)
            made.append((host, given, attention(*given, **_MASKED)))
    for stream in (first, second):
        stream.synchronize()
    for n, (host, _, out) in enumerate(made):
        _compare(f"call {n} on a stream", cupy.asnumpy(out), host, _MASKED)


def captured_graphs(attention: Attention, cupy: Any, rows: int = 150, keys: int = 3000) -> None:
    """Graphs that are run again on other values; what else is in memory stays as it is."""
    pool, default = cupy.cuda.MemoryPool(), cupy.get_default_memory_pool()
    _captured(attention, cupy, _tensors(rows, 200), _MASKED, default)
    decoding = _tensors(1, keys)
    _captured(attention, cupy, decoding, {"causal": True, "sinks": [0.5, 1.0, -1.0, 0.0]}, default)
    lengths = {"causal": True, "kv_lengths": cupy.asarray(numpy.array([keys - 100, 70]))}
    _captured(attention, cupy, decoding, lengths, pool)
    try:
        _captured(attention, cupy, decoding, lengths, default)
    except UnsupportedCallError as error:
        if "kv_lengths" not in str(error):
            raise
    else:
        raise AssertionError("a captured call with lengths writes to memory that it has given back")


def _captured(attention: Attention, cupy: Any, host: list[Any], options: dict[str, Any], pool: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    # What options have on the device was copied there on another stream.
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        given = [cupy.asarray(x) for x in host]
        attention(*given, **options)
        stream.synchronize()
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                out = attention(*given, **options)
            finally:
                graph = stream.end_capture()
        # They get what the captured call gave back.
        others = [cupy.zeros((1 << size,), "uint8") for size in range(9, 21) for _ in range(3)]
        for step in range(2):
            given[0] += 1
            changed = {n: cupy.asnumpy(x) if isinstance(x, cupy.ndarray) else x for n, x in options.items()}
            graph.launch()
            stream.synchronize()
            queries = [host[0] + numpy.float32(step + 1), *host[1:]]
            _compare(f"replay {step} with {', '.join(options)}", cupy.asnumpy(out), queries, changed)
            if "kv_lengths" in options:
                options["kv_lengths"] -= 3
        if any(cupy.asnumpy(x).any() for x in others):
            raise AssertionError("a replay wrote to memory of other arrays")


def torch_arrays(attention: Attention, torch: Any, device: str, stream: Any, busy: int = _BUSY) -> None:
    """Tensors of each dtype, on a stream of torch's that is behind; None is no stream."""
    host, options = _tensors(70, 200), {"causal": True}
    for dtype in _TOLERANCE:
        with torch.cuda.stream(stream):
            given = [torch.zeros(x.shape, dtype=getattr(torch, dtype), device=device) for x in host]
            work = torch.zeros(busy, device=device)
            for _ in range(200):
                work += 1
            for x, values in zip(given, host, strict=True):
                x += torch.from_numpy(values).to(device)
            out = attention(*given, **options)
        if stream is not None:
            stream.synchronize()
        if (type(out), out.dtype, out.device) != (torch.Tensor, given[0].dtype, given[0].device):
            raise AssertionError(f"{dtype}: the result is {type(out).__name__}, {out.dtype}")
        rounded = [x.double().cpu().numpy() for x in given]
        _compare(f"tensors, {dtype}", out.double().cpu().numpy(), rounded, options, dtype)


def torch_graph(attention: Attention, torch: Any) -> None:
    """A call that torch captures on the stream that has made one like it, run again on other values."""
    host, options = _tensors(1, 3000), {"causal": True}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        given = [torch.from_numpy(x).to("cuda") for x in host]
        attention(*given, **options)
    stream.synchronize()
    # CuPy's pool may ask the device for memory.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        out = attention(*given, **options)
    given[0].add_(1)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    _compare("a replay", out.cpu().numpy(), [host[0] + numpy.float32(1), *host[1:]], options)


def jax_arrays(attention: Attention, jax: Any, device: Any) -> None:
    """Arrays that nobody names any more when the kernel begins, and the reason for which jit is refused."""
    host, options = _tensors(70, 200), {"causal": True}
    results = []
    for n in range(20):
        q, k, v = (jax.device_put(x, device) for x in host)
        results.append(attention(q + n, k * 1, v + n, **options))
    for n, out in enumerate(results):
        if not isinstance(out, jax.Array) or out.devices() != {device}:
            raise AssertionError(f"the result is {type(out).__name__}, wanted an array on {device}")
        changed = [host[0] + numpy.float32(n), host[1], host[2] + numpy.float32(n)]
        _compare(f"call {n} of jax", numpy.asarray(out), changed, options)
    try:
        jax.jit(attention)(*(jax.device_put(x, device) for x in host))
    except UnsupportedCallError as error:
        if "jit" not in str(error):
            raise
    else:
        raise AssertionError("a call under jit was not refused")


def _of_cupy(part: Callable[[Attention, Any], str | None], attention: Attention) -> str | None:
    missing = LIBRARIES["cupy"].missing()
    if missing is not None:
        return missing
    import cupy

    return part(attention, cupy)


def _of_torch(attention: Attention) -> str | None:
    missing = LIBRARIES["torch-cuda"].missing()
    if missing is None:
        import torch

        torch_arrays(attention, torch, "cuda", torch.cuda.Stream())
        torch_graph(attention, torch)
    return missing


def _of_jax(attention: Attention) -> str | None:
    if find_spec("jax") is None:
        return "jax not installed"
    import jax

    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        return f"jax finds no CUDA device: {error}"
    jax_arrays(attention, jax, device)
    return None


# By title: the arrays that a part is about, and what runs it and gives the reason where it cannot.
PARTS: dict[str, tuple[str, Callable[[Attention], str | None]]] = {
    "larger sizes": ("cupy.ndarray", functools.partial(_of_cupy, larger_sizes)),
    "another device": ("cupy.ndarray", functools.partial(_of_cupy, another_device)),
    "two streams": ("cupy.ndarray", functools.partial(_of_cupy, two_streams)),
    "CUDA graphs": ("cupy.ndarray", functools.partial(_of_cupy, captured_graphs)),
    "torch on CUDA": ("torch.Tensor", _of_torch),
    "JAX on CUDA": ("jax.Array", _of_jax),
}


def main(title: str, backend: str) -> int:
    """Run a part; the exit status."""
    reason = PARTS[title][1](functools.partial(anyattn.attention, backend=backend))
    if reason is not None:
        sys.stdout.write(f"{reason}\n")
        return NOT_RUN
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
