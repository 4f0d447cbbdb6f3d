"""Other indices for an expression: b, row, i or j looked up or computed from those of the call.

Where keys do not lie in memory as a mask counts them (packed sequences, pages, rings), the mask and the
score function are moved to where they do, and no kernel has to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from anyattn.expr.nodes import Aligned, Deferred, Expr, Load, Symbol, Table, load, rewrite

__all__ = ["Relocation"]


class Relocation:
    """Indices by name, "b", "row", "i" or "j", and what takes their places.

    Parameters
    ----------
    symbols : mapping of str to Expr
    count : int, optional
        Values of b where it is replaced.
    """

    def __init__(self, symbols: Mapping[str, Expr], count: int | None = None):
        self.symbols = dict(symbols)
        self.count = count
        # With the table that each takes the place of, whose id is given away when nobody holds it.
        self._tables: dict[int, tuple[Table, Table]] = {}

    def __call__(self, root: Expr, argument: str) -> Expr:
        """`root` with these indices; errors about it name `argument`."""

        def change(node: Expr) -> Expr:
            if isinstance(node, Symbol):
                return self.symbols.get(node.name, node)
            if isinstance(node, Aligned):
                raise ValueError(
                    f"{argument}: {node.label} is an array along rows and keys, which lie elsewhere in this "
                    f"call; wanted an expression"
                )
            if isinstance(node, Load) and "b" in node.table.axes and self.count is not None:
                return load(self._by_value_of_b(node.table), node.indices)
            if isinstance(node, Deferred):
                return self._deferred(node, argument)
            return node

        return rewrite(root, change)

    def _by_value_of_b(self, table: Table) -> Table:
        """A table with an entry for each batch entry, as one with an entry for each value of b."""
        for size, axis in zip(table.value.shape, table.axes, strict=True):
            if axis == "b" and size != self.count:
                raise ValueError(
                    f"{table.label}: wanted one entry for each of {self.count} sequences, "
                    f"got shape {tuple(table.value.shape)}"
                )
        if id(table) not in self._tables:
            axes = tuple(None if axis == "b" else axis for axis in table.axes)
            self._tables[id(table)] = table, replace(table, axes=axes)
        return self._tables[id(table)][1]

    def _deferred(self, node: Deferred, argument: str) -> Expr:
        if not node.local:
            raise ValueError(f"{argument}: {node.label} depends on the sizes of a call; wanted an expression")
        settle = node.settle
        # Of another structure than outside, as what it stands for reads other indices.
        inputs = tuple(self(child, argument) for child in node.inputs)
        return replace(node, settle=lambda *given: self(settle(*given), argument), inputs=inputs)
