"""A config store in a file: for one coordinator, whose data directory is locked while it runs.

The file is JSON for people and tools, and exact for this module: the value stands in it byte for byte.

    {"format": 1, "version": 7, "crc32": 123456, "value":
    <the value>
    }

The checksum is over version and value. A change is written to a temporary file, synced, renamed over the old one, and
the directory is synced. Until the rename an error changes nothing and is raised. After it a power cut may leave either
file, so the outcome is UNKNOWN, and the same change, sent again, goes through all steps again: the second rename makes
the directory dirty again, so that its sync is not of what the kernel already gave up.

Calls block for the disk and run in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import zlib
from pathlib import Path
from typing import Final

from kvtcp.cluster.store import ConfigStoreError, Outcome, Stored
from kvtcp.storage.files import Disk

FORMAT: Final = 1
_HEADER: Final = re.compile(rb'\{"format": (\d+), "version": (\d+), "crc32": (\d+), "value":\n')
_END: Final = b"\n}\n"


class FileConfigStore:
    """`ConfigStore` in the file `path`. Its directory exists."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self._disk = disk
        self._unsure = 0  # version whose rename may not be durable; 0 = none
        self._lock = threading.RLock()  # a call that was cancelled still runs in its thread

    async def read(self) -> Stored | None:
        """The value. Raises ConfigStoreError if the file is damaged, of another format, or cannot be read."""
        return await asyncio.to_thread(self._read)

    async def compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
        """Store `value` if the version is the expected one."""
        return await asyncio.to_thread(self._compare_and_set, expected_version, value)

    def _read(self) -> Stored | None:
        with self._lock:
            if not self._disk.exists(self.path):
                return None
            try:
                data = self._disk.read(self.path)
            except OSError as error:
                raise ConfigStoreError(f"{self.path} cannot be read: {error.strerror}") from error
            return parse(data, self.path)

    def _compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
        json.loads(value)  # anything else could not be told from the end of the file
        with self._lock:
            stored = self._read()
            version = None if stored is None else stored.version
            new = Stored((expected_version or 0) + 1, value)
            is_again = stored == new and self._unsure == new.version
            if version != expected_version and not is_again:
                return Outcome.CONFLICT
            is_renamed = self._write(new)
            self._unsure = new.version
            if not is_renamed:
                return Outcome.UNKNOWN
            try:
                self._disk.sync_directory(self.path.parent)
            except OSError:
                return Outcome.UNKNOWN
            self._unsure = 0
            return Outcome.DONE

    def _write(self, new: Stored) -> bool:
        """Write and rename the file; returns whether the rename is known to be done. Raises OSError if it is not."""
        disk = self._disk
        temporary = self.path.with_name(self.path.name + ".tmp")
        disk.remove(temporary)  # of a crash
        file = disk.create(temporary)
        try:
            file.write(form(new))
            file.sync()
        finally:
            file.close()
        try:
            disk.rename(temporary, self.path)
        except OSError:
            try:
                is_done = self._read() == new
            except ConfigStoreError:
                return False
            if not is_done:  # else the call failed, and renamed all the same
                raise
        return True


def form(stored: Stored) -> bytes:
    """The content of the file."""
    header = f'{{"format": {FORMAT}, "version": {stored.version}, "crc32": {_checksum(stored)}, "value":\n'
    return header.encode() + stored.value + _END


def parse(data: bytes, path: Path) -> Stored:
    """Parse the content of the file `path`. Raises ConfigStoreError."""
    advice = "put the newest copy of it back, one that is at least as new as the data of the nodes"
    header = _HEADER.match(data)
    if header is None or not data.endswith(_END):
        raise ConfigStoreError(f"{path} is damaged: it does not begin and end as it should; {advice}")
    found_format, version, checksum = map(int, header.groups())
    if found_format != FORMAT:
        raise ConfigStoreError(f"{path} has format {found_format}, this version of kvtcp knows format {FORMAT}")
    stored = Stored(version, data[header.end() : -len(_END)])
    if _checksum(stored) != checksum:
        raise ConfigStoreError(f"{path} is damaged: its checksum is wrong; {advice}")
    return stored


def _checksum(stored: Stored) -> int:
    return zlib.crc32(stored.value, zlib.crc32(b"%d" % stored.version))
