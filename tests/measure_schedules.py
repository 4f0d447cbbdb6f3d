"""Prints the tables of docs/compiler.md: what schedules are held to, how they are found, and what they cost.

    python tests/measure_schedules.py [soundness] [exactness] [cost]

It makes the comparisons that test_tiles.py and test_schedule.py make, and counts them. Seconds are those of
the processor, the best of three runs in one thread.
"""

from __future__ import annotations

import itertools
import sys
import time
import tracemalloc

import numpy as np
from brute_force import dense, parts, tiled
from test_schedule import K_LEN, NEGATED, Q_LEN, VOCABULARY
from test_tiles import TILES, possible_and_true, random_parts

from anyattn import masks
from anyattn.schedule import PARTIAL
from anyattn.schedule.make import build


def table(head: list[str], rows: list[list[object]]) -> None:
    """Print a table of Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        cells = " | ".join(f"{x:,}" if isinstance(x, int) else str(x) for x in row)
        sys.stdout.write(f"| {cells} |\n")
    sys.stdout.write("\n")


def differences(p, rows, keys):
    """The schedule of `p`, its tiles, and how many of them brute force calls otherwise."""
    made, seen = build(p, rows, keys), dense(p)
    expected = np.stack([tiled(seen[at], rows, keys) for at in np.ndindex(p.batch_size, p.num_heads)])
    found = np.stack([made.verdicts(*at) for at in np.ndindex(p.batch_size, p.num_heads)])
    missed = ((found != PARTIAL) & (found != expected)).sum()
    return made, found.size, int(missed), int(((found == PARTIAL) & (expected != PARTIAL)).sum())


def soundness() -> None:
    """Random expressions of depth 4: the product, and the analysis without evaluation at every level."""
    tiles = wrong = loose = 0
    for seed in range(400):
        _, size, missed, needless = differences(random_parts(seed), *TILES[seed % 3])
        tiles, wrong, loose = tiles + size, wrong + missed, loose + needless
    judged = unsound = leaves = open_ = 0
    for seed in range(500, 700):
        for level, possible, true in possible_and_true(random_parts(seed), *TILES[seed % 3]):
            judged += 1
            unsound += true & ~possible != 0
            leaves += level == 0
            open_ += level == 0 and possible != true != PARTIAL
    table(
        ["random expressions", "number", "tiles compared", "wrong", "EMPTY or FULL, not known to be"],
        [
            ["schedules", 400, tiles, wrong, f"{loose / tiles:.1%}"],
            ["analysis alone, three sizes of tile", 200, judged, unsound, f"{open_ / leaves:.1%} of leaves"],
        ],
    )


def exactness() -> None:
    """Every entry of the vocabulary over the grid of the tests, and in every pair under & and |."""
    entries = list({**VOCABULARY, **NEGATED}.items())
    paired = {name: [0, 0] for name, _ in entries}
    sizes = itertools.cycle([(64, 64), (16, 16), (128, 128), (32, 96), (256, 256)])
    for n, (name, one) in enumerate(entries):
        for (other_name, other), size in zip(entries[n:], sizes, strict=False):
            for mask in (one & other, one | other):
                _, tiles, missed, needless = differences(parts(mask, Q_LEN, K_LEN), *size)
                for each in {name, other_name}:
                    paired[each][0] += tiles
                    paired[each][1] += missed + needless
    rows: list[list[object]] = []
    for name, mask in VOCABULARY.items():
        counts = np.zeros(6, int)
        for each in (mask, ~mask):
            for offset in (None, 0, -40):
                for size in ((16, 16), (64, 64), (128, 128), (256, 256), (128, 64), (48, 80)):
                    made, *found = differences(parts(each, Q_LEN, K_LEN, q_offset=offset), *size)
                    stats = made.stats
                    counts += [*found, stats.by_analysis, stats.by_witness, stats.by_evaluation]
        tiles, missed, needless, *by = counts.tolist()
        both = [sum(x) for x in zip(paired[name], paired[f"~{name}"], strict=True)]
        rows.append([name, tiles, *by, missed + needless, *both])
    table(
        [
            "entry and its ~",
            "tiles",
            "by analysis",
            "by a witness",
            "by evaluation",
            "wrong",
            "tiles in pairs",
            "wrong in pairs",
        ],
        rows,
    )


def cost() -> None:
    """Seconds, memory and what is kept, by mask and length, in tiles of 128 x 128."""
    rng = np.random.default_rng(0)
    vocabulary = {
        "`causal()`": lambda n: masks.causal(),
        "`causal() & sliding_window(1024)`": lambda n: masks.causal() & masks.sliding_window(1024),
        "`causal() & sliding_window(512) \\| global_tokens(64)`": lambda n: (
            masks.causal() & masks.sliding_window(512) | masks.global_tokens(64)
        ),
        "`causal() & strided(128)`": lambda n: masks.causal() & masks.strided(128),
        "`causal() & fixed(64)`": lambda n: masks.causal() & masks.fixed(64),
        "`dilated(64, 8)`": lambda n: masks.dilated(64, 8),
        "`prefix(n // 3) \\| causal()`": lambda n: masks.prefix(n // 3) | masks.causal(),
        "`documents(in order, 8,000 tokens each) & causal()`": lambda n: (
            masks.documents(np.arange(n) // 8000) & masks.causal()
        ),
        "`documents(50,000 ids in any order) & sliding_window(1024)`": lambda n: (
            masks.documents(rng.integers(0, 50_000, n)) & masks.sliding_window(1024)
        ),
    }
    rows: list[list[object]] = []
    for name, make in vocabulary.items():
        for length in (10_000, 100_000, 1_000_000):
            p = parts(make(length), length, length)
            seconds = []
            for _ in range(3):
                began = time.process_time()
                made = build(p, 128, 128)
                seconds.append(time.process_time() - began)
            tracemalloc.start()
            build(p, 128, 128)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            rows.append(
                [
                    name,
                    length,
                    f"{min(seconds):.3f}",
                    f"{peak / 1e6:.1f}",
                    f"{made.nbytes / 1e3:.0f}",
                    made.num_full,
                    made.num_partial,
                    f"{made.kept:.2%}",
                    f"{made.density:.3%}",
                ]
            )
    table(
        [
            "mask",
            "tokens",
            "seconds",
            "peak MB",
            "kept kB",
            "full tiles",
            "partial tiles",
            "tiles kept",
            "pairs visited",
        ],
        rows,
    )


if __name__ == "__main__":
    for part in sys.argv[1:] or ("soundness", "exactness", "cost"):
        {"soundness": soundness, "exactness": exactness, "cost": cost}[part]()
