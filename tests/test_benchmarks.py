"""Every benchmark runs with small parameters, and all who compute the same agree."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docs_scripts import DOCS, need_docs, script

FOLDER = Path(__file__).parent.parent / "asv_benchmarks"
# Smaller than the smallest that is worth a measurement.
SMALL = {"length": 130, "tokens": 700, "keys": 40}
SUBJECTS = (
    "quadratic",
    "grouped",
    "sparse",
    "decode",
    "dtypes",
    "dispatch",
    "memory",
    "caches",
    "top_blocks",
    "linear",
)

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are not in this distribution")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    # What the benchmarks change of the environment is put back.
    for name in ("OPENBLAS_CORETYPE", "ANYATTN_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def module(subject):
    return importlib.import_module(f"benchmarks.{subject}")


def classes(subject):
    """The classes of a module that hold benchmarks."""
    found = inspect.getmembers(module(subject), inspect.isclass)
    return [cls for _, cls in found if cls.__module__ == f"benchmarks.{subject}"]


def run(cls, values):
    """What the call of a benchmark gives, after each of its methods ran; None where it is n/a."""
    benchmark = cls()
    try:
        benchmark.setup(*values)
    except NotImplementedError:
        return None
    methods = [name for name in dir(cls) if re.match("(time|track)_", name)]
    assert methods, f"{cls} measures nothing"
    for name in methods:
        try:
            measured = getattr(benchmark, name)(*values)
        except NotImplementedError:
            continue
        if name.startswith("track_"):
            assert 0 <= measured < 1e9, f"{cls.__name__}.{name}"
    out = benchmark.call()
    return np.asarray(out.float() if hasattr(out, "float") else out, np.float32)


def test_every_subject_is_tested():
    found = {path.stem for path in (FOLDER / "benchmarks").glob("[a-z]*.py")}
    assert found == {*SUBJECTS, "common", "peers", "startup", "training"}


# Of torch's compiler, about another part of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("subject", SUBJECTS)
def test_all_who_compute_agree(subject, monkeypatch):
    common, peers = module("common"), module("peers")
    for cls in classes(subject):
        who = cls.params[0]
        assert who in (common.WHO, common.ALL)
        assert cls.param_names[0] == "backend"
        if hasattr(cls, "length"):
            monkeypatch.setattr(cls, "length", SMALL["length"])
        others = list(zip(cls.param_names[1:], cls.params[1:], strict=True))
        # One parameter after the other takes all its values, if these are no sizes.
        first = [SMALL.get(name, values[0]) for name, values in others]
        cases = {tuple(first)}
        for n, (name, values) in enumerate(others):
            if name not in SMALL:
                cases |= {(*first[:n], choice, *first[n + 1 :]) for choice in values}
        for case in sorted(cases):
            # Compiling takes seconds a dtype or mask, and other tests do it.
            late = {peers.FLEX} if case != ("window",) else set()
            late |= {"numba"} if {"float16", "bfloat16", "float64"} & set(case) else set()
            outs = {name: run(cls, (name, *case)) for name in who if name not in late}
            assert outs["reference"] is not None, f"{cls.__name__} {case} is n/a"
            tolerance = 0.03 if "bfloat16" in case else 0.003 if "float16" in case else 1e-5
            for name, out in outs.items():
                if out is not None:
                    error = np.abs(out - outs["reference"]).max()
                    assert error < tolerance, f"{cls.__name__} {case}: {name} is off by {error}"


def test_flex_attention_takes_every_mask():
    """It is compiled for one of them alone above."""
    pytest.importorskip("torch", reason="a peer of torch")
    common, peers, sparse = module("common"), module("peers"), module("sparse")
    for pattern in sparse.PATTERNS.values():
        common.call(peers.FLEX, (1, 4, 130, 64), mask=pattern(130), called=False)


def test_training_steps_agree(monkeypatch):
    pytest.importorskip("torch", reason="trains a model of torch")
    training = module("training")
    for name, small in (("LAYERS", 1), ("WIDTH", 48), ("TOKENS", 140), ("WINDOW", 50), ("SOFTCAP", 0.3)):
        monkeypatch.setattr(training, name, small)
    found = {}
    for attention in training.ATTENTIONS:
        # Whatever is no SDPA runs on tiles.
        for who in training.WHO if attention == "causal" else training.WHO[:2]:
            benchmark = training.Step()
            benchmark.setup(who, attention)
            found[attention, who] = benchmark.step()
            wanted = found[attention, training.WHO[0]]
            assert found[attention, who] == pytest.approx(wanted, rel=1e-4), (attention, who)
    assert len({found[attention, training.WHO[0]] for attention in training.ATTENTIONS}) == 4
    benchmark.time_step(who, attention)
    assert benchmark.track_extra_memory(who, attention) < 1e9


def test_the_page_has_the_rows_of_the_training_table(monkeypatch):
    for name in ("torch", "numba"):
        pytest.importorskip(name, reason="the table compares torch's own with tiles and Numba")
    need_docs()
    monkeypatch.setattr(sys, "path", [*sys.path])
    table = script("training_table")
    rows = (DOCS / "torch.md").read_text(encoding="utf-8").split(table.HEAD)[1].split("\n\n")[0]
    shown = [[cell.strip() for cell in row.split("|")] for row in rows.splitlines()]
    wanted = [(name, table.route(attention, tokens)) for name, attention, tokens in table.ROWS]
    assert [(cells[1], cells[5]) for cells in shown] == wanted
    for cells in shown:
        own, ours = (float(cell.split(" ms")[0]) for cell in cells[2:4])
        assert float(cells[4]) == pytest.approx(ours / own, abs=0.01)


def test_first_calls_run_in_processes_of_their_own():
    startup = module("startup")
    assert [startup.Import().timeraw_import(name) for name in startup.Import.params] == [
        "import anyattn",
        "import numpy",
    ]
    benchmark = startup.FirstCall()
    benchmark.setup("reference", "warm")
    folder = Path(benchmark.folder)
    assert folder.is_dir()
    statement, _ = benchmark.timeraw_first_call("reference", "warm")
    _, setup = benchmark.timeraw_first_call("reference", "empty")
    told = "import os\nprint(os.listdir(os.environ['ANYATTN_CACHE_DIR']))\n"
    code = setup + told + statement
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", "the folder of an empty cache holds something"
    benchmark.teardown("reference", "warm")
    assert not folder.exists()
    with pytest.raises(NotImplementedError, match="compiles nothing"):
        startup.FirstCall().setup("reference", "empty")


def test_blas_chooses_its_own_code(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    module("common")
    assert "OPENBLAS_CORETYPE" not in os.environ


def test_configuration_names_what_there_is():
    lines = (FOLDER / "asv.conf.json").read_text().splitlines()
    settings = json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))
    assert (FOLDER / settings["benchmark_dir"] / "common.py").is_file()
    [install] = settings["install_command"]
    constraints = re.search(r"-c \{conf_dir\}/(\S+)", install)
    assert (FOLDER / constraints[1]).is_file()
