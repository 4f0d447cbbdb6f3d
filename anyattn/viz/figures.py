"""What heads do, in pictures: matplotlib figures, also as SVG and HTML whose text can be read and found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

try:
    import matplotlib
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("pictures need matplotlib: pip install 'anyattn[viz]'") from error

from anyattn.arrays import Array
from anyattn.numbers import integer
from anyattn.viz.heads import host_weights, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["head_grid", "heat_map", "save", "to_html", "to_svg"]

# Perceptually even, and told apart in grey and by colour-blind readers.
_COLOURS = "viridis"
# Tokens whose names are written beside a map, and weights that are written into its cells.
_MOST_NAMED = 64
_MOST_NUMBERED = 16
_CELL = 0.28


def heat_map(
    weights: Array,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """The weights of one head: rows look, columns are looked at.

    Parameters
    ----------
    weights : float array, shape (Lq, Lk)
        That the host can read.
    tokens : sequence of str, optional
        Names of the rows; default their numbers.
    key_tokens : sequence of str, optional
        Names of the columns; default `tokens` where there are as many columns as rows.
    title : str, optional

    Returns
    -------
    matplotlib.figure.Figure
        Up to 16 tokens its cells carry their weights in percent; colours follow their square root, so that
        small ones show.
    """
    w = host_weights(weights, "weights")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"weights: wanted one head, (rows, keys), got shape {w.shape}; head_grid draws more")
    if key_tokens is None and w.shape[0] == w.shape[1]:
        key_tokens = tokens
    size = [max(2.5, _CELL * min(n, 3 * _MOST_NAMED)) for n in w.shape]
    figure = Figure(figsize=(size[1] + 1.6, size[0] + 1.6), layout="constrained")
    axes = figure.subplots()
    image = _draw(axes, w)
    _name_axis(axes.yaxis, tokens, w.shape[0], "tokens")
    _name_axis(axes.xaxis, key_tokens, w.shape[1], "key_tokens")
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel("looks")
    axes.set_xlabel("is looked at")
    if max(w.shape) <= _MOST_NUMBERED:
        _write_numbers(axes, w)
    marks = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[x**0.5 for x in marks], label="weight")
    bar.ax.set_yticklabels([f"{100 * x:g} %" for x in marks])
    if title is not None:
        axes.set_title(_plain(title))
    return figure


def head_grid(
    weights: Array,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    columns: int | None = None,
) -> Figure:
    """Small maps of many heads beside each other, each with what such a head is called.

    Parameters
    ----------
    weights : float array, shape (H, Lq, Lk) or (layers, H, Lq, Lk)
        That the host can read; layers are rows of the grid.
    names : sequence of str, optional
        A name for each head, in order; default "head h" or "layer l, head h", from 0.
    title : str, optional
    columns : int, optional
        Of a grid without layers; default as square as it gets.

    Returns
    -------
    matplotlib.figure.Figure
    """
    w = host_weights(weights, "weights")
    columns = None if columns is None else integer(columns, "columns", least=1)
    if w.ndim not in (3, 4) or 0 in w.shape:
        raise ValueError(f"weights: wanted (heads, rows, keys) or (layers, heads, rows, keys), got {w.shape}")
    if w.ndim == 4:
        columns = w.shape[1]
        default = [f"layer {n}, head {h}" for n in range(w.shape[0]) for h in range(w.shape[1])]
    else:
        columns = columns or int(numpy.ceil(numpy.sqrt(w.shape[0])))
        default = [f"head {h}" for h in range(w.shape[0])]
    maps = w.reshape(-1, *w.shape[-2:])
    names = default if names is None else list(names)
    if len(names) != len(maps):
        raise ValueError(f"names: wanted {len(maps)} names, one for each head, got {len(names)}")
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(1.7 * columns, 1.95 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, one, name, found in zip(grid.flat, maps, names, summarise(maps), strict=False):
        _draw(axes, one)
        axes.set_title(f"{_plain(name)}\n{found.kind}", fontsize=7)
    if title is not None:
        figure.suptitle(_plain(title))
    return figure


def to_svg(figure: Figure) -> str:
    """A figure as SVG whose text is text, to be read aloud, found and copied; the same bytes each time."""
    # Every text names its fonts: two, as ten for each cell's number are most of a file.
    fonts = {"font.sans-serif": ["DejaVu Sans", "Arial"]}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "anyattn", **fonts}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def to_html(figure: Figure, title: str = "Attention") -> str:
    """A figure as a page that is complete in itself."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{margin:2em;font-family:system-ui,sans-serif}svg{max-width:100%;height:auto}</style>"
        f"<h1>{escape(title)}</h1>{to_svg(figure)}</html>\n"
    )


def save(figure: Figure, path: str | Path, title: str = "Attention") -> Path:
    """Write a figure as what the name ends in: .svg or .html, or any picture format of matplotlib."""
    path = Path(path)
    if path.suffix == ".svg":
        path.write_text(to_svg(figure), encoding="utf-8")
    elif path.suffix == ".html":
        path.write_text(to_html(figure, title), encoding="utf-8")
    else:
        figure.savefig(path)
    return path


def _draw(axes: Axes, weights: numpy.ndarray[Any, Any]) -> Any:
    return axes.imshow(numpy.sqrt(weights), vmin=0.0, vmax=1.0, cmap=_COLOURS, interpolation="none")


def _name_axis(axis: Any, names: Sequence[str] | None, count: int, argument: str) -> None:
    if names is None:
        return
    if len(names) != count:
        raise ValueError(f"{argument}: wanted {count} names, got {len(names)}")
    step = -(-count // _MOST_NAMED)
    axis.set_ticks(range(0, count, step), [_plain(name) for name in names[::step]])


def _plain(text: str) -> str:
    """Text that matplotlib writes as it is: a dollar sign would begin a formula, and XML has no NUL."""
    shown = (x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)
    return "".join(shown).replace("$", r"\$")


def _write_numbers(axes: Axes, weights: numpy.ndarray[Any, Any]) -> None:
    for (row, key), weight in numpy.ndenumerate(weights):
        if weight >= 0.005:
            colour = "black" if weight**0.5 > 0.6 else "white"
            axes.text(key, row, f"{100 * weight:.0f}", ha="center", va="center", fontsize=7, color=colour)
