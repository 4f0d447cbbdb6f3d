"""Defects planted in the kernel of weights and statistics, as `cuda_mutants` has them of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_mutants import Mutant

import anyattn as aa

__all__ = ["CALLS", "MUTANTS", "different", "perform", "references"]

ALL = ("key_mass", "entropy", "max")


def tensors(nan: bool = False) -> list[Any]:
    """Lengths that divide nothing, and query heads that share one of the keys."""
    rng = np.random.default_rng(2)
    q, k = (rng.standard_normal(shape).astype("f4") for shape in ((1, 2, 70, 12), (1, 1, 50, 12)))
    if nan:
        k[..., 20, 3] = np.nan
    return [q, k]


# Arrays and options, by a name that begins with the operation.
CALLS = {
    "weights": lambda: (tensors(), {"causal": True, "sinks": [1.0, -0.5]}),
    "weights rows": lambda: (tensors(), {"causal": True, "rows": [60, 2, 2]}),
    "weights nan": lambda: (tensors(nan=True), {"causal": True}),
    "stats": lambda: (tensors(), {"causal": True, "sinks": [1.0, -0.5], "stats": ALL}),
    "stats nan": lambda: (tensors(nan=True), {"causal": True, "stats": ALL}),
}


def perform(name: str, backend: str, dtype: str = "f4") -> dict[str, Any]:
    """The results of a call."""
    arrays, options = CALLS[name]()
    arrays = [x.astype(dtype) for x in arrays]
    if name.startswith("weights"):
        return {"weights": aa.attention_weights(*arrays, **options, backend=backend)}
    return dict(aa.attention_stats(*arrays, **options, backend=backend))


def references() -> dict[str, dict[str, Any]]:
    """Results of the reference in float64, by call."""
    return {name: perform(name, "reference", "f8") for name in CALLS}


def different(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether some result is not that of the reference."""
    return any(
        not np.allclose(x, wanted[name], rtol=5e-6, atol=5e-6, equal_nan=True) for name, x in found.items()
    )


MUTANTS = tuple(Mutant(*parts) for parts in (
    ("no barrier before products", "weights", "        __syncthreads();\n        if (WIDE)",
     "        if (WIDE)", "races"),
    ("no barrier after loading", "weights", "if (first == 0) load_more();\n        __syncthreads();",
     "if (first == 0) load_more();", "races"),
    ("sums of warps are read too early", "stats", "__syncthreads();\n            const long long head = (",
     "const long long head = (", "races"),
    ("sums of a column over half of the rows", "stats",
     "                sum += __shfl_xor_sync(~0u, sum, 16);\n", "", "wrong"),
    ("sums of one warp", "stats", "w < WARPS; ++w) sum", "w < 1; ++w) sum", "wrong"),
    ("heads lie on each other", "stats", "* a.num_heads + item.head;\n            for",
     "* a.num_heads;\n            for", "races"),
    ("rows beyond the last are counted", "stats", "const bool seen = there[r] && place < count",
     "const bool seen = place < count", "wrong"),
    ("keys beyond the last are seen", "weights", "const bool seen = there[r] && place < count",
     "const bool seen = there[r]", "wrong"),
    ("the first pass forgets to scale", "weights", "total[r] *= exp(top[r] - base);", "", "wrong"),
    ("each lane has a maximum of its own", "weights",
     "now = larger(__shfl_xor_sync(~0u, now, lane), now);", ";", "wrong"),
    ("the sink is left out", "weights", "all += exp(sink - base);", "", "wrong"),
    ("entropy without the sink's share", "stats", "p * (above - log_all[r])", "p * above", "wrong"),
    ("hidden keys of a row that is NaN are NaN", "weights nan",
     "hidden >> (r * KEYS + m) & 1 ? Real(0) : exp(above) * factor[r]", "exp(above) * factor[r]", "wrong"),
    ("the largest is not NaN", "stats nan",
     "{ return x > y || x != x ? x : y; }", "{ return x > y ? x : y; }", "wrong"),
    ("rows as they stand", "weights rows", "a.row_numbers ? a.row_numbers[min(number, a.rows - 1)] : number",
     "number", "wrong"),
    ("rows are not clamped", "weights rows", "a.row_numbers[min(number, a.rows - 1)]",
     "a.row_numbers[number]", "beyond global memory"),
    ("the mask is not asked of chosen rows", "weights rows", "a.row_numbers || tile.kind & MASKED",
     "tile.kind & MASKED", "wrong"),
))  # fmt: skip
