"""Writes the tables of `linear-attention.md` that were measured: rates beside sgemm, and time by length.

Run it as `python docs/linear_table.py` on a quiet machine. Seconds are those of the processor, on one thread,
the least of several calls; rules and NumPy's product take turns, so that both meet the same noise.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import anyattn as aa

PAGE = Path(__file__).parent / "linear-attention.md"
DIM = 64
HEADS, LENGTH = 8, 65_536
LENGTHS = tuple(2**n for n in range(13, 21))
ROUNDS = 7
# Rules by name: whether there is a decay a head or a channel, and beta.
RULES = {
    "`linear`": ("linear", None),
    "`gated`, a decay a head": ("gated", "head"),
    "`gated`, each channel": ("gated", "channel"),
    "`delta`": ("delta", None),
    "`gated_delta`, a decay a head": ("gated_delta", "head"),
    "`gated_delta`, each channel": ("gated_delta", "channel"),
}


def seconds(call: Callable[..., object], *args: Any, **options: Any) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    call(*args, **options)
    return time.process_time() - start


def given(heads: int, length: int) -> dict[str, Any]:
    """Return q, k and v of normal numbers, k of length 1, a decay for each channel, and beta."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((heads, length, DIM), dtype=np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -random.random(k.shape, dtype=np.float32) / 10
    return {"q": q, "k": k, "v": v, "decay": decay, "beta": random.random(k.shape[:-1], dtype=np.float32)}


def options_of(name: str, arrays: dict[str, Any], length: int) -> dict[str, Any]:
    """Return the arguments of a call of a rule for the first tokens."""
    rule, decay = RULES[name]
    found = {x: arrays[x][:, :length] for x in ("q", "k", "v")} | {"rule": rule, "backend": "numba"}
    if decay:
        found["decay"] = arrays["decay"][:, :length] if decay == "channel" else arrays["decay"][:, :length, 0]
    if rule.endswith("delta"):
        found["beta"] = arrays["beta"][:, :length]
    return found


def operations(name: str) -> float:
    """Return the operations of a token and head, a multiplication and an addition being two.

    The state is read and written, and read once more by the delta rules; of a chunk's keys a query sees half.
    """
    rule, decay = RULES[name]
    tokens = 16 if decay == "channel" else 32
    delta = rule.endswith("delta")
    found = 4 * DIM * DIM + 2 * (tokens + 1) / 2 * 2 * DIM
    if delta:
        found += 2 * DIM * DIM + 2 * (tokens - 1) / 2 * 2 * DIM
    if decay == "channel":
        found += (1 + delta) * (tokens - 1) / 2 * DIM
    return found


def rates() -> str:
    """Return the rows of rates."""
    square = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    room = np.empty_like(square)
    arrays = given(HEADS, LENGTH)
    lines = []
    for name in RULES:
        options = options_of(name, arrays, LENGTH)
        aa.linear_attention(**options)
        products, calls = [], []
        for _ in range(ROUNDS):
            products += [seconds(np.matmul, square, square, out=room) for _ in range(4)]
            calls.append(seconds(aa.linear_attention, **options))
        product = 2 * 1024**3 / min(products)
        shown = [f"{min(calls):.3f}"]
        for count in (operations("`linear`"), operations(name)):
            rate = count * HEADS * LENGTH / min(calls)
            shown.append(f"{rate / 1e9:.0f}, {rate / product:.2f}")
        lines.append(f"| {' | '.join([name, *shown])} |\n")
    return "".join(lines)


def lengths() -> str:
    """Return the rows of seconds by length, one head, and what each takes over half as many tokens."""
    arrays = given(1, LENGTHS[-1])
    calls = {(name, n): options_of(name, arrays, n) for n in LENGTHS for name in RULES}
    least = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for key, options in calls.items():
            # The second takes the memory that the first gave back; other lengths leave it in pieces.
            found = [seconds(aa.linear_attention, **options) for _ in range(2)]
            least[key] = min(least[key], *found)
    lines = []
    for length in LENGTHS:
        cells = [f"{length:,}"]
        for name in RULES:
            half = least.get((name, length // 2))
            ratio = f", {least[name, length] / half:.2f}" if half else ""
            cells.append(f"{least[name, length]:.4f}{ratio}")
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def with_rows(text: str, head: str, rows: str) -> str:
    """Return the page with other rows below the table head that begins so."""
    found = re.sub(rf"({re.escape(head)}[^\n]*\n\|[ -|]*\n)(\|[^\n]*\n)*", lambda m: m[1] + rows, text)
    if rows not in found:
        raise ValueError(f"linear-attention.md: wanted a table that begins {head!r}, found none")
    return found


if __name__ == "__main__":
    with aa.use(threads=1):
        tables = {"| rule | seconds |": rates(), "| tokens |": lengths()}
    page = PAGE.read_text(encoding="utf-8")
    for head, rows in tables.items():
        page = with_rows(page, head, rows)
    PAGE.write_text(page, encoding="utf-8")
