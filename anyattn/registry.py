"""Which backends there are: `reference`, and what installed distributions offer as `anyattn.backends`.

Entry points are listed at the first call, not at import (25 to 40 ms), and each is loaded when somebody asks
for its backend. A plugin that is broken, ill-named or there twice is reported as unavailable with its
reason and disturbs nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from anyattn.backend import CAPABILITIES
from anyattn.errors import UnknownBackendError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "Backends", "Status", "backends", "find", "generation", "names", "refresh"]

GROUP = "anyattn.backends"
_OWN = ("numba", "cupy", "torch")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used.

    Attributes
    ----------
    name : str
    backend : Backend or None
        None where it is not available.
    reason : str or None
        Why it is not available.
    version : str or None
        Version of the distribution that offers it.
    """

    name: str
    backend: Any
    reason: str | None
    version: str | None

    @property
    def available(self) -> bool:
        return self.reason is None


class Backends(Mapping[str, Status]):
    """Name -> `Status` of every backend that is installed; prints as a table."""

    def __init__(self, statuses: dict[str, Status]):
        self._statuses = statuses

    def __getitem__(self, name: str) -> Status:
        return self._statuses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statuses)

    def __len__(self) -> int:
        return len(self._statuses)

    def __repr__(self) -> str:
        width = max(map(len, self._statuses))
        lines = []
        for s in self._statuses.values():
            state = f"available {s.version or ''}".rstrip() if s.available else f"unavailable: {s.reason}"
            lines.append(f"{s.name:<{width}}  {state}")
        return "\n".join(lines)


def backends() -> Backends:
    """All installed backends with their state; loads every plugin.

    Returns
    -------
    Backends
        A mapping from name to `Status`.
    """
    return Backends({name: _status(name) for name in _offers()})


def find(name: str, source: str = "backend") -> Status:
    """The state of the backend called `name`, which `source` asks for; loads no other.

    Raises
    ------
    UnknownBackendError
        If no installed backend has that name; the message lists those that do.
    """
    if name not in _offers():
        import difflib

        near = difflib.get_close_matches(name, _offers(), n=2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownBackendError(
            f"{source}: {name!r} is not installed; there are {', '.join(_offers())}{hint}"
        )
    return _status(name)


def names() -> tuple[str, ...]:
    """Names of all installed backends; loads none."""
    return tuple(_offers())


def refresh() -> None:
    """Forget what was discovered, so that distributions installed since are seen."""
    global _generation
    _offers.cache_clear()
    _status.cache_clear()
    _generation = object()


_generation = object()


def generation() -> object:
    """Stands for what was discovered; another object after `refresh`."""
    return _generation


@lru_cache(maxsize=1)
def _offers() -> dict[str, list[EntryPoint]]:
    """Every name that is offered, with the entry points that offer it; `reference` and our own first."""
    from importlib.metadata import entry_points

    offers: dict[str, list[EntryPoint]] = {"reference": []}
    found = entry_points(group=GROUP)
    for point in sorted(
        found, key=lambda p: (_OWN.index(p.name) if p.name in _OWN else len(_OWN), p.name, p.value)
    ):
        name = point.name
        if name == "reference" or (name in _OWN and not point.value.startswith(f"anyattn_{name}:")):
            name = f"{name} of {_distribution(point)}"
        same = offers.setdefault(name, [])
        if all(
            point.value != other.value for other in same
        ):  # a stale copy of a distribution lists the same twice
            same.append(point)
    return offers


@cache
def _status(name: str) -> Status:
    if name == "reference":
        from anyattn import __version__
        from anyattn.reference import backend

        return Status(name, backend, None, __version__)
    points = _offers()[name]
    version = points[0].dist.version if points[0].dist else None
    if not _NAME.fullmatch(name):
        taken = name.partition(" of ")[0] in ("reference", *_OWN)
        reason = "the name is taken by anyattn" if taken else f"ill-named: wanted a name like {_NAME.pattern}"
        return Status(name, None, reason, version)
    if len(points) > 1:
        who = " and ".join(f"{_distribution(p)} ({p.value})" for p in points)
        return Status(name, None, f"offered twice, by {who}; uninstall one", version)
    try:
        backend = points[0].load()
        flaw = _flaw(name, backend)
    # A plugin's code may raise anything, or exit; it is reported and must not stop other backends.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return Status(
            name, None, f"{points[0].value} does not load: {type(error).__name__}: {error}", version
        )
    if flaw:
        return Status(name, None, f"{points[0].value} is no backend: {flaw}", version)
    missing = [module for module in backend.requires if not _is_installed(module)]
    if missing:
        wanted = f"'anyattn[{backend.extra}]'" if backend.extra else " ".join(missing)
        return Status(name, None, f"pip install {wanted}", version)
    return Status(name, backend, None, version)


def _is_installed(module: str) -> bool:
    """Whether a module can be found; of a dotted name, the parents are imported."""
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent of a dotted name is missing; a module without a spec
        return False


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def _flaw(name: str, backend: Any) -> str | None:
    """What keeps an object from being a backend."""
    for attribute in (
        "name",
        "arrays",
        "dtypes",
        "devices",
        "capabilities",
        "requires",
        "extra",
        "unsupported",
        "run",
        "notes",
    ):
        if not hasattr(backend, attribute):
            return f"it has no attribute {attribute!r}"
    if isinstance(backend, type):
        return f"it is the class {backend.__name__}; wanted an instance"
    if backend.name != name:
        return f"it calls itself {backend.name!r}"
    for attribute in ("arrays", "dtypes", "devices", "capabilities", "requires"):
        value = getattr(backend, attribute)
        strings = isinstance(value, Collection) and all(isinstance(entry, str) and entry for entry in value)
        if isinstance(value, str) or not strings:
            return f"{attribute} is {value!r}; wanted a collection of strings"
    unknown = sorted(set(backend.capabilities) - set(CAPABILITIES))
    if unknown:
        return f"it declares capabilities that do not exist: {', '.join(unknown)}"
    return None
