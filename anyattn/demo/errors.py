"""The one error of the demo: something that its user can put right, told in one line."""

from __future__ import annotations


class DemoError(Exception):
    """What is missing or wrong, and what to do about it."""
