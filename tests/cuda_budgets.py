"""Budgets of CUDA kernels: a row of a file for each kernel and architecture, and what compiled kernels take.

A test of one kind of kernels has `columns`, which name a kernel, `held`, what is measured of it, the kernels
as tuples, and a function (kernel..., capability) that gives the values of `held`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_compile import need_nvrtc
from cuda_standin import SHARED_MEMORY

__all__ = ["Budget"]

# What may be less than the budget has; all else is what it says.
BOUNDED = ("registers", "spilled")


@dataclass(frozen=True)
class Budget:
    """The budget of `kernels` in the file at `path`."""

    path: Path
    columns: tuple[str, ...]
    held: tuple[str, ...]
    kernels: Sequence[tuple[Any, ...]]
    measure: Callable[..., tuple[Any, ...]]

    def rows(self) -> dict[tuple[str, ...], dict[str, str]]:
        """The rows of the file by kernel and architecture."""
        with self.path.open(newline="") as file:
            return {tuple(row[c] for c in self.columns): row for row in csv.DictReader(file)}

    def names(self) -> set[tuple[str, ...]]:
        """Of which kernel and architecture there is to be a row."""
        return {self._name(kernel, c) for kernel in self.kernels for c in SHARED_MEMORY}

    def check(self, kernel: tuple[Any, ...]) -> None:
        """Fail where a kernel takes more than the budget has, or is another one."""
        need_nvrtc()
        rows = self.rows()
        for capability in SHARED_MEMORY:
            row, found = rows[self._name(kernel, capability)], self._found(kernel, capability)
            assert all(row[name] == found[name] for name in self.held if name not in BOUNDED), found
            for name in BOUNDED:
                assert int(found[name]) <= int(row[name]), (kernel, capability, name, found)

    def write(self) -> None:
        """Print the budget as the kernels are."""
        writer = csv.DictWriter(sys.stdout, [*self.columns, *self.held], lineterminator="\n")
        writer.writeheader()
        for kernel in self.kernels:
            for c in SHARED_MEMORY:
                named = dict(zip(self.columns, self._name(kernel, c), strict=True))
                writer.writerow(named | self._found(kernel, c))

    def _name(self, kernel: tuple[Any, ...], capability: int) -> tuple[str, ...]:
        shown = ("yes" if x is True else "no" if x is False else str(x) for x in kernel)
        return (*shown, f"sm_{capability}")

    def _found(self, kernel: tuple[Any, ...], capability: int) -> dict[str, str]:
        return dict(zip(self.held, map(str, self.measure(*kernel, capability)), strict=True))
