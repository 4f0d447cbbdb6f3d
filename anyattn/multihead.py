"""Multi-head attention as a layer: four projections around `attention`.

It holds arrays of whatever library they came from and nothing else, so that its parameters are a plain dict:
a JAX pytree, leaves for torch's autograd, something to save. Heads stay where the projections put them, (...,
L, H, D), and no axis is ever moved. `projections` has the four linear maps, `layer_rope` where rows stand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.attention import attention, attention_weights
from anyattn.layer_rope import ROPE_DEFAULTS, default_positions, rope_options
from anyattn.lookup import GrowingCache
from anyattn.numbers import boolean, integer
from anyattn.options import OPTIONS
from anyattn.projections import (
    BIASES,
    check_like,
    check_weight,
    checked_biases,
    linear,
    size_of_heads,
    split_heads,
    standard_namespace,
)
from anyattn.rope import rope, sequence_length
from anyattn.rope_scaling import needs_sequence_length

__all__ = ["MultiHeadAttention"]

# Options of `attention` that its weights do not depend on.
_NOT_OF_WEIGHTS = ("return_lse", "dropout", "dropout_seed")


class MultiHeadAttention:
    """Multi-head attention from given weights.

    ``softmax(scale · (x wq)(y wk)ᵀ)(y wv)`` in each head, heads side by side, times `wo`; y is x, or another
    sequence in cross attention. Fewer key and value heads than query heads are shared in contiguous groups.

    Parameters
    ----------
    wq, wk, wv, wo : array
        Weights (in, out) of one library, dtype and device: (width of x, num_heads·D), (width of y,
        num_kv_heads·D), (width of y, num_kv_heads·Dv) and (num_heads·Dv, width of the result). They are the
        transposes of what `torch.nn.Linear` holds.
    num_heads : int
        Query heads; D is ``wq.shape[1] // num_heads``.
    num_kv_heads : int, optional
        Key and value heads, a divisor of `num_heads`, which is the default; Dv is ``wv.shape[1] //
        num_kv_heads``.
    biases : mapping, optional
        Any of ``"q"``, ``"k"``, ``"v"`` and ``"o"`` to vectors that are added to the four projections.
    rope : bool or mapping, optional
        Rotate queries and keys by their positions: True, or options of `anyattn.rope` (``base``, ``dims``,
        ``interleaved``, ``scaling``).

    Attributes
    ----------
    parameters : dict of str to array
        ``"wq"``, ``"wk"``, ``"wv"``, ``"wo"``, and ``"bq"`` and so on for the biases there are. A new dict
        each time.
    num_heads, num_kv_heads, head_dim, v_head_dim : int
        Number and sizes of the heads.
    rope : dict or None
        Options of the rotation.

    Raises
    ------
    TypeError, ValueError
        Where weights do not fit each other, naming the one that does not.

    References
    ----------
    A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2. Grouped heads: J. Ainslie et al.,
    "GQA", 2023.

    Examples
    --------
    >>> import numpy as np, anyattn as aa
    >>> mha = aa.MultiHeadAttention.init(64, num_heads=4, num_kv_heads=2, rope=True, xp=np, seed=0)
    >>> mha
    MultiHeadAttention(64 -> 64, num_heads=4, num_kv_heads=2, head_dim=16, rope=True, numpy float32)
    >>> mha(np.ones((3, 10, 64), dtype=np.float32), causal=True).shape
    (3, 10, 64)
    """

    def __init__(
        self,
        wq: Array,
        wk: Array,
        wv: Array,
        wo: Array,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        biases: Mapping[str, Array] | None = None,
        rope: Literal[True] | Mapping[str, Any] | None = None,
    ) -> None:
        self.num_heads = integer(num_heads, "num_heads", least=1)
        self.num_kv_heads = (
            self.num_heads if num_kv_heads is None else integer(num_kv_heads, "num_kv_heads", least=1)
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: wanted a divisor of num_heads, {self.num_heads}, got {self.num_kv_heads}"
            )
        self._weights = {"wq": wq, "wk": wk, "wv": wv, "wo": wo}
        for name, weight in self._weights.items():
            check_weight(name, weight, 2, wq)
        self.head_dim = size_of_heads("wq", wq, self.num_heads, "num_heads")
        if size_of_heads("wk", wk, self.num_kv_heads, "num_kv_heads") != self.head_dim:
            raise ValueError(
                f"wk: wanted {self.num_kv_heads} heads of {self.head_dim}, as in wq, so "
                f"{self.num_kv_heads * self.head_dim} columns, got shape {tuple(wk.shape)}"
            )
        self.v_head_dim = size_of_heads("wv", wv, self.num_kv_heads, "num_kv_heads")
        if wv.shape[0] != wk.shape[0]:
            raise ValueError(f"wv: wanted {wk.shape[0]} rows, as in wk, got shape {tuple(wv.shape)}")
        if wo.shape[0] != self.num_heads * self.v_head_dim:
            raise ValueError(
                f"wo: wanted {self.num_heads * self.v_head_dim} rows, {self.num_heads} heads of the "
                f"{self.v_head_dim} features that wv gives each, got shape {tuple(wo.shape)}"
            )
        self._biases = checked_biases(biases, self._weights)
        self.rope = rope_options(rope, self.head_dim)

    @classmethod
    def init(
        cls,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        kv_width: int | None = None,
        biases: bool = False,
        rope: Literal[True] | Mapping[str, Any] | None = None,
        xp: Namespace,
        seed: int,
        dtype: Any = None,
        device: Any = None,
    ) -> MultiHeadAttention:
        """Fresh weights, the same for every array library.

        They are drawn by NumPy's default generator in float64, in the order wq, wk, wv, wo, uniformly within
        ±√(6 / (rows + columns)) (X. Glorot and Y. Bengio, 2010), then converted. Biases start at 0.

        Parameters
        ----------
        d_model : int
            Width of x and of the result.
        num_heads, num_kv_heads, rope
            As for the class.
        head_dim, v_head_dim : int, optional
            Sizes of the heads; ``d_model // num_heads`` and `head_dim` by default.
        kv_width : int, optional
            Width of the other sequence in cross attention, `d_model` by default.
        biases : bool, default False
            Whether all four projections have one.
        xp : namespace
            The array library: ``numpy``, ``torch``, ``jax.numpy``, ``cupy``, ``dask.array``,
            ``array_api_strict``.
        seed : int
            Seed of the generator.
        dtype, device
            Of the weights, as `xp` names them; float32 on its default device.

        Returns
        -------
        MultiHeadAttention
            A new layer.
        """
        import numpy

        d_model = integer(d_model, "d_model", least=1)
        heads = integer(num_heads, "num_heads", least=1)
        kv_heads = heads if num_kv_heads is None else integer(num_kv_heads, "num_kv_heads", least=1)
        if head_dim is None and d_model % heads:
            raise ValueError(f"num_heads: wanted a divisor of d_model, {d_model}, or a head_dim, got {heads}")
        size = d_model // heads if head_dim is None else integer(head_dim, "head_dim", least=1)
        v_size = size if v_head_dim is None else integer(v_head_dim, "v_head_dim", least=1)
        kv = d_model if kv_width is None else integer(kv_width, "kv_width", least=1)
        boolean(biases, "biases")
        space = standard_namespace(xp)
        generator = numpy.random.default_rng(integer(seed, "seed", least=0))
        dtype = space.float32 if dtype is None else dtype

        def drawn(rows: int, columns: int) -> Array:
            limit = math.sqrt(6.0 / (rows + columns))
            values = generator.uniform(-limit, limit, (rows, columns))
            return space.asarray(values, dtype=dtype, device=device)

        wq = drawn(d_model, heads * size)
        wk = drawn(kv, kv_heads * size)
        wv = drawn(kv, kv_heads * v_size)
        wo = drawn(heads * v_size, d_model)
        zeros = {
            key: space.zeros(weight.shape[1], dtype=dtype, device=device)
            for key, weight in zip(BIASES, (wq, wk, wv, wo), strict=True)
        }
        return cls(
            wq,
            wk,
            wv,
            wo,
            num_heads=heads,
            num_kv_heads=kv_heads,
            biases=zeros if biases else None,
            rope=rope,
        )

    @property
    def parameters(self) -> dict[str, Array]:
        """Weights and biases by name."""
        return {**self._weights, **self._biases}

    def with_parameters(self, parameters: Mapping[str, Array]) -> MultiHeadAttention:
        """The same layer with other arrays, for functional code such as ``jax.grad``.

        Parameters
        ----------
        parameters : mapping
            The names of `parameters`, all of them and no others.

        Returns
        -------
        MultiHeadAttention
            A new layer; this one is unchanged.
        """
        if not isinstance(parameters, Mapping):
            raise TypeError(f"parameters: wanted a mapping, got {type(parameters).__name__}")
        wanted = self.parameters.keys()
        if parameters.keys() != wanted:
            raise ValueError(
                f"parameters: wanted the names {sorted(wanted)}, got {sorted(parameters.keys())}"
            )
        return MultiHeadAttention(
            *(parameters[name] for name in self._weights),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            biases={name[1:]: parameters[name] for name in self._biases},
            rope=self.rope,
        )

    def __call__(
        self,
        x: Array,
        kv: Array | None = None,
        *,
        cache: GrowingCache | None = None,
        positions: Any = None,
        kv_positions: Any = None,
        return_weights: bool = False,
        **attention_options: Any,
    ) -> Any:
        """Attend from `x` to itself, to `kv`, or to a cache that `x` is added to.

        Parameters
        ----------
        x : array
            (..., Lq, width of x), in the library, dtype and device of the weights.
        kv : array, optional
            (..., Lk, width of kv) for cross attention; its batch axes broadcast with those of `x`.
        cache : KVCache or PagedKVCache, optional
            Tokens before `x`. The keys and values of `x` are appended to it, so the layer takes a sequence a
            piece at a time; `x` stands behind what the cache held.
        positions, kv_positions : int, sequence or array, optional
            Positions for `rope`, broadcastable to (..., Lq) and (..., Lk). Row r stands at ``r + q_offset``,
            as it does for causal masks, and key j at j, unless said otherwise; `q_offset` has the default of
            `attention`, in self-attention 0. In self-attention `positions` are those of the keys too.
            With `kv_lengths` alone self-attention thus turns right-padded sequences rightly, while
            `attention` still wants ``q_offset=0`` said where an option such as ``causal`` depends on
            positions.
        return_weights : bool, default False
            Also return the attention weights, those before dropout.
        **attention_options
            Everything else that `attention` takes (``causal``, ``mask``, ``kv_lengths``, ``backend``, ...),
            except ``layout``.

        Returns
        -------
        array or tuple
            (..., Lq, width of the result); then the lse if ``return_lse=True``; then the weights (..., Hq,
            Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            Where `x` or `kv` does not fit the weights, positions are given without `rope`, or `attention`
            has no such option or refuses it.

        Notes
        -----
        Products are in the dtype of the weights, under torch's autocast too.
        """
        _check_options("MultiHeadAttention", "attention", attention_options)
        boolean(return_weights, "return_weights")
        if cache is not None:
            if kv is not None or kv_positions is not None or return_weights:
                raise ValueError("cache: wanted None with kv, kv_positions or return_weights")
            result = self._with_cache(x, cache, positions, attention_options)
        else:
            q, k, v = self._project(x, kv, positions, kv_positions, attention_options, values=True)
            result = attention(q, k, v, layout="blhd", **attention_options)
        heads, *lse = result if isinstance(result, tuple) else (result,)
        joined = arrays.namespace(heads).reshape(
            heads, (*heads.shape[:-2], heads.shape[-2] * heads.shape[-1])
        )
        out = self._linear(joined, "o")
        if return_weights:
            options = {
                name: value for name, value in attention_options.items() if name not in _NOT_OF_WEIGHTS
            }
            return (out, *lse, attention_weights(q, k, layout="blhd", **options))
        return (out, *lse) if lse else out

    def weights(
        self,
        x: Array,
        kv: Array | None = None,
        *,
        positions: Any = None,
        kv_positions: Any = None,
        **attention_options: Any,
    ) -> Array:
        """The attention weights alone, (..., Hq, Lq, Lk), or of the rows in ``rows``.

        Parameters
        ----------
        x, kv, positions, kv_positions
            As for the call.
        **attention_options
            What `attention_weights` takes, except ``layout``.

        Returns
        -------
        array
            Weights; each row sums to 1, or to 0 where it sees no key.
        """
        _check_options("MultiHeadAttention.weights", "weights", attention_options)
        q, k, _ = self._project(x, kv, positions, kv_positions, attention_options, values=False)
        return attention_weights(q, k, layout="blhd", **attention_options)

    def __repr__(self) -> str:
        wq, wk, wo = (self._weights[name] for name in ("wq", "wk", "wo"))
        width = str(wq.shape[0]) if wk.shape[0] == wq.shape[0] else f"{wq.shape[0]}, kv {wk.shape[0]}"
        parts = [f"{width} -> {wo.shape[1]}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"head_dim={self.head_dim}")
        if self.v_head_dim != self.head_dim:
            parts.append(f"v_head_dim={self.v_head_dim}")
        if self._biases:
            parts.append(f"biases={''.join(name[1:] for name in self._biases)}")
        if self.rope is not None:
            changed = {key: value for key, value in self.rope.items() if value != ROPE_DEFAULTS[key]}
            parts.append(f"rope={changed or True}")
        parts.append(f"{arrays.library(wq)} {arrays.dtype_name(wq)}")
        return f"MultiHeadAttention({', '.join(parts)})"

    def _with_cache(self, x: Array, cache: GrowingCache, positions: Any, options: Mapping[str, Any]) -> Any:
        """Attention of `x` to a cache that its keys and values have joined."""
        import numpy

        if self.rope is not None and needs_sequence_length(self.rope["scaling"]):
            raise ValueError(
                "cache: wanted None with a rope that turns by the length: its keys would not fit"
            )
        if self.rope is not None and positions is None:
            positions = (cache.lengths[..., None] + numpy.arange(x.shape[-2])).tolist()
        q, k, v = self._project(x, None, positions, None, options, values=True)
        xp = arrays.namespace(x)
        undo = cache.undoing(int(x.shape[-2]))
        try:
            cache.extend(xp.moveaxis(k, -3, -2), xp.moveaxis(v, -3, -2))
            return attention(q, cache, layout="blhd", **options)
        except BaseException:
            # Who mends the call and repeats it would have the tokens twice.
            undo()
            raise

    def _project(
        self,
        x: Array,
        kv: Array | None,
        positions: Any,
        kv_positions: Any,
        options: Mapping[str, Any],
        values: bool,
    ) -> tuple[Array, Array, Array | None]:
        """Queries, keys and (if wanted) values, (..., L, H, D), rotated where there is `rope`."""
        self._check_input("x", x, "wq")
        source = x
        if kv is not None:
            self._check_input("kv", kv, "wk")
            source = kv
        elif self._weights["wk"].shape[0] != self._weights["wq"].shape[0]:
            raise ValueError(f"kv: wanted an array of width {self._weights['wk'].shape[0]}, got None")
        q = split_heads(self._linear(x, "q"), self.num_heads)
        k = split_heads(self._linear(source, "k"), self.num_kv_heads)
        v = split_heads(self._linear(source, "v"), self.num_kv_heads) if values else None
        if self.rope is None:
            for name, given in (("positions", positions), ("kv_positions", kv_positions)):
                if given is not None:
                    raise ValueError(
                        f"{name}: wanted None, as this layer has no rope, got {type(given).__name__}"
                    )
            return q, k, v
        if kv_positions is None:
            kv_positions = range(source.shape[-2]) if kv is not None or positions is None else positions
        if positions is None:
            positions = default_positions(x, kv, options)
        settings = dict(self.rope)
        if needs_sequence_length(settings["scaling"]):
            # One length for both: queries and keys must turn at the same speed.
            settings["scaling"] = {**settings["scaling"], "seq_len": sequence_length(positions, kv_positions)}
        q = rope(q, positions, layout="blhd", **settings)
        k = rope(k, kv_positions, layout="blhd", **settings)
        return q, k, v

    def _check_input(self, name: str, given: Array, weight_name: str) -> None:
        weight = self._weights[weight_name]
        check_like(name, given, weight, "the weights")
        if given.ndim < 2 or given.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"{name}: wanted shape (..., L, {weight.shape[0]}), as {weight_name} has rows, "
                f"got {tuple(given.shape)}"
            )

    def _linear(self, x: Array, key: str) -> Array:
        return linear(x, self._weights[f"w{key}"], self._biases.get(f"b{key}"))


def _check_options(function: str, operation: str, options: Mapping[str, Any]) -> None:
    if "layout" in options:
        raise TypeError("layout: the layer takes (..., L, width) and splits the heads itself")
    taken = [*(name for name in OPTIONS[operation] if name != "layout"), "backend"]
    for name in options:
        if name not in taken:
            raise TypeError(f"{function}: unexpected option {name!r}; it takes {', '.join(taken)}")
