"""Defects planted in the kernels and their launch: where, what, and what is to notice.

A mutant is a replacement of text that occurs once in the source that is compiled. `case` names the call of
`CALLS` that is run on it, `caught` a part of what the interpreter must then say, or "wrong" of a result.
`ON_THE_HOST` names what must also be noticed by the program that g++ makes of the kernel, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import anyattn as aa
from anyattn import masks

__all__ = [
    "CALLS",
    "HOST_ALONE",
    "MUTANTS",
    "ON_THE_HOST",
    "Mutant",
    "arguments",
    "conflict",
    "device_for",
    "different",
    "references",
    "said_of",
]

# Of the result; the logarithm of the sum is float32 always.
TOLERANCE = {"float16": 2e-3, "float32": 3e-6}


def tensors(dtype, batch=1, q_len=70, k_len=150, heads=(2, 1)):
    """Lengths that divide nothing, and query heads that share those of the keys."""
    rng = np.random.default_rng(2)
    shapes = ((batch, heads[0], q_len, 24), (batch, heads[1], k_len, 24), (batch, heads[1], k_len, 40))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def with_nan(dtype):
    q, k, v = tensors(dtype)
    k[..., 100, 3] = v[..., 100, 3] = v[..., 149, 0] = np.nan
    return q, k, v


def int8_rows(dtype):
    """Keys and values that a cache of int8 holds exactly, with a scale for each token and head."""
    q, *others = tensors(dtype, 2, 20, 150, (4, 2))
    rng = np.random.default_rng(3)
    for x in others:
        numbers = np.clip(np.round(60 * x), -127, 127)
        numbers[..., 0] = 127
        x[...] = numbers * 2.0 ** rng.integers(-8, -4, (*x.shape[:-1], 1))
    return q, *others


def more_channels():
    """More than a tile holds; scores of usual size."""
    q, k, v = (np.tile(x[..., :20, :], 12)[..., :260] for x in tensors("f4"))
    return q / 8, k, v


# Arrays and options, by a name that begins with the dtype; of int8, keys and values go into a cache.
CALLS = {
    "float16": lambda: (tensors("f2"), {}),
    "float16 causal": lambda: (tensors("f2"), {"causal": True}),
    "float16 bias": lambda: (
        tensors("f2"),
        {"bias": np.linspace(-1, 1, 70 * 150, dtype="f4").reshape(70, 150)},
    ),
    "float16 nan": lambda: (with_nan("f2"), {"causal": True}),
    "float16 batch": lambda: (tensors("f2", 2), {}),
    "float16 gathered": lambda: (tensors("f2"), {"mask": masks.fixed(40, 2) & masks.sliding_window(50)}),
    "float16 packed": lambda: (tensors("f2", 1, 3, 70, (6, 2)), {"causal": True}),
    "float16 parts": lambda: (tensors("f2", 2, 2, 600), {"sinks": [3.0, 4.0]}),
    "float16 parts of nothing": lambda: (
        tensors("f2", 1, 2, 600),
        {"sinks": [np.inf, 0.0], "mask": np.array([[True], [False]]) & np.ones(600, bool)},
    ),
    "float16 dropout": lambda: (
        tensors("f2"),
        {"dropout": 0.4, "dropout_seed": 3, "mask": masks.fixed(40, 2) & masks.sliding_window(50)},
    ),
    "float16 int8": lambda: (int8_rows("f2"), {"causal": True}),
    "float16 on 9.0": lambda: (tensors("f2", k_len=260), {}),
    "float16 on 7.5": lambda: (tensors("f2"), {"causal": True}),
    "float32": lambda: (tensors("f4"), {}),
    "float32 causal": lambda: (tensors("f4"), {"causal": True}),
    "float32 sinks": lambda: (tensors("f4"), {"sinks": [0.5, -1.0]}),
    "float32 int8": lambda: (int8_rows("f4"), {"causal": True}),
    "float32 wide": lambda: (more_channels(), {"causal": True}),
    "float32 empty rows": lambda: (tensors("f4"), {"causal": True, "q_offset": -30}),
}


def device_for(name: str) -> dict[str, int]:
    """The device that a call is for."""
    capability = next((number for version, number in (("7.5", 75), ("9.0", 90)) if version in name), 80)
    return {"capability": capability, "multiprocessors": 8 if "parts" in name else 1}


def arguments(name: str, dtype: str | None = None) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call of `attention`, in a dtype of their own or another, and its options."""
    arrays, options = CALLS[name]()
    q, k, v = arrays if dtype is None else [x.astype(dtype) for x in arrays]
    given = [q, aa.KVCache(k, v, quantize="int8")] if "int8" in name else [q, k, v]
    return given, {**options, "return_lse": True}


def references() -> dict[str, Any]:
    """Results of the reference in float64, by call."""
    found = {}
    for name in CALLS:
        given, options = arguments(name, "f8")
        found[name] = aa.attention(*given, **options, backend="reference")
    return found


def different(found: Any, wanted: Any, dtype: Any) -> bool:
    """Whether a result and its lse are not those of the reference."""
    limits = TOLERANCE[str(dtype)], TOLERANCE["float32"]
    return any(
        not np.allclose(x, y, rtol=limit, atol=limit, equal_nan=True)
        for x, y, limit in zip(found, wanted, limits, strict=True)
    )


@dataclass(frozen=True)
class Mutant:
    """One planted defect."""

    what: str
    case: str
    old: str
    new: str
    caught: str


def said_of(mutant: Mutant, complaint: Callable[[Callable[[str], str]], str]) -> str:
    """What `complaint` says of a call where the mutant is planted, once, by what it gets."""
    planted = []

    def change(source: str) -> str:
        # A call in parts has two sources.
        planted.append(source.count(mutant.old))
        return source.replace(mutant.old, mutant.new)

    said = complaint(change)
    assert sum(planted) == 1, f"{mutant.old!r} occurs {sum(planted)} times"
    return said


def conflict(machine: Any, files: Sequence[str], kinds: Sequence[str] = ("load", "store")) -> str:
    """Where a launch meets more bank conflicts in some files than it must, in words; empty for nowhere."""
    for (where, space, how), traffic in machine.traffic.items():
        if space != "shared" or how not in kinds or not any(file in where for file in files):
            continue
        # Rows that are no power of two long do not come in without any conflict.
        if traffic.taken > traffic.least * (1 if how == "load" else 2):
            return f"bank conflicts at {where}"
    return ""


def _mma(what: str, old: str, new: str, caught: str, case: str = "float16") -> Mutant:
    return Mutant(what, case, old, new, caught)


def _fma(what: str, old: str, new: str, caught: str, case: str = "float32") -> Mutant:
    return Mutant(what, case, old, new, caught)


MUTANTS = (
    _mma("no wait for copies", "        wait_for_groups<STAGES - 2>();", "", "has not been waited for"),
    _mma("a wait that is one group short", "wait_for_groups<STAGES - 2>()", "wait_for_groups<STAGES - 1>()",
         "has not been waited for"),
    _mma("groups are not ended", 'asm volatile("cp.async.commit_group;" ::: "memory");', "",
         "has not been waited for"),
    _mma("no barrier after the wait", "        __syncthreads();\n        begin_tile",
         "        begin_tile", "races"),
    _mma("barrier in a branch", "        __syncthreads();\n        begin_tile",
         "        if (item.first_row + 16 * warp < a.q_len) __syncthreads();\n        begin_tile",
         "races"),
    _mma("the next tile goes where this one lies", "begin_tile(stage ? stage - 1 : STAGES - 1)",
         "begin_tile(stage)",
         "has not been waited for"),
    _mma("stage does not turn", "stage = stage + 1 < STAGES ? stage + 1 : 0;", "", "wrong"),
    _mma("swizzle of the reader alone",
         "load_matrices(key, at<PITCH>(keys, 8 * n + lane / 16 * 8 + lane % 8,",
         "load_matrices(key, at<PITCH>(keys, 8 * n + lane / 16 * 8 + (lane ^ 1) % 8,", "wrong"),
    _mma("no swizzle", "(vector ^ (row & 7)) * VECTOR", "vector * VECTOR", "bank conflicts"),
    _mma("half a swizzle", "(vector ^ (row & 7)) * VECTOR", "(vector ^ (row & 3)) * VECTOR",
         "bank conflicts"),
    _mma("lanes 16 to 31 read the same rows of keys", "8 * n + lane / 16 * 8 + lane % 8",
         "8 * n + lane % 8", "wrong"),
    _mma("key fragments swapped", "multiply(weight[n], query, key[0], key[1]);",
         "multiply(weight[n], query, key[1], key[0]);", "wrong"),
    _mma("query fragments of another warp", "at<PITCH>(queries, 16 * warp + lane % 16,",
         "at<PITCH>(queries, lane % 16,", "wrong"),
    _mma("weights of rows g and g + 8 swapped",
         "pair_of(weight[n][0], weight[n][1]), pair_of(weight[n][2], weight[n][3]),",
         "pair_of(weight[n][2], weight[n][3]), pair_of(weight[n][0], weight[n][1]),", "wrong"),
    _mma("halves of a pair swapped", "pair_of(weight[n + 1][0], weight[n + 1][1])",
         "pair_of(weight[n + 1][1], weight[n + 1][0])", "wrong"),
    _mma("values not transposed", "load_transposed(value,", "load_matrices(value,", "wrong"),
    _mma("a shuffle of a maximum is missing",
         "            now = larger(__shfl_xor_sync(~0u, now, 2), now);\n", "",
         "wrong"),
    _mma("a shuffle in a branch", "now = larger(__shfl_xor_sync(~0u, now, 1), now);",
         "if (row.row < a.q_len - 1) now = larger(__shfl_xor_sync(~0u, now, 1), now);", "elsewhere"),
    _mma("sums are not scaled to the new maximum", "sum[m][2 * half + e] *= scaled;", ";", "wrong"),
    _mma("the maximum is stale", "            top[half] = now;\n", "", "wrong"),
    _mma("the total is not scaled", "total[half] * scaled + part", "total[half] + part", "wrong"),
    _mma("scale is left out", "score *= float(a.scale);", "", "wrong"),
    _mma("keys past the last are seen", "if (place >= count || (masked", "if ((masked", "wrong"),
    _mma("one key past the last is seen", "if (place >= count || (masked", "if (place > count || (masked",
         "wrong"),
    _mma("the mask is not asked", "masked && !is_seen(c", "!masked && !is_seen(c", "wrong", "float16 causal"),
    _mma("rows are not clamped for the mask",
         "min(item.first_row + 16 * warp + group + 8 * half, a.rows - 1)",
         "item.first_row + 16 * warp + group + 8 * half", "beyond global memory", "float16 bias"),
    _mma("one row past the last is stored", "if (number >= a.rows) continue;",
         "if (number > a.rows) continue;",
         "beyond global memory"),
    _mma("one row past the last is read", "if (number >= a.rows) return {false, 0};",
         "if (number > a.rows) return {false, 0};",
         "beyond global memory"),
    _mma("one column past the last is stored", "if (8 * m + pair + e < a.v_head_dim)",
         "if (8 * m + pair + e <= a.v_head_dim)", "beyond global memory"),
    _mma("keys with the stride of values", "item.k, a.k_row", "item.k, a.v_row",
         "beyond global memory"),
    _mma("hidden values count", "if (!(first < 0)) sum[m][e] += first * value;",
         "sum[m][e] += first * value;",
         "wrong", "float16 nan"),
    _mma("odd values are not looked for", "strict = __syncthreads_or(odd);", "strict = false;", "wrong",
         "float16 nan"),
    _mma("weights of the strict path go over another warp's", "keys + 16 * warp * BLOCK_KEYS, lane",
         "keys, lane", "races", "float16 nan"),
    _mma("keys are read after they were given up", "strict = __syncthreads_or(odd);",
         "strict = __any_sync(~0u, odd);", "races", "float16 nan"),
    _mma("key heads are query heads", "item.kv_head = item.head / a.group_size;", "item.kv_head = item.head;",
         "beyond global memory"),
    _mma("blocks overlap", "item.first_row = block * BLOCK_ROWS;",
         "item.first_row = block * (BLOCK_ROWS - 16);",
         "races"),
    _mma("heads in another order", "item.batch = of_head / heads;", "item.batch = 0;", "races",
         "float16 batch"),
    _mma("gathered columns begin at 0", "a.columns[first + place]", "a.columns[place]", "wrong",
         "float16 gathered"),
    _mma("a span ends too early", "if (first < end) continue;",
         "if (first + BLOCK_KEYS <= end) continue;", "wrong"),
    _mma("a group has one head", "* (PACKED ? a.group_size : 1);", ";", "races", "float16 packed"),
    _mma("packed rows are those of one head", "return {item.head + number / a.q_len, number % a.q_len};",
         "return {item.head, number % a.q_len};", "races", "float16 packed"),
    _mma("every part has all keys", "{ skip(a, item, a.parts); }", "{ skip(a, item, 1); }", "wrong",
         "float16 parts"),
    _mma("parts begin at one key", "    tile.skip(a, item, item.part);\n", "", "wrong", "float16 parts"),
    _mma("a sink in every part", "a.parts > 1 ? -INFINITE : sink_of(a, row.head)", "sink_of(a, row.head)",
         "wrong", "float16 parts"),
    Mutant("no sink in parts", "float16 parts", "Real all = exp(sink - base);", "Real all = 0;", "wrong"),
    Mutant("an infinite sink in parts of nothing", "float16 parts of nothing",
           "element_of(empty ? Real(0) : sum / all)", "element_of(sum / all)", "wrong"),
    _mma("parts lie on each other", "        ((Real*)a.part_out)[(head * a.q_len + row.row)",
         "        ((Real*)a.part_out)[(row.head * a.q_len + row.row)", "races", "float16 parts"),
    _fma("no barrier before loading", "        __syncthreads();\n        if (WIDE)", "        if (WIDE)",
         "races"),
    _fma("no barrier after loading", "load_more();\n        __syncthreads();", "load_more();", "races"),
    _fma("no barrier of the warp", "        __syncwarp();\n", "", "races"),
    _fma("rows of keys without padding", "KEY_PITCH = HEAD_DIM + VECTOR", "KEY_PITCH = HEAD_DIM",
         "bank conflicts"),
    _fma("rows of weights without padding", "WEIGHT_PITCH = BLOCK_KEYS + 8", "WEIGHT_PITCH = BLOCK_KEYS",
         "bank conflicts"),
    _fma("a maximum over half of the lanes", "for (int lane = 1; lane < 8; lane *= 2) now",
         "for (int lane = 1; lane < 4; lane *= 2) now", "wrong"),
    _fma("a weight of another row", "weights + (row_group + 4 * r) * WEIGHT_PITCH + j",
         "weights + (4 * row_group + r) * WEIGHT_PITCH + j", "wrong"),
    _fma("sink joins unscaled by the maximum", "total[r] * scaled + exp(sink - base)",
         "total[r] * scaled + exp(sink)", "wrong", "float32 sinks"),
    _fma("lse without the maximum", ": base + log(all));", ": log(all));", "wrong"),
    _fma("a row that sees nothing divides by 0", "empty ? Real(0) : scaled / all", "scaled / all", "wrong",
         "float32 empty rows"),
    _fma("position is the row", "row + item.position;", "row;", "wrong", "float32 causal"),
    _mma("the sum is left out", "                    part += score;\n", "", "wrong", "float16 dropout"),
    _mma("dropout of places instead of keys", "= tile.key(a, min(8 * (n / 2) + pair + n % 2, count - 1));",
         "= 8 * (n / 2) + pair + n % 2;", "wrong", "float16 dropout"),
    _mma("dropout of a pair's first key", "kept >> (2 * n + e) & 1", "kept >> 2 * n & 1", "wrong",
         "float16 dropout"),
    _mma("what is left is not made larger", "scaled / all * float(a.kept_scale)", "scaled / all", "wrong",
         "float16 dropout"),
    _mma("dropout of one head", "program::keep(c, item.batch, row.head,", "program::keep(c, item.batch, 0,",
         "wrong", "float16 dropout"),
    _mma("three stages, of which two are waited for", "wait_for_groups<STAGES - 2>()", "wait_for_groups<2>()",
         "has not been waited for", "float16 on 9.0"),
    _mma("one tile more on its way than there is room for", "stage < STAGES - 1; ++stage) begin_tile",
         "stage < STAGES; ++stage) begin_tile", "has not been waited for", "float16 on 9.0"),
    _mma("halves of a key's channels swapped", '"r"(a[1]), "r"(b0));', '"r"(a[1]), "r"(b1));',
         "wrong", "float16 on 7.5"),
    _mma("one half of the channels twice", '"r"(a[2]), "r"(a[3]), "r"(b1));',
         '"r"(a[0]), "r"(a[1]), "r"(b1));', "wrong", "float16 on 7.5"),
    _mma("copies without zeros", "there ? *(const uint4*)from : make_uint4(0, 0, 0, 0)",
         "*(const uint4*)from", "wrong", "float16 on 7.5"),
    _fma("the first channels alone", "first < (WIDE ? a.head_dim : 1)", "first < 1",
         "wrong", "float32 wide"),
    _fma("queries of the first channels", "a.q_step, first, a.head_dim, query",
         "a.q_step, 0, a.head_dim, query", "wrong", "float32 wide"),
    _fma("columns of all ranges at the first", "const int column = first_column + (8",
         "const int column = (8", "races", "float32 wide"),
    _fma("every range has an lse", "if (key_group == 0 && first_column == 0) store_lse",
         "if (key_group == 0) store_lse", "races", "float32 wide"),
    _mma("values with the scales of keys", "item.v, a.v_row, item.v_scales, a.v_scales_row",
         "item.v, a.v_row, item.k_scales, a.k_scales_row", "wrong", "float16 int8"),
    _mma("scales of places instead of keys", "scales[number * scale_stride]", "scales[place * scale_stride]",
         "wrong", "float16 int8"),
    _mma("scales of the first head", "a.k_scales + item.kv_head * a.k_scales_head", "a.k_scales", "wrong",
         "float16 int8"),
    _mma("scales of the first batch entry", "item.v_scales += index * a.v_scales_batch[axis];", "", "wrong",
         "float16 int8"),
    _fma("numbers without a sign", "return Real(number) * Real(scale);",
         "return Real((unsigned char)number) * Real(scale);", "wrong", "float32 int8"),
    _fma("scales with the stride of keys", "item.k_scales, a.k_scales_row", "item.k_scales, a.k_row",
         "beyond global memory", "float32 int8"),
    Mutant("parts weigh the same", "float16 parts", "sum += exp(lse[part * rows] - base) * out",
         "sum += out", "wrong"),
    Mutant("lse of parts is that of the last", "float16 parts", ": base + log(all);", ": base;", "wrong"),
)  # fmt: skip

# Names of mutants above: the sanitizer that the program has, and a part of what is said.
ON_THE_HOST = {
    "no wait for copies": ("address", "wrong"),
    "barrier in a branch": ("address", "waits for threads that never come"),
    "a shuffle in a branch": ("address", "lanes of the warp are elsewhere"),
    "query fragments of another warp": ("address", "wrong"),
    "key fragments swapped": ("address", "wrong"),
    "values not transposed": ("address", "wrong"),
    "rows are not clamped for the mask": ("address", "AddressSanitizer: "),
    "one row past the last is stored": ("address", "AddressSanitizer: "),
    "key heads are query heads": ("address", "AddressSanitizer: "),
    "no barrier after the wait": ("thread", "data race"),
    "weights of the strict path go over another warp's": ("thread", "data race"),
    "blocks overlap": ("thread", "data race"),
    "parts lie on each other": ("thread", "data race"),
    "no barrier after loading": ("thread", "data race"),
    "no barrier of the warp": ("thread", "data race"),
}

# Planted for the sanitizers alone: mostly what C++ leaves undefined.
HOST_ALONE = (
    _fma("rows of keys at odd words", "KEY_PITCH = HEAD_DIM + VECTOR", "KEY_PITCH = HEAD_DIM + 1",
         "misaligned address"),
    _fma("a score beyond those of a lane", "score[r][m] = hidden[m]", "score[r][m + 1] = hidden[m]",
         "out of bounds"),
    _fma("values begin too far on", "keys + BLOCK_KEYS * KEY_PITCH;",
         "keys + BLOCK_KEYS * KEY_PITCH + 4096;", "heap-buffer-overflow"),
    _mma("a shift by more bits than there are", "1u << (2 * n + e);", "1u << (2 * n + e + 32);",
         "shift exponent"),
)  # fmt: skip
