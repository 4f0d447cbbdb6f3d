"""Seeds of dropout for functions that have none: from the generator that their users seed."""

from __future__ import annotations

import sys
from typing import Any

from anyattn import arrays
from anyattn.arrays import Array

__all__ = ["drawn_seed"]


def drawn_seed(dropout: float, like: Array, argument: str) -> Any:
    """A seed beside an array, or None where nothing is dropped.

    torch's comes from the generator of the array's device, so that torch.manual_seed repeats it, and stays
    there; NumPy's from numpy.random.seed's, CuPy's from cupy.random.seed's.

    Raises
    ------
    TypeError
        For libraries without a generator of their own; the message names `argument`.
    """
    if not dropout:
        return None
    library = arrays.library(like)
    if library == "torch":
        torch = sys.modules["torch"]
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=like.device)
    if library in ("numpy", "cupy"):
        return int(sys.modules[library].random.randint(0, 2**63 - 1, dtype="int64"))
    raise TypeError(
        f"{argument}: arrays of {library} have no generator to draw a seed from; wanted 0, or "
        f"anyattn.attention(dropout=, dropout_seed=)"
    )
