"""`anyattn check`: one line and a status where nothing can be checked, else a report of all parts."""

from __future__ import annotations

import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import anyattn as aa
from anyattn import cli
from anyattn.backend import Backend
from anyattn.check import device, kit, timing
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
    assert found.row() == f"| tiny | to compare with: {said} | | | |"


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Processes that are not started: what they were, with one of the sanitizer's tools that complains."""
    made = []

    def started(command, also=None):
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
    failed = "failed: compute-sanitizer racecheck, pairs and long; see anyattn-check-reference.md"
    assert capsys.readouterr().out == f"reference: {failed}\n"
    text = (tmp_path / "anyattn-check-reference.md").read_text()
    assert "## compute-sanitizer racecheck, pairs and long: exit status 99\n\n```\na hazard\n```" in text
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
    assert "failed: compute-sanitizer racecheck, pairs and long, workload bert" in capsys.readouterr().out
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


def test_parts_that_cannot_run_say_why(commands, monkeypatch, tmp_path):
    """On a backend of CUDA arrays: what needs a library or a device that is not here is no failure."""
    monkeypatch.setattr(kit, "find", lambda *_: SimpleNamespace(backend=ForADevice()))
    monkeypatch.setattr(LIBRARIES["cupy"], "missing", lambda: "cupy finds no CUDA device")

    def started(command, also=None):
        commands.append(command)
        if "anyattn.check.device" in command:
            status = device.main(command[3], command[4])
            return subprocess.CompletedProcess(command, status, "the reason", None)
        return subprocess.CompletedProcess(command, 0, "passed", None)

    monkeypatch.setattr(kit, "_run", started)
    assert check("--backend=reference", "--workload=none") == 0
    text = (tmp_path / "anyattn-check-reference.md").read_text()
    for title in ("Conformance kit on cupy, pairs", "two streams", "CUDA graphs"):
        assert f"## {title}: not run" in text
    assert "## torch on CUDA: not run\n\n```\nreference takes no torch.Tensor" in text
    # Each array is an allocation of its own there.
    assert "--anyattn-full" in commands[0]
    [memcheck] = [c for c in commands if "--tool=memcheck" in c]
    assert memcheck[memcheck.index("-p", memcheck.index("-p") + 1) + 1] == "anyattn.check.unpooled"


@pytest.mark.parametrize(("part", "of"), [("two streams", "cupy"), ("torch on CUDA", "torch-cuda")])
def test_a_part_without_a_device_is_not_run(part, of, monkeypatch, capsys):
    monkeypatch.setattr(LIBRARIES[of], "missing", lambda: "sees no device")
    assert device.main(part, "cupy") == device.NOT_RUN
    assert capsys.readouterr().out == "sees no device\n"


def test_tensors_and_what_is_wrong_with_them():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    attention = partial(aa.attention, backend="reference")
    device.torch_arrays(attention, torch, "cpu", None, busy=8)
    with pytest.raises(AssertionError, match=r"tensors, float16: the result is off by"):
        device.torch_arrays(lambda *x, **options: 1.2 * attention(*x, **options), torch, "cpu", None, busy=8)
    with pytest.raises(AssertionError, match=r"the result is ndarray"):
        device.torch_arrays(lambda *x, **_: np.zeros(3, "f4"), torch, "cpu", None, busy=8)


def test_arrays_of_jax_and_what_is_wrong_with_them():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    pytest.importorskip("numba", reason="numba is not installed")
    attention, place = partial(aa.attention, backend="numba"), jax.devices("cpu")[0]
    device.jax_arrays(attention, jax, place)
    with pytest.raises(AssertionError, match="under jit was not refused"):
        device.jax_arrays(partial(aa.attention, backend="reference"), jax, place)


def test_without_torch_a_result_is_that_of_the_reference(install, monkeypatch):
    monkeypatch.setattr(timing, "_torch", lambda *_: None)
    found = timing.measure("tiny", "reference", LIBRARIES["numpy"], 0.001)
    assert (found.problem, found.torch) == (None, None)
    assert found.difference < 1e-6
    right = timing._first_heads
    monkeypatch.setattr(timing, "_first_heads", lambda *x: right(*x) + 1e-3)
    found = timing.measure("tiny", "reference", LIBRARIES["numpy"], 0.001)
    assert found.problem == "differs from the reference by 1.0e-03"


def test_a_long_output_is_cut_at_its_beginning():
    assert kit._end("\n".join(map(str, range(250)))).splitlines()[:2] == ["(50 lines before)", "50"]
