"""What a machine lacks for a test: it skips, or fails where ANYATTN_MISSING_TOOLS is "fail", as in CI."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

__all__ = ["missing"]


def missing(reason: str) -> NoReturn:
    """Skip a test for a reason, or fail for it."""
    if os.environ.get("ANYATTN_MISSING_TOOLS") == "fail":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
