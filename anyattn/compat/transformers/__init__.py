"""Attention of Hugging Face transformers: `register()` makes `attn_implementation="anyattn"` work.

transformers lets others register two functions under a name: one computes attention, one says which keys are
seen. The second (`seen`) gives what the first (`forward`) can hand to `anyattn.attention` as options, so that
no (L, L) mask is made and sliding windows, padding and packed sequences reach the compiler as they are meant.

Importing this imports neither torch nor transformers; `register` does.
"""

from __future__ import annotations

import re

__all__ = ["NAME", "VERSIONS", "register"]

NAME = "anyattn"
# From 5.4 on masks are asked for by q_length and q_offset, before by a tensor of cache positions.
VERSIONS = ((5, 4), (6, 0))


def register() -> None:
    """Make ``attn_implementation="anyattn"`` work in Hugging Face transformers, in this process.

    Models are then made by ``from_pretrained(..., attn_implementation="anyattn")`` or switched by
    ``model.set_attn_implementation("anyattn")``. Calling it again changes nothing.

    Raises
    ------
    ImportError
        If transformers is not installed, or its version is not one of 5.4 up to, not including, 6.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "anyattn.compat.transformers.register: wanted Hugging Face transformers; pip install transformers"
        ) from error
    _check_version(transformers.__version__)
    from transformers import AttentionInterface, AttentionMaskInterface

    from anyattn.compat.transformers.forward import attention_forward
    from anyattn.compat.transformers.seen import seen_keys

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, seen_keys)


def _check_version(version: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", version)
    first, beyond = VERSIONS
    if found is None or not first <= (int(found[1]), int(found[2])) < beyond:
        raise ImportError(
            f"anyattn.compat.transformers.register: wanted transformers >= {first[0]}.{first[1]} and "
            f"< {beyond[0]}, got {version}"
        )
