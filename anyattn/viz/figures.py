"""What heads do, in pictures: matplotlib figures, also as SVG and HTML whose text can be read and found."""

from __future__ import annotations

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
_MOST_LETTERS = 40
# Inches.
_CELL = 0.28
_LETTER = 0.1
_LINE = 0.2
# Cells of a map in each direction, alone and in a grid: a screen shows no finer ones, and thin diagonals,
# which heads that look at a neighbour have, fall between the pixels of more.
_MOST_CELLS = 1000
_MOST_CELLS_IN_GRID = 120
_TITLE = "Attention"
_JOINERS = "\u200c\u200d"


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
        Names of the rows; default their numbers. Of more than 64 some are written, and 40 letters of each.
    key_tokens : sequence of str, optional
        Names of the columns; default `tokens` where there are as many columns as rows.
    title : str, optional

    Returns
    -------
    matplotlib.figure.Figure
        Up to 16 tokens its cells carry their weights in percent; colours follow their square root, so that
        small ones show. Beyond 1000 rows or keys a cell shows the largest weight of several, and the figure
        says of how many.
    """
    w = host_weights(weights, "weights")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"weights: wanted one head, (rows, keys), got shape {w.shape}; head_grid draws more")
    if key_tokens is None and w.shape[0] == w.shape[1]:
        key_tokens = tokens
    names = [_names(tokens, w.shape[0], "tokens"), _names(key_tokens, w.shape[1], "key_tokens")]
    down, across = (max(2.5, _CELL * min(n, _MOST_NAMED)) for n in w.shape)
    beside, below = (1.6 + _LETTER * max([0, *(_width(name) - 8 for name in of)]) for of in names)
    figure = Figure(figsize=(across + beside, down + below), layout="compressed")
    axes = figure.subplots()
    # As high and wide as there is room for: one row of many keys would be a line.
    cell = (down / w.shape[0]) / (across / w.shape[1])
    image, block = _draw(axes, w, _MOST_CELLS, cell)
    for axis, of in zip((axes.yaxis, axes.xaxis), names, strict=True):
        _name_axis(axis, of)
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel("looks")
    axes.set_xlabel("is looked at")
    if max(w.shape) <= _MOST_NUMBERED:
        _write_numbers(axes, w)
    marks = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[x**0.5 for x in marks], label=_weight(block))
    bar.ax.set_yticklabels([f"{100 * x:g} %" for x in marks])
    if title is not None:
        _write_title(figure, title)
    return figure


def head_grid(
    weights: Array,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    columns: int | None = None,
    q_offset: int | None = None,
    rows: int | Sequence[int] | Array | None = None,
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
    q_offset, rows : optional
        As for `summarise`.

    Returns
    -------
    matplotlib.figure.Figure
        Beyond 120 rows or keys a cell shows the largest weight of several, and the figure says of how many.
    """
    w = host_weights(weights, "weights")
    columns = None if columns is None else integer(columns, "columns", least=1)
    if w.ndim not in (3, 4) or 0 in w.shape:
        raise ValueError(f"weights: wanted (heads, rows, keys) or (layers, heads, rows, keys), got {w.shape}")
    if w.ndim == 4:
        if columns is not None:
            raise ValueError(f"columns: wanted None beside layers, which are rows of the grid, got {columns}")
        columns = w.shape[1]
        default = [f"layer {n}, head {h}" for n in range(w.shape[0]) for h in range(w.shape[1])]
    else:
        columns = columns or int(numpy.ceil(numpy.sqrt(w.shape[0])))
        default = [f"head {h}" for h in range(w.shape[0])]
    maps = w.reshape(-1, *w.shape[-2:])
    names = default if names is None else _strings(names, len(maps), "names")
    kinds = summarise(maps, q_offset, rows=rows)
    down = -(-len(maps) // columns)
    figure = Figure(figsize=(1.7 * columns, 1.95 * down + 0.4), layout="constrained")
    grid = figure.subplots(down, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, one, name, found in zip(grid.flat, maps, names, kinds, strict=False):
        _, block = _draw(axes, one, _MOST_CELLS_IN_GRID, one.shape[1] / one.shape[0])
        axes.set_title(f"{_plain(_short(name))}\n{found.kind}", fontsize=7)
    if block != (1, 1):
        figure.supxlabel(f"a cell shows the {_weight(block)}", fontsize=7)
    if title is not None:
        _write_title(figure, title)
    return figure


def to_svg(figure: Figure, title: str | None = None) -> str:
    """A figure as SVG whose text is text, to be read aloud, found and copied; the same bytes each time.

    Neither this nor `save` moves what it draws, as `Figure.savefig` does with layouts of matplotlib.

    `title` is what it is called where it is read aloud, by default what stands above it, or "Attention".
    Letters that matplotlib's font lacks are left to the fonts of the reader.
    """
    # Every text names its fonts: two, as ten for each cell's number are most of a file.
    fonts = {"font.sans-serif": ["DejaVu Sans", "Arial"]}
    metadata = {"Date": None, "Creator": None, "Title": _title(figure, title)}
    out = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "anyattn", **fonts}),
        warnings.catch_warnings(),
        _unmoved(figure),
    ):
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(out, format="svg", metadata=metadata)
    text = out.getvalue()
    return text[text.index("<svg") :]


def to_html(figure: Figure, title: str | None = None) -> str:
    """A figure as a page that is complete in itself; `title` is by default what stands above the figure."""
    title = _title(figure, title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{margin:2em;font-family:system-ui,sans-serif}svg{max-width:100%;height:auto}</style>"
        f"<h1>{escape(title)}</h1>{to_svg(figure, title)}</html>\n"
    )


def save(figure: Figure, path: str | Path, title: str | None = None) -> Path:
    """Write a figure as what the name ends in: .svg or .html, or any picture format of matplotlib.

    `title` is that of `to_svg` and `to_html`; other formats take none.
    """
    path = Path(path)
    suffix = path.suffix.lower()[1:]
    formats = {"html", *figure.canvas.get_supported_filetypes()}
    if suffix not in formats:
        raise ValueError(f"path: wanted a name that ends in one of {sorted(formats)}, got {str(path)!r}")
    if suffix == "svg":
        path.write_text(to_svg(figure, title), encoding="utf-8")
    elif suffix == "html":
        path.write_text(to_html(figure, title), encoding="utf-8")
    elif title is not None:
        raise ValueError(f"title: wanted None, as .svg and .html alone carry one, got {title!r}")
    else:
        with _unmoved(figure):
            figure.savefig(path, format=suffix)
    return path


@contextmanager
def _unmoved(figure: Figure) -> Iterator[None]:
    """Put axes back to where they were: a constrained layout begins where the last drawing left them."""
    placed = [(axes, axes.get_position(original=True).frozen(), axes.get_in_layout()) for axes in figure.axes]
    try:
        yield
    finally:
        for axes, position, moves in placed:
            axes.set_position(position)
            axes.set_in_layout(moves)


def _title(figure: Figure, title: str | None) -> str:
    if title is not None:
        return _printable(_string(title, "title"))
    shown = [text for text in (figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)) if text]
    one = shown[0] if figure.get_suptitle() or len(shown) == 1 else _TITLE
    return one.replace(r"\$", "$").replace("\n", " ")


def _draw(
    axes: Axes, weights: numpy.ndarray[Any, Any], most: int, cell: float
) -> tuple[Any, tuple[int, ...]]:
    """Draw weights in cells that are `cell` times as high as wide.

    Returns the image, and of how many rows and keys each of its cells shows the largest weight.
    """
    block = tuple(-(-n // most) for n in weights.shape)
    cells = weights
    for axis, step in enumerate(block):
        if step > 1:
            cells = numpy.maximum.reduceat(cells, range(0, weights.shape[axis], step), axis=axis)
    bottom, right = (n * step - 0.5 for n, step in zip(cells.shape, block, strict=True))
    image = axes.imshow(
        numpy.sqrt(cells, dtype=numpy.float64),
        vmin=0.0,
        vmax=1.0,
        cmap=_COLOURS,
        interpolation="none",
        extent=(-0.5, right, bottom, -0.5),
        aspect=cell,
    )
    axes.set(xlim=(-0.5, weights.shape[1] - 0.5), ylim=(weights.shape[0] - 0.5, -0.5))
    return image, block


def _weight(block: tuple[int, ...]) -> str:
    return "weight" if block == (1, 1) else f"largest weight of {block[0]} rows and {block[1]} keys"


def _names(names: Sequence[str] | None, count: int, argument: str) -> list[str]:
    return [] if names is None else [_short(name) for name in _strings(names, count, argument)]


def _name_axis(axis: Any, names: list[str]) -> None:
    if not names:
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        return
    step = -(-len(names) // _MOST_NAMED)
    axis.set_ticks(range(0, len(names), step), [_plain(name) for name in names[::step]])
    # matplotlib takes a letter that its font lacks for 0.6 of its size, and readers' fonts write wide ones.
    axis.labelpad += 4.0 * max(_width(name) - len(name) for name in names)


def _width(name: str) -> int:
    """How many narrow letters are as wide."""
    return len(name) + sum(unicodedata.east_asian_width(x) in "WF" for x in name)


def _strings(names: Any, count: int, argument: str) -> list[str]:
    if not isinstance(names, Sequence | numpy.ndarray):
        raise TypeError(f"{argument}: wanted a sequence of strings, got {type(names).__name__}")
    if len(names) != count:
        raise ValueError(f"{argument}: wanted {count} names, got {len(names)}")
    return [_string(name, argument) for name in names]


def _string(text: Any, argument: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{argument}: wanted str, got {type(text).__name__} {text!r}")
    return text


def _write_title(figure: Figure, title: str) -> None:
    """Write the title above a figure, in lines that are no wider, and make the figure higher by these."""
    letters = int(9 * figure.get_figwidth())
    parts = _string(title, "title").split("\n")
    lines = [_plain(line) for part in parts for line in textwrap.wrap(part, letters) or [""]]
    figure.set_figheight(figure.get_figheight() + _LINE * (len(lines) - 1))
    figure.suptitle("\n".join(lines))


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"


def _printable(text: str) -> str:
    """Text with escapes for what shows nothing, of which XML refuses some."""
    # Joiners show nothing, but letters and pictures are written with them.
    return "".join(
        x if x.isprintable() or x in _JOINERS else x.encode("unicode_escape").decode() for x in text
    )


def _plain(text: str) -> str:
    """Text that matplotlib writes as it is: two dollar signs would make a formula."""
    return _printable(text).replace("$", r"\$")


def _write_numbers(axes: Axes, weights: numpy.ndarray[Any, Any]) -> None:
    for (row, key), weight in numpy.ndenumerate(weights.astype(numpy.float64)):
        if weight >= 0.005:
            colour = "black" if weight**0.5 > 0.6 else "white"
            axes.text(key, row, f"{100 * weight:.0f}", ha="center", va="center", fontsize=7, color=colour)
