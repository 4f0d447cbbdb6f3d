"""Parts, which are compiled with what calls them, and tasks, which are run."""

from __future__ import annotations

import pytest

numba = pytest.importorskip("numba", reason="numba is not installed")

import numpy as np  # noqa: E402

import anyattn as aa  # noqa: E402
from anyattn.describe import Options, describe  # noqa: E402
from anyattn.expr.program import lower  # noqa: E402
from anyattn_numba import threads  # noqa: E402
from anyattn_numba.jit import compiled, task  # noqa: E402
from anyattn_numba.kernels import shape_for  # noqa: E402
from anyattn_numba.memory import read_word, write_word  # noqa: E402
from anyattn_numba.tiles import tile_source  # noqa: E402


@compiled
def inner(word: int) -> int:
    return max(word, 5) % 7  # Numba's own functions, too


@compiled
def outer(word: int) -> int:
    return inner(word) + 10 * inner(word + 1)


@task
def add(arguments: int, worker: int) -> int:
    write_word(arguments, outer(read_word(arguments)) + worker)
    return 0


def test_a_task_runs_with_parts_of_parts():
    words = np.array([11])
    assert threads.run(threads.address(add), words.ctypes.data, 1) == 0
    assert words[0] == 11 % 7 + 10 * (12 % 7)


def test_machine_code_is_made_of_tasks_alone():
    threads.address(add)
    (result,) = add.overloads.values()
    module = result.library._final_module
    seen = [f.name for f in module.functions if f.linkage.name == "external" and not f.is_declaration]
    assert seen == [result.fndesc.llvm_func_name]
    for part in (inner, outer):
        (result,) = part.overloads.values()
        assert not result.library._codegen._engine.is_symbol_defined(result.fndesc.llvm_func_name)
    with pytest.raises(TypeError, match="wanted a task, alone is compiled with its callers only"):
        threads.address(alone)


@compiled
def alone(arguments: int, worker: int) -> int:
    return arguments + worker


def test_functions_compiled_by_numba_call_parts():
    assert numba.njit(lambda x: outer(x))(11) == 54


def test_tile_code_becomes_vectors():
    """Which hangs on what is done before functions are inlined: scalar code took three times as long."""
    x = np.ones((1, 2, 5, 4), np.float32)
    call = describe("attention", x, x, x, Options(score_mod=aa.scores.alibi(2)))
    module: dict[str, object] = {}
    exec(tile_source(lower(call.visible, call.score), "float32", "int32"), module)
    tile = module["tile"]
    threads.address(tile)
    (code,) = tile.inspect_llvm().values()
    assert f"fmul <{shape_for('float32').lanes} x float>" in code


def test_arrays_without_axes_are_read():
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32)
    options = {"mask": aa.masks.global_tokens(np.array(2)), "causal": True}
    found = aa.attention(x, x, x, backend="numba", **options)
    np.testing.assert_allclose(found, aa.attention(x, x, x, backend="reference", **options), atol=1e-6)
