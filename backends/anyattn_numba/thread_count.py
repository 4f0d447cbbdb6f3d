"""How many threads a call may use.

The first of these that says something:

1. `anyattn.use(threads=)`, exactly that many;
2. the smaller of threadpoolctl's limit in this thread or task, and what the process has:
   `ANYATTN_NUM_THREADS`, else `OMP_NUM_THREADS` (which job systems and worker pools set for all libraries),
   else its usable CPUs: those of its affinity, no more than the quota of its control groups. An
   `OMP_NUM_THREADS` that is no number is OpenMP's matter and counts as none.

What the process has is found once, and again in a forked child, for which affinity is often set.

threadpoolctl controls shared libraries, which it finds by the names of their files. The threads here are of
no library, so its controller goes by llvmlite's, without which there is no kernel. It knows this controller
from the moment when this module is imported, at the first kernel: a limit that was set before is not seen.
"""

from __future__ import annotations

import math
import os
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anyattn.numbers import integer
from anyattn.settings import current

__all__ = ["thread_count", "usable_cpus"]

_limit: ContextVar[int | None] = ContextVar("anyattn_numba_thread_limit", default=None)


def thread_count() -> int:
    """Threads that a call may use here."""
    wanted = current().threads
    if wanted is not None:
        return wanted
    limit = _limit.get()
    return process_threads() if limit is None else min(limit, process_threads())


@lru_cache(1)
def process_threads() -> int:
    """Threads that the environment gives to this process.

    Raises
    ------
    ValueError
        If ANYATTN_NUM_THREADS holds something else than a number of threads.
    """
    own = os.environ.get("ANYATTN_NUM_THREADS", "").strip()
    if own:
        number = _positive(own)
        if number is None:
            raise ValueError(f"ANYATTN_NUM_THREADS: wanted a number of threads, 1 or more; got {own!r}")
        return number
    # One number for each level of nested regions.
    return _positive(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]) or usable_cpus()


def _positive(text: str) -> int | None:
    text = text.strip()
    return int(text) or None if text.isascii() and text.isdecimal() else None


def usable_cpus(groups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process may keep busy."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    quota = _quota(groups, process)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _quota(groups: Path, process: Path) -> float | None:
    """CPUs that control groups allow: the least of the process's group and those above it."""
    try:
        lines = process.read_text().splitlines()
    except OSError:  # not Linux, or no /proc
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has one tree and no names; version 1 a tree for `cpu`, perhaps with others.
        tree = groups / controllers if controllers else groups
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            quota = _group_quota(tree.joinpath(*parts[:depth]), version_1=bool(controllers))
            if quota is not None:
                found.append(quota)
    return min(found, default=None)


def _group_quota(group: Path, *, version_1: bool) -> float | None:
    try:
        if version_1:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        else:
            quota, period = (group / "cpu.max").read_text().split()
    except OSError:  # a container sees its own group as the root, under another path
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _register() -> None:
    """Let threadpoolctl set the limit, where it is installed."""
    if find_spec("threadpoolctl") is None:
        return
    import threadpoolctl

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]  # it has no types
        """Of the threads that anyattn's compiled CPU kernels use."""

        user_api = "anyattn"
        internal_api = "anyattn"
        filename_prefixes = ("libllvmlite", "llvmlite")
        check_symbols = ("LLVMPY_GetVersionInfo",)

        def get_num_threads(self) -> int:
            limit = _limit.get()
            return process_threads() if limit is None else limit

        def set_num_threads(self, num_threads: Any) -> None:
            count = integer(num_threads, "threadpoolctl: num_threads", least=1)
            # A limit that ends is set back to what there was, which a forked child shall count anew.
            _limit.set(None if count == process_threads() else count)

        def get_version(self) -> str:
            from anyattn import __version__

            return __version__

    threadpoolctl.register(Controller)


_register()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process_threads.cache_clear)
