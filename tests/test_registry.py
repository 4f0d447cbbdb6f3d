"""Discovery survives plugins that are broken, ill-named or there twice."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import types

import numpy as np
import pytest

import anyattn as aa
from anyattn import registry
from anyattn.backend import Backend


class Plain(Backend):
    name = "plain"


class Distribution:
    def __init__(self, name):
        self.name = name
        self.version = "2.5"


def point(name, value, distribution="stranger"):
    found = importlib.metadata.EntryPoint(name, value, registry.GROUP)
    vars(found)["dist"] = Distribution(distribution)
    return found


@pytest.fixture
def discover(monkeypatch, tmp_path):
    """`backends()` as it is with these entry points beside the real ones."""
    module = types.ModuleType("plugin_module")
    module.plain = Plain()
    module.other = Plain()
    module.cls = Plain
    module.nothing = object()
    needs, odd, misnamed = Plain(), Plain(), Plain()
    needs.requires, needs.extra = ("a_module_that_is_nowhere",), "extra"
    odd.capabilities = frozenset({"flight"})
    misnamed.name = "somebody"
    module.empty = Plain()
    module.empty.arrays = None
    module.deep = Plain()
    module.deep.requires = ("no_such.library",)
    module.needs, module.odd, module.misnamed = needs, odd, misnamed
    monkeypatch.setitem(sys.modules, "plugin_module", module)
    (tmp_path / "exiting_module.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = list(importlib.metadata.entry_points(group=registry.GROUP))

    def discover(*points):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*real, *points])
        registry.refresh()
        return aa.backends()

    yield discover
    monkeypatch.undo()
    registry.refresh()


def test_a_plugin_is_found_with_its_version(discover):
    status = discover(point("plain", "plugin_module:plain"))["plain"]
    assert status.available
    assert status.version == "2.5"
    assert status.backend.name == "plain"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("plain", "no_such_module:backend", "does not load: ModuleNotFoundError"),
        ("plain", "plugin_module:missing", "does not load: AttributeError"),
        ("plain", "plugin_module:nothing", "is no backend: it has no attribute 'name'"),
        ("plain", "plugin_module:cls", "is no backend: it is the class Plain; wanted an instance"),
        ("plain", "plugin_module:misnamed", "it calls itself 'somebody'"),
        ("plain", "plugin_module:odd", "capabilities that do not exist: flight"),
        ("plain", "plugin_module:needs", r"pip install 'anyattn\[extra\]'"),
        ("plain", "plugin_module:empty", "arrays is None; wanted a collection of strings"),
        ("plain", "exiting_module:backend", "does not load: SystemExit"),
        ("plain", "plugin_module:deep", r"pip install no_such\.library"),
        ("Ill Named", "plugin_module:plain", "ill-named"),
    ],
)
def test_a_broken_plugin_is_reported_and_breaks_nothing(discover, name, value, reason):
    found = discover(point(name, value))
    assert not found[name].available
    assert found[name].backend is None
    assert re.search(reason, found[name].reason)
    assert found["reference"].available
    x = np.ones((1, 2, 3))
    np.testing.assert_array_equal(aa.attention(x, x, x), x)


def test_two_plugins_of_one_name_are_both_refused(discover):
    found = discover(
        point("plain", "plugin_module:plain", "first"), point("plain", "plugin_module:other", "second")
    )
    who = "second 2.5 (plugin_module:other) and first 2.5 (plugin_module:plain)"
    assert found["plain"].reason == f"offered twice, by {who}; uninstall one"


def test_a_stale_copy_of_one_distribution_does_no_harm(discover):
    found = discover(point("plain", "plugin_module:plain"), point("plain", "plugin_module:plain"))
    assert found["plain"].available


def test_names_of_anyattn_cannot_be_taken(discover):
    found = discover(point("reference", "plugin_module:plain"), point("numba", "plugin_module:plain"))
    assert found["reference"].backend is not sys.modules["plugin_module"].plain
    assert found["numba"].version != "2.5"
    assert found["reference of stranger 2.5"].reason == "the name is taken by anyattn"
    assert found["numba of stranger 2.5"].reason == "the name is taken by anyattn"


def test_find_loads_no_other_backend(discover):
    discover(point("plain", "no_such_module:backend"))
    registry.refresh()
    assert registry.find("reference").available
    assert registry._status.cache_info().currsize == 1


def test_the_table_names_every_backend(discover):
    lines = repr(discover(point("plain", "no_such_module:backend"))).splitlines()
    assert lines[0].split()[:2] == ["reference", "available"]
    assert any(line.startswith("plain") and "unavailable: no_such_module" in line for line in lines)


def test_without_metadata_the_reference_still_runs(monkeypatch):
    """A copied package has no entry points at all."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    registry.refresh()
    try:
        x = np.ones((1, 2, 3))
        np.testing.assert_array_equal(aa.attention(x, x, x), x)
        assert aa.explain(x, x, x).rows() == [
            ("numba", "refuses", "is not installed"),
            ("reference", "runs", ""),
        ]
        with pytest.raises(aa.errors.UnknownBackendError, match="backend: 'numba' is not installed"):
            aa.explain(x, x, x, backend="numba")
    finally:
        monkeypatch.undo()
        registry.refresh()
