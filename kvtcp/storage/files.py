"""The disk seam: the only module of kvtcp that touches files for data.

Backups (and whatever else a node keeps on disk) receive a `Disk` and call nothing else, so that a test can hand them a
disk on which the n-th call fails. `OsDisk` is the real one. It does exactly one thing per call and never retries: after
a failed write or fsync nobody knows what the file holds, so the caller gives the file up.

What makes something durable, in this order, is the caller's sequence of calls:

    create, write..., sync, close      the bytes of a file are on the disk, under a name nobody reads yet
    sync_directory(its directory)      the name is on the disk
    rename, sync_directory(parent)     published: the final name is there after a power cut, with all of its bytes

A file's sync is fdatasync where the system has it: the bytes and the size of the file, without its times, which saves a
write of the journal of the file system when the size is as before.

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
    """A file open for writing at its end. Raises OSError; after one the content is unknown and the file given up."""

    def write(self, data: bytes) -> None:
        """Appends all of `data`, however many system calls that takes."""

    def sync(self) -> None:
        """Returns when everything written before the call is on the disk. Blocks; safe to call in another thread."""

    def close(self) -> None:
        """Gives the descriptor back. A second call does nothing."""


class Disk(Protocol):
    """What storage code may do with files. All methods raise OSError."""

    def create(self, path: Path, private: bool = False) -> AppendFile:
        """A new, empty file, mode 0600 if `private`, else 0644. FileExistsError if there is something of that name."""

    def open_read(self, path: Path) -> IO[bytes]:
        """The file as a buffered binary stream from its start."""

    def read(self, path: Path) -> bytes:
        """The whole content of a (small) file."""

    def size(self, path: Path) -> int:
        """Bytes in a file."""

    def free_bytes(self, directory: Path) -> int:
        """Bytes that may still be written on the file system of `directory`, without what is kept for root."""

    def list(self, directory: Path) -> list[str]:
        """Names of everything in `directory`, sorted."""

    def exists(self, path: Path) -> bool:
        """Whether there is anything under that name."""

    def make_directory(self, directory: Path) -> None:
        """Makes `directory` and missing parents, each durable in the one above it; fine if it is there."""

    def rename(self, old: Path, new: Path) -> None:
        """Atomically gives `old` the name `new` on the same file system; not durable before `sync_directory`."""

    def sync_directory(self, directory: Path) -> None:
        """Returns when the names in `directory` are on the disk."""

    def remove(self, path: Path) -> None:
        """Removes a file; fine if there is none."""

    def remove_tree(self, directory: Path) -> None:
        """Removes a directory with everything in it; fine if there is none."""


class OsFile:
    """`AppendFile` on a file descriptor."""

    def __init__(self, path: Path, private: bool = False) -> None:
        self._path = path  # for the text of errors only
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600 if private else 0o644)  # -1 after close

    def write(self, data: bytes) -> None:
        """Appends all of `data`."""
        assert self._descriptor >= 0, "the file is closed"
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):  # a disk that gets full takes a part first; the next call says why
                rest = memoryview(data)[written:]
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise _with_path(error, self._path) from error

    def sync(self) -> None:
        """Returns when everything written before the call is on the disk."""
        assert self._descriptor >= 0, "the file is closed"
        try:
            _sync_data(self._descriptor)
        except OSError as error:
            raise _with_path(error, self._path) from error

    def close(self) -> None:
        """Gives the descriptor back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class OsDisk:
    """`Disk` on the file system of the machine. Has no state: one for all."""

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
        """Names of everything in `directory`, sorted."""
        return sorted(os.listdir(directory))

    def exists(self, path: Path) -> bool:
        """Whether there is anything under that name, a dangling link too."""
        return os.path.lexists(path)

    def make_directory(self, directory: Path) -> None:
        """Makes `directory` and missing parents."""
        if directory.is_dir():
            return
        self.make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        self.sync_directory(directory.parent)

    def rename(self, old: Path, new: Path) -> None:
        """Atomically gives `old` the name `new`."""
        os.rename(old, new)

    def sync_directory(self, directory: Path) -> None:
        """Returns when the names in `directory` are on the disk."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise _with_path(error, directory) from error
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Removes a file; fine if there is none."""
        path.unlink(missing_ok=True)

    def remove_tree(self, directory: Path) -> None:
        """Removes a directory with everything in it; fine if there is none."""
        if os.path.lexists(directory):
            shutil.rmtree(directory)


def _with_path(error: OSError, path: Path) -> OSError:
    """The error with the path that a call on a descriptor leaves out; the class follows the number."""
    return OSError(error.errno, error.strerror, str(path))


OS_DISK: Disk = OsDisk()
