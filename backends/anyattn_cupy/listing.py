"""What `anyattn.compile` shows of a call: the CUDA C++ that is compiled for it, and the key of the kernel."""

from __future__ import annotations

from typing import Any

from anyattn.call import AttentionCall
from anyattn.kernels.key import KernelKey, code_digest, common_versions
from anyattn_cupy import inspect_launch, launch
from anyattn_cupy.devices import current_device
from anyattn_cupy.filling import tensors_of
from anyattn_cupy.source import OPTIONS

__all__ = ["key_of", "source_of"]


def _choice(call: AttentionCall, cupy: Any) -> launch.Choice:
    choose = launch.chosen if call.operation == "attention" else inspect_launch.chosen
    return choose(call, tensors_of(call, cupy), cupy)


def source_of(call: AttentionCall, cupy: Any) -> str:
    """CUDA C++ of the kernel that serves a call on the current device."""
    return _choice(call, cupy).source


def key_of(call: AttentionCall, cupy: Any) -> KernelKey:
    """The complete key of that kernel."""
    choice = _choice(call, cupy)
    variant = choice.variant
    flags = {
        "packed": variant.packed,
        "wide": variant.wide,
        "scaled": variant.scaled,
        "vectors": variant.vector_loads,
    }
    nvrtc = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return KernelKey(
        backend="cupy",
        kernel=variant.kernel,
        structure=choice.program.text,
        dtype=variant.dtype,
        accumulate=variant.accumulate,
        head_dim=variant.head_dim,
        v_head_dim=variant.v_head_dim,
        target=f"sm_{current_device(cupy).capability}",
        tiles={"rows": variant.rows, "keys": variant.keys, "stages": variant.stages},
        features=[name for name, used in flags.items() if used],
        settings={"options": " ".join(OPTIONS), "integers": choice.index, "axes": str(variant.batch_axes)},
        versions={**common_versions(), "cupy": cupy.__version__, "nvrtc": nvrtc},
        code=code_digest(choice.source),
    )
