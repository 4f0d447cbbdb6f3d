"""The command line: what it prints, what it imports, how it fails."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

import anyattn as aa
from anyattn import cli

ARRAY_LIBRARIES = ("numpy", "torch", "jax", "dask", "array_api_strict", "cupy", "numba", "ml_dtypes")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyattn", *arguments], capture_output=True, text=True, check=False
    )


def test_help_names_the_commands_and_imports_no_array_library():
    code = (
        "import sys\n"
        "from anyattn.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        f"print('imported:', [name for name in {ARRAY_LIBRARIES} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "info" in done.stdout
    assert "demo" in done.stdout
    assert "imported: []" in done.stdout


def test_info_tells_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"anyattn {aa.__version__}, Python {platform.python_version()}, ")
    numpy_line = next(line for line in printed.splitlines() if line.split()[:1] == ["numpy"])
    import numpy

    assert numpy_line.split() == ["numpy", numpy.__version__]
    backends = printed.partition("\nBackends\n")[2]
    for name, status in aa.backends().items():
        line = next(line for line in backends.splitlines() if line.startswith(f"  {name} "))
        wanted = "available" if status.available else f"unavailable: {status.reason}"
        assert wanted in line


def test_info_as_json_is_what_backends_says(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["anyattn"] == aa.__version__
    assert found["backends"] == {
        name: {"available": status.available, "version": status.version, "reason": status.reason}
        for name, status in aa.backends().items()
    }
    assert found["backends"]["reference"]["available"] is True


def test_info_imports_no_array_library():
    code = (
        "import sys\n"
        "from anyattn.cli import main\n"
        "main(['info'])\n"
        f"print('imported:', [name for name in {ARRAY_LIBRARIES} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "imported: []" in done.stdout


def test_runs_as_a_module():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"anyattn {aa.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["inform"], ["info", "--jsn"]])
def test_wrong_arguments_end_with_2_and_the_usage(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: anyattn")
