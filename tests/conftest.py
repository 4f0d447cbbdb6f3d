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


@pytest.fixture
def nvrtc():
    """Go on only where there is NVRTC."""
    from cuda_compile import need_nvrtc

    need_nvrtc()


@pytest.fixture
def interpreted(install):
    """The backend `cupy` on a stand-in for a device of compute capability 8.0."""
    from cuda_runs import Interpreted

    found = Interpreted()
    install(found)
    return found
