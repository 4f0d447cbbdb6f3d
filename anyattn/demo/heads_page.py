"""One HTML page with the attention maps of every head of a model for one sentence, complete in itself.

The page reads without JavaScript; the script beside it lets the reader choose another head or word. Colours
follow the reader's light or dark setting, and nothing is told by colour alone: every cell, word and bar names
its share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy

from anyattn.demo.attention_map import (
    DARK,
    LEVELS,
    LIGHT,
    bounds,
    colour_rules,
    head_map,
    level,
    percent,
    thumbnail,
)
from anyattn.demo.text import Words
from anyattn.viz import summarise

_MOST_BARS = 10
_FOOTER = (
    "Colours follow the square root of a share, so that small ones can be seen. "
    "Attention shows where information is taken from, not why."
)


class Heads(NamedTuple):
    """What a page shows.

    Attributes
    ----------
    words : Words
        The words of the sentence.
    weights : numpy.ndarray
        (layers, heads, words, words), rows summing to 1.
    word : int
        The word that is chosen at first.
    layer, head : int
        The map that is chosen at first, counted from 0; `head` is None for the mean of the layer.
    facts : str
        One line on what computed it.
    """

    words: Words
    weights: numpy.ndarray[Any, Any]
    word: int
    layer: int
    head: int | None
    facts: str


def write(folder: Path, heads: Heads) -> list[Path]:
    """Write the page as ``index.html`` and each map as ``layerN-headM.svg``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "index.html"]
    written[0].write_text(page(heads), encoding="utf-8")
    for layer, maps in enumerate(heads.weights):
        for head, weights in [(None, maps.mean(axis=0)), *enumerate(maps)]:
            path = folder / _file_name(layer, head)
            title = _name(layer, head, len(maps))
            path.write_text(
                head_map(heads.words.labels, weights, title, emphasis=heads.word), encoding="utf-8"
            )
            written.append(path)
    return written


def page(heads: Heads) -> str:
    """The HTML of the page."""
    labels, special = heads.words.labels, heads.words.special
    layers, count = heads.weights.shape[:2]
    maps = numpy.concatenate([heads.weights.mean(axis=1, keepdims=True), heads.weights], axis=1)
    columns = count + 1
    kinds = summarise(heads.weights)
    names = [
        _name(layer, head, count) + ("" if head is None else f": {kinds[layer, head].kind}")
        for layer in range(layers)
        for head in (None, *range(count))
    ]
    chosen = heads.layer * columns + (0 if heads.head is None else heads.head + 1)
    shown = maps.reshape(-1, len(labels), len(labels))[chosen]
    row = shown[heads.word]
    data = {
        "labels": labels,
        "special": special,
        "names": names,
        "maps": numpy.rint(maps * 1000).astype(int).reshape(len(names), -1).tolist(),
        "chosen": chosen,
        "word": heads.word,
    }
    thresholds = bounds()
    return _part("html").substitute(
        style=_part("css").substitute(
            light=_variables(LIGHT),
            dark=_variables(DARK),
            rules=colour_rules([f"var(--l{step})" for step in range(1, LEVELS + 1)]),
        ),
        script=_part("js").template,
        # "<" would let a word of the sentence end the script.
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
        facts=escape(heads.facts),
        words=_sentence(labels, special, row, heads.word),
        caption=escape(names[chosen]),
        map=head_map(labels, shown, names[chosen], emphasis=heads.word, in_page=True),
        word=escape(labels[heads.word]),
        bars=_bars(labels, special, row),
        least=percent(thresholds[0]),
        legend="".join(
            f'<span><i style="background:var(--l{step})"></i>{percent(bound)}</span>'
            for step, bound in enumerate(thresholds, start=1)
        ),
        columns=columns,
        grid=_grid(maps, names, chosen),
        footer=_FOOTER,
    )


def _part(suffix: str) -> Template:
    return Template(
        resources.files("anyattn.demo").joinpath(f"heads_page.{suffix}").read_text(encoding="utf-8")
    )


def _variables(colours: Sequence[str]) -> str:
    """The colour steps as CSS variables, and the colour of text on each."""
    return " ".join(
        f"--l{step}: {colour}; --on{step}: {_ink(colour)};" for step, colour in enumerate(colours, start=1)
    )


def _ink(colour: str) -> str:
    """Black or white, whichever has the larger contrast with a hexadecimal colour (WCAG 2.2)."""
    parts = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def _name(layer: int, head: int | None, heads: int) -> str:
    return f"Layer {layer + 1}, " + (f"mean of {heads} heads" if head is None else f"head {head + 1}")


def _file_name(layer: int, head: int | None) -> str:
    return f"layer{layer + 1}-" + ("mean.svg" if head is None else f"head{head + 1:02d}.svg")


def _sentence(labels: Sequence[str], special: Sequence[bool], row: Any, chosen: int) -> str:
    buttons = []
    for number, label in enumerate(labels):
        step = level(row[number])
        style = f' style="background:var(--l{step});color:var(--on{step})"' if step else ""
        mark = ' class="mark"' if special[number] else ""
        pressed = "true" if number == chosen else "false"
        state = f'aria-pressed="{pressed}" title="{percent(row[number])}"'
        buttons.append(f'<button type="button"{mark} {state}{style}>{escape(label)}</button>')
    return "".join(buttons)


def _bars(labels: Sequence[str], special: Sequence[bool], row: Any) -> str:
    items = []
    for number in numpy.argsort(-row, kind="stable")[:_MOST_BARS]:
        mark = " mark" if special[number] else ""
        name = f'<span class="name{mark}">{escape(labels[number])}</span>'
        width = f"width:{100 * row[number] / row.max():.1f}%"
        bar = f'<span class="track"><span class="bar" style="{width}"></span></span>'
        items.append(f'<li>{name}{bar}<span class="share">{percent(row[number])}</span></li>')
    return "".join(items)


def _grid(maps: numpy.ndarray[Any, Any], names: Sequence[str], chosen: int) -> str:
    layers, columns = maps.shape[:2]
    cells = ["<span></span>", '<span class="head">mean</span>']
    cells += [f'<span class="head">{head}</span>' for head in range(1, columns)]
    for layer in range(layers):
        cells.append(f'<span class="layer">Layer {layer + 1}</span>')
        for column in range(columns):
            head = column - 1 if column else None
            name = names[layer * columns + column]
            current = "true" if layer * columns + column == chosen else "false"
            picture = thumbnail(maps[layer, column].tolist(), name)
            cells.append(
                f'<a href="{_file_name(layer, head)}" title="{name}" aria-current="{current}">{picture}</a>'
            )
    return "".join(cells)
