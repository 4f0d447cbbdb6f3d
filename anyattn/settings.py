"""What `use` and the environment set: the backend, the order, threads, strictness."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from anyattn.numbers import boolean, integer

__all__ = ["Settings", "current", "forced_backend", "signature", "use"]

ENVIRONMENT_VARIABLE = "ANYATTN_BACKEND"

# What is not in `os.environ` takes 1.5 us to be found missing, a twelfth of a small call; in the dict that
# CPython keeps below it, 0.04.
_kept = getattr(os.environ, "_data", None)
_variable = os.environ.encodekey(ENVIRONMENT_VARIABLE) if type(_kept) is dict else ENVIRONMENT_VARIABLE
_environment = _kept if type(_kept) is dict else os.environ


@dataclass(frozen=True)
class Settings:
    """Settings in force in this context; None leaves a matter to anyattn."""

    backend: str | None = None
    threads: int | None = None
    strict: bool = False
    order: tuple[str, ...] | None = None


_DEFAULT = Settings()
_current: ContextVar[Settings] = ContextVar("anyattn_settings", default=_DEFAULT)


def current() -> Settings:
    """The settings in force here."""
    return _current.get()


def forced_backend(argument: str | None) -> tuple[str, str] | None:
    """The backend that is forced and by what: the argument, then `use`, then the environment variable."""
    if argument is not None:
        if not isinstance(argument, str):
            raise TypeError(f"backend: wanted a name or None, got {type(argument).__name__} {argument!r}")
        return argument, "backend="
    if current().backend is not None:
        return str(current().backend), "anyattn.use"
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return (name, ENVIRONMENT_VARIABLE) if name else None


def signature() -> tuple[Settings | None, Any]:
    """All that steers a call, in a form that is quickly compared."""
    here = _current.get()
    return None if here is _DEFAULT else here, _environment.get(_variable)


@contextmanager
def use(
    *,
    backend: str | None = None,
    threads: int | None = None,
    strict: bool | None = None,
    order: Sequence[str] | None = None,
) -> Iterator[Settings]:
    """Settings for the calls inside a `with` block, in this thread or task only.

    Parameters
    ----------
    backend : str, optional
        This backend runs every call, or the call is an error. An argument `backend=` of a call goes first.
    threads : int, optional
        Threads that a backend may use for one call.
    strict : bool, optional
        True asks for strict masking where a call hides keys: what is NaN or infinite there reaches no result
        and no gradient. It leaves out backends without the capability `strict_masking`, and within one the
        kernels that are faster and not strict.
    order : sequence of str, optional
        Names to try in this order where no backend is forced, the only way in which a backend from outside
        anyattn is chosen by itself.

    Raises
    ------
    UnknownBackendError
        If a name is not installed.

    Examples
    --------
    >>> import anyattn as aa
    >>> with aa.use(backend="reference"):
    ...     out = aa.attention(q, k, v)
    """
    from anyattn import registry

    changes: dict[str, object] = {}
    if backend is not None:
        if not isinstance(backend, str):
            raise TypeError(f"use: backend: wanted a name, got {backend!r}")
        registry.find(backend, "use: backend")
        changes["backend"] = backend
    if threads is not None:
        changes["threads"] = integer(threads, "use: threads", least=1)
    if strict is not None:
        changes["strict"] = boolean(strict, "use: strict")
    if order is not None:
        names = isinstance(order, (list, tuple)) and order and all(isinstance(name, str) for name in order)
        if not names:
            raise TypeError(f"use: order: wanted a sequence of one or more names, got {order!r}")
        for name in order:
            registry.find(name, "use: order")
        changes["order"] = tuple(order)
    token = _current.set(replace(current(), **changes))  # type: ignore[arg-type]
    try:
        yield current()
    finally:
        _current.reset(token)
