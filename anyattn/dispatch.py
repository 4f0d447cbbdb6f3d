"""From the description of a call to the backend that runs it.

A forced backend (`backend=`, then `use`, then ANYATTN_BACKEND) runs or the call fails with its reasons.
Otherwise the first in the order for the arrays of the call that accepts it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyattn import registry, settings
from anyattn.errors import UnsupportedCallError

if TYPE_CHECKING:
    from anyattn.call import AttentionCall
    from anyattn.linear.call import LinearCall

__all__ = ["Record", "Verdict", "check_pair", "consider", "order_for", "record", "recording", "run", "run_on"]


@dataclass(frozen=True)
class Record:
    """One dispatched call: which backend ran what."""

    backend: str
    operation: str
    features: frozenset[str]


@dataclass(frozen=True)
class Verdict:
    """What a backend says to a call: no reason is yes."""

    name: str
    backend: Any
    reasons: tuple[str, ...]


_recorders: ContextVar[tuple[list[Record], ...]] = ContextVar("anyattn_recorders", default=())


@contextmanager
def recording() -> Iterator[list[Record]]:
    """Collect a `Record` of every call that is dispatched inside the `with` block.

    Under `jax.jit` that is when the function is traced, not when it runs.
    """
    records: list[Record] = []
    token = _recorders.set((*_recorders.get(), records))
    try:
        yield records
    finally:
        _recorders.reset(token)


def order_for(call: AttentionCall | LinearCall) -> tuple[str, ...]:
    """The backends that are tried for a call where none is forced."""
    chosen = settings.current().order
    if chosen is not None:
        return chosen
    if call.library == "cupy":
        return ("cupy", "reference")
    if call.library == "torch":
        plain = call.device_kind == "cpu" and not call.features & {"gradients", "traced"}
        return ("numba", "torch", "reference") if plain else ("torch", "reference")
    if call.device_kind == "cpu" and "traced" not in call.features:
        return ("numba", "reference")
    return ("reference",)


def consider(name: str, call: AttentionCall | LinearCall, source: str | None = None) -> Verdict:
    """What the backend called `name` says to a call.

    Where somebody asks for it by name, through `source`, it must be installed; in an order it may be missing.
    """
    if source is None and name not in registry.names():
        return Verdict(name, None, ("is not installed",))
    status = registry.find(name, source or "order")
    if not status.available:
        return Verdict(name, None, (f"unavailable: {status.reason}",))
    reasons = _reasons(status.backend, call)
    if (
        settings.current().strict
        and call.visible is not None
        and "strict_masking" not in status.backend.capabilities
    ):
        reasons += ("is not strict about hidden keys, which use(strict=True) asks for",)
    return Verdict(name, status.backend, reasons)


def _reasons(backend: Any, call: AttentionCall | LinearCall) -> tuple[str, ...]:
    """The backend's reasons, or the reason that it cannot tell."""
    try:
        reasons = backend.unsupported(call)
    # A plugin that fails while it is asked must not stop a call that another backend runs.
    except Exception as error:  # noqa: BLE001
        return (f"its unsupported() raised {type(error).__name__}: {error}",)
    if not isinstance(reasons, tuple) or not all(isinstance(reason, str) for reason in reasons):
        return (f"its unsupported() gave {reasons!r} instead of a tuple of sentences",)
    return reasons


def notes(backend: Any, call: AttentionCall | LinearCall) -> tuple[str, ...]:
    """What the backend says of how it would run a call, or that it cannot tell."""
    try:
        return tuple(map(str, backend.notes(call)))
    # As above: what a plugin fails at is told, not raised.
    except Exception as error:  # noqa: BLE001
        return (f"its notes() raised {type(error).__name__}: {error}",)


def choose(call: AttentionCall | LinearCall, backend: str | None) -> Any:
    """The backend that runs a call."""
    forced = settings.forced_backend(backend)
    if forced is not None:
        name, source = forced
        verdict = consider(name, call, source.removesuffix("="))
        if not verdict.reasons:
            return verdict.backend
        raise UnsupportedCallError(
            f"backend {name!r} (from {source}) does not take this call: {'; '.join(verdict.reasons)}",
            {name: verdict.reasons},
        )
    refusals: dict[str, tuple[str, ...]] = {}
    for name in order_for(call):
        verdict = consider(name, call)
        if not verdict.reasons:
            return verdict.backend
        refusals[name] = verdict.reasons
    lines = "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items())
    raise UnsupportedCallError(f"no backend takes this call {call!r}:{lines}", refusals)


def record(one: Record) -> None:
    """Show a call to whoever is recording."""
    for records in _recorders.get():
        records.append(one)


def run(call: AttentionCall | LinearCall, backend: str | None) -> Any:
    """Run a call on the backend that is chosen for it."""
    return run_on(choose(call, backend), call)


def run_on(chosen: Any, call: AttentionCall | LinearCall) -> Any:
    """Run a call on a backend that takes it."""
    record(Record(chosen.name, call.operation, call.features))
    result = chosen.run(call)
    if call.operation == "attention":
        check_pair(chosen, result)
    return result


def check_pair(chosen: Any, result: Any) -> None:
    """Raise unless a backend gave what "attention" is to give."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"backend {chosen.name!r} gave {type(result).__name__}; wanted a pair (out, lse)")
