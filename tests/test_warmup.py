"""`anyattn warmup`: what it asks of backends and prints, and that later processes compile nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from anyattn import cli, warmup_command
from anyattn.backend import Backend
from anyattn.kernels.cache import cache_folder, user_store
from anyattn.kernels.key import KernelKey

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")


class Compiler(Backend):
    name = "compiler"
    dtypes = frozenset({"float32", "float64"})

    def warm_up(self, dtypes):
        for dtype in dtypes:
            user_store().write(KernelKey("compiler", "kernel", "", dtype, dtype, 8, 8, "here"), b"code")
            yield f"kernel, {dtype}", 1.25


class Plain:
    """A duck type without `warm_up`."""

    name = "plain"
    dtypes = frozenset({"float32"})


@pytest.fixture
def kept():
    """The environment with the cache that other tests compile into."""
    variables = {name: value for name, value in os.environ.items() if name != "ANYATTN_CACHE"}
    return {**variables, "ANYATTN_CACHE_DIR": str(cache_folder())}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYATTN_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("ANYATTN_CACHE", raising=False)
    return tmp_path / "kernels"


def test_prints_what_each_backend_made(folder, monkeypatch, capsys):
    monkeypatch.setattr(warmup_command, "_backends", lambda names: [Compiler(), Plain(), Backend()])
    assert cli.main(["warmup"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # float16 and bfloat16 are not of that backend.
    assert lines == [
        ["compiler", "1.25", "s", "kernel,", "float32"],
        ["compiler", "1.25", "s", "kernel,", "float64"],
        ["compiler", "2.50", "s", "in", "all"],
        ["plain", "has", "nothing", "to", "compile"],
        ["has", "nothing", "to", "compile"],
        f"2 kernels compiled; 2, 0.0 MB, lie in {folder}".split(),
    ]


def test_dtypes_are_those_asked_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(warmup_command, "_backends", lambda names: [Compiler()])
    assert cli.main(["warmup", "--dtype", "float64", "--dtype", "float16"]) == 0
    assert "float32" not in (printed := capsys.readouterr().out)
    assert "kernel, float64" in printed


def test_all_available_backends_or_those_named(folder, capsys):
    assert cli.main(["warmup", "--backend", "reference"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == ["reference", "has", "nothing", "to", "compile"]
    assert len(rest) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        ([], {"ANYATTN_CACHE": "off"}, "the kernel cache is off"),
        ([], {"ANYATTN_CACHE_DIR": "kernels"}, "wanted an absolute path, got 'kernels'"),
        (["--backend", "numbra"], {}, "--backend: 'numbra' is not installed"),
        (["--backend", "broken"], {}, "--backend: broken is unavailable: no such library"),
    ],
)
def test_refuses_with_a_reason(folder, monkeypatch, capsys, arguments, variables, reason):
    from anyattn import registry

    find = registry.find
    broken = registry.Status("broken", None, "no such library", None)
    monkeypatch.setattr(
        registry, "find", lambda name, source: broken if name == "broken" else find(name, source)
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["warmup", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("anyattn warmup: ")
    assert reason in printed.err
    assert printed.out == ""


CALLS = """
import os, sys
import numpy as np
import anyattn as aa
from anyattn import masks, scores

files = lambda: sorted(os.listdir(os.environ["ANYATTN_CACHE_DIR"]))
before = files()
x = np.random.default_rng(0).standard_normal((2, 4, 75, 24)).astype(np.float32)
calls = [
    {},
    {"causal": True},
    {"mask": masks.causal()},
    {"mask": masks.sliding_window(5, 0)},
    {"kv_lengths": [70, 3], "q_offset": 0},
    {"kv_lengths": [70, 3], "q_offset": 0, "causal": True},
    {"mask": masks.padding([75, 9])},
    {"score_mod": scores.alibi(4)},
    {"score_mod": scores.alibi(4), "causal": True},
    {"softcap": 15},
    {"softcap": 15, "causal": True},
]
with aa.use(threads=2):
    for options in calls:
        out = aa.attention(x, x, x, backend="numba", **options)
        right = aa.attention(x, x, x, backend="reference", **options)
        assert np.abs(out - right).max() < 1e-5, options
        assert files() == before, f"{options}: compiled {set(files()) - set(before)}"
# Loading code imports nothing of what only compiling needs; it takes 0.2 s.
print("imported:", [name for name in ("numba.np.arraymath", "numba.np.npyimpl") if name in sys.modules])
aa.attention(x, x, x, backend="numba", mask=masks.dilated(3, 2))
assert len(files()) > len(before), "a mask that nobody warmed up must be compiled"
"""


WARM_UP = """
import json
from anyattn import cli
from anyattn.kernels.cache import Store

asked_for = set()

def noting(method):
    def call(store, key, *rest):
        asked_for.add(key.name)
        return method(store, key, *rest)
    return call

for name in ("read", "write", "write_source"):
    setattr(Store, name, noting(getattr(Store, name)))
assert cli.main(["warmup", "--backend=numba", "--dtype=float32"]) == 0
print(json.dumps(sorted(asked_for)))
"""


@needs_numba
def test_later_processes_compile_nothing(kept, folder):
    """A folder with what a warm-up asks for holds what it makes where there is nothing yet."""
    first = subprocess.run(
        [sys.executable, "-c", WARM_UP], capture_output=True, text=True, check=True, env=kept
    )
    *printed, names = first.stdout.splitlines()
    assert any(line.endswith("forward, float32") for line in printed)
    assert "float64" not in first.stdout
    folder.mkdir(mode=0o700)
    for path in Path(kept["ANYATTN_CACHE_DIR"]).iterdir():
        if path.stem in json.loads(names):
            shutil.copy(path, folder)
    kernels = len(list(folder.glob("*.kernel")))
    assert kernels >= 10, "threads, forward, and eight kinds of masks and scores"
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported: []\n"
    command = [sys.executable, "-m", "anyattn", "warmup", "--backend=numba", "--dtype=float32"]
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"\n0 kernels compiled; {kernels + 1}, " in again
