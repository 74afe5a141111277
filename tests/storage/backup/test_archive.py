"""Backups as a whole: round trips, every kind of damage, every disk error."""

import errno
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtcp.errors import DataError, RequestError
from kvtcp.jsonl import Pair
from kvtcp.protocol.hashing import shard_of
from kvtcp.storage.backup import archive
from kvtcp.storage.files import OS_DISK, Disk, OsDisk
from tests.crash.fake_disk import FaultyDisk, QuickDisk

DISK = QuickDisk()
CREATED = "2026-11-23T15:26:00Z"


def some_pairs(count: int, value_bytes: int = 30) -> list[Pair]:
    """Pairs of all sorts in key order: text, quotes, bytes that are not UTF-8, deadlines."""
    rng = random.Random(count)
    pairs = []
    for i in range(count):
        key = b"user:%05d" % i if i % 10 else b"user:%05d\xff" % i
        value = rng.randbytes(value_bytes) if i % 7 == 0 else b'text "%d" \\ ' % i + b"x" * rng.randrange(value_bytes)
        pairs.append(Pair(key, value, i + 1, rng.choice([None, None, 60_000])))
    return sorted(pairs)


def make(
    disk: Disk, backup_dir: Path, name: str, pairs: list[Pair], shards: int = 8, nodes: int = 3, attempt: int = 1
) -> Path:
    """A backup as coordinator and nodes make it; node s mod `nodes` saves shard s, and an error aborts the writers."""
    writers: list[archive.NodeFileWriter] = []
    tmp_dir = archive.begin_backup(disk, backup_dir, name, attempt)
    try:
        reports = []
        for node in range(nodes):
            mine = [s for s in range(shards) if s % nodes == node]
            writer = archive.NodeFileWriter(disk, tmp_dir, f"n{node + 1}", mine)
            writers.append(writer)
            rows = [(shard_of(pair.key, shards), *pair) for pair in pairs]
            writer.write_rows((s, k, v, rev or 0, ttl) for s, k, v, rev, ttl in rows if s in mine)
            reports.append(archive.FileReport.from_fields(writer.finish(), "report"))
        cut = tuple(archive.ShardCut(s, 1, 1000 + s, s) for s in range(shards))
        manifest = archive.BackupManifest("c-1", CREATED, "0.1.0", shards, cut, tuple(reports))
        archive.write_manifest(disk, tmp_dir, manifest)
        archive.publish(disk, tmp_dir, backup_dir / name)
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return backup_dir / name


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[Path]:
    """A published backup of 600 pairs in 48 shards on 3 nodes."""
    yield make(DISK, tmp_path, "b", some_pairs(600), shards=48)


def refused(directory: Path) -> str:
    """The sentence of a verify that must fail."""
    with pytest.raises(DataError) as caught:
        archive.verify(directory)
    return str(caught.value)


# --- making and reading -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=12) | st.text(min_size=1, max_size=4).map(str.encode),
        st.tuples(st.binary(max_size=20), st.integers(0, 2**63 - 1), st.none() | st.integers(1, 10**9)), max_size=40,
    ),
    st.integers(1, 9), st.integers(1, 4), st.binary(max_size=2),
)  # fmt: skip
def test_round_trip_of_any_content(
    content: dict[bytes, tuple[bytes, int, int | None]], shards: int, nodes: int, prefix: bytes
) -> None:
    """Whatever is saved verifies, and is read back whole and in key order, also by prefix."""
    pairs = [Pair(key, *content[key]) for key in sorted(content)]
    with tempfile.TemporaryDirectory() as name:
        directory = make(DISK, Path(name), "b", pairs, shards, nodes)
        assert archive.verify(directory).pairs == len(pairs)
        assert list(archive.read_pairs(directory)) == pairs
        assert list(archive.read_pairs(directory, prefix)) == [pair for pair in pairs if pair.key.startswith(prefix)]


def published(backup_dir: Path) -> list[str]:
    """The names that backups have; an unfinished one has none."""
    return [path.name for path in backup_dir.glob("[!.]*")]


def test_a_backup_on_the_real_disk(tmp_path: Path) -> None:
    """With every fsync: the report of verify, and nothing left beside the backup."""
    directory = make(OS_DISK, tmp_path, "b", some_pairs(600))
    size = sum(path.stat().st_size for path in directory.glob("node-*.jsonl"))
    assert archive.verify(directory) == archive.VerifyReport(600, size, 3, 8, "c-1", CREATED)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json", "node-n1.jsonl", "node-n2.jsonl", "node-n3.jsonl",
    ]  # fmt: skip


def test_each_step_is_durable_before_the_next(tmp_path: Path) -> None:
    """Files are synced before the manifest is made, all names before the rename, the rename at last."""
    disk = FaultyDisk()
    make(disk, tmp_path, "b", some_pairs(50))
    expected = [("remove_tree", ".b.tmp"), ("make_directory", ".b.tmp")]
    expected += [("make_directory", tmp_path.name), ("sync_directory", tmp_path.name)]
    for name in ("node-n1.jsonl", "node-n2.jsonl", "node-n3.jsonl", "manifest.json"):
        expected += [(what, name) for what in ("remove", "create", "write", "sync", "close")]
        expected.append(("sync_directory", ".b.tmp"))
    expected += [("sync_directory", ".b.tmp"), ("rename", "b"), ("sync_directory", tmp_path.name)]
    assert disk.calls == expected


def test_a_prefix_is_a_range_of_keys(tmp_path: Path) -> None:
    """The key that equals the prefix belongs to it, neighbours do not, and nothing behind the range is read."""
    keys = [b"a", b"ab", b"ab\x00", b"ab\xff\xff", b"ac", b"b"]
    directory = make(DISK, tmp_path, "b", [Pair(key, b"", 1, None) for key in keys], shards=1, nodes=1)
    assert [pair.key for pair in archive.read_pairs(directory, b"ab")] == keys[1:4]
    path = directory / "node-n1.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"key": "b"', b'"kex": "b"'))
    assert [pair.key for pair in archive.read_pairs(directory, b"ab")] == keys[1:4]


def test_names() -> None:
    """A backup nobody named is named by its time in UTC, to the second; another zone is a programmer's error."""
    assert archive.backup_name_from_time(datetime(2026, 11, 23, 15, 26, 0, tzinfo=UTC)) == "20261123T152600Z"
    with pytest.raises(AssertionError):
        archive.backup_name_from_time(datetime(2026, 11, 23, 15, 26, tzinfo=timezone(timedelta(hours=1))))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "x" * 101, "a b", "a\n"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    """A name cannot lead out of the directory of the backups."""
    with pytest.raises(RequestError, match="backup name"):
        archive.begin_backup(DISK, tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_refused(backup: Path) -> None:
    """A backup is never replaced: neither at the start nor at the end."""
    with pytest.raises(RequestError, match="backup b is there already"):
        archive.begin_backup(DISK, backup.parent, "b")
    tmp_dir = archive.begin_backup(DISK, backup.parent, "late")
    (tmp_dir / "manifest.json").write_bytes(b"{}")
    (backup.parent / "empty").mkdir()
    for taken in ("b", "empty"):
        with pytest.raises(FileExistsError, match="there already"):
            archive.publish(DISK, tmp_dir, backup.parent / taken)
    assert archive.verify(backup).pairs == 600


def test_unfinished_backups_are_not_seen(tmp_path: Path) -> None:
    """Attempts have directories of their own; leftovers are replaced, can be discarded, and have no name."""
    first = archive.begin_backup(DISK, tmp_path, "b")
    (first / "node-n9.jsonl").write_bytes(b"left by a lost node")
    second = archive.begin_backup(DISK, tmp_path, "b", attempt=2)
    assert first != second and published(tmp_path) == []
    archive.discard(DISK, second)
    assert not second.exists()
    directory = make(DISK, tmp_path, "b", some_pairs(10))
    assert archive.verify(directory).pairs == 10
    with pytest.raises(AssertionError):
        archive.discard(DISK, directory)


# --- damage -------------------------------------------------------------------------------------------


def test_no_backup_and_no_manifest(backup: Path) -> None:
    """A missing directory and a missing manifest are different sentences."""
    assert refused(backup.parent / "x").endswith("x/manifest.json: no such backup")
    assert refused(backup / "node-n1.jsonl").endswith("node-n1.jsonl/manifest.json: cannot be read: Not a directory")
    (backup / "manifest.json").unlink()
    assert refused(backup).endswith("b/manifest.json: the file is missing: this is not a complete backup")
    with pytest.raises(DataError, match=r"manifest\.json: the file is missing"):
        list(archive.read_pairs(backup))


@pytest.mark.parametrize("data", [b"", b"not JSON", b"\xff", b"[]", b'{"format": "other"}', b"[" * 100_000, b"\x00"])
def test_the_manifest_is_something_else(backup: Path, data: bytes) -> None:
    """Any other bytes in the place of the manifest are refused by its name."""
    (backup / "manifest.json").write_bytes(data)
    assert refused(backup).startswith(f"{backup}/manifest.json")


def test_a_foreign_format_version(backup: Path) -> None:
    """A later format is refused by its number, before its sums are looked at."""
    path = backup / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert refused(backup) == f'{path}: "format_version" is 2, this version of kvtcp reads 1'


def test_missing_and_surplus_files(backup: Path) -> None:
    """Every file of the manifest must be there and no other node's file; other files do not matter."""
    (backup / "notes.txt").write_bytes(b"")
    assert archive.verify(backup).files == 3
    (backup / "node-n4.jsonl").write_bytes(b"")
    assert refused(backup) == f"{backup}/node-n4.jsonl: the manifest does not name this file"
    (backup / "node-n4.jsonl").rename(backup / "node-n2.jsonl")
    pairs = archive.read_manifest(backup).files[1].pairs
    assert refused(backup) == (
        f"{backup}/node-n2.jsonl, line 1: the file ends before it, the manifest has {pairs} pairs"
    )
    (backup / "node-n2.jsonl").unlink()
    assert refused(backup) == f"{backup}/node-n2.jsonl: the file is missing"


Edit = Callable[[list[bytes]], list[bytes]]  # of the lines of a file; line 17 is the one concerned
EDITS: dict[str, tuple[Edit, str]] = {
    "swap": (lambda lines: [*lines[:15], lines[16], lines[15], *lines[17:]],
             r', line 17: key ".*" is not above ".*" of the line before$'),
    "repeat": (lambda lines: [*lines[:16], *lines[15:]], r', line 17: key ".*" is there twice$'),
    "remove": (lambda lines: [*lines[:16], *lines[17:]],
               r": has \d+ pairs, the manifest has \d+; the first difference is in lines 1-100$"),
    "empty line": (lambda lines: [*lines[:16], b"\n", *lines[16:]], r", line 17: not JSON"),
    "value": (lambda lines: replaced(lines, json.dumps({**json.loads(lines[16]), "value": "another"}).encode() + b"\n"),
              r", line .*\b17\b.*: damaged: the sha256 of the file is \w{64}, .* \w{64} \(shard \d+\)$"),
    "rev": (lambda lines: replaced(lines, re.sub(rb'"rev": \d+', b'"rev": 99999', lines[16])),
            r", line .*\b17\b.*: damaged: the sha256"),
    "no rev": (lambda lines: replaced(lines, re.sub(rb', "rev": \d+', b"", lines[16])), r', line 17: "rev" is missing'),
    "drop last": (lambda lines: lines[:-1], r", line \d+: the file ends before it, the manifest has \d+ pairs$"),
}  # fmt: skip


def replaced(lines: list[bytes], line: bytes) -> list[bytes]:
    """The lines with another line 17."""
    return [*lines[:16], line, *lines[17:]]


def edit_lines(path: Path, edit: str) -> None:
    """Change the lines of a file."""
    path.write_bytes(b"".join(EDITS[edit][0](path.read_bytes().splitlines(keepends=True))))


@pytest.mark.parametrize("edit", EDITS)
def test_edited_lines(backup: Path, edit: str) -> None:
    """What an editor or a careless tool may do to a file, named by file and line."""
    edit_lines(backup / "node-n2.jsonl", edit)
    assert re.match(re.escape(f"{backup}/node-n2.jsonl") + EDITS[edit][1], refused(backup)), refused(backup)


def test_a_pair_of_another_file(backup: Path) -> None:
    """A key that stands in another file too is a line of a shard this file does not hold."""
    foreign = (backup / "node-n1.jsonl").read_bytes().splitlines(keepends=True)[16]
    path = backup / "node-n2.jsonl"
    key = json.loads(foreign)["key"]
    lines = path.read_bytes().splitlines(keepends=True)
    position = next(i for i, line in enumerate(lines) if json.loads(line).get("key", "") > key)
    path.write_bytes(b"".join([*lines[:position], foreign, *lines[position:]]))
    shard = shard_of(key.encode(), 48)
    assert refused(backup) == (
        f'{path}, line {position + 1}: key "{key}" belongs to shard {shard}, which this file does not hold'
    )


def test_exchanged_files(backup: Path) -> None:
    """Two good files under each other's names are found at the first line."""
    (backup / "node-n1.jsonl").rename(backup / "x")
    (backup / "node-n2.jsonl").rename(backup / "node-n1.jsonl")
    (backup / "x").rename(backup / "node-n2.jsonl")
    assert re.search(r"node-n1.jsonl, line 1: key .* belongs to shard", refused(backup))


def reseal(backup: Path, old: str, new: str) -> None:
    """A manifest with a changed text and a seal that is right again."""
    path = backup / "manifest.json"
    fields = json.loads(path.read_text().replace(old, new, 1))
    manifest = archive.BackupManifest(
        fields["cluster"], fields["created"], fields["kvtcp_version"], fields["shards"],
        tuple(archive.ShardCut(*row) for row in fields["cut"]),
        tuple(archive.FileReport.from_fields(file, "file") for file in fields["files"]),
    )  # fmt: skip
    path.write_text(manifest.to_json())


def test_a_sealed_manifest_with_other_sums(backup: Path) -> None:
    """If the manifest is wrong and not the file, each sum is compared by itself and both values are told."""
    manifest = archive.read_manifest(backup)
    original = (backup / "manifest.json").read_text()
    file = manifest.files[1]
    shard = file.shards[0]
    name = f"{backup}/node-n2.jsonl: "
    wrong = "f" * 64
    size, more = file.bytes, file.bytes + 1
    for old, new, sentence in (
        (f'"bytes": {size}', f'"bytes": {more}', f"has {size} bytes, the manifest has {more}"),
        (file.sha256, wrong, f"damaged: the sha256 of the file is {file.sha256}, the manifest has {wrong}"),
        (shard.sha256, wrong, f"the sha256 of shard {shard.shard} is {shard.sha256}, the manifest has {wrong}"),
    ):
        (backup / "manifest.json").write_text(original)
        reseal(backup, old, new)
        assert refused(backup) == name + sentence
    (backup / "manifest.json").write_text(original)
    reseal(backup, file.blocks[8:16], "00000000")
    assert refused(backup) == (
        f"{backup}/node-n2.jsonl, lines 101-{file.pairs}: the crc32 of these lines is {file.blocks[8:16]}, "
        "the manifest has 00000000"
    )


def test_a_manifest_with_other_counts(backup: Path) -> None:
    """Counts that fit each other but not the file are found at the file."""
    manifest = archive.read_manifest(backup)
    file = manifest.files[1]
    first, second = file.shards[0], file.shards[1]
    path = backup / "manifest.json"
    text = path.read_text()
    text = text.replace(f"[{first.shard}, {first.pairs}, ", f"[{first.shard}, {first.pairs - 1}, ")
    path.write_text(text.replace(f"[{second.shard}, {second.pairs}, ", f"[{second.shard}, {second.pairs + 1}, "))
    reseal(backup, "", "")
    assert refused(backup) == (
        f"{backup}/node-n2.jsonl: shard {first.shard} has {first.pairs} pairs, the manifest has {first.pairs - 1}"
    )


def named_lines(sentence: str, path: Path) -> set[int]:
    """The numbers of lines that a sentence names; empty if it names the file alone."""
    place = sentence[len(str(path)) :].split(":")[0]
    if match := re.search(r"lines (\d+)-(\d+)", sentence):
        return set(range(int(match[1]), int(match[2]) + 1))
    return {int(number) for number in re.findall(r"\d+", place)}


def test_a_flipped_bit_anywhere_is_found(backup: Path) -> None:
    """300 random places in all files: the file is named, and the damaged line is among the few that are."""
    rng = random.Random(1)
    paths = sorted(backup.iterdir())
    exact = 0
    for _ in range(300):
        path = rng.choice(paths)
        data = bytearray(original := path.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        sentence = refused(backup)
        path.write_bytes(original)
        assert sentence.startswith(str(path)), sentence
        if path.name != "manifest.json":
            line = original[:place].count(b"\n") + 1
            named = named_lines(sentence, path)
            # a key that was raised is noticed at the line after it
            assert named & ({line, line + 1} if "is not above" in sentence else {line}), (line, sentence)
            exact += len(named) == 1
    assert exact > 50
    assert archive.verify(backup).pairs == 600


def test_a_file_cut_anywhere_is_found(backup: Path) -> None:
    """A truncated file is named, with the line at which it ends."""
    rng = random.Random(2)
    path = backup / "node-n3.jsonl"
    original = path.read_bytes()
    for size in [0, 1, len(original) - 1, *(rng.randrange(len(original)) for _ in range(60))]:
        path.write_bytes(original[:size])
        line = original[:size].count(b"\n") + 1
        assert refused(backup).startswith(f"{path}, line {line}: ")


def test_reading_damage_is_named_too(backup: Path) -> None:
    """A restore that reads without a check before still stops at a line that is not one."""
    edit_lines(backup / "node-n2.jsonl", "swap")
    with pytest.raises(DataError, match=r"node-n2.jsonl, line 17: key"):
        list(archive.read_pairs(backup))
    (backup / "node-n3.jsonl").unlink()
    with pytest.raises(DataError, match=r"node-n3.jsonl: the file is missing"):
        list(archive.read_pairs(backup))


# --- disk errors --------------------------------------------------------------------------------------

ERRORS = [(5, False), (28, False), (5, True)]


def calls_of_a_backup(tmp_path: Path, pairs: list[Pair]) -> int:
    """Number of calls to the disk that a backup makes."""
    disk = FaultyDisk()
    make(disk, tmp_path / "counted", "b", pairs)
    return len(disk.calls)


@pytest.mark.parametrize(("error_number", "dead"), ERRORS, ids=["EIO", "ENOSPC", "dead"])
def test_no_disk_error_leaves_a_backup(tmp_path: Path, error_number: int, dead: bool) -> None:
    """Each call fails once: a clear error, nothing published, and the same name can be used when the disk is well."""
    pairs = some_pairs(400, value_bytes=1000)
    calls = calls_of_a_backup(tmp_path, pairs)
    assert calls > 30
    for fail_at in range(1, calls + 1):
        backup_dir = tmp_path / str(fail_at)
        disk = FaultyDisk(fail_at, error_number, dead)
        with pytest.raises(OSError, match=r"Input/output error|No space left") as caught:
            make(disk, backup_dir, "b", pairs)
        assert caught.value.errno == error_number and caught.value.filename
        if dead and fail_at == calls:
            # The last fsync failed and so did taking the name back: what is there is whole.
            assert archive.verify(backup_dir / "b").pairs == 400
            continue
        assert published(backup_dir) == []
        if fail_at % 5 == 0:
            assert archive.verify(make(DISK, backup_dir, "b", pairs)).pairs == 400


def test_a_manifest_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    """A forgotten shard is found before anything is published."""
    tmp_dir = archive.begin_backup(DISK, tmp_path, "b")
    writer = archive.NodeFileWriter(DISK, tmp_dir, "n1", [0])
    report = archive.FileReport.from_fields(writer.finish(), "n1")
    cut = (archive.ShardCut(0, 1, 0, 0), archive.ShardCut(1, 1, 0, 0))
    with pytest.raises(DataError, match=r'manifest.json: "files": no file holds shard 1'):
        archive.write_manifest(DISK, tmp_dir, archive.BackupManifest("c", CREATED, "0.1.0", 2, cut, (report,)))
    assert DISK.list(tmp_dir) == ["node-n1.jsonl"]


def test_read_errors_are_data_errors(backup: Path) -> None:
    """A disk that cannot be read gives a DataError that names the file, at every call of a check."""
    reads = FaultyDisk()
    archive.verify(backup, reads)
    for fail_at in range(1, len(reads.calls) + 1):
        with pytest.raises(DataError, match="Input/output error") as caught:
            archive.verify(backup, FaultyDisk(fail_at))
        assert str(caught.value).startswith(str(backup))


def test_a_file_that_comes_late_does_not_stop_a_discard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that got or lost a file while it was removed is removed again; other errors are raised."""
    tmp_dir = archive.begin_backup(DISK, tmp_path, "b")
    remove_tree = OsDisk.remove_tree
    causes = ((errno.ENOTEMPTY, "late"), (errno.EIO, "broken"), (errno.ENOENT, "gone"))
    errors = [OSError(*cause) for cause in causes]

    def fail_first(self: OsDisk, directory: Path) -> None:
        if errors:
            raise errors.pop()
        remove_tree(self, directory)

    monkeypatch.setattr(OsDisk, "remove_tree", fail_first)
    with pytest.raises(OSError, match="broken"):
        archive.discard(OsDisk(), tmp_dir)
    archive.discard(OsDisk(), tmp_dir)
    assert not errors and not tmp_dir.exists()
