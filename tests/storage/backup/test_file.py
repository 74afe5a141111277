"""A node's file: its sums, what the writer refuses, and how damage inside a line is placed."""

import hashlib
import json
from pathlib import Path
from zlib import crc32

import pytest

from kvtcp.constants import BACKUP_BLOCK_LINES, BACKUP_WRITE_BYTES, JSON_LINE_BYTES_MAX
from kvtcp.errors import DataError
from kvtcp.jsonl import Pair
from kvtcp.protocol.hashing import shard_of
from kvtcp.storage.backup import file as files
from kvtcp.storage.backup.manifest import FileReport
from tests.crash.fake_disk import FaultyDisk, QuickDisk

DISK = QuickDisk()
SHARDS = 24


def rows_of(count: int, value_bytes: int = 20) -> list[files.BackupRow]:
    """`count` rows in key order, over all shards."""
    keys = [f"key:{i:06d}".encode() for i in range(count)]
    return [(shard_of(key, SHARDS), key, b"v" * value_bytes, i + 1, None) for i, key in enumerate(keys)]


def write(directory: Path, rows: list[files.BackupRow]) -> FileReport:
    """One file of node n1 holding every shard."""
    directory.mkdir(exist_ok=True)
    writer = files.NodeFileWriter(DISK, directory, "n1", range(SHARDS))
    writer.write_rows(rows)
    return FileReport.from_fields(writer.finish(), "n1")


def test_the_sums_are_those_of_the_documentation(tmp_path: Path) -> None:
    """Each sum of the report, computed again from the bytes of the file by the plain definition."""
    rows = rows_of(250)
    report = write(tmp_path, rows)
    data = (tmp_path / "node-n1.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    assert (report.name, report.bytes, report.pairs) == ("node-n1.jsonl", len(data), 250)
    assert report.sha256 == hashlib.sha256(data).hexdigest()
    blocks = [b"".join(lines[i : i + BACKUP_BLOCK_LINES]) for i in range(0, 250, BACKUP_BLOCK_LINES)]
    assert report.blocks == "".join(f"{crc32(block):08x}" for block in blocks)
    assert [entry.shard for entry in report.shards] == list(range(SHARDS))
    for entry in report.shards:
        own = [line for line in lines if shard_of(json.loads(line)["key"].encode(), SHARDS) == entry.shard]
        assert (entry.pairs, entry.sha256) == (len(own), hashlib.sha256(b"".join(own)).hexdigest())


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 200])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_slices_do_not_matter(tmp_path: Path, count: int, step: int) -> None:
    """However the rows are cut into calls, file and report are the same, and the check agrees."""
    rows = rows_of(count)
    whole = write(tmp_path / "whole", rows)
    (tmp_path / "slices").mkdir()
    writer = files.NodeFileWriter(DISK, tmp_path / "slices", "n1", range(SHARDS))
    for i in range(0, count, step):
        writer.write_rows(iter(rows[i : i + step]))
    assert FileReport.from_fields(writer.finish(), "n1") == whole
    assert writer.path.read_bytes() == (tmp_path / "whole" / "node-n1.jsonl").read_bytes()
    files.verify_file(DISK, writer.path, whole, SHARDS)
    assert list(files.read_file_pairs(DISK, writer.path)) == [Pair(*row[1:]) for row in rows]


def test_large_values_are_written_in_pieces(tmp_path: Path) -> None:
    """The disk gets pieces of at least the buffer, never one call per row and never the whole file."""
    disk = FaultyDisk()
    writer = files.NodeFileWriter(disk, tmp_path, "n1", range(SHARDS))
    rows = rows_of(400, value_bytes=1000)
    writer.write_rows(rows)
    writer.finish()
    writes = [call for call in disk.calls if call[0] == "write"]
    assert 2 < len(writes) <= writer.path.stat().st_size // BACKUP_WRITE_BYTES + 1
    disk = FaultyDisk()
    writer = files.NodeFileWriter(disk, tmp_path, "n1", range(SHARDS))
    writer.write_rows(rows_of(20, value_bytes=BACKUP_WRITE_BYTES))
    writer.finish()
    assert len([call for call in disk.calls if call[0] == "write"]) == 20


def test_shards_without_pairs_are_reported(tmp_path: Path) -> None:
    """A shard that was asked for is in the report with no pair; one that was not appears with its first row."""
    writer = files.NodeFileWriter(DISK, tmp_path, "n1", [5])
    writer.write_rows([(2, b"a", b"", 1, None)])
    report = FileReport.from_fields(writer.finish(), "n1")
    assert [(entry.shard, entry.pairs) for entry in report.shards] == [(2, 1), (5, 0)]


@pytest.mark.parametrize(
    ("second", "what"), [(b"b", '"b" is there twice'), (b"a", '"a" is not above "b" of the line before')]
)
def test_keys_must_rise(tmp_path: Path, second: bytes, what: str) -> None:
    """Equal and falling keys are refused, also across calls; the writer is then of no more use."""
    writer = files.NodeFileWriter(DISK, tmp_path, "n1")
    writer.write_rows([(0, b"b", b"", 1, None)])
    with pytest.raises(DataError, match=f"node-n1.jsonl, line 2: key {what}"):
        writer.write_rows([(0, second, b"", 2, None)])
    with pytest.raises(AssertionError):
        writer.finish()
    writer.abort()
    assert DISK.list(tmp_path) == []


def test_abort_removes_the_file_at_any_time(tmp_path: Path) -> None:
    """Before and after finish, once or twice, and on a disk that fails."""
    for finish in (False, True):
        writer = files.NodeFileWriter(DISK, tmp_path, "n1")
        writer.write_rows([(0, b"b", b"", 1, None)])
        if finish:
            writer.finish()
        writer.abort()
        writer.abort()
        assert DISK.list(tmp_path) == []
    writer = files.NodeFileWriter(FaultyDisk(fail_at=4, dead=True), tmp_path, "n1")
    writer.abort()
    assert DISK.list(tmp_path) == ["node-n1.jsonl"]


def test_a_leftover_is_replaced(tmp_path: Path) -> None:
    """A file that an earlier attempt left is not appended to."""
    (tmp_path / "node-n1.jsonl").write_bytes(b"old and longer than the new one, which is empty")
    assert write(tmp_path, []).bytes == 0
    assert (tmp_path / "node-n1.jsonl").read_bytes() == b""


@pytest.mark.parametrize("node_id", ["", "a/b", "..", ".hidden", "a b", "x" * 200, "n1\n"])
def test_bad_node_ids_are_refused(node_id: str) -> None:
    """An id cannot lead out of the directory."""
    with pytest.raises(ValueError, match="node id"):
        files.node_file_name(node_id)


def test_an_endless_line_is_refused_without_reading_it(tmp_path: Path) -> None:
    """A file without newlines takes the memory of one longest line, not of the file."""
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(20 * JSON_LINE_BYTES_MAX)  # a hole: takes no space
    with pytest.raises(DataError, match=r"f, line 1: the line is too long"):
        list(files.read_lines(DISK, path))


def test_a_read_error_is_named(tmp_path: Path) -> None:
    """A directory in the place of a file, or a disk that fails, is a DataError with the path."""
    (tmp_path / "f").mkdir()
    with pytest.raises(DataError, match=r"f, after line 0: cannot be read: Is a directory"):
        list(files.read_lines(DISK, tmp_path / "f"))
    with pytest.raises(DataError, match=r"g, after line 0: cannot be read: Input/output error"):
        list(files.read_lines(FaultyDisk(fail_at=1), tmp_path / "g"))
    with pytest.raises(DataError, match=r"g: the file is missing"):
        list(files.read_lines(DISK, tmp_path / "g"))


def test_a_changed_value_is_placed_by_block_and_shard(tmp_path: Path) -> None:
    """A changed line that is still good JSON is among the few lines named, with file hashes and the shard."""
    report = write(tmp_path, rows_of(1000))
    path = tmp_path / "node-n1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[433] = lines[433].replace(b"vvv", b"vwv", 1)
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError) as caught:
        files.verify_file(DISK, path, report, SHARDS)
    text = str(caught.value)
    shard = shard_of(b"key:000433", SHARDS)
    own = [i + 1 for i in range(400, 500) if shard_of(b"key:%06d" % i, SHARDS) == shard]
    assert 434 in own
    assert text.startswith(f"{path}, line {', '.join(map(str, own[:-1]))} or {own[-1]}: damaged: ")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text and report.sha256 in text
    assert f"(shard {shard})" in text


def test_a_directory_that_was_discarded_does_not_come_back(tmp_path: Path) -> None:
    """The writer of a node that is late fails instead of making the directory of a given-up attempt anew."""
    with pytest.raises(FileNotFoundError):
        files.NodeFileWriter(DISK, tmp_path / ".gone.tmp", "n1")
    assert list(tmp_path.iterdir()) == []
