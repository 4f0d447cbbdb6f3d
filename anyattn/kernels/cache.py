"""Compiled kernels on disk: private to the user, safe to share between processes, never trusted blindly.

One kernel is one file. It is written under another name in the same folder and moved into place, so a reader
sees a whole entry or none, and of several writers the last one stays. Its header holds the whole key and a
hash over everything, so what is truncated, zeroed (a machine that lost power: nothing is synced) or altered
reads as absent.

An entry is code, and loading one runs it. So neither a folder nor an entry is used that belongs to somebody
else or that somebody else may write to. Both are checked on the open file and names are looked up in the open
folder, so that nothing can be swapped between the check and the read. Windows has no such owners and modes;
there the folder is private by its place in the user's profile.

Whatever goes wrong here costs a compilation and a message (logger `anyattn.cache`, once a process), never a
call. Messages are logged and not warned because nothing in the caller's program is at fault, and because
warnings may be errors.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from anyattn.kernels.key import KernelKey

__all__ = ["Entry", "Store", "cache_folder", "say", "user_store"]

FOLDER_VARIABLE = "ANYATTN_CACHE_DIR"
SWITCH_VARIABLE = "ANYATTN_CACHE"
_SWITCH = {"": True, "1": True, "on": True, "0": False, "off": False}

_MAGIC = b"anyattn\n"
_FORMAT = 1
_SIZES = struct.Struct("<8sIQQ")  # magic, format, bytes of the key, bytes of the payload
_DIGEST_BYTES = hashlib.sha256().digest_size
_FILE = re.compile(r"anyattn-[a-z0-9_]+-[a-z0-9_]+-[0-9a-f]{32}\.(kernel|py)")
_UNFINISHED = re.compile(r"\.anyattn-[0-9a-f]{16}\.tmp")
# Seconds after which a file that is not in its place yet was left by a process that died.
_ABANDONED = 600

_POSIX = os.name == "posix"
# O_NONBLOCK: somebody's pipe in the place of an entry must not stop us.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

_log = logging.getLogger("anyattn.cache")
_said: set[str] = set()


class _UnusableError(Exception):
    """Why an entry is not used."""


class _UnusableFolderError(_UnusableError):
    """Why a whole folder is not used."""


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes
    ----------
    path : Path
    key : KernelKey or None
        None for source files and for damaged entries.
    problem : str or None
        Why the entry would not be loaded.
    size : int
        Bytes.
    age : float
        Seconds since it was written.
    """

    path: Path
    key: KernelKey | None
    problem: str | None
    size: int
    age: float


class Store:
    """The entries in one folder, which is made when the first is written.

    No method raises for what the file system does; it says it once and goes on without the cache.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, key: KernelKey) -> bytes | None:
        """The payload kept under a key, or None."""
        path = self.folder / f"{key.name}.kernel"
        try:
            with _Folder(self.folder) as folder:
                text, payload = _unpack(folder.read(path.name))
                if text != key.text:
                    raise _UnusableError("it is of another kernel")
                return payload
        except FileNotFoundError:
            return None
        except _UnusableFolderError as error:
            self._refuse(error)
            return None
        except (OSError, _UnusableError) as error:
            say(f"{path} is not used: {_reason(error)}; the kernel is compiled anew")
            return None

    def write(self, key: KernelKey, payload: bytes) -> bool:
        """Keep `payload` under a key; False, and a message, where that fails."""
        return self._put(f"{key.name}.kernel", _pack(key.text, payload))

    def write_source(self, key: KernelKey, source: str) -> Path | None:
        """The file that holds exactly `source`, written if need be; None, and a message, where that fails."""
        path, data = self.folder / f"{key.name}.py", source.encode()
        try:
            with _Folder(self.folder) as folder:
                if folder.read(path.name) == data:
                    return path
                raise _UnusableError("it does not hold the generated source")
        except FileNotFoundError:
            pass
        except _UnusableFolderError as error:
            self._refuse(error)
            return None
        except (OSError, _UnusableError) as error:
            say(f"{path} is not used: {_reason(error)}; it is written anew")
        return path if self._put(path.name, data) else None

    def entries(self) -> list[Entry]:
        """Every kernel and source file, by name.

        Raises
        ------
        OSError
            If the folder cannot be read, or is not private to the user.
        """
        try:
            with self._folder() as folder:
                return [entry for name in sorted(folder.names()) for entry in self._entry(folder, name)]
        except FileNotFoundError:
            return []

    def clear(self) -> tuple[int, int]:
        """Remove every file that the cache made; (files, bytes) that are gone.

        Raises
        ------
        OSError
            If the folder or a file cannot be changed, or the folder is not private to the user.
        """
        count = size = 0
        try:
            with self._folder() as folder:
                for name in folder.names():
                    with suppress(FileNotFoundError):  # another process was quicker
                        status = folder.status(name)
                        abandoned = time.time() - status.st_mtime > _ABANDONED
                        if _FILE.fullmatch(name) or (_UNFINISHED.fullmatch(name) and abandoned):
                            folder.remove(name)
                            size += status.st_size
                            count += 1
        except FileNotFoundError:
            pass
        return count, size

    def _folder(self) -> _Folder:
        try:
            return _Folder(self.folder)
        except _UnusableFolderError as error:
            raise PermissionError(f"kernel cache {self.folder}: {error}") from error

    def _refuse(self, error: _UnusableFolderError) -> None:
        say(f"kernel cache {self.folder} is not used: {error}; kernels are compiled anew")

    def _entry(self, folder: _Folder, name: str) -> Iterator[Entry]:
        match = _FILE.fullmatch(name)
        if match is None:
            return
        key, problem, size, changed = None, None, 0, time.time()
        try:
            status = folder.status(name)
            size, changed = status.st_size, status.st_mtime
            data = folder.read(name)
            if match[1] == "kernel":
                key = KernelKey.parse(_unpack(data)[0])
        except FileNotFoundError:  # cleared by another process
            return
        except (OSError, ValueError, _UnusableError) as error:
            problem = _reason(error)
        yield Entry(self.folder / name, key, problem, size, max(0.0, time.time() - changed))

    def _put(self, name: str, data: bytes) -> bool:
        try:
            _make_folder(self.folder)
            with _Folder(self.folder) as folder:
                folder.write(name, data)
        except _UnusableFolderError as error:
            self._refuse(error)
            return False
        except OSError as error:
            say(f"kernels are not kept in {self.folder}: {_reason(error)}; other processes compile them anew")
            return False
        return True


def user_store() -> Store | None:
    """The user's store, or None where the cache is off.

    Raises
    ------
    ValueError
        If an environment variable of the cache has a value that means nothing.
    """
    switch = os.environ.get(SWITCH_VARIABLE, "")
    if switch.lower() not in _SWITCH:
        raise ValueError(f"{SWITCH_VARIABLE}: wanted on, 1, off or 0, got {switch!r}")
    if not _SWITCH[switch.lower()]:
        return None
    folder = cache_folder()
    return None if folder is None else Store(folder)


def cache_folder() -> Path | None:
    """The folder of the user's kernels; None, and a message, where it cannot be told."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        path = Path(os.path.expanduser(chosen))  # noqa: PTH111  leaves an unknown user's ~ as it is
        if not path.is_absolute():
            raise ValueError(f"{FOLDER_VARIABLE}: wanted an absolute path, got {chosen!r}")
        return path
    try:
        import platformdirs
    except ImportError:
        say(
            f"kernels are not kept: platformdirs, which knows the user's cache folder, is not installed "
            f"(it comes with the extras numba and cupy); or name a folder in {FOLDER_VARIABLE}"
        )
        return None
    return Path(platformdirs.user_cache_dir("anyattn", appauthor=False)) / "kernels"


class _Folder:
    """An open folder that is private to the user; every name is looked up in it, wherever its path leads."""

    def __init__(self, path: Path):
        self.path = path
        self.fd: int | None = None
        if not _POSIX:
            path.stat()
            return
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _UnusableFolderError(_reason(error)) from error
        flaw = _flaw(os.fstat(self.fd))
        if flaw:
            self.close()
            raise _UnusableFolderError(f"it {flaw}")

    def __enter__(self) -> _Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def names(self) -> list[str]:
        return os.listdir(self.path if self.fd is None else self.fd)  # noqa: PTH208  of the open folder

    def status(self, name: str) -> os.stat_result:
        return os.stat(self._at(name), dir_fd=self.fd, follow_symlinks=False)

    def remove(self, name: str) -> None:
        os.unlink(self._at(name), dir_fd=self.fd)

    def read(self, name: str) -> bytes:
        """The bytes of a regular file that nobody else owns or may write to."""
        fd = os.open(self._at(name), _READ, dir_fd=self.fd)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _UnusableError("it is no regular file")
            flaw = _flaw(status)
            if flaw:
                raise _UnusableError(f"it {flaw}")
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Put a file in place of whatever has its name."""
        unfinished = f".anyattn-{secrets.token_hex(8)}.tmp"
        try:
            fd = os.open(self._at(unfinished), _CREATE, 0o600, dir_fd=self.fd)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            finally:
                os.close(fd)
            os.replace(self._at(unfinished), self._at(name), src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            with suppress(OSError):
                self.remove(unfinished)
            raise

    def _at(self, name: str) -> str:
        return name if self.fd is not None else str(self.path / name)


def _make_folder(path: Path) -> None:
    """Make `path`, and what is missing above it, for the user alone."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)


def _flaw(status: os.stat_result) -> str | None:
    """Why code is not taken from a file or folder of this status."""
    if not _POSIX:
        return None
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid} and this process to {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"has mode {stat.S_IMODE(status.st_mode):04o}, others may write to it (chmod go-w)"
    return None


def _pack(key: str, payload: bytes) -> bytes:
    text = key.encode()
    sizes = _SIZES.pack(_MAGIC, _FORMAT, len(text), len(payload))
    return b"".join((sizes, hashlib.sha256(sizes + text + payload).digest(), text, payload))


def _unpack(data: bytes) -> tuple[str, bytes]:
    """(key, payload) of an entry; the hash covers every byte of it but its own."""
    start = _SIZES.size + _DIGEST_BYTES
    if len(data) < start:
        raise _UnusableError(f"it is damaged: {len(data)} bytes")
    magic, version, key_size, payload_size = _SIZES.unpack_from(data)
    if magic != _MAGIC:
        raise _UnusableError("it is damaged: it does not begin as an entry does")
    if version != _FORMAT:
        raise _UnusableError(f"it has format {version}, this anyattn reads {_FORMAT}")
    if len(data) != start + key_size + payload_size:
        raise _UnusableError(f"it is damaged: {len(data)} bytes instead of {start + key_size + payload_size}")
    sizes, digest, body = data[: _SIZES.size], data[_SIZES.size : start], data[start:]
    if hashlib.sha256(sizes + body).digest() != digest:
        raise _UnusableError("it is damaged: its hash is wrong")
    return body[:key_size].decode(), body[key_size:]


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno == errno.ELOOP:
        return "it is a symbolic link"
    return error.strerror or str(error)


def say(text: str) -> None:
    """Log a message, once a process."""
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)
