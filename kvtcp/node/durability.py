"""Durability: group commit, snapshots and space of a running node.

I/O shell around a NodeStore. One worker has the log, another one the snapshots and removals.

**Group commit.** What a turn of the loop applied is appended to a group; if the log is idle it is handed to the worker
at once, otherwise it collects until the worker is back: no timer, no delay, at most one record written and not yet
synced. Who appended is told (`on_durable`) with the connection and the highest ordinal that is durable now.

**Jobs** (a promise, the report of a position, a snapshot's publication) wait for what was appended before them, and are
done in the log's worker before anything appended later: groups and jobs are one queue.

**Snapshots** (snapshots.py) are taken one shard at a time, with SNAPSHOT_SHARE of the loop: because the log is long, on
demand, or because the disk is nearly full and an old log or deleted keys can give space back.

**Failure.** After any error of the disk nobody knows what is on it: `on_failed` is called once, nothing is acknowledged
any more, and the process ends. Only a snapshot that finds no space is given up and taken again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvtcp.constants import (
    LOG_IDLE_MS,
    LOG_RECORD_BYTES_MAX,
    SNAPSHOT_LOG_BYTES,
    SNAPSHOT_SHARE,
    SNAPSHOT_SHARE_URGENT,
    SPACE_LOOK_MS,
)
from kvtcp.node.replica import Replicas
from kvtcp.node.snapshots import SnapshotJob
from kvtcp.runtime.worker import Worker
from kvtcp.storage.disk.log import Prepared
from kvtcp.storage.disk.snapshot import SnapshotHeader
from kvtcp.storage.disk.store import NodeStore
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.table import Logged

log = logging.getLogger("kvtcp.durability")

STOP_WAIT_S: Final = 5.0  # for both workers together at the end
GROUP_BYTES_MAX: Final = LOG_RECORD_BYTES_MAX // 2  # a group that has more takes no further entries
RETRY_S: Final = 2.0  # between two attempts to snapshot, or to make room, on a disk that is full
SHORT_LOG_BYTES: Final = 1 << 20  # with the disk nearly full, a segment beyond it is worth being ended

Connection = Any  # whoever appended; handed back


class _Group:
    """Entries that will be one record."""

    __slots__ = ("bytes", "entries", "marks")

    def __init__(self) -> None:
        self.entries: list[Logged] = []
        self.bytes = 0  # of the packed entries
        self.marks: dict[Connection, int] = {}  # who waits for it, up to which ordinal


class _Job(NamedTuple):
    """Work for the log's worker, or only a place in the queue."""

    work: Callable[[], Any] | None
    done: Callable[[Any], None]


class Durability:
    """The disk of one running node. All methods belong to the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, store: NodeStore, *, on_durable: Callable[[Connection, int], None],
        on_failed: Callable[[BaseException], None], on_space: Callable[[int], None],
        freeze: Callable[[int], tuple[Frozen, list[Logged]]], snapshot_log_bytes: int = SNAPSHOT_LOG_BYTES,
    ) -> None:  # fmt: skip
        self.store = store
        self.space = 0  # level, as in the SPACE frame
        self.failure: BaseException | None = None
        self.synced_ms = 0.0  # how long the last record took to be written and synced
        self._loop = loop
        self._on_durable = on_durable
        self._on_failed = on_failed
        self._on_space = on_space
        self._freeze = freeze  # a shard as it is now, and its entries that may be uncommitted
        self._log_worker = Worker(loop, "kvtcp-log")
        self._file_worker = Worker(loop, "kvtcp-files")
        self._queue: deque[_Group | _Job] = deque()  # for the log's worker, in order
        self._groups = 0  # of them in the queue
        self._flight: dict[Connection, int] = {}  # who waits for what is being written
        self._busy = False  # the log's worker has a record or a job
        self._marked = True  # the last record is covered by a mark, or needs none
        self._began_s = 0.0  # when the present record was handed over
        self._idle: asyncio.TimerHandle | None = None  # of the look whether a mark is due
        self._snapshot_log_bytes = snapshot_log_bytes
        self._snapshot: SnapshotJob | None = None
        self._changes = 0  # of copies: manifests in the queue that name others
        self._syncs_ms: list[float] = []  # how long records took since the last `take_syncs`
        self._snapshot_after_s = 0.0  # no snapshot before, because the last one found no space
        self._wanted: deque[int] = deque()  # shards to be snapshotted on demand
        self._give_back_after_s = 0.0  # the next round for the sake of space
        self._closing = False
        self._drained = asyncio.Event()  # at the end: everything appended is durable, or the disk failed
        self._look = loop.call_later(SPACE_LOOK_MS / 1000, self._look_around)

    # --- group commit -------------------------------------------------------------------------------

    def append(self, entries: list[Logged], connection: Connection, ordinal: int) -> bool:
        """Log these entries, applied up to `ordinal` of a connection. True if all of it is durable already (nothing was
        there to log, and nothing is under way); otherwise `on_durable` will tell. At the end, and after a failure,
        nothing is logged any more and nobody told."""
        if self._closing or self.failure is not None:
            return False
        if self._changes and not entries:  # a copy that is not there any more may be what is waited for
            self._queue.append(_Job(None, lambda _: self._on_durable(connection, ordinal)))
            return False
        if entries:
            size = sum([len(entry[4]) for entry in entries])
            group = self._open_group()
            if size > GROUP_BYTES_MAX // 2:
                group = self._append_much(entries)
            else:
                group.entries += entries
                group.bytes += size
            group.marks[connection] = ordinal
            return False
        if self._groups:
            next(each for each in reversed(self._queue) if isinstance(each, _Group)).marks[connection] = ordinal
            return False
        if not self._flight:
            return True
        self._flight[connection] = ordinal
        return False

    def _open_group(self) -> _Group:
        """The last group, or a new one if that is full."""
        group = self._queue[-1] if self._queue else None
        if not isinstance(group, _Group) or group.bytes > GROUP_BYTES_MAX:
            group = _Group()
            self._queue.append(group)
            self._groups += 1
        return group

    def _append_much(self, entries: list[Logged]) -> _Group:
        """What a turn applied may be more than a record can have: small items make large entries, as purges do. Returns
        the group with the last one."""
        for entry in entries:
            group = self._open_group()
            group.entries.append(entry)
            group.bytes += len(entry[4])
        return group

    def flush(self) -> None:
        """The turn of the loop ends: begin to write, if the log is idle."""
        while self._queue and not self._busy and self.failure is None:
            first = self._queue.popleft()
            if isinstance(first, _Group):
                self._groups -= 1
                self._flight = first.marks
                self._marked = False
                self._hand_over(self.store.log.prepare(first.entries))
            elif first.work is not None:
                self._busy = True
                self._log_worker.submit(first.work, partial(self._job_done, first.done))
            else:
                first.done(None)  # which may call here again
        if not self._busy and not self._marked and self._idle is None and self.failure is None and not self._closing:
            self._idle = self._loop.call_later(LOG_IDLE_MS / 1000, self._write_mark)

    def _hand_over(self, prepared: Prepared) -> None:
        self._busy = True
        self._began_s = time.monotonic()
        manifest = self.store.manifest_for(prepared)
        self._log_worker.submit(
            lambda: self.store.write_record(prepared, manifest),
            lambda _, error: self._record_written(prepared, error),
        )

    def _record_written(self, prepared: Prepared, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
        if self.failure is not None:
            return
        self.synced_ms = (time.monotonic() - self._began_s) * 1000
        self._syncs_ms.append(self.synced_ms)
        self.store.log.written(prepared)
        self._busy = False
        flight, self._flight = self._flight, {}
        for connection, ordinal in flight.items():
            self._on_durable(connection, ordinal)
        self.flush()

    def _write_mark(self) -> None:
        """Nothing came for a while: the last record gets its mark. In mode `os` a mark would tell nothing new."""
        self._idle = None
        if self._busy or self._closing or self.failure is not None or self._marked:
            return
        idle_s = time.monotonic() - self._began_s
        if idle_s < LOG_IDLE_MS / 1000:
            self._idle = self._loop.call_later(LOG_IDLE_MS / 1000 - idle_s, self._write_mark)
            return
        self._marked = True
        if self.store.log.durable_lsn == self.store.log.last_lsn or self.store.log.wants_segment:
            self._hand_over(self.store.log.prepare_mark())

    # --- jobs -----------------------------------------------------------------------------------------

    def when_durable(self, done: Callable[[], None]) -> None:
        """Call `done` when everything appended so far is durable."""
        self._job(None, lambda _: done())

    def remember(self, replica: Replicas, done: Callable[[], None]) -> None:
        """Write promise, map and copies of a replica as they are now, when everything appended so far is durable; then
        call `done`."""
        manifest = self.store.manifest
        manifest.promised, manifest.coordinator = replica.promised, replica.coordinator
        manifest.map_version, manifest.map = replica.map_version, replica.map
        self.write_manifest(replica.copies.values(), done)

    def write_manifest(self, copies: Iterable[Copy], done: Callable[[], None]) -> None:
        """Write the manifest when everything appended so far is durable; then call `done`."""
        data = self.store.encode_manifest(copies)
        self._job(lambda: self.store.write_manifest(data), lambda _: done())

    def change_copies(
        self, copies: Iterable[Copy], pulled: tuple[SnapshotHeader, int] | None = None,
        done: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Make durable that copies were dropped, or that one was replaced by a `pulled` one, when everything appended
        so far is; what is appended later is durable after it. Then call `done`."""
        manifest, paths = self.store.begin_change(copies, pulled)
        self._wanted = deque(shard for shard in self._wanted if shard in self.store.copies)
        self._changes += 1

        def written(_: None) -> None:
            self._changes -= 1
            self.store.end_change()
            if paths:
                self.in_files(lambda: self.store.remove(paths), lambda _: None)
            done()

        self._job(lambda: self.store.write_manifest(manifest), written)

    def take_syncs(self) -> list[float]:
        """How many ms each record since the last call took to be durable."""
        syncs_ms, self._syncs_ms = self._syncs_ms, []
        return syncs_ms

    def _job(self, work: Callable[[], Any] | None, done: Callable[[Any], None]) -> None:
        if not self._closing:
            self._queue.append(_Job(work, done))
            self.flush()

    def _job_done(self, done: Callable[[Any], None], result: Any, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
        if self.failure is not None:
            return
        self._busy = False
        done(result)
        self.flush()

    # --- snapshots ------------------------------------------------------------------------------------

    def snapshot_all(self) -> None:
        """Snapshot every shard that has something new, and let go of the log up to there."""
        self._wanted = deque(self.store.behind())
        self._snapshot_after_s = 0.0
        self._begin_segment()
        self._next_snapshot()

    def _look_around(self) -> None:
        """A few times a second: space, and whether a snapshot is due."""
        self._look = self._loop.call_later(SPACE_LOOK_MS / 1000, self._look_around)
        if self.failure is not None:
            return
        try:
            level, tight = self.store.space_level(self.space)
        except OSError as error:
            self._fail(error)
            return
        if level != self.space:
            (log.warning if level > self.space else log.info)(
                "event=disk-space level=%s directory=%s reserve_bytes=%s", level, self.store.directory,
                self.store.reserve_bytes(),
            )  # fmt: skip
            self.space = level
            self._on_space(level)
        worth_it = level > 0 or self.store.log.total_bytes > SHORT_LOG_BYTES
        if tight and worth_it and not self._wanted and self._snapshot is None:
            self._give_space_back()
        paths = self.store.needless_segments()
        if paths:
            self.in_files(lambda: self.store.remove(paths), lambda _: None)
        self._next_snapshot()

    def _give_space_back(self) -> None:
        """The disk is nearly full: a log that snapshots make needless, and keys that were deleted, take space."""
        if time.monotonic() < self._give_back_after_s:
            return
        self._give_back_after_s = time.monotonic() + RETRY_S
        self._wanted = deque(self.store.behind())
        if self.store.log.segments[-1].size > SHORT_LOG_BYTES:
            self._begin_segment()

    def _begin_segment(self) -> None:
        """A new segment with the next record, or, if none comes, with a mark."""
        self.store.log.begin_new_segment()
        self._marked = False
        self.flush()

    def _next_snapshot(self) -> None:
        if self._snapshot is not None or self._closing or self.failure is not None:
            return
        if time.monotonic() < self._snapshot_after_s:
            return
        due = self.store.due_snapshot(self._snapshot_log_bytes)
        shards = [*self._wanted] or ([] if due is None else [due])
        if not shards:
            return
        try:
            shard = next((each for each in shards if self.store.has_room_for(each)), None)
        except OSError as error:
            self._fail(error)
            return
        if shard is None:
            log.warning("event=snapshot-waits shard=%s reason=too little space on the disk", shards[0])
            self.snapshot_given_up()
            return
        if shard in self._wanted:
            self._wanted.remove(shard)
        self._snapshot = SnapshotJob(self._loop, self, *self._freeze(shard))
        self._snapshot.begin()

    def snapshot_share(self) -> float:
        """Share of the loop that a snapshot may take now."""
        log_bytes_max = max(self._snapshot_log_bytes, self.store.snapshot_bytes)
        urgent = self.space > 0 or self.store.log.total_bytes > 2 * log_bytes_max
        return SNAPSHOT_SHARE_URGENT if urgent else SNAPSHOT_SHARE

    def snapshot_ended(self, paths: list[Path]) -> None:
        """The running snapshot is published; `paths` are files that nobody needs any more."""
        self._snapshot = None
        if paths:
            self.in_files(lambda: self.store.remove(paths), lambda _: self._next_snapshot())
        else:
            self._next_snapshot()

    def snapshot_given_up(self) -> None:
        """The running snapshot found no space: the next ones would not either."""
        self._snapshot = None
        self._wanted.clear()
        self._snapshot_after_s = time.monotonic() + RETRY_S

    def in_files(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Work for the other thread. An error ends the node."""

        def finished(result: Any, error: BaseException | None) -> None:
            if self._closing:  # what was not finished is removed or done again at the next start
                if error is not None:
                    log.warning("event=file-error-at-the-end reason=%r", error)
            elif error is not None:
                self._fail(error)
            elif self.failure is None:
                done(result)

        self._file_worker.submit(work, finished)

    # --- the end --------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self._drained.set()
            self._stop_timers()
            self._on_failed(error)

    def _stop_timers(self) -> None:
        self._look.cancel()
        if self._snapshot is not None:
            self._snapshot.abandon()
        if self._idle is not None:
            self._idle.cancel()

    async def close(self, wait_s: float = STOP_WAIT_S) -> None:
        """Write what was appended so far, cover it by a mark and end in order. After a failure, or if the disk does not
        answer for `wait_s`, just end: the next start is one after a crash. Raises OSError."""
        if self._closing:
            return
        end_s = time.monotonic() + wait_s
        self._stop_timers()
        if self.failure is None:
            self._job(None, lambda _: self._drained.set())
            self._closing = True
            with contextlib.suppress(TimeoutError):  # told below
                await asyncio.wait_for(self._drained.wait(), wait_s)
        self._closing = True
        files_ended = self._file_worker.stop(end_s - time.monotonic())
        log_ended = self._log_worker.stop(end_s - time.monotonic())
        if self.failure is not None:
            return
        if self._drained.is_set() and files_ended and log_ended:
            self.store.close_clean()
        else:
            log.error("event=not-stopped-in-order reason=the disk did not answer for %s s", wait_s)
