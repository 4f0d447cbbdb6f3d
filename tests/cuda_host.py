"""The kernels as programs of the host: built by g++ with the header in `host_cuda`, run under sanitizers.

A launch is a process: what a sanitizer finds, and what the header itself finds (deadlocks, lanes that meet at
different instructions), is its exit status and what it prints, with lines of the kernel's files. Results are
compared as on the interpreter, by a stand-in for a device that runs launches this way.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_runs import Interpreted
from cuda_standin import Standin, argument_bytes
from missing import missing
from ptx import Arena

__all__ = ["HostError", "Hosted", "need_sanitizers"]

HEADERS = Path(__file__).with_name("host_cuda")
SANITIZERS = {
    # A report ends the process. Memory that is not freed at its end is none of the kernel's.
    "address": ("-fsanitize=address,undefined", "-O0", "-fno-sanitize-recover=all", "-DWITH_ADDRESS"),
    "thread": ("-fsanitize=thread", "-O1", "-DWITH_THREAD"),
}
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}


class HostError(Exception):
    """What a sanitizer or the header says of a launch."""


def need_sanitizers() -> None:
    """Go on only where there is g++ with its sanitizers."""
    if shutil.which("g++") is None:
        missing("g++ is not installed")
    if broken := _broken():
        missing(broken)


@functools.cache
def _broken() -> str | None:
    for name, flags in SANITIZERS.items():
        program = _folder() / f"probe-{name}"
        made = subprocess.run(
            ["g++", "-x", "c++", flags[0], "-o", program, "-"], input=b"int main() {}", capture_output=True
        )
        if made.returncode or subprocess.run([program], capture_output=True).returncode:
            return f"g++ makes no program with {flags[0]} here"
    return None


@functools.cache
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="anyattn-host-")
    _kept.append(made)
    return Path(made.name)


_kept: list[Any] = []


class Hosted(Interpreted):
    """The backend with launches under a sanitizer, "address" (with undefined behaviour) or "thread"."""

    def __init__(self, sanitizer: str, capability: int = 80, **options: Any):
        super().__init__(capability, **options)
        self.sanitizer = sanitizer

    def make(self, capability: int, **options: Any) -> Standin:
        found = Standin(capability, **options)
        found.RawModule = functools.partial(_Module, found, self.sanitizer)
        return found


class _Module:
    def __init__(self, standin: Standin, sanitizer: str, *, code: str, options: tuple[str, ...]):
        self.standin, self.sanitizer = standin, sanitizer
        self.source = standin.change(code)

    def get_function(self, name: str) -> _Function:
        text = host_source(self.source, name, self.standin.capability)
        return _Function(self.standin, built(text, self.sanitizer), self.source)


class _Function(SimpleNamespace):
    def __init__(self, standin: Standin, program: Path, source: str):
        super().__init__(standin=standin, program=program, source=source)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        raw = [argument_bytes(x) for x in args]
        run_launch(self.program, self.standin.arena, (*grid, 1)[:2], block[0], shared_mem, raw)
        self.standin.launches.append(SimpleNamespace(source=self.source, grid=grid, block=block))


def host_source(source: str, kernel: str, capability: int) -> str:
    """C++ for g++ of what NVRTC compiles: dynamic shared memory and inline PTX are calls of the header."""
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?unsigned char (\w+)\[\];",
        r"unsigned char* const \1 = host::shared_memory();",
        source,
    )
    end = f"""
void run_kernel(const unsigned char* const* arguments) {{ host::call({kernel}, arguments); }}
bool takes(const unsigned long long* sizes, int count) {{ return host::sizes_are({kernel}, sizes, count); }}
"""
    head = f'#define __CUDA_ARCH__ {10 * capability}\n#include "instructions.h"\n'
    return head + _without_asm(source) + end


def _without_asm(source: str) -> str:
    """`asm("text" : outputs : inputs : clobbers)` becomes `host::instruction(line, "text", {...}, {...})`."""
    parts, at = [], 0
    for found in re.finditer(r"\basm\s*(?:volatile\s*)?\(", source):
        groups, end = _groups(source, found.end())
        text, outputs, inputs = [*groups, "", ""][:3]
        operands = (
            "{" + ", ".join(f"host::{how}({place})" for place in _places(group)) + "}"
            for how, group in (("written", outputs), ("read", inputs))
        )
        call = f"host::instruction(__LINE__, {text.strip()}, {', '.join(operands)})"
        # Lines of what follows stay where they were.
        lost = source.count("\n", found.start(), end) - call.count("\n")
        parts += [source[at : found.start()], call, "\n" * lost]
        at = end
    return "".join([*parts, source[at:]])


def _groups(source: str, at: int) -> tuple[list[str], int]:
    """The parts between colons of an asm statement whose parenthesis opened before `at`, and its end."""
    groups, depth = [""], 1
    for token in re.finditer(r'"(?:\\.|[^"\\])*"|//[^\n]*|[^"]', source[at:]):
        text = token[0]
        depth += {"(": 1, ")": -1}.get(text, 0)
        if depth == 0:
            return groups, at + token.end()
        if text == ":" and depth == 1:
            groups.append("")
        else:
            groups[-1] += text
    raise ValueError("an asm statement does not end")


def _places(group: str) -> list[str]:
    """The expressions of `"=f"(x), "r"(y)`."""
    found, at = [], 0
    while opened := re.compile(r'"[^"]*"\s*\(').search(group, at):
        parts, at = _groups(group, opened.end())
        found.append(":".join(parts))
    return found


@functools.cache
def built(text: str, sanitizer: str) -> Path:
    """The program of a kernel, which runs launches that files describe."""
    program = _folder() / hashlib.sha256(f"{sanitizer} {text}".encode()).hexdigest()
    source = program.with_suffix(".cpp")
    source.write_text(text)
    flags = ["-std=c++20", "-g", f"-I{HEADERS}", "-Wno-psabi", *SANITIZERS[sanitizer]]
    _compile([*flags, source, _launcher(sanitizer), "-o", program])
    return program


@functools.cache
def _launcher(sanitizer: str) -> Path:
    made = _folder() / f"launch-{sanitizer}.o"
    _compile(["-std=c++20", "-O2", SANITIZERS[sanitizer][-1], "-c", HEADERS / "launch.cpp", "-o", made])
    return made


def _compile(arguments: list[Any]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ takes no {arguments}:\n{done.stderr}")


def run_launch(
    program: Path, arena: Arena, blocks: tuple[int, int], threads: int, shared: int, arguments: list[bytes]
) -> None:
    """Run a launch on what an arena holds; HostError if the program finds something."""
    spans = arena.allocations()
    numbers = [*blocks, threads, shared, Arena.BASE, arena.top, len(arguments), *map(len, arguments)]
    numbers += [len(spans), *(x for span in spans for x in span)]
    head = struct.pack(f"{len(numbers)}Q", *numbers) + b"".join(arguments)
    # What nobody has written is no number.
    memory = np.where(arena.known[: arena.top], arena.data[: arena.top], np.uint8(0xFF))
    with tempfile.NamedTemporaryFile(dir=_folder()) as file:
        file.write(head + memory.tobytes())
        file.flush()
        environment = os.environ | ENVIRONMENT
        done = subprocess.run([program, file.name], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise HostError(done.stderr or f"exit status {done.returncode}")
        file.seek(len(head))
        arena.data[: arena.top] = np.frombuffer(file.read(), np.uint8)
    # The program does not say who wrote what.
    arena.known[: arena.top] = True
