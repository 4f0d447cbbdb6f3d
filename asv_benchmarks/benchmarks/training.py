"""Time and memory of a training step: 6 layers, 384 wide, 12 heads, 4 causal sequences of 1024 tokens.

All scores of a layer would be 200 MB. The peer is torch's `scaled_dot_product_attention` and its backward.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyattn as aa

from . import common
from .memory import _memory as resident

LAYERS, WIDTH, HEADS, BATCH, TOKENS = 6, 384, 12, 4, 1024
# As dispatch chooses; on the tiles of the torch backend; on these without Numba's forward.
WHO = (common.PEER, "anyattn", "anyattn tiles", "anyattn tiles alone")


class Step:
    """Forward, backward, no optimiser."""

    params: Any = (WHO,)
    param_names = ("attention",)
    rounds = 1
    number = 1
    repeat = (3, 5, 10.0)
    warmup_time = 0
    timeout = 300

    def setup(self, attention: str) -> None:
        if find_spec("torch") is None:
            raise NotImplementedError("torch is not installed")
        self.step = _step(attention)
        self.step()

    def time_step(self, attention: str) -> None:
        self.step()

    def track_extra_memory(self, attention: str) -> int:
        if sys.platform != "linux":
            raise NotImplementedError("only Linux tells the peak of a call")
        if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            library.malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.step()
        return max(0, resident("VmHWM") - before)

    track_extra_memory.unit = "bytes"


def _step(who: str) -> Callable[[], float]:
    import torch
    from torch import nn

    attention, chosen = _attention(who)
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.before(x)).view(BATCH, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            x = x + self.out(attention(q, k, v).transpose(1, 2).reshape(x.shape))
            return x + self.mlp(self.between(x))

    model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def step() -> float:
        model.zero_grad()
        with chosen():
            model(x).square().mean().backward()
        return float(sum(p.grad.square().sum() for p in model.parameters()))

    return step


def _attention(who: str) -> tuple[Callable[..., Any], Callable[[], AbstractContextManager[Any]]]:
    """The attention of a model, and the context in which it runs."""
    import torch

    if who == common.PEER:
        peer = torch.nn.functional.scaled_dot_product_attention
        return lambda q, k, v: peer(q, k, v, is_causal=True), nullcontext
    from anyattn_torch import routes

    def chosen() -> ExitStack:
        stack = ExitStack()
        if who.startswith("anyattn tiles"):
            stack.enter_context(routes.only("tiles"))
        if who.endswith("alone"):
            stack.enter_context(aa.use(order=("torch",)))
        return stack

    return lambda q, k, v: aa.attention(q, k, v, causal=True), chosen
