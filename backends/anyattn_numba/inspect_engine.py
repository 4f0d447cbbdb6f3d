"""`attention_weights` and `attention_stats`: what their kernels are given besides a call's argument block."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy

from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.schedule import MASKED, Spans
from anyattn_numba import arguments as a
from anyattn_numba.engine import run, scratch
from anyattn_numba.hostarrays import address_of, as_numpy, empty_like, from_numpy
from anyattn_numba.kernels import kernel_address, shape_for
from anyattn_numba.target import Shape
from anyattn_numba.template import Template, put_work
from anyattn_numba.thread_count import thread_count
from anyattn_numba.work import Work, threads_for

__all__ = ["stats", "weights"]

NDArray = numpy.ndarray[Any, Any]

# Runs that each thread finds on average, so that all end together.
_RUNS_OF_THREAD = 4


def weights(call: AttentionCall) -> Array:
    """Softmax weights (..., Hq, R, Lk) of a call of "weights", in the dtype of the call."""
    shape = shape_for(call.accumulate)
    rows = None
    if call.rows is not None:
        rows = numpy.ascontiguousarray(as_numpy(call.rows, call.library), numpy.int64)
    q, k = (as_numpy(x, call.library) for x in (call.q, call.k))
    num_rows = call.q_len if rows is None else len(rows)
    result = (*call.batch_shape, call.num_heads, num_rows, call.k_len)
    out = _zeros(q.dtype, result, call.library, needed=call.visible is not None)
    template = Template(call, shape, {"Q": q, "K": k, "OUT": out}, lasting=False)
    case = template.case(call.others, 1)
    work = case.work if rows is None or call.visible is None else _all_masked(call, case.work)
    block = _block_of(case.block, work, {a.Q: q, a.K: k, a.OUT: out})
    block[a.Q_LEN // 8] = num_rows
    block[a.ROWS // 8] = 0 if rows is None else address_of(rows)
    held = template.put_others(block, call.others)
    _add_rooms(block, shape)
    _run("weights", call, block, _threads_for(call, work, len(work.items)))
    del held
    return from_numpy(out, call.q, call.library)


def stats(call: AttentionCall) -> dict[str, Array]:
    """The statistics that a call of "stats" asks for, in the accumulation dtype."""
    shape = shape_for(call.accumulate)
    q, k = (as_numpy(x, call.library) for x in (call.q, call.k))
    template = Template(call, shape, {"Q": q, "K": k}, lasting=False)
    case = template.case(call.others, 1)
    number = _threads_for(call, case.work, len(case.work.items))
    work, runs, parts = _runs(call, case.work, number)
    kind = numpy.dtype(call.accumulate)
    heads = (*call.batch_shape, call.num_heads)
    entropy, peak = (empty_like(kind, (*heads, call.q_len), False, call.library) for _ in range(2))
    mass = numpy.zeros((math.prod(heads), parts, call.k_len), kind)
    block = _block_of(case.block, work, {a.Q: q, a.K: k})
    held = template.put_others(block, call.others)
    found = {"key_mass": mass, "entropy": entropy, "max": peak}
    for name, place in (("key_mass", a.KEY_MASS), ("entropy", a.ENTROPY), ("max", a.PEAK)):
        block[place // 8] = address_of(found[name]) if name in call.stats else 0
    block[a.NUM_RUNS // 8] = len(runs)
    block[a.RUNS // 8] = address_of(runs)
    _add_rooms(block, shape)
    _run("stats", call, block, min(number, max(len(runs), 1)))
    del held
    # One part after another: NumPy adds along an axis that is not the last in this order.
    found["key_mass"] = (mass[:, 0] if parts == 1 else mass.sum(axis=1)).reshape(*heads, call.k_len)
    return {name: from_numpy(found[name], call.q, call.library) for name in call.stats}


def _all_masked(call: AttentionCall, work: Work) -> Work:
    """Every key is looked at: what decides is said of all rows, and rows that are asked for are few."""
    items = work.items.copy()
    items[:, a.ITEM_LINE // 8] = 0
    spans = Spans(
        starts=numpy.array([0, 1]),
        ends=numpy.array([[0, call.k_len]]),
        kinds=numpy.array([MASKED], numpy.uint8),
        columns=numpy.zeros(0, numpy.int32),
        groups=numpy.zeros((math.prod(call.batch_shape), call.num_heads), numpy.int32),
        pairs=numpy.array([call.k_len]),
    )
    return replace(work, items=items, spans=spans)


def _runs(call: AttentionCall, work: Work, number: int) -> tuple[Work, NDArray, int]:
    """The work head by head and block by block, the runs (n, RUN_WORDS), and how many each head has.

    Which rows are added up in which order depends on the number of threads, but not on who takes what.
    """
    items = work.items
    order = numpy.lexsort((items[:, a.ITEM_FIRST // 8], items[:, a.ITEM_HEAD // 8], items[:, 0]))
    items = numpy.ascontiguousarray(items[order])
    heads = math.prod(call.batch_shape) * call.num_heads
    blocks = len(items) // max(heads, 1)
    parts = 1 if number == 1 else max(1, min(blocks, -(-_RUNS_OF_THREAD * number // max(heads, 1))))
    bounds = numpy.arange(heads)[:, None] * blocks + numpy.arange(parts + 1) * blocks // parts
    runs = numpy.empty((heads * parts, a.RUN_WORDS), numpy.int64)
    runs[:, a.RUN_FIRST // 8], runs[:, a.RUN_END // 8] = bounds[:, :-1].ravel(), bounds[:, 1:].ravel()
    runs[:, a.RUN_ROW // 8] = numpy.arange(heads * parts)
    if work.spans is not None:
        before = numpy.concatenate([[0], numpy.cumsum(work.spans.pairs[items[:, a.ITEM_LINE // 8]])])
        pairs = before[runs[:, a.RUN_END // 8]] - before[runs[:, a.RUN_FIRST // 8]]
        runs = numpy.ascontiguousarray(runs[numpy.argsort(-pairs, kind="stable")])
    return replace(work, items=items), runs, parts


def _zeros(dtype: Any, shape: tuple[int, ...], library: str, needed: bool) -> NDArray:
    """Memory for weights; zeros where kernels leave out hidden tiles."""
    if needed and library != "jax":
        return numpy.zeros(shape, dtype)
    out = empty_like(dtype, shape, False, library)
    if needed:
        out[...] = 0
    return out


def _block_of(template: NDArray, work: Work, tensors: dict[int, NDArray]) -> NDArray:
    """A block with other work, and with the addresses of arrays by their places."""
    block = template.copy()
    put_work(block, work)
    for place, x in tensors.items():
        block[place // 8] = address_of(x)
    return block


def _add_rooms(block: NDArray, shape: Shape) -> None:
    """Room in a thread's memory for the summary of the lanes and for a chunk of weights, transposed."""
    at = int(block[a.SCRATCH_SIZE // 8])
    lane_row = shape.queries * shape.itemsize
    for place, nbytes in ((a.AT_SUMMARY, 3 * lane_row), (a.AT_WEIGHTS, int(block[a.CHUNK // 8]) * lane_row)):
        block[place // 8] = at
        at += -(-nbytes // 64) * 64
    block[a.SCRATCH_SIZE // 8] = at


def _threads_for(call: AttentionCall, work: Work, pieces: int) -> int:
    """Threads for the two passes, which compute each product twice."""
    return threads_for(work, 2 * call.head_dim, thread_count(), pieces)


def _run(kernel: str, call: AttentionCall, block: NDArray, number: int) -> None:
    """Run a kernel on `number` threads."""
    block[a.COUNTER // 8] = 0
    block[a.SCRATCH // 8], room = scratch(int(block[a.SCRATCH_SIZE // 8]) * number)
    run(kernel_address(kernel, call.dtype), block, number)
    del room
