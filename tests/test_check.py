"""`anyattn check`: one line and a status where nothing can be checked, else a report of all parts."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from anyattn import cli
from anyattn.backend import Backend
from anyattn.check import kit, timing
from anyattn.reference import backend as reference
from anyattn.testing.libraries import LIBRARIES, NumPy


class ForADevice(Backend):
    """A stand-in for a backend of CUDA arrays."""

    name = "for_a_device"
    arrays = ("cupy.ndarray",)
    devices = ("cuda",)


class Device(NumPy):
    """A stand-in for a library of arrays on a device: those of NumPy."""

    device = "cuda"


def check(*arguments):
    return cli.main(["check", *arguments])


def test_a_backend_that_cannot_be_used_is_one_line(install, capsys, monkeypatch):
    install(ForADevice())
    monkeypatch.setattr(LIBRARIES["cupy"], "missing", lambda: "cupy finds no CUDA device")
    assert check("--backend=for_a_device") == 2
    assert capsys.readouterr().err == (
        "anyattn check: for_a_device cannot be used here: cupy finds no CUDA device\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--backend=numbers"], "'numbers' is not installed"),
     (["--backend=reference", "--library=numpie"], "no library 'numpie'; there are numpy, "),
     (["--backend=reference", "--workload=huge"], "no workload huge; there are tiny, bert")],
)  # fmt: skip
def test_wrong_names(arguments, said, capsys):
    assert check(*arguments) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_a_report_of_the_kit_and_a_workload(tmp_path, capsys):
    report = tmp_path / "found.md"
    options = ["--family=merge", "--library=numpy", "--workload=tiny", "--seconds=0.01", f"--report={report}"]
    assert check("--backend=reference", *options) == 0
    assert capsys.readouterr().out == f"reference: all is right; see {report}\n"
    text = report.read_text()
    assert "## Conformance kit, merge: exit status 0" in text
    assert "numpy: 20 passed" in text
    name, own, *_ = (cell.strip() for cell in text.splitlines()[-1].strip("|").split("|"))
    assert name == "tiny"
    assert 0 < float(own) < 1000


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "MemoryError"), (ValueError("a | b\nc"), r"ValueError: a \| b")],
)
def test_what_goes_wrong_beside_is_a_line_of_the_table(error, said, monkeypatch):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(timing, "_torch", broken)
    found = timing.measure("tiny", "reference", LIBRARIES["numpy"], 0.001)
    assert found.row() == f"| tiny | torch, to compare with: {said} | | | |"


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Processes that are not started: what they were, with one of the sanitizer's tools that complains."""
    made = []

    def started(command):
        made.append(command)
        bad = "--tool=racecheck" in command
        return subprocess.CompletedProcess(command, 99 if bad else 0, "a hazard" if bad else "passed", None)

    monkeypatch.setattr(kit, "_run", started)
    monkeypatch.setattr(kit, "usable_library", lambda backend, name: Device("device"))
    monkeypatch.setattr(kit, "device_name", lambda library: "a device")
    monkeypatch.setattr(kit.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.chdir(tmp_path)
    return made


def test_a_device_is_watched_by_the_sanitizer(commands, capsys, tmp_path):
    assert check("--backend=reference", "--workload=none") == 1
    failed = "reference: failed: compute-sanitizer racecheck, pairs; see anyattn-check-reference.md\n"
    assert capsys.readouterr().out == failed
    text = (tmp_path / "anyattn-check-reference.md").read_text()
    assert "## compute-sanitizer racecheck, pairs: exit status 99\n\n```\na hazard\n```" in text
    assert "- device: a device" in text
    assert [c[1] for c in commands if "sanitizer" in c[0]] == [
        "--tool=memcheck", "--tool=racecheck", "--tool=initcheck", "--tool=synccheck",
    ]  # fmt: skip


def test_without_a_sanitizer_the_report_says_so(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(kit.shutil, "which", lambda name: None)
    assert check("--backend=reference", "--workload=none") == 0
    text = (tmp_path / "anyattn-check-reference.md").read_text()
    assert "## compute-sanitizer: not run\n\n```\ncompute-sanitizer is not installed" in text


def test_a_call_that_fails_is_reported_and_the_next_one_timed(commands, capsys, tmp_path, install):
    class Broken(Backend):
        name = "broken"
        arrays = ("numpy.ndarray",)
        devices = ("cpu",)
        dtypes = frozenset({"float32"})
        capabilities = frozenset()

        def run(self, call):
            if call.q_len > 16:
                raise RuntimeError("no room\nat all")
            return reference.run(call)

    install(Broken())
    assert check("--backend=broken", "--workload=bert", "--workload=tiny", "--seconds=0.01") == 1
    assert "failed: compute-sanitizer racecheck, pairs, workload bert" in capsys.readouterr().out
    rows = (tmp_path / "anyattn-check-broken.md").read_text().splitlines()[-2:]
    assert rows[0] == "| bert | RuntimeError: no room | | | |"
    assert rows[1].startswith("| tiny | ")
    assert 0 < float(rows[1].split("|")[2]) < 1000


def test_a_result_that_is_not_torchs_is_reported(commands, capsys, install, tmp_path):
    pytest.importorskip("torch", reason="torch, to compare with, is not installed")

    class Wrong(Backend):
        name = "wrong"
        arrays = ("numpy.ndarray",)
        devices = ("cpu",)
        dtypes = frozenset({"float32"})

        def run(self, call):
            return np.zeros(call.q.shape, "f4"), None

    install(Wrong())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "device", "cpu")
        assert check("--backend=wrong", "--workload=tiny", "--seconds=0.01") == 1
    assert capsys.readouterr().out.startswith("wrong: failed: workload tiny; see")
    [row] = (tmp_path / "anyattn-check-wrong.md").read_text().splitlines()[-1:]
    assert row.startswith("| tiny | differs from torch by ")


def test_a_long_output_is_cut_at_its_beginning():
    assert kit._end("\n".join(map(str, range(250)))).splitlines()[:2] == ["(50 lines before)", "50"]
