"""Numbers of heads whose weights are known, and figures whose text can be found."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import anyattn as aa
from anyattn import viz

L = 12


def shifted(shift):
    """Each row looks at the key `shift` from it, rows without one at their own."""
    w = np.zeros((L, L))
    for i in range(L):
        w[i, i + shift if 0 <= i + shift < L else i] = 1.0
    return w


FIRST = np.tile(np.eye(L)[0], (L, 1))
EVEN = np.tril(np.ones((L, L))) / np.arange(1, L + 1)[:, None]
LOCAL = np.where(abs(np.subtract.outer(range(L), range(L))) <= 2, [[1.0, 8.0, 1.0, 9.0] * 3], 0.0)
LOCAL /= LOCAL.sum(-1, keepdims=True)
MIXED = np.where(np.arange(L) % 4 == 0, 10.0, 1.0) * np.ones((L, 1))
MIXED /= MIXED.sum(-1, keepdims=True)


def test_heads_are_called_by_what_they_do():
    heads = np.stack([shifted(-1), shifted(1), shifted(0), FIRST, EVEN, LOCAL, MIXED])
    summary = viz.summarise(heads)
    kinds = [head.kind for head in summary]
    assert kinds == ["previous token", "next token", "same token", "first token", "broad", "local", "mixed"]
    assert summary.kinds() == dict.fromkeys(kinds, 1)
    assert "previous token" in repr(summary)


def test_numbers_of_a_head():
    head = viz.summarise(EVEN)[0]
    i = np.arange(1, L + 1)
    assert head.entropy == pytest.approx(np.log(i).mean())
    assert head.distance == pytest.approx(((i - 1) / 2).mean())
    assert head.first == pytest.approx((1 / i[1:]).mean())
    assert head.same == pytest.approx((1 / i).mean())
    assert head.previous == pytest.approx((1 / i[1:]).mean())
    assert head.next == 0.0
    assert head.evenness == pytest.approx(1.0)
    assert head.near == pytest.approx(np.minimum(5 / i, 1).mean())


def test_positions_and_rows_that_see_nothing():
    w = np.zeros((3, 5))
    w[1:, 0] = 0.25  # the rest went to a sink
    head = viz.summarise(w)[0]
    assert head.first == 1.0
    assert head.distance == pytest.approx((3 + 4) / 2)
    assert viz.summarise(w, q_offset=0)[0].distance == pytest.approx((1 + 2) / 2)
    assert viz.summarise(np.zeros((3, 5)))[0].entropy == 0.0


def test_heads_that_are_nan_are_called_so():
    w = np.stack([EVEN, EVEN])
    w[1, 3] = np.nan
    assert [head.kind for head in viz.summarise(w)] == ["broad", "undefined"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_and_libraries(dtype):
    torch = pytest.importorskip("torch")
    w = torch.asarray(np.stack([shifted(-1), FIRST])).to(getattr(torch, dtype)).requires_grad_()
    assert [head.kind for head in viz.summarise(w)] == ["previous token", "first token"]
    assert viz.summarise(np.ones((1, 1, 1), np.float16))[0].kind == "same token"


def test_layers_and_heads_are_found_by_two_numbers():
    heads = np.stack([np.stack([shifted(-1), FIRST]), np.stack([EVEN, shifted(0)])])
    summary = viz.summarise(heads.astype(np.float32))
    assert summary.shape == (2, 2)
    assert summary[1, 0].kind == "broad"
    assert summary[0, 1].kind == "first token"
    assert "1.1" in repr(summary)


def test_rollout_multiplies_layers():
    rng = np.random.default_rng(0)
    w = rng.random((3, 2, 5, 5))
    w /= w.sum(-1, keepdims=True)
    found = viz.rollout(w)
    first, second = (0.5 * layer.mean(0) + 0.5 * np.eye(5) for layer in w[:2])
    np.testing.assert_allclose(found[1], second @ first)
    np.testing.assert_allclose(found.sum(-1), 1.0)
    np.testing.assert_allclose(viz.rollout(list(w), residual=0.0)[0], w[0].mean(0))
    with pytest.raises(ValueError, match=r"residual: wanted a share in \[0, 1\]"):
        viz.rollout(w, 1.5)


def test_pictures_have_text():
    pytest.importorskip("matplotlib")
    words = ["The", "cat\x00\n", "<sat>", "$5", "&", "mat"]
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 4))
    w = aa.attention_weights(x, x, causal=True)
    figure = viz.heat_map(w[0, 0], words, title="One $ head $")
    svg = viz.to_svg(figure)
    ElementTree.fromstring(svg)
    assert svg == viz.to_svg(viz.heat_map(w[0, 0], words, title="One $ head $"))
    found = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for text in ("One $ head $", "The", r"cat\x00\n", "&lt;sat&gt;", "&amp;", "mat", "$5", "weight", "looks"):
        assert text in found, text
    # The first row sees itself alone; the numbers of the last row are its weights.
    assert "100" in found
    assert {f"{100 * x:.0f}" for x in w[0, 0, -1] if x >= 0.005} <= set(found)
    page = viz.to_html(figure, "A <head>")
    assert "<title>A &lt;head&gt;</title>" in page
    assert ">&lt;sat&gt;<" in page


def test_a_grid_names_heads_and_kinds(tmp_path):
    pytest.importorskip("matplotlib")
    figure = viz.head_grid(np.stack([np.stack([shifted(-1), FIRST]), np.stack([EVEN, shifted(0)])]))
    svg = viz.save(figure, tmp_path / "grid.svg").read_text()
    for text in ("layer 0, head 1", "first token", "layer 1, head 0", "broad"):
        assert text in svg
    assert viz.save(figure, tmp_path / "grid.html", "Heads").read_text().startswith("<!doctype html>")
    assert viz.save(figure, tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: viz.heat_map(np.zeros((2, 3, 3))), "weights: wanted one head"),
        (lambda: viz.heat_map(np.zeros((3, 3)), ["a"]), "tokens: wanted 3 names, got 1"),
        (lambda: viz.head_grid(np.zeros((3, 3))), "weights: wanted \\(heads, rows, keys\\)"),
        (lambda: viz.head_grid(np.zeros((2, 3, 3)), names=["a"]), "names: wanted 2 names"),
        (lambda: viz.head_grid(np.zeros((2, 3, 3)), columns=0), "columns: wanted 1 or more"),
        (lambda: viz.heat_map(np.zeros((0, 3))), "weights: wanted one head"),
        (lambda: viz.heat_map(np.array([[0.5, -0.5]])), "weights: wanted softmax weights, which are 0 or"),
        (lambda: viz.summarise(np.zeros(3)), "weights: wanted floats of shape"),
        (lambda: viz.summarise([[1.0]]), "weights: wanted an array, got list"),
        (lambda: viz.rollout(np.zeros((1, 2, 3, 4))), "weights: wanted layers"),
    ],
)
def test_errors_name_the_argument(draw, message):
    pytest.importorskip("matplotlib")
    with pytest.raises((TypeError, ValueError), match=message):
        draw()
