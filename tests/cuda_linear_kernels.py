"""The kernels of linear attention by what they are called for, as the launch code chooses them."""

from __future__ import annotations

from types import SimpleNamespace

from cuda_standin import SHARED_MEMORY

from anyattn_cupy.linear_launch import join_source, linear_source
from anyattn_cupy.linear_variants import LinearVariant, choose
from anyattn_cupy.variants import Device

__all__ = ["CALLS", "RULES", "chosen", "source_of"]

# Decays of a token, whether there is beta.
RULES = {
    "linear": (0, False),
    "gated, a decay a channel": (2, False),
    "delta": (0, True),
    "gated delta, a decay a head": (1, True),
    "gated delta, a decay a channel": (2, True),
}
# What else makes another kernel: its rule and options, and whether it is the one that joins parts.
CALLS = {
    "linear, elu + 1, normalised": ("linear", {"normalize": True, "feature_map": "elu+1"}, False),
    "linear, both ways": ("linear", {"causal": False}, False),
    "gated, normalised, joining parts": ("gated, a decay a channel", {"normalize": True}, True),
}


def chosen(
    dtype: str,
    dim: int,
    v_dim: int,
    *,
    rule: str = "linear",
    capability: int = 80,
    multiprocessors: int = 1,
    length: int = 1000,
    heads: int = 1,
    normalize: bool = False,
    causal: bool = True,
    feature_map: str = "identity",
) -> LinearVariant:
    """The variant for a call of so many tokens of some heads."""
    channels, delta = RULES[rule]
    one = SimpleNamespace(
        dtype=dtype, head_dim=dim, v_head_dim=v_dim, normalize=normalize, causal=causal,
        feature_map=feature_map,
        decay=SimpleNamespace(shape=(length, 1 if channels == 1 else dim)) if channels else None,
        beta=1 if delta else None, k_len=length, q_len=length,
    )  # fmt: skip
    return choose(Device(capability, SHARED_MEMORY[capability], multiprocessors), one, heads, False)


def source_of(name: str, dtype: str, dim: int, capability: int) -> tuple[LinearVariant, str, bool]:
    """The variant that serves a rule or call on an architecture, its CUDA C++, and whether it joins parts."""
    rule, options, joins = CALLS.get(name, (name, {}, False))
    variant = chosen(dtype, dim, dim, rule=rule, capability=capability, **options)
    return variant, (join_source if joins else linear_source)(variant), joins
