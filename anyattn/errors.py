"""Errors of anyattn.

Wrong input raises the built-in `TypeError` (wrong kind of thing) or `ValueError` (wrong value or shape), with
a message that names the argument, what came and what was wanted. The classes here are for what has no
built-in name.
"""

from __future__ import annotations

__all__ = ["TraceError", "UnknownBackendError", "UnsupportedCallError"]


class TraceError(TypeError):
    """A user's mask or score function could not be turned into an expression."""


class UnknownBackendError(ValueError):
    """A backend was asked for by a name that no installed backend has."""


class UnsupportedCallError(RuntimeError):
    """The backend that was asked for refuses the call, or no backend takes it.

    Attributes
    ----------
    reasons : dict of str to tuple of str
        For each backend that was considered, why it refused.
    """

    def __init__(self, message: str, reasons: dict[str, tuple[str, ...]]):
        super().__init__(message)
        self.reasons = reasons
