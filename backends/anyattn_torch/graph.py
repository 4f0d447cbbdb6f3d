"""Attention as an operation of a compiled graph: one call in it, whatever the options.

`anyattn.dynamo` calls `attention_in_graph` while Dynamo reads a compiled function, and torch's compiler calls
it again with fake tensors. What SDPA means the same by becomes SDPA in the graph; everything else one
operation, `anyattn::attend`, and one for its gradients. When the graph runs they get tensors with values and
do what the same call does outside of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd.forward_ad import unpack_dual

import anyattn
from anyattn import arrays, attention, settings, varlen_attention
from anyattn.arrays import FLOAT_DTYPES
from anyattn.call import AttentionCall, canonical
from anyattn.describe import Options, describe
from anyattn.varlen import packed_options
from anyattn_torch import recipes, routes, sdpa
from anyattn_torch.backward import gradients
from anyattn_torch.tensors import differentiable

__all__ = ["attention_in_graph", "call_in_graph"]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def attention_in_graph(tensors: list[Tensor], recipe: tuple[Any, ...]) -> Any:
    """`attention` or `varlen_attention` of the first three tensors, with options of a recipe over all."""
    text = recipes.as_text(recipe)
    options = recipes.read(text)
    forced = settings.forced_backend(options.get("backend"))
    # Inside a graph that is only recorded, not compiled, tensors have values.
    direct = not any(arrays.is_tracer(x) for x in tensors) or (forced and forced[0] != "torch")
    if direct:
        return _call(tensors, recipes.options_of(text, tensors))
    # The operation has no rules for these, and forward mode would give a wrong tangent without a word.
    if _functorch.get_interpreter_stack() or any(unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "attention: a compiled function has no transform of torch.func and no forward mode around it: "
            "transform a function that is not compiled, or ask for backend='reference'"
        )
    if any(isinstance(n, torch.SymInt) for x in tensors[:3] for n in x.shape):
        out = _on_open_sdpa(tensors, text)
        if out is not None:
            return out
    elif _is_for_sdpa(tensors, text):
        return _call(tensors, recipes.options_of(text, tensors))
    _check(tensors)
    # What scores compute from tensors is computed in the graph, through which gradients pass.
    out, lse = _attend(*recipes.with_derived(text, tensors))
    return (out, lse) if options.get("return_lse") else out


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def call_in_graph(function: str, given: int, tensors: list[Tensor], recipe: tuple[Any, ...]) -> Any:
    """A function of anyattn on the first `given` tensors; what it does becomes part of the graph."""
    options = recipes.options_of(recipes.as_text(recipe), tensors)
    found = getattr(anyattn, function)(*tensors[:given], **options)
    return tuple(found.values()) if isinstance(found, dict) else found


def _call(tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
    """What the same call gives outside of a graph."""
    function = varlen_attention if "cu_seqlens_q" in options else attention
    return function(*tensors[:3], **options)


# Options that SDPA may have something for; of `return_lse` that it is not wanted.
_SHARED = {"causal", "mask", "bias", "scale", "q_offset", "dropout", "dropout_seed", "layout"}
_SHARED |= {"return_lse", "backend"}


def _is_foreign(text: str) -> bool:
    """Whether an option of a recipe keeps SDPA from taking the call, or an order that torch does not head."""
    options = recipes.read(text)
    mask = options.get("mask")
    order = settings.current().order
    asked = settings.forced_backend(options.get("backend")) is not None
    return (
        not (asked or order is None or order[0] == "torch")
        or not options.keys() <= _SHARED
        or options.get("return_lse", False) is not False
        or not (mask is None or mask[0] == "tensor")
    )


def _on_open_sdpa(tensors: Sequence[Tensor], text: str) -> Tensor | None:
    """What SDPA gives where sizes are open, of which none is asked for; None if that is not sure.

    What is wrong is not sure: the operation says what.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)  # not in torch 2.6
    # Whether two sizes that are declared apart agree may not be asked there.
    if _is_foreign(text) or (exporting is not None and exporting()):
        return None
    options = recipes.options_of(text, tensors)
    names = ("causal", "mask", "bias", "scale", "dropout_seed")
    causal, mask, bias, scale, seed = (options.get(name) for name in names)
    array = bias if mask is None else mask
    plain = (
        isinstance(causal, (bool, NoneType))
        and (mask is None or mask.dtype == torch.bool)
        and (bias is None or (isinstance(bias, Tensor) and bias.dtype == tensors[0].dtype))
        and type(scale) in (int, float, NoneType)
        # A tensor is not asked whether it is 0: it has no value here.
        and type(options.get("q_offset", 0)) is int
        and type(options.get("dropout", 0)) in (int, float)
        and (seed is None or (isinstance(seed, Tensor) and seed.ndim == 0 and arrays.kind(seed) == "int"))
        and options.get("layout", "bhld") in ("bhld", "blhd")
    )
    if not plain or options.get("q_offset") or options.get("dropout"):
        return None
    if [bool(causal), mask is not None, bias is not None].count(True) > 1:
        return None
    if routes.breaks_promise(arrays.device_kind(tensors[0]), bool(causal or mask is not None)):
        return None
    lead = [x.ndim for x in tensors[:3]]
    if lead not in ([3] * 3, [4] * 3) or not routes.allows("sdpa"):
        return None
    if array is not None and array.ndim not in (2, lead[0]):
        return None
    swapped = options.get("layout") == "blhd"
    q, k, v = (x.reshape(1, *x.shape) if x.ndim == 3 else x for x in tensors[:3])
    q, k, v = (x.transpose(1, 2) if swapped else x for x in (q, k, v))
    out = sdpa.attend_open(q, k, v, causal=bool(causal), array=array, scale=scale)
    if out is None:
        return None
    out = out.transpose(1, 2) if swapped else out
    return out[0] if lead[0] == 3 else out


def _is_for_sdpa(tensors: Sequence[Tensor], text: str) -> bool:
    """Whether SDPA takes a call of known sizes."""
    if _is_foreign(text):
        return False
    options = recipes.options_of(text, tensors)
    options.pop("backend", None)
    q, k, v = tensors[:3]
    return routes.choose(describe("attention", q, k, v, Options(**options))).name == "sdpa"


def _check(tensors: Sequence[Tensor]) -> None:
    """What must hold so that results have a shape; all else is found when the graph runs."""
    q, k, v = tensors[:3]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if arrays.dtype_name(x) not in FLOAT_DTYPES:
            raise TypeError(f"{name}: wanted dtype {', '.join(FLOAT_DTYPES)}, got {x.dtype}")
        if x.ndim < 2 or (x.ndim == 2) != (q.ndim == 2):
            raise ValueError(f"{name}: wanted axes (..., heads, length, dim), got shape {tuple(x.shape)}")


@torch.library.custom_op("anyattn::attend", mutates_args=())  # type: ignore[untyped-decorator]
def _attend(tensors: list[Tensor], recipe: str) -> tuple[Tensor, Tensor]:
    # A route that compiles has no place in a graph that is compiled.
    with torch.no_grad(), routes.only("tiles"):
        options = recipes.options_of(recipe, tensors)
        out, lse = _call(tensors, {**options, "return_lse": True})
        return out.contiguous(), lse.contiguous()


@_attend.register_fake  # type: ignore[untyped-decorator]
def _(tensors: list[Tensor], recipe: str) -> tuple[Tensor, Tensor]:
    q, k, v = tensors[:3]
    options = recipes.read(recipe)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.ndim == 2:
        return q.new_empty(q.shape[0], v.shape[1]), q.new_empty(q.shape[0], dtype=accumulate)
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    out = q.new_empty(*batch, *q.shape[-3:-1], v.shape[-1])
    swapped = options.get("layout") == "blhd" or "cu_seqlens_q" in options
    rows = (q.shape[-2], q.shape[-3]) if swapped else (q.shape[-3], q.shape[-2])
    return out, q.new_empty(*batch, *rows, dtype=accumulate)


@torch.library.custom_op("anyattn::attend_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _attend_backward(
    tensors: list[Tensor],
    recipe: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    options = recipes.options_of(recipe, tensors)
    options.pop("backend", None)
    q, k, v = tensors[:3]
    if "cu_seqlens_q" in options:
        options = _unpacked(tensors, options)
    call = describe("attention", q, k, v, Options(**{**options, "return_lse": True}))
    inputs = differentiable(call)
    places = _places(call, inputs, tensors, recipe)
    rows = (lse, grad_lse) if call.has_heads else (lse[None], None if grad_lse is None else grad_lse[None])
    found = gradients(
        call,
        canonical(out, call.layout),
        rows[0],
        canonical(grad_out, call.layout),
        rows[1],
        [n >= 0 and needed[n] for n in places],
    )
    sums: dict[int, Tensor] = {}
    for n, grad in zip(places, found, strict=True):
        if grad is not None:
            grad = _as_given(call, n, grad)
            sums[n] = sums[n] + grad if n in sums else grad
    return [
        sums[n].to(x.dtype).contiguous() if n in sums else x.new_zeros(x.shape)
        for n, (x, yes) in enumerate(zip(tensors, needed, strict=True))
        if yes
    ]


@_attend_backward.register_fake  # type: ignore[untyped-decorator]
def _(
    tensors: list[Tensor],
    recipe: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, yes in zip(tensors, needed, strict=True) if yes]


def _unpacked(tensors: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Options of `attention` in the place of those of `varlen_attention`, which were checked before."""
    shared = {name: value for name, value in options.items() if name in _OF_ALL}
    q, k, v = tensors[:3]
    own = packed_options(
        q,
        k,
        v,
        options["cu_seqlens_q"],
        options["cu_seqlens_k"],
        causal=options.get("causal", False),
        window=options.get("window"),
        mask=options.get("mask"),
        score_mod=options.get("score_mod"),
        dropout=options.get("dropout", 0.0),
    )
    return shared | own


# What packed sequences do not change.
_OF_ALL = ("softcap", "sinks", "scale", "dropout_seed")


def _places(
    call: AttentionCall, inputs: Sequence[Tensor], tensors: Sequence[Tensor], recipe: str
) -> list[int]:
    """Which of the operation's tensors each of `differentiable(call)` is; -1 for what came as numbers."""
    places = [0, 1, 2]
    if call.sinks is not None:
        given = recipes.read(recipe)["sinks"]
        places.append(given[1] if given[0] == "tensor" else -1)
    captured = range(3, len(tensors))
    places += [next((n for n in captured if tensors[n] is x), -1) for x in inputs[len(places) :]]
    return places


def _as_given(call: AttentionCall, place: int, grad: Tensor) -> Tensor:
    """The gradient of q, k or v in the layout of the caller."""
    if place > 2:
        return grad
    if not call.has_heads:
        return grad[0]
    return grad.transpose(-2, -3) if call.layout == "blhd" else grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.recipe = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.needed = [x.requires_grad for x in tensors]


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    *tensors, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = iter(_attend_backward(tensors, ctx.recipe, out, lse, grad_out, grad_lse, ctx.needed))
    return [next(found) if yes else None for yes in ctx.needed], None


_attend.register_autograd(_differentiate, setup_context=_keep)
