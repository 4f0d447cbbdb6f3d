"""A backend from another distribution is found, runs only when named, and breaks nothing when broken."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import anyattn as aa
from anyattn import registry
from anyattn.dispatch import recording
from anyattn.errors import UnsupportedCallError

OTHER = """
    from anyattn.backend import Backend

    class Other(Backend):
        name = "other"
        arrays = ("numpy.ndarray",)
        devices = ("cpu",)

    backend = Other()
"""


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYATTN_BACKEND", raising=False)


@pytest.fixture
def qkv() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 7, 5))
    return q, k[:, :2], v[:, :2]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that puts a distribution with one module and one entry point on the path."""

    def put(distribution: str, entry_point: str, source: str = "") -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-2.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[anyattn.backends]\n{entry_point}\n")
        if source:
            module = entry_point.partition("=")[2].partition(":")[0].strip()
            (site / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(site)
        registry.refresh()

    yield put
    monkeypatch.undo()
    registry.refresh()


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    i, j = np.ogrid[: q.shape[2], : k.shape[2]]
    scores = np.where(j <= i, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def ran(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: object) -> str:
    with recording() as records:
        out = aa.attention(q, k, v, causal=True, **options)
    np.testing.assert_allclose(out, softmax_attention(q, k, v), rtol=0, atol=1e-12)
    [record] = records
    return record.backend


def test_is_found() -> None:
    status = aa.backends()["einsum"]
    assert status.available
    assert status.reason is None
    assert status.version == "1.0"
    assert "einsum" in str(aa.backends())


def test_runs_only_when_named(qkv: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(*qkv) != "einsum"
    explanation = aa.explain(*qkv, causal=True)
    assert explanation.backend != "einsum"
    assert ("einsum", "could run, by name", "") in explanation.rows()

    assert ran(*qkv, backend="einsum") == "einsum"
    with aa.use(backend="einsum"):
        assert ran(*qkv) == "einsum"
    with aa.use(order=("einsum", "reference")):
        assert ran(*qkv) == "einsum"
    monkeypatch.setenv("ANYATTN_BACKEND", "einsum")
    assert ran(*qkv) == "einsum"


def test_refuses_what_it_does_not_declare(qkv: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(UnsupportedCallError, match="has no mask") as caught:
        aa.attention(*qkv, mask=aa.masks.strided(2), sinks=np.zeros(4), backend="einsum")
    assert len(caught.value.reasons["einsum"]) == 1


def test_refuses_for_its_own_reason() -> None:
    q = np.zeros((1, 2**14, 1), dtype=np.float32)
    with pytest.raises(UnsupportedCallError, match="this call has 268435456"):
        aa.attention(q, q, q, backend="einsum")


@pytest.mark.parametrize(
    ("entry_point", "source", "reason"),
    [
        ("other = other_broken:backend", "raise OSError('no such driver')", "OSError: no such driver"),
        ("other = other_syntax:backend", "def", "SyntaxError"),
        ("other = other_absent:backend", "", "ModuleNotFoundError"),
        ("other = other_empty:backend", "nothing = None", "AttributeError"),
        ("other = other_integer:backend", "backend = 3", "no attribute 'name'"),
        ("other = other_class:Other", OTHER, "an instance"),
        ("another = other_named:backend", OTHER, "calls itself 'other'"),
        ("other = other_capable:backend", OTHER + "    Other.capabilities = {'flight'}", "flight"),
        ("other = other_string:backend", OTHER + "    Other.arrays = 'numpy.ndarray'", "arrays"),
        (
            "other = other_needy:backend",
            OTHER + "    Other.requires = ('no_such_library',)",
            "no_such_library",
        ),
        ("other = other_deep:backend", OTHER + "    Other.requires = ('no_such.library',)", "no_such"),
        ("Other! = other_ill_named:backend", OTHER, "ill-named"),
        ("reference = other_reference:backend", OTHER, "taken"),
        ("numba = other_numba:backend", OTHER, "taken"),
    ],
)
def test_a_broken_plugin_is_reported_and_breaks_nothing(
    entry_point: str, source: str, reason: str, install: Callable[..., None], qkv: tuple[np.ndarray, ...]
) -> None:
    before = {name: status.available for name, status in aa.backends().items()}
    install("stranger", entry_point, source)

    statuses = aa.backends()
    assert {name: statuses[name].available for name in before} == before
    [name] = statuses.keys() - before.keys()
    assert not statuses[name].available
    assert reason in statuses[name].reason
    assert reason in str(statuses)
    assert ran(*qkv) == "reference"
    assert ran(*qkv, backend="einsum") == "einsum"
    with pytest.raises(UnsupportedCallError, match="unavailable"):
        aa.attention(*qkv, backend=name)


def test_two_offers_of_one_name_are_both_refused(
    install: Callable[..., None], qkv: tuple[np.ndarray, ...]
) -> None:
    install("stranger", "einsum = other_einsum:backend", OTHER)
    status = aa.backends()["einsum"]
    assert not status.available
    assert "stranger 2.0" in status.reason
    assert "anyattn-plugin-example 1.0" in status.reason
    assert ran(*qkv) == "reference"


def test_a_stale_copy_of_a_distribution_is_no_conflict(
    install: Callable[..., None], qkv: tuple[np.ndarray, ...]
) -> None:
    install("anyattn-plugin-stale", "einsum = anyattn_plugin_example:backend")
    assert ran(*qkv, backend="einsum") == "einsum"
