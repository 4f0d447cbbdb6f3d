"""The description of one call of `linear_attention`, as dispatch and backends read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from anyattn import arrays, feature_maps
from anyattn.arrays import Array, Namespace

if TYPE_CHECKING:
    import numpy

__all__ = ["DELTA", "GATED", "RULES", "LinearCall"]

RULES = ("linear", "gated", "delta", "gated_delta")
GATED = ("gated", "gated_delta")
DELTA = ("delta", "gated_delta")


@dataclass(frozen=True, eq=False)
class LinearCall:
    """One call of `linear_attention`: `operation` is "linear".

    Attributes
    ----------
    q, k, v : arrays (..., Hq, Lq, F), (..., Hkv, Lk, F), (..., Hkv, Lk, Dv)
        Views of the caller's arrays in "bhld" order, with a head axis always; batch axes not yet broadcast.
        Where the caller gave a function as feature map, q and k are what it gave, in the accumulation dtype.
        Lq and Lk differ only where `causal` is False.
    feature_map : str
        What is still to be applied to q and k, in the accumulation dtype: a name in
        `anyattn.feature_maps.NAMED`.
    rule : "linear", "gated", "delta" or "gated_delta"
    decay : array (..., Hkv, L, F) or (..., Hkv, L, 1), or None
        In log space and in the accumulation dtype; (..., L, 1) where each head has one.
    beta : array (..., Hkv, L) or None
        In the accumulation dtype.
    state : array (..., Hkv, F, Dv) or None
        Before the first token; in the accumulation dtype. With `cu_seqlens` the first axis is the sequence.
    normalizer : array (..., Hkv, F) or None
        The z that goes with it where `normalize`.
    batch_shape : tuple of int
        The broadcast batch axes; () with `cu_seqlens`.
    dtype, accumulate : str
        Names of the dtype of the caller's q, k and v and of the one that sums and states are computed in.
    cu_seqlens : integer array (N + 1,) or None
        Sequence n is the tokens [cu_seqlens[n], cu_seqlens[n + 1]); `cu_seqlens_host` are the values where
        the host knows them.
    features : frozenset of str
        The capabilities (`anyattn.backend.CAPABILITIES`) that the call uses.
    """

    q: Array
    k: Array
    v: Array
    feature_map: str
    rule: str
    decay: Array | None
    beta: Array | None
    normalize: bool
    causal: bool
    scale: float
    state: Array | None
    normalizer: Array | None
    return_state: bool
    cu_seqlens: Array | None
    cu_seqlens_host: numpy.ndarray[Any, Any] | None
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
    features: frozenset[str]

    operation: ClassVar[Literal["linear"]] = "linear"
    # Dispatch asks every call what hides keys from rows; here order in time alone does.
    visible = None

    @property
    def num_heads(self) -> int:
        return int(self.q.shape[-3])

    @property
    def num_kv_heads(self) -> int:
        return int(self.k.shape[-3])

    @property
    def group_size(self) -> int:
        """Query heads that share a state; head h reads state h // group_size."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 1

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
        return int(self.v.shape[-1])

    @property
    def num_sequences(self) -> int:
        """N of `cu_seqlens`."""
        return int(self.cu_seqlens.shape[0]) - 1 if self.cu_seqlens is not None else 1

    @cached_property
    def traced(self) -> bool:
        """Whether the arrays have no values yet: under a tracer, or lazy."""
        return "traced" in self.features

    @cached_property
    def readable(self) -> bool:
        """Whether the host can look at the values of the arrays while the call runs."""
        return arrays.is_concrete_cpu(self.q) and not self.traced

    def mapped(self, x: Array) -> Array:
        """Features of queries or keys `x`, which are in the accumulation dtype."""
        return feature_maps.NAMED[self.feature_map](x)

    def restore(self, out: Array) -> Array:
        """A result (..., Hq, L, Dv) in the layout and with the axes that the caller uses."""
        if not self.has_heads:
            return out[0, ...]
        return arrays.moveaxis(self.xp, out, -2, -3) if self.layout == "blhd" else out

    def restore_state(self, state: Array, axes: int = 2) -> Array:
        """A state (..., Hkv, F, Dv), or a normalizer with `axes` = 1, with the axes that the caller uses."""
        return state if self.has_heads else state[(..., 0, *(slice(None),) * axes)]

    def __repr__(self) -> str:
        q, k = tuple(self.q.shape), tuple(self.k.shape)
        used = ", ".join(sorted(self.features))
        where = f"{self.dtype} {self.library} on {self.device_kind}"
        return f"<linear, rule {self.rule}, q {q} k {k} {where}: {used}>"
