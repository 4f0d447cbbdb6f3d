"""Numbers of heads whose weights are known, and figures whose text can be found."""

from __future__ import annotations

import re
from dataclasses import astuple
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
    head = viz.summarise(w, 2)[0]
    assert head.first == 1.0
    assert head.distance == pytest.approx((3 + 4) / 2)
    assert viz.summarise(w, q_offset=0)[0].distance == pytest.approx((1 + 2) / 2)
    assert viz.summarise(np.zeros((3, 5)), 2)[0].entropy == 0.0
    assert viz.summarise(np.zeros((3, 0)), 0)[0].entropy == 0.0


def test_chosen_rows_stand_where_they_were():
    q = np.random.default_rng(0).standard_normal((1, 20, 4))
    every = aa.attention_weights(q, q, causal=True, backend="reference")
    chosen = aa.attention_weights(q, q, rows=[7, 3], causal=True, backend="reference")
    head = viz.summarise(chosen, 0, rows=np.array([7, 3]))[0]
    assert head.same == pytest.approx((every[0, 7, 7] + every[0, 3, 3]) / 2)
    assert head.previous == pytest.approx((every[0, 7, 6] + every[0, 3, 2]) / 2)
    assert head.distance == pytest.approx((chosen[0] * abs(np.array([[7], [3]]) - np.arange(20))).sum() / 2)
    last = aa.attention_weights(q[:, -5:], q, rows=4, causal=True, backend="reference")
    assert viz.summarise(last, q_offset=15, rows=4)[0].same == pytest.approx(every[0, 19, 19])


def test_heads_that_are_nan_are_called_so():
    w = np.stack([EVEN, EVEN])
    w[1, 3] = np.nan
    assert [head.kind for head in viz.summarise(w)] == ["broad", "undefined"]


def test_numbers_do_not_depend_on_how_many_rows_are_computed_at_once(monkeypatch):
    w = np.tril(np.random.default_rng(0).random((2, 3, 7, 7))) / 7
    w[1, 2, 5] = 0
    at_once = [astuple(head) for head in viz.summarise(w)]
    # One row is 42 weights.
    monkeypatch.setattr("anyattn.viz.heads._AT_ONCE", 100)
    np.testing.assert_allclose([astuple(head) for head in viz.summarise(w)], at_once, rtol=1e-12)


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


def texts(figure, title=None):
    """What is written in the SVG of a figure, and what the whole is called."""
    name, *parts = ElementTree.fromstring(viz.to_svg(figure, title))
    assert name.tag == "{http://www.w3.org/2000/svg}title"
    return name.text, [x.text for part in parts for x in part.iter("{http://www.w3.org/2000/svg}text")]


def test_a_grid_names_heads_and_kinds(tmp_path):
    pytest.importorskip("matplotlib")
    figure = viz.head_grid(np.stack([np.stack([shifted(-1), FIRST]), np.stack([EVEN, shifted(0)])]))
    name, found = texts(figure)
    assert name == "Attention"
    for text in ("layer 0, head 1", "first token", "layer 1, head 0", "broad"):
        assert text in found
    assert viz.save(figure, tmp_path / "grid.html", "Heads").read_text().startswith("<!doctype html>")
    assert viz.save(figure, tmp_path / "grid.HTML", "Heads").read_text() == viz.to_html(figure, "Heads")
    chosen = viz.head_grid(shifted(-1)[None, [4, 2]], names=["$a$ <b>"], title="$x$", q_offset=0, rows=[4, 2])
    assert texts(chosen) == ("$x$", ["$a$ <b>", "previous token", "$x$"])


@pytest.mark.parametrize("draw", [viz.heat_map, lambda w: viz.head_grid(np.stack([w, w]), title="Two")])
def test_drawing_moves_nothing(draw, tmp_path):
    pytest.importorskip("matplotlib")
    figure = draw(EVEN[:3, :3])
    first = viz.to_svg(figure)
    assert viz.save(figure, tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert viz.save(figure, tmp_path / "it.SVG").read_text() == first
    assert viz.to_svg(draw(EVEN[:3, :3])) == first


def test_no_text_is_markup_or_cut_off():
    Text = pytest.importorskip("matplotlib.text").Text
    words = ["</text><script>x()</script>", "mat", r"\$", "]]>\ud800\u202e", "w" * 99]
    title = "cost $a_1$\nof " + "many " * 40
    figure = viz.heat_map(np.eye(5), words, title=title)
    name, found = texts(figure)
    for text in (words[0], r"\$", r"]]>\ud800\u202e", "w" * 39 + "\u2026", "cost $a_1$"):
        assert text in found, text
    assert name == " ".join(title.split())
    figure.draw_without_rendering()
    for label in figure.findobj(Text):
        box = label.get_window_extent()
        edges = *box.min, *(figure.bbox.max - box.max)
        inside = min(edges) > -4  # pixels: room for letters that reach below the line
        assert inside or not (label.get_visible() and label.get_text()), label.get_text()
    assert "<script" not in viz.to_html(figure, "<script>")
    assert texts(figure, "a\0<b>")[0] == r"a\x00<b>"


def test_letters_that_the_font_lacks_are_left_to_the_reader():
    pytest.importorskip("matplotlib")
    names = ["\u65e5\u672c\u8a9e", "\U0001f469\u200d\U0001f467"]
    figure = viz.heat_map(np.eye(2), names, title="\u0939\u093f")
    name, found = texts(figure)
    assert name == "\u0939\u093f"
    assert set(names) < set(found)
    # Three letters as wide as they are high, of which matplotlib makes room for 0.6.
    assert figure.axes[0].yaxis.labelpad == viz.heat_map(np.eye(2), ["a", "b"]).axes[0].yaxis.labelpad + 12


def test_large_maps_show_the_largest_weights_and_say_so(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("anyattn.viz.figures._MOST_CELLS", 4)
    monkeypatch.setattr("anyattn.viz.figures._MOST_CELLS_IN_GRID", 7)
    w = np.random.default_rng(0).random((10, 7)).astype(np.float16)
    figure = viz.heat_map(w, [str(n) for n in range(10)])
    image = figure.axes[0].images[0]
    blocks = [[w[i : i + 3, j : j + 2].max() for j in range(0, 7, 2)] for i in range(0, 10, 3)]
    np.testing.assert_allclose(image.get_array() ** 2, np.array(blocks, float))
    assert list(image.get_extent()) == [-0.5, 7.5, 11.5, -0.5]
    assert figure.axes[0].get_xlim() + figure.axes[0].get_ylim() == (-0.5, 6.5, 9.5, -0.5)
    assert "largest weight of 3 rows and 2 keys" in texts(figure)[1]
    grid = viz.head_grid(w[None], q_offset=0)
    assert "a cell shows the largest weight of 2 rows and 1 keys" in texts(grid)[1]


def test_one_token_and_one_row_can_be_read():
    pytest.importorskip("matplotlib")
    assert texts(viz.heat_map(np.ones((1, 1), np.float16)))[1][:5] == [
        "0",
        "is looked at",
        "0",
        "looks",
        "100",
    ]
    row = viz.heat_map(np.full((1, 200), 0.005))
    row.draw_without_rendering()
    assert row.axes[0].get_window_extent().height > 100


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: viz.heat_map(np.zeros((2, 3, 3))), "weights: wanted one head"),
        (lambda: viz.heat_map(np.zeros((3, 3)), ["a"]), "tokens: wanted 3 names, got 1"),
        (lambda: viz.head_grid(np.zeros((3, 3))), "weights: wanted \\(heads, rows, keys\\)"),
        (lambda: viz.head_grid(np.zeros((2, 3, 3)), names=["a"]), "names: wanted 2 names"),
        (lambda: viz.head_grid(np.zeros((2, 3, 3)), columns=0), "columns: wanted 1 or more"),
        (lambda: viz.heat_map(np.zeros((0, 3))), "weights: wanted one head"),
        (lambda: viz.heat_map(np.array([[0.5, -0.5]])), "weights: wanted softmax .* from 0 to 1, got -0.5"),
        (lambda: viz.summarise(np.array([[np.nan, 1.5]]), 0), "weights: wanted softmax .* got 1.5"),
        (lambda: viz.heat_map(np.zeros((3, 3)), [1, 2, 3]), "tokens: wanted str, got int 1"),
        (lambda: viz.heat_map(np.zeros((3, 3)), key_tokens=3), "key_tokens: wanted a sequence of str"),
        (lambda: viz.heat_map(np.zeros((3, 3)), title=3), "title: wanted str, got int 3"),
        (lambda: viz.head_grid(np.zeros((2, 3, 3)), names=[b"a", b"b"]), "names: wanted str, got bytes"),
        (lambda: viz.head_grid(np.zeros((2, 1, 3, 3)), columns=1), "columns: wanted None beside layers"),
        (lambda: viz.save(viz.heat_map(np.eye(2)), "head"), "path: wanted a name that ends in one of"),
        (lambda: viz.save(viz.heat_map(np.eye(2)), "a.png", "A"), "title: wanted None, as .svg and .html"),
        (lambda: viz.summarise(np.zeros((2, 3))), "q_offset: wanted the position of row 0 .*2 rows of 3"),
        (lambda: viz.head_grid(np.zeros((1, 2, 3))), "q_offset: wanted the position of row 0"),
        (lambda: viz.summarise(np.zeros((2, 3)), rows=[0, 1]), "q_offset: wanted .* beside rows, got None"),
        (lambda: viz.summarise(np.zeros((2, 3)), 0, rows=[0]), r"rows: wanted .* of the 2 rows .* got \[0\]"),
        (lambda: viz.summarise(np.zeros((1, 3)), 0, rows=-1), r"rows: wanted the numbers, from 0, .* \[-1\]"),
        (lambda: viz.summarise(np.zeros(3)), "weights: wanted floats of shape"),
        (lambda: viz.summarise([[1.0]]), "weights: wanted an array, got list"),
        (lambda: viz.rollout(np.zeros((1, 2, 3, 4))), "weights: wanted layers"),
        (lambda: viz.rollout(np.zeros((2, 0, 3, 3))), r"weights: wanted .* one head or more .* \(0, 3, 3\)"),
        (lambda: viz.rollout([np.zeros((2, 1, 3, 3)), np.zeros((1, 1, 3, 3))]), "weights: .* in layer 1"),
        (lambda: viz.rollout(3), "weights: wanted layers of weights, got int"),
    ],
)
def test_errors_name_the_argument(draw, message):
    pytest.importorskip("matplotlib")
    with pytest.raises((TypeError, ValueError), match=message):
        draw()
