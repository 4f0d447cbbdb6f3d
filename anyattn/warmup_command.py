"""Compile kernels of the installed backends into the user's cache, so that first calls are quick.

Each backend makes ready what calls are likely to need: its kernels for the dtypes asked for, and code for
common masks and scores. What is in the cache already is loaded and not compiled. Other masks are compiled at
their first call; `anyattn cache` lists what there is.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from anyattn.arrays import FLOAT_DTYPES

HELP = "compile kernels into the cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `anyattn warmup`."""
    parser.add_argument(
        "--dtype",
        action="append",
        choices=FLOAT_DTYPES,
        help="dtype of queries, keys and values; may be given several times (default: each)",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="backend to compile for; may be given several times (default: each that is available)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fill the cache."""
    from anyattn.kernels.cache import user_store

    try:
        store = user_store()
        if store is None:
            raise ValueError("the kernel cache is off, so nothing would be kept")
        chosen = _backends(arguments.backend)
        before = {entry.path for entry in store.entries()}
        for backend in chosen:
            _warm_up(backend, arguments.dtype or FLOAT_DTYPES)
        entries = [entry for entry in store.entries() if entry.path.suffix == ".kernel"]
    except (OSError, ValueError) as error:
        sys.stderr.write(f"anyattn warmup: {error}\n")
        return 1
    new = sum(entry.path not in before for entry in entries)
    size = sum(entry.size for entry in entries) / 1e6
    sys.stdout.write(f"{new} kernels compiled; {len(entries)}, {size:.1f} MB, lie in {store.folder}\n")
    return 0


def _backends(names: list[str] | None) -> list[Any]:
    """The backends of these names, or all that are available."""
    import anyattn
    from anyattn.registry import find

    if names is None:
        return [status.backend for status in anyattn.backends().values() if status.available]
    for name in names:
        if reason := find(name, "--backend").reason:
            raise ValueError(f"--backend: {name} is unavailable: {reason}")
    return [find(name).backend for name in names]


def _warm_up(backend: Any, dtypes: tuple[str, ...] | list[str]) -> None:
    """Let a backend compile, and print what it did."""
    total, count = 0.0, 0
    # A duck type may do without.
    ready = getattr(backend, "warm_up", None)
    for name, seconds in () if ready is None else ready([x for x in dtypes if x in backend.dtypes]):
        sys.stdout.write(f"{backend.name:<12}{seconds:7.2f} s  {name}\n")
        sys.stdout.flush()
        total, count = total + seconds, count + 1
    if not count:
        sys.stdout.write(f"{backend.name:<12} has nothing to compile\n")
    else:
        sys.stdout.write(f"{backend.name:<12}{total:7.2f} s  in all\n")
