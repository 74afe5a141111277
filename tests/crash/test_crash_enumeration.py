"""Crashes of a node's store between any two calls of the disk, and planted mistakes that must be found."""

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvtcp.storage.disk import store as store_module
from kvtcp.storage.disk.log import LogWriter, Prepared
from kvtcp.storage.disk.replay import Replayed
from kvtcp.storage.disk.snapshot import SnapshotFile
from kvtcp.storage.disk.store import NodeStore
from tests.crash import enumeration as crash_enumeration
from tests.crash.enumeration import Lost, Workload, enumerate_crashes, enumerate_errors

STATES_MIN = 2_000


@pytest.mark.parametrize("durability", ["sync", "os"])
def test_no_crash_loses_anything(durability: str) -> None:
    """Thousands of recovered states; the workload rotates, publishes snapshots and removes segments. None is wrong."""
    states, workload = enumerate_crashes(4, 130, samples=3 if durability == "sync" else 5, durability=durability)
    assert states >= STATES_MIN
    for what, least in (("rotated", 3), ("published", 3), ("segments removed", 2), ("opened", 2)):
        assert workload.seen[what] >= least, workload.seen


@pytest.mark.parametrize("durability", ["sync", "os"])
def test_copies_come_and_go(durability: str) -> None:
    """Copies are replaced, dropped and made anew all the time: a crash leaves the old one as it was, or the new one."""
    states, workload = enumerate_crashes(6, 130, samples=3, durability=durability, changes=True)
    assert states >= 1_000
    for what, least in (("pulled", 3), ("changed", 6), ("rotated", 3), ("segments removed", 2)):
        assert workload.seen[what] >= least, workload.seen


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC])
def test_an_error_at_every_call(error_number: int, changes: bool) -> None:
    """Whichever call of the disk fails, what was acknowledged before is there afterwards."""
    assert enumerate_errors(4, 60, error_number, changes=changes) > 200


# --- planted mistakes -----------------------------------------------------------------------------------


def without_sync(self: LogWriter, prepared: Prepared) -> None:
    """The record is acknowledged before it is synced."""
    if prepared.header is not None:
        self._begin_file(prepared.segment, prepared.header)
    assert self._file is not None
    self._file.write(prepared.data)


def without_directory_sync(self: LogWriter, segment: Any, data: bytes) -> None:
    """A new segment has no durable name."""
    temporary = segment.path.with_name(segment.path.name + ".tmp")
    self._disk.remove(temporary)
    self._file = self._disk.create(temporary)
    self._file.write(data)
    self._file.sync()
    self._disk.rename(temporary, segment.path)


def named_before_it_is_whole(self: LogWriter, segment: Any, data: bytes) -> None:
    """A new segment gets its name before its content is on the disk."""
    temporary = segment.path.with_name(segment.path.name + ".tmp")
    self._disk.remove(temporary)
    self._file = self._disk.create(temporary)
    self._file.write(data)
    self._disk.rename(temporary, segment.path)
    self._disk.sync_directory(self._directory)
    self._file.sync()


def unordered_removal(self: NodeStore, paths: Iterable[Path]) -> None:
    """Files are removed, and nobody waits for one removal before the next."""
    for path in paths:
        self.disk.remove(path)


def removes_too_early(self: LogWriter, is_covered: Any) -> list[Path]:
    """All older segments are removed as soon as any snapshot was published."""
    paths = [segment.path for segment in self.segments[:-1]]
    del self.segments[:-1]
    return paths


def publish_unsynced(self: SnapshotFile) -> None:
    """A snapshot gets its name before its bytes are on the disk."""
    assert self._file is not None
    self._file.close()
    self._file = None


def tail_stays_where_it_is(store: NodeStore, replayed: Replayed, new_disk: Callable[[], str], boot: str) -> None:
    """After a restart the records above the mark count as durable though nobody synced them."""
    store.log.begin(replayed.segments, replayed.last_lsn + 1, [], replayed.positions, replayed.positions)


def put_file(disk: Any, path: Path, data: bytes) -> None:
    """A new file with synced content."""
    disk.remove(path)
    file = disk.create(path)
    file.write(data)
    file.sync()


def manifest_in_place(disk: Any, directory: Path, data: bytes) -> None:
    """The manifest is replaced without a temporary file."""
    put_file(disk, directory / "manifest.json", data)
    disk.sync_directory(directory)


def manifest_unsynced(disk: Any, directory: Path, data: bytes) -> None:
    """The promise is reported before its rename is durable."""
    put_file(disk, directory / "manifest.json.tmp", data)
    disk.rename(directory / "manifest.json.tmp", directory / "manifest.json")


def let_go_too_early(self: NodeStore) -> list[Path]:
    """Segments of the log are removed while the manifest still names the old copy."""
    return self.log.deletable(self._is_covered)


def generation_again(self: Workload, shard: int) -> int:
    """A copy that replaces another one has its generation."""
    copy = self.store.copies.get(shard)
    return 1 if copy is None else copy.generation


def generation_forgotten(self: Workload, shard: int) -> int:
    """The generation of a copy that was dropped is given again."""
    copy = self.store.copies.get(shard)
    return 1 if copy is None else copy.generation + 1


# mistake -> what is replaced by what, and a seed that finds it
MISTAKES: dict[str, tuple[Any, str, Any, int]] = {
    "acknowledged before the sync": (LogWriter, "write", without_sync, 1),
    "segment without a durable name": (LogWriter, "_begin_file", without_directory_sync, 1),
    "segment named before it is whole": (LogWriter, "_begin_file", named_before_it_is_whole, 1),
    "removals in any order": (NodeStore, "remove", unordered_removal, 21),
    "log removed too early": (LogWriter, "deletable", removes_too_early, 2),
    "snapshot published unsynced": (SnapshotFile, "finish", publish_unsynced, 3),
    "tail counted as durable": (store_module, "_settle", tail_stays_where_it_is, 2),
    "manifest replaced in place": (store_module, "write_manifest", manifest_in_place, 1),
    "manifest without a durable name": (store_module, "write_manifest", manifest_unsynced, 1),
}

# the same, of workloads with copies that come and go
CHANGE_MISTAKES: dict[str, tuple[Any, str, Any, int]] = {
    "log let go too early": (NodeStore, "needless_segments", let_go_too_early, 6),
    "generation given twice": (Workload, "next_generation", generation_again, 2),
    "generation forgotten": (Workload, "next_generation", generation_forgotten, 2),
    "copy published unsynced": (SnapshotFile, "finish", publish_unsynced, 1),
}


@pytest.mark.parametrize("mistake", CHANGE_MISTAKES)
def test_mistakes_with_copies_are_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leads to a wrong recovered state too, where the right way does not."""
    holder, attribute, wrong, seed = CHANGE_MISTAKES[mistake]
    enumerate_crashes(seed, 90, samples=1, changes=True)
    monkeypatch.setattr(holder, attribute, wrong)
    with pytest.raises((Lost, store_module.StoreError)):
        enumerate_crashes(seed, 90, samples=6, changes=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to be careless with a disk leads to a wrong recovered state."""
    holder, attribute, wrong, seed = MISTAKES[mistake]
    monkeypatch.setattr(holder, attribute, wrong)
    with pytest.raises((Lost, store_module.StoreError)):
        enumerate_crashes(seed, 90, samples=6)


def test_entries_kept_only_in_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot without the entries that may be uncommitted is found: the log they were in is gone."""
    plain = crash_enumeration.encode_snapshot
    monkeypatch.setattr(crash_enumeration, "encode_snapshot", lambda header, frozen, kept: plain(header, frozen, []))
    with pytest.raises(Lost, match="not kept"):
        enumerate_crashes(6, 90, samples=3)
