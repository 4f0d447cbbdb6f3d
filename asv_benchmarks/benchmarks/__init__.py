"""Benchmarks by subject; the first parameter of each is who computes (`common.ALL` or `WHO`).

`common` builds the calls, the other modules only say which. A benchmark that somebody cannot run, or whose
library is not installed, shows as n/a.
"""

from __future__ import annotations

import os

# Set, it makes NumPy's BLAS take another processor's code. It is read when NumPy is imported.
os.environ.pop("OPENBLAS_CORETYPE", None)
