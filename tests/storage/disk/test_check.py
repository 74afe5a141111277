"""Check: what is said of a directory that is whole, damaged or incomplete; nothing is changed."""

import pytest

from kvtcp.storage.disk.check import CheckReport, check_directory
from kvtcp.storage.disk.manifest import read_manifest
from kvtcp.storage.disk.store import NodeStore
from kvtcp.storage.shard.table import Table
from tests.crash.disk import CrashDisk
from tests.support.storage_tools import BOOT, DIRECTORY, commit, fill, make, put, replace_file, take_snapshot


@pytest.fixture
def store(disk: CrashDisk) -> NodeStore:
    """Three shards, one of them in a snapshot."""
    made = make(disk, 10)
    take_snapshot(made, 1)
    fill(made, 5, first=10)
    return made


def check(disk: CrashDisk) -> CheckReport:
    """The report; nothing is changed."""
    manifest = read_manifest(disk, DIRECTORY)
    assert manifest is not None
    before, calls = disk.tree(), len(disk.calls)
    report = check_directory(disk, DIRECTORY, manifest, boot=BOOT)
    assert disk.tree() == before and len(disk.calls) == calls
    return report


def test_whole(disk: CrashDisk, store: NodeStore) -> None:
    """No finding, and lines with the numbers, before and after a stop."""
    keys = sum(len(copy.table) for copy in store.copies.values())
    report = check(disk)
    assert report.findings == [] and report.lines[1] == f"3 shards, 3 of them whole, {keys} keys"
    assert "not stopped in order" in report.lines[0] and report.lines[2] == f"1 snapshot, {store.snapshot_bytes} bytes"
    assert f"log: {len(store.log.segments)} segments, {store.log.total_bytes} bytes" in report.lines[3]
    assert report.lines[3].endswith("durable up to record 14, 1 record with data above it")
    store.close_clean()
    report = check(disk)
    assert report.findings == [] and report.lines[0].endswith(", stopped in order")


def test_a_torn_end_is_no_finding(disk: CrashDisk, store: NodeStore) -> None:
    """It is told, for nothing that was acknowledged was in it."""
    commit(store, [put(store.copies[0], b"k", b"torn")])
    path = store.log.segments[-1].path
    replace_file(disk, path, disk.read(path)[:-3])
    report = check(disk)
    assert report.findings == []
    assert report.lines[-1].startswith(f"the log ends torn, above everything acknowledged: {path} at byte ")


def test_damage(disk: CrashDisk, store: NodeStore) -> None:
    """A finding for each shard in doubt, and for each damaged file with its place."""
    segment = store.log.segments[-2]
    disk.flip_bit(segment.path, 8 * (segment.size - 3))
    report = check(disk)
    assert any(finding.startswith(f"{segment.path} at byte ") for finding in report.findings)
    doubts = [finding for finding in report.findings if "would be incomplete: " in finding]
    assert doubts and all("shard" in finding for finding in doubts)
    whole = int(report.lines[1].split(", ")[1].split()[0])
    assert doubts == [finding for finding in doubts if "2 shards (0, 2)" in finding] and whole == 1


def test_a_damaged_snapshot(disk: CrashDisk, store: NodeStore) -> None:
    """It is named."""
    path = store.snapshot_directory / store.snapshots[1].name.file
    disk.flip_bit(path, 8 * 70)
    report = check(disk)
    assert any(finding == f"{path}: the sum of the frame at byte 56 is wrong" for finding in report.findings)


def test_an_incomplete_copy(disk: CrashDisk, store: NodeStore) -> None:
    """What was given up earlier is a finding for as long as it is."""
    copy = store.copies[2]
    copy.complete, copy.reason = False, "the log was damaged"
    store.write_manifest(store.encode_manifest(store.copies.values()))
    report = check(disk)
    assert report.findings == ["incomplete: shard 2: the log was damaged"]


def test_tables_verify_themselves(disk: CrashDisk, store: NodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a table finds wrong with itself is a finding too."""
    def broken(table: Table) -> None:
        assert table.shard != 1, "the deadlines are those of the cells"

    monkeypatch.setattr(Table, "check", broken)
    report = check(disk)
    assert len(report.findings) == 1 and report.findings[0].startswith("shard 1: the deadlines are those of the cells")


def test_after_a_power_cut(disk: CrashDisk) -> None:
    """In mode os a hole among the last records is what a power cut leaves, and damage without one."""
    store = make(disk, shards=1, durability="os", segment_bytes=1000)
    for number in range(3):
        commit(store, [put(store.copies[0], b"k", b"%d" % number)])
    path = store.log.segments[-1].path
    disk.flip_bit(path, 8 * (disk.size(path) - 70))
    assert check(disk).findings
    manifest = read_manifest(disk, DIRECTORY)
    assert manifest is not None
    assert check_directory(disk, DIRECTORY, manifest, boot="boot 2").findings == []
