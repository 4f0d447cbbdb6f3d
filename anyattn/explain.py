"""`explain`: which backend would run a call, why the others would not, and what to know of how it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from anyattn import dispatch, registry, settings
from anyattn.arrays import Array
from anyattn.lookup import Cache
from anyattn.options import ARGUMENTS, Options, check_names

if TYPE_CHECKING:
    from anyattn.call import AttentionCall, Operation
    from anyattn.linear.call import LinearCall

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes
    ----------
    call : AttentionCall or LinearCall
        The description that the backends were asked about.
    backend : str or None
        The backend that would run, None if the call would be an error.
    forced_by : str or None
        What forces a backend: "backend=", "anyattn.use" or "ANYATTN_BACKEND".
    verdicts : tuple of Verdict
        Each backend's answer, in the order in which they are asked; backends that are not asked come last.
    notes : tuple of str
        What the chosen backend says of how it would run: copies, memory.
    """

    call: AttentionCall | LinearCall
    backend: str | None
    forced_by: str | None
    verdicts: tuple[dispatch.Verdict, ...]
    asked: tuple[str, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, verdict, reasons) for each backend."""
        rows = []
        for v in self.verdicts:
            if v.name == self.backend:
                verdict = "runs"
            elif v.reasons:
                verdict = "refuses"
            else:
                verdict = "could run" if v.name in self.asked else "could run, by name"
            rows.append((v.name, verdict, "; ".join(v.reasons)))
        return rows

    def __repr__(self) -> str:
        table = [("backend", "verdict", "why not"), *self.rows()]
        widths = [max(len(row[n]) for row in table) for n in range(2)]
        lines = [repr(self.call)]
        lines += [
            f"{name:<{widths[0]}}  {verdict:<{widths[1]}}  {why}".rstrip() for name, verdict, why in table
        ]
        lines += [f"forced by {self.forced_by}"] if self.forced_by else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        cells = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for row in self.rows()
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        forced = f"<p>forced by {html.escape(self.forced_by)}</p>" if self.forced_by else ""
        return (
            f"<p><code>{html.escape(repr(self.call))}</code></p>"
            "<table><thead><tr><th>backend</th><th>verdict</th><th>why not</th></tr></thead>"
            f"<tbody>{cells}</tbody></table>"
            f"{forced}{f'<ul>{notes}</ul>' if notes else ''}"
        )


def explain(
    q: Array, k: Array | Cache, v: Array | None = None, *, backend: str | None = None, **options: Any
) -> Explanation:
    """Which backend would run `attention(q, k, v, ...)`, and why not the others.

    Parameters
    ----------
    q, k, v, backend, **options
        As for `attention`; without `v`, as for `attention_weights`, or with `stats` for `attention_stats`;
        with `rule`, as for `linear_attention`. Arguments that the call would refuse are refused.

    Returns
    -------
    Explanation
    """
    call = _described(q, k, v, options)
    forced = settings.forced_backend(backend)
    asked = (forced[0],) if forced else dispatch.order_for(call)
    others = [name for name in registry.backends() if name not in asked]
    source = forced[1].removesuffix("=") if forced else None
    verdicts = tuple(dispatch.consider(name, call, source) for name in (*asked, *others))
    chosen = next((v for v in verdicts if v.name in asked and not v.reasons), None)
    return Explanation(
        call=call,
        backend=chosen.name if chosen else None,
        forced_by=forced[1] if forced else None,
        verdicts=verdicts,
        asked=asked,
        notes=dispatch.notes(chosen.backend, call) if chosen else (),
    )


def _described(
    q: Array, k: Array | Cache, v: Array | None, options: dict[str, Any]
) -> AttentionCall | LinearCall:
    """The call of the function that the options belong to."""
    from anyattn.describe import describe

    if "rule" in options:
        from anyattn.linear.describe import LinearOptions
        from anyattn.linear.describe import describe as describe_linear

        known = [field.name for field in fields(LinearOptions)]
        for name in options:
            if name not in known:
                raise TypeError(f"explain: unexpected option {name!r}; it takes {', '.join(known)}")
        return describe_linear(q, k, v, LinearOptions(**options))
    if isinstance(k, Cache):
        if v is not None:
            raise TypeError("v: wanted None where k is a cache, which holds the values")
        check_names("explain", "attention", options)
        given = Options(**options)
        k, v, own = k.arguments(q, tuple(getattr(given, name) for name in ARGUMENTS))
        return describe("attention", q, k, v, Options(*own))
    operation: Operation = "attention" if v is not None else "stats" if "stats" in options else "weights"
    check_names("explain", operation, options)
    return describe(operation, q, k, v, Options(**options))
