"""Threads of compiled kernels: every way in which Python starts, copies and ends threads and processes.

Each scenario is a process of its own, so that one that aborts or hangs is a failed test. All use one task,
which sums the numbers of the pieces that it takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("numba", reason="the threads are those of Numba kernels")
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

TASK = '''
# Words of the arguments: 0 pieces taken, 1 pieces, 2 turns of each, 3 sum of them, 4 status, 8 ... calls
# by worker.
import os, signal, sys, threading, time
import numpy as np
from numba import njit
from anyattn_numba import atomics, threads

@njit(nogil=True, error_model="numpy", cache=True)
def task(arguments, worker):
    atomics.fetch_add(arguments + 64 + 8 * worker, 1)
    pieces, turns = atomics.load(arguments + 8), atomics.load(arguments + 16)
    while True:
        piece = atomics.fetch_add(arguments, 1)
        if piece >= pieces:
            return atomics.load(arguments + 32)
        x = 1.0 + piece
        for _ in range(turns):
            x = x * 0.999 + 0.5
        atomics.fetch_add(arguments + 24, piece + np.int64(x > 1e9))

ADDRESS = threads.address(task)

def block(pieces=100, turns=0, most=64):
    words = np.zeros(8 + most, np.int64)
    words[1:3] = pieces, turns
    return words

def call(count, pieces=100, turns=0):
    """Run the task and return how many threads it ran on; everything that it left is checked."""
    words = block(pieces, turns)
    status = threads.run(ADDRESS, words.ctypes.data, count)
    calls = words[8:]
    assert status == 0, status
    assert words[3] == pieces * (pieces - 1) // 2, words
    assert words[0] == pieces + calls.sum(), words
    assert calls[0] == 1 and calls.max() == 1 and not calls[count:].any(), words
    return int(calls.sum())

def until_shared(count):
    """Call until all threads took part once; some 200 calls of 5 ms if the machine is busy."""
    for _ in range(2000):
        if call(count, 64, 30_000) == count:
            return
    raise SystemExit(f"never {count} threads")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the task's module, and of compiled code for all processes of this file."""
    folder = tmp_path_factory.mktemp("threads")
    (folder / "task.py").write_text(TASK, encoding="utf-8")
    return folder


@pytest.fixture
def process(folder, tmp_path):
    """Run code with all of the task's module in a new process, and give the words that it printed."""

    def run(code: str, status: int = 0, **environment: str) -> list[str]:
        script = tmp_path / "scenario.py"
        script.write_text("from task import *\n" + textwrap.dedent(code), encoding="utf-8")
        unset = ("OMP_NUM_THREADS", "ANYATTN_NUM_THREADS", "ANYATTN_CACHE")
        settings = {name: value for name, value in os.environ.items() if name not in unset}
        settings |= {
            "ANYATTN_CACHE_DIR": str(folder / "kernels"),
            "NUMBA_CACHE_DIR": str(folder / "numba"),
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONFAULTHANDLER": "1",
        }
        done = subprocess.run(
            [sys.executable, str(script)],
            env=settings | environment,
            capture_output=True,
            text=True,
            # Seconds each, and more where others use the processors: some wait for three threads on two.
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert not done.stderr, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_piece_is_taken_once(process, count):
    process(f"""
        for pieces in (0, 1, 2, 97):
            for _ in range(50):
                call({count}, pieces)
        until_shared({count})
    """)


def test_status_of_any_worker_comes_back(process):
    process("""
        for count in (1, 2):
            words = block()
            words[4] = 17
            assert threads.run(ADDRESS, words.ctypes.data, count) == 17

        @njit(nogil=True)
        def raising(arguments, worker):
            atomics.fetch_add(arguments, 1)
            if worker == 1:
                raise ValueError("no")
            for _ in range(1_000_000):  # leaves the other one time to come
                if atomics.load(arguments) == 2:
                    break
                atomics.pause()
            return 0

        raising = threads.address(raising)
        words = np.zeros(8, np.int64)
        while words[0] != 2:
            words[0] = 0
            status = threads.run(raising, words.ctypes.data, 2)
        assert status == atomics.RAISED, status
        until_shared(2)
    """)


def test_compiled_callers_share_workers(process):
    """No Python between two calls: every moment in which two callers can meet comes up."""
    process("""
        from anyattn_numba import workers

        @njit(nogil=True)
        def calls(pool, function, arguments, count, rounds):
            wrong = 0
            for _ in range(rounds):
                atomics.store(arguments, 0)
                atomics.store(arguments + 24, 0)
                status = workers.launch(pool, function, arguments, count)
                if status != 0 or atomics.load(arguments + 24) != 10:
                    wrong += 1
            return wrong

        call(4)
        blocks = [block(5) for _ in range(4)]
        wrong = []
        def caller(words):
            wrong.append(calls(threads._pool.place, ADDRESS, words.ctypes.data, 3, 20_000))
        calls(threads._pool.place, ADDRESS, blocks[0].ctypes.data, 3, 0)
        callers = [threading.Thread(target=caller, args=(words,)) for words in blocks]
        for thread in callers: thread.start()
        for thread in callers: thread.join()
        assert wrong == [0] * 4, wrong
        by_worker = sum(words[8:] for words in blocks)
        assert by_worker[0] == 4 * 20_000 and by_worker[1] > 0 and not by_worker[3:].any(), by_worker
        until_shared(4)
    """)


def test_a_task_returns_a_status(process):
    process("""
        @njit
        def silent(arguments, worker):
            atomics.store(arguments, 1)

        silent(block().ctypes.data, 0)
        try:
            threads.address(silent)
        except TypeError as error:
            assert "wanted int64 returned, silent returns none" in str(error), error
        else:
            raise SystemExit("no error")
    """)


@pytest.mark.parametrize("pool", ["", "threads._pool = threads._PythonPool()"], ids=["native", "python"])
class TestEitherPool:
    """What POSIX systems use, and what the others do."""

    def test_python_threads_call_at_once(self, process, pool):
        process(f"""
            {pool}
            failed = []
            def caller():
                try:
                    for n in range(100):
                        call(1 + n % 4, 50, 200)
                except BaseException as error:
                    failed.append(error)
            callers = [threading.Thread(target=caller) for _ in range(8)]
            for thread in callers: thread.start()
            for thread in callers: thread.join()
            assert not failed, failed
            until_shared(4)
        """)

    def test_a_task_calls_a_task(self, process, pool):
        process(f"""
            {pool}
            import ctypes
            from concurrent.futures import ThreadPoolExecutor

            @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
            def again(_):
                for _ in range(3):
                    call(3, 20)
                return 5

            again_address = ctypes.cast(again, ctypes.c_void_p).value

            @njit(nogil=True)
            def outer(arguments, worker):
                return atomics.call_c1(atomics.load(arguments), arguments)

            outer = threads.address(outer)
            words = block()
            words[0] = again_address
            for _ in range(30):
                assert threads.run(outer, words.ctypes.data, 3) == 5
            with ThreadPoolExecutor(4) as callers:
                for status in callers.map(lambda n: threads.run(outer, words.ctypes.data, 3), range(100)):
                    assert status == 5
            until_shared(3)
        """)

    @fork
    def test_forked_children_use_threads(self, process, pool):
        out = process(
            f"""
            {pool}
            until_shared(2)
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    {pool and "assert threads._pool.threads == 0"}
                    until_shared(2)
                    grandchild = os.fork()
                    if grandchild == 0:
                        until_shared(3)
                        os._exit(7)
                    os._exit(os.waitpid(grandchild, 0)[1] >> 8)
                print(os.waitpid(child, 0)[1] >> 8)
                until_shared(2)
            """,
            PYTHONWARNINGS="ignore::DeprecationWarning",
        )
        assert out == ["7"] * 5

    @fork
    def test_fork_while_a_task_runs(self, process, pool):
        out = process(
            f"""
            {pool}
            ended = False
            def caller():
                while not ended:
                    call(3, 500, 2000)
            callers = [threading.Thread(target=caller) for _ in range(2)]
            for thread in callers: thread.start()
            for _ in range(10):
                time.sleep(0.01)
                child = os.fork()
                if child == 0:
                    until_shared(2)
                    os._exit(7)
                print(os.waitpid(child, 0)[1] >> 8)
            ended = True
            for thread in callers: thread.join()
            until_shared(3)
            """,
            PYTHONWARNINGS="ignore::DeprecationWarning",
        )
        assert out == ["7"] * 10

    @pytest.mark.parametrize("state", ["awake", "asleep", "in a task"])
    def test_exit(self, process, pool, state):
        out = process(f"""
            {pool}
            import atexit
            atexit.register(lambda: print("late", call(1), call(2) <= 2))
            until_shared(3)
            if {state == "asleep"}:
                time.sleep(0.1)
            if {state == "in a task"}:
                words = block(300, 1_000_000)
                run = lambda: threads.run(ADDRESS, words.ctypes.data, 2)
                threading.Thread(target=run, daemon=True).start()
                while words[0] < 2: pass
            print("end")
        """)
        assert out == ["end", "late", "1", "True"]


@fork
def test_processes_of_a_multiprocessing_pool(process):
    out = process(
        """
        import multiprocessing
        until_shared(2)
        def job(n):
            return call(2, 100 + n) > 0
        with multiprocessing.get_context("fork").Pool(4) as pool:
            print(sum(pool.map(job, range(200), chunksize=5)))
        until_shared(2)
        """,
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert out == ["200"]


@fork
def test_fork_while_a_thread_compiles(process):
    out = process(
        """
        ended = False
        def compiling():
            while not ended:
                njit(lambda x: x + 1)(1)
        thread = threading.Thread(target=compiling)
        thread.start()
        for _ in range(5):
            time.sleep(0.05)
            child = os.fork()
            if child == 0:
                assert njit(lambda x: x + 2)(1) == 3
                call(2)
                os._exit(7)
            print(os.waitpid(child, 0)[1] >> 8)
        ended = True
        thread.join()
        """,
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert out == ["7"] * 5


@fork
def test_fork_while_a_thread_makes_kernels(process):
    out = process(
        """
        from anyattn.expr.nodes import J, SCORE
        from anyattn.expr.program import lower
        from anyattn_numba.kernels import tile_address

        def make(divisor):
            assert tile_address(lower(None, SCORE + J % divisor), "float32", "int32")

        make(2)
        made, ended = 2, False
        def making():
            global made
            while not ended:
                make(made := made + 1)
        thread = threading.Thread(target=making)
        thread.start()
        for fork in range(2):
            before = made
            while made == before:
                time.sleep(0.01)
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                make(100 + fork)
                os._exit(7)
            print(os.waitpid(child, 0)[1] >> 8)
        ended = True
        thread.join()
        """,
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert out == ["7"] * 2


@pytest.mark.skipif(os.name != "posix", reason="os.kill ends the process elsewhere")
def test_interrupts_leave_the_pool_whole(process):
    out = process("""
        # A shell lets its background jobs, and what they start, ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        until_shared(3)
        ended = False
        def interrupting():
            while not ended:
                time.sleep(0.005)
                os.kill(os.getpid(), signal.SIGINT)
        thread = threading.Thread(target=interrupting)
        interrupts = 0
        try:
            thread.start()
            while interrupts < 20:
                try:
                    while True:
                        call(3, 200, 500)
                except KeyboardInterrupt:
                    interrupts += 1
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ended = True
        thread.join()
        until_shared(3)
        print(interrupts)
    """)
    assert out == ["20"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_start_of_workers(process, moment):
    process(f"""
        start = threading.Thread.start
        def interrupted(thread):
            if {moment == "after"}:
                start(thread)
            if thread.name == "anyattn-2":
                raise KeyboardInterrupt
            if {moment == "before"}:
                start(thread)
        threading.Thread.start = interrupted
        try:
            call(4)
        except KeyboardInterrupt:
            pass
        else:
            raise SystemExit("no interrupt")
        threading.Thread.start = start
        for _ in range(100):
            call(4)
        until_shared(3)
        parts = {{thread._args[1] for thread in threading.enumerate() if thread.name.startswith("anyattn-")}}
        assert len(parts) == threading.active_count() - 1, "two workers have one part"
    """)


def test_no_more_threads_in_the_system(process):
    process("""
        import logging
        said = []
        logging.getLogger("anyattn.cache").addFilter(lambda record: said.append(record.getMessage()))
        def refused(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refused
        for _ in range(3):
            assert call(4) == 1
        assert len(said) == 1 and "instead of 4: can't start new thread" in said[0], said
    """)


@pytest.mark.skipif(os.name != "posix", reason="resource is POSIX's")
def test_idle_workers_use_no_time(process):
    process("""
        until_shared(4)
        spent = 0
        for _ in range(10):
            call(4, 16, 1000)
            before = time.process_time()
            time.sleep(0.05)
            spent += time.process_time() - before
        assert spent < 0.05, spent
        until_shared(4)  # they wake up again
    """)


def test_entry_takes_microseconds(process):
    process("""
        def cost(count):
            words = block(0)
            run, data, best = threads.run, words.ctypes.data, []
            for _ in range(300):
                start = time.perf_counter_ns()
                for _ in range(10):
                    run(ADDRESS, data, count)
                best.append((time.perf_counter_ns() - start) / 10_000)
            return min(best)
        assert cost(1) < 5 and cost(2) < 25, (cost(1), cost(2))
    """)


def test_compiled_code_is_kept(process, folder):
    process("call(2)")
    out = process("""
        call(2)
        from anyattn_numba import workers
        for function in (workers.launch, workers.serve):
            print(sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values()))
    """)
    assert out == ["1", "0", "1", "0"]
