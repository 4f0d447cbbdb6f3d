"""What anyattn finds here: array libraries, backends, and why one is unavailable."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.util import find_spec
from typing import Any

HELP = "array libraries and backends that are installed"

# Import names of the libraries that anyattn knows of; any other that follows the array API standard works
# too.
LIBRARIES = ("numpy", "torch", "jax", "cupy", "dask", "array_api_strict", "ml_dtypes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `anyattn info`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def gather() -> dict[str, Any]:
    """Versions and backends as plain data; imports the backends' own modules and no array library."""
    import anyattn

    return {
        "anyattn": anyattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "array_libraries": {name: _version(name) for name in LIBRARIES if find_spec(name) is not None},
        "backends": {
            name: {"available": status.available, "version": status.version, "reason": status.reason}
            for name, status in anyattn.backends().items()
        },
    }


def run(arguments: argparse.Namespace) -> int:
    """Print what there is."""
    found = gather()
    text = json.dumps(found, indent=2) if arguments.json else _table(found)
    sys.stdout.write(f"{text}\n")
    return 0


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"anyattn {found['anyattn']}, Python {found['python']}, {found['platform']}",
        "",
        "Array libraries",
    ]
    for name, version in found["array_libraries"].items():
        lines.append(f"  {name:<18}{version or 'version unknown'}")
    lines += ["", "Backends"]
    for name, status in found["backends"].items():
        state = (
            f"available {status['version'] or ''}"
            if status["available"]
            else f"unavailable: {status['reason']}"
        )
        lines.append(f"  {name:<18}{state}")
    return "\n".join(lines)


def _version(import_name: str) -> str | None:
    """Version of the distribution that an import name comes from (`cupy` may come from `cupy-cuda13x`)."""
    from importlib import metadata

    try:
        return metadata.version(import_name)
    except metadata.PackageNotFoundError:
        distributions = metadata.packages_distributions().get(import_name, [])
        return metadata.version(distributions[0]) if distributions else None
