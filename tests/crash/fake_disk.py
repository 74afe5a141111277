"""Disks for tests: one that skips fsync, and one whose n-th call fails.

Both keep their files in a real (temporary) directory, so that what a test finds afterwards is what a reader would find.
`FaultyDisk` counts every call that changes something or waits for the disk, writes and closes of its files included:
run once without a fault to learn the number of calls, then once per call with `fail_at`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtcp.storage.files import AppendFile, OsDisk, OsFile


class _QuickFile(OsFile):
    def sync(self) -> None:
        """Nothing to wait for: no test cuts the power of the machine."""


class QuickDisk(OsDisk):
    """The real disk without waiting for it."""

    def create(self, path: Path, private: bool = False) -> AppendFile:
        return _QuickFile(path, private)

    def sync_directory(self, directory: Path) -> None:
        if not directory.is_dir():
            raise FileNotFoundError(2, os.strerror(2), str(directory))


class FaultyDisk(QuickDisk):
    """A disk whose call number `fail_at` (from 1; 0 = never) raises OSError(`error_number`).

    With `dead` every later call fails too. A failing write leaves half of its bytes behind; a failing sync, rename or
    removal has done nothing; a failing close has closed.
    """

    def __init__(self, fail_at: int = 0, error_number: int = 5, dead: bool = False) -> None:
        self.calls: list[tuple[str, str]] = []  # (what, name of the file or directory), in order
        self._fail_at = fail_at
        self._error_number = error_number
        self._dead = dead

    def called(self, what: str, path: Path) -> None:
        """Counts a call; raises if it is its turn."""
        self.calls.append((what, path.name))
        if len(self.calls) == self._fail_at or (self._dead and len(self.calls) > self._fail_at > 0):
            raise OSError(self._error_number, os.strerror(self._error_number), str(path))

    def create(self, path: Path, private: bool = False) -> AppendFile:
        self.called("create", path)
        return _FaultyFile(self, path, private)


def _counted(name: str) -> Callable[..., Any]:
    """The call of that name, of which the last path is counted."""

    def call(self: FaultyDisk, *paths: Path) -> Any:
        self.called(name, paths[-1])
        return getattr(QuickDisk, name)(self, *paths)

    return call


for _name in ("open_read", "read", "list", "make_directory", "rename", "sync_directory", "remove", "remove_tree"):
    setattr(FaultyDisk, _name, _counted(_name))


class _FaultyFile(_QuickFile):
    def __init__(self, disk: FaultyDisk, path: Path, private: bool) -> None:
        super().__init__(path, private)
        self._disk = disk
        self._name = path

    def write(self, data: bytes) -> None:
        try:
            self._disk.called("write", self._name)
        except OSError:
            super().write(data[: len(data) // 2])
            raise
        super().write(data)

    def sync(self) -> None:
        self._disk.called("sync", self._name)

    def close(self) -> None:
        is_open = self._descriptor >= 0
        super().close()
        if is_open:
            self._disk.called("close", self._name)
