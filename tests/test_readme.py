"""README.md does what it says: its examples run and give the right values, its commands are one line each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"
if not README.exists():
    pytest.skip("needs the source tree, for README.md", allow_module_level=True)


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(number: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[number], f"<README.md, example {number}>", "exec"), names)
    return names


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_numpy_example(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(0)

    q, k, v = (names[name].astype(np.float64) for name in "qkv")
    i, j = np.ogrid[:128, :128]
    seen = (j <= i) & ((j >= i - 32) | (i < 4) | (j < 4))
    expected = softmax(np.where(seen, q @ k.swapaxes(-1, -2) / 8, -np.inf)) @ v
    assert isinstance(names["out"], np.ndarray)
    assert names["out"].dtype == np.float32
    np.testing.assert_allclose(names["out"], expected, rtol=0, atol=1e-5)
    assert "reference" in capsys.readouterr().out


def test_torch_example() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    names = run(1)

    q, k, v = (names[name].detach().double().requires_grad_() for name in "qkv")
    i = torch.arange(128)
    bias = -names["slopes"].double()[:, None, None] * (i[:, None] - i).abs()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    expected.sum().backward()
    torch.testing.assert_close(names["out"], expected.float(), rtol=0, atol=1e-5)
    for name, wanted in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(names[name].grad, wanted.grad.float(), rtol=0, atol=1e-4)


def test_cupy_example_compiles() -> None:
    source = blocks("python")[2]
    assert "import cupy" in source
    compile(source, "<README.md, example 2>", "exec")


def test_every_python_example_is_tested() -> None:
    assert len(blocks("python")) == 3


def test_commands_are_one_line_each() -> None:
    demo, tests = blocks("sh")
    assert demo.count("\n") == tests.count("\n") == 1
    assert "anyattn demo" in demo
    assert tests.rstrip().endswith("nox")


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        assert (README.parent / target).exists(), target
