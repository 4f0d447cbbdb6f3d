"""The conformance kit in processes of its own, alone and under compute-sanitizer, and what is beside it.

A crash of a kernel ends such a process and not the check, and what it prints goes to the report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from anyattn.registry import find

__all__ = ["Part", "device_name", "run_device", "run_kit", "run_others", "run_sanitizer", "usable_library"]

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Of pytest's output: the account at its end, and as much of what failed.
_MOST_LINES = 200


@dataclass(frozen=True)
class Part:
    """A part of a check: its title, exit status (None where it was not run), and what it printed."""

    title: str
    status: int | None
    output: str

    @property
    def failed(self) -> bool:
        """Whether something was wrong."""
        return bool(self.status)


def usable_library(backend: str, name: str | None) -> Any:
    """The kit's array library for a backend: `name`, or the first that the backend takes.

    Raises
    ------
    LookupError
        If the backend or the library cannot be used here; the message says why.
    UnknownBackendError
        If no backend has the name.
    """
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        raise LookupError("the conformance kit needs pytest and hypothesis: pip install 'anyattn[testing]'")
    from anyattn.testing.libraries import LIBRARIES

    status = find(backend, "--backend")
    if not status.available or status.backend is None:
        raise LookupError(f"{backend} is unavailable: {status.reason}")
    taken = status.backend
    if name is not None and name not in LIBRARIES:
        raise LookupError(f"--library: no library {name!r}; there are {', '.join(LIBRARIES)}")
    missing = {}
    order = {array: n for n, array in enumerate(taken.arrays)}
    for library in sorted(LIBRARIES.values(), key=lambda x: order.get(x.array_type, len(order))):
        if name not in (None, library.name):
            continue
        if not _takes(taken.arrays, library.array_type) or not _takes(taken.devices, library.device):
            continue
        why = library.missing()
        if why is None:
            return library
        missing[library.name] = why
    if not missing:
        what = "no library of the kit" if name is None else name
        raise LookupError(
            f"{backend} takes {', '.join(taken.arrays)} on {', '.join(taken.devices)}: not {what}"
        )
    reasons = dict.fromkeys(missing.values())
    raise LookupError(f"{backend} cannot be used here: {'; '.join(reasons)}")


def _takes(declared: Sequence[str], name: str) -> bool:
    return "*" in declared or name in declared


def run_kit(backend: str, library: str, families: Sequence[str]) -> Part:
    """Run all of the kit, or families of it."""
    chosen = [f"--anyattn-family={family}" for family in families] or ["--anyattn-full"]
    done = _run([*_pytest(backend, library), *chosen])
    title = "Conformance kit" + (f", {', '.join(families)}" if families else "")
    return Part(title, done.returncode, _end(done.stdout))


def run_others(backend: str, library: str) -> list[Part]:
    """Run the family `pairs` on the other libraries of CUDA arrays that the backend takes."""
    from anyattn.testing.libraries import LIBRARIES

    taken = find(backend, "--backend").backend
    parts = []
    for other in LIBRARIES.values():
        if other.device != "cuda" or other.name == library or not _takes(taken.arrays, other.array_type):
            continue
        title = f"Conformance kit on {other.name}, pairs"
        missing = other.missing()
        if missing is not None:
            parts.append(Part(title, None, missing))
            continue
        sys.stderr.write(f"the kit on {backend}, with {other.name}\n")
        done = _run([*_pytest(backend, other.name), "--anyattn-family=pairs"])
        parts.append(Part(title, done.returncode, _end(done.stdout)))
    return parts


def run_device(backend: str) -> list[Part]:
    """Run the parts of `device` that are about arrays which the backend takes."""
    from anyattn.check.device import NOT_RUN, PARTS

    taken = find(backend, "--backend").backend
    parts = []
    for title, (arrays, _) in PARTS.items():
        if arrays not in taken.arrays:
            parts.append(Part(title, None, f"{backend} takes no {arrays}"))
            continue
        sys.stderr.write(f"{title}\n")
        done = _run([sys.executable, "-m", "anyattn.check.device", title, backend])
        status = None if done.returncode == NOT_RUN else done.returncode
        parts.append(Part(title, status, _end(done.stdout)))
    return parts


def run_sanitizer(backend: str, library: str) -> list[Part]:
    """Run the families `pairs` and `long` under each tool of compute-sanitizer, where that is installed.

    Each array is an allocation of its own there: of pools the tools know the blocks that these cut up.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [Part("compute-sanitizer", None, "compute-sanitizer is not installed, or not on the path")]
    parts = []
    for tool in _TOOLS:
        sys.stderr.write(f"compute-sanitizer, {tool}\n")
        watched = [program, f"--tool={tool}", "--error-exitcode=99", "--target-processes=all"]
        kit = [*_pytest(backend, library), "-p", "anyattn.check.unpooled"]
        kit += ["--anyattn-family=pairs", "--anyattn-family=long"]
        done = _run([*watched, *kit], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        parts.append(Part(f"compute-sanitizer {tool}, pairs and long", done.returncode, _end(done.stdout)))
    return parts


def _pytest(backend: str, library: str) -> list[str]:
    kit = ["--pyargs", "anyattn.testing", f"--anyattn-backend={backend}", f"--anyattn-library={library}"]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *kit]


def _run(command: list[str], also: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    # What is printed to either stream belongs together, in the order of its lines.
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **(also or {})},
    )


def _end(output: str) -> str:
    lines = output.splitlines()
    left = len(lines) - _MOST_LINES
    return "\n".join([f"({left} lines before)", *lines[left:]] if left > 0 else lines)


def device_name(library: Any) -> str:
    """The name of the device that arrays of a library lie on."""
    if library.device != "cuda":
        return f"{library.device}, {os.cpu_count()} processors"
    if library.array_type == "torch.Tensor":
        import torch

        return str(torch.cuda.get_device_name())
    import cupy

    runtime = cupy.cuda.runtime
    found = runtime.getDeviceProperties(cupy.cuda.Device().id)
    version = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    capability = f"{found['major']}.{found['minor']}"
    return f"{found['name'].decode()}, compute capability {capability}, driver and runtime {version}"
