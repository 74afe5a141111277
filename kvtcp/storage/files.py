"""The disk seam: the only module of kvtcp that reads and writes data files.

All storage code receives a `Disk` and calls nothing else, so that a test can pass a disk on which the n-th call fails.
`OsDisk` is the real one. It does exactly one thing per call and never retries: after a failed write or fsync the
content of the file is unknown, so the caller gives the file up.

A file becomes durable by these calls, in this order:

    create, write..., sync, close      the bytes of a file are on the disk, under a name that no reader uses
    sync_directory(its directory)      the name is on the disk
    rename, sync_directory(parent)     published: the final name is there after a power cut, with all of its bytes

A file is synced by fdatasync where the system has it: its bytes and size, without its times. If the size is unchanged,
that saves a write to the journal of the file system.

Every error is an OSError with the path in it. Writes are not buffered here; callers write pieces of 64 KiB or more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has none


class AppendFile(Protocol):
    """A file open for writing at its end. Methods raise OSError; after one the content is unknown: give the file up."""

    def write(self, data: bytes) -> None:
        """Append all of `data`, however many system calls that takes."""

    def sync(self) -> None:
        """Wait until everything written before the call is on the disk. May be called in another thread."""

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""


class Disk(Protocol):
    """The calls of storage code on files. All methods raise OSError."""

    def create(self, path: Path, private: bool = False) -> AppendFile:
        """A new, empty file, mode 0600 if `private`, else 0644. FileExistsError if the name is taken."""

    def open_read(self, path: Path) -> IO[bytes]:
        """The file as a buffered binary stream from its start."""

    def read(self, path: Path) -> bytes:
        """The whole content of a (small) file."""

    def size(self, path: Path) -> int:
        """Bytes in a file."""

    def free_bytes(self, directory: Path) -> int:
        """Bytes that may still be written on the file system of `directory`, without the reserve of root."""

    def list(self, directory: Path) -> list[str]:
        """All names in `directory`, sorted."""

    def exists(self, path: Path) -> bool:
        """Whether the name is taken."""

    def make_directory(self, directory: Path) -> None:
        """Create `directory` and missing parents, each durably; no error if it exists."""

    def rename(self, old: Path, new: Path) -> None:
        """Atomically give `old` the name `new` on the same file system; not durable before `sync_directory`."""

    def sync_directory(self, directory: Path) -> None:
        """Wait until the names in `directory` are on the disk."""

    def remove(self, path: Path) -> None:
        """Remove a file; no error if there is none."""

    def remove_tree(self, directory: Path) -> None:
        """Remove a directory with its content; no error if there is none."""


class OsFile:
    """`AppendFile` on a file descriptor."""

    def __init__(self, path: Path, private: bool = False) -> None:
        self._path = path  # for the text of errors only
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600 if private else 0o644)  # -1 after close

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        assert self._descriptor >= 0, "the file is closed"
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):  # a disk that is nearly full takes a part; the next call raises ENOSPC
                rest = memoryview(data)[written:]
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise _with_path(error, self._path) from error

    def sync(self) -> None:
        """Wait until everything written before the call is on the disk."""
        assert self._descriptor >= 0, "the file is closed"
        try:
            _sync_data(self._descriptor)
        except OSError as error:
            raise _with_path(error, self._path) from error

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class OsDisk:
    """`Disk` on the file system of the machine. Without state: one instance serves all."""

    def create(self, path: Path, private: bool = False) -> AppendFile:
        """A new, empty file."""
        return OsFile(path, private)

    def open_read(self, path: Path) -> IO[bytes]:
        """The file as a buffered binary stream."""
        return open(path, "rb", buffering=1 << 17)

    def read(self, path: Path) -> bytes:
        """The whole content of a file."""
        return path.read_bytes()

    def size(self, path: Path) -> int:
        """Bytes in a file."""
        return os.stat(path).st_size

    def free_bytes(self, directory: Path) -> int:
        """Bytes that may still be written."""
        status = os.statvfs(directory)
        return status.f_bavail * status.f_frsize

    def list(self, directory: Path) -> list[str]:
        """All names in `directory`, sorted."""
        return sorted(os.listdir(directory))

    def exists(self, path: Path) -> bool:
        """Whether the name is taken, even by a dangling link."""
        return os.path.lexists(path)

    def make_directory(self, directory: Path) -> None:
        """Create `directory` and missing parents."""
        if directory.is_dir():
            return
        self.make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        self.sync_directory(directory.parent)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically give `old` the name `new`."""
        os.rename(old, new)

    def sync_directory(self, directory: Path) -> None:
        """Wait until the names in `directory` are on the disk."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise _with_path(error, directory) from error
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove a file; no error if there is none."""
        path.unlink(missing_ok=True)

    def remove_tree(self, directory: Path) -> None:
        """Remove a directory with its content; no error if there is none."""
        if os.path.lexists(directory):
            shutil.rmtree(directory)


def _with_path(error: OSError, path: Path) -> OSError:
    """The error with the path, which calls on a descriptor leave out. Its class follows from the errno."""
    return OSError(error.errno, error.strerror, str(path))


OS_DISK: Disk = OsDisk()
