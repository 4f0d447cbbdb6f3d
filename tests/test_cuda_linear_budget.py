"""The kernels of linear attention compile for every architecture, within a committed budget.

`python tests/test_cuda_linear_budget.py` writes the budget anew, as `test_cuda_budget.py` does.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_budgets import Budget
from cuda_compile import compiled
from cuda_standin import SHARED_MEMORY

from anyattn_cupy.linear_launch import linear_source
from anyattn_cupy.linear_variants import choose
from anyattn_cupy.source import OPTIONS
from anyattn_cupy.variants import Device

PAGE = Path(__file__).parents[1] / "docs" / "linear-attention.md"
COLUMNS = ("rule", "dtype", "head_dim", "architecture")
HELD = ("channels", "rows", "columns", "registers", "shared_memory", "spilled")

# Decays of a token, whether there is beta.
RULES = {
    "linear": (0, False),
    "gated, a decay a channel": (2, False),
    "delta": (0, True),
    "gated delta, a decay a head": (1, True),
    "gated delta, a decay a channel": (2, True),
}
# What is lightest and what takes most; of 512 channels some are held at a time.
KERNELS = (
    ("linear", "float16", 64),
    ("gated delta, a decay a channel", "float32", 128),
    ("delta", "float64", 128),
    ("gated, a decay a channel", "bfloat16", 512),
)


def chosen(dtype, dim, v_dim, *, rule="linear", capability=80, multiprocessors=1, length=1000, heads=1):
    """The variant for a call of so many tokens of some heads."""
    channels, delta = RULES[rule]
    one = SimpleNamespace(
        dtype=dtype, head_dim=dim, v_head_dim=v_dim, normalize=False, causal=True, feature_map="identity",
        decay=SimpleNamespace(shape=(length, 1 if channels == 1 else dim)) if channels else None,
        beta=1 if delta else None, k_len=length, q_len=length,
    )  # fmt: skip
    return choose(Device(capability, SHARED_MEMORY[capability], multiprocessors), one, heads, False)


def needs(rule, dtype, dim, capability):
    """What a kernel takes on an architecture, as `HELD` has it."""
    variant = chosen(dtype, dim, dim, rule=rule, capability=capability)
    [found] = compiled(linear_source(variant), f"sm_{capability}", OPTIONS).resources.values()
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
