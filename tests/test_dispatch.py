"""Which backend runs: order, what forces one, what refuses, and what is recorded."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import anyattn as aa
from anyattn import dispatch, registry
from anyattn.backend import CAPABILITIES, Backend
from anyattn.describe import Options, describe
from anyattn.errors import UnknownBackendError, UnsupportedCallError

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("f4")


class Constant(Backend):
    """Answers every call that it takes with a constant."""

    arrays = ("numpy.ndarray",)
    devices = ("cpu",)

    def __init__(self, name, value, capabilities=frozenset(CAPABILITIES)):
        self.name = name
        self.value = value
        self.capabilities = frozenset(capabilities)

    def run(self, call):
        shape = (*call.batch_shape, call.num_heads, call.q_len, call.v_head_dim)
        return np.full(shape, self.value, dtype=call.dtype), None


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """Nothing but `reference` and what a test installs, however the tests are run."""
    monkeypatch.setattr(registry, "_offers", lambda: {"reference": []})
    monkeypatch.setattr(registry, "_generation", object())


def ran(**options):
    with dispatch.recording() as records:
        aa.attention(X, X, X, **options)
    [record] = records
    return record.backend


def test_reference_runs_while_nothing_faster_does():
    assert ran() == "reference"


def test_the_first_in_the_order_that_accepts_runs(install):
    install(Constant("numba", 7.0, {"causal"}))
    assert ran(causal=True) == "numba"
    assert np.all(aa.attention(X, X, X) == 7)
    assert ran(softcap=1.0) == "reference"


class TestOrder:
    """Section 4 of the contract, by library, device, gradients and tracing."""

    def order(self, *tensors, **options):
        return dispatch.order_for(describe("attention", *tensors, Options(**options)))

    def test_numpy(self):
        assert self.order(X, X, X) == ("numba", "reference")

    def test_torch(self):
        torch = pytest.importorskip("torch", reason="torch is not installed")
        x = torch.from_numpy(X)
        assert self.order(x, x, x) == ("numba", "torch", "reference")
        assert self.order(x, x.clone().requires_grad_(), x) == ("torch", "reference")
        slopes = torch.ones(2, requires_grad=True)
        assert self.order(x, x, x, score_mod=lambda s, b, h, i, j: s * slopes[h]) == ("torch", "reference")
        with torch.no_grad():
            assert self.order(x, x.clone().requires_grad_(), x) == ("numba", "torch", "reference")
        meta = torch.empty(2, 3, 4, device="meta")
        assert self.order(meta, meta, meta) == ("torch", "reference")
        seen = []
        torch.func.vmap(lambda y: seen.append(self.order(y, y, y)) or y)(x[None])
        assert seen == [("torch", "reference")]

    def test_jax(self):
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        x = jax.numpy.asarray(X)
        assert self.order(x, x, x) == ("numba", "reference")
        seen = []
        jax.make_jaxpr(lambda y: seen.append(self.order(x, y, x)) or y)(x)
        assert seen == [("reference",)]

    def test_dask(self):
        dask = pytest.importorskip("dask.array", reason="dask is not installed")
        x = dask.from_array(X)
        assert self.order(x, x, x) == ("reference",)


def test_a_stranger_is_never_chosen_by_itself(install):
    install(Constant("stranger", 7.0))
    assert ran() == "reference"
    assert ran(backend="stranger") == "stranger"
    with aa.use(order=["stranger", "reference"]):
        assert ran() == "stranger"


def test_a_forced_backend_never_falls_back(install):
    install(Constant("picky", 7.0, {"causal"}))
    with pytest.raises(UnsupportedCallError, match=r"'picky' \(from backend=\).*has no softcap") as error:
        aa.attention(X, X, X, softcap=2.0, sinks=[0.0, 0.0], backend="picky")
    assert error.value.reasons["picky"] == (
        "has no softcap (softcap=)",
        "has no sinks (sinks=)",
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda call: 1 / 0, r"its unsupported\(\) raised ZeroDivisionError"),
        (lambda call: "no", r"its unsupported\(\) gave 'no' instead of a tuple"),
        (lambda call: None, r"its unsupported\(\) gave None"),
    ],
)
def test_a_backend_that_cannot_tell_refuses(install, answer, reason):
    odd = Constant("odd", 7.0)
    odd.unsupported = answer
    install(odd)
    assert aa.explain(X, X, X).backend == "reference"
    with pytest.raises(UnsupportedCallError, match=reason):
        aa.attention(X, X, X, backend="odd")


def test_argument_over_use_over_environment(install, monkeypatch):
    install(Constant("one", 1.0), Constant("two", 2.0), Constant("three", 3.0))
    monkeypatch.setenv("ANYATTN_BACKEND", "three")
    assert ran() == "three"
    with aa.use(backend="two"):
        assert ran() == "two"
        assert ran(backend="one") == "one"
        with aa.use(backend="reference"):
            assert ran() == "reference"
        assert ran() == "two"
    monkeypatch.setenv("ANYATTN_BACKEND", "")
    assert ran() == "reference"


def test_the_environment_forces_too(install, monkeypatch):
    install(Constant("picky", 7.0, ()))
    monkeypatch.setenv("ANYATTN_BACKEND", "picky")
    with pytest.raises(UnsupportedCallError, match="from ANYATTN_BACKEND"):
        aa.attention(X, X, X, causal=True)


def test_settings_belong_to_their_thread():
    seen = []
    with aa.use(threads=3):
        thread = threading.Thread(target=lambda: seen.append(aa.settings.current().threads))
        thread.start()
        thread.join()
        assert aa.settings.current().threads == 3
    assert seen == [None]


def test_settings_end_with_an_error():
    with pytest.raises(RuntimeError, match="inside"), aa.use(backend="reference", threads=2):
        raise RuntimeError("inside")
    assert aa.settings.current() == aa.settings.Settings()


def test_strict_leaves_out_what_is_not(install):
    install(Constant("numba", 7.0, set(CAPABILITIES) - {"strict_masking"}))
    assert ran(causal=True) == "numba"
    with aa.use(strict=True):
        assert ran(causal=True) == "reference"
        assert ran() == "numba"  # nothing is hidden
        with pytest.raises(UnsupportedCallError, match="not strict about hidden keys"):
            aa.attention(X, X, X, causal=True, backend="numba")


def test_unknown_names_list_what_there_is(install):
    install(Constant("numba", 7.0))
    with pytest.raises(
        UnknownBackendError, match=r"'nunba' is not installed; there are reference, numba.*mean 'numba'"
    ):
        aa.attention(X, X, X, backend="nunba")
    with pytest.raises(UnknownBackendError, match="'nope'"), aa.use(backend="nope"):
        pass
    with pytest.raises(UnknownBackendError, match="'nope'"), aa.use(order=["reference", "nope"]):
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, ValueError, "threads: wanted 1 or more"),
        ({"strict": 1}, TypeError, "strict: wanted True or False"),
        ({"order": "reference"}, TypeError, "order: wanted a sequence"),
    ],
)
def test_use_checks_what_it_is_given(options, error, message):
    with pytest.raises(error, match=message), aa.use(**options):
        pass


def test_backend_must_be_a_name():
    with pytest.raises(TypeError, match="backend: wanted a name or None, got int 3"):
        aa.attention(X, X, X, backend=3)


def test_no_backend_lists_everybodys_reasons(install):
    install(Constant("one", 1.0, ()), Constant("two", 2.0, ()))
    with aa.use(order=["one", "two"]), pytest.raises(UnsupportedCallError) as error:
        aa.attention(X, X, X, causal=True)
    assert set(error.value.reasons) == {"one", "two"}
    assert "one: has no causal" in str(error.value)


def test_a_result_of_another_form_names_the_backend(install):
    odd = Constant("odd", 7.0)
    odd.run = lambda call: np.zeros(3)
    install(odd)
    with pytest.raises(TypeError, match=r"backend 'odd' gave ndarray; wanted a pair \(out, lse\)"):
        aa.attention(X, X, X, backend="odd")


def test_recordings_nest_and_say_what_ran():
    with dispatch.recording() as outer:
        aa.attention(X, X, X, causal=True)
        with dispatch.recording() as inner:
            aa.attention_weights(X, X)
            aa.attention_stats(X, X)
    assert [(r.backend, r.operation) for r in outer] == [
        ("reference", "attention"),
        ("reference", "weights"),
        ("reference", "stats"),
    ]
    assert outer[1:] == inner
    assert outer[0].features == {"causal"}


class TestExplain:
    def test_table(self):
        found = aa.explain(X, X, X, causal=True)
        assert found.backend == "reference"
        assert found.forced_by is None
        verdicts = {name: verdict for name, verdict, _ in found.rows()}
        assert verdicts["reference"] == "runs"
        assert verdicts["numba"] == "refuses"
        assert repr(found).splitlines()[0] == (
            "<attention q (2, 3, 4) k (2, 3, 4) float32 numpy on cpu: causal>"
        )

    def test_order_and_names(self, install):
        install(Constant("numba", 7.0, {"causal"}), Constant("stranger", 7.0))
        rows = aa.explain(X, X, X, causal=True).rows()
        assert rows[:2] == [("numba", "runs", ""), ("reference", "could run", "")]
        assert ("stranger", "could run, by name", "") in rows

    def test_forced(self, install):
        install(Constant("picky", 7.0, ()))
        found = aa.explain(X, X, X, causal=True, backend="picky")
        assert found.backend is None
        assert found.forced_by == "backend="
        assert "forced by backend=" in repr(found)

    def test_without_values_it_is_about_the_weights(self):
        assert aa.explain(X, X).call.operation == "weights"

    def test_notes_tell_of_conversions(self):
        half = X.astype("f2")
        assert any("from float16 to float32" in note for note in aa.explain(half, half, half).notes)

    def test_html_is_escaped(self):
        page = aa.explain(X, X, X, causal=True)._repr_html_()
        assert "&lt;attention q (2, 3, 4)" in page
        assert "<td style='text-align:left'>reference</td>" in page

    def test_notes_that_fail_are_told(self, install):
        odd = Constant("odd", 7.0)
        odd.notes = lambda call: 1 / 0
        install(odd)
        assert aa.explain(X, X, X, backend="odd").notes == (
            "its notes() raised ZeroDivisionError: division by zero",
        )

    def test_bad_input_is_an_error_as_in_the_call(self):
        with pytest.raises(TypeError, match="v: wanted dtype float32 like q"):
            aa.explain(X, X, X.astype("f8"))
        with pytest.raises(TypeError, match="unexpected option 'casual'"):
            aa.explain(X, X, X, casual=True)
