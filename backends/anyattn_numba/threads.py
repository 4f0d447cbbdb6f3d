"""Threads for compiled kernels: entered in microseconds, asleep when idle, safe to call from anywhere.

Numba's own threads cannot be used: its workqueue aborts the process when two Python threads launch at once,
its OpenMP layer aborts a forked child, and a pool of Python threads takes 100 µs to enter.

Here every worker is a Python daemon thread inside one compiled function, without the GIL. It waits for a task
with a short spin and then asleep on a condition variable of the C library. A caller claims workers that are
idle at that moment, runs its own share, takes back what no worker has begun, and waits for the others:

- several callers share the workers, and one that finds none goes on alone, as may a task that calls `run`;
- nobody waits for a worker that has not woken up;
- a forked child forgets the parent's workers and starts its own at its first use.

So a task is called by one to `threads` threads, once by each. It takes its work piece by piece with
`atomics.fetch_add` from a counter among its arguments, returns when nothing is left to take, and never waits
for another worker to come.

Without POSIX threads (Windows) a pool of Python threads does the same, more slowly.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy
from numba import types
from numba.core.compiler_lock import global_compiler_lock

from anyattn.forks import held_over_forks
from anyattn.kernels.cache import say, user_store
from anyattn.kernels.key import KernelKey, code_digest
from anyattn.kernels.numba_store import attach, numba_settings, numba_target, numba_versions
from anyattn_numba import atomics, parts, workers

__all__ = ["MOST_THREADS", "address", "run", "warm_up"]

MOST_THREADS = 1024
"""A call never gets more than these."""

# Functions of the C library, by the place in the pool's head that holds their address.
_FUNCTIONS = {
    workers.CLOCK: "clock_gettime",
    workers.LOCK: "pthread_mutex_lock",
    workers.UNLOCK: "pthread_mutex_unlock",
    workers.WAIT: "pthread_cond_wait",
    workers.BROADCAST: "pthread_cond_broadcast",
    workers.CPU: "sched_getcpu",
}
_OPTIONAL = {"sched_getcpu"}  # Linux has it


def address(dispatcher: Any) -> int:
    """The address under which `run` calls a compiled function, valid in this process.

    Parameters
    ----------
    dispatcher : numba dispatcher
        Of a function of two integers that returns one: the address of its arguments and the number of the
        worker to a status, 0 for fine. It is compiled, or loaded from its cache, if it was not.

    Raises
    ------
    TypeError
        If it returns something else.
    """
    with global_compiler_lock:
        dispatcher.compile(types.int64(types.int64, types.int64))
        result = dispatcher.overloads[types.int64, types.int64]
        # Another type where it was compiled before, by a call that said nothing about the result.
        returned = result.signature.return_type
        if getattr(returned, "literal_type", returned) != types.int64:
            raise TypeError(f"dispatcher: wanted int64 returned, {dispatcher.__name__} returns {returned}")
        found: int = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    if not found:
        raise TypeError(f"dispatcher: wanted a task, {dispatcher.__name__} is compiled with its callers only")
    _libraries[found] = result.library
    return found


def run(function: int, arguments: int, threads: int) -> int:
    """Call a task on this thread and on those of up to `threads - 1` idle workers.

    Parameters
    ----------
    function : int
        `address` of the task.
    arguments : int
        Handed to the task; what is there must outlive the call.
    threads : int
        1: the task is called and nothing else happens.

    Returns
    -------
    int
        0, or a status other than 0 that the task returned on some thread; `atomics.RAISED` where it raised.
    """
    if threads == 1:
        return _alone(function, arguments)
    if threads > _pool.threads:
        _pool.grow(threads)
    status: int = _pool.launch(_pool.place, function, arguments, threads)
    return status


def _alone(function: int, arguments: int) -> int:
    """Call a task on this thread. It has no need of a pool, which takes half a second to compile."""
    global _call
    if _call is None:
        _call = _compile(workers.call, 3)
    status: int = _call(function, arguments, 0)
    return status


def warm_up() -> None:
    """Compile what `run` needs, or load it from the cache."""
    _compile(workers.call, 3)
    _pool.grow(2)


class _Pool(Protocol):
    """What `run` asks of a pool: `grow` to more threads than `threads`, and `launch` with its `place`."""

    threads: int
    place: int
    launch: Any

    def grow(self, threads: int) -> None: ...


class _NativePool:
    """Workers that wait in compiled code."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.threads = 0
        self.place = 0
        self.launch: Any = workers.launch
        self._library = library
        self._lock = threading.Lock()
        self._workers: list[threading.Thread] = []
        self._words = numpy.empty(0, numpy.int64)

    def grow(self, threads: int) -> None:
        with self._lock:
            if self.place == 0:
                self._open()
            try:
                for number in range(len(self._workers) + 1, min(threads, MOST_THREADS)):
                    self._start(number)
            except RuntimeError as error:  # the system has no more threads, or the interpreter ends
                say(f"kernels run on {len(self._workers)} threads instead of {threads}: {error}")
            # As asked, so that nothing is tried again for each call.
            self.threads = max(self.threads, threads)

    def _open(self) -> None:
        self.launch = _compile(workers.launch, 4)
        _compile(workers.serve, 2)
        # The system gives memory when it is first touched. Workers may outlive this object, and even Python's
        # modules: it is never freed.
        words = numpy.zeros((MOST_THREADS + 1) * workers.PART // 8, numpy.int64)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(words))
        for offset, name in _FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is not None:
                words[offset // 8] = ctypes.cast(function, ctypes.c_void_p).value or 0
        words[workers.CLOCK_ID // 8] = time.CLOCK_MONOTONIC
        self._words = words
        self.place = words.ctypes.data

    def _start(self, number: int) -> None:
        part = self.place + number * workers.PART
        for name, offset in (("mutex", workers.MUTEX), ("cond", workers.CONDITION)):
            initialise = getattr(self._library, f"pthread_{name}_init")
            error = initialise(ctypes.c_void_p(part + offset), None)
            if error:
                raise RuntimeError(f"pthread_{name}_init: {os.strerror(error)}")
        thread = threading.Thread(
            target=workers.serve, args=(self.place, part), name=f"anyattn-{number}", daemon=True
        )
        # First, so that no part ever has two workers if this is interrupted.
        self._workers.append(thread)
        self._words[workers.COUNT // 8] = number
        thread.start()


class _PythonPool:
    """The same by Python's means, for systems without POSIX threads."""

    def __init__(self) -> None:
        self.threads = 0
        self.place = 0
        self._lock = threading.Lock()
        self.launch: Any = self._launch
        self._executor: ThreadPoolExecutor | None = None

    def grow(self, threads: int) -> None:
        with self._lock:
            _compile(workers.call, 3)
            if threads > 1:
                self._executor = ThreadPoolExecutor(min(threads, MOST_THREADS) - 1, "anyattn")
            self.threads = max(self.threads, threads)

    def _launch(self, place: int, function: int, arguments: int, threads: int) -> int:
        others: list[Future[int]] = []
        if threads > 1 and self._executor is not None:
            for number in range(1, min(threads, MOST_THREADS)):
                try:
                    others.append(self._executor.submit(workers.call, function, arguments, number))
                except RuntimeError:  # the interpreter ends: it gives out no more threads
                    break
        status: int = workers.call(function, arguments, 0)
        for other in others:
            if not other.cancel():
                status = status or other.result()
        return status


def _compile(dispatcher: Any, arguments: int) -> Any:
    """Compile a function of so many integers, or load it from the cache of kernels.

    Gives what calls it without asking for the types of its arguments, which takes longer than the call.
    """
    # llvmlite has a lock of its own, which a fork beside this would copy held.
    with global_compiler_lock:
        if not dispatcher.signatures:
            _attach(dispatcher)
        return dispatcher.compile((types.int64,) * arguments)


def _attach(dispatcher: Any) -> None:
    """Let a function be found in the cache of kernels, and put there."""
    key = KernelKey(
        backend="numba",
        kernel=dispatcher.__name__,
        structure="",
        dtype="int64",
        accumulate="int64",
        head_dim=0,
        v_head_dim=0,
        target=numba_target(),
        settings=numba_settings(workers.OPTIONS),
        versions=numba_versions(),
        code=code_digest("", [atomics, parts, workers]),
    )
    attach(dispatcher, key, user_store())


def _new_pool() -> _Pool:
    library = None if os.name == "nt" else ctypes.CDLL(None)
    wanted = {*_FUNCTIONS.values(), "pthread_mutex_init", "pthread_cond_init"} - _OPTIONAL
    # The clock is read into two words of 64 bits.
    if library is not None and sys.maxsize > 2**32 and all(hasattr(library, name) for name in wanted):
        return _NativePool(library)
    return _PythonPool()


def _forget() -> None:
    """Begin anew in a forked child, where no thread but the forking one is left and locks may be held."""
    global _pool
    _pool = _new_pool()


_call: Any = None  # what runs `workers.call`
_libraries: dict[int, Any] = {}  # of what `address` gave: their code must stay
_pool = _new_pool()
# A child that was copied while another thread compiled could not compile.
held_over_forks(global_compiler_lock)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
