"""Directive `backend-table`: backends across, what they declare down, read at build time.

The entry points are loaded here instead of asking `anyattn.backends()`, because a backend whose library is
not installed where the documentation is built has a declaration all the same.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from anyattn.backend import CAPABILITIES, Backend
from anyattn.reference import backend as reference

OURS = ("numba", "cupy", "torch")


class BackendTable(SphinxDirective):
    """A Markdown table of `reference` and the backends that this distribution installs."""

    def run(self) -> list[nodes.Node]:
        """Return the parsed table."""
        points = {point.name: point for point in entry_points(group="anyattn.backends")}
        backends: list[Backend] = [reference, *(points[name].load() for name in OURS)]
        rows = [
            ["", *(f"`{backend.name}`" for backend in backends)],
            ["---"] * (len(backends) + 1),
            ["arrays", *(_names(backend.arrays, "any array-API library") for backend in backends)],
            ["dtypes", *(_names(sorted(backend.dtypes), "any") for backend in backends)],
            ["devices", *(_names(backend.devices, "any") for backend in backends)],
            ["needs", *(_names(backend.requires, "any") for backend in backends)],
        ]
        for capability, meaning in CAPABILITIES.items():
            marks = ["yes" if capability in backend.capabilities else "–" for backend in backends]
            rows.append([f"**{capability}**: {meaning}", *marks])
        return self.parse_text_to_nodes("\n".join(f"| {' | '.join(row)} |" for row in rows))


def _names(names: list[str] | tuple[str, ...], everything: str) -> str:
    if tuple(names) == ("*",):
        return everything
    return ", ".join(f"`{name}`" for name in names) or "nothing more"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("backend-table", BackendTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
