"""How many threads a call gets: who is asked, in which order, and what the system says."""

from __future__ import annotations

import os
import threading

import pytest

import anyattn as aa
from anyattn_numba import thread_count as module
from anyattn_numba.thread_count import thread_count, usable_cpus


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """No variable is set, four CPUs are usable, and nothing is remembered."""
    for name in ("ANYATTN_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "usable_cpus", lambda: 4)
    module.process_threads.cache_clear()
    limit = module._limit.set(None)
    yield
    module._limit.reset(limit)
    module.process_threads.cache_clear()


@pytest.fixture
def environment(monkeypatch):
    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        module.process_threads.cache_clear()

    return change


def test_use_goes_before_everything(environment):
    assert thread_count() == 4
    environment(ANYATTN_NUM_THREADS="3")
    with aa.use(threads=9):
        assert thread_count() == 9
        with aa.use(threads=1):
            assert thread_count() == 1
    assert thread_count() == 3


@pytest.mark.parametrize(
    ("own", "openmp", "count"),
    [
        ("", "", 4),
        ("6", "2", 6),
        (" 6 ", "", 6),
        ("", "2", 2),
        ("", "8,2,1", 8),
        ("", "0", 4),
        ("", "many", 4),
    ],
)
def test_environment(environment, own, openmp, count):
    environment(ANYATTN_NUM_THREADS=own, OMP_NUM_THREADS=openmp)
    assert thread_count() == count


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "two", "2,1", "²"])
def test_wrong_environment(environment, value):
    environment(ANYATTN_NUM_THREADS=value)
    with pytest.raises(ValueError, match=f"ANYATTN_NUM_THREADS: wanted .* 1 or more; got '{value}'"):
        thread_count()


class TestThreadpoolctl:
    """Limits that threadpoolctl sets."""

    @pytest.fixture
    def ctl(self):
        pytest.importorskip("llvmlite.binding", reason="threadpoolctl finds the threads by this library")
        return pytest.importorskip("threadpoolctl", reason="not installed")

    def test_limit(self, ctl):
        with ctl.threadpool_limits(3):
            assert thread_count() == 3
            with ctl.threadpool_limits(1, user_api="anyattn"):
                assert thread_count() == 1
            assert thread_count() == 3
            with aa.use(threads=5):
                assert thread_count() == 5
        assert thread_count() == 4

    def test_limit_is_no_wish(self, ctl):
        with ctl.threadpool_limits(16):
            assert thread_count() == 4

    def test_limit_of_other_libraries(self, ctl):
        with ctl.threadpool_limits(1, user_api="blas"):
            assert thread_count() == 4

    def test_limit_is_of_this_thread(self, ctl):
        found = []
        with ctl.threadpool_limits(1):
            other = threading.Thread(target=lambda: found.append(thread_count()))
            other.start()
            other.join()
        assert found == [4]

    def test_a_limit_that_ends_is_none(self, ctl, environment):
        with ctl.threadpool_limits(2):
            assert thread_count() == 2
        environment(ANYATTN_NUM_THREADS="7")
        assert thread_count() == 7

    def test_information(self, ctl):
        (found,) = [info for info in ctl.threadpool_info() if info["user_api"] == "anyattn"]
        assert found["num_threads"] == 4
        assert found["version"] == aa.__version__
        with ctl.threadpool_limits(2):
            (found,) = [info for info in ctl.threadpool_info() if info["user_api"] == "anyattn"]
            assert found["num_threads"] == 2


class TestUsableCpus:
    """Affinity and control groups, by files like the system's."""

    @pytest.fixture(autouse=True)
    def _affinity(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)

    @pytest.fixture
    def group(self, tmp_path):
        """Write files of control groups, and give what is found with them."""

        def found(process: str, **files: str) -> int:
            (tmp_path / "process").write_text(process)
            for name, text in files.items():
                path = tmp_path / "groups" / name.replace("__", "/").replace("_dot_", ".")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text + "\n")
            return usable_cpus(tmp_path / "groups", tmp_path / "process")

        return found

    def test_without_groups(self, tmp_path):
        assert usable_cpus(tmp_path, tmp_path / "missing") == 8

    def test_without_affinity(self, monkeypatch, tmp_path):
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: 5)
        assert usable_cpus(tmp_path, tmp_path / "missing") == 5

    @pytest.mark.parametrize(
        ("quota", "count"),
        [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("1600000 100000", 8)],
    )
    def test_version_2(self, group, quota, count):
        assert group("0::/job", job__cpu_dot_max=quota) == count

    def test_version_2_least_of_the_groups_above(self, group):
        files = {
            "cpu_dot_max": "700000 100000",
            "a__cpu_dot_max": "200000 100000",
            "a__b__cpu_dot_max": "400000 100000",
        }
        assert group("0::/a/b", **files) == 2

    def test_version_2_in_a_container(self, group):
        assert group("0::/docker/cd34", cpu_dot_max="300000 100000") == 3

    @pytest.mark.parametrize(("quota", "count"), [("-1", 8), ("150000", 2)])
    def test_version_1(self, group, quota, count):
        name = "cpu,cpuacct__job__cpu_dot_cfs_"
        files = {f"{name}quota_us": quota, f"{name}period_us": "100000"}
        assert group("5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n", **files) == count

    def test_version_1_of_another_group(self, group):
        name = "cpu__other__cpu_dot_cfs_"
        files = {f"{name}quota_us": "100000", f"{name}period_us": "100000"}
        assert group("4:cpu:/job\n3:cpuset:/other\n", **files) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# JAX, which other tests import, warns of every fork; this child does not touch it.
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_a_forked_child_counts_anew(monkeypatch):
    assert thread_count() == 4
    monkeypatch.setattr(module, "usable_cpus", lambda: 3)
    assert thread_count() == 4
    child = os.fork()
    if child == 0:
        os._exit(thread_count())
    assert os.waitpid(child, 0)[1] >> 8 == 3
