"""Writes `docs/_listings/cuda_mutants.txt`: each planted defect, and the rung that catches it."""

from __future__ import annotations

from pathlib import Path

import cuda_mutants
import cuda_mutants_inspect
import cuda_mutants_linear

__all__ = ["PAGE", "table"]

PAGE = Path(__file__).parents[1] / "docs" / "_listings" / "cuda_mutants.txt"

# By what is said: a check of the interpreter, or of a sanitizer.
RUNGS = {
    "wrong": "the result",
    "bank conflicts": "counted bank conflicts",
    "beyond global memory": "interpreter: bounds",
    "races": "interpreter: races",
    "elsewhere": "interpreter: threads that never come",
    "has not been waited for": "interpreter: copies under way",
    "nobody has written": "interpreter: bytes that nobody wrote",
    "AddressSanitizer: ": "ASan",
    "heap-buffer-overflow": "ASan",
    "misaligned address": "UBSan",
    "out of bounds": "UBSan",
    "shift exponent": "UBSan",
    "data race": "TSan",
    "waits for threads that never come": "host: threads that never come",
    "lanes of the warp are elsewhere": "host: threads that never come",
}


def table() -> str:
    """The defects as a table of Markdown."""
    lines = ["| defect | call | caught by |", "| --- | --- | --- |"]
    for module in (cuda_mutants, cuda_mutants_linear):
        for mutant in module.MUTANTS:
            caught = RUNGS[mutant.caught]
            if mutant.what in module.ON_THE_HOST:
                host = RUNGS[module.ON_THE_HOST[mutant.what][1]]
                caught += f"; {host.replace('the result', 'host: the result')}"
            lines.append(_row(mutant, caught))
    others = (*cuda_mutants_inspect.MUTANTS, *cuda_mutants.HOST_ALONE)
    lines += [_row(mutant, RUNGS[mutant.caught]) for mutant in others]
    return "\n".join(lines) + "\n"


def _row(mutant: cuda_mutants.Mutant, caught: str) -> str:
    return f"| {mutant.what} | {mutant.case} | {caught} |"


if __name__ == "__main__":
    PAGE.write_text(table())
