"""Hold a backend to the conformance kit on this machine, time it, and write one report.

Runs the kit on an array library that the backend takes. On a CUDA device it also runs part of the kit on
others, calls on two streams, CUDA graphs, arrays of torch and JAX where they are installed, and part of the
kit under compute-sanitizer where that is. Then it times a few workloads, beside torch's
scaled_dot_product_attention where torch is installed. Exit status 0: all is right; 1: something is not, the
report says what; 2: the backend cannot be used here, said in one line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyattn.check.kit import Part

HELP = "hold a backend to the conformance kit on this machine, and time it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `anyattn check`."""
    parser.add_argument("--backend", required=True, metavar="NAME", help="the backend to check, such as cupy")
    parser.add_argument(
        "--library",
        metavar="NAME",
        help="the array library to check it on (default: the first that it takes)",
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        action="append",
        default=[],
        help="run this family of cases alone, such as 'pairs'; may be given again",
    )
    parser.add_argument(
        "--workload",
        metavar="NAME",
        action="append",
        help="time this workload alone; may be given again, and 'none' times nothing",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each timing (default: 2)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="where to write (default: anyattn-check-NAME.md)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, write the report, and say in a line how it went."""
    from anyattn.check.kit import run_device, run_kit, run_others, run_sanitizer, usable_library
    from anyattn.check.timing import WORKLOADS, Timing, measure
    from anyattn.errors import UnknownBackendError

    name = arguments.backend
    try:
        library = usable_library(name, arguments.library)
    except (LookupError, UnknownBackendError) as error:
        sys.stderr.write(f"anyattn check: {error}\n")
        return 2
    wanted = WORKLOADS if arguments.workload is None else arguments.workload
    if unknown := sorted(set(wanted) - {*WORKLOADS, "none"}):
        sys.stderr.write(
            f"anyattn check: no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}, none\n"
        )
        return 2

    sys.stderr.write(f"the kit on {name}, with {library.name}\n")
    parts = [run_kit(name, library.name, arguments.family)]
    if library.device == "cuda":
        parts += run_others(name, library.name) + run_device(name) + run_sanitizer(name, library.name)
    timings: list[Timing] = []
    for workload in wanted:
        if workload != "none":
            sys.stderr.write(f"timing {workload}\n")
            timings.append(measure(workload, name, library, arguments.seconds))

    report = arguments.report or Path(f"anyattn-check-{name}.md")
    report.write_text(_report(name, library, parts, timings), encoding="utf-8")
    failed = [part.title for part in parts if part.failed]
    failed += [f"workload {one.workload}" for one in timings if one.problem]
    sys.stdout.write(
        f"{name}: {'failed: ' + ', '.join(failed) if failed else 'all is right'}; see {report}\n"
    )
    return 1 if failed else 0


def _report(name: str, library: Any, parts: list[Part], timings: list[Any]) -> str:
    from anyattn.check.kit import device_name
    from anyattn.info import gather

    found = gather()
    lines = [
        f"# anyattn {found['anyattn']}, backend {name}",
        "",
        f"- Python {found['python']}, {found['platform']}",
        f"- device: {device_name(library)}",
        f"- arrays: {library.name}; installed: "
        + ", ".join(f"{x} {version}" for x, version in found["array_libraries"].items()),
        "",
    ]
    for part in parts:
        state = "not run" if part.status is None else f"exit status {part.status}"
        lines += [f"## {part.title}: {state}", "", "```", part.output.strip(), "```", ""]
    if timings:
        lines += [
            "## Timings",
            "",
            "Median milliseconds of a call; ratio: torch's over anyattn's; difference: the largest.",
            "",
            f"| workload | {name} | torch SDPA | ratio | difference |",
            "| --- | --- | --- | --- | --- |",
            *(one.row() for one in timings),
        ]
    return "\n".join(lines) + "\n"
