"""The pretrained encoder of `anyattn demo`, for the pictures and tables of these pages."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import array_api_compat.numpy
import numpy as np

from anyattn.demo.command import SENTENCE
from anyattn.demo.encoder import SentenceEncoder
from anyattn.demo.model_files import find_model, load_model
from anyattn.demo.text import merge_word_pieces, words_of

__all__ = ["LONGEST", "SENTENCE", "attention_of_sentence", "projections_of_pieces", "projections_of_text"]

# The longest text that the model has positions for.
LONGEST = 512


@lru_cache
def _model() -> tuple[SentenceEncoder, Any]:
    model = load_model(find_model())
    return SentenceEncoder(model.config, model.tensors, array_api_compat.numpy), model.tokenizer


def attention_of_sentence() -> tuple[list[str], np.ndarray]:
    """The words of the demo's sentence and the weights between them (layers, heads, words, words)."""
    encoder, tokenizer = _model()
    encoding = tokenizer.encode(SENTENCE)
    words = words_of(SENTENCE, encoding)
    return words.labels, merge_word_pieces(np.stack(encoder.attention_maps(encoding.ids)), words.tokens)


def projections_of_text() -> np.ndarray:
    """Queries, keys and values (layers, 3, heads, 512, 32) of the beginning of the contract's page."""
    encoder, tokenizer = _model()
    text = (Path(__file__).parent / "contract.md").read_text(encoding="utf-8")
    return np.stack([np.stack(parts) for parts in encoder.projections(tokenizer.encode(text).ids[:LONGEST])])


def projections_of_pieces(text: str, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries and keys (heads, tokens, 32) of each layer, of the first pieces of a text side by side."""
    encoder, tokenizer = _model()
    ids = tokenizer.encode(text).ids[: count * LONGEST]
    pieces = [list(encoder.projections(ids[n : n + LONGEST])) for n in range(0, len(ids), LONGEST)]
    return [
        tuple(np.concatenate([parts[layer][n] for parts in pieces], axis=-2) for n in range(2))
        for layer in range(len(pieces[0]))
    ]
