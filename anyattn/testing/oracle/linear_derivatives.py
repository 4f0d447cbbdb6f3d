"""Gradients of linear attention by going back through its recurrence, a token at a time, in float64.

With o = scale S^T q, S = S' + k (x) u, u = v or beta (v - S'^T k), S' = exp(g) S_before, and d for the
gradient by each:

    dq = scale S do,  dS += scale q (x) do,  du = dS^T k,  dk = dS u,  dS' = dS
    dbeta = du . (v - S'^T k),  dv = beta du,  dk -= beta S' du,  dS' -= beta k (x) du
    dg = sum over columns of dS' S',  dS_before = exp(g) dS'

A normalizer is one more column of S, of values that are 1; rows are divided by what it gives.

The same with all numbers and all signs positive adds up what each gradient is a sum of: what rounding errors
are proportional to, however a program groups the sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from anyattn.testing.oracle.linear import Strand

Array = Any


class StrandGradients(NamedTuple):
    """Gradients by the arrays of a strand; zeros by those that its rule does not read."""

    q: Array
    k: Array
    v: Array
    decay: Array
    beta: Array
    state: Array
    z: Array


def differentiate(strand: Strand, dout: Array, *, magnitudes: bool = False) -> StrandGradients:
    """Gradients of the sum of `dout` (G, Lq, Dv) times rows, or with `magnitudes` what they add up to."""
    sign = 1.0 if magnitudes else -1.0

    def sized(x: Array) -> Array:
        return np.abs(x) if magnitudes else np.array(x, np.float64)

    q, k, v, dout, scale = (sized(x) for x in (strand.q, strand.k, strand.v, dout, strand.scale))
    length, dim = k.shape
    beta = None if strand.beta is None else sized(strand.beta)
    kept = np.ones((length, dim)) if strand.decay is None else np.exp(strand.decay)
    first, columns = sized(strand.state), v.shape[1]
    if strand.normalize:
        first = np.concatenate([first, sized(strand.z)[:, None]], axis=1)
        v = np.concatenate([v, np.ones((length, 1))], axis=1)

    state, faded, written, after = first, [], [], []
    for t in range(length):
        faded.append(kept[t][:, None] * state)
        written.append(v[t] if beta is None else beta[t] * (v[t] + sign * (faded[t].T @ k[t])))
        state = faded[t] + np.outer(k[t], written[t])
        after.append(state)

    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    ddecay, dbeta, back = np.zeros(k.shape), np.zeros(length), np.zeros(first.shape)

    def read(row: int, state: Array) -> Array:
        """What the rows `row` of all query heads give to the state that they read."""
        found = np.zeros(state.shape)
        for g in range(q.shape[0]):
            raw = scale * (state.T @ q[g, row])
            draw = scale * dout[g, row]
            if strand.normalize:
                total = raw[-1] / scale
                if total == 0:
                    continue
                lost = sign * (dout[g, row] @ raw[:-1]) / total**2
                draw = np.append(draw / total, lost)
            dq[g, row] += state @ draw
            found += np.outer(q[g, row], draw)
        return found

    if not strand.causal:
        for row in range(q.shape[1]):
            back = back + read(row, state)
    for t in reversed(range(length)):
        if strand.causal:
            back = back + read(t, after[t])
        du = back.T @ k[t]
        dk[t] += back @ written[t]
        if beta is None:
            dv[t] = du
        else:
            dbeta[t] = du @ (v[t] + sign * (faded[t].T @ k[t]))
            dv[t] = beta[t] * du
            dk[t] += sign * beta[t] * (faded[t] @ du)
            back = back + sign * beta[t] * np.outer(k[t], du)
        ddecay[t] = (back * faded[t]).sum(axis=1)
        back = kept[t][:, None] * back
    dz = back[:, columns] if strand.normalize else np.zeros(dim)
    return StrandGradients(dq, dk, dv[:, :columns], ddecay, dbeta, back[:, :columns], dz)
