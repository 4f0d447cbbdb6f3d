"""What the threads of `threads` run: the compiled life of a worker, and the call that hands it a task.

The pool is one block of memory: a head and as much for each worker. Each worker's part has a state that one
side at a time may change:

    ABSENT -worker-> IDLE -caller-> CLAIMED -caller-> READY -worker-> RUNNING -worker-> DONE -caller-> IDLE
                                                      READY -caller-> IDLE  (taken back, was not begun)

Who waits for a state spins shortly and then sleeps on the worker's condition variable; at once if it runs on
the processor of the one it waits for, which a machine with other work brings about: the spin would keep that
one from running (50 µs lost of each call, measured). The C library's functions are called by addresses that
the head holds, so that one that is missing is found beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
from numba import njit

from anyattn_numba.atomics import (
    call_c0,
    call_c1,
    call_c2,
    compare_exchange,
    exchange,
    invoke,
    load,
    pause,
    store,
)
from anyattn_numba.parts import PartCompiler, TaskCompiler

__all__ = ["OPTIONS", "call", "launch", "serve"]

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(pipeline_class=TaskCompiler, **OPTIONS)(function)


def _part(function: Callable[..., Any]) -> Any:
    """A function that only compiled code calls."""
    options = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(pipeline_class=PartCompiler, **options)(function)


# Nanoseconds for which one waits awake: waking up costs a worker 30 to 60 µs.
SPIN, NO_SPIN = numpy.int64(50_000), numpy.int64(0)
# Pauses between two looks at the clock.
TURNS = 16
# In the place of the processor's number where it is not known: never the same for both.
OF_WORKER, OF_CALLER = numpy.int64(-1), numpy.int64(-2)

# The pool is one block of memory: a head and as much for each worker. Offsets in bytes; what different
# threads write lies in different cache lines.
PART = 512
COUNT = 0
CLOCK, CLOCK_ID, LOCK, UNLOCK, WAIT, BROADCAST, CPU = range(128, 184, 8)
STATE, FUNCTION, ARGUMENTS, WORKER, STATUS, NEXT, CALLER_CPU, WORKER_CPU = range(0, 64, 8)
WORKER_SLEEPS, CALLER_SLEEPS = 128, 192  # each a flag, and a place for the time at TIME beyond it
TIME = 16
MUTEX, CONDITION = 256, 384

# States of a worker's part: the worker sets IDLE once, RUNNING and DONE, a caller the others. What is handed
# on has one type: Numba compiles a function anew for a literal.
ABSENT, IDLE, CLAIMED, READY, RUNNING, DONE = map(numpy.int64, range(6))


@_part
def now(pool: int, place: int) -> int:
    """Nanoseconds of a steady clock, by way of two words at a place."""
    call_c2(load(pool + CLOCK), load(pool + CLOCK_ID), place)
    nanoseconds: int = load(place) * 1_000_000_000 + load(place + 8)
    return nanoseconds


@_part
def cpu(pool: int, unknown: int) -> int:
    """The number of the processor on which this runs, or `unknown`, by which caller and worker differ."""
    function = load(pool + CPU)
    number: int = unknown if function == 0 else call_c0(function)
    return number


@_part
def wake(pool: int, worker: int) -> None:
    """Wake who sleeps at a worker's part, after its state or the pool's was set."""
    # Who is about to sleep holds the lock until it sleeps.
    call_c1(load(pool + LOCK), worker + MUTEX)
    call_c1(load(pool + UNLOCK), worker + MUTEX)
    call_c1(load(pool + BROADCAST), worker + CONDITION)


@_part
def wait(pool: int, worker: int, state: int, sleeps: int, spin: int) -> None:
    """Wait until a worker's part is in a state; awake for `spin` nanoseconds."""
    end = -1
    while spin > 0:
        for _ in range(TURNS):
            if load(worker + STATE) == state:
                return
            pause()
        time = now(pool, sleeps + TIME)
        if end < 0:
            end = time + spin
        elif time > end:
            break
    call_c1(load(pool + LOCK), worker + MUTEX)
    # Sequentially consistent, as is the setting of the state: one of both sees the other's.
    exchange(sleeps, 1)
    while load(worker + STATE) != state:
        call_c2(load(pool + WAIT), worker + CONDITION, worker + MUTEX)
    store(sleeps, 0)
    call_c1(load(pool + UNLOCK), worker + MUTEX)


@_compiled
def serve(pool: int, worker: int) -> None:
    """Run tasks for ever: the life of a worker.

    It never goes back to Python, and so never into an interpreter that ends.
    """
    store(worker + STATE, IDLE)
    spin = SPIN
    while True:
        wait(pool, worker, READY, worker + WORKER_SLEEPS, spin)
        if compare_exchange(worker + STATE, READY, RUNNING):
            caller_cpu = load(worker + CALLER_CPU)
            store(worker + WORKER_CPU, cpu(pool, OF_WORKER))
            status = invoke(load(worker + FUNCTION), load(worker + ARGUMENTS), load(worker + WORKER))
            store(worker + STATUS, status)
            spin = NO_SPIN if cpu(pool, OF_WORKER) == caller_cpu else SPIN
            exchange(worker + STATE, DONE)
            if load(worker + CALLER_SLEEPS) != 0:
                wake(pool, worker)


@_compiled
def launch(pool: int, function: int, arguments: int, threads: int) -> int:
    """Call a task here and on up to `threads - 1` idle workers; the first status that is not 0."""
    claimed = 0
    number = 1
    worker = pool
    for _ in range(load(pool + COUNT)):
        worker += PART
        if load(worker + STATE) == IDLE and compare_exchange(worker + STATE, IDLE, CLAIMED):
            store(worker + FUNCTION, function)
            store(worker + ARGUMENTS, arguments)
            store(worker + WORKER, number)
            store(worker + NEXT, claimed)
            store(worker + CALLER_CPU, cpu(pool, OF_CALLER))
            exchange(worker + STATE, READY)
            if load(worker + WORKER_SLEEPS) != 0:
                wake(pool, worker)
            claimed = worker
            number += 1
            if number == threads:
                break
    status: int = invoke(function, arguments, 0)
    while claimed != 0:
        worker = claimed
        claimed = load(worker + NEXT)
        # What did not begin will find nothing to do.
        if not compare_exchange(worker + STATE, READY, IDLE):
            spin = NO_SPIN if load(worker + WORKER_CPU) == cpu(pool, OF_CALLER) else SPIN
            wait(pool, worker, DONE, worker + CALLER_SLEEPS, spin)
            if status == 0:
                status = load(worker + STATUS)
            store(worker + STATE, IDLE)
    return status


@_compiled
def call(function: int, arguments: int, worker: int) -> int:
    """Call a task on this thread only."""
    status: int = invoke(function, arguments, worker)
    return status
