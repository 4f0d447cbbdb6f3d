"""One call as data, independent of array libraries.

A `Case` says which arrays there are and how their values are drawn, not in which library they live: the
oracle reads its options with NumPy arrays and the oracle's vocabulary, a run under test reads the same
options with arrays of the library under test and `anyattn`'s vocabulary. Values follow from the names of the
case and of the array alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

Array = Any

ACCUMULATION = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
POSITION_ARGUMENTS = ("q", "k", "v")
CACHES = ("buffer", "ring", "pages")
"""Operations that are attention through a cache: of one buffer, a ring with sink tokens, pages of a pool."""


@dataclass(frozen=True)
class Drawn:
    """An array whose values are drawn; `how` names one of `RECIPES`, an empty dtype is the case's own."""

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    how: str = "normal"


@dataclass(frozen=True)
class Given:
    """An array whose values are written out; dtype "int" is the library's default integer."""

    name: str
    values: Any
    dtype: str = "int"


@dataclass(frozen=True)
class Same:
    """An array of the call once more, for `relative_keys(q, ...)`."""

    name: str


@dataclass(frozen=True)
class _Term:
    """What masks and scores have in common: they combine, and arguments may be arrays."""

    def __and__(self, other: Any) -> Combined:
        return Combined("and", self, other)

    def __or__(self, other: Any) -> Combined:
        return Combined("or", self, other)

    def __add__(self, other: Any) -> Combined:
        return Combined("add", self, other)

    def then(self, other: Any) -> Combined:
        """This score, then the other."""
        return Combined("then", self, other)

    def __invert__(self) -> Combined:
        return Combined("not", self, None)


@dataclass(frozen=True)
class Entry(_Term):
    """An entry of `anyattn.masks`, `anyattn.scores` or `anyattn.feature_maps` by name, with its arguments."""

    section: str
    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Combined(_Term):
    """Two masks or scores joined by "and", "or", "add" or "then", or one negated by "not"."""

    operator: str
    left: Any
    right: Any


@dataclass(frozen=True)
class Function(_Term):
    """A user's Python function.

    `maker(functions, *arrays)` returns it: `functions` has `where`, `clip`, `exp`, ... (the module `anyattn`,
    or the oracle's), the arrays are those to capture. In a score the function must be analytic in the score
    (no abs or floor of it), because the bounds differentiate it by a complex step.
    """

    maker: Callable[..., Callable[..., Any]]
    arrays: tuple[Drawn | Given, ...] = ()


@dataclass(frozen=True)
class Plant:
    """A special value written into a drawn array, in (..., H, L, D) order.

    `at` is an index, or "beyond kv_lengths" for the keys that the lengths hide.
    """

    array: str
    at: Any
    value: float


@dataclass(frozen=True)
class Value:
    """Values of one array and the dtype that it has in a library; bfloat16 values come as float32."""

    values: Array
    dtype: str


class Vocabulary(Protocol):
    """Where a case's masks, scores, feature maps and functions come from: `anyattn` or the oracle."""

    masks: Any
    scores: Any
    feature_maps: Any
    functions: Any

    def capture(self, array: Array) -> Any:
        """What a user's function sees of a captured array."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes
    ----------
    name, family, why
        `name` is unique and seeds the values; `why` says what would be missed without the case.
    q, k, v
        Shapes in (..., H, L, D) order, whatever the layout of the call; `v` is not used by weights and stats.
    dtype
        Of q, k and v.
    operation
        "attention", "weights", "stats", "linear" (`linear_attention`), "merge": attention in parts, joined,
        "packed" (`varlen_attention`, its sequences end to end on the axes of length), or one of `CACHES`:
        attention through a cache, an int8 one where the case needs that; with `kv_lengths`, which are no
        option there, of sequences that have so many tokens.
    options
        Keyword arguments of the call; arrays are `Drawn` or `Given`, masks and scores `Entry`, `Combined` or
        `Function`, everything else is plain data.
    recipes
        How q, k, v are drawn where that is not "normal".
    plants
        Special values written into the arrays.
    memory
        How arrays lie in memory: "plain", "reversed", "transposed", "gapped", "repeated" (stride 0) or
        "readonly".
    also
        Capabilities that the case needs besides those that follow from its options.
    cuts
        Of "merge": the keys at which the call is cut into parts that `anyattn.merge` joins. Of a cache: where
        the tokens are cut that are appended one part after the other.
    """

    name: str
    family: str
    why: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: str = "float32"
    operation: str = "attention"
    options: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, str] = field(default_factory=dict)
    plants: tuple[Plant, ...] = ()
    memory: str = "plain"
    also: frozenset[str] = frozenset()
    cuts: tuple[int, ...] = ()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return (
            f"Case({self.name!r}: {self.operation} of {self.dtype} q{self.q} k{self.k} v{self.v}; "
            + (shown or "no options")
            + (f"; plants {self.plants}" if self.plants else "")
            + (f"; memory {self.memory}" if self.memory != "plain" else "")
            + ")"
        )

    @property
    def needs(self) -> frozenset[str]:
        """Names of the capabilities that a backend needs for the call."""
        grouped = {"grouped_heads"} if len(self.q) > 2 and self.q[-3] != self.k[-3] else set()
        if self.operation == "linear":
            return frozenset(_linear_needs(self.options) | grouped) | self.also
        flags = ("causal", "return_lse", "dropout")
        named = {name for name in flags if self.options.get(name, False)} | {
            name
            for name in ("window", "mask", "bias", "score_mod", "softcap", "sinks", "kv_lengths", "q_offset")
            if self.options.get(name) is not None
        }
        if self.operation in ("weights", "stats"):
            named.add(self.operation)
        if self.operation == "packed":
            named = named - {"causal", "window"} | {"mask"}
        if "kv_lengths" in named and self.q[-2] == 1:
            # The one query stands at kv_lengths - 1, a position of its own in each batch entry.
            named.add("q_offset")
        return frozenset(named | grouped) | self.also

    @property
    def layout(self) -> str:
        """Axis order of the call's q, k and v."""
        return str(self.options.get("layout", "bhld"))

    @property
    def dtypes(self) -> frozenset[str]:
        """Every dtype that a library must have for the case's arrays."""
        return frozenset(spec.dtype or self.dtype for spec in self.specifications()) - {"int", "bool"}

    def specifications(self) -> Iterator[Drawn | Given]:
        """q, k, v and the arrays of the options."""
        for name in self._positional:
            yield Drawn(name, getattr(self, name), how=self.recipes.get(name, "normal"))
        yield from arrays_in(self.options)

    def arrays(self) -> dict[str, Value]:
        """The values of every array, by name, in the call's layout."""
        still = self.memory == "repeated"
        drawn = {
            spec.name: draw(self.name, spec, self.dtype, repeated=still) for spec in self.specifications()
        }
        if self.plants:
            drawn = {name: replace(value, values=value.values.copy()) for name, value in drawn.items()}
        for plant in self.plants:
            values = drawn[plant.array].values
            if plant.at == "beyond kv_lengths":
                _plant_beyond(
                    values, _plain(self.options["kv_lengths"], drawn), self.batch_shape, plant.value
                )
            else:
                values[plant.at] = plant.value
        if self.layout == "blhd":
            for name in POSITION_ARGUMENTS:
                if name in drawn and drawn[name].values.ndim > 2:
                    drawn[name] = replace(drawn[name], values=np.swapaxes(drawn[name].values, -3, -2))
        return drawn

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The broadcast batch axes."""
        return np.broadcast_shapes(self.q[:-3], self.k[:-3], self.v[:-3])

    def arguments(
        self, arrays: Mapping[str, Any], vocabulary: Vocabulary
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the call on arrays of one library."""
        keywords = {name: resolve(value, arrays, vocabulary) for name, value in self.options.items()}
        return [arrays[name] for name in self._positional], keywords

    @property
    def _positional(self) -> tuple[str, ...]:
        return POSITION_ARGUMENTS[:2] if self.operation in ("weights", "stats") else POSITION_ARGUMENTS


def _linear_needs(options: Mapping[str, Any]) -> set[str]:
    named = {"linear_attention"}
    named |= {need for name, need in _LINEAR_NEEDS.items() if options.get(name) is not None}
    return named


_LINEAR_NEEDS = {"decay": "gated_rule", "beta": "delta_rule", "cu_seqlens": "cu_seqlens"}


def draw(seed: str, spec: Drawn | Given, dtype: str = "float32", *, repeated: bool = False) -> Value:
    """The values of one array; `repeated` makes them the same along the first of three or more axes."""
    dtype = spec.dtype or dtype
    if isinstance(spec, Given):
        return Value(_rounded(np.array(spec.values), dtype), dtype)
    rng = np.random.default_rng([zlib.crc32(seed.encode()), zlib.crc32(spec.name.encode())])
    shape = (1, *spec.shape[1:]) if repeated and len(spec.shape) > 2 else spec.shape
    return Value(np.broadcast_to(_rounded(RECIPES[spec.how](rng, shape), dtype), spec.shape), dtype)


def call(
    name: str,
    family: str,
    why: str,
    *,
    batch: tuple[int, ...] = (),
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 5,
    k_len: int = 9,
    dim: int = 8,
    v_dim: int | None = None,
    q_batch: tuple[int, ...] | None = None,
    k_batch: tuple[int, ...] | None = None,
    v_batch: tuple[int, ...] | None = None,
    two_axes: bool = False,
    dtype: str = "float32",
    operation: str = "attention",
    recipes: Mapping[str, str] | None = None,
    plants: tuple[Plant, ...] = (),
    memory: str = "plain",
    also: Collection[str] = frozenset(),
    cuts: tuple[int, ...] = (),
    **options: Any,
) -> Case:
    """A case from sizes; `q_batch`, `k_batch` and `v_batch` replace `batch` where the arrays differ."""
    kv_heads = heads if kv_heads is None else kv_heads
    v_dim = dim if v_dim is None else v_dim
    q, k, v = (
        (*(batch if own is None else own), *((n,) if not two_axes else ()), length, features)
        for own, n, length, features in (
            (q_batch, heads, q_len, dim),
            (k_batch, kv_heads, k_len, dim),
            (v_batch if v_batch is not None else k_batch, kv_heads, k_len, v_dim),
        )
    )
    return Case(
        name, family, why, q, k, v, dtype, operation, options, recipes or {}, plants, memory, frozenset(also),
        cuts,
    )  # fmt: skip


def resolve(option: Any, arrays: Mapping[str, Any], vocabulary: Vocabulary) -> Any:
    """An option as an argument: names replaced by arrays and by entries of the vocabulary."""
    match option:
        case Drawn() | Given() | Same():
            return arrays[option.name]
        case Entry():
            entry = getattr(getattr(vocabulary, option.section), option.name)
            args = [resolve(x, arrays, vocabulary) for x in option.args]
            return entry(*args, **{name: resolve(x, arrays, vocabulary) for name, x in option.kwargs.items()})
        case Function():
            captured = [vocabulary.capture(arrays[spec.name]) for spec in option.arrays]
            return option.maker(vocabulary.functions, *captured)
        case Combined():
            left = resolve(option.left, arrays, vocabulary)
            if option.operator == "not":
                return ~left
            right = resolve(option.right, arrays, vocabulary)
            return _JOIN[option.operator](left, right)
        case tuple():
            return tuple(resolve(part, arrays, vocabulary) for part in option)
    return option


_JOIN: dict[str, Callable[[Any, Any], Any]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "add": lambda a, b: a + b,
    "then": lambda a, b: a.then(b),
}


def arrays_in(option: Any) -> Iterator[Drawn | Given]:
    """Every array inside an option, or inside a mapping of options."""
    match option:
        case Mapping():
            for value in option.values():
                yield from arrays_in(value)
        case Drawn() | Given():
            yield option
        case Entry():
            for value in (*option.args, *option.kwargs.values()):
                yield from arrays_in(value)
        case Function():
            yield from option.arrays
        case Combined():
            yield from arrays_in(option.left)
            yield from arrays_in(option.right)
        case tuple():
            for part in option:
                yield from arrays_in(part)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def _int8_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Rows that int8 with a scale holds exactly: whole numbers, 127 the largest, times 2**n."""
    rows = rng.integers(-127, 128, shape).astype(np.float64)
    rows[..., 0] = 127
    return np.ldexp(rows, rng.integers(-8, -4, (*shape[:-1], 1)))


def _unit(x: Array) -> Array:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True))


RECIPES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": _normal,
    # Every product of queries and keys is exact in float32, so that logits of 1e4 compare closely.
    "hundreds": lambda rng, shape: rng.integers(-60, 61, shape).astype(np.float64),
    "ones": lambda rng, shape: np.ones(shape),
    "positive": lambda rng, shape: rng.uniform(0.1, 1.0, shape),
    "mostly true": lambda rng, shape: rng.random(shape) < 0.7,
    "half true": lambda rng, shape: rng.random(shape) < 0.5,
    "int8 rows": _int8_rows,
    "unit": lambda rng, shape: _unit(rng.standard_normal(shape)),
    "decays": lambda rng, shape: -rng.uniform(0.01, 0.3, shape),
    "few ids": lambda rng, shape: np.sort(rng.integers(0, 3, shape), axis=-1),
}


def _rounded(values: Array, dtype: str) -> Array:
    """Values as a dtype holds them; bfloat16 in float32, because NumPy has no such type of its own."""
    if dtype == "int":
        return values.astype(np.int64)
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        # Round to nearest, ties to even: NaN and infinity are planted later, never drawn.
        kept = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return kept.astype(np.uint32).view(np.float32)
    return values.astype(np.dtype(dtype))


def _plain(option: Any, drawn: Mapping[str, Value]) -> Array:
    return drawn[option.name].values if isinstance(option, Drawn | Given) else np.asarray(option)


def _plant_beyond(values: Array, lengths: Array, batch_shape: tuple[int, ...], value: float) -> None:
    """Write a value at the keys that no batch entry which shares them reaches."""
    own = values.shape[:-3]
    reach = np.broadcast_to(lengths, batch_shape)
    reach = reach.max(axis=tuple(range(len(batch_shape) - len(own))), initial=0)
    shared = tuple(axis for axis, n in enumerate(own) if n == 1)
    reach = reach.max(axis=shared, keepdims=True, initial=0) if shared else reach
    hidden = np.arange(values.shape[-2]) >= np.asarray(reach)[..., None]
    rows = hidden[..., None, :, None] if values.ndim > 2 else hidden[:, None]
    values[np.broadcast_to(rows, values.shape)] = value
