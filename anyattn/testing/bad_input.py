"""Calls that must be refused, as data: which exception, and which words its message must hold.

The contract asks for an error that names the argument, what came and what was wanted, before anything is
computed: a refused call leaves no entry in the dispatch record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anyattn.testing.case import Drawn, Entry, Function, Given
from anyattn.testing.cases import makers

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class BadCall:
    """A call to refuse.

    Attributes
    ----------
    name, why
        As of a `Case`.
    error
        The exception: the name of a built-in one, or of one in `anyattn.errors`.
    mentions
        Words of the message: the argument, what came, what was wanted.
    operation
        "attention", "weights", "stats", "linear" or "merge".
    arrays
        q, k and v, or others in their place.
    options
        As of a `Case`; a dtype of an array may be any that NumPy knows.
    reads_values
        Whether the error is about values, which is promised where the host can read them without a transfer.
    foreign, elsewhere
        Name of an array that comes from another library, or from another device.
    """

    name: str
    why: str
    error: str
    mentions: tuple[str, ...]
    operation: str = "attention"
    arrays: Mapping[str, Drawn | Given] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    reads_values: bool = False
    foreign: str | None = None
    elsewhere: str | None = None

    family: ClassVar[str] = "bad input"

    @property
    def needs(self) -> frozenset[str]:
        """No capability: the call is refused before a backend is asked."""
        return frozenset()

    def specifications(self) -> dict[str, Drawn | Given]:
        """q, k and v, with what replaces them."""
        plain = {
            "q": Drawn("q", (2, 4, 5, 8), "float32"),
            "k": Drawn("k", (2, 4, 9, 8), "float32"),
            "v": Drawn("v", (2, 4, 9, 6), "float32"),
        }
        if self.operation in ("weights", "stats"):
            del plain["v"]
        return {**plain, **self.arrays}


def _truth_value(_f: Any) -> Any:
    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return True if i > j else j == 0

    return mask


def bad_calls() -> tuple[BadCall, ...]:
    """Every call to refuse."""
    return (
        *_arrays(), *_masks_and_biases(), *_numbers(), *_lengths_and_offsets(), *_names(), *_around(),
        *_linear(),
    )  # fmt: skip


def _arrays() -> tuple[BadCall, ...]:
    def q(*shape: int, dtype: str = "float32") -> dict[str, Drawn]:
        return {"q": Drawn("q", shape, dtype)}

    def k(*shape: int, dtype: str = "float32") -> dict[str, Drawn]:
        return {"k": Drawn("k", shape, dtype)}

    def v(*shape: int, dtype: str = "float32") -> dict[str, Drawn]:
        return {"v": Drawn("v", shape, dtype)}

    return (
        BadCall(
            "heads of k and v differ", "heads never broadcast", "ValueError", ("v", "4", "2"),
            arrays=v(2, 2, 9, 6),
        ),
        BadCall(
            "one head of v beside many of k", "heads never broadcast", "ValueError", ("v", "1"),
            arrays=v(2, 1, 9, 6),
        ),
        BadCall(
            "query heads are no multiple", "groups", "ValueError", ("k", "4", "3"),
            arrays=k(2, 3, 9, 8) | v(2, 3, 9, 6),
        ),
        BadCall(
            "fewer query heads than key heads", "groups", "ValueError", ("k", "2", "4"), arrays=q(2, 2, 5, 8),
        ),
        BadCall("D of q and k differ", "q.k", "ValueError", ("k", "8", "7"), arrays=k(2, 4, 9, 7)),
        BadCall("D of 0", "D >= 1", "ValueError", ("q", "0"), arrays=q(2, 4, 5, 0) | k(2, 4, 9, 0)),
        BadCall(
            "lengths of k and v differ", "one value for a key", "ValueError", ("v", "9", "10"),
            arrays=v(2, 4, 10, 6),
        ),
        BadCall(
            "batch axes that do not broadcast", "as in matmul", "ValueError", ("k", "2", "3"),
            arrays=k(3, 4, 9, 8) | v(3, 4, 9, 6),
        ),
        BadCall("q of one axis", "no rows", "ValueError", ("q", "(8,)"), arrays=q(8)),
        BadCall(
            "k of two axes beside q of four", "two axes mean no head axis", "ValueError", ("k",),
            arrays=k(9, 8),
        ),
        BadCall(
            "dtypes of q and k differ", "one dtype", "TypeError", ("k", "float32", "float64"),
            arrays=k(2, 4, 9, 8, dtype="float64"),
        ),
        BadCall(
            "dtypes of k and v differ", "one dtype", "TypeError", ("v", "float32", "float16"),
            arrays=v(2, 4, 9, 6, dtype="float16"),
        ),
        BadCall(
            "integer arrays", "floats only", "TypeError", ("q", "int"),
            arrays={"q": Given("q", ((1, 2),)), "k": Given("k", ((1, 2),)), "v": Given("v", ((1, 2),))},
        ),
        BadCall("boolean v", "floats only", "TypeError", ("v", "bool"), arrays=v(2, 4, 9, 6, dtype="bool")),
        BadCall("no v", "v is left out only beside a cache", "TypeError", ("v",), options={"v": None}),
        BadCall("a list as q", "arrays only", "TypeError", ("q", "list"), options={"q": [[1.0, 2.0]]}),
        BadCall("k of another library", "never a silent transfer", "TypeError", ("k",), foreign="k"),
        BadCall(
            "bias of another library", "never a silent transfer", "TypeError", ("bias",), foreign="bias",
            options={"bias": Drawn("bias", (5, 9), "float32")},
        ),
        BadCall(
            "mask of another library", "never a silent transfer", "TypeError", ("mask",), foreign="mask",
            options={"mask": Drawn("mask", (5, 9), "bool", "half true")},
        ),
        BadCall(
            "sinks of another library", "never a silent transfer", "TypeError", ("sinks",), foreign="sinks",
            options={"sinks": Drawn("sinks", (4,), "float32")},
        ),
        BadCall(
            "k on another device", "never a silent transfer", "ValueError", ("k", "device"), elsewhere="k",
        ),
        BadCall(
            "bias on another device", "never a silent transfer", "ValueError", ("bias", "device"),
            elsewhere="bias", options={"bias": Drawn("bias", (5, 9), "float32")},
        ),
    )  # fmt: skip


def _masks_and_biases() -> tuple[BadCall, ...]:
    def call(name: str, why: str, error: str, mentions: tuple[str, ...], **options: Any) -> BadCall:
        return BadCall(name, why, error, mentions, options=options)

    return (
        call(
            "integer mask", "0/1 or additive?", "TypeError", ("mask", "bias", "int"),
            mask=Given("mask", ((1, 0, 1, 0, 1, 0, 1, 0, 1),)),
        ),
        call(
            "float mask", "additive masks are bias", "TypeError", ("mask", "bias", "float"),
            mask=Drawn("mask", (5, 9), "float32"),
        ),
        call(
            "boolean bias", "booleans are masks", "TypeError", ("bias", "mask", "bool"),
            bias=Drawn("bias", (5, 9), "bool", "half true"),
        ),
        call("integer bias", "floats only", "TypeError", ("bias", "int"), bias=Given("bias", ((1,),))),
        call("a number as mask", "neither mask nor array", "TypeError", ("mask", "int"), mask=3),
        call(
            "a score as mask", "the two vocabularies", "TypeError", ("mask", "Score"),
            mask=Entry("scores", "alibi", (4,)),
        ),
        call(
            "a mask as score_mod", "the two vocabularies", "TypeError", ("score_mod", "Mask"),
            score_mod=Entry("masks", "causal"),
        ),
        call(
            "mask that does not broadcast", "shape", "ValueError", ("mask", "5", "8"),
            mask=Drawn("mask", (5, 8), "bool"),
        ),
        call(
            "mask of three axes", "rank 2 or the result's", "ValueError", ("mask",),
            mask=Drawn("mask", (4, 5, 9), "bool"),
        ),
        call(
            "mask of keys alone", "rank 2 or the result's", "ValueError", ("mask",),
            mask=Drawn("mask", (9,), "bool"),
        ),
        call(
            "bias that does not broadcast", "shape", "ValueError", ("bias", "4", "9"),
            bias=Drawn("bias", (4, 9), "float32"),
        ),
        call(
            "bias of five axes", "rank 2 or the result's", "ValueError", ("bias",),
            bias=Drawn("bias", (1, 1, 1, 5, 9), "float32"),
        ),
        call(
            "blocks that do not fit", "ceil(Lq / bs), ceil(Lk / bs)", "ValueError", ("block_sparse",),
            mask=Entry("masks", "block_sparse", (Drawn("blocks", (2, 3), "bool"), 2)),
        ),
        call(
            "a function with a truth value", "cannot be traced", "TraceError", ("aa.where",),
            mask=Function(_truth_value),
        ),
        call(
            "a mask function that gives a number", "True or False", "TypeError", ("mask",),
            mask=Function(makers.number),
        ),
    )  # fmt: skip


def _numbers() -> tuple[BadCall, ...]:
    def call(name: str, error: str, mentions: tuple[str, ...], **options: Any) -> BadCall:
        return BadCall(name, "a number that means nothing here", error, mentions, options=options)

    return (
        call("NaN scale", "ValueError", ("scale", "nan"), scale=NAN),
        call("infinite scale", "ValueError", ("scale", "inf"), scale=INF),
        call("a word as scale", "TypeError", ("scale", "str"), scale="0.5"),
        call("softcap of 0", "ValueError", ("softcap", "0"), softcap=0.0),
        call("negative softcap", "ValueError", ("softcap", "-1"), softcap=-1.0),
        call("NaN softcap", "ValueError", ("softcap", "nan"), softcap=NAN),
        call("negative window", "ValueError", ("window", "-1"), window=(-1, 0)),
        call("negative right window", "ValueError", ("window", "-2"), window=(0, -2)),
        call("window of one number", "TypeError", ("window",), window=4),
        call("window of floats", "TypeError", ("window", "1.5"), window=(1.5, 0)),
        call("causal as a number", "TypeError", ("causal",), causal=3),
        call("sinks of another length", "ValueError", ("sinks", "4", "3"), sinks=[1.0, 2.0, 3.0]),
        call("integer sinks", "TypeError", ("sinks", "int"), sinks=Given("sinks", (1, 2, 3, 4))),
    )  # fmt: skip


def _lengths_and_offsets() -> tuple[BadCall, ...]:
    def call(
        name: str, error: str, mentions: tuple[str, ...], reads: bool = False, **options: Any
    ) -> BadCall:
        return BadCall(name, "lengths and positions", error, mentions, options=options, reads_values=reads)

    unsaid = ("q_offset", "0", "kv_lengths")
    return (
        call("lengths and causal without offset", "ValueError", unsaid, kv_lengths=[9, 4], causal=True),
        call("lengths and window without offset", "ValueError", unsaid, kv_lengths=[9, 4], window=(2, 0)),
        call(
            "lengths and a mask of positions without offset", "ValueError", unsaid, kv_lengths=[9, 4],
            mask=Entry("masks", "strided", (2,)),
        ),
        call(
            "lengths and a score of positions without offset", "ValueError", unsaid, kv_lengths=[9, 4],
            score_mod=Entry("scores", "alibi", (4,)),
        ),
        call(
            "kv_lengths beyond Lk", "ValueError", ("kv_lengths", "10", "9"), reads=True,
            kv_lengths=Given("kv_lengths", (10, 4)),
        ),
        call(
            "negative kv_lengths", "ValueError", ("kv_lengths", "-1"), reads=True,
            kv_lengths=Given("kv_lengths", (9, -1)),
        ),
        call("kv_lengths beyond Lk in a list", "ValueError", ("kv_lengths", "10", "9"), kv_lengths=[10, 4]),
        call(
            "float kv_lengths", "TypeError", ("kv_lengths", "float"),
            kv_lengths=Given("kv_lengths", (9.0, 4.0), "float32"),
        ),
        call("kv_lengths of another batch", "ValueError", ("kv_lengths", "3", "2"), kv_lengths=[1, 2, 3]),
        call("float q_offset", "TypeError", ("q_offset", "integer", "1.5"), q_offset=1.5, causal=True),
        call("q_offset of another batch", "ValueError", ("q_offset",), q_offset=[1, 2, 3], causal=True),
    )  # fmt: skip


def _names() -> tuple[BadCall, ...]:
    def call(name: str, why: str, error: str, mentions: tuple[str, ...], **options: Any) -> BadCall:
        return BadCall(name, why, error, mentions, options=options)

    return (
        call(
            "unknown backend", "with the list and near matches", "UnknownBackendError",
            ("refrence", "reference"), backend="refrence",
        ),
        call(
            "unknown layout", "with the two there are", "ValueError", ("layout", "bhld", "blhd", "lbhd"),
            layout="lbhd",
        ),
        call(
            "dropout without a seed", "no hidden state decides what is dropped", "ValueError",
            ("dropout_seed", "0.1", "None"), dropout=0.1,
        ),
        call(
            "dropout of everything", "1 / (1 - p) has no value", "ValueError", ("dropout", "1.0", "[0, 1)"),
            dropout=1.0, dropout_seed=3,
        ),
        call(
            "a seed of 65 bits", "the key has 64", "ValueError",
            ("dropout_seed", "18446744073709551616", "64"), dropout=0.1, dropout_seed=2**64,
        ),
        call(
            "a seed for each entry", "one seed a call", "TypeError", ("dropout_seed", "axes"), dropout=0.1,
            dropout_seed=Given("seed", (1, 2)),
        ),
    )  # fmt: skip


def _around() -> tuple[BadCall, ...]:
    two = {"outs": Drawn("outs", (2, 5, 8), "float32"), "lses": Drawn("lses", (2, 5), "float32")}
    return (
        BadCall(
            "rows out of range", "rows of the call", "ValueError", ("rows", "5"), "weights",
            options={"rows": [0, 5]},
        ),
        BadCall("rows as floats", "row numbers", "TypeError", ("rows",), "weights", options={"rows": [0.5]}),
        BadCall(
            "unknown statistic", "with those there are", "ValueError",
            ("stats", "key_mass", "entropy", "max", "median"), "stats", options={"stats": ("median",)},
        ),
        BadCall(
            "statistics as one word", "a sequence of names", "TypeError", ("stats", "sequence"), "stats",
            options={"stats": "max"},
        ),
        BadCall(
            "merge of unequal numbers of parts", "one lse for each out", "ValueError", ("lses", "2", "1"),
            "merge", arrays=two, options={"outs": 2, "lses": 1},
        ),
        BadCall(
            "merge of nothing", "no shape to return", "ValueError", ("outs",), "merge", arrays=two,
            options={"outs": 0, "lses": 0},
        ),
    )  # fmt: skip


def _linear() -> tuple[BadCall, ...]:
    same = {"q": Drawn("q", (2, 4, 9, 8), "float32")}
    decay, beta = Drawn("decay", (2, 4, 9), "float32"), Drawn("beta", (2, 4, 9), "float32")

    def call(
        name: str,
        error: str,
        mentions: tuple[str, ...],
        arrays: Any = None,
        reads: bool = False,
        **options: Any,
    ) -> BadCall:
        return BadCall(
            f"linear: {name}", "strict like attention", error, mentions, "linear", same | (arrays or {}),
            options, reads_values=reads,
        )  # fmt: skip

    return (
        call("unknown rule", "ValueError", ("rule", "gated_delta", "retnet"), rule="retnet"),
        call("gated without decay", "TypeError", ("decay", "gated", "None"), rule="gated"),
        call("decay of the linear rule", "ValueError", ("decay", "linear"), decay=decay),
        call("beta of the gated rule", "ValueError", ("beta", "gated"), rule="gated", decay=decay, beta=beta),
        call(
            "decay of one head", "ValueError", ("decay", "(4, 9)", "(2, 1, 9)"), rule="gated",
            decay=Drawn("decay", (2, 1, 9), "float32"),
        ),
        call(
            "decay of other channels", "ValueError", ("decay", "8", "(2, 4, 9, 3)"), rule="gated",
            decay=Drawn("decay", (2, 4, 9, 3), "float32"),
        ),
        call(
            "boolean beta", "TypeError", ("beta", "bool"), rule="delta",
            beta=Drawn("beta", (2, 4, 9), "bool"),
        ),
        call(
            "both ways with decay", "ValueError", ("causal", "gated"), rule="gated", decay=decay,
            causal=False,
        ),
        call(
            "normalised delta", "ValueError", ("normalize", "delta"), rule="delta", beta=beta,
            normalize=True,
        ),
        call(
            "state of the inputs' 16 bits", "TypeError", ("state", "float32", "float16"),
            {name: Drawn(name, (2, 4, 9, 8), "float16") for name in "qkv"},
            state=Drawn("state", (2, 4, 8, 8), "float16"),
        ),
        call(
            "state of another shape", "ValueError", ("state", "(4, 8, 6)", "(2, 4, 6, 8)"),
            state=Drawn("state", (2, 4, 6, 8), "float32"),
        ),
        call(
            "a state without its normalizer", "TypeError", ("state", "(S, z)"), normalize=True,
            state=Drawn("state", (2, 4, 8, 6), "float32"),
        ),
        call("unknown feature map", "ValueError", ("feature_map", "elu+1", "gelu"), feature_map="gelu"),
        call(
            "other lengths in order", "ValueError", ("k", "5", "9", "causal"),
            {"q": Drawn("q", (2, 4, 5, 8), "float32")},
        ),
        call("packed batches", "ValueError", ("cu_seqlens", "batch"), cu_seqlens=[0, 9]),
        call(
            "sequences beyond the tokens", "ValueError", ("cu_seqlens", "9", "10"),
            {name: Drawn(name, (4, 9, 8), "float32") for name in "qkv"}, reads=True,
            cu_seqlens=Given("cu_seqlens", (0, 4, 10)),
        ),
        call(
            "sequences that go back", "ValueError", ("cu_seqlens", "9", "rise"),
            {name: Drawn(name, (4, 9, 8), "float32") for name in "qkv"}, cu_seqlens=[0, 7, 4, 9],
        ),
    )  # fmt: skip
