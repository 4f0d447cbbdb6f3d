"""What docs/cuda.md lists is what the tests plant and the model predicts."""

from __future__ import annotations

import re

import cuda_model
import cuda_mutants
import cuda_mutants_inspect
import test_cuda_budget
import test_cuda_inspect
import test_cuda_kernels
from cuda_mutant_table import PAGE, table
from test_cuda_budget import BUDGET


def test_defects():
    assert PAGE.read_text() == table(), "run `python tests/cuda_mutant_table.py`"


CUDA = PAGE.parents[1] / "cuda.md"


def test_how_much_of_each_rung():
    cases = len(test_cuda_kernels.KIT) + len(test_cuda_inspect.KIT)
    planted = len(cuda_mutants.MUTANTS) + len(cuda_mutants_inspect.MUTANTS)
    on_the_host = len(cuda_mutants.ON_THE_HOST) + len(cuda_mutants.HOST_ALONE)
    for row in (
        f"| compiled within the budget | {len(test_cuda_budget.KERNELS)} kernels for 7 architectures each |",
        f"| a case on the interpreter | {cases} of the kit, and 1,252 in `cuda_full` |",
        f"| a planted defect | {planted} on the interpreter |",
        f"| built for the host | {on_the_host} of the defects, and calls without any |",
    ):
        assert row in CUDA.read_text(), row


def test_predictions():
    assert cuda_model.table() in CUDA.read_text(), "write the rows that `python tests/cuda_model.py` prints"


def test_tiles_registers_and_shared_memory():
    """The table of kernels for causal attention is what the budget has."""
    wanted = {}
    for row in BUDGET.rows().values():
        if (row["operation"], row["vector_loads"], row["options"]) != ("attention", "yes", "causal"):
            continue
        spilled = "" if row["spilled"] == "0" else f" ({row['spilled']})"
        room = f"{int(row['shared_memory']) / 1024:.0f}"
        cell = f"{row['rows']}×{row['keys']}, {row['registers']}, {room}{spilled}"
        wanted.setdefault(f"{row['dtype']}, {row['head_dim']}", {})[row["architecture"]] = cell
    shown = {}
    architectures = ("sm_75",), ("sm_80",), ("sm_86", "sm_89"), ("sm_90",), ("sm_100",), ("sm_120",)
    for line in re.findall(r"^\| (float\d+, \d+ \|.*) \|$", CUDA.read_text(), re.MULTILINE):
        name, *cells = line.split(" | ")
        shown[name] = {one: x for group, x in zip(architectures, cells, strict=True) for one in group}
    # Of bfloat16 there is nothing that float16 has not.
    assert shown == {name: cells for name, cells in wanted.items() if not name.startswith("bfloat16")}
