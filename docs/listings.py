"""Writes `docs/_listings/`: the code that is generated for one mask and score, which docs/compiler.md shows.

Run it as `python docs/listings.py`; the results are committed, and a test compares them with the printers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyattn import masks, scores
from anyattn.describe import Options, describe
from anyattn.expr.print_cuda import cuda_source
from anyattn.expr.print_numba import numba_source
from anyattn.expr.program import lower

FOLDER = Path(__file__).parent / "_listings"


def listings() -> dict[str, str]:
    """Return the text of each file by its name."""
    mask = masks.causal() & masks.sliding_window(512) | masks.global_tokens(64)
    x = np.zeros((1, 4, 2048, 8), np.float32)
    call = describe("attention", x, x, x, Options(mask=mask, score_mod=scores.alibi(4)))
    program = lower(call.visible, call.score)
    title = f"mask {mask!r}, score_mod alibi(4)"
    return {
        "numba.txt": numba_source(program, "float32", title=title),
        "cuda.txt": cuda_source(program, "float32", title=title),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in listings().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
