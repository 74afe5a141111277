"""Snapshots of a running node: one frozen shard becomes one file, in slices of the event loop.

I/O shell, driven by durability.py. A slice encodes for about SNAPSHOT_SLICE_MS; a worker writes what it made, and while
that is behind by SNAPSHOT_BUFFER_BYTES nothing more is encoded. When all of it is on the disk under its temporary name,
and the log is durable up to its position, it is published. A disk without space ends the snapshot, not the node.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from kvtcp.constants import SNAPSHOT_BUFFER_BYTES, SNAPSHOT_SLICE_MS
from kvtcp.runtime.pacer import Pacer
from kvtcp.runtime.worker import FileTasks
from kvtcp.storage.disk.snapshot import SnapshotFile, SnapshotHeader, encode_snapshot
from kvtcp.storage.disk.store import NodeStore
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.table import Logged

log = logging.getLogger("kvtcp.durability")


class SnapshotOwner(Protocol):
    """The part of a node's durability that a snapshot uses."""

    store: NodeStore

    def when_durable(self, done: Callable[[], None]) -> None:
        """Call `done` when everything logged so far is durable."""

    def in_files(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Work for the thread of the files."""

    def snapshot_share(self) -> float:
        """Share of the loop that a snapshot may take now."""

    def snapshot_ended(self, paths: list[Path]) -> None:
        """The snapshot is published; these files are needed no more."""

    def snapshot_given_up(self) -> None:
        """The snapshot found no space."""


class SnapshotJob:
    """One snapshot of one shard."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, owner: SnapshotOwner, frozen: Frozen, kept: list[Logged]
    ) -> None:
        self._owner = owner
        self._frozen = frozen
        self._header: SnapshotHeader = owner.store.header_of(frozen)
        self._pieces: Iterator[bytes] = encode_snapshot(self._header, frozen, kept)
        self._file: SnapshotFile | None = None
        self._files = FileTasks(owner.in_files, self._give_up)
        self._pacer = Pacer(loop, self._slice, share=owner.snapshot_share)
        self._waiting_bytes = 0  # handed to the worker and not written yet
        self._whole = False  # all of it is on the disk, under its temporary name
        self._logged = False  # the log is durable up to the position

    def begin(self) -> None:
        """Make the file, then the first slice."""
        self._owner.when_durable(self._log_is_durable)
        self._files.add(self._create, lambda _: self._pacer.run())

    def _create(self) -> None:
        self._file = self._owner.store.create_snapshot(self._header)

    def _slice(self) -> int | None:
        file = self._present()
        end_s = time.monotonic() + SNAPSHOT_SLICE_MS / 1000
        made: list[bytes] = []
        has_ended = True
        for piece in self._pieces:
            made.append(piece)
            if time.monotonic() >= end_s:
                has_ended = False
                break
        data = b"".join(made)
        if made:
            self._waiting_bytes += len(data)
            self._files.add(lambda: file.write(data), lambda _: self._written(len(data)))
        if has_ended:
            self._files.add(file.finish, self._finished)
            return None
        if self._waiting_bytes > SNAPSHOT_BUFFER_BYTES:
            self._pacer.hold()
        return len(data)

    def _present(self) -> SnapshotFile:
        assert self._file is not None, "the file is made before the first slice"
        return self._file

    def _written(self, size: int) -> None:
        self._waiting_bytes -= size
        if self._waiting_bytes <= SNAPSHOT_BUFFER_BYTES:
            self._pacer.resume()

    def _log_is_durable(self) -> None:
        self._logged = True
        self._publish()

    def _finished(self, _: Any) -> None:
        self._whole = True
        self._publish()

    def _publish(self) -> None:
        if self._whole and self._logged:
            self._files.add(self._present().publish, self._published)

    def _published(self, size: int) -> None:
        log.info("event=snapshot shard=%s seq=%s bytes=%s", self._header.shard, self._header.seq, size)
        self._owner.snapshot_ended(self._owner.store.published(self._header, size))

    def _give_up(self, error: OSError) -> None:
        log.warning("event=snapshot-given-up shard=%s reason=no space left on the disk", self._header.shard)
        self.abandon()
        self._owner.in_files(self._remove, lambda _: self._owner.snapshot_given_up())

    def _remove(self) -> None:
        if self._file is not None:
            self._file.abort()

    def abandon(self) -> None:
        """The node ends: the unfinished file is removed at the next start."""
        self._files.is_over = True
        self._pacer.stop()
        self._frozen.close()
