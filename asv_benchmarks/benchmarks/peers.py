"""What anyattn is measured beside, on the same numbers: torch's SDPA and FlexAttention, and onnxruntime.

SDPA and onnxruntime take no mask expression, so they get the same mask as a boolean array, made before the
clock starts. FlexAttention is compiled, with the function and the blocks that anyattn's backend `torch` makes
of the mask, as somebody would write them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

import anyattn as aa

__all__ = ["FLEX", "NEEDS", "ORT", "SDPA", "flex", "onnxruntime", "sdpa"]

SDPA = "torch SDPA (peer)"
FLEX = "torch FlexAttention (peer)"
ORT = "onnxruntime (peer)"
# What must be installed.
NEEDS = {SDPA: ("torch",), FLEX: ("torch",), ORT: ("onnxruntime", "onnx")}


def sdpa(q: Any, k: Any, v: Any, dtype: str, *, causal: bool = False, **options: Any) -> Callable[[], Any]:
    """Torch's `scaled_dot_product_attention`."""
    import torch

    mask = _dense(q, k, causal, options)
    q, k, v, grouped = *_tensors(dtype, q, k, v), q.shape[1] != k.shape[1]
    seen = None if mask is None else torch.from_numpy(mask)

    def function() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=causal and seen is None, enable_gqa=grouped
            )

    return function


def flex(q: Any, k: Any, v: Any, dtype: str, **options: Any) -> Callable[[], Any]:
    """Torch's FlexAttention, compiled for a mask."""
    from anyattn.describe import Options, describe
    from anyattn_torch import routes

    if "kv_lengths" in options:
        options["mask"] = aa.masks.padding(options.pop("kv_lengths"))
    q, k, v = _tensors(dtype, q, k, v)
    with routes.only("flex"):
        route = routes.choose(describe("attention", q, k, v, Options(**options)))
    if route.name != "flex":
        raise NotImplementedError("; ".join(f"{name} {reason}" for name, reason in route.passed))

    def function() -> Any:
        with routes.only("flex"):
            return aa.attention(q, k, v, backend="torch", **options)

    return function


def onnxruntime(
    q: Any, k: Any, v: Any, dtype: str, *, causal: bool = False, **options: Any
) -> Callable[[], Any]:
    """The operator Attention of opset 23."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if dtype != "float32":
        raise NotImplementedError(f"onnxruntime has no Attention of {dtype} on CPU")
    feed = {"q": q, "k": k, "v": v}
    mask = _dense(q, k, causal, options)
    if mask is not None:
        feed["mask"] = np.ascontiguousarray(mask)

    def info(name: str, kind: int, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    kinds = {name: TensorProto.BOOL if name == "mask" else TensorProto.FLOAT for name in feed}
    node = helper.make_node("Attention", list(feed), ["out"], is_causal=int(causal and mask is None))
    graph = helper.make_graph(
        [node],
        "attention",
        [info(name, kinds[name], x.shape) for name, x in feed.items()],
        [info("out", TensorProto.FLOAT, (*q.shape[:-1], v.shape[-1]))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)[0]


def require(who: str) -> None:
    """Raise `NotImplementedError` if a peer is not installed."""
    missing = [name for name in NEEDS[who] if find_spec(name) is None]
    if missing:
        raise NotImplementedError(f"{', '.join(missing)} is not installed")


def _tensors(dtype: str, *arrays: Any) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays)


def _dense(q: Any, k: Any, causal: bool, options: dict[str, Any]) -> Any:
    """The mask of a call as a boolean array; None where `causal` alone says it."""
    if options:
        return visible(q.shape[2], k.shape[2], q.shape[0], causal=causal, **options)
    if causal and q.shape[2] != k.shape[2]:
        raise NotImplementedError("this peer aligns causal masks at the other end")
    return None


def visible(q_len: int, k_len: int, batch: int = 1, **options: Any) -> np.ndarray[Any, Any]:
    """Which keys each query sees, (batch, 1, q_len, k_len), for masks that are the same for all heads."""
    q, k = np.zeros((batch, 1, q_len, 1), np.float32), np.zeros((batch, 1, k_len, 1), np.float32)
    return aa.attention_weights(q, k, backend="reference", **options) > 0
