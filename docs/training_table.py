"""Writes the table of `torch.md`: time and memory of a training step, with attention of torch and with ours.

Run it as `python docs/training_table.py` on one core that nobody else uses; it takes some minutes. The steps
are those of `asv_benchmarks/benchmarks/training.py`. Those of a row run in turn in one process, and their
times are of its processor; the memory of each is of a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import anyattn as aa

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "torch.md"
sys.path.insert(0, str(ROOT / "asv_benchmarks"))
from benchmarks import training  # noqa: E402

OURS = "anyattn"
ROUNDS = 5
HEAD = "| attention | torch's own | anyattn | time | way |\n| --- | --- | --- | --- | --- |\n"
# What a row is called, its attention, and the number of tokens.
ROWS = (
    ("causal", "causal", 1024),
    ("window of 128", "window", 1024),
    ("window of 128, 4096 tokens", "window", 4096),
    ("causal, ALiBi", "alibi", 1024),
    ("causal, softcap", "softcap", 1024),
)


def route(attention: str, tokens: int) -> str:
    """What `explain` says of the way of a call."""
    import torch

    shape = (1, training.HEADS, tokens, training.WIDTH // training.HEADS)
    q, k, v = (torch.empty(shape, requires_grad=True) for _ in range(3))
    notes = aa.explain(q, k, v, **training.ATTENTIONS[attention]()).notes
    told = [note.removeprefix("runs on ") for note in notes if note.startswith("runs on ")]
    return ", ".join(told + [note for note in notes if note == "Numba computes the forward"])


def seconds(attention: str, tokens: int) -> tuple[float, float]:
    """Processor time of a step of torch's own and of ours, the medians of steps in turn."""
    steps = [training.step(who, attention, tokens) for who in (training.common.PEER, OURS)]
    found: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for times, step in zip(found, steps, strict=True):
            began = time.process_time()
            step()
            times.append(time.process_time() - began)
    own, ours = (median(times[1:]) for times in found)
    return own, ours


def megabytes(who: str, attention: str, tokens: int) -> float:
    """What a second step takes beyond what the process held before, measured in a process of its own."""
    given = [sys.executable, __file__, who, attention, str(tokens)]
    done = subprocess.run(given, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1e6


def row(name: str, attention: str, tokens: int) -> str:
    """A row of the table."""
    own, ours = seconds(attention, tokens)
    memory = [megabytes(who, attention, tokens) for who in (training.common.PEER, OURS)]
    return (
        f"| {name} | {1e3 * own:.0f} ms, {memory[0]:.0f} MB | {1e3 * ours:.0f} ms, {memory[1]:.0f} MB "
        f"| {ours / own:.2f} | {route(attention, tokens)} |"
    )


def with_table(text: str, shown: list[str]) -> str:
    """Return the page with other rows."""
    before, rest = text.split(HEAD)
    return before + HEAD + "\n".join(shown) + rest[rest.index("\n\n") :]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with aa.use(threads=1):
        if sys.argv[1:]:
            step = training.step(sys.argv[1], sys.argv[2], int(sys.argv[3]))
            step()
            sys.stdout.write(f"{training.extra_memory(step)}\n")
        else:
            rows = [row(*each) for each in ROWS]
            PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
