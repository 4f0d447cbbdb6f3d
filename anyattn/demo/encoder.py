"""A BERT sentence encoder on `MultiHeadAttention`, in array calls that every library has.

J. Devlin et al., "BERT", 2018; the pooling is that of N. Reimers and I. Gurevych, "Sentence-BERT", 2019.
Batches hold sentences of different lengths, right-padded; `kv_lengths` keeps the padding out of attention,
and the mean at the end leaves it out of the sentence. A layer is a pure function of its parameters and its
input, so that `jax.jit` compiles one for all six.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.multihead import MultiHeadAttention
from anyattn.projections import linear

# Our names of the parts of a layer, and theirs in Hugging Face's files. Attention has its own parameters.
_PARTS = {
    "attention_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "output_norm": "output.LayerNorm",
}
_PROJECTIONS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
}


class SentenceEncoder:
    """Token numbers in, sentence vectors out.

    Parameters
    ----------
    config : mapping
        ``config.json`` of a BERT model.
    tensors : mapping of str to numpy.ndarray
        Its weights under their names in Hugging Face files.
    xp : namespace
        Array API namespace of the library to compute with.
    compile_layer : callable, optional
        Applied to the function of a layer, such as ``jax.jit``.
    **attention_options
        Passed on with every call of `attention`, such as ``backend``.

    Attributes
    ----------
    num_layers, num_heads : int
        Size of the model.
    longest : int
        Most tokens that a sentence may have.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Any],
        xp: Namespace,
        *,
        compile_layer: Callable[[Callable[..., Array]], Callable[..., Array]] | None = None,
        **attention_options: Any,
    ) -> None:
        self.num_layers = int(config["num_hidden_layers"])
        self.num_heads = int(config["num_attention_heads"])
        self.longest = int(config["max_position_embeddings"])
        self._xp = xp
        self._epsilon = float(config["layer_norm_eps"])
        self._options = attention_options

        def load(name: str) -> Array:
            return xp.asarray(tensors[name], dtype=xp.float32, device=None)

        def dense(name: str) -> dict[str, Array]:
            # Hugging Face keeps (out, in), as torch.nn.Linear does.
            return {"weight": load(f"{name}.weight").T, "bias": load(f"{name}.bias")}

        def norm(name: str) -> dict[str, Array]:
            return {"weight": load(f"{name}.weight"), "bias": load(f"{name}.bias")}

        self._words = load("embeddings.word_embeddings.weight")
        self._places = load("embeddings.position_embeddings.weight")
        self._segment = load("embeddings.token_type_embeddings.weight")[0, :]
        self._norm = norm("embeddings.LayerNorm")
        self._layers: list[dict[str, dict[str, Array]]] = []
        for number in range(self.num_layers):
            prefix = f"encoder.layer.{number}"
            projections = {key: dense(f"{prefix}.{name}") for key, name in _PROJECTIONS.items()}
            self._attention = MultiHeadAttention(
                *(projections[key]["weight"] for key in "qkvo"),
                num_heads=self.num_heads,
                biases={key: projections[key]["bias"] for key in "qkvo"},
            )
            parts = {
                key: (norm if key.endswith("norm") else dense)(f"{prefix}.{name}")
                for key, name in _PARTS.items()
            }
            self._layers.append({"attention": self._attention.parameters, **parts})
        self._layer = self._run_layer if compile_layer is None else compile_layer(self._run_layer)

    def embed(self, sentences: Sequence[Sequence[int]], pad_to: int = 1) -> Array:
        """Sentence vectors of length 1.

        Parameters
        ----------
        sentences : sequence of sequences of int
            Token numbers, at most `longest` in each.
        pad_to : int
            Padded lengths are multiples of it.

        Returns
        -------
        array
            (number of sentences, width), float32.
        """
        xp = self._xp
        counts = [len(sentence) for sentence in sentences]
        padded = -(-max(counts) // pad_to) * pad_to
        hidden = self._embed_tokens(sentences, min(padded, self.longest))
        lengths = xp.asarray(counts, dtype=arrays.index_dtype(xp, None), device=None)
        for parameters in self._layers:
            hidden = self._layer(parameters, hidden, lengths)
        inside = xp.asarray(
            [[[float(j < n)] for j in range(hidden.shape[1])] for n in counts], dtype=xp.float32, device=None
        )
        # The mean's divisor cancels in the normalisation.
        total = xp.sum(hidden * inside, axis=1)
        return total / xp.sqrt(xp.sum(total * total, axis=-1, keepdims=True))

    def attention_maps(self, sentence: Sequence[int]) -> list[Array]:
        """The attention weights of one sentence: for each layer (heads, L, L), rows summing to 1."""
        hidden = self._embed_tokens([sentence], len(sentence))
        maps = []
        for parameters in self._layers:
            attention = self._attention.with_parameters(parameters["attention"])
            attended, weights = attention(hidden, return_weights=True, **self._options)
            hidden = self._feed_forward(parameters, hidden, attended)
            maps.append(weights[0, ...])
        return maps

    def projections(self, text: Sequence[int]) -> list[tuple[Array, Array, Array]]:
        """Queries, keys and values of one text: for each layer three arrays (heads, L, head_dim)."""
        xp = self._xp
        hidden = self._embed_tokens([text], len(text))
        lengths = xp.asarray([len(text)], dtype=arrays.index_dtype(xp, None), device=None)
        found = []
        for parameters in self._layers:
            weights = parameters["attention"]
            flat = (linear(hidden[0, ...], weights[f"w{key}"], weights[f"b{key}"]) for key in "qkv")
            q, k, v = (xp.moveaxis(xp.reshape(x, (len(text), self.num_heads, -1)), 0, 1) for x in flat)
            found.append((q, k, v))
            hidden = self._run_layer(parameters, hidden, lengths)
        return found

    def _embed_tokens(self, sentences: Sequence[Sequence[int]], length: int) -> Array:
        xp = self._xp
        numbers = [token for sentence in sentences for token in (*sentence, *[0] * (length - len(sentence)))]
        index = xp.asarray(numbers, dtype=arrays.index_dtype(xp, None), device=None)
        words = xp.reshape(
            xp.take(self._words, index, axis=0), (len(sentences), length, self._words.shape[1])
        )
        return _layer_norm(words + self._places[:length, :] + self._segment, self._norm, self._epsilon)

    def _run_layer(self, parameters: dict[str, dict[str, Array]], x: Array, lengths: Array) -> Array:
        attention = self._attention.with_parameters(parameters["attention"])
        return self._feed_forward(parameters, x, attention(x, kv_lengths=lengths, **self._options))

    def _feed_forward(self, parameters: dict[str, dict[str, Array]], x: Array, attended: Array) -> Array:
        x = _layer_norm(x + attended, parameters["attention_norm"], self._epsilon)
        wide = _gelu(linear(x, **parameters["widen"]))
        return _layer_norm(x + linear(wide, **parameters["narrow"]), parameters["output_norm"], self._epsilon)


def _layer_norm(x: Array, parameters: dict[str, Array], epsilon: float) -> Array:
    xp = arrays.namespace(x)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + epsilon) * parameters["weight"] + parameters["bias"]


def _gelu(x: Array) -> Array:
    """x·Φ(x), with erf by formula 7.1.26 of M. Abramowitz and I. Stegun: the array API has none.

    Its error of 1.5e-7 changes a sentence vector by 9e-8.
    """
    xp = arrays.namespace(x)
    size = xp.abs(x)
    t = 1.0 / (1.0 + (0.3275911 * 0.5**0.5) * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    # x·erf(x/√2) is even: |x|·erf(|x|/√2).
    return 0.5 * (x + size * (1.0 - series * xp.exp(-0.5 * size * size)))
