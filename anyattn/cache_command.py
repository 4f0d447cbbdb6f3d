"""The compiled kernels that anyattn keeps for this user: list them, or remove them.

Kernels lie in the user's cache folder, or in ANYATTN_CACHE_DIR. ANYATTN_CACHE=off keeps and reads none.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyattn.kernels.cache import Entry

HELP = "list or remove compiled kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `anyattn cache`."""
    parser.add_argument("--clear", action="store_true", help="remove every kernel and source file")
    parser.add_argument("--keys", action="store_true", help="print the whole key under each kernel")


def run(arguments: argparse.Namespace) -> int:
    """List the cache, or clear it."""
    from anyattn.kernels.cache import user_store

    try:
        store = user_store()
        if store is None:
            sys.stdout.write("the kernel cache is off\n")
            return 0
        if arguments.clear:
            files, size = store.clear()
            sys.stdout.write(f"removed {files} files, {_bytes(size)}, from {store.folder}\n")
            return 0
        entries = store.entries()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"anyattn cache: {error}\n")
        return 1
    sys.stdout.writelines(f"{line}\n" for line in _listing(entries, keys=arguments.keys))
    total = sum(entry.size for entry in entries)
    kernels = sum(entry.path.suffix == ".kernel" for entry in entries)
    sys.stdout.write(
        f"{kernels} kernels and {len(entries) - kernels} source files, {_bytes(total)}, in {store.folder}\n"
    )
    return 0


def _listing(entries: list[Entry], *, keys: bool) -> list[str]:
    lines = [f"{'size':>9}  {'age':>6}  kernel"]
    for entry in entries:
        if entry.key is not None:
            what = f"{entry.key.summary} ({entry.key.digest[:8]})"
        elif entry.problem is not None:
            what = f"{entry.path.name}: not used, {entry.problem}"
        else:
            what = entry.path.name
        lines.append(f"{_bytes(entry.size):>9}  {_age(entry.age):>6}  {what}")
        if keys and entry.key is not None:
            lines += [f"    {line}" for line in entry.key.text.splitlines()]
    return lines if entries else []


def _bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.1f} kB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
