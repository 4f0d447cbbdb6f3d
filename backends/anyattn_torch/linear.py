"""Gradients of linear attention a chunk at a time: between chunks nothing is kept but the arguments.

Differentiated by torch itself, the reference keeps each chunk's weights, its features and its state, and each
chunk's slice gives a gradient as long as the sequence. Here the way back makes the states at the borders of
chunks again (as many numbers as v has, for heads of 64), then each chunk from the last to the first, with the
gradient of the state that it leaves. Of a chunk, torch differentiates what `anyattn.reference` does with it;
where somebody asks for derivatives of second order, those of all chunks are recorded and kept.

The forward is Numba's where that is installed and takes the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from anyattn import arrays, registry, settings
from anyattn.linear.call import LinearCall
from anyattn.reference.linear import CHUNK, initial, linear, tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attend", "notes"]

# The axis of tokens in the tensors of a call that have one.
_TOKENS = {"q": -2, "k": -2, "v": -2, "decay": -2, "beta": -1}
_STATES = ("state", "normalizer")


def attend(call: LinearCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, state, normalizer) of a call, differentiable by all its float tensors."""
    with arrays.exactly(call.q):
        if _whole(call) is not None:
            return linear(call)
        names = tuple(name for name in (*_TOKENS, *_STATES) if getattr(call, name) is not None)
        nothing: dict[str, Any] = dict.fromkeys(names)
        bare = replace(call, **nothing)
        found = _Linear.apply(bare, names, *(getattr(call, name) for name in names))
        return found if call.normalize else (*found, None)


def notes(call: LinearCall) -> tuple[str, ...]:
    """What the caller should know of how a call runs."""
    reason = _whole(call)
    if reason is not None:
        return (f"runs as one piece: it {reason}",) if "gradients" in call.features else ()
    found = ["gradients keep no chunk: each is computed again", "derivatives of second order keep all chunks"]
    return (*found, "Numba computes the forward") if _numba(call) is not None else tuple(found)


def _whole(call: LinearCall) -> str | None:
    """Why torch is to see a call as one piece."""
    if "gradients" not in call.features:
        return "has no gradients"
    if call.traced:
        return "is recorded by a compiler or transformed"
    if not call.causal:
        return "has no chunks without order"
    if call.cu_seqlens is not None and call.cu_seqlens_host is None:
        return "has bounds that the host cannot read"
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in _tensors(call)):
        return "has tangents of forward mode"
    return None


def _tensors(call: LinearCall) -> list[Tensor]:
    return [x for x in (getattr(call, name) for name in (*_TOKENS, *_STATES)) if x is not None]


def _numba(call: LinearCall) -> Any:
    """Numba's backend, if it computes the forward of a call."""
    order = settings.current().order
    if "numba" not in registry.names() or (order is not None and "numba" not in order):
        return None
    status = registry.find("numba")
    return None if not status.available or status.backend.unsupported(_plain(call)) else status.backend


def _plain(call: LinearCall) -> LinearCall:
    return replace(call, features=call.features - {"gradients"})


def _chunks(call: LinearCall) -> list[tuple[int, int, int]]:
    """(sequence, first token, tokens) of each chunk; an empty sequence has an empty one."""
    bounds = [0, call.k_len] if call.cu_seqlens_host is None else call.cu_seqlens_host.tolist()
    return [
        (n, at, min(CHUNK, end - at))
        for n, (first, end) in enumerate(pairwise(bounds))
        for at in range(first, max(end, first + 1), CHUNK)
    ]


def _part(call: LinearCall, first: int, size: int) -> dict[str, Tensor]:
    """The tensors of a chunk."""
    found = {name: getattr(call, name) for name in _TOKENS}
    return {name: x.narrow(_TOKENS[name], first, size) for name, x in found.items() if x is not None}


class _Linear(torch.autograd.Function):  # type: ignore[misc]
    """A call as an operation of autograd on its tensors."""

    @staticmethod
    def forward(bare: LinearCall, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        call = replace(bare, **dict(zip(names, tensors, strict=True)))
        numba = _numba(call)
        found = linear(call) if numba is None else numba.run(_plain(call))
        # A state without tokens is the one that was given, which an operation may not return.
        return tuple(x.clone() if any(x is y for y in tensors) else x for x in found if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.bare, ctx.names, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = [name for name, yes in zip(ctx.names, ctx.needs_input_grad[2:], strict=True) if yes]
        call = replace(ctx.bare, **dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        with arrays.exactly(call.q):
            found = _gradients(call, needed, grads)
        return (None, None, *(found.get(name) for name in ctx.names))


def _gradients(
    call: LinearCall, needed: Sequence[str], grads: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Gradients by the tensors that are `needed`, of the gradients of (out, state, normalizer)."""
    starts = [name for name in _STATES if name in needed]
    begin, begin_backward = initial(call), None
    if starts:
        begin, begin_backward = torch.func.vjp(
            lambda *given: initial(replace(call, **dict(zip(starts, given, strict=True)))),
            *(getattr(call, name) for name in starts),
        )
    packed = call.cu_seqlens is not None
    chunks = _chunks(call)
    states = _borders(call, begin, chunks)
    dout = None if grads[0] is None else grads[0].to(begin.dtype)
    last = _joined(call, begin, grads)
    own = [name for name in _TOKENS if name in needed]
    pieces: dict[str, list[Tensor]] = {name: [] for name in own}
    firsts: list[Tensor] = []
    sequence = -1
    for (n, first, size), state in zip(reversed(chunks), reversed(states), strict=True):
        if n != sequence:
            sequence = n
            firsts.append(last[n] if packed else last)
        rest = _part(call, first, size)
        moving = [rest.pop(name) for name in own]

        def run(state: Tensor, *given: Tensor, rest: Any = rest, size: int = size) -> tuple[Tensor, Tensor]:
            return tokens(replace(call, **rest, **dict(zip(own, given, strict=True))), state, 0, size)

        (rows, _), back = torch.func.vjp(run, state, *moving)
        drows = torch.zeros_like(rows) if dout is None else dout.narrow(-2, first, size)
        firsts[-1], *found = back((drows, firsts[-1]))
        for name, piece in zip(own, found, strict=True):
            pieces[name].append(piece)
    gradients = {name: torch.cat(list(reversed(pieces[name])), _TOKENS[name]) for name in own}
    if begin_backward is None:
        return gradients
    whole = torch.stack(list(reversed(firsts))) if packed else firsts[0]
    return gradients | dict(zip(starts, begin_backward(whole), strict=True))


def _borders(call: LinearCall, begin: Tensor, chunks: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The state before each chunk. Nobody asks for rows: there are no query heads."""
    states: list[Tensor] = []
    for at, (n, first, size) in enumerate(chunks):
        if at == 0 or n != chunks[at - 1][0]:
            states.append(begin[n] if call.cu_seqlens is not None else begin)
        if at + 1 < len(chunks) and chunks[at + 1][0] == n:
            part = _part(call, first, size)
            part["q"] = part["q"][..., :0, :, :]
            states.append(tokens(replace(call, **part), states[-1], 0, size)[1])
    return states


def _joined(call: LinearCall, begin: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient of the last states, with the normalizer as one more column."""
    state = torch.zeros_like(begin[..., : call.v_head_dim]) if grads[1] is None else grads[1]
    if not call.normalize:
        return state
    column = torch.zeros_like(begin[..., -1]) if grads[2] is None else grads[2]
    return torch.cat([state, column[..., None]], -1)
