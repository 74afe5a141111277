"""Snapshots: the rows of one shard at one position, in one file.

I/O shell over `freeze` (the rows) and `files` (the disk). All integers are big-endian.

    file    snapshots/<shard, 4 digits>-<generation>-<seq, 20 digits>.snapshot
    header  "KVTCPSNP" 8, version 2, reserved 2, crc32 of the rest 4, directory id 8, shard 4, generation 8, epoch 8,
            seq 8, chain 4
    frame   kind 1, length 4, crc32 of kind, length and body, begun with the crc32 of the frame before 4, body (msgpack)
    kinds   1  [[key, ...], [[value, rev, deadline_ms or nil], ...]]    rows in ascending order, some hundred a frame
            2  [[seq, chain, packed entry], ...]     entries up to the position that may be uncommitted
            3  [rows, frames]                        the last frame; nothing follows it

A file is written under a temporary name, synced, renamed, its directory synced. So a file that has its name was whole
once, and anything wrong with it later is corruption. The sums are chained: a frame that is missing, doubled or in
another place is found too. Loading takes a few calls in C per frame.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import msgpack

from kvtcp.constants import (
    SNAPSHOT_FORMAT_VERSION,
    SNAPSHOT_FRAME_BYTES,
    SNAPSHOT_FRAME_ROWS,
    SNAPSHOT_SYNC_BYTES,
)
from kvtcp.storage.disk.log_format import FormatError, VersionError
from kvtcp.storage.files import AppendFile, Disk
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.index import Cell
from kvtcp.storage.shard.table import Logged, Table

DIRECTORY: Final = "snapshots"
SUFFIX: Final = ".snapshot"
TEMPORARY: Final = ".tmp"
MAGIC: Final = b"KVTCPSNP"
ROWS: Final = 1
KEPT: Final = 2
END: Final = 3

_HEADER: Final = struct.Struct(">8sHHI8sIQQQI")
HEADER_BYTES: Final = _HEADER.size
_SUM_AT: Final = 12  # of the header's crc32
_FRAME: Final = struct.Struct(">BII")
_FRAME_SUMMED: Final = struct.Struct(">BI")
_NAME: Final = re.compile(r"(\d{4,})-(\d+)-(\d{20})\.snapshot")

_pack = msgpack.Packer(autoreset=True).pack


@dataclass(frozen=True, slots=True)
class SnapshotName:
    """The fields of a file name."""

    shard: int
    generation: int
    seq: int

    @property
    def file(self) -> str:
        """The file name."""
        return f"{self.shard:04d}-{self.generation}-{self.seq:020d}{SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> SnapshotName | None:
        """The fields of a name; None if it is not the name of a snapshot."""
        found = _NAME.fullmatch(name)
        parsed = None if found is None else cls(int(found[1]), int(found[2]), int(found[3]))
        return parsed if parsed is not None and parsed.file == name else None


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """The copy whose rows a file has, and the position of them."""

    directory: bytes
    shard: int
    generation: int
    epoch: int
    seq: int
    chain: int

    @property
    def name(self) -> SnapshotName:
        """The name of the file with this header."""
        return SnapshotName(self.shard, self.generation, self.seq)

    def encode(self) -> bytes:
        """The bytes of the header."""
        tail = (self.directory, self.shard, self.generation, self.epoch, self.seq, self.chain)
        head = _HEADER.pack(MAGIC, SNAPSHOT_FORMAT_VERSION, 0, 0, *tail)
        return head[:_SUM_AT] + _header_sum(head).to_bytes(4, "big") + head[_SUM_AT + 4 :]

    @classmethod
    def parse(cls, data: bytes | bytearray) -> SnapshotHeader:
        """The header at the start of a file. Raises VersionError, FormatError."""
        if len(data) < _HEADER.size:
            raise FormatError(f"the file has {len(data)} bytes, less than a header")
        magic, version, _, total, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise FormatError("the file does not begin as a snapshot")
        if total != _header_sum(data):
            raise FormatError("the sum of the header is wrong")
        if version != SNAPSHOT_FORMAT_VERSION:  # every version keeps the length of the header and the place of its sum
            raise VersionError(
                f"the snapshot has format {version}, this version of kvtcp knows format {SNAPSHOT_FORMAT_VERSION}"
            )
        return cls(*fields)


def _header_sum(head: bytes | bytearray) -> int:
    return crc32(head[_SUM_AT + 4 : _HEADER.size], crc32(head[:_SUM_AT]))


class SnapshotEncoder:
    """The bytes of one snapshot, piece by piece. Pure: the event loop encodes, another thread writes."""

    def __init__(self, header: SnapshotHeader) -> None:
        self.header = header
        self.rows = 0  # so far
        self._frames = 0
        self._sum = 0  # of the last frame; of the header before the first

    def begin(self) -> bytes:
        """The header."""
        data = self.header.encode()
        self._sum = crc32(data)
        return data

    def add_rows(self, keys: Sequence[bytes], cells: Sequence[Cell]) -> bytes:
        """A frame of rows in ascending order."""
        self.rows += len(keys)
        return self._frame(ROWS, (keys, cells))

    def add_kept(self, kept: Sequence[Logged]) -> bytes:
        """A frame of entries of the shard up to the position that may be uncommitted, in order."""
        return self._frame(KEPT, [(seq, chain, entry) for _, _, seq, chain, entry in kept])

    def end(self) -> bytes:
        """The last frame."""
        return self._frame(END, (self.rows, self._frames))

    def _frame(self, kind: int, content: Any) -> bytes:
        body: bytes = _pack(content)
        self._sum = crc32(body, crc32(_FRAME_SUMMED.pack(kind, len(body)), self._sum))
        self._frames += 1
        return _FRAME.pack(kind, len(body), self._sum) + body


def encode_snapshot(header: SnapshotHeader, frozen: Frozen, kept: Sequence[Logged]) -> Iterator[bytes]:
    """The bytes of the snapshot of a frozen shard, in pieces of some hundred rows or entries, or about
    SNAPSHOT_FRAME_BYTES. The shard may change meanwhile. A caller that stops early has to close `frozen`."""
    encoder = SnapshotEncoder(header)
    yield encoder.begin()
    while frozen.rows_left:
        keys, cells = frozen.next_cells(SNAPSHOT_FRAME_ROWS)
        start = size = 0
        for end, (value, _, _) in enumerate(cells, 1):
            size += len(value) + len(keys[end - 1])
            if size >= SNAPSHOT_FRAME_BYTES or end == len(cells):
                yield encoder.add_rows(keys[start:end], cells[start:end])
                start, size = end, 0
    start = size = 0
    for end, (_, _, _, _, packed) in enumerate(kept, 1):
        size += len(packed)
        if size >= SNAPSHOT_FRAME_BYTES or end - start == SNAPSHOT_FRAME_ROWS or end == len(kept):
            yield encoder.add_kept(kept[start:end])
            start, size = end, 0
    yield encoder.end()


class SnapshotFile:
    """A snapshot being written. Methods block, for a thread of their own, and raise OSError; `abort` it then."""

    def __init__(self, disk: Disk, directory: Path, name: SnapshotName) -> None:
        self.path = directory / name.file
        self._disk = disk
        self._directory = directory
        self._temporary = directory / (name.file + TEMPORARY)
        self._disk.remove(self._temporary)
        self._file: AppendFile | None = self._disk.create(self._temporary)
        self._unsynced_bytes = 0

    def write(self, data: bytes) -> None:
        """Append `data`, with a sync every SNAPSHOT_SYNC_BYTES: one large sync would delay those of the log."""
        assert self._file is not None, "the file is open"
        self._file.write(data)
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= SNAPSHOT_SYNC_BYTES:
            self._file.sync()
            self._unsynced_bytes = 0

    def finish(self) -> None:
        """Make all bytes durable, under the temporary name."""
        assert self._file is not None, "the file is open"
        self._file.sync()
        self._file.close()
        self._file = None

    def read_back(self) -> bytes:
        """The bytes on the disk under the temporary name, after `finish`."""
        return self._disk.read(self._temporary)

    def publish(self) -> int:
        """Give the file its name, durably, and return its length. Raises FormatError if it reads back damaged."""
        # The log lets go of entries because of this file, so it is verified before anything relies on it.
        self._disk.rename(self._temporary, self.path)
        self._disk.sync_directory(self._directory)
        data = self._disk.read(self.path)
        SnapshotHeader.parse(data)
        for _ in check_frames(data):
            pass
        return len(data)

    def abort(self) -> None:
        """Remove the unfinished file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._disk.remove(self._temporary)


def check_frames(data: bytes | bytearray) -> Iterator[tuple[int, bytes | bytearray, int]]:
    """(kind, body, offset) of every frame behind the header. Raises FormatError at the first wrong sum, and if bytes
    are missing or left over at the end."""
    offset = _HEADER.size
    total = crc32(data[:offset])
    kind = 0
    while kind != END:
        if len(data) - offset < _FRAME.size:
            raise FormatError(f"the file ends at byte {len(data)} without its last frame")
        kind, length, expected = _FRAME.unpack_from(data, offset)
        body = data[offset + _FRAME.size : offset + _FRAME.size + length]
        if len(body) != length:
            raise FormatError(f"the frame at byte {offset} is cut off")
        total = crc32(body, crc32(_FRAME_SUMMED.pack(kind, length), total))
        if total != expected:
            raise FormatError(f"the sum of the frame at byte {offset} is wrong")
        yield kind, body, offset
        offset += _FRAME.size + length
    if offset != len(data):
        raise FormatError(f"{len(data) - offset} bytes follow the last frame")


def read_frames(data: bytes | bytearray) -> Iterator[tuple[int, Any]]:
    """(kind, content) of every frame but the last one, whose counts are verified. Raises FormatError."""
    rows = 0
    for frames, (kind, body, offset) in enumerate(check_frames(data)):
        try:
            content = msgpack.unpackb(body, use_list=False)
        except (ValueError, msgpack.UnpackException) as error:
            raise FormatError(f"the frame at byte {offset} has a right sum and no right content: {error}") from error
        if kind == END:
            if content != (rows, frames):
                raise FormatError(f"the last frame counts {content}, the file has {rows} rows in {frames} frames")
            continue  # `check_frames` still has to see that nothing follows
        if kind == ROWS:
            rows += len(content[0])
        yield kind, content


def read_header(data: bytes | bytearray, name: SnapshotName, directory_id: bytes) -> SnapshotHeader:
    """The header of a file of this name in this data directory. Raises VersionError, FormatError."""
    header = SnapshotHeader.parse(data)
    if header.directory != directory_id:
        raise FormatError("the snapshot belongs to another data directory")
    if header.name != name:
        raise FormatError(f"the snapshot is {header.name.file} by its header")
    return header


def load_snapshot(disk: Disk, path: Path, directory_id: bytes) -> tuple[Table, list[Logged]]:
    """The table of a snapshot, and the entries in it that may be uncommitted. Raises FormatError, VersionError,
    DataError for rows out of order, OSError."""
    name = SnapshotName.parse(path.name)
    assert name is not None, "the caller has parsed the name"
    return decode_snapshot(disk.read(path), name, directory_id)


def decode_snapshot(
    data: bytes | bytearray, name: SnapshotName, directory_id: bytes
) -> tuple[Table, list[Logged]]:
    """`load_snapshot` from the bytes of a file. Raises FormatError, VersionError, DataError."""
    header = read_header(data, name, directory_id)
    kept: list[Logged] = []

    def pieces() -> Iterator[tuple[Sequence[bytes], Sequence[Cell]]]:
        for kind, content in read_frames(data):
            if kind == ROWS:
                yield content
            else:
                kept.extend((header.shard, header.generation, *row) for row in content)

    table = Table(header.shard)
    table.generation = header.generation
    table.load(pieces(), header.epoch, header.seq, header.chain)
    return table, kept
