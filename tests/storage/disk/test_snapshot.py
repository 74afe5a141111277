"""Snapshots: golden bytes, every flipped bit, every missing byte, and files on the disk."""

import errno
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import msgpack
import pytest

from kvtcp.constants import SNAPSHOT_FRAME_BYTES, SNAPSHOT_FRAME_ROWS
from kvtcp.errors import DataError
from kvtcp.protocol import operations as op
from kvtcp.storage.disk import snapshot
from kvtcp.storage.disk.log_format import FormatError, VersionError
from kvtcp.storage.shard.table import Logged, Table
from tests.crash.disk import CrashDisk

ID = b"DIRECTRY"
FOLDER = Path("/snapshots")
HEADER = snapshot.SnapshotHeader(ID, 3, 2, 4, 301, 0x01020304)
NAME = "0003-2-00000000000000000301.snapshot"

GOLDEN = (
    "4b56544350534e50" "0001" "0000" "4060da8a"  # magic, version, reserved, sum
    "4449524543545259" "00000003" "0000000000000002" "0000000000000004"  # directory, shard, generation, epoch
    "000000000000012d" "01020304"  # number, chain
    "01" "00000021" "e330ec35"  # rows: length, sum
    "92" "92c40161c40162" "9293c4027661cd012cc0" "93c400cd012dcf0000018bcfe56800"
    "02" "00000011" "0ffac184"  # kept
    "9193cd012dce01020304c405656e747279"
    "03" "00000003" "50f5aae5"  # end
    "920202"
)  # fmt: skip
ROWS = ([b"a", b"b"], [(b"va", 300, None), (b"", 301, 1_700_000_000_000)])
KEPT: list[Logged] = [(3, 2, 301, 0x01020304, b"entry")]


def golden() -> bytes:
    """The snapshot above."""
    encoder = snapshot.SnapshotEncoder(HEADER)
    return encoder.begin() + encoder.add_rows(*ROWS) + encoder.add_kept(KEPT) + encoder.end()


@pytest.fixture
def disk() -> CrashDisk:
    """An empty disk in memory."""
    made = CrashDisk()
    made.make_directory(FOLDER)
    return made


def store(disk: CrashDisk, data: bytes, name: str = NAME) -> Path:
    """A file with this content."""
    path = FOLDER / name
    disk.remove(path)
    file = disk.create(path)
    file.write(data)
    return path


def small_table(rows: int = 10) -> Table:
    """Keys with and without a deadline."""
    table = Table(3)
    table.generation = 2
    table.epoch = 4
    for number in range(rows):
        arguments = (b"k%03d" % number, b"v" * number) + ((1000 * number + 1,) if number % 3 == 0 else ())
        table.apply((op.PUT, 3, table.seq + 1, 0, *arguments), 50)
    return table


def encoded(table: Table, kept: list[Logged] | None = None, meanwhile: Callable[[], None] = lambda: None) -> bytes:
    """The snapshot of a table; `meanwhile` is called between its pieces."""
    frozen = table.freeze()
    header = snapshot.SnapshotHeader(ID, table.shard, table.generation, frozen.epoch, frozen.seq, frozen.chain)
    pieces = []
    for piece in snapshot.encode_snapshot(header, frozen, kept or []):
        pieces.append(piece)
        meanwhile()
    return b"".join(pieces)


def resealed(data: bytes) -> bytes:
    """A header with its right sum."""
    return data[:12] + crc32(data[16:56], crc32(data[:12])).to_bytes(4, "big") + data[16:]


def test_golden() -> None:
    """The format is what it was: a change of these bytes needs a new version."""
    assert golden().hex() == GOLDEN


def test_golden_is_loaded(disk: CrashDisk) -> None:
    """These bytes will always mean this table."""
    table, kept = snapshot.load_snapshot(disk, store(disk, bytes.fromhex(GOLDEN)), ID)
    assert table.position == (4, 301, 0x01020304) and (table.shard, table.generation) == (3, 2)
    assert table.get(b"a", 0) == (b"va", 300, None) and table.get(b"b", 1_699_999_999_999) == (b"", 301, 1)
    assert kept == KEPT and len(table) == 2
    table.check()


def test_every_flipped_bit(disk: CrashDisk) -> None:
    """No bit of a snapshot can change unnoticed."""
    data = golden()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path = store(disk, bytes(changed))
        with pytest.raises(FormatError) as error:
            snapshot.load_snapshot(disk, path, ID)
        assert not isinstance(error.value, VersionError), bit


def test_every_length(disk: CrashDisk) -> None:
    """A file that is cut off, or has more, is not a snapshot."""
    data = golden()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            snapshot.load_snapshot(disk, store(disk, data[:length]), ID)
    with pytest.raises(FormatError, match="3 bytes follow the last frame"):
        snapshot.load_snapshot(disk, store(disk, data + b"abc"), ID)


def test_frames_out_of_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that is missing, doubled or in another place is found, although each is right in itself."""
    monkeypatch.setattr(snapshot, "SNAPSHOT_FRAME_ROWS", 3)
    data = encoded(small_table())
    starts = [offset for _, _, offset in snapshot.check_frames(data)]
    frames = [data[begin:end] for begin, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    head = data[: starts[0]]
    assert len(frames) == 5 and b"".join([head, *frames]) == data
    for order in ([1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 2, 4], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3], [4], [0, 1, 2, 4]):
        with pytest.raises(FormatError):
            list(snapshot.check_frames(b"".join([head, *(frames[number] for number in order)])))


def test_counts_are_checked() -> None:
    """The last frame counts what was before it."""
    encoder = snapshot.SnapshotEncoder(HEADER)
    data = encoder.begin() + encoder.add_rows(*ROWS)
    encoder.rows += 1
    with pytest.raises(FormatError, match="the last frame counts"):
        list(snapshot.read_frames(data + encoder.end()))


def test_a_frame_that_was_written_wrong() -> None:
    """A right sum over no msgpack."""
    encoder = snapshot.SnapshotEncoder(HEADER)
    data = encoder.begin()
    body = b"\xc1"
    total = crc32(body, crc32(b"\x01\x00\x00\x00\x01", crc32(data)))
    with pytest.raises(FormatError, match="a right sum and no right content"):
        list(snapshot.read_frames(data + b"\x01\x00\x00\x00\x01" + total.to_bytes(4, "big") + body))


def test_rows_out_of_order(disk: CrashDisk) -> None:
    """Keys ascend over all frames."""
    encoder = snapshot.SnapshotEncoder(HEADER)
    data = encoder.begin() + encoder.add_rows([b"b"], [(b"", 1, None)]) + encoder.add_rows([b"a"], [(b"", 1, None)])
    with pytest.raises(DataError, match="ascending"):
        snapshot.load_snapshot(disk, store(disk, data + encoder.end()), ID)


def test_other_versions(disk: CrashDisk) -> None:
    """A right sum under another version is of that version."""
    data = golden()
    path = store(disk, resealed(data[:8] + (2).to_bytes(2, "big") + data[10:]))
    with pytest.raises(VersionError, match="the snapshot has format 2, this version of kvtcp knows format 1"):
        snapshot.load_snapshot(disk, path, ID)


def test_whose_it_is(disk: CrashDisk) -> None:
    """A file of another directory, or under the name of another, is refused."""
    with pytest.raises(FormatError, match="belongs to another data directory"):
        snapshot.load_snapshot(disk, store(disk, golden()), b"ANOTHER!")
    with pytest.raises(FormatError, match=f"the snapshot is {NAME} by its header"):
        snapshot.load_snapshot(disk, store(disk, golden(), "0004-2-00000000000000000301.snapshot"), ID)


def test_names() -> None:
    """A name says shard, generation and number, in exactly one way."""
    assert HEADER.name.file == NAME
    assert snapshot.SnapshotName.parse(NAME) == snapshot.SnapshotName(3, 2, 301) == HEADER.name
    assert snapshot.SnapshotName.parse(snapshot.SnapshotName(12345, 1, 0).file) == snapshot.SnapshotName(12345, 1, 0)
    others = ["0003-02-00000000000000000301.snapshot", "0003-2-301.snapshot", ""]
    for name in (NAME + ".tmp", "0" + NAME, NAME[1:], *others):
        assert snapshot.SnapshotName.parse(name) is None, name


@pytest.mark.parametrize("rows", [0, 1, 3, 10, 700])
def test_round_trip(disk: CrashDisk, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a snapshot is the one that was frozen, deadlines included."""
    if rows < 100:
        monkeypatch.setattr(snapshot, "SNAPSHOT_FRAME_ROWS", 3)
    table = small_table(rows)
    data = encoded(table)
    assert len(list(snapshot.read_frames(data))) == -(-rows // (3 if rows < 100 else 256))
    path = store(disk, data, snapshot.SnapshotName(3, 2, table.seq).file)
    loaded, kept = snapshot.load_snapshot(disk, path, ID)
    loaded.check()
    assert loaded.position == table.position and loaded.digest() == table.digest() and kept == []
    table.apply((op.PUT, 3, table.seq + 1, 0, b"next", b"v"), 60)
    loaded.apply_entry(table.last_entry, table.chain)
    assert loaded.digest() == table.digest()


def test_writes_meanwhile_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of the position, whatever is written between two pieces."""
    monkeypatch.setattr(snapshot, "SNAPSHOT_FRAME_ROWS", 3)
    expected = encoded(small_table(20))
    table = small_table(20)

    def write() -> None:
        for key in (b"k000", b"k010", b"k019", b"new%d" % table.seq):
            table.apply((op.PUT, 3, table.seq + 1, 0, key, b"changed"), 60)
        table.apply((op.DELETE, 3, table.seq + 1, 0, b"k01%d" % (table.seq % 10)), 60)

    assert encoded(table, meanwhile=write) == expected
    assert table._frozen == []


def test_frames_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame ends with the row that reaches the bound; large values are alone."""
    monkeypatch.setattr(snapshot, "SNAPSHOT_FRAME_BYTES", 50)
    table = Table(3)
    for number, size in enumerate([10, 10, 60, 10, 10, 10, 10, 200, 1]):
        table.apply((op.PUT, 3, table.seq + 1, 0, b"k%d" % number, b"v" * size), 50)
    frames = [content[0] for kind, content in snapshot.read_frames(encoded(table)) if kind == snapshot.ROWS]
    assert [len(keys) for keys in frames] == [3, 5, 1]


def test_kept_entries(disk: CrashDisk) -> None:
    """They come back as entries of this shard and generation."""
    table = small_table(2)
    kept: list[Logged] = [(3, 2, 1, 11, b"one"), (3, 2, 2, 12, b"two")]
    path = store(disk, encoded(table, kept), snapshot.SnapshotName(3, 2, 2).file)
    assert snapshot.load_snapshot(disk, path, ID)[1] == kept


# --- files ------------------------------------------------------------------------------------------


def write(disk: CrashDisk, data: bytes, name: snapshot.SnapshotName = HEADER.name) -> snapshot.SnapshotFile:
    """A file that is on the disk and not published."""
    file = snapshot.SnapshotFile(disk, FOLDER, name)
    for start in range(0, len(data), 20):
        file.write(data[start : start + 20])
    file.finish()
    return file


def test_many_kept_entries(disk: CrashDisk) -> None:
    """A shard that cannot commit keeps many: they are encoded in pieces too, and read in order."""
    table = small_table()
    frozen = table.freeze()
    header = snapshot.SnapshotHeader(ID, 3, table.generation, frozen.epoch, frozen.seq, frozen.chain)
    kept: list[Logged] = [(3, table.generation, seq, seq, b"e" * 40) for seq in range(1, 2001)]
    kept += [(3, table.generation, seq, seq, b"e" * 100_000) for seq in range(2001, 2021)]
    pieces = list(snapshot.encode_snapshot(header, frozen, kept))
    assert max(map(len, pieces)) < SNAPSHOT_FRAME_BYTES + 200_000
    assert sum(piece[0] == snapshot.KEPT for piece in pieces[1:]) == 2000 // SNAPSHOT_FRAME_ROWS + 7
    assert snapshot.load_snapshot(disk, store(disk, b"".join(pieces), header.name.file), ID)[1] == kept


def test_publication(disk: CrashDisk) -> None:
    """Temporary name, sync, rename, sync of the directory, in this order; nothing has the name before."""
    data = golden()
    file = write(disk, data)
    assert disk.list(FOLDER) == [NAME + ".tmp"]
    assert file.publish() == len(data) and disk.list(FOLDER) == [NAME] and disk.read(file.path) == data
    what = [call for call, path in disk.calls if path != FOLDER or call == "sync_directory"]
    assert what[:2] == ["remove", "create"] and what[-3:] == ["sync", "rename", "sync_directory"]
    file.abort()
    assert disk.list(FOLDER) == [NAME]


def test_much_is_synced_on_the_way(disk: CrashDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sync has more to do than a bound."""
    monkeypatch.setattr(snapshot, "SNAPSHOT_SYNC_BYTES", 40)
    write(disk, b"x" * 200)
    assert [what for what, _ in disk.calls].count("sync") == 200 // 40 + 1


def test_what_is_published_is_read_back(disk: CrashDisk) -> None:
    """A file that is not what was written is found before anything is deleted for it."""
    data = golden()
    file = write(disk, data)
    disk.flip_bit(FOLDER / (NAME + ".tmp"), 8 * 80)
    with pytest.raises(FormatError, match="the sum of the frame"):
        file.publish()


def test_a_leftover_is_replaced(disk: CrashDisk) -> None:
    """A temporary file of an earlier attempt does not stand in the way."""
    snapshot.SnapshotFile(disk, FOLDER, HEADER.name).write(b"half")
    file = write(disk, golden())
    assert file.publish() == len(golden())


def test_giving_up(disk: CrashDisk) -> None:
    """Nothing stays, at whatever point; twice is allowed."""
    file = snapshot.SnapshotFile(disk, FOLDER, HEADER.name)
    file.write(b"x")
    file.abort()
    file.abort()
    assert disk.list(FOLDER) == []
    file = write(disk, golden())
    file.abort()
    assert disk.list(FOLDER) == []


def test_errors_go_on_to_the_caller() -> None:
    """Every call of a publication can fail; what has the name is whole."""
    probe = CrashDisk()
    probe.make_directory(FOLDER)
    write(probe, golden()).publish()
    for number in range(2, len(probe.calls) + 1):
        disk = CrashDisk(error_number=errno.ENOSPC)
        disk.make_directory(FOLDER)
        disk.fail_at = number
        with pytest.raises(OSError, match="No space"):
            write(disk, golden()).publish()
        if NAME in disk.list(FOLDER):
            snapshot.load_snapshot(disk, FOLDER / NAME, ID)


def test_content_is_msgpack() -> None:
    """Whoever has lost everything else can read the rows with any msgpack."""
    bodies = [msgpack.unpackb(body) for kind, body, _ in snapshot.check_frames(golden()) if kind == snapshot.ROWS]
    assert bodies == [[[b"a", b"b"], [[b"va", 300, None], [b"", 301, 1_700_000_000_000]]]]
