"""What several files of tests share."""

from __future__ import annotations

from functools import partial

import pytest

from anyattn import registry


def make_findable(monkeypatch, *backends):
    """Make backends findable under their names until `monkeypatch` undoes it."""
    found = {b.name: registry.Status(b.name, b, None, "1.0") for b in backends}
    real_offers, real_status = registry._offers, registry._status
    monkeypatch.setattr(registry, "_offers", lambda: {**real_offers(), **{name: [] for name in found}})
    monkeypatch.setattr(registry, "_status", lambda name: found.get(name) or real_status(name))
    monkeypatch.setattr(registry, "_generation", object())


@pytest.fixture
def install(monkeypatch):
    """Make backends findable under their names for one test."""
    return partial(make_findable, monkeypatch)
