"""Python examples of the documentation run, and give what their comments say."""

from __future__ import annotations

import ast
import re
from inspect import signature
from typing import Any

import numpy as np
import pytest
from docs_scripts import DOCS, need_docs, script

import anyattn as aa

need_docs(whole_module=True)


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    text = (DOCS / page).read_text(encoding="utf-8")
    for number, source in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE), 1):
        exec(compile(source, f"<{page}, example {number}>", "exec"), names)
    return names


def test_getting_started(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("getting-started.md", {})
    q, k, v = (names[name] for name in "qkv")

    assert names["weights"].shape == (2, 8, 2, 100)
    np.testing.assert_allclose(names["weights"].sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(names["out"], aa.attention(q, k, v), rtol=0, atol=1e-5)
    assert names["stats"].keys() == {"key_mass", "entropy"}
    np.testing.assert_array_less(names["stats"]["entropy"], np.log(100))
    plain = aa.attention(q, k, v, causal=True)
    assert abs(names["dropped"] - plain).max() > 0.01
    step = aa.attention(q[1, :, :1], k[1, :, :63], v[1, :, :63])
    np.testing.assert_allclose(names["step"][1], step, rtol=0, atol=1e-5)
    second = aa.attention(q[1, :, :63], k[1, :, :63], v[1, :, :63], causal=True)
    np.testing.assert_allclose(np.moveaxis(names["packed"][100:], 0, 1), second, rtol=0, atol=1e-5)
    longer = [np.concatenate([x, x[:, :, :1]], axis=2) for x in (k, v)]
    np.testing.assert_allclose(names["token"], aa.attention(q[:, :, :1], *longer), rtol=0, atol=1e-5)
    assert "reference" in capsys.readouterr().out


def test_masks_and_scores() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 9, 8))
    names = run("masks-and-scores.md", {"aa": aa, "np": np, "q": q, "k": k, "v": v})
    bias = -names["slopes"].astype(float)[:, None, None] * abs(np.arange(9)[:, None] - np.arange(9))
    np.testing.assert_allclose(names["out"], aa.attention(q, k, v, bias=bias[None]), rtol=0, atol=1e-6)


def test_looking_inside(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    names = run("looking-inside.md", {})
    assert "distance  entropy" in capsys.readouterr().out
    assert sum(names["summary"].kinds().values()) == 8
    assert ">w17<" in names["svg"]


def test_caches() -> None:
    names = run("caches.md", {})
    k, v, q = (names[name] for name in "kvq")
    longer = [np.concatenate([x, x[:, :, :1]], axis=2) for x in (k, v)]
    np.testing.assert_allclose(names["out"], aa.attention(q, *longer), rtol=0, atol=1e-5)
    for n in range(2):
        own = [np.concatenate([x[0], x[n, :, :1]], axis=1) for x in (k, v)]
        np.testing.assert_allclose(names["paged"][n], aa.attention(q[n], *own), rtol=0, atol=1e-5)


def test_cases_of_caches_are_as_many_as_the_page_says() -> None:
    module = script("caches_table")
    page = (DOCS / "caches.md").read_text(encoding="utf-8")
    assert module.with_table(page, 7, module.counts()) == page, "run python docs/caches_table.py"


def test_int8_errors_are_those_of_the_page() -> None:
    module = script("caches_table")
    page = (DOCS / "caches.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| standard normal \| (\w+) \| (.*?) % \|", page, re.MULTILINE))
    found = {name: 100 * rms for name, (rms, _, _) in module.errors(module.normal()).items()}
    assert shown.keys() == found.keys()
    for name, rms in found.items():
        assert float(shown[name]) == pytest.approx(rms, rel=0.2), "run python docs/caches_table.py"


def test_kernel_cache(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("kernel-cache.md", {})
    q, k, v, f = (names[name] for name in "qkvf")
    bias = -names["slopes"][:, None, None] * abs(np.arange(50)[:, None] - np.arange(50))
    for out, factor in ((names["out"], 1), (names["steeper"], 2)):
        wanted = aa.attention(q, k, v, causal=True, bias=factor * bias[None].repeat(2, axis=0))
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    assert f.arrays == {"slopes": "float32 (4,)"}
    assert f.cache_key.text in capsys.readouterr().out


def test_compat() -> None:
    names = run("compat.md", {})
    q, k, v = (names[name] for name in "qkv")
    np.testing.assert_array_equal(names["upper_left"][:, :, 0], v[:, :, 0])
    np.testing.assert_array_equal(names["lower_right"][:, :, :10], 0)
    wanted, lse = aa.attention(q, k, v, window=(4, 0), return_lse=True)
    np.testing.assert_allclose(names["out"].swapaxes(1, 2), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(names["softmax_lse"], lse, rtol=0, atol=1e-6)


def test_every_argument_is_explained() -> None:
    text = (DOCS / "contract.md").read_text(encoding="utf-8")
    for name in signature(aa.attention).parameters:
        assert f"`{name}`" in text or f"`{name}=" in text, name


def test_every_session_of_nox_is_explained() -> None:
    by_name = {}
    for node in ast.parse((DOCS.parent / "noxfile.py").read_text(encoding="utf-8")).body:
        for decorator in getattr(node, "decorator_list", []):
            made = ast.unparse(decorator)
            if re.match(r"nox\.session\b", made):
                by_name[node.name] = "default=False" in made
    text = (DOCS / "development.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.MULTILINE)
    shown = {re.findall(r"\w+", names)[0]: said.startswith("only by name") for names, said in rows}
    assert shown == by_name


EXPORTED = sorted(name for name in aa.__all__ if callable(getattr(aa, name)))


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_is_in_the_reference_with_every_parameter(name: str) -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"auto(function|class):: {name}$", text, re.MULTILINE)
    documentation = getattr(aa, name).__doc__
    assert documentation
    parameters = list(signature(getattr(aa, name)).parameters)
    if len(parameters) > 2:
        assert {each for each in parameters if not re.search(rf"\b{each}\b", documentation)} == set()


@pytest.mark.parametrize("module", ["masks", "scores"])
def test_every_entry_is_listed(module: str) -> None:
    text = (DOCS / "masks-and-scores.md").read_text(encoding="utf-8")
    entries = {name for name in getattr(aa, module).__all__ if name[0].islower()}
    assert entries
    assert {name for name in entries if f"`{name}(" not in text} == set()


def test_jax() -> None:
    pytest.importorskip("jax")
    pytest.importorskip("numba")
    names = run("jax.md", {})
    q, k, v = (np.asarray(names[name]) for name in "qkv")
    moved = 1e-2 * np.random.default_rng(1).standard_normal(q.shape)

    def total(x: Any) -> Any:
        out = aa.attention(x, k.astype(float), v.astype(float), causal=True, layout="blhd")
        return (out**2).sum()

    slope = (total(q + moved) - total(q - moved)) / 2
    np.testing.assert_allclose((names["step"] * moved).sum(), slope, rtol=1e-3)


def test_listings_are_what_the_printers_give() -> None:
    module = script("listings")
    page = (DOCS / "compiler.md").read_text(encoding="utf-8")
    for name, text in module.listings().items():
        assert f"_listings/{name}" in page
        shown = (DOCS / "_listings" / name).read_text(encoding="utf-8")
        assert shown == text, f"run python docs/listings.py, {name} is of another printer"
