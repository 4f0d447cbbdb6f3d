"""torch's FlexAttention, compiled, with the blocks that the compiler's schedule keeps.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024. Not
compiled it keeps all Lq x Lk scores, so `torch.compile` must work here. Its mask of blocks is made from runs
of tiles, never from an evaluation of all pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.expr.print_torch import torch_functions
from anyattn.expr.program import lower
from anyattn.expr.statements import aligned_slots, aligned_view
from anyattn_torch.axes import four_axes, one_batch_axis

if TYPE_CHECKING:
    from anyattn.expr.program import Program
    from anyattn.schedule import Schedule

__all__ = ["attend", "block_mask", "memory", "refusal"]

# Rows and keys of a block: FlexAttention's own default, and a multiple of every tile that its kernels choose.
_BLOCK = 128


def refusal(call: AttentionCall) -> str | None:
    """Why FlexAttention does not mean the same by a call, or is not to be had; None if it takes it."""
    if call.keep is not None:
        return "has no dropout"
    if call.kv_lengths is not None:
        return "reads keys beyond kv_lengths, where a NaN would reach the result"
    if call.sinks is not None:
        return "has no sinks"
    if call.visible is None and call.score is None:
        return "is for masks and score functions, and there is none"
    if call.dtype == "float64":
        return "computes in float32 at most"
    if 0 in (*call.batch_shape, call.num_heads, call.q_len, call.k_len, call.v_head_dim):
        return "has no kernel for empty arrays"
    if call.group_size & (call.group_size - 1):
        return f"wants a power of two of query heads to a key head, not {call.group_size}"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if one_batch_axis(x, call.batch_shape) is None:
            return f"takes one batch axis, and to join those of {name} would copy it"
    if call.traced:
        return "is compiled apart, which a trace cannot hold"
    return _other_device(call) or _missing()


def _other_device(call: AttentionCall) -> str | None:
    if call.device_kind == "cuda":
        if call.head_dim < 16 or call.v_head_dim < 16:
            return "wants 16 channels or more"
        # Sums over what an array broadcasts to have not been tried on a device.
        if any(arrays.needs_gradient(x) for x in call.others):
            return "is not left the gradients of captured arrays and of a bias"
        return None
    if call.device_kind != "cpu":
        return f"is not tried on {call.device_kind}"
    if "gradients" in call.features:
        return "has no backward on CPU"
    return "returns no lse on CPU" if call.return_lse else None


@cache
def _missing() -> str | None:
    """What this torch lacks."""
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        return "is not part of this torch"
    if "seq_lengths" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        return "takes lengths that its blocks do not divide in a later torch only"
    return None


def memory(call: AttentionCall) -> tuple[str, ...]:
    """What it keeps in memory."""
    blocks = -(-call.q_len // _BLOCK) * -(-call.k_len // _BLOCK)
    return (
        "forward and backward hold tiles of scores, not all Lq x Lk",
        f"FlexAttention's mask has {blocks} numbers, one a block of {_BLOCK} x {_BLOCK}, four times",
        "the first call of a kind is compiled by torch.compile, which takes seconds",
        "a NaN at a hidden key may reach the result; use(strict=True) takes own tiles",
    )


def attend(call: AttentionCall) -> tuple[Array, Array | None]:
    """(out, lse) of a call that has no `refusal`."""
    program = lower(call.visible, call.score)
    views = tuple(
        aligned_view(call.xp, x, slot.block, call.batch_shape, call.num_heads, call.q_len, call.k_len)
        for x, slot in zip(program.aligned, aligned_slots(program), strict=True)
    )
    offset = call.offset
    if arrays.is_array(offset):
        offset = offset.expand(call.batch_shape).reshape(-1)
    mask_mod, score_mod = torch_functions(program, call.accumulate, views, offset, call.device)
    blocks = None
    if mask_mod is not None:
        from anyattn.schedule import schedule

        blocks = block_mask(schedule(call, _BLOCK, _BLOCK), mask_mod, call.device)
    q, k, v = four_axes(call)
    options = _ask_for_lse() if call.return_lse else {}
    with arrays.exactly(call.q):
        found = _compiled(_kind(call, program, (q, k, v, *program.tables, *views, offset)))(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=blocks,
            scale=call.scale,
            enable_gqa=call.group_size > 1,
            **options,
        )
    out, lse = found if call.return_lse else (found, None)
    out = out.reshape(*call.batch_shape, *out.shape[1:])
    if lse is None:
        return out, None
    lse = getattr(lse, "lse", lse)
    return out, lse.reshape(*call.batch_shape, *lse.shape[1:])


@cache
def _ask_for_lse() -> dict[str, Any]:
    """The argument that makes FlexAttention return the lse: torch 2.9 changed its name."""
    from torch.nn.attention import flex_attention

    if "return_aux" in inspect.signature(flex_attention.flex_attention).parameters:
        return {"return_aux": flex_attention.AuxRequest(lse=True)}
    return {"return_lse": True}


def _kind(call: AttentionCall, program: Program, captured: tuple[Any, ...]) -> Hashable:
    """All that a compiled kernel is made for."""
    import torch

    tensors = [
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if arrays.is_array(x) else type(x)
        for x in captured
    ]
    return program.key, call.scale, call.return_lse, torch.is_grad_enabled(), *tensors


# Dynamo keeps what it compiles with the code object of a function, and from the ninth kind of call on it
# would run FlexAttention as it is, which keeps all scores: each kind has a code object of its own.
@lru_cache(maxsize=256)
def _compiled(kind: Hashable) -> Callable[..., Any]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    def attend_one_kind(*args: Any, **options: Any) -> Any:
        return flex_attention(*args, **options)

    attend_one_kind.__code__ = attend_one_kind.__code__.replace()
    compiled: Callable[..., Any] = torch.compile(attend_one_kind, dynamic=False, fullgraph=True)
    return compiled


def block_mask(plan: Schedule, mask_mod: Callable[..., Any], device: Any) -> Any:
    """The `BlockMask` of a schedule in square tiles.

    Tiles that the lengths cut are partial, as `create_block_mask` has them.
    """
    import numpy as np
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    (batch, heads), (rows, tiles) = plan.groups, plan.shape
    full, partial = (
        _filled(runs, rows * batch * heads, tiles) for runs in ([plan.full], [plan.partial, plan.gathered])
    )
    cut = np.zeros((rows, tiles), bool)
    cut[rows - (plan.q_len % plan.rows > 0) :, :] = True
    cut[:, tiles - (plan.k_len % plan.keys > 0) :] = True
    shape = (batch, heads, rows, tiles)
    full, partial = full.reshape(shape), partial.reshape(shape)
    partial = partial | (full & cut)
    full = full & ~cut

    def ordered(kept: Any) -> tuple[Any, Any]:
        """How many blocks of keys each block of rows has, and their numbers before those of all others."""
        numbers = np.argsort(~kept, axis=-1, kind="stable").astype(np.int32)
        counts = kept.sum(axis=-1, dtype=np.int32)
        return torch.from_numpy(counts).to(device), torch.from_numpy(numbers).to(device)

    return BlockMask.from_kv_blocks(
        *ordered(partial),
        *ordered(full),
        BLOCK_SIZE=(plan.rows, plan.keys),
        mask_mod=mask_mod,
        seq_lengths=(plan.q_len, plan.k_len),
    )


def _filled(kinds: list[Any], lines: int, tiles: int) -> Any:
    """Which tiles some runs cover, (lines, tiles)."""
    import numpy as np

    edges = np.zeros((lines, tiles + 1), np.int32)
    for runs in kinds:
        line = np.repeat(np.arange(lines), np.diff(runs.starts))
        np.add.at(edges, (line, runs.tiles[:, 0]), 1)
        np.add.at(edges, (line, runs.tiles[:, 1]), -1)
    return np.cumsum(edges, axis=1)[:, :tiles] > 0
