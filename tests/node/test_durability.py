"""Durability: group commit, jobs, marks, snapshots and space of a running node, and how all of it ends."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from kvtcp.constants import LOG_IDLE_MS, LOG_RECORD_BYTES_MAX
from kvtcp.node import durability as durability_module
from kvtcp.node.durability import Durability
from kvtcp.storage.disk.log_format import parse_header, parse_records
from kvtcp.storage.disk.store import NodeStore
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.table import Logged
from tests.crash.disk import CrashDisk, CrashFile
from tests.support.storage_tools import DIRECTORY, add_copies, names, open_small, pulled, put

WAIT_S = 10.0


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Wait until it is true; AssertionError at the deadline."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {WAIT_S} s"
        await asyncio.sleep(0.001)


class Gate:
    """What lets calls of a disk through. Open at first."""

    def __init__(self) -> None:
        self.waiting = 0  # calls that stand before it
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def passed(self) -> None:
        """Called in the worker: returns when the gate is open."""
        if self._open.is_set():
            return
        with self._lock:
            self.waiting += 1
        assert self._open.wait(WAIT_S), "nobody opened the gate"
        with self._lock:
            self.waiting -= 1


class GatedFile(CrashFile):
    """A file whose syncs wait."""

    def sync(self) -> None:
        disk = self._disk
        assert isinstance(disk, GatedDisk)
        (disk.file_gate if "snapshots" in self._path.parts else disk.log_gate).passed()
        if disk.broken and disk.broken in self._path.parts:
            raise OSError(disk.broken_number, "broken", str(self._path))
        super().sync()


class GatedDisk(CrashDisk):
    """A disk in memory whose syncs wait at a gate, one for log and manifest and one for snapshots."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.log_gate = Gate()
        self.file_gate = Gate()
        self.broken = ""  # syncs of files in this directory fail
        self.broken_number = errno.EIO
        self.free: int | None = None  # what `free_bytes` says

    def create(self, path: Path, private: bool = False) -> CrashFile:
        file = super().create(path, private)
        return GatedFile(self, file._node, path)

    def free_bytes(self, directory: Path) -> int:
        return super().free_bytes(directory) if self.free is None else self.free


class Node:
    """A store of `shards` empty shards with its durability, and what that told. `before` is done to the store first."""

    def __init__(
        self, shards: int = 3, durability: str = "sync", before: Callable[[NodeStore], Any] = id, **options: Any
    ) -> None:
        self.disk = GatedDisk()
        self.store = store = open_small(self.disk, durability=durability)
        add_copies(store, shards)
        before(store)
        self.told: list[Any] = []  # (connection, ordinal), names of jobs, in order
        self.failures: list[BaseException] = []
        self.spaces: list[int] = []
        self.frozen: list[int] = []
        self.durability = Durability(
            asyncio.get_running_loop(), store, on_durable=lambda *durable: self.told.append(durable),
            on_failed=self.failures.append, on_space=self.spaces.append, freeze=self.freeze, **options,
        )  # fmt: skip

    def freeze(self, shard: int) -> tuple[Frozen, list[Logged]]:
        self.frozen.append(shard)
        return self.store.copies[shard].table.freeze(), []

    def put(self, ordinal: int, shard: int = 0, key: bytes = b"k", connection: Any = "c", flush: bool = True) -> bool:
        """Apply and append one put; whether it was durable at once."""
        entry = put(self.store.copies[shard], key, b"%d" % ordinal)
        durable = self.durability.append([entry], connection, ordinal)
        if flush:
            self.durability.flush()
        return durable

    def read(self, ordinal: int, connection: Any = "c") -> bool:
        """A batch without a write; whether it was durable at once."""
        durable = self.durability.append([], connection, ordinal)
        self.durability.flush()
        return durable

    def job(self, name: str) -> None:
        """Something that waits for what was appended before."""
        self.durability.write_manifest(self.store.copies.values(), lambda: self.told.append(name))

    def records(self) -> list[list[int]]:
        """The numbers of shard 0 in each record of the log, as they are on the disk."""
        found = []
        for name in names(self.disk):
            if name.endswith(".log"):
                data = self.disk.read(DIRECTORY / "log" / name)
                for record in parse_records(data, parse_header(data)).records:
                    found.append([entry[2] for entry in record.entries() if entry[0] == 0])
        return found

    def logged(self) -> list[int]:
        """The numbers of shard 0 in the log."""
        return [number for record in self.records() for number in record]

    def reopened(self) -> NodeStore:
        """What the next start finds if the process is killed now."""
        return open_small(self.disk.process_kill(), seed=99)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node with three empty shards."""
    made = Node()
    yield made
    made.disk.log_gate.open()
    made.disk.file_gate.open()
    await made.durability.close()


async def test_acknowledged_after_the_sync(node: Node) -> None:
    """Nothing is told before the sync returned; entries collect meanwhile and go with the next record."""
    node.disk.log_gate.close()
    assert not node.put(1)
    await until(lambda: node.disk.log_gate.waiting == 1, "the sync")
    for ordinal in (2, 3, 4):
        assert not node.put(ordinal)
    assert node.told == [] and node.disk.log_gate.waiting == 1
    assert node.records() == [[1]], "at most one record is written and not yet synced"
    node.disk.log_gate.open()
    await until(lambda: len(node.told) == 2)
    assert node.told == [("c", 1), ("c", 4)]
    assert node.records()[:2] == [[1], [2, 3, 4]]
    assert node.reopened().copies[0].table.seq == 4


async def test_every_connection_is_told_its_own_ordinal(node: Node) -> None:
    """Who appended to one record is told at once, each up to its own ordinal."""
    node.disk.log_gate.close()
    node.put(1, connection="old")
    node.put(2, connection="old")
    node.put(7, connection="new")
    node.put(3, connection="old")
    node.disk.log_gate.open()
    await until(lambda: len(node.told) == 3)
    assert node.told == [("old", 1), ("old", 3), ("new", 7)]


async def test_reads_alone_are_durable_when_nothing_is_under_way(node: Node) -> None:
    """A batch without entries is acknowledged at once if the log is idle, otherwise with what it may have seen."""
    assert node.read(1)
    node.disk.log_gate.close()
    node.put(2)
    assert not node.read(3), "with the record under way"
    node.put(4, flush=False)
    assert not node.read(5), "with the record that collects"
    node.disk.log_gate.open()
    await until(lambda: len(node.told) == 2)
    assert node.told == [("c", 3), ("c", 5)]
    assert node.read(6)


async def test_reads_do_not_wait_for_jobs_and_marks(node: Node) -> None:
    """What the log's worker does beside records is nothing that a read has seen."""
    release = threading.Event()
    node.durability._job(release.wait, lambda _: node.told.append("job"))
    assert node.read(1)
    release.set()
    await until(lambda: node.told == ["job"])
    node.put(2)
    await until(lambda: len(node.told) == 2)
    node.disk.log_gate.close()
    await until(lambda: node.disk.log_gate.waiting == 1, "the mark")
    assert node.read(3)


async def test_jobs_keep_their_place(node: Node) -> None:
    """A job waits for what was appended before it, and is done before what is appended later is written."""
    node.disk.log_gate.close()
    node.put(1)
    node.put(2)
    node.job("manifest")
    node.durability.when_durable(lambda: node.told.append(("durable", node.store.log.last_lsn)))
    node.put(3)
    node.put(4)
    assert not node.read(5)
    node.durability.when_durable(lambda: node.told.append("end"))
    await until(lambda: node.disk.log_gate.waiting == 1)
    assert node.told == []
    node.disk.log_gate.open()
    await until(lambda: "end" in node.told)
    assert node.told == [("c", 1), ("c", 2), "manifest", ("durable", 2), ("c", 5), "end"]
    assert node.records()[:3] == [[1], [2], [3, 4]]


async def test_jobs_without_entries(node: Node) -> None:
    """On an idle log a job begins at once; `when_durable` is called before it returns."""
    node.durability.when_durable(lambda: node.told.append("now"))
    assert node.told == ["now"]
    node.job("manifest")
    node.durability.when_durable(lambda: node.told.append("behind it"))
    assert node.told == ["now"]
    await until(lambda: len(node.told) == 3)
    assert node.told == ["now", "manifest", "behind it"]


async def test_a_job_that_appends(node: Node) -> None:
    """What a finished job starts finds its place behind what waits already."""
    node.durability.when_durable(lambda: node.put(1) or node.job("second"))  # type: ignore[func-returns-value]
    node.put(2)
    await until(lambda: len(node.told) == 3)
    assert node.told == [("c", 1), "second", ("c", 2)]


async def test_a_record_has_a_bound(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is appended while the disk is slow, a record stays below what the format allows."""
    monkeypatch.setattr(durability_module, "GROUP_BYTES_MAX", 100)
    node.disk.log_gate.close()
    for ordinal in range(1, 12):
        node.put(ordinal)
    node.disk.log_gate.open()
    await until(lambda: node.told[-1:] == [("c", 11)])
    records = [record for record in node.records() if record]
    assert len(records) >= 3 and node.logged() == list(range(1, 12))
    assert [ordinal for _, ordinal in node.told] == [record[-1] for record in records]


async def test_the_mark_of_an_idle_log(node: Node) -> None:
    """After a while without a record the last one is covered, once."""
    began_s = time.monotonic()
    node.put(1)
    await until(lambda: node.store.log.last_lsn == 2, "the mark")
    assert time.monotonic() - began_s >= LOG_IDLE_MS / 1000
    await until(lambda: node.store.log.durable_lsn == 2)
    data = node.disk.read(node.store.log.segments[-1].path)
    records = parse_records(data, parse_header(data)).records
    assert [(record.lsn, record.durable_lsn) for record in records] == [(1, 0), (2, 1)] and not records[1].entries()
    node.put(2)
    await until(lambda: node.store.log.last_lsn == 4, "the next mark")
    assert node.told == [("c", 1), ("c", 2)], "a mark tells nobody anything"


async def test_the_mark_comes_after_a_long_job(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is under way when the mark is due only delays it."""
    monkeypatch.setattr(durability_module, "LOG_IDLE_MS", 20)
    node.put(1)
    await until(lambda: node.told == [("c", 1)])
    idle, release = node.durability._idle, threading.Event()
    assert idle is not None
    node.durability._job(release.wait, lambda _: None)
    await until(lambda: node.durability._idle is None, "the look for a mark")
    release.set()
    await until(lambda: node.store.log.last_lsn == 2, "the mark")


async def test_no_marks_in_mode_os() -> None:
    """Where nothing is synced a mark would say nothing new."""
    node = Node(durability="os")
    store = node.store
    node.put(1)
    await until(lambda: node.told == [("c", 1)])
    await until(lambda: node.durability._marked, "the look")
    assert store.log.last_lsn == 1 and store.log.durable_lsn == 0
    await node.durability.close()
    assert store.log.last_lsn == 2 and store.manifest.clean


# --- failures ---------------------------------------------------------------------------------------


async def test_failure_ends_all_acknowledgements(node: Node) -> None:
    """After an error of the log `on_failed` is called once, and nobody is told anything any more."""
    node.disk.log_gate.close()
    node.disk.broken = "log"
    node.put(1)
    node.put(2)
    node.job("manifest")
    node.disk.log_gate.open()
    await until(lambda: node.failures)
    assert isinstance(node.failures[0], OSError)
    assert not node.put(3) and not node.read(4)
    node.job("later")
    await node.durability.close()
    assert node.told == [] and len(node.failures) == 1 and node.records() == [[1]]
    assert not node.store.manifest.clean


async def test_failure_of_a_job(node: Node) -> None:
    """An error of the manifest is an error of the disk; `append` acknowledges nothing afterwards."""
    node.disk.broken = "manifest.json.tmp"
    node.job("manifest")
    await until(lambda: node.failures)
    assert not node.read(1) and not node.put(2)
    await node.durability.close()
    assert node.told == [] and len(node.failures) == 1


async def test_failure_of_the_other_thread(node: Node) -> None:
    """An error while a snapshot is written ends the node as well."""
    node.put(1)
    await until(lambda: node.told)
    node.disk.broken = "snapshots"
    node.durability.snapshot_all()
    await until(lambda: node.failures)
    node.put(2)
    await node.durability.close()
    assert node.told == [("c", 1)] and len(node.failures) == 1


async def test_failure_of_the_look_for_space(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not even say how full it is counts as failed."""

    def free_bytes(directory: Path) -> int:
        raise OSError(errno.EIO, "broken", str(directory))

    monkeypatch.setattr(node.disk, "free_bytes", free_bytes)
    await until(lambda: node.failures)
    assert not node.read(1)


# --- the end ----------------------------------------------------------------------------------------


async def test_close_drains(node: Node) -> None:
    """What was appended is written and told, covered by a mark, and the manifest says that the end was in order."""
    node.disk.log_gate.close()
    for ordinal in (1, 2, 3):
        node.put(ordinal)
    closing = asyncio.ensure_future(node.durability.close())
    await until(lambda: node.disk.log_gate.waiting == 1)
    node.disk.log_gate.open()
    await closing
    assert node.told == [("c", 1), ("c", 3)]
    assert node.records() == [[1], [2, 3], []]
    again = open_small(node.disk, seed=1)
    assert again.copies[0].table.seq == 3 and again.log.last_lsn == 3
    await node.durability.close()  # twice is allowed


async def test_close_while_writes_go_on(node: Node) -> None:
    """What is appended after the end began is neither logged nor acknowledged, and does not disturb the end."""
    node.put(1)
    closing = asyncio.ensure_future(node.durability.close())
    ordinal = 2
    while not closing.done():
        assert not node.put(ordinal)
        ordinal += 1
        await asyncio.sleep(0)
    await closing
    assert node.store.manifest.clean
    logged = node.logged()
    assert logged == list(range(1, len(logged) + 1)) and node.told[-1] == ("c", logged[-1])


async def test_close_does_not_wait_for_a_dead_disk(node: Node) -> None:
    """A disk that does not answer keeps the process for a bounded time; then it ends as if it were killed."""
    node.disk.log_gate.close()
    node.put(1)
    await until(lambda: node.disk.log_gate.waiting == 1)
    await node.durability.close(0.05)
    assert node.told == [] and not node.store.manifest.clean
    node.disk.log_gate.open()


async def test_failure_while_it_closes(node: Node) -> None:
    """An error in the last record is told as any other, and the end is not in order."""
    node.disk.log_gate.close()
    node.disk.broken = "log"
    node.put(1)
    closing = asyncio.ensure_future(node.durability.close())
    await until(lambda: node.disk.log_gate.waiting == 1)
    node.disk.log_gate.open()
    await closing
    assert node.told == [] and len(node.failures) == 1 and not node.store.manifest.clean
    assert node.records() == [[1]], "no mark behind what nobody knows"


async def test_space_is_told(node: Node) -> None:
    """A change of the level is told once; a nearly full disk makes needless log go."""
    for ordinal in range(1, 6):
        node.put(ordinal)
    await until(lambda: node.told[-1:] == [("c", 5)])
    node.disk.free = node.store.reserve_bytes() - 1
    assert node.store.has_room_for(0)
    await until(lambda: node.spaces == [1])
    await until(lambda: 0 in node.store.snapshots, "a snapshot")
    node.disk.free = 10
    await until(lambda: node.spaces == [1, 2])
    node.disk.free = node.store.reserve_bytes() * 2
    await until(lambda: node.spaces == [1, 2, 0])


async def test_a_nearly_full_disk_is_not_written_to_all_the_time(node: Node) -> None:
    """While space is short, the shards are snapshotted in rounds with a pause, and only if there is room."""
    node.disk.free = node.store.reserve_bytes() - 1
    node.put(1)
    await until(lambda: node.spaces == [1] and 0 in node.store.snapshots)
    node.disk.free = 10
    rounds = len(node.frozen)
    looked = [0]
    original = node.store.space_level

    def space_level(level: int = 0) -> tuple[int, bool]:
        looked[0] += 1
        return original(level)

    node.store.space_level = space_level  # type: ignore[method-assign]
    node.put(2)
    await until(lambda: looked[0] >= 3, "several looks")
    assert len(node.frozen) == rounds


async def test_space_comes_back_from_a_log_that_is_covered(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long segment of which nothing is needed any more goes when space is short."""
    monkeypatch.setattr(durability_module, "SHORT_LOG_BYTES", 10)
    for ordinal in range(1, 4):
        node.put(ordinal)
    await until(lambda: node.told[-1:] == [("c", 3)])
    node.store.write_snapshot(node.store.copies[0], [])
    first = node.store.log.segments[0].path
    node.disk.free = 10
    await until(lambda: node.spaces == [2])
    node.put(4)
    await until(lambda: not node.disk.exists(first), "the segment to go")
    assert node.reopened().copies[0].table.seq == 4


async def test_entries_that_are_too_much_for_a_record() -> None:
    """Small items with large entries, as purges are: several records, told when the last is durable, and read back."""
    node = Node()
    store, value = node.store, bytes(4 << 20)
    entries = [put(store.copies[0], b"k%d" % (seq % 3), value) for seq in range(LOG_RECORD_BYTES_MAX // len(value) + 2)]
    assert not node.durability.append(entries, "c", 7)
    node.durability.flush()
    await until(lambda: node.told or node.failures)
    assert node.told == [("c", 7)] and node.failures == []
    await node.durability.close()
    copy = open_small(node.disk).copies[0]
    assert copy.complete and copy.table.position == store.copies[0].table.position


# --- copies that come and go ------------------------------------------------------------------------------


async def test_a_copy_is_dropped_while_it_waits_for_its_snapshot(node: Node) -> None:
    """Snapshots of all shards were asked for, and the last of them is dropped before its turn: it has none."""
    for number in range(3):
        node.put(number + 1, shard=number)
    await until(lambda: node.told[-1:] == [("c", 3)])
    node.durability.snapshot_all()
    copies = [copy for copy in node.store.copies.values() if copy.shard != 2]
    node.durability.change_copies(copies, done=lambda: node.told.append("dropped"))
    await until(lambda: {0, 1} <= node.store.snapshots.keys() and "dropped" in node.told, "two snapshots")
    await until(lambda: node.durability._snapshot is None)
    assert 2 not in node.store.snapshots and node.durability.failure is None


async def test_a_dropped_copy(node: Node) -> None:
    """What is appended before and after is durable in this order, reads too; then the files are removed."""
    node.put(1, shard=1)
    await until(lambda: node.told == [("c", 1)])
    node.durability.snapshot_all()
    await until(lambda: 1 in node.store.snapshots, "the snapshot")
    node.disk.log_gate.close()
    node.put(2)
    copies = [copy for copy in node.store.copies.values() if copy.shard != 1]
    node.durability.change_copies(copies, done=lambda: node.told.append("dropped"))
    assert not node.read(3)
    node.put(4)
    assert node.told == [("c", 1)]
    node.disk.log_gate.open()
    await until(lambda: node.told[-1] == ("c", 4))
    assert node.told == [("c", 1), ("c", 2), "dropped", ("c", 3), ("c", 4)]
    await until(lambda: not any(name.startswith("0001") for name in names(node.disk, "snapshots")))
    assert node.read(5) and node.store._changes == 0
    assert sorted(open_small(node.disk.process_kill(), seed=1).copies) == [0, 2]


async def test_a_replaced_copy(node: Node) -> None:
    """Entries of the new copy are in the log behind the manifest that names it."""
    node.put(1, shard=1)
    await until(lambda: node.told == [("c", 1)])
    copy, header, size = pulled(node.store, 1, 2, 4, 4)
    node.disk.log_gate.close()
    node.durability.change_copies([node.store.copies[0], copy], (header, size))
    node.durability.append([put(copy, b"k", b"v")], "c", 2)
    node.durability.flush()
    await until(lambda: node.disk.log_gate.waiting, "the manifest")
    assert open_small(node.disk.process_kill(), seed=1).copies[1].generation == 1
    node.disk.log_gate.open()
    await until(lambda: node.told[-1] == ("c", 2))
    again = open_small(node.disk.process_kill(), seed=1)
    assert again.copies[1].generation == 2 and again.copies[1].table.seq == 5


async def test_syncs_are_told_once(node: Node) -> None:
    """How long each record took, since the last question."""
    node.put(1)
    await until(lambda: node.told)
    node.put(2)
    await until(lambda: len(node.told) == 2)
    took_ms = node.durability.take_syncs()
    assert len(took_ms) == 2 and min(took_ms) > 0 and node.durability.take_syncs() == []
