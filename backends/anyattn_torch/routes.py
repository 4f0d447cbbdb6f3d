"""Which way a call goes on torch, and why: the one place where that is said.

A route is a module with `refusal(call)`, what keeps it from meaning the same, and `attend(call)`. Here they
are put in order, and left out where they would break a promise that the caller asked for. `explain` shows
what this page finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from anyattn import settings
from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn_torch.tensors import has_tangents

__all__ = [
    "ROUTES",
    "Route",
    "allows",
    "breaks_promise",
    "choose",
    "drops_on_numba",
    "forward",
    "notes",
    "only",
    "run",
    "transformed",
    "unordered",
]

ROUTES = ("sdpa", "flex", "tiles")
_NAMES = {"sdpa": "SDPA", "flex": "FlexAttention", "tiles": "own tiles"}

# Scores of a head from which on a kernel of FlexAttention's own is worth compiling.
_LARGE = 1 << 18

_allowed: ContextVar[tuple[str, ...] | None] = ContextVar("anyattn_torch_routes", default=None)


@dataclass(frozen=True)
class Route:
    """The way of a call, and what keeps those before it in the order from taking it."""

    name: str
    passed: tuple[tuple[str, str], ...]


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Leave out all routes but these, and the tiles, for tests and measurements."""
    unknown = sorted(set(names) - set(ROUTES))
    if unknown:
        raise ValueError(f"only: no route {unknown[0]!r}; there are {', '.join(ROUTES)}")
    token = _allowed.set((*names, "tiles"))
    try:
        yield
    finally:
        _allowed.reset(token)


def choose(call: AttentionCall) -> Route:
    """The first route in the order that nothing keeps from taking a call; the tiles take every call."""
    passed: list[tuple[str, str]] = []
    for name in _order(call):
        reason = _left_out(name, call) or _module(name).refusal(call)
        if reason is None:
            return Route(name, tuple(passed))
        passed.append((name, reason))
    return Route("tiles", tuple(passed))


def run(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call."""
    pair: tuple[Array, Array | None] = _module(choose(call).name).attend(call)
    return pair


def notes(call: AttentionCall) -> tuple[str, ...]:
    """The route of a call, what it keeps in memory, and why the others do not take it."""
    route = choose(call)
    found = [f"runs on {_NAMES[route.name]}"]
    if route.name == "tiles" and "gradients" in call.features and has_tangents(call):
        found.append("forward mode goes through the operations of reference, tile by tile")
    elif route.name == "tiles" and "gradients" in call.features:
        from anyattn_torch import joined

        reason = _not_on_numba(call) or joined.refusal(call)
        found.append("Numba computes the forward" if reason is None else f"forward not on Numba: it {reason}")
    if route.name == "tiles" and call.keep is not None:
        reason = _not_drawn_by_numba(call)
        found.append("Numba draws dropout" if reason is None else f"dropout not drawn by Numba: it {reason}")
    found += _memory(route.name, call)
    found += [f"not on {_NAMES[name]}: it {reason}" for name, reason in route.passed]
    return tuple(found)


def unordered(call: AttentionCall) -> str | None:
    """Why the same backward of a call twice may give other bits."""
    if call.device_kind == "cpu" or choose(call).name == "tiles":
        return None
    return f"sums gradients in any order on {call.device_kind} until torch.use_deterministic_algorithms(True)"


def forward(call: AttentionCall, described: AttentionCall) -> tuple[Array, Array]:
    """(out, lse) of a call on the route "tiles", which was `described` before autograd took it apart."""
    from anyattn_torch import joined, tiles

    on_numba = _not_on_numba(described) is None and joined.refusal(call) is None
    pair: tuple[Array, Array] = joined.forward(call) if on_numba else tiles.forward(call)
    return pair


def drops_on_numba(call: AttentionCall) -> bool:
    """Whether Numba tells the tiles of a call which weights dropout keeps."""
    return call.keep is not None and _not_drawn_by_numba(call) is None


def _not_drawn_by_numba(call: AttentionCall) -> str | None:
    """Why tiles draw from Philox by torch's operations, which take 45 ns a weight, where Numba takes 2."""
    from anyattn_torch import joined

    if not call.readable:
        return "takes tensors with values on CPU"
    return _not_in_order() or joined.missing()


def _not_on_numba(call: AttentionCall) -> str | None:
    """Why the forward of tiles is not left to Numba although it could compute it.

    Measured on one core of a Xeon (milliseconds of processor time; forward of Numba, of tiles, then the
    backward of tiles): causal, 6 heads, 1024 x 64: 7.9, 25, 45; with softcap 12.9, 65, 143; window of 256 in
    4096 keys: 17, 117, 165; 16 x 32: 0.4, 0.4, 0.6. SDPA takes 11 + 28 for the first.
    """
    if "gradients" not in call.features:
        return "gets calls without gradients by its own name"
    return _not_in_order()


def _not_in_order() -> str | None:
    order = settings.current().order
    if order is not None and "numba" not in order:
        return "is not in the order that use(order=) gives"
    return None


def _memory(name: str, call: AttentionCall) -> tuple[str, ...]:
    """What a route keeps in memory."""
    if name != "tiles":
        found: tuple[str, ...] = _module(name).memory(call)
        return found
    if "gradients" not in call.features:
        return ("holds tiles of scores, not all Lq x Lk",)
    if has_tangents(call):
        return ("forward mode holds tiles of scores; with reverse mode through it all Lq x Lk are kept",)
    return (
        "forward and backward hold tiles of scores, not all Lq x Lk",
        "derivatives of second order keep all Lq x Lk scores",
    )


def _order(call: AttentionCall) -> tuple[str, ...]:
    return tuple(name for name in ROUTES if name != "tiles" and allows(name))


def _left_out(name: str, call: AttentionCall) -> str | None:
    """Why a route is not taken although it means the same."""
    if call.k_scales is not None:
        return "takes no int8 keys"
    reason = breaks_promise(call.device_kind, call.visible is not None)
    if reason is not None:
        return reason
    if name == "flex" and _allowed.get() is None:
        reason = _not_worth_compiling(call)
        if reason is not None:
            return reason
    if transformed(call):
        return "has no rule for functorch's transforms of every order"
    if "gradients" in call.features and has_tangents(call):
        return "has no forward mode"
    return None


def breaks_promise(device_kind: str, hides: bool) -> str | None:
    """What a kernel of torch's own, for a call that hides keys or not, would break that was asked for."""
    import torch

    if settings.current().strict and hides:
        return "lets a NaN at a hidden key through, and use(strict=True) asks for strict masking"
    if device_kind != "cpu" and torch.are_deterministic_algorithms_enabled():
        return "sums gradients in any order there, and torch.use_deterministic_algorithms(True) is on"
    return None


def allows(name: str) -> bool:
    """Whether `only` leaves a route in."""
    allowed = _allowed.get()
    return allowed is None or name in allowed


def _not_worth_compiling(call: AttentionCall) -> str | None:
    """Why FlexAttention does not pay.

    On CPU it takes 2.7 to 29 times what Numba takes (two cores of a Xeon, eight kinds of calls), has no
    gradients, and compiles for some 20 s; on a CUDA device a small call does not make up for that.
    """
    if call.device_kind == "cpu":
        return "is slower on CPU than Numba's kernels, and compiles for seconds"
    if call.q_len * call.k_len < _LARGE:
        return f"compiles for seconds, and {call.q_len} x {call.k_len} scores are few"
    import torch

    if not torch.utils._triton.has_triton():
        return "needs Triton, which is not installed"
    return None


def transformed(call: AttentionCall) -> bool:
    """Whether a tensor is inside torch.func.vmap, grad, jvp or the like."""
    import torch

    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(wrapped(x) for x in (call.q, call.k, call.v, *call.others) if x is not None)


def _module(name: str) -> Any:
    from importlib import import_module

    return import_module(f"anyattn_torch.{name}")
