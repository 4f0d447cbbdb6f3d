"""Random masks and scores, printed as CUDA, compiled by NVRTC and run on the PTX interpreter.

Definitions that share no code with either (`random_expressions`) hold the printer, the compiler's reading of
it and the interpreter to one meaning.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_compile import compiled, need_nvrtc
from ptx import Arena, Kernel, Machine
from random_expressions import BATCH, HEADS, KEYS, ROWS, Undecided, points, random_mask, random_score

from anyattn.expr.print_cuda import cuda_arguments, cuda_source
from anyattn.expr.program import lower
from anyattn.expr.statements import aligned_slots, aligned_view

SEEDS = 12
POINTS = 32

# A thread has a point.
RUN = """
extern "C" __global__ void run(
    const __grid_constant__ program::Captured c, const long long* at, const program::Real* s, unsigned* seen,
    program::Real* changed
) {
    const int n = threadIdx.x;
    const long long* p = at + 5 * n;
    seen[n] = program::visible(c, p[0], p[1], p[2], p[3], p[4]);
    changed[n] = program::score(s[n], c, p[0], p[1], p[2], p[3], p[4]);
}
"""


def interpreted(program, dtype, index, at, s):
    """What the functions of a program give at points."""
    arena = Arena(1 << 20)
    tables = [np.ascontiguousarray(x) for x in program.tables]
    views = [
        np.ascontiguousarray(aligned_view(np, x, slot.block, (BATCH,), HEADS, ROWS, KEYS))
        for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
    ]
    addresses = tuple(arena.place(x) for x in (*tables, *views))
    captured = cuda_arguments(program, dtype, tuple(views), addresses, index)
    places = [arena.place(x) for x in (at, s, np.zeros(POINTS, "u4"), np.zeros(POINTS, dtype))]
    source = cuda_source(program, dtype, index=index) + RUN
    kernel = Kernel.parse(compiled(source, "compute_80").ptx, "run")
    arguments = [np.asarray(captured).tobytes(), *(np.uint64(x).tobytes() for x in places)]
    Machine(kernel, (1,), (32,), arguments, 0, arena).run()
    return arena.read(places[2], (POINTS,), "u4"), arena.read(places[3], (POINTS,), dtype)


@pytest.mark.parametrize(("dtype", "index"), [("float32", "long long"), ("float64", "int")])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_expressions(seed, dtype, index):
    need_nvrtc()
    mask, score = (draw(seed, 4, finite=seed % 2 == 0) for draw in (random_mask, random_score))
    program = lower(mask.expr(), score.expr())
    where = points(seed, POINTS)
    at = np.array([(p.b, p.h, p.row, p.i, p.j) for p in where], np.int64)
    s = np.array([p.score for p in where], dtype)
    seen, changed = interpreted(program, dtype, index, at, s)
    decided = 0
    for n, p in enumerate(where):
        for term, found in ((mask, seen[n]), (score, changed[n])):
            try:
                value, error = term.value(p, dtype)
            except Undecided:
                continue
            decided += 1
            equal = found == value or (found != found and value != value)
            assert equal or abs(float(found) - float(value)) <= error, (
                f"{p}: {found!r}, wanted {value!r}: {term.expr()!r}"
            )
    assert decided >= POINTS
