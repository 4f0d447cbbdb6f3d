"""`linear_attention`: each rule in each dtype, lengths about a chunk, feature maps, packing, hard decays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyattn.testing.case import Case, Drawn, Entry, Function, Given, Plant, call
from anyattn.testing.cases import makers

FAMILY = "linear"
DIM, V_DIM = 5, 4
INF = float("inf")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _rules()
    yield from _lengths()
    yield from _feature_maps()
    yield from _both_ways()
    yield from _shapes()
    yield from _packed()
    yield from _values()


def gradient_cases() -> Iterator[Case]:
    """Calls that are differentiated by every float array in them, in the family of all such."""
    shared: dict[str, Any] = {"family": "gradients", "also": {"gradients"}}
    for rule, dtype, each_channel in (
        ("linear", "float16", True), ("gated", "bfloat16", False), ("delta", "float64", False),
    ):  # fmt: skip
        yield _case(
            f"gradient, {rule}, {dtype}", "the rule by itself, and the state that it starts from", rule,
            heads=4, kv_heads=2, length=7, dtype=dtype, each_channel=each_channel, **shared,
            state=_state(2, dtype="float64" if dtype == "float64" else "float32"),
        )  # fmt: skip
    yield _case(
        "gradient, gated, 67 tokens", "what comes back from one chunk to the one before", "gated",
        length=67, each_channel=False, state=_state(1), **shared,
    )  # fmt: skip
    yield _case(
        "gradient, normalised, packed, blhd", "the derivative of a quotient, a sequence at a time", "gated",
        heads=2, length=11, feature_map="elu+1", normalize=True, layout="blhd",
        cu_seqlens=Given("cu_seqlens", (0, 5, 5, 11)),
        state=(_state(3, 1), Drawn("z", (3, 1, DIM), "float32", "positive")), **shared,
    )  # fmt: skip
    yield _case(
        "gradient, batch axes that broadcast", "sums over those that share a decay or keys", "gated_delta",
        q_batch=(2, 1), k_batch=(1, 3), v_batch=(3,), length=5, state=_state(2, 1, 1), **shared,
        decay=Drawn("decay", (2, 1, 1, 5), how="decays"), beta=Drawn("beta", (3, 1, 5), how="positive"),
    )  # fmt: skip
    yield _case(
        "gradient, both ways, two axes", "every query reads the last state", causal=False, q_len=3, k_len=5,
        two_axes=True, **shared,
    )  # fmt: skip


def _case(
    name: str,
    why: str,
    rule: str = "linear",
    *,
    batch: tuple[int, ...] = (),
    heads: int = 2,
    kv_heads: int = 1,
    length: int = 9,
    each_channel: bool = True,
    two_axes: bool = False,
    decays: str = "decays",
    plants: tuple[Plant, ...] = (),
    family: str = FAMILY,
    **options: Any,
) -> Case:
    """A case of a rule with what the rule needs; keys of the delta rules have length 1, as they should."""
    head = () if two_axes else (kv_heads,)
    needed: dict[str, Any] = {}
    if rule.startswith("gated"):
        channels = (DIM,) if each_channel else ()
        needed["decay"] = Drawn("decay", (*batch, *head, length, *channels), how=decays)
    if rule.endswith("delta"):
        needed["beta"] = Drawn("beta", (*batch, *head, length), how="positive")
    options = {"q_len": length, "k_len": length, "dim": DIM, "v_dim": V_DIM, **needed, **options}
    return call(
        f"linear: {name}", family, why, batch=batch, heads=heads, kv_heads=kv_heads, two_axes=two_axes,
        operation="linear", rule=rule, recipes={"k": "unit"} if rule.endswith("delta") else None,
        plants=plants, **options,
    )  # fmt: skip


def _state(*lead: int, dtype: str = "float32") -> Drawn:
    return Drawn("state", (*lead, DIM, V_DIM), dtype)


def _rules() -> Iterator[Case]:
    for rule in ("linear", "gated", "delta", "gated_delta"):
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            wide = "float64" if dtype == "float64" else "float32"
            yield _case(
                f"rule {rule}, {dtype}", "the rule by itself, its state in and out", rule, batch=(2,),
                heads=4, kv_heads=2, length=5, dtype=dtype, state=_state(2, 2, dtype=wide), return_state=True,
                each_channel=rule == "gated",
            )  # fmt: skip


def _lengths() -> Iterator[Case]:
    for length in (0, 1, 2, 64, 67):
        yield _case(
            f"gated_delta, {length} tokens", "chunks that are empty, whole and partial", "gated_delta",
            length=length, return_state=True, state=_state(1),
        )  # fmt: skip
    for rule, length in (("linear", 150), ("gated", 150), ("delta", 70)):
        yield _case(
            f"{rule}, {length} tokens", "the state from chunk to chunk", rule, length=length,
            each_channel=False, return_state=True,
        )  # fmt: skip
    yield _case(
        "linear, 100 tokens of 40 values", "rows of values that fill registers", length=100, v_dim=40,
        return_state=True,
    )  # fmt: skip
    yield _case("one token without a state", "the first step of decoding", "gated_delta", length=1)


def _feature_maps() -> Iterator[Case]:
    maps = {
        "elu+1": "elu+1",
        "relu": "relu",
        "softmax": "softmax",
        "a function": Function(makers.squares),
        "performer": Entry("feature_maps", "performer", (DIM, 12), {"seed": 3}),
    }
    for name, feature_map in maps.items():
        yield _case(
            f"{name}, normalised", "features that are not negative make weighted means", batch=(2,),
            feature_map=feature_map, normalize=True, scale=1.0, return_state=True,
        )  # fmt: skip
    yield _case(
        "elu+1, gated, float16, state and normalizer", "z decays with S", "gated", feature_map="elu+1",
        normalize=True, dtype="float16", return_state=True, length=70,
        state=(_state(1), Drawn("z", (1, DIM), "float32", "positive")),
    )  # fmt: skip
    yield _case(
        "relu, a query without features", "a row that weighs nothing is 0", feature_map="relu",
        normalize=True, plants=(Plant("q", (0, 3), -1.0), Plant("q", (1, 0), 0.0)),
    )  # fmt: skip
    yield _case(
        "softmax, no tokens", "nothing has a largest feature", length=0, feature_map="softmax",
        normalize=True, return_state=True,
    )  # fmt: skip
    yield _case("softmax, delta", "features of the delta rule", "delta", feature_map="softmax")


def _both_ways() -> Iterator[Case]:
    yield _case("both ways", "every query reads the last state", causal=False, return_state=True)
    yield _case(
        "both ways, more keys than queries, normalised", "lengths may differ without order", causal=False,
        q_len=3, k_len=11, feature_map="elu+1", normalize=True, return_state=True, heads=4, kv_heads=2,
        state=(_state(2), Drawn("z", (2, DIM), "float32", "positive")), layout="blhd",
    )  # fmt: skip
    yield _case("both ways, no tokens", "nothing to read", batch=(2,), length=0, causal=False)


def _shapes() -> Iterator[Case]:
    yield _case(
        "blhd", "decay, beta and state keep their order", "gated_delta", batch=(2,), heads=4, kv_heads=2,
        layout="blhd", return_state=True, state=_state(2, 2),
    )  # fmt: skip
    yield _case(
        "two axes", "no head axis anywhere", "gated_delta", two_axes=True, return_state=True, state=_state()
    )
    yield _case(
        "two axes, a decay a token", "a decay for each channel has the rank of k", "gated", two_axes=True,
        each_channel=False,
    )  # fmt: skip
    yield _case(
        "batch axes that broadcast", "as in matmul, the state too", "gated_delta", q_batch=(2, 1),
        k_batch=(1, 3), v_batch=(3,), return_state=True, state=_state(2, 1, 1),
        decay=Drawn("decay", (2, 1, 1, 9, DIM), how="decays"), beta=Drawn("beta", (3, 1, 9), how="positive"),
    )  # fmt: skip
    yield _case("no heads", "the head axis may be empty", "gated", heads=0, kv_heads=0, return_state=True)
    for memory in ("reversed", "transposed", "repeated", "readonly"):
        yield _case(f"{memory} arrays", "taken as they lie", "gated_delta", batch=(2,), memory=memory)


def _packed() -> Iterator[Case]:
    why = "each sequence by itself"
    bounds = Given("cu_seqlens", (0, 3, 3, 8, 12))
    yield _case(
        "packed, gated_delta", why, "gated_delta", heads=4, kv_heads=2, length=12, cu_seqlens=bounds,
        return_state=True, state=_state(4, 2),
    )  # fmt: skip
    yield _case(
        "packed, normalised, blhd", why, length=11, cu_seqlens=[0, 5, 11], return_state=True,
        feature_map="elu+1", normalize=True, layout="blhd",
    )  # fmt: skip
    yield _case(
        "packed, both ways, two axes", why, length=9, two_axes=True, causal=False, return_state=True,
        cu_seqlens=Given("cu_seqlens", (0, 4, 9)),
    )  # fmt: skip


def _values() -> Iterator[Case]:
    yield _case("scale", "the scale of the result", scale=-0.3)
    for rule in ("gated", "gated_delta"):
        yield _case(
            f"{rule}, decays that forget at once", "no quotient of two that vanished, -inf is a start", rule,
            length=70, return_state=True, state=_state(1),
            plants=tuple(
                Plant("decay", at, value)
                for at, value in (((0, 4), -200.0), ((0, 20, 1), -INF), ((0, 66), -INF))
            ),
        )  # fmt: skip
    yield _case(
        "decay and beta of other dtypes", "any float dtype", "gated_delta", dtype="float16",
        decay=Drawn("decay", (1, 9), "float32", "decays"), beta=Drawn("beta", (1, 9), "bfloat16", "positive"),
    )  # fmt: skip
