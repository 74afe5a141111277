"""The log: numbers, marks, segments that begin, go on and go away, and errors of the disk."""

from pathlib import Path

import pytest

from kvtcp.storage.disk import log
from kvtcp.storage.disk.log import LogWriter, Prepared, segment_lsn, segment_name
from kvtcp.storage.disk.log_format import Record, Segment, SegmentHeader, parse_header, parse_records
from kvtcp.storage.shard.copy import Copy
from tests.crash.disk import CrashDisk
from tests.support.storage_tools import ids, put

FOLDER = Path("/log")
ID = b"directory"[:8]


def make_writer(disk: CrashDisk, sync: bool = True, segment_bytes_max: int = 300) -> LogWriter:
    """A new log, open."""
    disk.make_directory(FOLDER)
    writer = LogWriter(
        disk, FOLDER, ID, lambda: ids(len(disk.calls))(4), sync=sync, segment_bytes_max=segment_bytes_max
    )
    writer.begin([], 1, [], {}, {})
    return writer


def step(writer: LogWriter, prepared: Prepared) -> Prepared:
    """Write what was prepared."""
    writer.write(prepared)
    writer.written(prepared)
    return prepared


def read(disk: CrashDisk, name: str) -> tuple[SegmentHeader, Segment]:
    """A segment as it is on the disk."""
    data = disk.read(FOLDER / name)
    header = parse_header(data)
    return header, parse_records(data, header)


def lsns(segment: Segment) -> list[int]:
    """Which records are in a segment."""
    return [record.lsn for record in segment.records]


def test_names() -> None:
    """Names sort as numbers do; nothing else is taken for a segment."""
    assert segment_lsn(segment_name(7)) == 7 and segment_name(9) < segment_name(10)
    for name in ("7.log", segment_name(7) + ".tmp", segment_name(7)[:-4], "x" * 20 + ".log", "\u0661" * 20 + ".log"):
        assert segment_lsn(name) is None, name


def test_records_have_numbers_and_marks(disk: CrashDisk) -> None:
    """Each record says that the one before it is on the disk; a mark covers the last one."""
    writer, copy = make_writer(disk), Copy(0, "d")
    for number in range(3):
        prepared = step(writer, writer.prepare([put(copy, b"k", b"%d" % number)]))
        assert (prepared.lsn, writer.durable_lsn) == (number + 1, number + 1)
    step(writer, writer.prepare_mark())
    header, segment = read(disk, segment_name(1))
    assert (header.first_lsn, header.durable_lsn, header.positions) == (1, 0, {})
    assert [(record.lsn, record.durable_lsn) for record in segment.records] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert segment.records[3].entries() == [] and segment.records[0].entries()[0][:3] == (0, 1, 1)
    assert writer.positions == {0: (1, 3, copy.table.chain)}
    assert writer.total_bytes == disk.size(FOLDER / segment_name(1))


def test_a_record_is_synced_before_it_counts(disk: CrashDisk) -> None:
    """In mode sync each record is one write and one sync, in mode os one write."""
    for sync, expected in ((True, ["write", "sync"]), (False, ["write"])):
        disk = CrashDisk()
        writer = make_writer(disk, sync)
        before = len(disk.calls)
        step(writer, writer.prepare([put(Copy(0, "d"), b"k", b"v")]))
        assert [what for what, _ in disk.calls[before:]] == expected
        assert writer.durable_lsn == (1 if sync else 0)
        writer.sync_all()
        assert disk.calls[-1][0] == "sync"


def test_one_record_under_way(disk: CrashDisk) -> None:
    """The next record is not even prepared before the last one is written."""
    writer = make_writer(disk)
    writer.prepare_mark()
    with pytest.raises(AssertionError, match="at most one record"):
        writer.prepare_mark()


def test_rotation(disk: CrashDisk) -> None:
    """A full segment is followed by one that says what was before it; a large record is alone in its segment."""
    writer, copy = make_writer(disk), Copy(5, "d")
    for number in range(12):
        step(writer, writer.prepare([put(copy, b"k%d" % number, b"v" * (400 if number == 6 else 20))]))
    names = disk.list(FOLDER)
    assert [segment.path.name for segment in writer.segments] == names and len(names) > 3
    expected = 1
    for index, name in enumerate(names):
        header, segment = read(disk, name)
        assert header.first_lsn == expected == writer.segments[index].first_lsn
        assert header.durable_lsn == expected - 1 and segment.bad_offset is None
        if index:
            assert header.positions[5][1] == expected - 1, "an entry a record, so its number is the record's"
        expected += len(segment.records)
        assert disk.size(FOLDER / name) == writer.segments[index].size
    assert expected == 13
    assert len({read(disk, name)[0].salt for name in names}) == len(names), "no two have the same salt"


def test_old_records_are_on_the_disk_before_a_segment_has_its_name(disk: CrashDisk) -> None:
    """In mode os the old segment is synced first, as the header of the new one says that it is."""
    writer, copy = make_writer(disk, sync=False), Copy(0, "d")
    step(writer, writer.prepare([put(copy, b"k", b"v")]))
    writer.begin_new_segment()
    before = len(disk.calls)
    step(writer, writer.prepare([put(copy, b"k", b"v")]))
    old, new = segment_name(1), segment_name(2)  # a file is called as it was when it was opened
    assert [(what, path.name) for what, path in disk.calls[before:]] == [
        ("sync", old + ".tmp"), ("remove", new + ".tmp"), ("create", new + ".tmp"), ("write", new + ".tmp"),
        ("sync", new + ".tmp"), ("rename", new + ".tmp"), ("sync_directory", "log"), ("write", new + ".tmp"),
    ]  # fmt: skip
    assert writer.durable_lsn == 1


def test_a_new_segment_is_not_begun_twice(disk: CrashDisk) -> None:
    """Asked for a new segment while the present one has no record, the log goes on in it: its name is taken."""
    writer, copy = make_writer(disk), Copy(0, "d")
    writer.begin_new_segment()
    step(writer, writer.prepare([put(copy, b"k", b"v")]))
    assert [segment.first_lsn for segment in writer.segments] == [1]
    step(writer, writer.prepare([put(copy, b"k", b"v")]))
    assert [segment.first_lsn for segment in writer.segments] == [1], "the wish is fulfilled"
    writer.begin_new_segment()
    step(writer, writer.prepare_mark())
    assert [segment.first_lsn for segment in writer.segments] == [1, 3]
    assert writer.deletable(lambda *_: True) == [FOLDER / segment_name(1)]
    assert disk.list(FOLDER) == [segment_name(1), segment_name(3)]


def test_what_may_be_deleted(disk: CrashDisk) -> None:
    """Oldest first, as far as every shard's position before the next segment is covered; never the last one."""
    writer, copies = make_writer(disk), [Copy(0, "d"), Copy(1, "d")]
    for number in range(12):
        step(writer, writer.prepare([put(copies[number % 2], b"k%d" % number, b"v" * 30)]))
    first = [segment.path for segment in writer.segments]
    behind = [dict(segment.positions) for segment in writer.segments]
    assert len(first) >= 4
    assert writer.deletable(lambda shard, position: shard == 0) == []
    covered = behind[2]
    assert writer.deletable(lambda shard, position: position[1] <= covered[shard][1]) == first[:2]
    assert writer.deletable(lambda shard, position: position[1] <= covered[shard][1]) == []
    assert writer.deletable(lambda *_: True) == first[2:-1]
    assert [segment.path for segment in writer.segments] == first[-1:]


def test_the_last_segment_on_the_disk_stays(disk: CrashDisk) -> None:
    """While the next segment is still being written, the one before it is not deleted."""
    writer = make_writer(disk)
    step(writer, writer.prepare([put(Copy(0, "d"), b"k", b"v")]))
    writer.begin_new_segment()
    prepared = writer.prepare_mark()
    assert len(writer.segments) == 2 and writer.deletable(lambda *_: True) == []
    step(writer, prepared)
    assert writer.deletable(lambda *_: True) == [FOLDER / segment_name(1)]


def test_restart_writes_the_tail_again(disk: CrashDisk) -> None:
    """Records above the mark are in the new segment, under its salt, and its header covers them."""
    writer, copy = make_writer(disk), Copy(0, "d")
    for number in range(3):
        step(writer, writer.prepare([put(copy, b"k", b"%d" % number)]))
    writer.close()
    old = read(disk, segment_name(1))[1].records
    again = LogWriter(disk, FOLDER, ID, lambda: b"salt", sync=True, segment_bytes_max=300)
    again.begin(writer.segments, 3, old[2:], {0: (1, 2, 7)}, {0: (1, 3, 8)})
    header, segment = read(disk, segment_name(3))
    assert (header.first_lsn, header.durable_lsn, header.positions, header.salt) == (3, 3, {0: (1, 2, 7)}, b"salt")
    assert lsns(segment) == [3] and segment.records[0].payload == old[2].payload
    assert (again.durable_lsn, again.last_lsn, again.positions) == (3, 3, {0: (1, 3, 8)})
    assert [info.first_lsn for info in again.segments] == [1, 3]
    assert step(again, again.prepare_mark()).lsn == 4


def test_restart_replaces_a_segment_without_records(disk: CrashDisk) -> None:
    """A restart that finds nothing above the mark begins the same segment again."""
    make_writer(disk).close()
    again = LogWriter(disk, FOLDER, ID, lambda: b"new!", sync=True)
    again.begin([log.SegmentInfo(FOLDER / segment_name(1), 1, {}, 50)], 1, [], {}, {})
    assert disk.list(FOLDER) == [segment_name(1)] and len(again.segments) == 1
    assert read(disk, segment_name(1))[0].salt == b"new!"


def test_a_tail_with_a_gap_is_refused(disk: CrashDisk) -> None:
    """The caller hands over what follows the mark."""
    with pytest.raises(AssertionError, match="no gap"):
        LogWriter(disk, FOLDER, ID, lambda: b"salt").begin([], 3, [Record(4, 3, b"\x90")], {}, {})


@pytest.mark.parametrize("sync", [True, False])
def test_errors_go_on_to_the_caller(sync: bool) -> None:
    """Whatever call of a rotation fails, the caller hears of it; nothing is tried again."""
    probe = CrashDisk()
    writer = make_writer(probe, sync)
    step(writer, writer.prepare_mark())
    writer.begin_new_segment()
    before = len(probe.calls)
    step(writer, writer.prepare_mark())
    for number in range(before + 1, len(probe.calls) + 1):
        disk = CrashDisk(fail_at=number)
        writer = make_writer(disk, sync)
        step(writer, writer.prepare_mark())
        writer.begin_new_segment()
        with pytest.raises(OSError, match="Input/output"):
            writer.write(writer.prepare_mark())
        assert len(disk.calls) == number
