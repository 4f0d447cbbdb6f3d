"""Text before the model: sentences out of files, batches out of sentences, words out of word pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from anyattn.demo.errors import DemoError

# A full stop after one of these, or after a single letter, does not end a sentence.
_TITLES = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "rev", "gen", "col", "capt", "hon"])
_LATIN = frozenset(["al", "approx", "cf", "e.g", "etc", "i.e", "vs"])
_BEFORE_NUMBERS = frozenset(["fig", "no", "p", "pp", "vol"])
_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s|$)""")
_PARAGRAPH = re.compile(r"\n\s*\n")


def shipped_sentences() -> list[str]:
    """The sentences that come with the demo."""
    return resources.files("anyattn.demo").joinpath("sentences.txt").read_text(encoding="utf-8").splitlines()


def read_sentences(path: Path, split: str) -> tuple[list[str], str]:
    """Sentences of a UTF-8 text file.

    Parameters
    ----------
    path : Path
        The file.
    split : {"auto", "lines", "prose"}
        One sentence a line, or running text whose paragraphs are separated by empty lines; "auto" takes lines
        unless they look like wrapped or running text.

    Returns
    -------
    sentences : list of str
        Without repeats, in the order of the file.
    split : str
        How the file was read: "lines" or "prose".

    Raises
    ------
    DemoError
        Where the file cannot be read or has no words in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DemoError(f"--file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DemoError(f"--file {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if split == "auto":
        split = "prose" if _looks_like_prose(lines) else "lines"
    found = lines if split == "lines" else split_prose(text)
    unique = list(
        {" ".join(sentence.split()): None for sentence in found if re.search(r"[^\W\d_]", sentence)}
    )
    if not unique:
        raise DemoError(f"--file {path}: no words in it")
    return unique, split


def split_prose(text: str) -> list[str]:
    """Split running text after . ! ? … unless an abbreviation or a lower-case letter says otherwise."""
    sentences = []
    for paragraph in _PARAGRAPH.split(text):
        flat = " ".join(paragraph.split())
        start = 0
        for end in _END.finditer(flat):
            following = flat[end.end() :].lstrip(" \"'“‘([")[:1]
            if following.islower() or (
                end.group() == "." and _abbreviated(flat[start : end.start()], following)
            ):
                continue
            sentences.append(flat[start : end.end()].strip())
            start = end.end()
        if rest := flat[start:].strip():
            sentences.append(rest)
    return sentences


def _abbreviated(before: str, following: str) -> bool:
    """Whether the full stop between `before` and the character `following` belongs to an abbreviation."""
    word = before[before.rfind(" ") + 1 :].lower().lstrip("(\"'“‘[")
    if word in _BEFORE_NUMBERS:
        return following.isdigit()
    if before.strip().isdigit():  # the number of a heading
        return True
    initial = len(word) == 1 and word.isalpha() and word != "i"
    return initial or word in _TITLES or word in _LATIN


def _looks_like_prose(lines: Sequence[str]) -> bool:
    continued = sum(
        not _END.search(line[-4:]) and following[:1].islower() for line, following in pairwise(lines)
    )
    sentences = sum(len(split_prose(line)) for line in lines)
    return continued > 0.2 * len(lines) or sentences > 1.5 * len(lines)


def batches(lengths: Sequence[int], most: int, most_tokens: int = 4096) -> list[list[int]]:
    """Group sentences for the encoder.

    Parameters
    ----------
    lengths : sequence of int
        Number of tokens of each sentence.
    most : int
        Most sentences in a batch.
    most_tokens : int
        Most tokens in a batch, padding included, unless one sentence alone has more. The widest activations
        of MiniLM take 6 KB a token.

    Returns
    -------
    list of list of int
        Numbers of the sentences of each batch; long ones come first, so that a batch pads little.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    parts = []
    while order:
        size = min(most, max(most_tokens // max(lengths[order[0]], 1), 1))
        parts.append(order[:size])
        order = order[size:]
    return parts


class Words(NamedTuple):
    """The words of a sentence, and which tokens make each.

    Attributes
    ----------
    labels : list of str
        Words as written; the model's own marks in brackets.
    tokens : list of list of int
        Numbers of the tokens of each word.
    special : list of bool
        Whether it is a mark of the model ([CLS], [SEP]).
    """

    labels: list[str]
    tokens: list[list[int]]
    special: list[bool]


def words_of(sentence: str, encoding: Any) -> Words:
    """Join the word pieces of a `tokenizers.Encoding`."""
    words = Words([], [], [])
    previous = None
    for number, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if word is not None and word == previous:
            words.tokens[-1].append(number)
            begin = encoding.offsets[words.tokens[-1][0]][0]
            words.labels[-1] = sentence[begin:end]
        else:
            words.tokens.append([number])
            words.labels.append(encoding.tokens[number] if word is None else sentence[start:end])
            words.special.append(word is None)
        previous = word
    return words


def merge_word_pieces(
    weights: numpy.ndarray[Any, Any], tokens: Iterable[Sequence[int]]
) -> numpy.ndarray[Any, Any]:
    """Attention between words, (..., words, words): sums over a word's pieces as keys, means as queries."""
    groups = list(tokens)
    member = numpy.zeros((len(groups), weights.shape[-1]), dtype=weights.dtype)
    for number, group in enumerate(groups):
        member[number, list(group)] = 1.0
    average = member / member.sum(axis=1, keepdims=True)
    return numpy.asarray(average @ weights @ member.T)
