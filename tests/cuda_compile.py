"""NVRTC through the bindings that CuPy brings: source to PTX and machine code, and what the latter needs.

Compiling takes more than half of the time of most tests. Where ANYATTN_CACHE_DIR is set, what came of it is
kept there, and found by other processes and later runs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from missing import missing

__all__ = ["ADDED", "Compiled", "Resources", "compiled", "need_nvrtc"]


# What CuPy adds to the options of a `RawModule`.
ADDED = ("-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes of static shared memory, bytes spilled."""

    registers: int
    shared_memory: int
    spilled: int


@dataclass(frozen=True)
class Compiled:
    """PTX of a source, and by kernel what its machine code needs (no machine code for `compute_`)."""

    ptx: str
    machine_code: bytes
    resources: dict[str, Resources]


def need_nvrtc() -> None:
    """Go on only where there is NVRTC."""
    if find_spec("cupy") is None:
        missing("cupy, which brings NVRTC's bindings, is not installed")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except (OSError, RuntimeError, ImportError) as error:
        missing(f"NVRTC is not installed: {error}")


@functools.cache
def compiled(source: str, architecture: str, options: tuple[str, ...] = ("-std=c++17",)) -> Compiled:
    """Compile for `compute_80` (PTX alone) or `sm_80` (machine code too)."""
    from cupy.cuda import nvrtc

    flags = (f"-arch={architecture}", "-lineinfo", "--ptxas-options=-v", *options, *ADDED)
    folder = os.environ.get("ANYATTN_CACHE_DIR")
    if folder is None:
        return _compile(source, flags)
    key = hashlib.sha256(repr((nvrtc.getVersion(), flags, source)).encode()).hexdigest()
    kept = Path(folder) / "nvrtc" / key
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    found = _compile(source, flags)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(pickle.dumps(found))
    # Others that compile the same write the same.
    Path(file.name).replace(kept)
    return found


def _compile(source: str, flags: tuple[str, ...]) -> Compiled:
    from cupy.cuda import nvrtc

    unit = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(unit, flags)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{error}\n{nvrtc.getProgramLog(unit)}") from None
        real = flags[0].startswith("-arch=sm_")
        log = nvrtc.getProgramLog(unit)
        code = nvrtc.getCUBIN(unit) if real else b""
        ptx = nvrtc.getPTX(unit)
        return Compiled(
            ptx.decode() if isinstance(ptx, bytes) else ptx, code, _resources(log) if real else {}
        )
    finally:
        nvrtc.destroyProgram(unit)


_LOG = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers([^\n]*)",
    re.S,
)


def _resources(log: str) -> dict[str, Resources]:
    found = {}
    for name, stores, loads, registers, rest in _LOG.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(int(registers), int(shared[1]) if shared else 0, max(int(stores), int(loads)))
    return found
