"""The conformance kit itself: it must catch what it claims to catch, and count what it skips."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from anyattn.backend import CAPABILITIES, Backend
from anyattn.reference import backend as reference_backend
from anyattn.testing import plugin, running
from anyattn.testing.bad_input import bad_calls
from anyattn.testing.case import Entry, Given, Plant, Value, call
from anyattn.testing.cases import all_cases, gradient_cases, pairwise, regenerate_pairs
from anyattn.testing.expected import Expected, expected, expected_gradients, mismatch
from anyattn.testing.libraries import ALL_DTYPES, LIBRARIES
from anyattn.testing.memory import MEMORIES, lay_out
from anyattn.testing.strategies import EVERYTHING, calls

pytest_plugins = ["pytester"]

NUMPY = LIBRARIES["numpy"]


def plain(name: str = "plain", **options):
    return call(name, "here", "a test of the kit", **options)


def reference(**changes):
    """What `skip_reason` reads of a backend."""
    declared = {
        "name": "stub",
        "arrays": ("*",),
        "devices": ("*",),
        "dtypes": frozenset({"float32", "float64"}),
        "capabilities": EVERYTHING,
    }
    return SimpleNamespace(**(declared | changes))


class Hidden(dict):
    """Options that a case does not find when it names its needs."""

    def get(self, name, default=None):
        return default


class TestCases:
    def test_the_pairs_are_all_there(self):
        rows = pairwise.rows()
        for first, second in itertools.combinations(pairwise.FACTORS, 2):
            found = {(row[first], row[second]) for row in rows}
            wanted = set(itertools.product(pairwise.FACTORS[first], pairwise.FACTORS[second]))
            assert found == wanted, f"{first} and {second} miss {wanted - found}"

    def test_the_pairs_are_what_the_generator_gives(self):
        pytest.importorskip("allpairspy")
        assert regenerate_pairs.table() == pairwise.ROWS.strip()

    def test_values_follow_from_the_name(self):
        first, again, other = plain("one").arrays(), plain("one").arrays(), plain("two").arrays()
        assert (first["q"].values == again["q"].values).all()
        assert not (first["q"].values == other["q"].values).any()

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_values_are_those_of_their_dtype(self, dtype):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        values = plain(dtype=dtype).arrays()["q"].values
        rounded = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
        assert (rounded.astype(np.float64) == values).all()
        assert len(np.unique(values)) > values.size // 2

    def test_plants_lie_beyond_the_lengths_of_every_entry_that_shares_them(self):
        case = plain(
            q_batch=(2, 3), k_batch=(3,), kv_lengths=Given("kv_lengths", ((2, 9, 5), (4, 1, 5))),
            plants=(Plant("k", "beyond kv_lengths", np.nan),),
        )  # fmt: skip
        hidden = np.isnan(case.arrays()["k"].values).all(axis=(1, 3))
        assert hidden.sum(axis=1).tolist() == [5, 0, 4]
        assert not np.isnan(case.arrays()["k"].values[0, :, :4]).any()

    def test_needs_follow_from_the_options(self):
        case = plain(causal=True, softcap=None, sinks=[1.0, 2.0], heads=2, kv_heads=1, also={"gradients"})
        assert case.needs == {"causal", "sinks", "grouped_heads", "gradients"}
        assert plain(operation="stats").needs == {"stats"}

    def test_every_case_has_an_expectation_that_says_something(self):
        """A bound as large as the values would pass anything."""
        for case in all_cases():
            for name, wanted in expected(case).items():
                finite = np.isfinite(wanted.values)
                bound = np.broadcast_to(wanted.bound, finite.shape)[finite]
                assert np.isfinite(bound).all(), (case.name, name)
                size = max(1.0, np.abs(wanted.values[finite]).max(initial=0.0))
                assert bound.max(initial=0.0) <= 0.12 * size, (case.name, name)

    def test_gradients_are_finite_and_bounded(self):
        for case in gradient_cases():
            for name, wanted in expected_gradients(case).items():
                assert np.isfinite(wanted.values).all(), (case.name, name)
                assert np.isfinite(wanted.bound).all(), (case.name, name)


class TestBounds:
    """Bounds hold for plain implementations in the accumulation dtype and for nothing worse."""

    CASE = plain("bounds", heads=1, q_len=9, k_len=300, dim=64, return_lse=True)

    def attend(self, case, dtype, weights_dtype=None):
        q, k, v = (case.arrays()[name].values.astype(dtype) for name in "qkv")
        scores = (q @ np.swapaxes(k, -1, -2)) * np.asarray(case.q[-1] ** -0.5, dtype)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        lse = np.log(p.sum(axis=-1)) + scores.max(axis=-1)
        p = p / p.sum(axis=-1, keepdims=True)
        p = p if weights_dtype is None else p.astype(weights_dtype).astype(dtype)
        return {"out": p @ v, "lse": lse}

    def wrong(self, case, results):
        return [name for name, e in expected(case).items() if mismatch(results[name], e, name)]

    def test_float32_is_near_enough_for_float32_and_not_for_float64(self):
        assert self.wrong(self.CASE, self.attend(self.CASE, np.float32)) == []
        double = replace(self.CASE, dtype="float64")
        assert self.wrong(double, self.attend(double, np.float64)) == []
        assert self.wrong(double, self.attend(double, np.float32)) == ["out", "lse"]

    def test_16_bit_weights_are_allowed_to_16_bit_inputs_alone(self):
        few = plain("few keys", heads=1, q_len=9, k_len=11, dim=8, return_lse=True)
        half = replace(few, dtype="float16")
        assert self.wrong(half, self.attend(half, np.float32, np.float16)) == []
        assert self.wrong(few, self.attend(few, np.float32, np.float16)) == ["out"]

    def test_16_bit_accumulation_is_too_far(self):
        half = replace(self.CASE, dtype="float16")
        assert "lse" in self.wrong(half, self.attend(half, np.float16))

    def test_a_dropped_key_is_seen(self):
        results = self.attend(self.CASE, np.float32)
        short = plain("bounds", heads=1, q_len=9, k_len=300, dim=64, return_lse=True, window=(298, None))
        assert self.wrong(short, results) == ["out", "lse"]

    def test_mismatch_names_the_worst_element(self):
        wanted = Expected(np.zeros((2, 3)), np.full((2, 3), 1e-3), "float32")
        actual = np.zeros((2, 3))
        assert mismatch(actual, wanted, "x") is None
        actual[0, 1], actual[1, 2] = 0.002, 0.005
        message = mismatch(actual, wanted, "x")
        assert message is not None
        assert "2 of 6" in message
        assert "(1, 2)" in message
        assert "error / bound = 5" in message

    @pytest.mark.parametrize(
        ("value", "got", "fine"),
        [
            (np.nan, np.nan, True),
            (np.nan, 1.0, False),
            (np.nan, np.inf, False),
            (np.inf, np.inf, True),
            (np.inf, -np.inf, False),
            (-np.inf, -np.inf, True),
            (-np.inf, np.nan, False),
            (1.0, np.nan, False),
            (1.0, np.inf, False),
        ],
    )
    def test_special_values_must_be_the_same(self, value, got, fine):
        wanted = Expected(np.array([value]), np.array([1.0]), "float32")
        assert (mismatch(np.array([got]), wanted, "x") is None) == fine

    def test_lse_beside_nan_may_be_infinite(self):
        wanted = Expected(np.array([np.nan]), np.array([1.0]), "float32", nan_or_inf=True)
        assert mismatch(np.array([np.inf]), wanted, "x") is None
        assert mismatch(np.array([0.0]), wanted, "x") is not None


class TestSkips:
    def test_by_declarations_alone(self):
        numpy, jax = LIBRARIES["numpy"], LIBRARIES["jax"]
        assert running.skip_reason(plain(), reference(), numpy) is None
        assert running.skip_reason(plain(), reference(arrays=("torch.Tensor",)), numpy) == (
            "backend",
            "stub does not take numpy.ndarray",
        )
        assert running.skip_reason(plain(dtype="float16"), reference(), numpy) == (
            "backend",
            "stub does not take float16",
        )
        bare = reference(capabilities=frozenset({"causal"}))
        assert running.skip_reason(plain(causal=True), bare, numpy) is None
        assert running.skip_reason(plain(softcap=2.0, causal=True), bare, numpy) == (
            "backend",
            "stub does not declare softcap",
        )
        assert running.skip_reason(plain(), reference(devices=("cuda",)), numpy) == (
            "backend",
            "stub does not run on cpu",
        )
        if jax.missing() is None:
            assert jax.lacks(plain(dtype="float64")) == "jax has no float64"
            assert jax.lacks(plain(memory="reversed")) == "jax has no reversed arrays"
            wide = LIBRARIES["jax-x64"]
            assert wide.lacks(plain(dtype="float64")) is None
            assert wide.lacks(plain(mask=Entry("masks", "documents", (Given("ids", [0, 0, 1]),)))) is None
            assert wide.lacks(replace(plain(), family="pairs")) is None
            assert "64-bit numbers are in no array" in wide.lacks(plain())
        chunks = LIBRARIES["dask-chunks"]
        assert chunks.lacks(plain()) is None
        assert chunks.lacks(replace(plain(dtype="float64"), family="pairs")) is None
        assert "float64 whole" in chunks.lacks(plain(dtype="float64"))

    def test_a_case_that_another_variant_of_the_session_runs(self):
        eager, both = LIBRARIES["jax"], ("jax", "jax-jit")
        if eager.missing() is not None:
            pytest.skip(eager.missing())
        written = plain(mask=Entry("masks", "causal"))
        tracing = reference(dtypes=ALL_DTYPES, capabilities=EVERYTHING | {"traced"})
        assert running.run_instead(written, tracing, eager, both) == "jax-jit runs the same operations"
        assert running.run_instead(replace(plain(), dtype="float16"), tracing, eager, both)
        wide = replace(written, dtype="float64"), tracing, LIBRARIES["jax-x64"]
        assert (
            running.run_instead(*wide, ("jax-x64", "jax-x64-jit")) == "jax-x64-jit runs the same operations"
        )
        for library, case, backend, chosen in (
            (eager, plain(mask=Given("mask", ((True,),), "bool")), tracing, both),
            (eager, replace(written, family="pairs"), tracing, both),
            (eager, replace(written, operation="ring"), tracing, both),
            (eager, written, tracing, ("jax",)),
            (eager, written, reference(), both),
            (LIBRARIES["jax-jit"], written, tracing, both),
            (LIBRARIES["jax-x64"], written, tracing, both),
            (LIBRARIES["jax-x64-jit"], written, tracing, ("jax-x64-jit", *both)),
            (NUMPY, written, tracing, ("numpy", *both)),
        ):
            assert running.run_instead(case, backend, library, chosen) is None
        assert not any(running.run_instead(bad, tracing, eager, both) for bad in bad_calls())

    def test_what_a_library_adds_to_the_needs(self):
        jit, eager = LIBRARIES["jax-jit"], LIBRARIES["jax"]
        assert jit.needs(plain(causal=True)) == {"causal", "traced"}
        assert eager.needs(plain(causal=True)) == {"causal"}
        assert eager.needs(plain(also={"gradients"})) == {"gradients", "traced"}
        assert not any(library.needs(bad) for library in (jit, eager) for bad in bad_calls())

    def test_lazy_and_traced_libraries_need_the_capability(self):
        if LIBRARIES["dask"].missing() is not None:
            pytest.skip("dask is not installed")
        assert running.skip_reason(plain(), reference(), LIBRARIES["dask"]) == (
            "backend",
            "stub does not declare traced",
        )


class TestLibraries:
    @pytest.mark.parametrize("memory", MEMORIES)
    def test_memory(self, memory):
        values = np.broadcast_to(np.arange(12.0).reshape(1, 3, 4), (2, 3, 4))
        array = lay_out(values, memory)
        assert (array == values).all()
        facts = {
            "plain": array.flags.c_contiguous and array.flags.writeable,
            "readonly": not array.flags.writeable,
            "reversed": all(stride < 0 for stride in array.strides),
            "transposed": array.flags.f_contiguous,
            "gapped": array.strides[-1] == 2 * array.itemsize,
            "repeated": array.strides[0] == 0,
        }
        assert facts[memory]

    @pytest.mark.parametrize("name", LIBRARIES)
    def test_values_go_in_and_come_back(self, name):
        library = LIBRARIES[name]
        if library.missing() is not None:
            pytest.skip(library.missing())
        case = plain(bias=Given("bias", ((0.5,),), "float32"), kv_lengths=Given("kv_lengths", 5))
        with library.session():
            for value in case.arrays().values():
                array = library.array(value)
                assert array.shape == value.values.shape
                assert (library.numpy(array) == value.values).all()
                assert library.owns(array)
                if value.dtype != "int":
                    assert library.dtype(array) == value.dtype
        assert not library.owns([1.0])

    def test_strict_creations_must_be_explicit(self):
        xp = pytest.importorskip("array_api_strict")
        library = LIBRARIES["array_api_strict"]
        value = Value(np.zeros(3, np.float32), "float32")
        with library.session():
            array = library.array(value)
            with pytest.raises(AssertionError, match="zeros was called without dtype and device"):
                xp.zeros(3)
            with pytest.raises(AssertionError, match="arange was called without device"):
                xp.arange(3, dtype=xp.int64)
            assert xp.zeros(3, dtype=xp.float32, device=array.device).shape == (3,)
            assert xp.asarray(array) is not None
        assert xp.zeros(3).shape == (3,)

    def test_dask_must_stay_lazy(self):
        pytest.importorskip("dask.array")
        library = LIBRARIES["dask"]
        array = library.array(Value(np.zeros(3), "float64"))
        with pytest.raises(AssertionError, match="computed inside the call"):
            library.prepare(lambda x: {"out": x["q"].compute()})({"q": array})
        assert library.prepare(lambda x: {"out": x["q"] + 1})({"q": array})["out"].sum().compute() == 3


class TestRunning:
    """A run that is wrong in any way fails."""

    CASE = plain("running", causal=True, return_lse=True)

    def run(self, monkeypatch, change):
        """Run with the results of the call changed."""
        perform = running.perform
        monkeypatch.setattr(
            running, "perform", lambda case, arrays, backend: change(perform(case, arrays, backend), arrays)
        )
        running.check_values(self.CASE, NUMPY, "reference")

    def test_right(self, monkeypatch):
        self.run(monkeypatch, lambda results, _: results)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r, _: {"out": r["out"]}, "returned"),
            (lambda r, _: r | {"out": r["out"] + np.float32(1e-4)}, "elements are wrong"),
            (lambda r, _: r | {"out": r["out"].astype(np.float64)}, "dtype float64, wanted float32"),
            (lambda r, _: r | {"lse": r["lse"][..., :-1]}, "shape"),
            (lambda r, _: r | {"out": r["out"].tolist()}, "is not an array of numpy"),
            (lambda r, a: [r, a["k"].fill(0)][0], "k was written to"),
        ],
        ids=["missing", "value", "dtype", "shape", "library", "input"],
    )
    def test_wrong(self, monkeypatch, change, message):
        with pytest.raises(AssertionError, match=message):
            self.run(monkeypatch, change)

    def test_another_backend_ran(self, monkeypatch):
        perform = running.perform
        monkeypatch.setattr(running, "perform", lambda case, arrays, _: perform(case, arrays, "reference"))
        with pytest.raises(AssertionError, match=r"shows \['reference'\], not numba alone"):
            running.check_values(self.CASE, NUMPY, "numba")

    def test_a_case_must_name_what_it_needs(self):
        case = replace(self.CASE, options={"causal": True}, also=frozenset())
        object.__setattr__(case, "options", Hidden({"causal": True}))
        with pytest.raises(AssertionError, match=r"needs \['causal'\], and the case does not say so"):
            running.check_values(case, NUMPY, "reference")

    def test_no_backend_ran(self, monkeypatch):
        monkeypatch.setattr(running, "perform", lambda case, arrays, _: {})
        with pytest.raises(AssertionError, match="shows no backend"):
            running.check_values(self.CASE, NUMPY, "reference")

    def test_arrays_of_another_call(self, install):
        class Keeping(Backend):
            name, arrays, devices = "keeping", ("*",), ("*",)
            capabilities = frozenset(CAPABILITIES)
            keep = frozenset({"v"})

            def run(self, call):
                return reference_backend.run(call)

            def prepare(self, call):
                def run(q, k, v, *others):
                    given = {"q": q, "k": k, "v": v}
                    return self.run(replace(call, **{x: given[x] for x in given if x not in self.keep}))

                return run

        install(backend := Keeping())
        with pytest.raises(AssertionError, match=r"out: .* elements are wrong"):
            running.check_values(self.CASE, NUMPY, "keeping")
        backend.keep = frozenset()
        running.check_values(self.CASE, NUMPY, "keeping")

    def test_other_bits_the_second_time(self, monkeypatch):
        perform, noise = running.perform, iter([0.0, 1e-7])

        def shaky(case, arrays, backend):
            results = perform(case, arrays, backend)
            return results | {"lse": results["lse"] + np.float32(next(noise))}

        monkeypatch.setattr(running, "perform", shaky)
        with pytest.raises(AssertionError, match="lse differs between two runs"):
            running.check_same_bits(self.CASE, NUMPY, "reference")


def test_drawn_calls_reach_every_capability():
    seen: set[str] = set()

    @settings(
        max_examples=200,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def look(case):
        seen.update(case.needs)
        assert expected(case)

    look()
    assert seen == EVERYTHING


def test_drawn_calls_keep_to_what_is_declared():
    @settings(
        max_examples=100,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(dtypes={"float32"}, capabilities={"causal", "kv_lengths", "softcap"}))
    def look(case):
        assert case.needs <= {"causal", "kv_lengths", "softcap"}
        assert case.dtype == "float32"

    look()


class TestPlugin:
    def test_importing_it_imports_no_array_library(self):
        code = (
            "import sys, json\n"
            "import anyattn.testing.plugin\n"
            "heavy = ('numpy', 'hypothesis', 'torch', 'jax', 'dask')\n"
            "print(json.dumps([m for m in heavy if m in sys.modules]))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(found.stdout) == []

    MODULE = """
        import pytest
        from types import SimpleNamespace
        from anyattn.testing import plugin
        from anyattn.testing.case import call

        plugin._backend = lambda config: SimpleNamespace(
            name="stub", arrays=("*",), devices=("*",), dtypes=frozenset({"float32"}),
            capabilities=frozenset({"causal", "sinks"}),
        )

        def make():
            yield call("plain", "f", "w")
            yield call("causal", "g", "w", causal=True)
            yield call("sinks", "f", "w", sinks=[0.0, 1.0], dtype="SINKS_DTYPE")
            yield call("softcap", "f", "w", softcap=1.0)

        @pytest.mark.anyattn_cases.with_args(make)
        def test_it(anyattn_run):
            assert anyattn_run.library.name == "numpy"
    """

    def test_a_declared_capability_without_a_passing_case_fails_the_session(self, pytester):
        pytester.makepyfile(test_conformance=self.MODULE.replace("SINKS_DTYPE", "float16"))
        result = pytester.runpytest_subprocess()
        result.assert_outcomes(passed=2, skipped=2)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(
            [
                "numpy: 2 passed, 2 skipped",
                "*1 skipped: stub does not declare softcap",
                "*1 skipped: stub does not take float16",
                "FAILED stub declares sinks, and no case that needs it passed",
            ]
        )

    def test_all_declared_capabilities_passing_is_success(self, pytester):
        pytester.makepyfile(test_conformance=self.MODULE.replace("SINKS_DTYPE", "float32"))
        result = pytester.runpytest_subprocess()
        result.assert_outcomes(passed=3, skipped=1)
        assert result.ret == pytest.ExitCode.OK

    def test_a_selection_is_not_held_to_every_capability(self, pytester):
        pytester.makepyfile(test_conformance=self.MODULE.replace("SINKS_DTYPE", "float16"))
        result = pytester.runpytest_subprocess("-k", "plain")
        result.assert_outcomes(passed=1, deselected=3)
        assert result.ret == pytest.ExitCode.OK

    @pytest.mark.parametrize("more", [(), ("-n1",)])
    def test_a_family_is_a_selection(self, pytester, more):
        if more:
            pytest.importorskip("xdist", reason="pytest-xdist is not installed")
        pytester.makepyfile(test_conformance=self.MODULE.replace("SINKS_DTYPE", "float16"))
        result = pytester.runpytest_subprocess("--anyattn-family=g", *more)
        result.assert_outcomes(passed=1, deselected=0 if more else 3)
        assert result.ret == pytest.ExitCode.OK
        result.stdout.fnmatch_lines(["numpy: 1 passed"])
        result = pytester.runpytest_subprocess("--anyattn-family=h")
        assert result.ret != pytest.ExitCode.OK
        output = "\n".join([*result.outlines, *result.errlines])
        assert "--anyattn-family: no family 'h'; there are: f, g" in output

    def test_what_takes_long_runs_where_it_is_asked_for(self, pytester):
        (seldom,) = plugin.SELDOM
        module = self.MODULE.replace("SINKS_DTYPE", "float32").replace(
            '"causal", "g"', f'"causal", "{seldom}"'
        )
        pytester.makepyfile(test_conformance=module)
        asked = (("-v", 2, 1), ("--anyattn-full", 3, 1), (f"--anyattn-family={seldom}", 1, 0))
        for option, passed, skipped in asked:
            found = pytester.runpytest_subprocess(option)
            found.assert_outcomes(passed=passed, skipped=skipped, deselected=3 * (passed == 1))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--anyattn-backend", "nonsense"), "*no backend 'nonsense'; installed: *reference*"),
            (("--anyattn-library", "nonsense"), "*no library 'nonsense'; there are: numpy, *"),
        ],
    )
    def test_unknown_names_list_the_known(self, pytester, options, message):
        result = pytester.runpytest_subprocess("--pyargs", "anyattn.testing", *options)
        assert result.ret != pytest.ExitCode.OK
        output = [*result.outlines, *result.errlines]
        assert any(message.strip("*").split("*")[0] in line for line in output), output

    def test_a_stranger_runs_the_kit_by_its_name(self, pytester):
        result = pytester.runpytest_subprocess("--pyargs", "anyattn.testing", "-k", "softcap and float32")
        assert result.ret == pytest.ExitCode.OK
        result.stdout.fnmatch_lines(["*anyattn conformance of reference*", "numpy: * passed"])

    def test_drawn_calls_are_no_more_than_asked_for(self, pytester):
        pytester.makepyfile(
            counting="""
            def pytest_collection_finish(session):
                from anyattn.testing import test_conformance
                test_conformance.check_values = lambda *arguments: print("a drawn call")
            """
        )
        options = ("-k", "drawn_calls", "--anyattn-examples=3", "-s", "-p", "counting")
        result = pytester.runpytest_subprocess("--pyargs", "anyattn.testing", *options)
        assert result.ret == pytest.ExitCode.OK
        assert result.stdout.str().count("a drawn call") == 3


def test_every_case_of_the_kit_has_a_family():
    """Calls to refuse too, which `--anyattn-family` meets when it sorts what was collected."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "anyattn.testing", "--collect-only", "-q"]
    options = ["--anyattn-backend=reference", "--anyattn-library=numpy", "--anyattn-family=bad input"]
    found = subprocess.run([*command, *options], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_bad_input" in found.stdout
    assert "test_values" not in found.stdout
