"""torch's autocast, in functions that stand in for those that it casts the arguments of."""

from __future__ import annotations

import sys
from typing import Any

from anyattn import arrays

__all__ = ["autocast"]


def autocast(*given: Any) -> Any:
    """Float tensors, but those of float64, in the dtype of `torch.autocast` where it is on."""
    if not arrays.is_array(given[0]) or arrays.library(given[0]) != "torch":
        return given
    torch: Any = sys.modules["torch"]
    kind = given[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return given
    wanted = torch.get_autocast_dtype(kind)

    def cast(x: Any) -> Any:
        here = isinstance(x, torch.Tensor) and x.device.type == kind
        return x.to(wanted) if here and x.is_floating_point() and x.dtype != torch.float64 else x

    return tuple(map(cast, given))
