"""The scores of one block of keys, and their product with the values, of a described call.

Strict masking: a hidden (row, key) must contribute nothing even where k, v or bias is NaN or infinite there.
Scores are replaced by -inf where hidden; in P . V a zero weight times NaN would be NaN, so values are cleaned
before the product and what is seen of the unclean ones is put back.
"""

from __future__ import annotations

import math
from dataclasses import replace

from anyattn import arrays
from anyattn.arrays import Array
from anyattn.call import AttentionCall
from anyattn.expr.branches import SEEN, hold_unpicked
from anyattn.expr.evaluate import Tile, evaluate

__all__ = ["Logits"]


class Logits:
    """Block-wise scores of a call for its rows [first, last), by default all, or for those it asks for."""

    def __init__(self, call: AttentionCall, rows: tuple[int, int] | None = None):
        self.call = call
        self.xp = xp = call.xp
        self.dtype = getattr(xp, call.accumulate)
        self.index = arrays.index_dtype(xp, call.device)
        self.first_row, end = rows or (0, call.q_len)
        q = arrays.take_range(call.q, self.first_row, end - self.first_row, axis=-2)
        q = q if call.rows is None else arrays.take(xp, call.q, call.rows, axis=-2)
        self.num_rows = int(q.shape[-2])
        self.q = self._pack(arrays.cast(xp, q, self.dtype) * call.scale)
        self.symbols = self._symbols()
        # Where values are at hand, blocks are looked at and finite ones need no care.
        self.readable = call.readable
        self.differentiable = bool(call.features & {"gradients", "traced"}) and call.library != "dask"
        self.undefined = self._undefined()
        self.score = call.score
        if self.score is not None and self.differentiable:
            self.score = hold_unpicked(self.score, masked=call.visible is not None)

    def shape(self, *last: int) -> tuple[int, ...]:
        """(..., Hq, R, *last) of the call."""
        return (*self.call.batch_shape, self.call.num_heads, self.num_rows, *last)

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        """An array of one value in the dtype that is accumulated in."""
        return arrays.full(self.xp, shape, value, self.dtype, self.call.device)

    def block(self, start: Array | int, size: int, full: bool = False) -> tuple[Array, Array | None]:
        """Scores (..., Hq, R, size) from key `start` on, -inf where hidden, and what is seen (None: all).

        `full` says that the mask hides nothing there.
        """
        xp, call = self.xp, self.call
        tile = self._tile(start, size)
        visible = None if call.visible is None or full else evaluate(call.visible, tile)
        k = self._rows_of(call.k, call.k_scales, start, size)
        score = self._scores(k, clean=visible is not None)
        if self.score is not None:
            if visible is not None:
                # A hidden NaN must not index a table, and derivatives there must be finite to be times 0.
                score = xp.where(visible, score, 0.0)
                tile = replace(tile, symbols={**tile.symbols, SEEN.name: visible})
            score = evaluate(self.score, tile, score)
        if visible is not None:
            score = xp.where(visible, score, -xp.inf)
        return xp.broadcast_to(score, self.shape(size)), visible

    def weigh(self, p: Array, visible: Array | None, start: Array | int, size: int) -> Array:
        """P . V of a block, (..., Hq, R, Dv), of weights that dropout has not been at yet."""
        xp = self.xp
        if self.call.keep is not None:
            p = p * evaluate(self.call.keep, self._tile(start, size))
        v = self._rows_of(self.call.v, self.call.v_scales, start, size)
        if visible is None or self._is_finite(v):
            return self._product(self._pack(p), v)
        finite = xp.isfinite(v)
        out = self._product(self._pack(p), xp.where(finite, v, 0.0))
        return out + arrays.stop_gradient(self._seen_nonfinite(p, visible, v))

    def _rows_of(self, x: Array, scales: Array | None, start: Array | int, size: int) -> Array:
        """Keys or values of a block, in the dtype that is computed in."""
        rows = arrays.cast(self.xp, arrays.take_range(x, start, size, axis=-2), self.dtype)
        if scales is None:
            return rows
        factors = arrays.cast(self.xp, arrays.take_range(scales, start, size, axis=-1), self.dtype)
        return rows * self.xp.expand_dims(factors, axis=-1)

    def _seen_nonfinite(self, p: Array, visible: Array, v: Array) -> Array:
        """What the NaN and infinite values at seen keys add to P . V: NaN, inf, -inf, or 0 for nothing."""
        xp = self.xp

        def meets(weights: Array, values: Array) -> Array:
            left, right = arrays.cast(xp, weights, self.dtype), arrays.cast(xp, values, self.dtype)
            return self._product(self._pack(left), right) > 0

        seen = xp.broadcast_to(visible, p.shape)
        positive, vanished = seen & (p > 0), seen & (p == 0)
        up, down = meets(positive, v == xp.inf), meets(positive, v == -xp.inf)
        undefined = meets(seen, xp.isnan(v)) | meets(vanished, ~xp.isfinite(v)) | (up & down)
        zero = self.full(up.shape, 0.0)
        return xp.where(undefined, xp.nan, xp.where(up, xp.inf, xp.where(down, -xp.inf, zero)))

    def _scores(self, k: Array, clean: bool) -> Array:
        xp = self.xp
        columns = xp.matrix_transpose(k)
        if not clean or not self.differentiable or self._is_finite(k):
            return self._product(self.q, columns)
        # 0 * NaN would reach the gradient of q from hidden keys: differentiate through the clean product
        # only.
        raw = arrays.stop_gradient(self._product(self.q, columns))
        cleaned = self._product(self.q, xp.where(xp.isfinite(columns), columns, 0.0))
        return xp.where(xp.isfinite(raw), cleaned, raw)

    def _is_finite(self, x: Array) -> bool:
        return self.readable and bool(self.xp.all(self.xp.isfinite(x)))

    def _pack(self, x: Array) -> Array:
        """(..., Hq, R, n) -> (..., Hkv, group * R, n): the rows that share a key/value head in one product.

        dask would lose the chunks of the rows that way: (..., Hkv, group, R, n) there.
        """
        group = self.call.group_size
        if group == 1:
            return x
        *lead, heads, rows, n = x.shape
        packed = (
            (heads // group, group, rows) if self.call.library == "dask" else (heads // group, group * rows)
        )
        return self.xp.reshape(x, (*lead, *packed, n))

    def _product(self, packed: Array, right: Array) -> Array:
        """(..., Hq, R, n) . (..., Hkv, n, m) -> (..., Hq, R, m), the left operand packed."""
        xp, group = self.xp, self.call.group_size
        if group == 1:
            return xp.matmul(packed, right)
        if self.call.library == "dask":
            right = xp.expand_dims(right, axis=-3)
        product = xp.matmul(packed, right)
        lead = product.shape[: -4 if self.call.library == "dask" else -3]
        return xp.reshape(product, (*lead, self.call.num_heads, self.num_rows, right.shape[-1]))

    def _symbols(self) -> dict[str, Array]:
        """The index symbols that do not depend on the block; see `anyattn.expr.evaluate` for their shapes."""
        xp, call = self.xp, self.call

        def count(n: int) -> Array:
            return xp.arange(n, dtype=self.index, device=call.device)

        row = count(self.num_rows) + self.first_row if call.rows is None else call.rows
        row = xp.reshape(row, (self.num_rows, 1))
        offset = call.offset
        if arrays.is_array(offset):
            offset = xp.reshape(offset, (*offset.shape, 1, 1, 1))
        return {
            "b": xp.reshape(count(math.prod(call.batch_shape)), (*call.batch_shape, 1, 1, 1)),
            "h": xp.reshape(count(call.num_heads), (call.num_heads, 1, 1)),
            "row": row,
            "i": row + offset,
        }

    def _undefined(self) -> Array | None:
        """For each head 1, or NaN where its sink is NaN or infinity (Hq, 1, 1); None where all are 1.

        Weights at seen keys are times it, and the sums that they are divided by leave such sinks out: NaN
        there would reach the gradients of hidden values, times their weight of 0.
        """
        xp, sinks = self.xp, self.call.sinks
        if sinks is None:
            return None
        fine = xp.isfinite(sinks) | (sinks == -xp.inf)
        if self.readable and bool(xp.all(fine)):
            return None
        return xp.reshape(1 + xp.where(fine, 0.0, 0 * sinks), (self.call.num_heads, 1, 1))

    def _tile(self, start: Array | int, size: int) -> Tile:
        j = self.xp.arange(size, dtype=self.index, device=self.call.device) + start
        return Tile(
            xp=self.xp,
            device=self.call.device,
            index=self.index,
            accumulate=self.dtype,
            symbols={**self.symbols, "j": j},
            start=start,
            size=size,
            rows=self.call.rows,
            first_row=self.first_row,
        )
