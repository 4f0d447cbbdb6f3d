"""The kernels of linear attention compile for every architecture, within a committed budget.

`python tests/test_cuda_linear_budget.py` writes the budget anew, as `test_cuda_budget.py` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_budgets import Budget
from cuda_compile import compiled
from cuda_linear_kernels import source_of

from anyattn_cupy.source import OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "linear-attention.md"
COLUMNS = ("rule", "dtype", "head_dim", "architecture")
HELD = ("channels", "rows", "columns", "registers", "shared_memory", "spilled")

# What is lightest and what takes most; of 512 channels some are held at a time.
KERNELS = (
    ("linear", "float16", 64),
    ("gated delta, a decay a channel", "float32", 128),
    ("delta", "float64", 128),
    ("gated, a decay a channel", "bfloat16", 512),
    ("gated delta, a decay a head", "bfloat16", 256),
    ("linear, elu + 1, normalised", "bfloat16", 128),
    ("linear, both ways", "float32", 64),
    ("gated, normalised, joining parts", "float32", 64),
)


def needs(rule, dtype, dim, capability):
    """What a kernel takes on an architecture, as `HELD` has it."""
    variant, source, joins = source_of(rule, dtype, dim, capability)
    [found] = compiled(source, f"sm_{capability}", OPTIONS).resources.values()
    if joins:
        # A thread has an entry of a state; there are no chunks.
        return 1, 1, 128, found.registers, found.shared_memory, found.spilled
    shared = variant.shared_memory + found.shared_memory
    return variant.head_dim, variant.rows, variant.columns, found.registers, shared, found.spilled


BUDGET = Budget(Path(__file__).with_name("cuda_budget_linear.csv"), COLUMNS, HELD, KERNELS, needs)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k)))
def test_within_the_budget(kernel):
    BUDGET.check(kernel)


def table():
    """The rows of docs/linear-attention.md: tile, registers and KiB of shared memory by architecture."""
    found = {}
    for row in BUDGET.rows().values():
        room = f"{int(row['shared_memory']) / 1024:.0f}"
        cell = f"{row['rows']}×{row['columns']}, {row['registers']}, {room}"
        found.setdefault(tuple(row[c] for c in COLUMNS[:-1]), {})[row["architecture"]] = cell
    lines = []
    for (rule, dtype, dim), cells in found.items():
        assert cells["sm_86"] == cells["sm_89"]
        shown = [cell for architecture, cell in cells.items() if architecture != "sm_89"]
        lines.append(f"| {' | '.join([rule, f'{dtype}, {dim}', *shown])} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_the_page():
    assert table() in PAGE.read_text(), table()


def test_nothing_is_spilled():
    assert {row["spilled"] for row in BUDGET.rows().values()} == {"0"}


def test_the_budget_lists_what_is_compiled():
    assert set(BUDGET.rows()) == BUDGET.names()


if __name__ == "__main__":
    BUDGET.write()
