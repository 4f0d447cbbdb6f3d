"""The command line, `anyattn`.

A subcommand is a module with `HELP`, `add_arguments(parser)` and `run(arguments) -> exit status`. To add one,
name it in `COMMANDS`. Such a module imports nothing heavy at its top, so that `anyattn --help` stays quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

import anyattn

COMMANDS = {
    "info": "anyattn.info",
    "cache": "anyattn.cache_command",
    "warmup": "anyattn.warmup_command",
    "check": "anyattn.check.command",
    "demo": "anyattn.demo.command",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="anyattn",
        description="Attention for any array library: what is installed, compiled kernels, a demonstration.",
    )
    parser.add_argument("--version", action="version", version=f"anyattn {anyattn.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, dotted in COMMANDS.items():
        module = import_module(dotted)
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parsed = build_parser().parse_args(arguments)
    status: int = parsed.run(parsed)
    return status
