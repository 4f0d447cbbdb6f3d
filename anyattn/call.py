"""The description of one call: built by the front door, read by dispatch and by the backend that runs it.

Every default is filled in, every argument is checked, arrays are in one layout, and all that decides which
keys a query sees and how its scores change has become two expressions. A backend needs nothing beyond this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from anyattn import arrays
from anyattn.arrays import Array, Namespace
from anyattn.expr.nodes import Expr
from anyattn.expr.structure import is_given, structure

if TYPE_CHECKING:
    import numpy

__all__ = ["AttentionCall", "Operation"]

Operation = Literal["attention", "weights", "stats"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of `attention`, `attention_weights` or `attention_stats`.

    Attributes
    ----------
    operation : "attention", "weights" or "stats"
    q, k, v : arrays (..., Hq, Lq, D), (..., Hkv, Lk, D), (..., Hkv, Lk, Dv)
        Views of the caller's arrays in "bhld" order, with a head axis always; batch axes not yet broadcast.
        `v` is None for weights and stats.
    batch_shape : tuple of int
        The broadcast batch axes; the batch index b of an expression is their flat row-major index.
    dtype, accumulate : str
        Names of the dtype of q and the result, which k and v have too unless they are scaled, and of the one
        that scores and sums are computed in.
    score : Expr or None
        What becomes of scale * (q . k): softcap, score_mod and bias in this order; None leaves it alone.
    visible : Expr or None
        Which keys a row sees: causal, window, mask and kv_lengths together; None sees all.
    keep : Expr or None
        What softmax weights are multiplied by before they meet the values, 0 or 1 / (1 - p) of dropout; None
        is 1. It is no part of lse, and moves no gradient.
    k_scales, v_scales : float32 arrays (..., Hkv, Lk), or None
        What int8 rows of `k` and `v` are times to be keys and values, with the batch axes of these; None
        where k and v are what they are.
    sinks : array (Hq,) or None
        Logits that join the denominator only.
    offset : int or integer array
        Position of row 0; an array broadcasts to `batch_shape`. `offset_host` are its values where the host
        knows them.
    kv_lengths : integer array or None
        Valid keys, broadcasting to `batch_shape`, within [0, Lk]. `lengths_host` likewise.
    causal, window, mask, softcap, score_mod, bias
        The arguments that `score` and `visible` were made of, for backends that call a library's own
        attention.
    dropout_seed : int32 array (2,) or None
        The words of the seed that `keep` reads.
    rows : integer array (R,) or None
        For weights: the rows asked for.
    stats : tuple of str
        For stats: the names asked for.
    features : frozenset of str
        The capabilities (`anyattn.backend.CAPABILITIES`) that the call uses.
    """

    operation: Operation
    q: Array
    k: Array
    v: Array | None
    xp: Namespace
    library: str
    array_type: str
    device: Any
    device_kind: str
    dtype: str
    accumulate: str
    layout: str
    has_heads: bool
    batch_shape: tuple[int, ...]
    scale: float
    score: Expr | None
    visible: Expr | None
    keep: Expr | None
    k_scales: Array | None
    v_scales: Array | None
    sinks: Array | None
    offset: Any
    offset_host: numpy.ndarray[Any, Any] | int | None
    kv_lengths: Array | None
    lengths_host: numpy.ndarray[Any, Any] | None
    causal: bool
    window: tuple[int | None, int | None] | None
    mask: Any
    softcap: float | None
    score_mod: Any
    bias: Array | None
    dropout_seed: Array | None
    return_lse: bool
    rows: Array | None
    stats: tuple[str, ...]
    features: frozenset[str]

    @property
    def num_heads(self) -> int:
        return int(self.q.shape[-3])

    @property
    def num_kv_heads(self) -> int:
        return int(self.k.shape[-3])

    @property
    def group_size(self) -> int:
        """Query heads that share a key/value head; head h reads key/value head h // group_size."""
        return self.num_heads // self.num_kv_heads if self.num_heads else 1

    @property
    def q_len(self) -> int:
        return int(self.q.shape[-2])

    @property
    def k_len(self) -> int:
        return int(self.k.shape[-2])

    @property
    def head_dim(self) -> int:
        return int(self.q.shape[-1])

    @property
    def v_head_dim(self) -> int:
        return int(self.v.shape[-1]) if self.v is not None else 0

    @cached_property
    def traced(self) -> bool:
        """Whether the arrays have no values yet: under a tracer, or lazy."""
        return "traced" in self.features

    @cached_property
    def readable(self) -> bool:
        """Whether the host can look at the values of the arrays while the call runs."""
        return arrays.is_concrete_cpu(self.q) and not self.traced

    @cached_property
    def others(self) -> tuple[Array, ...]:
        """The arrays besides q, k and v that are other ones in the next call of the same signature.

        They are lengths, offsets, sinks and scales as above, then the arrays of mask, score_mod and bias that
        the caller gave, as they stand in `visible` and `score`, then the seed of dropout.
        """
        own = (self.kv_lengths, self.offset, self.sinks, self.k_scales, self.v_scales)
        found = [x for x in own if arrays.is_array(x)]
        for part in (self.mask, self.score_mod):
            found += [] if part is None else [a.value for a in structure(part.expr).arrays if is_given(a)]
        return (*found, *(x for x in (self.bias, self.dropout_seed) if x is not None))

    def restore(self, out: Array) -> Array:
        """A result (..., Hq, Lq, Dv) in the layout and with the axes that the caller uses."""
        if not self.has_heads:
            return out[0, ...]
        return arrays.moveaxis(self.xp, out, -2, -3) if self.layout == "blhd" else out

    def restore_rows(self, x: Array) -> Array:
        """A per-head result (..., Hq, ...) without the head axis where the caller has none."""
        return x if self.has_heads else x[0, ...]

    def __repr__(self) -> str:
        q, k = tuple(self.q.shape), tuple(self.k.shape)
        used = ", ".join(sorted(self.features)) or "no option"
        return f"<{self.operation} q {q} k {k} {self.dtype} {self.library} on {self.device_kind}: {used}>"


def canonical(x: Array, layout: str) -> Array:
    """`x` as a view (..., H, L, D)."""
    if x.ndim == 2:
        return arrays.namespace(x).expand_dims(x, axis=0)
    return arrays.moveaxis(arrays.namespace(x), x, -3, -2) if layout == "blhd" else x
