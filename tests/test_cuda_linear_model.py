"""The model of linear attention on CUDA: its counts are the interpreter's, its table that of the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_linear_kernels import RULES, chosen
from cuda_model import A100, H100
from cuda_model_linear import Chunk, predict, table
from cuda_standin import Standin

from anyattn.linear.describe import LinearOptions, describe
from anyattn_cupy import linear_launch

PAGE = Path(__file__).parents[1] / "docs" / "linear-attention.md"


def machine(rule, dim, v_dim, chunks):
    """One head of so many chunks, run and counted."""
    channels, delta = RULES[rule]
    length = 32 * chunks
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, length, n)).astype("f4") for n in (dim, dim, v_dim))
    options = {"rule": ("gated_" if channels else "") + ("delta" if delta else "linear")}
    if channels:
        options["rule"] = "gated_delta" if delta else "gated"
        shape = (1, length, dim) if channels == 2 else (1, length)
        options["decay"] = -rng.uniform(0, 1, shape).astype("f4")
    if delta:
        options["beta"] = rng.uniform(0, 1, (1, length)).astype("f4")
    standin = Standin(count=True)
    linear_launch.linear(describe(q, k, v, LinearOptions(**options)), standin)
    return standin.launches[0].machine


def shared(machine):
    return sum(t.taken for (_, space, _), t in machine.traffic.items() if space == "shared")


@pytest.mark.parametrize(
    ("rule", "dim", "v_dim"), [("linear", 64, 64), ("gated delta, a decay a channel", 32, 64)]
)
def test_counts_of_the_interpreter(rule, dim, v_dim, nvrtc):
    one, two = (machine(rule, dim, v_dim, n) for n in (1, 2))
    chunk = Chunk(chosen("float32", dim, v_dim, rule=rule))
    # What is solved is multiplied and subtracted in PTX.
    made = 32 * sum(two.mix[op, "f32"] - one.mix[op, "f32"] for op in ("fma", "sub"))
    assert abs(made / chunk.products - 1) < 0.02
    assert abs((shared(two) - shared(one)) / chunk.wavefronts - 1) < 0.02
    instructions = (two.mix.total() - one.mix.total()) / 4
    assert abs(instructions / chunk.instructions - 1) < 0.1


def test_what_limits():
    """What multiply-adds read of shared memory, and not their number."""
    for chip, capability in ((A100, 80), (H100, 90)):
        for rule in RULES:
            clocks = predict(chip, chosen("float32", 64, 64, rule=rule, capability=capability))
            assert max(clocks, key=clocks.get) == "shared"


def test_the_table_of_the_page():
    assert table() in PAGE.read_text(), "write the rows that `python tests/cuda_model_linear.py` prints"
