"""A hypothesis strategy that draws whole calls of `linear_attention`: rules, shapes, states, packing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hypothesis import strategies as st

from anyattn.testing.case import Case, Drawn, Given, Plant, call
from anyattn.testing.strategies import BATCHES

__all__ = ["linear_calls"]

# Chunks are of 12 to 64 tokens.
LENGTHS = st.integers(0, 14) | st.sampled_from([1, 25, 49, 65, 101])


@st.composite
def linear_calls(draw: st.DrawFn, *, dtypes: Collection[str], capabilities: Collection[str]) -> Case:
    """Whole calls within what a backend declares, every one with a meaning.

    Rows are normalised over features that are not negative alone, and keys of the delta rules have length 1:
    otherwise quotients and states may be of any size.
    """
    able = frozenset(capabilities)
    gated = "gated_rule" in able and draw(st.booleans())
    delta = "delta_rule" in able and draw(st.booleans())
    dtype = draw(st.sampled_from(sorted(dtypes)))
    wide = "float64" if dtype == "float64" else "float32"
    batch, q_batch, k_batch = draw(st.sampled_from(BATCHES))
    two_axes = not batch and draw(st.integers(0, 5)) == 0
    kv_heads = 1 if two_axes else draw(st.integers(1, 3))
    group = draw(st.integers(1, 3)) if "grouped_heads" in able and not two_axes else 1
    length, dim, v_dim = (
        draw(LENGTHS),
        draw(st.sampled_from([1, 3, 8, 17])),
        draw(st.sampled_from([1, 5, 19])),
    )
    head = () if two_axes else (kv_heads,)
    causal = gated or delta or draw(st.booleans())
    packed = "cu_seqlens" in able and not batch and draw(st.booleans())
    normalize = not delta and draw(st.booleans())
    if packed:
        cuts = draw(st.lists(st.integers(0, length), max_size=3).map(sorted))
        bounds = Given("cu_seqlens", (0, *cuts, length))
    q_len = length if causal or packed else draw(LENGTHS)
    lead = (*batch, *((len(cuts) + 1,) if packed else ()), *head)

    options: dict[str, Any] = {
        "rule": ("gated_" * gated + "delta" if delta else "gated" if gated else "linear"),
        "feature_map": "elu+1" if normalize else draw(st.sampled_from([None, "identity", "softmax"])),
        "normalize": normalize,
        "causal": causal,
        "scale": draw(st.none() | st.sampled_from([1.0, -0.5])),
        "return_state": draw(st.booleans()),
        "layout": draw(st.sampled_from(["bhld", "blhd"])),
    }
    plants: list[Plant] = []
    if packed:
        options["cu_seqlens"] = bounds
    if gated:
        # The rank of k tells whether there is one for each channel.
        channels = (dim,) if draw(st.booleans()) else ()
        shape = (*k_batch, *head, length, *channels)
        options["decay"] = Drawn("decay", shape, how="decays")
        if length and draw(st.booleans()):
            strong = draw(st.sampled_from([float("-inf"), -2000.0, -30.0]))
            at = (..., draw(st.integers(0, length - 1)), *([0] if channels else []))
            plants.append(Plant("decay", at, strong))
    if delta:
        options["beta"] = Drawn("beta", (*k_batch, *head, length), how="positive")
    if draw(st.booleans()):
        state = Drawn("state", (*lead, dim, v_dim), wide)
        z = Drawn("z", (*lead, dim), wide, "positive")
        options["state"] = (state, z) if normalize else state
    return call(
        f"drawn {draw(st.integers(0, 10**6))}", "linear", "a whole call drawn by hypothesis", q_batch=q_batch,
        k_batch=k_batch, heads=kv_heads * group, kv_heads=kv_heads, q_len=q_len, k_len=length, dim=dim,
        v_dim=v_dim, two_axes=two_axes, dtype=dtype, operation="linear", plants=tuple(plants),
        recipes={"k": "unit"} if delta else None, **options,
    )  # fmt: skip
