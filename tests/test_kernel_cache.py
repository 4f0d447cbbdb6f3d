"""The kernel cache: complete keys, whole entries or none, private to the user, never in the way of a call."""

from __future__ import annotations

import errno
import inspect
import linecache
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from anyattn import cli
from anyattn.kernels import cache
from anyattn.kernels.cache import Store, cache_folder, user_store
from anyattn.kernels.key import KernelKey, code_digest, common_versions
from anyattn.kernels.source import load_source

KEY = KernelKey(
    backend="numba",
    kernel="forward",
    structure="j\ni\nle bool %0 %1\nvisible %2\nscore none",
    dtype="float32",
    accumulate="float32",
    head_dim=64,
    v_head_dim=32,
    target="x86_64-linux znver4 +avx2,+fma",
    tiles={"rows": 64, "keys": 128},
    features=("causal", "sinks"),
    settings={"fastmath": "False"},
    versions={"anyattn": "1.0", "numba": "0.61"},
    code="ab" * 32,
    signature="(float32, int64)",
)
OTHERS = {
    "backend": "cupy",
    "kernel": "backward",
    "structure": "j\ni\nle bool %1 %0\nvisible %2\nscore none",
    "dtype": "float16",
    "accumulate": "float64",
    "head_dim": 32,
    "v_head_dim": 64,
    "target": "x86_64-linux znver4 +avx2",
    "tiles": {"rows": 128, "keys": 64},
    "features": ("causal",),
    "settings": {"fastmath": "True"},
    "versions": {"anyattn": "1.0", "numba": "0.61.1"},
    "code": "cd" * 32,
    "signature": "(float32, int32)",
}
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    """Each test is a process to the rule that a message comes once a process."""
    monkeypatch.setattr(cache, "_said", set())
    monkeypatch.delenv("ANYATTN_CACHE", raising=False)
    monkeypatch.delenv("ANYATTN_CACHE_DIR", raising=False)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "kernels")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="anyattn.cache")
    return lambda: [record.getMessage() for record in caplog.records]


def entry(store, key=KEY):
    return store.folder / f"{key.name}.kernel"


# Keys


def test_every_part_of_a_key_changes_it():
    keys = [KEY, *(replace(KEY, **{name: value}) for name, value in OTHERS.items())]
    assert len(OTHERS) == len(KEY.__dataclass_fields__)
    assert len({key.text for key in keys}) == len({key.digest for key in keys}) == len(keys)
    assert all(key != KEY for key in keys[1:])


def test_equal_parts_give_equal_keys_in_any_order():
    same = replace(
        KEY,
        tiles={"keys": 128, "rows": 64},
        features=["sinks", "causal", "sinks"],
        versions={"numba": "0.61", "anyattn": "1.0"},
    )
    assert (same, same.text, same.digest, hash(same)) == (KEY, KEY.text, KEY.digest, hash(KEY))


def test_a_key_is_read_back_from_its_text():
    assert KernelKey.parse(KEY.text) == KEY
    assert '"le bool %0 %1"' in KEY.text
    assert str(KEY) == KEY.text
    for text in ("", "[]", "{}", KEY.text.replace("forward", "for/ward"), KEY.text + " ", '{"structure": 1}'):
        with pytest.raises(ValueError, match=r"key|Expecting|identifier"):
            KernelKey.parse(text)


def test_parts_that_run_into_each_other_stay_apart():
    one = replace(KEY, structure="a\nb", features=("x", "y"))
    for other in (
        replace(one, structure="a\\nb"),
        replace(one, structure='a",\n  "b'),
        replace(one, features=("x y",)),
        replace(one, features=('x", "y',)),
    ):
        assert other.text != one.text


def test_names_of_files_stay_in_their_folder():
    with pytest.raises(ValueError, match="kernel: wanted a lower-case identifier"):
        replace(KEY, kernel="../forward")
    assert KEY.name == f"anyattn-numba-forward-{KEY.digest}"


def test_common_versions():
    import platform

    import anyattn

    found = common_versions()
    assert found["anyattn"] == anyattn.__version__
    assert platform.python_version() in found["python"]
    assert found["generator"].isdigit()


def test_code_digest_covers_the_source_and_the_modules_it_calls(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    helper = tmp_path / "helper_of_a_kernel.py"
    helper.write_text("A = 1\n")
    module = importlib.import_module("helper_of_a_kernel")
    before = code_digest("source", [module])
    assert before == code_digest("source", [module])
    assert len({before, code_digest("other", [module]), code_digest("source")}) == 3
    helper.write_text("A = 2\n")
    assert code_digest("source", [module]) != before


# Entries


def test_what_is_written_is_read_by_its_key_alone(store, said):
    assert store.read(KEY) is None
    assert store.write(KEY, b"code")
    assert store.read(KEY) == b"code"
    assert store.write(KEY, b"newer")
    assert Store(store.folder).read(KEY) == b"newer"
    for name, value in OTHERS.items():
        assert store.read(replace(KEY, **{name: value})) is None
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY.name}.kernel"]
    assert said() == []


@pytest.mark.parametrize("payload", [b"", b"\0" * 7, bytes(range(256)) * 5000])
def test_any_payload(store, payload):
    assert store.write(KEY, payload)
    assert store.read(KEY) == payload


@posix
def test_files_are_the_users_alone(tmp_path):
    old = os.umask(0)
    try:
        store = Store(tmp_path / "new" / "kernels")
        assert store.write(KEY, b"code")
    finally:
        os.umask(old)
    assert [p.stat().st_mode & 0o777 for p in (store.folder.parent, store.folder, entry(store))] == [
        0o700,
        0o700,
        0o600,
    ]


def test_a_truncated_entry_is_absent_at_every_length(store, said):
    store.write(KEY, b"machine code")
    whole = entry(store).read_bytes()
    for length in range(len(whole)):
        entry(store).write_bytes(whole[:length])
        assert store.read(KEY) is None, length
    entry(store).write_bytes(whole + b"\0")
    assert store.read(KEY) is None
    assert "is damaged" in said()[0]
    assert store.write(KEY, b"machine code")
    assert store.read(KEY) == b"machine code"


def test_a_zeroed_entry_is_absent(store, said):
    store.write(KEY, b"machine code" * 100)
    whole = entry(store).read_bytes()
    for start in range(0, len(whole), 64):
        damaged = whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :]
        entry(store).write_bytes(damaged)
        assert store.read(KEY) is None, start
    assert "it does not begin as an entry does" in said()[0]
    assert "its hash is wrong" in said()[1]
    entry(store).write_bytes(bytes(len(whole)))
    assert store.read(KEY) is None


def test_an_entry_with_one_bit_flipped_is_absent_for_every_byte(store):
    store.write(KEY, b"machine code")
    whole = entry(store).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        entry(store).write_bytes(damaged)
        assert store.read(KEY) is None, position


def test_an_entry_of_another_kernel_is_absent(store, said):
    other = replace(KEY, head_dim=128)
    store.write(other, b"wrong code")
    entry(store, other).rename(entry(store))
    assert store.read(KEY) is None
    assert "it is of another kernel" in said()[0]


def test_an_entry_of_another_format_is_absent(store, said, monkeypatch):
    monkeypatch.setattr(cache, "_FORMAT", 2)
    store.write(KEY, b"code of tomorrow")
    monkeypatch.undo()
    assert store.read(KEY) is None
    assert "format 2" in said()[0]


def test_a_message_comes_once(store, said):
    store.write(KEY, b"code")
    entry(store).write_bytes(b"?")
    for _ in range(3):
        assert store.read(KEY) is None
    assert len(said()) == 1
    assert str(entry(store)) in said()[0]
    assert "compiled anew" in said()[0]


# Owners


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(store, said, mode):
    store.write(KEY, b"code")
    store.folder.chmod(mode)
    assert store.read(KEY) is None
    assert not store.write(replace(KEY, head_dim=1), b"code")
    assert len(list(store.folder.iterdir())) == 1
    assert [
        f"{store.folder} is not used: it has mode {mode:04o}, others may write to it" in m for m in said()
    ] == [True]
    with pytest.raises(PermissionError, match="others may write to it"):
        store.clear()
    store.folder.chmod(0o755)
    assert store.read(KEY) == b"code"


@posix
def test_an_entry_that_others_may_write_to_is_not_loaded(store, said):
    store.write(KEY, b"code")
    entry(store).chmod(0o620)
    assert store.read(KEY) is None
    assert "has mode 0620" in said()[0]
    assert store.write(KEY, b"own")
    assert store.read(KEY) == b"own"


@posix
def test_what_belongs_to_somebody_else_is_not_loaded(store, said, monkeypatch):
    store.write(KEY, b"code")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert store.read(KEY) is None
    assert not store.write(KEY, b"code")
    assert f"it belongs to user {owner} and this process to {owner + 1}" in said()[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_an_entry_of_another_user_in_a_folder_of_ours_is_not_loaded(store, said):
    store.write(KEY, b"code")
    os.chown(entry(store), 12345, 12345)
    assert store.read(KEY) is None
    assert "it belongs to user 12345" in said()[0]
    os.chown(store.folder, 12345, 12345)
    assert store.read(KEY) is None
    assert f"{store.folder} is not used: it belongs to user 12345" in said()[1]


@posix
def test_only_regular_files_are_read(store, said, tmp_path):
    store.write(KEY, b"code")
    elsewhere = tmp_path / "elsewhere"
    entry(store).rename(elsewhere)
    entry(store).symlink_to(elsewhere)
    assert store.read(KEY) is None
    assert "it is a symbolic link" in said()[0]
    entry(store).unlink()
    os.mkfifo(entry(store))
    assert store.read(KEY) is None
    assert "it is no regular file" in said()[1]
    assert store.write(KEY, b"code")
    assert store.read(KEY) == b"code"
    entry(store).unlink()
    entry(store).mkdir()
    assert store.read(KEY) is None
    assert not store.write(KEY, b"code")
    assert list(store.folder.iterdir()) == [entry(store)]


# Folders that cannot be written


def test_a_full_disk_costs_a_message_and_leaves_nothing(store, said, monkeypatch):
    store.write(KEY, b"old")
    write = os.write
    written = []

    def full(fd, data):
        if sum(written) >= 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(fd, data[:60]))
        return written[-1]

    monkeypatch.setattr(os, "write", full)
    assert not store.write(KEY, b"new" * 1000)
    assert store.write_source(KEY, "x = 1\n" * 100) is None
    monkeypatch.undo()
    assert "No space left on device" in said()[0]
    assert store.read(KEY) == b"old"
    assert len(list(store.folder.iterdir())) == 1


def test_short_writes_are_completed(store, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    assert store.write(KEY, b"code" * 100)
    monkeypatch.undo()
    assert store.read(KEY) == b"code" * 100


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    if mounted:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a file system takes root's rights on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, said):
    store = Store(small_disk / "kernels")
    keys = [replace(KEY, head_dim=n) for n in range(1, 9)]
    kept = [store.write(key, bytes([key.head_dim]) * 15_000) for key in keys]
    assert kept[0]
    assert not kept[-1]
    assert "No space left on device" in said()[0]
    for key, was_kept in zip(keys, kept, strict=True):
        assert store.read(key) == (bytes([key.head_dim]) * 15_000 if was_kept else None)
    assert len(list(store.folder.iterdir())) == sum(kept)
    assert store.clear()[0] == sum(kept)
    assert store.write(keys[-1], b"room again")


def test_a_read_only_disk(small_disk, said):
    store = Store(small_disk / "kernels")
    store.write(KEY, b"code")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert store.read(KEY) == b"code"
    assert not store.write(KEY, b"newer")
    assert "Read-only file system" in said()[0]
    assert store.read(KEY) == b"code"
    with pytest.raises(OSError, match="Read-only"):
        store.clear()


@posix
def test_a_folder_without_the_right_to_write(store, said):
    store.write(KEY, b"code")
    store.folder.chmod(0o500)
    if os.access(store.folder, os.W_OK):
        pytest.skip("root may write to any folder; test_a_read_only_disk covers root")
    assert store.read(KEY) == b"code"
    assert not store.write(KEY, b"newer")
    assert "Permission denied" in said()[0]


def test_a_folder_that_cannot_be_made(tmp_path, said):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "kernels")
    assert store.read(KEY) is None
    assert not store.write(KEY, b"code")
    assert store.write_source(KEY, "x = 1") is None
    assert "Not a directory; kernels are compiled anew" in said()[0]
    assert len(said()) == 2  # to read and to make it are two things


def test_a_folder_that_vanishes(store):
    store.write(KEY, b"code")
    entry(store).unlink()
    store.folder.rmdir()
    assert store.read(KEY) is None
    assert store.write(KEY, b"code")
    assert store.read(KEY) == b"code"


# Many at once

RACER = """
import hashlib, sys
from pathlib import Path
from anyattn.kernels.cache import Store
from anyattn.kernels.key import KernelKey
from dataclasses import replace

store, text, rounds = Store(Path(sys.argv[1])), Path(sys.argv[2]).read_text(), int(sys.argv[3])
me = int(sys.argv[4])
keys = [replace(KernelKey.parse(text), head_dim=n) for n in range(4)]
hits = 0
for n in range(rounds):
    key = keys[(n + me) % len(keys)]
    found = store.read(key)
    if found is not None:
        writer, dim, body = found[0], found[1], found[2:]
        assert dim == key.head_dim, "the payload of another key"
        assert body == bytes([writer]) * (5000 + 997 * writer), "a torn payload"
        hits += 1
    assert store.write(key, bytes([me, key.head_dim]) + bytes([me]) * (5000 + 997 * me))
    if n % 50 == 17:
        store.clear()
print(hits)
"""


def test_processes_that_write_and_read_the_same_keys(store, tmp_path):
    (tmp_path / "key").write_text(KEY.text)
    rounds = 300
    arguments = [sys.executable, "-c", RACER, str(store.folder), str(tmp_path / "key"), str(rounds)]
    racers = [
        subprocess.Popen([*arguments, str(me)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for me in range(1, 7)
    ]
    answers = [racer.communicate(timeout=50) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 6, [error for _, error in answers]
    assert [error for _, error in answers] == [""] * 6  # nothing was found damaged on the way
    assert sum(int(out) for out, _ in answers) > 6 * rounds // 2
    assert all(cache._FILE.fullmatch(path.name) for path in store.folder.iterdir())


def test_threads_that_write_one_key(store):
    def work(n):
        store.write(KEY, bytes([n]) * 10_000)
        return store.read(KEY)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(64)))
    assert all(payload is not None and set(Counter(payload).values()) == {10_000} for payload in found)


# Where


def test_the_folder_is_the_users_cache_folder(monkeypatch, tmp_path):
    platformdirs = pytest.importorskip("platformdirs", reason="platformdirs is not installed")
    assert cache_folder() == Path(platformdirs.user_cache_dir("anyattn", appauthor=False)) / "kernels"
    monkeypatch.setenv("ANYATTN_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    assert user_store().folder == tmp_path


@pytest.mark.parametrize("value", ["0", "off", "OFF"])
def test_the_cache_can_be_off(monkeypatch, tmp_path, value):
    monkeypatch.setenv("ANYATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ANYATTN_CACHE", value)
    assert user_store() is None


@pytest.mark.parametrize("value", ["", "1", "on"])
def test_the_cache_can_be_on(monkeypatch, tmp_path, value):
    monkeypatch.setenv("ANYATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ANYATTN_CACHE", value)
    assert user_store() is not None


def test_variables_that_mean_nothing_are_refused(monkeypatch):
    monkeypatch.setenv("ANYATTN_CACHE_DIR", "relative/path")
    with pytest.raises(ValueError, match="ANYATTN_CACHE_DIR: wanted an absolute path, got 'relative/path'"):
        user_store()
    monkeypatch.setenv("ANYATTN_CACHE", "maybe")
    with pytest.raises(ValueError, match="ANYATTN_CACHE: wanted on, 1, off or 0, got 'maybe'"):
        user_store()


def test_without_platformdirs_the_cache_is_off_and_says_so(monkeypatch, said):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert user_store() is None
    assert "platformdirs" in said()[0]
    assert "ANYATTN_CACHE_DIR" in said()[0]


# Source

SOURCE = "def double(x):\n    return x + x\n\n\ndef fail(x):\n    raise ArithmeticError(x)\n"


def test_generated_source_is_a_file_that_can_be_read_and_stepped_through(store):
    key = replace(KEY, code=code_digest(SOURCE), kernel="source_a")
    module = load_source(key, SOURCE, store)
    path = store.folder / f"{key.name}.py"
    assert path.read_text() == SOURCE
    assert module.__file__ == module.double.__code__.co_filename == str(path)
    assert module.double(4) == 8
    assert inspect.getsource(module.double) == "def double(x):\n    return x + x\n"
    assert load_source(key, SOURCE, store) is module
    assert sys.modules[module.double.__module__] is module


@pytest.mark.parametrize("folder", ["writable", "unwritable", "off"])
def test_a_traceback_shows_the_generated_line(store, tmp_path, folder):
    key = replace(KEY, code=code_digest(SOURCE), kernel=f"source_{folder}")
    (tmp_path / "file").write_text("")
    chosen = {"writable": store, "unwritable": Store(tmp_path / "file" / "x"), "off": None}[folder]
    module = load_source(key, SOURCE, chosen)
    linecache.checkcache()
    with pytest.raises(ArithmeticError) as caught:
        module.fail(1)
    assert "raise ArithmeticError(x)" in "".join(traceback.format_exception(caught.value))


def test_an_altered_source_file_is_never_run(store, said):
    key = replace(KEY, code=code_digest(SOURCE), kernel="source_altered")
    store.write_source(key, SOURCE)
    path = store.folder / f"{key.name}.py"
    path.write_text(SOURCE.replace("x + x", "0"))
    module = load_source(key, SOURCE, store)
    assert module.double(4) == 8
    assert path.read_text() == SOURCE
    assert "does not hold the generated source" in said()[0]


def test_one_key_has_one_source(store):
    key = replace(KEY, kernel="source_two")
    load_source(key, SOURCE, store)
    with pytest.raises(ValueError, match="has other source already"):
        load_source(key, SOURCE + "\n", store)


# The command line


def test_cache_lists_and_clears(monkeypatch, store, capsys):
    monkeypatch.setenv("ANYATTN_CACHE_DIR", str(store.folder))
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"0 kernels and 0 source files, 0 B, in {store.folder}\n"

    other = replace(KEY, dtype="float64", features=())
    store.write(KEY, bytes(2000))
    store.write(other, bytes(1_000_000))
    store.write_source(KEY, SOURCE)
    os.utime(entry(store), (0, entry(store).stat().st_mtime - 3 * 86400))
    bystander = store.folder / "anyattn-notes.py"
    bystander.write_text("mine")
    unfinished = [store.folder / f".anyattn-{n:016x}.tmp" for n in range(2)]
    for path in unfinished:
        path.write_text("of a process that was killed, or still writes")
    os.utime(unfinished[0], (0, unfinished[0].stat().st_mtime - 3600))
    assert cli.main(["cache"]) == 0
    listing = capsys.readouterr().out
    [line] = [line for line in listing.splitlines() if "float32" in line]
    size = f"{entry(store).stat().st_size / 1000:.1f} kB"
    assert line.split("  ")[-1] == (
        f"numba forward float32 D=64 Dv=32 keys=128 rows=64 causal sinks ({KEY.digest[:8]})"
    )
    assert size in line
    assert " 3 d " in line
    assert f"{KEY.name}.py" in listing
    assert "2 kernels and 1 source files" in listing
    assert "1.0 MB" in listing
    assert cli.main(["cache", "--keys"]) == 0
    assert ' "target": "x86_64-linux znver4 +avx2,+fma",' in capsys.readouterr().out

    entry(store, other).write_bytes(b"?")
    cli.main(["cache"])
    assert "not used, it is damaged: 1 bytes" in capsys.readouterr().out

    sizes = [path.stat().st_size for path in store.folder.iterdir() if path not in (bystander, unfinished[1])]
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 4 files, {sum(sizes) / 1000:.1f} kB, from {store.folder}\n"
    assert sorted(store.folder.iterdir()) == [unfinished[1], bystander]


def test_cache_says_when_it_is_off_or_not_private(monkeypatch, store, capsys):
    monkeypatch.setenv("ANYATTN_CACHE", "0")
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == "the kernel cache is off\n"
    monkeypatch.setenv("ANYATTN_CACHE", "maybe")
    assert cli.main(["cache"]) == 1
    assert "ANYATTN_CACHE: wanted on" in capsys.readouterr().err
    if os.name == "posix":
        monkeypatch.setenv("ANYATTN_CACHE", "on")
        monkeypatch.setenv("ANYATTN_CACHE_DIR", str(store.folder))
        store.write(KEY, b"")
        store.folder.chmod(0o777)
        assert cli.main(["cache", "--clear"]) == 1
        assert "others may write to it" in capsys.readouterr().err
        assert entry(store).exists()


# Numba

NUMBA_SOURCE = """import numba


@numba.njit(nogil=True)
def kernel(x, c):
    total = c
    for n in range(x.shape[0]):
        total += x[n] * {factor}
    return total
"""

NUMBA_RUN = """
import logging, sys
from pathlib import Path
import numpy as np
from anyattn.kernels import numba_store
from anyattn.kernels.cache import Store
from anyattn.kernels.key import KernelKey, code_digest
from anyattn.kernels.source import load_source

logging.basicConfig(format="%(message)s")
store = Store(Path(sys.argv[1]))
for factor in sys.argv[3:]:
    source = Path(sys.argv[2]).read_text().format(factor=factor)
    key = KernelKey("numba", "total", "visible none", "float32", "float32", 8, 8, numba_store.numba_target(),
                    settings=numba_store.numba_settings({"nogil": True}),
                    versions=numba_store.numba_versions(), code=code_digest(source))
    kernel = load_source(key, source, store).kernel
    attached = numba_store.attach(kernel, key, store)
    for dtype in ("f4", "f8", "i4"):
        x = np.arange(5).astype(dtype)
        found = kernel(x, 1.0)
        assert found == 1 + 10 * int(factor), (factor, dtype, found)
    print(attached, sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


@pytest.fixture
def numba_process(store, tmp_path):
    """Starts a process that compiles or loads three signatures of a kernel for each factor."""
    pytest.importorskip("numba", reason="Numba is not installed")
    (tmp_path / "template").write_text(NUMBA_SOURCE)

    def start(*factors, **environment):
        command = [sys.executable, "-W", "error::UserWarning", "-c", NUMBA_RUN]
        return subprocess.Popen(
            [*command, str(store.folder), str(tmp_path / "template"), *map(str, factors)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    return start


def finish(process):
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, (process.returncode, error)
    return out.split("\n")[:-1], error


def test_numba_code_survives_the_process_and_damage(numba_process, store):
    assert finish(numba_process(1)) == (["True 0 3"], "")
    kernels = sorted(store.folder.glob("*.kernel"))
    assert len(kernels) == 3

    whole = kernels[0].read_bytes()
    kernels[0].write_bytes(whole[: len(whole) // 2])
    kernels[1].write_bytes(bytes(kernels[1].stat().st_size))
    code = bytearray(kernels[2].read_bytes())
    for position in range(len(code) // 4, len(code), 101):
        code[position] ^= 0x40
    kernels[2].write_bytes(code)
    lines, said = finish(numba_process(1))
    assert lines == ["True 0 3"]
    assert said.count("is damaged") == 3
    assert finish(numba_process(1)) == (["True 3 0"], "")


def test_numba_processes_that_race_and_then_read(numba_process, store):
    """Numba's own cache loaded the code of another signature in 1 of 12 such rounds."""
    racers = [numba_process(1, 2) for _ in range(4)]
    assert [said for _, said in map(finish, racers)] == [""] * 4
    assert len(list(store.folder.glob("*.kernel"))) == 6
    assert finish(numba_process(2, 1)) == (["True 3 0", "True 3 0"], "")
    assert finish(numba_process(1, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""))[0] == ["True 0 3"]


def test_numba_settings_are_in_the_key(monkeypatch):
    pytest.importorskip("numba", reason="Numba is not installed")
    from numba.core import config

    from anyattn.kernels.numba_store import numba_settings

    options = {"fastmath": {"nsz", "contract"}, "nogil": True}
    found = numba_settings(options)
    assert (found["fastmath"], found["nogil"]) == ("['contract', 'nsz']", "True")
    monkeypatch.setattr(config, "BOUNDSCHECK", 1)
    assert numba_settings(options) != found


def test_numba_with_a_full_disk(numba_process, small_disk, tmp_path):
    (small_disk / "kernels").mkdir(mode=0o700)
    (tmp_path / "kernels").symlink_to(small_disk / "kernels")
    lines, said = finish(numba_process(1, 2))
    assert [line.split()[1] for line in lines] == ["0", "0"]
    assert said.count("No space left on device") == 1


def test_numba_entries_that_are_whole_but_not_loadable(store, said):
    """A pickle of another Numba under an equal key, or a bug: the kernel is compiled anew."""
    pytest.importorskip("numba", reason="Numba is not installed")
    import numpy as np

    from anyattn.kernels import numba_store

    key = replace(KEY, kernel="unloadable", target=numba_store.numba_target())
    source = NUMBA_SOURCE.format(factor=3)
    kernel = load_source(key, source, store).kernel
    assert numba_store.attach(kernel, key, store)
    cached = kernel._cache
    x = np.arange(3.0)
    import numba

    signature = (numba.typeof(x), numba.typeof(1))
    own = cached._entry(signature, tuple(numba_store.numba_target().split(" ")))
    store.write(own, b"no pickle")
    assert kernel(x, 1) == 10
    assert "does not load, and is compiled anew" in said()[0]
    kept, reduced = pickle.loads(store.read(own))
    assert kept[0] == signature
    assert len(reduced) == 9


def test_numba_that_differs_inside_switches_the_cache_off(store, said, monkeypatch):
    numba = pytest.importorskip("numba", reason="Numba is not installed")
    from numba.core import caching

    from anyattn.kernels import numba_store

    @numba.njit
    def kernel(x):
        return x + 1

    numba_store._incompatibility.cache_clear()
    monkeypatch.setattr(caching.NullCache, "load_many", lambda self: None, raising=False)
    assert not numba_store.attach(kernel, KEY, store)
    assert "is not as anyattn knows it: its caches differ in load_many" in said()[0]
    numba_store._incompatibility.cache_clear()
    monkeypatch.undo()
    assert kernel(1) == 2
    assert not numba_store.attach(kernel, KEY, None)
    assert not store.folder.exists()


def test_code_with_addresses_is_not_kept(store, said):
    pytest.importorskip("numba", reason="Numba is not installed")
    from anyattn.kernels import numba_store

    source = (
        "import ctypes\n\nimport numba\n\n"
        "address = ctypes.CDLL(None).abs\n"
        "address.argtypes, address.restype = [ctypes.c_int], ctypes.c_int\n\n\n"
        "@numba.njit\ndef kernel(x):\n    return address(x)\n"
    )
    key = replace(KEY, kernel="addresses")
    kernel = load_source(key, source, store).kernel
    assert numba_store.attach(kernel, key, store)
    assert kernel(-3) == 3
    assert "it holds addresses of this process" in said()[0]
    assert list(store.folder.glob("*.kernel")) == []


def test_what_the_printer_prints_is_kept_and_runs_again(store):
    """A printed program with a loop around it, compiled by one module and loaded by the next."""
    pytest.importorskip("numba", reason="Numba is not installed")
    import numpy as np

    import anyattn as aa
    from anyattn.describe import Options, describe
    from anyattn.expr.print_numba import numba_arguments, numba_source
    from anyattn.expr.program import lower
    from anyattn.kernels import numba_store

    x = np.zeros((1, 4, 40, 8), "f4")
    options = Options(
        mask=aa.masks.causal() & aa.masks.sliding_window(5) | aa.masks.global_tokens(3),
        score_mod=aa.scores.alibi(4),
    )
    call = describe("attention", x, x, x, options)
    program = lower(call.visible, call.score)
    source = numba_source(program, "float32") + (
        '\n\n@numba.njit(error_model="numpy")\n'
        "def kernel(out, captured):\n"
        "    for i in range(out.shape[0]):\n"
        "        for j in range(out.shape[1]):\n"
        "            if visible(0, 1, i, i, j, *captured):\n"
        "                out[i, j] = score(np.float32(1), 0, 1, i, i, j, *captured)\n"
    )
    key = replace(
        KEY,
        structure=program.text,
        target=numba_store.numba_target(),
        code=code_digest(source),
        kernel="printed",
    )
    i, j = np.arange(40)[:, None], np.arange(40)
    wanted = np.where((j <= i) & (i - j <= 5) | (i < 3) | (j < 3), 1 - abs(i - j) / 16, 0)
    for hits in (0, 1):
        kernel = load_source(key, source, store).kernel
        assert numba_store.attach(kernel, key, store)
        out = np.zeros((40, 40), "f4")
        kernel(out, numba_arguments(program, "float32", ()))
        np.testing.assert_allclose(out, wanted, rtol=1e-6)
        assert sum(kernel.stats.cache_hits.values()) == hits
        del sys.modules[key.name.replace("-", "_")]
