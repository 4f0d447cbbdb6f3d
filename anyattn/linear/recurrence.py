"""The definition of linear attention, one token at a time; copy it where you need it.

With no decay and no beta it is the linear rule (Katharopoulos et al., 2020), with decay the gated one (Yang
et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023), with beta the delta
rule (Schlag et al., 2021), with both the gated delta rule (Yang et al., "Gated Delta Networks", 2024).
"""

from __future__ import annotations

from anyattn.arrays import Array, Namespace

__all__ = ["recurrence"]


def recurrence(
    xp: Namespace,
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    decay: Array | None = None,
    beta: Array | None = None,
) -> tuple[Array, Array]:
    """Rows and final state of q (..., L, G, F), k (..., L, F), v (..., L, Dv) from a state (..., F, Dv).

    G queries share a state; decay, in log space, is (..., L, F) or (..., L, 1), beta (..., L). Rows are
    (..., L, G, Dv), neither scaled nor normalised.
    """
    rows = []
    for t in range(k.shape[-2]):
        if decay is not None:
            state = xp.exp(decay[..., t, :])[..., None] * state
        written = v[..., t, :]
        if beta is not None:
            recalled = (k[..., t, :][..., None, :] @ state)[..., 0, :]
            written = beta[..., t][..., None] * (written - recalled)
        state = state + k[..., t, :][..., :, None] * written[..., None, :]
        rows.append(q[..., t, :, :] @ state)
    return xp.stack(rows, axis=-3), state
