"""Runs the node tests of ONNX's attention operators and writes `docs/onnx-cases.md`, their tables by backend.

Run it as `python docs/onnx_cases.py` where NVRTC is; the page is committed, and the tests run the cases and
compare the page. The cases are those of the installed `onnx`; the ones called `_expanded` spell the operator
out as other operators and have no node of these.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from anyattn.compat.onnx import attention, linear_attention

PAGE = Path(__file__).parent / "onnx-cases.md"
# Backend, and the array library that it is given.
COLUMNS = (("reference", "numpy"), ("numba", "numpy"), ("reference", "torch"), ("torch", "torch"))
# The launch code and kernels of `cupy` without a GPU: tests/test_cuda_onnx.py.
INTERPRETED = ("cupy", "PTX interpreter")
SHOWN = (*COLUMNS, INTERPRETED)
# The values that onnx ships are rounded to 16 bits after each step, and anyattn's once: two units apart.
ULPS = 2
HEAD = """# ONNX's own cases

`anyattn.compat.onnx.attention` on the node tests of operator Attention that `onnx` {version} ships: {total}
cases of opsets {opsets}, without the `_expanded` ones, which have no Attention node. Each column is a
backend and the array library that it was given; `cupy` ran on [the PTX interpreter](cuda.md), as there was no
GPU. `python docs/onnx_cases.py` runs them and writes this page; the tests run them too.

A case passes where dtypes and shapes agree and the values lie within the tolerance of the case, or within
{ulps} units in the last place for 16-bit outputs: what is shipped there was rounded after every step.
"""


@cache
def cases(operator: str = "Attention") -> dict[str, Any]:
    """Return the shipped cases of an operator by name."""
    import onnx.backend.test.case.node as node

    # `collect_testcases(operator)` gives the same lists after 6 s of importing every other operator's.
    import onnx.backend.test.case.node.attention
    import onnx.backend.test.case.node.linear_attention  # noqa: F401

    found = (case for case in node._NodeTestCases if not case.name.endswith("_expanded"))
    return {case.name: case for case in found if case.model.graph.node[0].op_type == operator}


def opset(case: Any) -> int:
    """Return the version of the default operator set that a case imports."""
    return next(int(each.version) for each in case.model.opset_import if not each.domain)


def outcome(case: Any, backend: str, library: str) -> str | None:
    """Run a case; return what is wrong with its result, or None."""
    import onnx

    [node] = case.model.graph.node
    [(given, wanted)] = case.data_sets
    values = dict(zip((each.name for each in case.model.graph.input), given, strict=True))
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    options = {n: x.decode() if isinstance(x, bytes) else x for n, x in attributes.items()}
    function = linear_attention
    if node.op_type == "Attention":
        function, options["opset"] = attention, opset(case)
    try:
        found = function(
            *(_place(values[name], library) if name else None for name in node.input),
            **options,
            num_outputs=len(node.output),
            backend=backend,
        )
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    outputs = [_host(x) for x, name in zip(found, node.output, strict=True) if name]
    for got, right in zip(outputs, wanted, strict=True):
        if (got.dtype, got.shape) != (right.dtype, right.shape):
            return f"gave {got.dtype} {got.shape}, wanted {right.dtype} {right.shape}"
        rtol = case.rtol if right.itemsize > 2 else ULPS * float(_eps(right.dtype))
        wide = got.astype(np.float64), right.astype(np.float64)
        if not np.allclose(*wide, rtol=rtol, atol=case.atol, equal_nan=True):
            return f"differs by up to {np.nanmax(np.abs(wide[0] - wide[1]))}"
    return None


def _eps(dtype: Any) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype).eps


def _place(x: Any, library: str) -> Any:
    """An array of a library with the values of NumPy's."""
    if library == "numpy":
        return x
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def _host(x: Any) -> Any:
    """NumPy's array with the values of another library's."""
    if isinstance(x, np.ndarray):
        return x
    import ml_dtypes
    import torch

    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def page(outcomes: dict[tuple[str, str], dict[str, str | None]]) -> str:
    """Return the text of the page from the outcomes of each column's cases."""
    import onnx

    opsets = sorted({opset(case) for case in cases().values()})
    titles = [f"`{backend}`, {library}" for backend, library in SHOWN]
    lines = [
        HEAD.format(
            version=onnx.__version__, total=len(cases()), opsets=f"{opsets[0]} to {opsets[-1]}", ulps=ULPS
        ),
        f"| opset | cases | {' | '.join(titles)} |",
        f"| --- | --- | {' | '.join(['---'] * len(titles))} |",
    ]
    for version in opsets:
        names = [name for name, case in cases().items() if opset(case) == version]
        passed = [sum(outcomes[column][name] is None for name in names) for column in SHOWN]
        lines.append(f"| {version} | {len(names)} | {' | '.join(f'{n} pass' for n in passed)} |")
    lines += [
        "",
        f"| case | opset | {' | '.join(titles)} |",
        f"| --- | --- | {' | '.join(['---'] * len(titles))} |",
    ]
    for name, case in cases().items():
        marks = ["pass" if outcomes[column][name] is None else "**fails**" for column in SHOWN]
        lines.append(f"| `{name.removeprefix('test_')}` | {opset(case)} | {' | '.join(marks)} |")
    lines += [
        "",
        "## LinearAttention",
        "",
        "The same for `anyattn.compat.onnx.linear_attention` and operator LinearAttention of opset 27.",
        "",
        f"| case | {' | '.join(titles)} |",
        f"| --- | {' | '.join(['---'] * len(titles))} |",
    ]
    for name in cases("LinearAttention"):
        marks = ["pass" if outcomes[column][name] is None else "**fails**" for column in SHOWN]
        lines.append(f"| `{name.removeprefix('test_')}` | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def _interpreter() -> tuple[str, str]:
    """Make `cupy` findable on the interpreter; the backend's name and its array library."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import pytest
    from conftest import make_findable
    from cuda_runs import Interpreted

    make_findable(pytest.MonkeyPatch(), Interpreted())
    return "interpreted", "numpy"


if __name__ == "__main__":
    every = cases() | cases("LinearAttention")
    runs = dict(zip(SHOWN, (*COLUMNS, _interpreter()), strict=True))
    found = {
        column: {name: outcome(case, *run) for name, case in every.items()} for column, run in runs.items()
    }
    PAGE.write_text(page(found), encoding="utf-8")
