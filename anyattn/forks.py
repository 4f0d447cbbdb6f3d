"""Locks that a forked child finds free.

A fork copies a lock that another thread holds, and not the thread: the child would wait for it for ever. So
the thread that forks holds the lock itself while it does.
"""

from __future__ import annotations

import os
from typing import Protocol, TypeVar

__all__ = ["held_over_forks"]


class _Lock(Protocol):
    def acquire(self) -> object: ...

    def release(self) -> None: ...


_AnyLock = TypeVar("_AnyLock", bound=_Lock)


def held_over_forks(lock: _AnyLock) -> _AnyLock:
    """`lock`, free in a forked child whoever held it before.

    Of two locks of which one is taken while the other is held, the inner one must be handed in first: the
    thread that forks takes them in the order opposite to that of these calls.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
