"""Time and memory of a training step: 6 layers, 384 wide, 6 heads, one sequence of 1024 tokens.

All scores of a layer would be 25 MB. The peer is what torch has itself: its `scaled_dot_product_attention`,
with a mask or bias as an array where there is one, and products of matrices for the soft cap. The table of
`docs/torch.md` is measured with `step`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyattn as aa

from . import common
from .memory import _memory as resident

LAYERS, WIDTH, HEADS, TOKENS = 6, 384, 6, 1024
WINDOW, SOFTCAP = 128, 30.0
# What `anyattn.attention` is asked for.
ATTENTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (WINDOW - 1, 0)},
    "alibi": lambda: {"causal": True, "score_mod": aa.scores.alibi(_slopes())},
    "softcap": lambda: {"causal": True, "softcap": SOFTCAP},
}
# As dispatch chooses; on the tiles of the torch backend; on these without Numba's forward.
WHO = (common.PEER, "anyattn", "anyattn tiles", "anyattn tiles alone")


class Step:
    """Forward, backward, no optimiser."""

    params: Any = (WHO, tuple(ATTENTIONS))
    param_names = ("who", "attention")
    rounds = 1
    number = 1
    repeat = (3, 5, 10.0)
    warmup_time = 0
    timeout = 300

    def setup(self, who: str, attention: str) -> None:
        if find_spec("torch") is None:
            raise NotImplementedError("torch is not installed")
        self.step = step(who, attention)
        self.step()

    def time_step(self, who: str, attention: str) -> None:
        self.step()

    def track_extra_memory(self, who: str, attention: str) -> int:
        return extra_memory(self.step)

    track_extra_memory.unit = "bytes"


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes that the process holds at its peak during a call, beyond what it held before."""
    if sys.platform != "linux":
        raise NotImplementedError("only Linux tells the peak of a call")
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return max(0, resident("VmHWM") - before)


def step(who: str, attention: str, tokens: int | None = None) -> Callable[[], float]:
    """A step of a model whose attention is computed by `who`: it gives the squared norm of the gradients."""
    import torch
    from torch import nn

    tokens = TOKENS if tokens is None else tokens
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.before(x)).view(1, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))
            return x + self.mlp(self.between(x))

    model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    x = torch.randn(1, tokens, WIDTH)
    if who == common.PEER:
        attend, chosen = _own(attention, tokens), nullcontext
    else:
        attend, chosen = partial(aa.attention, **ATTENTIONS[attention]()), partial(_chosen, who)

    def run() -> float:
        model.zero_grad()
        with chosen():
            model(x).square().mean().backward()
        return float(sum(p.grad.square().sum() for p in model.parameters()))

    return run


def _slopes() -> list[float]:
    """Slopes of ALiBi."""
    return [2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)]


def _own(attention: str, tokens: int) -> Callable[..., Any]:
    """Attention as torch itself has it."""
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    if attention == "causal":
        return partial(sdpa, is_causal=True)
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    if attention == "window":
        return partial(sdpa, attn_mask=(ahead <= 0) & (ahead > -WINDOW))
    if attention == "alibi":
        bias = torch.tensor(_slopes())[:, None, None] * ahead.where(ahead <= 0, -torch.inf)
        return partial(sdpa, attn_mask=bias[None])
    hidden = ahead > 0

    def capped(q: Any, k: Any, v: Any) -> Any:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = (SOFTCAP * torch.tanh(scores / SOFTCAP)).masked_fill(hidden, -torch.inf)
        return torch.softmax(scores, -1) @ v

    return capped


@contextmanager
def _chosen(who: str) -> Iterator[None]:
    """What `who` says of the ways of anyattn."""
    from anyattn_torch import routes

    with ExitStack() as stack:
        if who.startswith("anyattn tiles"):
            stack.enter_context(routes.only("tiles"))
        if who.endswith("alone"):
            stack.enter_context(aa.use(order=("torch",)))
        yield
