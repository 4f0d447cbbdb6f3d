"""What docs/cuda.md lists is what the tests plant and the model predicts."""

from __future__ import annotations

import cuda_model
from cuda_mutant_table import PAGE, table


def test_defects():
    assert PAGE.read_text() == table(), "run `python tests/cuda_mutant_table.py`"


def test_predictions():
    page = PAGE.parents[1] / "cuda.md"
    assert cuda_model.table() in page.read_text(), "write the rows that `python tests/cuda_model.py` prints"
