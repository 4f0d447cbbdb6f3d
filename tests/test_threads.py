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
            timeout=60,
            check=False,
        )
        assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert not done.stderr, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.parametrize("count", [1, 2, 3, 7])
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
    """)
