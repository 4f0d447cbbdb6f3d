"""Workloads of `anyattn check`, and how long a backend and torch take for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy

from anyattn.arrays import Array

__all__ = ["WORKLOADS", "Timing", "Workload", "measure"]

_MOST_CALLS = 1000
# Results beyond are wrong whatever the order of sums: of some thousand keys they are about 0.02.
_MOST_DIFFERENCE = {"float32": 1e-4, "float16": 5e-3}


@dataclass(frozen=True)
class Workload:
    """Sizes and options of a call of `attention`."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    dtype: str
    causal: bool = False
    window: int | None = None
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        """The keywords of the call."""
        window = None if self.window is None else (self.window, 0)
        return {"causal": self.causal, "window": window, "softcap": self.softcap}


WORKLOADS = {
    "tiny": Workload(1, 12, 12, 16, 16, 32, "float32"),
    "bert": Workload(8, 12, 12, 512, 512, 64, "float32"),
    "bert16": Workload(8, 12, 12, 512, 512, 64, "float16"),
    "prefill": Workload(1, 32, 8, 2048, 2048, 128, "float32", causal=True),
    "prefill16": Workload(1, 32, 8, 2048, 2048, 128, "float16", causal=True),
    "decode": Workload(8, 32, 8, 1, 8192, 128, "float32"),
    "decode16": Workload(8, 32, 8, 1, 8192, 128, "float16"),
    "softcap": Workload(1, 16, 16, 2048, 2048, 64, "float32", causal=True, softcap=30.0),
    "window": Workload(1, 8, 8, 4096, 4096, 64, "float32", causal=True, window=512),
}


@dataclass(frozen=True)
class Timing:
    """Medians of a workload in milliseconds, and the largest difference of results; None for what is not."""

    workload: str
    own: float | None
    torch: float | None
    difference: float | None
    problem: str | None = None

    def row(self) -> str:
        """A row of the report."""
        if self.problem is not None:
            return f"| {self.workload} | {self.problem} | | | |"
        ratio = None if self.own is None or self.torch is None else self.torch / self.own
        numbers = ((self.own, ".3f"), (self.torch, ".3f"), (ratio, ".2f"), (self.difference, ".1e"))
        cells = ["–" if x is None else format(x, form) for x, form in numbers]
        return f"| {self.workload} | {' | '.join(cells)} |"


def measure(name: str, backend: str, library: Any, seconds: float) -> Timing:
    """Time a workload on a backend, with arrays of a library of the kit, and on torch if it is installed."""
    import anyattn
    from anyattn.testing.case import Value

    workload = WORKLOADS[name]
    shapes = [(workload.heads, workload.q_len), *[(workload.kv_heads, workload.k_len)] * 2]
    rng = numpy.random.default_rng(7)
    host = [
        rng.standard_normal((workload.batch, *shape, workload.dim), numpy.float32).astype(workload.dtype)
        for shape in shapes
    ]
    q, k, v = (library.array(Value(x, workload.dtype)) for x in host)

    def call() -> Array:
        return anyattn.attention(q, k, v, **workload.options(), backend=backend)

    try:
        out = library.numpy(call())
        own = _milliseconds(call, _wait(library), seconds)
    # A check reports what goes wrong, whatever it is, and goes on with the next workload.
    except Exception as error:  # noqa: BLE001
        return Timing(name, None, None, None, _said(error))
    try:
        peer = _torch(workload, host, library.device)
        if peer is None:
            wanted = _first_heads(workload, host)
            out, by = out[:1, : wanted.shape[1]], "the reference"
        else:
            wanted, by = peer[0]().float().cpu().numpy(), "torch"
        difference = float(numpy.abs(out.astype("float32") - wanted).max())
    except Exception as error:  # noqa: BLE001
        return Timing(name, own, None, None, f"to compare with: {_said(error)}")
    if not difference <= _MOST_DIFFERENCE[workload.dtype]:
        return Timing(name, own, None, difference, f"differs from {by} by {difference:.1e}")
    return Timing(name, own, None if peer is None else _milliseconds(*peer, seconds), difference)


def _first_heads(workload: Workload, host: list[Array]) -> Array:
    """What the reference makes of the first batch entry and key/value head: all would take it long."""
    import anyattn

    heads = workload.heads // workload.kv_heads, 1, 1
    first = [x[:1, :count].astype("float32") for x, count in zip(host, heads, strict=True)]
    return anyattn.attention(*first, **workload.options(), backend="reference")


def _said(error: Exception) -> str:
    """An error in one line, which has a place in a table."""
    first = str(error).partition("\n")[0].replace("|", r"\|")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _milliseconds(call: Callable[[], Any], wait: Callable[[], None], seconds: float) -> float:
    """The median of calls after the first, each waited for."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or (time.perf_counter() < end and len(taken) < _MOST_CALLS):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        taken.append(1e3 * (time.perf_counter() - begin))
    return median(taken)


def _wait(library: Any) -> Callable[[], None]:
    """What returns when all calls on arrays of a library have run."""
    if library.array_type == "cupy.ndarray":
        import cupy

        return lambda: cupy.cuda.get_current_stream().synchronize()
    if library.array_type == "torch.Tensor" and library.device == "cuda":
        import torch

        return lambda: torch.cuda.synchronize()
    return lambda: None


def _torch(
    workload: Workload, host: list[Array], device: str
) -> tuple[Callable[[], Any], Callable[[], None]] | None:
    """The workload on torch's SDPA and a way to wait, or None where torch has none for it on the device."""
    if find_spec("torch") is None or workload.softcap is not None or device not in ("cpu", "cuda"):
        return None
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return None
    q, k, v = (torch.from_numpy(x).to(device) for x in host)
    mask = None
    if workload.window is not None:
        i, j = (
            torch.arange(workload.q_len, device=device)[:, None],
            torch.arange(workload.k_len, device=device),
        )
        mask = (j <= i) & (i - j <= workload.window)
    options = {"attn_mask": mask, "is_causal": workload.causal and mask is None}
    grouped = {"enable_gqa": True} if workload.heads != workload.kv_heads else {}

    def call() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options, **grouped)

    return call, torch.cuda.synchronize if device == "cuda" else lambda: None
