"""Write `pairwise.ROWS` anew after a change of `pairwise.FACTORS`; run as a module, needs allpairspy."""

from __future__ import annotations

import re
from pathlib import Path

from anyattn.testing.cases import pairwise


def table() -> str:
    """The rows that allpairspy finds, in aligned columns."""
    from allpairspy import AllPairs

    rows = [list(row) for row in AllPairs([list(values) for values in pairwise.FACTORS.values()])]
    widths = [max(len(value) for value in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        " ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    source = Path(pairwise.__file__)
    text = re.sub(
        r'ROWS = """\n.*?"""', lambda _: f'ROWS = """\n{table()}\n"""', source.read_text(), flags=re.DOTALL
    )
    source.write_text(text)
