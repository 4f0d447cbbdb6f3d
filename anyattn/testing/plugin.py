"""The pytest plugin, loaded by its entry point at every start of pytest where anyattn is installed.

It adds the options, keeps an account of the conformance cases, prints it at the end and fails the session
where a backend declares a capability that no case ran. So that a pytest run of something else pays nothing
for it, neither NumPy nor an array library is imported here, nor anything of anyattn but this package's empty
front.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

PROPERTY = "anyattn_case"
"""Name of the user property in which a conformance test notes its library and what its case needs."""
SELDOM = frozenset({"every mask in caches"})
"""Families that run where their name or `--anyattn-full` asks for them: each case compiles a kernel."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, all named `--anyattn-...`."""
    group = parser.getgroup("anyattn", "conformance of attention backends (pytest --pyargs anyattn.testing)")
    group.addoption(
        "--anyattn-backend",
        metavar="NAME",
        default="reference",
        help="the backend that is held to the cases, by the name of its entry point (default: reference)",
    )
    group.addoption(
        "--anyattn-library",
        metavar="NAME",
        action="append",
        default=None,
        help="array library, or variant of one, to run the cases on; may be given again. Default: numpy "
        "where the backend takes it, else the first that it takes. An unknown name lists all",
    )
    group.addoption(
        "--anyattn-family",
        metavar="NAME",
        action="append",
        default=None,
        help="run the cases of this family alone, such as 'pairs' (calls in which every value of an option "
        "meets every value of every other); may be given again. An unknown name lists all",
    )
    group.addoption(
        "--anyattn-full",
        action="store_true",
        help=f"run these families too, which take long on a backend that compiles: {', '.join(SELDOM)}",
    )
    group.addoption(
        "--anyattn-examples",
        metavar="N",
        type=int,
        default=None,
        help="draw so many calls for a library at most, for a backend that compiles code for each",
    )


@dataclass
class Account:
    """What happened to the conformance cases of a session."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Library to outcome to number of cases."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(library, reason) of skips."""
    passed: set[str] = field(default_factory=set)
    """Capabilities that some passing case needed."""
    possible: set[str] = field(default_factory=set)
    """Capabilities that some case needed for which the library has all it takes."""
    partial: bool = False
    """Whether cases were deselected, so that a capability may be missing for that reason."""
    failures: list[str] = field(default_factory=list)


ACCOUNT = pytest.StashKey[Account]()


def pytest_configure(config: pytest.Config) -> None:
    """Open the account."""
    config.addinivalue_line("markers", "anyattn_cases(make_cases): run on each conformance case and library")
    config.stash[ACCOUNT] = Account()
    config.pluginmanager.register(_Bookkeeper(config), "anyattn-bookkeeper")


class _Bookkeeper:
    """Hooks that need the session's account."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.account = config.stash[ACCOUNT]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = config.getoption("anyattn_family")
        if wanted is None:
            if not config.getoption("anyattn_full"):
                items[:] = [item for item in items if _family(item) not in SELDOM]
            return
        families = {item.nodeid: _family(item) for item in items}
        known = sorted({family for family in families.values() if family is not None})
        if unknown := sorted(set(wanted) - set(known)):
            raise pytest.UsageError(
                f"--anyattn-family: no family {unknown[0]!r}; there are: {', '.join(known)}"
            )
        left = [item for item in items if families[item.nodeid] not in wanted]
        items[:] = [item for item in items if families[item.nodeid] in wanted]
        config.hook.pytest_deselected(items=left)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.account.partial = self.account.partial or any(_is_conformance(item.nodeid) for item in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        noted: Any = dict(report.user_properties).get(PROPERTY)
        if noted is None or not (report.when == "call" or report.outcome == "skipped"):
            return
        self.account.outcomes[noted["library"]][report.outcome] += 1
        if report.outcome == "skipped":
            self.account.reasons[noted["library"], noted["reason"]] += 1
        if noted["skipped_by"] != "library":
            self.account.possible.update(noted["needs"])
        if report.outcome == "passed":
            self.account.passed.update(noted["needs"])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput") or not self.account.outcomes:
            return
        if self.account.partial or session.shouldfail or self._selects():
            return
        backend = _backend(self.config)
        unproven = sorted((backend.capabilities & self.account.possible) - self.account.passed)
        if unproven:
            self.account.failures.append(
                f"{backend.name} declares {', '.join(unproven)}, and no case that needs it passed"
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _selects(self) -> bool:
        """Whether options choose among the tests; under xdist only workers hear what was deselected."""
        options = self.config.option
        chosen = [
            getattr(options, name, None)
            for name in ("keyword", "markexpr", "deselect", "lf", "anyattn_family")
        ]
        return any(chosen) or any("::" in argument for argument in self.config.args)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.account.outcomes:
            return
        terminalreporter.section(f"anyattn conformance of {self.config.getoption('anyattn_backend')}")
        for library, outcomes in self.account.outcomes.items():
            counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
            terminalreporter.line(f"{library}: {counts}")
            for (of, reason), number in sorted(self.account.reasons.items()):
                if of == library:
                    terminalreporter.line(f"    {number} skipped: {reason}")
        for failure in self.account.failures:
            terminalreporter.line(f"FAILED {failure}", red=True)


def _is_conformance(nodeid: str) -> bool:
    return "test_conformance.py" in nodeid


def _family(item: pytest.Item) -> str | None:
    """The family of a conformance test's case."""
    run = getattr(getattr(item, "callspec", None), "params", {}).get("anyattn_run")
    return None if run is None else str(run.case.family)


def _backend(config: pytest.Config) -> Any:
    """The backend object under test; a usage error if there is none."""
    import anyattn

    name = config.getoption("anyattn_backend")
    known = anyattn.backends()
    if name not in known:
        raise pytest.UsageError(f"--anyattn-backend: no backend {name!r}; installed: {', '.join(known)}")
    status = known[name]
    if not status.available:
        raise pytest.UsageError(f"--anyattn-backend: {name} is unavailable: {status.reason}")
    return status.backend


def _libraries(config: pytest.Config, backend: Any) -> list[Any]:
    """The library variants to run on; a usage error for an unknown name or one that is not installed."""
    from anyattn.testing.libraries import LIBRARIES

    names = config.getoption("anyattn_library")
    if names is None:
        for library in LIBRARIES.values():
            taken = "*" in backend.arrays or library.array_type in backend.arrays
            if taken and library.missing() is None:
                return [library]
        raise pytest.UsageError(
            f"{backend.name} takes {', '.join(backend.arrays)}, and none of these is installed"
        )
    for name in names:
        if name not in LIBRARIES:
            raise pytest.UsageError(
                f"--anyattn-library: no library {name!r}; there are: {', '.join(LIBRARIES)}"
            )
        absent = LIBRARIES[name].missing()
        if absent is not None:
            raise pytest.UsageError(f"--anyattn-library: {name}: {absent}")
    return [LIBRARIES[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Run:
    """A case on a library with the backend under test."""

    case: Any
    library: Any
    backend: Any

    @property
    def id(self) -> str:
        """How pytest shows it."""
        return f"{self.library.name}: {self.case.name}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the conformance tests their cases, once for each library."""
    marker = metafunc.definition.get_closest_marker("anyattn_cases")
    if marker is None:
        return
    backend = _backend(metafunc.config)
    (make_cases,) = marker.args
    runs = [
        Run(case, library, backend)
        for library in _libraries(metafunc.config, backend)
        for case in make_cases()
    ]
    metafunc.parametrize("anyattn_run", runs, ids=[run.id for run in runs], indirect=True)


@pytest.fixture
def anyattn_run(request: pytest.FixtureRequest) -> Run:
    """A case to run, or a skip where declarations say that library or backend lack what it needs.

    Also where another variant of the session makes the same operations.
    """
    from anyattn.testing.running import run_instead, skip_reason

    run: Run = request.param
    missing = skip_reason(run.case, run.backend, run.library)
    chosen = request.config.getoption("anyattn_library") or ()
    if missing is None and (sentence := run_instead(run.case, run.backend, run.library, chosen)):
        missing = "library", sentence
    noted = {
        "library": run.library.name,
        "needs": sorted(run.library.needs(run.case)),
        "skipped_by": missing and missing[0],
        "reason": missing and missing[1],
    }
    request.node.user_properties.append((PROPERTY, noted))
    if missing is not None:
        pytest.skip(missing[1])
    return run
