"""What `attention` asks of a cache: arrays, lengths, and where the tokens lie that masks and scores count.

Tokens of a buffer lie where masks count them; where they do not (rings, pages), the mask and the score are
moved to where they lie, and no backend knows of caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anyattn import arrays, masks, scores
from anyattn.arrays import Array
from anyattn.expr.nodes import Aligned, Deferred, Expr, walk
from anyattn.masks import Mask
from anyattn.options import ARGUMENTS
from anyattn.scores import Score

if TYPE_CHECKING:
    import numpy

__all__ = ["Cache", "GrowingCache", "Lookup"]


@dataclass(frozen=True, eq=False)
class Lookup:
    """What a cache tells `attention`.

    Attributes
    ----------
    k, v : arrays (..., Hkv, L, D) and (..., Hkv, L, Dv)
        Floats, or int8 with scales.
    lengths : integer array (B,), or an integer
        Tokens of each sequence; an integer is that of all of them.
    visible : Expr or None
        Which places of the key axis hold a token of the sequence; None: the first `lengths` ones.
    token : Expr or None
        Number of the token that lies at place j; None: j itself.
    k_scales, v_scales : float32 arrays (..., Hkv, L), or None
        What the int8 rows of k and v are times.
    longest : int or None
        Tokens of the longest sequence, where the host knows them and the first places hold them.
    most_queries : int or None
        Queries at the end whose own tokens are all there; None: all are.
    """

    k: Array
    v: Array
    lengths: Any
    visible: Expr | None = None
    token: Expr | None = None
    k_scales: Array | None = None
    v_scales: Array | None = None
    longest: int | None = None
    most_queries: int | None = None

    def without_room(self) -> Lookup:
        """The places that hold tokens of some sequence, for what counts keys."""
        if self.longest is None:
            return self
        k, v = (x[..., : self.longest, :] for x in (self.k, self.v))
        scales = [None if x is None else x[..., : self.longest] for x in (self.k_scales, self.v_scales)]
        return replace(self, k=k, v=v, k_scales=scales[0], v_scales=scales[1])


class Cache(ABC):
    """What `attention` takes in the place of `k`."""

    @abstractmethod
    def lookup(self) -> Lookup:
        """Where the tokens are."""

    def lookup_beside(self, batch_shape: tuple[int, ...]) -> Lookup:
        """The same for queries of these batch axes, which those of the cache broadcast with."""
        return self.lookup()

    def lookup_in_first_places(self, *, in_order: bool) -> Lookup | None:
        """The same where the first places hold the tokens, in their order or in any, and others none.

        None where they do not, and where `lookup` says as much.
        """
        return None

    def arguments(self, q: Array, given: tuple[Any, ...]) -> tuple[Array, Array, tuple[Any, ...]]:
        """k, v and the options of a call of `attention` for queries at the end of the sequences.

        Options are in the order of `options.ARGUMENTS`; `kv_lengths` and `q_offset` are refused, as a cache
        knows them.
        """
        arrays.check_plain(q, "q")
        options = dict(zip(ARGUMENTS, given, strict=True))
        for name in ("kv_lengths", "q_offset"):
            if options[name] is not None:
                raise ValueError(f"{name}: wanted None with a cache, which knows it")
        changed = dict(options)
        blhd = options["layout"] == "blhd"
        q_len = int(q.shape[-3 if blhd and q.ndim > 2 else -2])
        if q_len == 1 and options["causal"] is True:
            changed["causal"] = False  # the last token sees all before it
        found = None
        counts_keys = _counts_keys(options)
        if not counts_keys:
            found = self.lookup_in_first_places(in_order=q_len > 1 or _counts_tokens(options))
        if found is None:
            found = self.lookup_beside(tuple(q.shape[:-3]))
            found = found.without_room() if counts_keys else found
        if found.most_queries is not None and q_len > found.most_queries:
            raise ValueError(
                f"q: wanted at most {found.most_queries} queries, whose keys the ring still holds, got "
                f"{q_len}; "
                "ask in pieces, of a ring that is wider by a piece than what a query shall see"
            )
        changed["k_scales"], changed["v_scales"] = found.k_scales, found.v_scales
        if found.visible is not None:
            changed |= _relocated(found, changed)
            changed["q_offset"] = found.lengths - q_len
        elif type(found.lengths) is not int or found.lengths < found.k.shape[-2]:
            changed["q_offset"], changed["kv_lengths"] = found.lengths - q_len, found.lengths
        k, v = found.k, found.v
        if blhd:
            xp = arrays.namespace(k)
            k, v = xp.moveaxis(k, -2, -3), xp.moveaxis(v, -2, -3)
        return k, v, tuple(changed.values())


class GrowingCache(Cache):
    """A cache that tokens are added to."""

    @property
    @abstractmethod
    def lengths(self) -> numpy.ndarray[Any, Any]:
        """Tokens of each sequence, (...)."""

    @abstractmethod
    def extend(self, k: Array, v: Array) -> None:
        """Add (..., Hkv, n, D) and (..., Hkv, n, Dv) at the end of all sequences."""

    @abstractmethod
    def undoing(self, count: int) -> Callable[[], None]:
        """What makes the cache as it is now after `extend` has added `count` tokens to each sequence."""


def _counts_keys(options: dict[str, Any]) -> bool:
    """Whether an option is an array along keys, or hangs on how many there are."""

    def counts(given: Any) -> bool:
        if given is None or not hasattr(given, "expr"):
            return arrays.is_array(given)
        nodes = walk(given.expr)
        return any(isinstance(n, Aligned) or (isinstance(n, Deferred) and not n.local) for n in nodes)

    return any(counts(options[name]) for name in ("bias", "mask", "score_mod"))


def _counts_tokens(options: dict[str, Any]) -> bool:
    """Whether an option asks for the number of a token, other than that causal does."""
    given = ("window", "mask", "bias", "score_mod")
    return any(options[name] is not None for name in given) or _drops(options)


def _drops(options: dict[str, Any]) -> bool:
    """Whether weights are dropped; so says an array too, which `dropout_of` refuses."""
    return arrays.is_array(options["dropout"]) or options["dropout"] != 0


def _relocated(found: Lookup, options: dict[str, Any]) -> dict[str, Any]:
    """Masks and scores as the cache's places see them."""
    from anyattn.expr.relocate import Relocation

    assert found.visible is not None
    if options["bias"] is not None:
        raise ValueError(
            "bias: an array along keys, which lie elsewhere in this cache; write it as score_mod, "
            "s + table[h, i - j]"
        )
    at_place = Relocation({} if found.token is None else {"j": found.token})
    parts = [masks.causal()] if options["causal"] else []
    if options["window"] is not None:
        parts.append(masks.sliding_window(*masks.window_bounds(options["window"], "window")))
    if options["mask"] is not None:
        parts.append(masks.as_mask(options["mask"], "mask"))
    visible = found.visible
    for part in parts:
        visible = visible & at_place(part.expr, "mask")
    changed: dict[str, Any] = {"causal": False, "window": None}
    changed["mask"] = Mask(visible, " & ".join(["in the cache", *map(repr, parts)]), "&")
    if options["score_mod"] is not None:
        score = scores.as_score(options["score_mod"])
        changed["score_mod"] = Score(at_place(score.expr, "score_mod"), repr(score))
    if _drops(options):
        from anyattn.dropout import Dropout

        changed["dropout"] = Dropout(options["dropout"], at_place)
    return changed
