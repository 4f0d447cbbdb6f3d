"""Looking inside: what heads do, in numbers (`heads`) and in pictures (`figures`, with matplotlib).

>>> import numpy as np, anyattn as aa
>>> from anyattn import viz
>>> q = k = np.eye(6, dtype=np.float32)[None] * 20
>>> viz.summarise(aa.attention_weights(q, k, causal=True))
head  kind        distance  entropy  first   same  previous   next
   0  same token      0.00     0.00   0.0%  100.0%      0.0%   0.0%
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyattn.viz.heads import HeadSummary, Summary, rollout, summarise

if TYPE_CHECKING:
    from anyattn.viz.figures import head_grid, heat_map, save, to_html, to_svg

__all__ = [
    "HeadSummary",
    "Summary",
    "head_grid",
    "heat_map",
    "rollout",
    "save",
    "summarise",
    "to_html",
    "to_svg",
]


def __getattr__(name: str) -> Any:
    # matplotlib, which the numbers do without, takes a second to import.
    if name in __all__:
        from anyattn.viz import figures

        return getattr(figures, name)
    raise AttributeError(f"module 'anyattn.viz' has no attribute {name!r}")
