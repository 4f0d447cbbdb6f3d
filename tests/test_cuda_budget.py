"""Every kernel compiles for every architecture, within a committed budget of registers, memory and spills.

`python tests/test_cuda_budget.py` writes the budget anew. A number that falls is no error; write it then.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_budgets import Budget
from cuda_compile import compiled
from cuda_standin import SHARED_MEMORY

from anyattn import masks, scores
from anyattn.describe import Options, describe
from anyattn.expr.program import lower
from anyattn_cupy.source import OPTIONS, combine_source, kernel_source
from anyattn_cupy.variants import Device, choose, choose_inspect

COLUMNS = ("operation", "dtype", "head_dim", "vector_loads", "options", "architecture")
HELD = ("kernel", "rows", "keys", "registers", "shared_memory", "spilled")

# The options that the program of a kernel is printed for; int8 and packed are variants of it. Of "far",
# arrays have three batch axes that memory does not join, and indices have 64 bits.
PROGRAMS = {
    "none": {},
    "causal": {"causal": True},
    "dropout": {"causal": True, "dropout": 0.1, "dropout_seed": 1},
    "int8": {"causal": True},
    "packed": {"causal": True},
    "all": {
        "mask": masks.sliding_window(512) | masks.global_tokens(64),
        "score_mod": scores.alibi(2),
        "softcap": 30.0,
    },
}
PROGRAMS |= {"far": PROGRAMS["all"], "Dv = 64": PROGRAMS["causal"]}
ATTENTION = [
    *((dtype, dim, True, "causal") for dtype in ("float16", "float32", "float64") for dim in (64, 128, 256)),
    *((dtype, 512, True, "causal") for dtype in ("float16", "float32", "float64")),
    *(("bfloat16", dim, True, "causal") for dim in (64, 128)),
    ("float16", 96, True, "causal"),
    *((dtype, 64, True, options) for dtype in ("float16", "float32") for options in ("none", "all")),
    *((dtype, 64, False, "causal") for dtype in ("float16", "float32")),
    *(
        (dtype, 128, True, options)
        for dtype in ("float16", "float32")
        for options in ("dropout", "int8", "packed", "far", "Dv = 64")
    ),
]
INSPECTION = [
    *(("float32", dim, True, "causal") for dim in (64, 128, 512)),
    ("float16", 128, False, "all"),
    ("float64", 256, True, "causal"),
]
MERGES = [(dtype, 128, True, "none") for dtype in ("float16", "float64")]
KERNELS = [
    *(("attention", *kernel) for kernel in ATTENTION),
    *(("inspection", *kernel) for kernel in INSPECTION),
    *(("merge", *kernel) for kernel in MERGES),
]


def needs(operation, dtype, dim, vector_loads, options, capability):
    """What a kernel takes on an architecture, as `HELD` has it."""
    device = Device(capability, SHARED_MEMORY[capability])
    if operation == "inspection":
        variant = choose_inspect(device, dtype, dim, vector_loads)
    else:
        axes, columns = 3 if options == "far" else 1, 64 if options == "Dv = 64" else dim
        variant = choose(device, dtype, dim, columns, vector_loads, axes, scaled=options == "int8")
    variant = replace(variant, packed=options == "packed")
    if operation == "merge":
        source, tile, room = combine_source(variant), ("combine", 4, 0), 0
    else:
        x = np.zeros((2, 8, 8), "f4")
        call = describe("attention", x, x, x, Options(**PROGRAMS[options]))
        index = "long long" if options == "far" else "int"
        source = kernel_source(variant, lower(call.visible, call.score, call.keep), index)
        tile, room = (variant.kernel, variant.rows, variant.keys), variant.shared_memory
    [(name, found)] = compiled(source, f"sm_{capability}", OPTIONS).resources.items()
    assert (name == "combine") == (operation == "merge")
    return (*tile, found.registers, room + found.shared_memory, found.spilled)


BUDGET = Budget(Path(__file__).with_name("cuda_budget.csv"), COLUMNS, HELD, KERNELS, needs)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k)))
def test_within_the_budget(kernel):
    BUDGET.check(kernel)


def test_nothing_is_spilled_up_to_128_channels():
    for key, row in BUDGET.rows().items():
        if int(row["head_dim"]) <= 128 and row["dtype"] != "float64":
            assert row["spilled"] == "0", key


def test_the_budget_lists_what_is_compiled():
    assert set(BUDGET.rows()) == BUDGET.names()


if __name__ == "__main__":
    BUDGET.write()
