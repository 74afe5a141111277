"""Replay: what a data directory holds, and the verdict on every shard when something of it is missing or damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtcp.storage.disk import log_format
from kvtcp.storage.disk.manifest import read_manifest
from kvtcp.storage.disk.replay import Damage, Replayed, replay
from kvtcp.storage.disk.store import NodeStore
from tests.crash.disk import CrashDisk
from tests.support import storage_tools as tools

LOG = tools.DIRECTORY / "log"
SNAPSHOTS = tools.DIRECTORY / "snapshots"


def read(disk: CrashDisk) -> Replayed:
    """What is there, by the manifest that is there; nothing is changed."""
    manifest = read_manifest(disk, tools.DIRECTORY)
    assert manifest is not None
    before = disk.tree()
    found = replay(disk, tools.DIRECTORY, manifest)
    assert disk.tree() == before
    return found


def offsets(disk: CrashDisk, path: Path) -> list[int]:
    """Where each record of a segment begins, and the end."""
    data = disk.read(path)
    header = log_format.parse_header(data)
    found = [header.bytes]
    for record in log_format.parse_records(data, header).records:
        found.append(found[-1] + log_format.RECORD_BYTES + len(record.payload))
    return found


def damage_record(disk: CrashDisk, path: Path, index: int) -> int:
    """Flip a bit of a record's payload; where it begins."""
    offset = offsets(disk, path)[index]
    disk.flip_bit(path, (offset + log_format.RECORD_BYTES) * 8 + 3)
    return offset


def damage_snapshot(disk: CrashDisk, store: NodeStore) -> Path:
    """Flip a bit of the snapshot of shard 0."""
    path = SNAPSHOTS / store.snapshots[0].name.file
    disk.flip_bit(path, 8 * 70)
    return path


def whole(found: Replayed) -> tools.State:
    """The state of the shards without doubt."""
    return {shard: row for shard, row in tools.state_of(found.copies).items() if shard not in found.doubts}


def segment_paths(disk: CrashDisk) -> list[Path]:
    """The segments, oldest first."""
    return [LOG / name for name in tools.names(disk)]


# --- what is whole ----------------------------------------------------------------------------------


def test_log_alone(disk: CrashDisk) -> None:
    """Entries in several segments, without a snapshot."""
    store = tools.make(disk, 20)
    found = read(disk)
    assert tools.state_of(found.copies) == tools.state_of(store.copies)
    assert not found.doubts and not found.damages and not found.cut and not found.log_damaged
    assert found.entries == sum(copy.table.seq for copy in store.copies.values()) == 30
    assert (found.last_lsn, found.mark) == (20, 19) and [record.lsn for record in found.tail] == [20]
    assert found.positions == store.log.positions
    assert [segment.path for segment in found.segments] == [segment.path for segment in store.log.segments]
    assert [segment.size for segment in found.segments] == [segment.size for segment in store.log.segments]
    for shard in range(3):
        last_seq = found.copies[shard].table.seq
        assert [entry[2] for entry in found.backlog.of_shard(shard)] == list(range(1, last_seq + 1))


def test_positions_before_the_tail(disk: CrashDisk) -> None:
    """`mark_positions` are those that a new segment with the tail says were logged before it."""
    store = tools.make(disk, 4, shards=2)
    before = dict(store.log.positions)
    tools.commit(store, [tools.put(store.copies[0], b"k", b"last")])
    found = read(disk)
    assert found.mark_positions == before and found.positions[0][1] == before[0][1] + 1
    tools.mark(store)
    found = read(disk)
    assert found.mark == 5 and found.mark_positions == found.positions == store.log.positions


def test_snapshots_and_log(disk: CrashDisk) -> None:
    """Each shard is its newest snapshot and the entries behind it."""
    store = tools.make(disk, 10)
    tools.take_snapshot(store, 0)
    tools.fill(store, 5, first=10)
    tools.take_snapshot(store, 1)
    tools.fill(store, 5, first=15)
    found = read(disk)
    assert tools.state_of(found.copies) == tools.state_of(store.copies) and not found.doubts
    assert found.snapshots == {shard: info.name for shard, info in store.snapshots.items()}
    assert found.snapshot_bytes == {shard: info.size for shard, info in store.snapshots.items()}
    assert found.entries < 30
    for shard in range(3):
        numbers = {entry[2] for entry in found.backlog.of_shard(shard)}
        assert max(numbers) == found.copies[shard].table.seq, "what may be uncommitted can be shipped"


def test_files_that_nobody_needs(disk: CrashDisk) -> None:
    """Temporary files and older snapshots are stale; names of others are left alone."""
    store = tools.make(disk, 6)
    store.write_snapshot(store.copies[0], [])
    first = SNAPSHOTS / store.snapshots[0].name.file
    tools.fill(store, 6, first=6)
    store.write_snapshot(store.copies[0], [])
    for path in (LOG / f"{99:020d}.log.tmp", SNAPSHOTS / "0001-1-00000000000000000009.snapshot.tmp", LOG / "notes",
                 SNAPSHOTS / "00000-1-00000000000000000001.snapshot"):  # fmt: skip
        disk.create(path)
    found = read(disk)
    assert sorted(found.stale) == sorted([first, LOG / f"{99:020d}.log.tmp",
                                          SNAPSHOTS / "0001-1-00000000000000000009.snapshot.tmp"])  # fmt: skip
    assert tools.state_of(found.copies) == tools.state_of(store.copies) and not found.damages


def test_progress(disk: CrashDisk) -> None:
    """It grows up to the total, for snapshots and for the log."""
    store = tools.make(disk, 10)
    tools.take_snapshot(store, 0)
    tools.take_snapshot(store, 1)
    told: list[tuple[str, int, int]] = []
    replay(disk, tools.DIRECTORY, store.manifest, lambda *row: told.append(row))
    for what in ("snapshots", "log"):
        rows = [(done, total) for phase, done, total in told if phase == what]
        assert rows and rows == sorted(rows) and rows[-1][0] == rows[-1][1]


def test_entries_of_another_generation(disk: CrashDisk) -> None:
    """Entries from before a copy was begun anew are neither applied nor kept."""
    store = tools.make(disk, 6)
    copy = store.copies[0]
    old_seq = copy.table.seq
    copy.table.load([], 0, 0, 0)
    copy.table.generation = 2
    store.write_manifest(store.encode_manifest(store.copies.values()))
    tools.commit(store, [tools.put(copy, b"new", b"v")])
    found = read(disk)
    assert found.copies[0].table.seq == 1 < old_seq and not found.doubts
    assert [(entry[1], entry[2]) for entry in found.backlog.of_shard(0)] == [(2, 1)]
    assert tools.state_of(found.copies) == tools.state_of(store.copies)


# --- the torn end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mark", [False, True])
def test_torn_at_every_byte(disk: CrashDisk, with_mark: bool) -> None:
    """A last record that is cut off at any byte is torn if nothing says that it was on the disk, else damage."""
    store = tools.make(disk, 2, segment_bytes=1000)
    before = tools.state_of(store.copies)
    tools.commit(store, [tools.put(store.copies[1], b"torn", b"value"), tools.put(store.copies[2], b"torn", b"value")])
    after = tools.state_of(store.copies)
    path = store.log.segments[-1].path
    *_, start, end = offsets(disk, path)
    if with_mark:
        tools.mark(store)
    data = disk.read(path)
    for size in range(start, end + 1):
        rest = data[end:] if with_mark else b""
        tools.replace_file(disk, path, data[:size] + rest)
        found = read(disk)
        if size == end:
            assert tools.state_of(found.copies) == after and not found.cut and not found.damages
        elif with_mark:
            assert sorted(found.doubts) == [0, 1, 2] and found.log_damaged and not found.cut
            assert f"{path} at byte {start}" in found.doubts[1] and found.damages[0].offset == start
        else:
            assert tools.state_of(found.copies) == before and not found.doubts and not found.damages
            assert bool(found.cut) == (size > start), size
            assert found.mark_positions == found.positions or found.tail


def test_cut_says_where(disk: CrashDisk) -> None:
    """The place of a torn end, for people."""
    store = tools.make(disk, 3)
    offset = damage_record(disk, store.log.segments[-1].path, -2)
    found = read(disk)
    assert found.cut == f"{store.log.segments[-1].path} at byte {offset}: the sum of a record is wrong"


def test_what_a_process_leaves_behind_a_bad_record(disk: CrashDisk) -> None:
    """In mode os many records are above the mark. One that is bad with others behind it was not torn by the end of a
    process; after a power cut it may have been, as the machine writes back in any order."""
    store = tools.make(disk, 5, durability="os", segment_bytes=1000)
    path = store.log.segments[-1].path
    assert len(offsets(disk, path)) > 3
    first = store.log.segments[-1].first_lsn
    damage_record(disk, path, 0)
    found = read(disk)
    assert found.log_damaged and found.mark < first and found.damages[0].path == path
    found = replay(disk, tools.DIRECTORY, store.manifest, power_failed=True)
    assert not found.damages and not found.doubts and found.cut and found.last_lsn >= first


# --- damage in the log ------------------------------------------------------------------------------


def test_damage_with_and_without_proof(disk: CrashDisk) -> None:
    """Shards of which something behind the damage shows that they were not in it are whole, the others in doubt."""
    store = tools.make(disk, shards=5)
    copies = store.copies
    for shard in range(4):
        tools.commit(store, [tools.put(copies[shard], b"k", b"v")])
    store.log.begin_new_segment()
    tools.commit(store, [tools.put(copies[0], b"k", b"2")])  # the damaged one
    tools.commit(store, [tools.put(copies[1], b"k", b"2")])  # shows that shard 1 was not in it
    tools.mark(store)
    path = store.log.segments[-1].path
    offset = damage_record(disk, path, 0)
    found = read(disk)
    assert sorted(found.doubts) == [0, 2, 3, 4], "nothing behind it names 0, 2, 3 and 4"
    assert all(str(path) in reason and f"byte {offset}" in reason for reason in found.doubts.values())
    assert tools.state_of(found.copies)[1] == tools.state_of(copies)[1] and found.copies[0].table.seq == 1
    store.log.begin_new_segment()
    tools.commit(store, [tools.put(copies[4], b"k", b"1")])
    found = read(disk)
    assert sorted(found.doubts) == [0], "the next segment says what was logged before it"
    assert whole(found) == {shard: row for shard, row in tools.state_of(copies).items() if shard != 0}
    assert [damage.path for damage in found.damages] == [path] and found.tail == []


def test_damage_of_what_a_snapshot_has(disk: CrashDisk) -> None:
    """A record is damaged, but all of it is in snapshots: nothing is in doubt, and it is reported all the same."""
    store = tools.make(disk, 8)
    path = store.log.segments[0].path
    for shard in range(3):
        store.write_snapshot(store.copies[shard], [])
    tools.fill(store, 3, first=8)
    damage_record(disk, path, 0)
    found = read(disk)
    assert not found.doubts and found.log_damaged and [damage.path for damage in found.damages] == [path]
    assert tools.state_of(found.copies) == tools.state_of(store.copies)


def test_two_holes_in_one_segment(disk: CrashDisk) -> None:
    """A proof between two damaged records does not cover the second one."""
    store = tools.make(disk, shards=2)
    tools.commit(store, [tools.put(store.copies[0], b"k", b"1")])  # damaged
    tools.commit(store, [tools.put(store.copies[1], b"k", b"1")])  # proves shard 1 up to here
    tools.commit(store, [tools.put(store.copies[1], b"k", b"2")])  # damaged
    tools.mark(store)
    path = store.log.segments[-1].path
    damage_record(disk, path, 2)
    damage_record(disk, path, 0)
    found = read(disk)
    assert sorted(found.doubts) == [0, 1]


def test_damage_and_a_torn_end(disk: CrashDisk) -> None:
    """Behind a damage, what is above the mark and follows a torn record is not taken."""
    store = tools.make(disk, shards=1, durability="os")
    for number in range(3):
        tools.commit(store, [tools.put(store.copies[0], b"k", b"%d" % number)])
    path = store.log.segments[-1].path
    assert len(offsets(disk, path)) == 4
    damage_record(disk, path, 1)
    found = replay(disk, tools.DIRECTORY, store.manifest, power_failed=True)
    assert found.cut and found.copies[0].table.seq == 1 and not found.damages


def test_a_damaged_record_is_not_overwritten_by_the_next_segment(disk: CrashDisk) -> None:
    """The only record of the last segment is damaged: the new segment takes a number above it."""
    store = tools.make(disk, 1)
    store.log.close()
    store = tools.open_small(disk, seed=1)  # the record is above the mark, so it begins the new segment
    path = store.log.segments[-1].path
    assert log_format.parse_header(disk.read(path)).durable_lsn == store.log.segments[-1].first_lsn
    damage_record(disk, path, 0)
    found = read(disk)
    assert found.log_damaged and found.last_lsn >= store.log.segments[-1].first_lsn


def test_every_header_damaged(disk: CrashDisk) -> None:
    """A segment whose header is damaged is one of which nothing is known: the next one's header is the proof."""
    store = tools.make(disk, 12)
    paths = segment_paths(disk)
    assert len(paths) > 3
    for index, path in enumerate(paths):
        copy = disk.process_kill()
        copy.flip_bit(path, 30 * 8)
        found = read(copy)
        assert found.log_damaged and found.damages[0] == Damage(path, None, "the sum of the header is wrong")
        assert found.last_lsn >= store.log.segments[index].first_lsn
        for shard, row in whole(found).items():
            assert row == tools.state_of(store.copies)[shard]
        assert found.doubts, "some entry was in it"
    assert len(found.doubts) == 3, "after the last one there is no proof"


def test_missing_segments(disk: CrashDisk) -> None:
    """Whichever segment is gone, shards that had entries in it are in doubt, and no other state is taken for whole."""
    store = tools.make(disk, 12)
    store.log.close()
    store = tools.open_small(disk, seed=1)
    tools.fill(store, 2, first=12)
    state = tools.state_of(store.copies)
    paths = segment_paths(disk)
    ends = [segment.first_lsn for segment in store.log.segments[1:]] + [99]  # what is behind them is void
    for path, end_lsn in zip(paths, ends, strict=True):
        copy = disk.process_kill()
        copy.remove(path)
        found = read(copy)
        touched = {
            entry[0]
            for record in log_format.parse_records(disk.read(path), log_format.parse_header(disk.read(path))).records
            for entry in record.entries()
            if record.lsn < end_lsn
        }
        assert touched <= set(found.doubts), path
        assert whole(found) == {shard: row for shard, row in state.items() if shard not in found.doubts}
    assert "the manifest names this segment" in str(found.damages[-1]) and len(found.doubts) == 3
    assert found.last_lsn >= store.manifest.segment


def test_no_segment_at_all(disk: CrashDisk) -> None:
    """An empty log of a node that had one: every shard is in doubt, also one that has a snapshot."""
    store = tools.make(disk, 6)
    store.write_snapshot(store.copies[0], [])
    paths = sorted(segment_paths(disk))
    for path in paths:
        disk.remove(path)
    found = read(disk)
    assert sorted(found.doubts) == [0, 1, 2]
    assert found.damages[0].path == paths[-1]


def test_a_segment_of_another_directory(disk: CrashDisk) -> None:
    """It has right sums and is not ours."""
    tools.make(disk, 3)
    other = CrashDisk()
    tools.open_small(other, seed=5).log.close()
    path = segment_paths(disk)[0]
    tools.replace_file(disk, path, other.read(path))
    found = read(disk)
    assert "belongs to another data directory" in str(found.damages[0]) and len(found.doubts) == 3


def test_a_segment_under_another_name(disk: CrashDisk) -> None:
    """The header knows its first record."""
    store = tools.make(disk, 3)
    path = store.log.segments[-1].path
    disk.rename(path, LOG / f"{50:020d}.log")
    found = read(disk)
    assert "begins with record" in str(found.damages[-1]) and found.doubts and found.last_lsn >= 50


def test_a_segment_of_another_format(disk: CrashDisk) -> None:
    """With a right sum it is no damage, but of another version: nothing is read."""
    store = tools.make(disk, 3)
    path = store.log.segments[-1].path
    data = bytearray(disk.read(path))
    header = log_format.parse_header(bytes(data))
    encoded = bytearray(log_format.encode_header(header))
    encoded[9] = 9
    encoded[16:20] = _header_sum(bytes(encoded), header.bytes).to_bytes(4, "big")
    tools.replace_file(disk, path, bytes(encoded) + bytes(data[header.bytes :]))
    with pytest.raises(log_format.VersionError, match="format 9"):
        read(disk)


def _header_sum(data: bytes, length: int) -> int:
    from zlib import crc32

    return crc32(data[20:length], crc32(data[:16]))


def crafted(disk: CrashDisk, change: Callable[[list[tuple[int, int, int, int, bytes]]], object]) -> Replayed:
    """A store of one shard whose only record has entries changed by somebody who knows how to compute sums."""
    store = tools.make(disk, shards=1)
    entries = [tools.put(store.copies[0], b"k", b"%d" % number) for number in range(3)]
    segment = store.log.segments[-1]
    header = log_format.parse_header(disk.read(segment.path))
    payload = change(entries)
    data = payload if isinstance(payload, bytes) else log_format.encode_entries(payload)  # type: ignore[arg-type]
    record = log_format.encode_record(header.salt, header.first_lsn, 0, data)
    tools.replace_file(disk, segment.path, disk.read(segment.path)[: header.bytes] + record)
    return read(disk)


def test_entries_that_do_not_follow(disk: CrashDisk) -> None:
    """A gap in the numbers of a shard is a doubt."""
    found = crafted(disk, lambda entries: [entries[0], entries[2]])
    assert found.doubts[0].startswith("the entries 2 to 2 are missing before one in ")


def test_entries_of_another_chain(disk: CrashDisk) -> None:
    """An entry whose chain is another one is not applied."""
    found = crafted(disk, lambda entries: [entries[0], (*entries[1][:3], 77, entries[1][4])])
    assert "the chain of entry 2" in found.doubts[0] and found.copies[0].table.seq == 1


def test_a_record_that_was_written_wrong(disk: CrashDisk) -> None:
    """A right sum over what is no list of entries is damage."""
    for payload in (b"\x91\x95\x01\x01\x01\x01\x01", b"\xc1", b"\x91\x94\x01\x01\x01\x01"):
        disk = CrashDisk()
        found = crafted(disk, lambda _, payload=payload: payload)  # type: ignore[misc]
        assert "a right sum and no right payload" in str(found.damages[0]) and 0 in found.doubts


def test_a_chain_that_differs_from_the_snapshot(disk: CrashDisk) -> None:
    """Log and snapshot agree where they meet, or the shard is in doubt."""
    store = tools.make(disk, 3, shards=1)
    store.write_snapshot(store.copies[0], [])
    segment = store.log.segments[0]
    header = log_format.parse_header(disk.read(segment.path))
    assert segment.first_lsn == 1
    records = []
    for lsn in range(1, 4):
        entry = (0, 1, store.copies[0].table.seq - 3 + lsn, 5, b"")
        records.append(log_format.encode_record(header.salt, lsn, lsn - 1, log_format.encode_entries([entry])))
    encoded = log_format.encode_header(log_format.SegmentHeader(header.directory, header.salt, 1, 0, {}))
    for path in segment_paths(disk):
        disk.remove(path)
    tools.replace_file(disk, segment.path, encoded + b"".join(records))
    found = read(disk)
    assert "has another chain than the snapshot" in found.doubts[0]


# --- snapshots --------------------------------------------------------------------------------------


def test_a_damaged_snapshot_alone(disk: CrashDisk) -> None:
    """Without its log a shard whose snapshot is damaged is in doubt; the others are not."""
    store = tools.make(disk, 9)
    for shard in range(3):
        tools.take_snapshot(store, shard)
    tools.fill(store, 1, first=9)
    path = damage_snapshot(disk, store)
    found = read(disk)
    assert sorted(found.doubts) == [0] and str(path) in found.doubts[0]
    assert [damage.path for damage in found.damages] == [path] and not found.log_damaged
    assert whole(found) == {shard: row for shard, row in tools.state_of(store.copies).items() if shard}


def test_a_damaged_snapshot_with_the_log(disk: CrashDisk) -> None:
    """As long as the log has everything, a damaged snapshot costs nothing but is reported."""
    store = tools.make(disk, 9)
    store.write_snapshot(store.copies[0], [])
    path = damage_snapshot(disk, store)
    found = read(disk)
    assert not found.doubts and [damage.path for damage in found.damages] == [path]
    assert tools.state_of(found.copies) == tools.state_of(store.copies) and 0 not in found.snapshots


def test_a_damaged_snapshot_with_an_older_one(disk: CrashDisk) -> None:
    """An older snapshot and the log behind it lead to the same."""
    store = tools.make(disk, 5)
    for shard in range(3):
        tools.take_snapshot(store, shard)
    older = store.snapshots[0].name
    tools.fill(store, 6, first=5)
    store.write_snapshot(store.copies[0], [])
    path = damage_snapshot(disk, store)
    assert store.snapshots[0].name != older
    found = read(disk)
    assert not found.doubts and found.snapshots[0] == older and [damage.path for damage in found.damages] == [path]
    assert tools.state_of(found.copies) == tools.state_of(store.copies) and SNAPSHOTS / older.file not in found.stale


def test_a_damaged_snapshot_that_the_log_knows_nothing_of(disk: CrashDisk) -> None:
    """The name of a damaged snapshot says how far the shard was: what does not reach it is in doubt."""
    store = tools.make(disk)
    for number in range(4):
        tools.put(store.copies[0], b"k%d" % number, b"v")  # as if all of it came from another member
    store.write_snapshot(store.copies[0], [])
    assert tools.state_of(read(disk).copies) == tools.state_of(store.copies)
    path = damage_snapshot(disk, store)
    found = read(disk)
    assert sorted(found.doubts) == [0] and str(path) in found.doubts[0]


def test_a_missing_snapshot(disk: CrashDisk) -> None:
    """Its log is deleted, so the first segment that is left says what is missing."""
    store = tools.make(disk, 9)
    for shard in range(3):
        tools.take_snapshot(store, shard)
    assert len(store.log.segments) == 1
    disk.remove(SNAPSHOTS / store.snapshots[1].name.file)
    found = read(disk)
    assert sorted(found.doubts) == [1] and "are missing before" in found.doubts[1] and not found.damages
    assert whole(found) == {shard: row for shard, row in tools.state_of(store.copies).items() if shard != 1}


def test_a_snapshot_of_another_directory(disk: CrashDisk) -> None:
    """A snapshot that was copied from another node is not taken for ours."""
    store = tools.make(disk, 4, shards=1)
    tools.take_snapshot(store, 0)
    other = CrashDisk()
    foreign = tools.make(other, 4, shards=1, seed=5)
    foreign.write_snapshot(foreign.copies[0], [])
    assert foreign.snapshots[0].name == store.snapshots[0].name
    path = SNAPSHOTS / store.snapshots[0].name.file
    tools.replace_file(disk, path, other.read(path))
    found = read(disk)
    assert "belongs to another data directory" in str(found.damages[0])


def test_snapshots_of_given_up_copies(disk: CrashDisk) -> None:
    """What is left of a copy that was given up is named, to be kept; that of an earlier generation is stale."""
    store = tools.make(disk, 4)
    for shard in (0, 1):
        store.write_snapshot(store.copies[shard], [])
    store.copies[0].complete = False
    store.copies[1].table.generation = 2
    store.write_manifest(store.encode_manifest(store.copies.values()))
    found = read(disk)
    assert found.given_up == [SNAPSHOTS / store.snapshots[0].name.file]
    assert found.stale == [SNAPSHOTS / f"0001-1-{store.snapshots[1].name.seq:020d}.snapshot"]
    assert not found.doubts and not found.copies[0].complete and found.copies[1].table.seq == 0


def test_doubted_shards_ship_nothing(disk: CrashDisk) -> None:
    """Entries of a shard in doubt are not kept."""
    store = tools.make(disk, 6)
    disk.remove(segment_paths(disk)[0])
    found = read(disk)
    assert found.doubts
    for shard in found.doubts:
        assert found.backlog.of_shard(shard) == []
    assert store.copies[0].table.seq


def test_damage_reads_well() -> None:
    """A damage names file, place and reason."""
    assert str(Damage(Path("a/b"), 7, "bad")) == "a/b at byte 7: bad"
    assert str(Damage(Path("a/b"), None, "bad")) == "a/b: bad"
