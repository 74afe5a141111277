"""Snapshots of a running node: on demand, by the length of the log, behind the log, and on a disk that is full."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from kvtcp.storage.disk.store import NodeStore
from tests.node.test_durability import Node, node, until
from tests.support.storage_tools import fill, names, open_small, state_of

__all__ = ["node"]


async def test_close_in_the_middle_of_a_snapshot(node: Node) -> None:
    """An unfinished snapshot is given up; the next start removes what there is of it."""
    for ordinal in range(1, 9):
        node.put(ordinal, key=b"k%d" % ordinal)
    node.disk.file_gate.close()
    node.durability.snapshot_all()
    await until(lambda: node.disk.file_gate.waiting == 1)
    closing = asyncio.ensure_future(node.durability.close(5.0))
    threading.Timer(0.05, node.disk.file_gate.open).start()
    await closing
    assert node.store.manifest.clean and node.store.copies[0].table._frozen == []
    again = open_small(node.disk, seed=1)
    assert again.copies[0].table.seq == 8 and not any(name.endswith(".tmp") for name in names(node.disk, "snapshots"))


# --- snapshots --------------------------------------------------------------------------------------


async def test_snapshots_on_demand(node: Node) -> None:
    """Every shard with something new is snapshotted, and the log before goes as soon as there is a new segment."""
    for ordinal in range(1, 10):
        node.put(ordinal, shard=ordinal % 2, key=b"k%d" % ordinal)
    await until(lambda: node.told[-1:] == [("c", 9)])
    first = node.store.log.segments[0].path
    node.durability.snapshot_all()
    await until(lambda: len(node.store.snapshots) == 2 and node.durability._snapshot is None)
    assert sorted(node.frozen) == [0, 1]
    node.put(10)
    await until(lambda: not node.disk.exists(first) and len(node.store.log.segments) == 1, "the old log to go")
    again = node.reopened()
    assert state_of(again.copies) == state_of(node.store.copies) and again.replayed_entries == 1
    assert node.store.copies[0].table._frozen == []


async def test_on_demand_before_the_first_record(node: Node) -> None:
    """With nothing in the log nothing is snapshotted, and what is written afterwards is kept."""
    node.durability.snapshot_all()
    for ordinal in range(1, 4):
        node.put(ordinal)
    await until(lambda: node.told[-1:] == [("c", 3)])
    node.durability.snapshot_all()
    await until(lambda: node.durability._snapshot is None and node.store.snapshots)
    node.put(4)
    await until(lambda: node.told[-1:] == [("c", 4)])
    assert node.reopened().copies[0].table.seq == 4


async def test_a_snapshot_waits_for_the_log(node: Node) -> None:
    """A snapshot is published when the log is durable up to its position, and not before."""
    node.disk.log_gate.close()
    node.put(1)
    node.durability.snapshot_all()
    await until(lambda: node.durability._snapshot is not None and node.durability._snapshot._whole)
    assert names(node.disk, "snapshots") == ["0000-1-00000000000000000001.snapshot.tmp"] and not node.store.snapshots
    node.disk.log_gate.open()
    await until(lambda: node.store.snapshots)
    assert names(node.disk, "snapshots") == ["0000-1-00000000000000000001.snapshot"]


async def test_a_long_log_is_snapshotted() -> None:
    """The shard that holds the oldest segment back is next, until the log is short again."""
    node = Node(snapshot_log_bytes=800)
    disk, store = node.disk, node.store
    for ordinal in range(1, 80):
        node.put(ordinal, shard=ordinal % 3, key=b"k%d" % (ordinal % 5))
        await until(lambda ordinal=ordinal: node.told[-1:] == [("c", ordinal)])  # type: ignore[misc]
    await until(lambda: store.log.total_bytes <= max(800, store.snapshot_bytes) and node.durability._snapshot is None)
    await until(lambda: len(names(disk)) == len(store.log.segments), "the files to be removed")
    assert len(store.log.segments) < 5
    assert state_of(node.reopened().copies) == state_of(store.copies)
    await node.durability.close()


async def test_a_log_that_is_covered_goes_without_a_snapshot() -> None:
    """Segments that every snapshot has passed, as a crash may leave them, are removed although nothing is published."""

    def covered(store: NodeStore) -> None:
        fill(store, 12, shards=1)
        store.write_snapshot(store.copies[0], [])
        assert store.snapshots[0].name.seq == store.copies[0].table.seq and len(store.log.segments) > 3

    node = Node(1, before=covered, snapshot_log_bytes=100)
    store = node.store
    await until(lambda: len(names(node.disk)) == 1, "the segments to go")
    assert node.frozen == [] and state_of(node.reopened().copies) == state_of(store.copies)
    await node.durability.close()


async def test_a_snapshot_without_space_is_given_up() -> None:
    """ENOSPC ends the snapshot, not the node; its scan is closed, its file removed, and it is tried again later."""
    node = Node()
    disk, store = node.disk, node.store
    node.put(1)
    node.put(2, shard=1)
    await until(lambda: node.told[-1:] == [("c", 2)])
    disk.broken, disk.broken_number = "snapshots", errno.ENOSPC
    node.durability.snapshot_all()
    await until(lambda: node.durability._snapshot is None)
    assert len(node.frozen) == 1 and names(disk, "snapshots") == [] and node.failures == []
    assert store.copies[0].table._frozen == [] and store.copies[1].table._frozen == []
    node.durability._next_snapshot()
    assert len(node.frozen) == 1, "not at once"
    node.put(3)
    await until(lambda: node.told[-1:] == [("c", 3)])
    disk.broken = ""
    node.durability.snapshot_all()
    await until(lambda: len(store.snapshots) == 2)
    await node.durability.close()


@pytest.mark.parametrize("what", ["create", "write", "rename", "sync_directory"])
async def test_a_disk_gets_full_in_any_call_of_a_snapshot(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call finds no space, the node goes on and the data is what it was."""
    node = Node(1)
    disk, store = node.disk, node.store
    node.put(1)
    await until(lambda: node.told == [("c", 1)])
    failed: list[Path] = []
    original = disk._failure

    def failure(call: str, path: Path, new: Path | None = None) -> OSError | None:
        error = original(call, path, new)
        if call == what and "snapshots" in path.parts and not failed:
            failed.append(path)
            return OSError(errno.ENOSPC, "full", str(path))
        return error

    monkeypatch.setattr(disk, "_failure", failure)
    node.durability.snapshot_all()
    await until(lambda: failed and node.durability._snapshot is None)
    assert node.failures == [] and store.copies[0].table._frozen == [] and not store.snapshots
    assert not any(name.endswith(".tmp") for name in names(disk, "snapshots"))
    assert state_of(node.reopened().copies) == state_of(store.copies)
    await node.durability.close()


# --- space ------------------------------------------------------------------------------------------
