"""Defects planted in the kernels of linear attention, as `cuda_mutants` has them of the others.

Calls that want many parts or more channels than shared memory holds set limits of `linear_variants` low.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_mutants import Mutant

import anyattn as aa

__all__ = ["CALLS", "DEVICE", "LIMITS", "MUTANTS", "ON_THE_HOST", "different", "perform", "references"]

# So many multiprocessors that a block has 32 of the 36 columns.
DEVICE = {"multiprocessors": 4}
LIMITS = {
    "gated, parts": {"_LEAST_CHUNKS": 1},
    "linear, both ways in parts": {"_LEAST_CHUNKS": 1},
    "gated, many channels": {"_MOST_CHANNELS": {"float32": 32}, "_WIDE_CHANNELS": 32},
}
DIM, V_DIM = 20, 36


def call(
    rule: str, length: int = 37, heads: tuple[int, int] = (2, 1), dim: int = DIM, v_dim: int = V_DIM,
    *, dtype: str = "f4", each_channel: bool = False, sequences: int = 0, **options: Any,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """Arrays and options of a rule, with a state before, in lengths that divide nothing."""
    rng = np.random.default_rng(4)
    q, k, v = (
        rng.standard_normal((h, length, n)) for h, n in ((heads[0], dim), (heads[1], dim), (heads[1], v_dim))
    )
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    lead = (sequences, heads[1]) if sequences else heads[1:]
    state = rng.standard_normal((*lead, dim, v_dim)).astype("f4")
    options |= {"rule": rule, "return_state": True, "state": state}
    if "gated" in rule:
        options["decay"] = -rng.uniform(0, 0.3, (heads[1], length, *([dim] if each_channel else []))).astype(
            "f4"
        )
    if "delta" in rule:
        options["beta"] = rng.uniform(0.2, 1, (heads[1], length)).astype("f4")
    if options.get("normalize"):
        options["state"] = state, rng.uniform(1, 2, (*lead, dim)).astype("f4")
    return [x.astype(dtype) for x in (q, k, v)], options


def with_nan() -> tuple[list[Any], dict[str, Any]]:
    (q, k, v), options = call("gated_delta")
    k[0, 36, 3], v[0, 35, 1] = np.inf, np.nan
    return [q, k, v], options


POSITIVE = {"feature_map": "elu+1", "normalize": True}
# Arrays and options.
CALLS = {
    "gated delta": lambda: call("gated_delta", each_channel=True),
    "gated": lambda: call("gated", **POSITIVE),
    "linear, float16": lambda: call("linear", dtype="f2"),
    "delta, packed": lambda: call("delta", heads=(2, 2), v_dim=5, sequences=3, cu_seqlens=[0, 33, 33, 37]),
    "linear, both ways": lambda: call("linear", causal=False, **POSITIVE),
    "gated delta, nan": with_nan,
    "gated, parts": lambda: call("gated", 70, v_dim=5, each_channel=True, **POSITIVE),
    "linear, both ways in parts": lambda: call("linear", 70, v_dim=5, causal=False, **POSITIVE),
    "gated, many channels": lambda: call("gated", 34, dim=40, each_channel=True, **POSITIVE),
}  # fmt: skip


def perform(name: str, backend: str, *, wide: bool = False) -> tuple[Any, ...]:
    """Result, state and normalizer of a call; `wide` is in float64."""

    def widened(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(widened, x))
        return x.astype("f8") if wide and isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    arrays, options = CALLS[name]()
    options = {key: widened(x) for key, x in options.items()}
    out, state = aa.linear_attention(*map(widened, arrays), **options, backend=backend)
    return (out, *state) if isinstance(state, tuple) else (out, state)


def references() -> dict[str, Any]:
    """Results of the reference in float64, by call."""
    return {name: perform(name, "reference", wide=True) for name in CALLS}


def different(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether some result is not that of the reference; NaN and infinities are one."""
    limits = [2e-3 if x.dtype == np.float16 else 1e-5 for x in found]
    numbers = [[np.where(np.isfinite(x), x, np.nan) for x in results] for results in (found, wanted)]
    return any(
        not np.allclose(x, y, rtol=limit, atol=limit, equal_nan=True)
        for x, y, limit in zip(*numbers, limits, strict=True)
    )


MUTANTS = tuple(Mutant(*parts) for parts in (
    ("a chunk comes before all are done with the last", "linear, float16",
     "        __syncthreads();\n        if (!WIDE) load_keys", "        if (!WIDE) load_keys", "races"),
    ("no barrier after a chunk has come", "linear, float16",
     "        __syncthreads();\n        if (DELTA) correct", "        if (DELTA) correct", "races"),
    ("the state moves on while rows read it", "gated delta",
     "            __syncthreads();\n            if (CHANNELS || NORMALIZE) {",
     "            if (CHANNELS || NORMALIZE) {", "races"),
    ("keys are read while they fade", "gated delta",
     "fade_keys(m, count);\n                __syncthreads();", "fade_keys(m, count);", "races"),
    ("solved before all weights are there", "gated delta", "    __syncthreads();\n    solve(m);",
     "    solve(m);", "races"),
    ("read before it is solved", "gated delta", "    solve(m);\n    __syncthreads();", "    solve(m);",
     "races"),
    ("weights are read before they are there", "linear, float16",
     "weigh<false>(m, 1, channel > 0);\n            __syncwarp();", "weigh<false>(m, 1, channel > 0);",
     "races"),
    ("the next head's rows come too early", "linear, float16",
     "            __syncwarp();\n            load_rows<HEAD_DIM, PITCH>(\n                m.rows",
     "            load_rows<HEAD_DIM, PITCH>(\n                m.rows", "races"),
    ("rows without padding", "linear, float16", "PITCH = HEAD_DIM + PARTS * VECTOR", "PITCH = HEAD_DIM",
     "bank conflicts"),
    ("weights without padding", "linear, float16", "WEIGHT_PITCH = BLOCK_ROWS + VECTOR",
     "WEIGHT_PITCH = BLOCK_ROWS", "bank conflicts"),
    ("the decay of the token before", "gated delta", "m.factors + s * HEAD_DIM",
     "m.factors + (s ? s - 1 : 0) * HEAD_DIM", "wrong"),
    ("a key fades by its own decay", "gated", "const Real key = m.keys[t * PITCH + d] * left;",
     "const Real key = m.keys[t * PITCH + d] * left * factor_of(m, t, d);", "wrong"),
    ("the state does not fade", "gated", "if (CHANNELS) sum[n].x[c] *= m.kept[d + n];", ";", "wrong"),
    ("the normalizer does not fade", "gated", "m.z[d] * left + sum", "m.z[d] + sum", "wrong"),
    ("no normalizer", "gated", "NORMALIZE ? m.totals[row] : Real(1)", "Real(1)", "wrong"),
    ("keys of the chunk are not in the total", "gated", "+ total + reading", "+ reading", "wrong"),
    ("features of channels that are not there", "gated", "r < count && d < dim ? value_of",
     "r < count ? value_of", "beyond global memory"),
    ("a chunk ends too early", "linear, float16", "min(BLOCK_ROWS, strand.keys - first)",
     "min(BLOCK_ROWS, strand.keys - first - 1)", "wrong"),
    ("rows past the last are stored", "linear, float16", "if (row >= count || column", "if (column",
     "beyond global memory"),
    ("no state before", "linear, float16", "bool there = state && channel", "bool there = false && channel",
     "wrong"),
    ("a token does not see itself", "linear, float16", "s < row : s <= row", "s < row : s < row", "wrong"),
    ("heads in the other order", "linear, float16", "strand.q + head * a.q_head",
     "strand.q + (a.group_size - 1 - head) * a.q_head", "wrong"),
    ("rows of the result as far apart as queries", "linear, float16", "(first + row) * a.out_row",
     "(first + row) * a.q_row", "races"),
    ("columns of all blocks at the first", "linear, float16",
     "column = blockIdx.y * BLOCK_COLUMNS + own_column();", "column = own_column();", "races"),
    ("one normalizer for all blocks", "gated", "blockIdx.y * a.z_columns", "0", "races"),
    ("solved from the last row to the first", "gated delta", "for (int t = s + 1; t < BLOCK_ROWS; ++t)",
     "for (int t = BLOCK_ROWS - 1; t > s; --t)", "wrong"),
    ("weights of the delta rule without beta", "gated delta",
     "weigh<true>(m, m.betas[warp_row() + threadIdx.x % 32 / PARTS], ", "weigh<true>(m, 1, ", "wrong"),
    ("what is recalled is added", "gated delta", "value.x[c] - recalled[r].x[c]",
     "value.x[c] + recalled[r].x[c]", "wrong"),
    ("all sequences begin at the first token", "delta, packed", "* a.k_head + first * a.k_row", "* a.k_head",
     "wrong"),
    ("states of all heads are one", "delta, packed", "* a.num_kv_heads + strand.head;", "* a.num_kv_heads;",
     "races"),
    ("rows of the last chunk are left out", "linear, both ways", "first < strand.rows; first",
     "first < strand.rows - BLOCK_ROWS; first", "wrong"),
    ("later values are multiplied by 0", "gated delta, nan", "if (s + e <= own_row() + r)\n", "\n", "wrong"),
    ("parts keep all of the state", "gated, parts", "((const Real*)a.kept)[row] * state + own", "state + own",
     "wrong"),
    ("a part begins with its own state", "gated, parts", "    part[row * width + place] = state;\n", "",
     "wrong"),
    ("the last part ends with the others", "gated, parts", "min(first + a.part_len, (long long)a.k_len)",
     "first + a.part_len", "beyond global memory"),
    ("parts of rows read what is before them", "linear, both ways in parts",
     "    if (!CAUSAL)\n        for (int n", "    if (false)\n        for (int n", "wrong"),
    ("keys go by once more with rows", "linear, both ways in parts", "a.rows_alone ? 0 : end - first",
     "end - first", "wrong"),
    ("weights of the last channels alone", "gated, many channels", "more ? weights[s] + weight : weight",
     "weight", "wrong"),
    ("the state comes before all have stored theirs", "gated, many channels",
     "        __syncthreads();\n        if (keys)", "        if (keys)", "races"),
    ("keys of the first channels", "gated, many channels", "channel * a.k_step", "0", "wrong"),
))  # fmt: skip

# Names of mutants above: the sanitizer that the program has, and a part of what is said.
ON_THE_HOST = {
    "rows past the last are stored": ("address", "AddressSanitizer: "),
    "features of channels that are not there": ("address", "AddressSanitizer: "),
    "solved from the last row to the first": ("address", "wrong"),
    "no barrier after a chunk has come": ("thread", "data race"),
    "one normalizer for all blocks": ("thread", "data race"),
}
