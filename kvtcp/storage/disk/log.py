"""The write-ahead log of a node: one stream of records in segments, written by group commit.

I/O shell over `log_format` (bytes) and `files` (the disk). Two threads use a `LogWriter`, and share only the objects
that one hands to the other: the event loop decides everything (`prepare`, `prepare_mark`: numbers, sums, when a segment
begins), the log thread writes what was prepared (`write`), then the loop takes note of it (`written`). A record is
prepared only after the last one is written, so **at most one is written and not yet synced**, and a sync covers only
what was written before it began.

    sync    a record is written and synced (fdatasync), then acknowledged
    os      a record is written, then acknowledged: it survives the process, not the machine

A new segment is written under a temporary name with its header and, after a restart, the records that were above the
durable mark; synced; renamed; then its directory is synced. So a segment that has its name is whole up to the durable
LSN of its header, and everything before it is on the disk. Segments are deleted, oldest first, when the snapshots of
all shards have passed them.

After an OSError here the content of the disk is unknown: the process ends without another acknowledgement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvtcp.constants import SEGMENT_BYTES_MAX
from kvtcp.storage.disk.log_format import (
    Position,
    Record,
    SegmentHeader,
    encode_entries,
    encode_header,
    encode_record,
)
from kvtcp.storage.files import AppendFile, Disk
from kvtcp.storage.shard.table import Logged

DIRECTORY: Final = "log"
SUFFIX: Final = ".log"
TEMPORARY: Final = ".tmp"


def segment_name(first_lsn: int) -> str:
    """The file name of a segment: names sort as numbers do."""
    return f"{first_lsn:020d}{SUFFIX}"


def segment_lsn(name: str) -> int | None:
    """The first LSN of a segment by its file name; None for any other name."""
    stem = name.removesuffix(SUFFIX)
    return int(stem) if name.endswith(SUFFIX) and len(stem) == 20 and stem.isascii() and stem.isdigit() else None


@dataclass(slots=True)
class SegmentInfo:
    """A segment on the disk."""

    path: Path
    first_lsn: int
    positions: dict[int, Position]  # shard -> its last entry logged before this segment
    size: int  # bytes
    is_written: bool = True  # the file has its name on the disk


@dataclass(slots=True)
class Prepared:
    """A record for the log thread to write."""

    lsn: int
    data: bytes
    durable_lsn: int  # highest durable LSN once `data` is written (mode sync: `lsn`)
    segment: SegmentInfo  # which `data` is appended to
    header: bytes | None = None  # of `segment`, if this record begins it


class LogWriter:
    """The log of one data directory, open at its end. Made by `begin`."""

    def __init__(
        self, disk: Disk, directory: Path, directory_id: bytes, new_salt: Callable[[], bytes], *, sync: bool = True,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
    ) -> None:  # fmt: skip
        self.segments: list[SegmentInfo] = []  # oldest first; the last one is written to
        self.durable_lsn = 0  # highest LSN known to be on the disk; <= last_lsn
        self.last_lsn = 0  # of the last record prepared
        self.positions: dict[int, Position] = {}  # shard -> its last entry in the records prepared so far
        self._disk = disk
        self._directory = directory
        self._directory_id = directory_id
        self._new_salt = new_salt
        self._sync = sync
        self._segment_bytes_max = segment_bytes_max
        self._salt = b""  # of the present segment
        self._under_way = False  # a record is prepared and not yet written
        self._file: AppendFile | None = None  # the present segment; the log thread's once `begin` is done
        self._rotate = False  # the next record begins a new segment

    @property
    def total_bytes(self) -> int:
        """Length of all segments."""
        return sum(segment.size for segment in self.segments)

    # --- the event loop -------------------------------------------------------------------------------

    def begin(
        self, older: Iterable[SegmentInfo], first_lsn: int, tail: Iterable[Record], positions: dict[int, Position],
        tail_positions: dict[int, Position],
    ) -> None:  # fmt: skip
        """Begin a new segment after a restart, with `tail`, the valid records above the durable mark, written again.

        `positions` are those before `tail`, `tail_positions` those behind it. Blocks. Raises OSError.
        """
        # A segment that begins at `first_lsn` holds nothing but the tail. The new one has its name, and replaces it by
        # the rename.
        self.segments = [segment for segment in older if segment.first_lsn < first_lsn]
        self.positions = dict(positions)
        self.last_lsn = first_lsn - 1
        salt = self._new_salt()
        pieces = []
        for record in tail:
            assert record.lsn == self.last_lsn + 1, "the tail has no gap"
            # Its durable LSN may be that of the record before: the header's covers the whole tail when the file is
            # named.
            pieces.append(encode_record(salt, record.lsn, self.last_lsn, record.payload))
            self.last_lsn = record.lsn
        info, header = self._new_segment(first_lsn, self.last_lsn, salt)
        data = b"".join(pieces)
        info.size += len(data)
        self._begin_file(info, header + data)
        info.is_written = True
        self.durable_lsn = self.last_lsn
        self.positions = dict(tail_positions)

    def prepare(self, entries: list[Logged]) -> Prepared:
        """The next record, with `entries` in the order in which they were applied. `write` it in the log thread, then
        call `written`.
        """
        payload = encode_entries(entries)
        prepared = self._prepare(payload)
        self.positions |= {entry[0]: entry[1:4] for entry in entries}
        return prepared

    def prepare_mark(self) -> Prepared:
        """A record without entries, whose durable LSN covers the last one."""
        return self._prepare(encode_entries([]))

    def begin_new_segment(self) -> None:
        """Put the next record into a new segment, so that the present one can be deleted some day."""
        self._rotate = True

    @property
    def wants_segment(self) -> bool:
        """Whether `begin_new_segment` was called, and the present segment has a record."""
        return self._rotate and self.last_lsn >= self.segments[-1].first_lsn

    def _prepare(self, payload: bytes) -> Prepared:
        assert not self._under_way, "at most one record is written and not yet synced"
        self._under_way = True
        lsn = self.last_lsn + 1
        header: bytes | None = None
        segment = self.segments[-1]
        wanted = self._rotate or segment.size + len(payload) > self._segment_bytes_max
        self._rotate = False
        if wanted and lsn > segment.first_lsn:  # a segment without a record is as good as new, and has the same name
            segment, header = self._new_segment(lsn, lsn - 1, self._new_salt())
        # A new segment gets its name after everything before it is synced, in every mode: so lsn - 1 is durable.
        data = encode_record(self._salt, lsn, lsn - 1 if header is not None else self.durable_lsn, payload)
        segment.size += len(data)
        self.last_lsn = lsn
        durable_lsn = lsn if self._sync else lsn - 1 if header is not None else self.durable_lsn
        return Prepared(lsn, data, durable_lsn, segment, header)

    def _new_segment(self, first_lsn: int, durable_lsn: int, salt: bytes) -> tuple[SegmentInfo, bytes]:
        self._salt = salt
        positions = dict(self.positions)
        header = encode_header(SegmentHeader(self._directory_id, salt, first_lsn, durable_lsn, positions))
        path = self._directory / segment_name(first_lsn)
        info = SegmentInfo(path, first_lsn, positions, len(header), is_written=False)
        self.segments.append(info)
        return info, header

    def written(self, prepared: Prepared) -> None:
        """Take note that the log thread has written a record."""
        self._under_way = False
        prepared.segment.is_written = True
        self.durable_lsn = prepared.durable_lsn

    def deletable(self, is_covered: Callable[[int, Position], bool]) -> list[Path]:
        """Take the oldest segments off the list, as far as `is_covered(shard, position)` says that no restart needs
        entries up to their ends. Returns their paths, to be removed in this order, oldest first.

        A segment is deleted only when the next one is on the disk, because a directory without a segment looks like a
        lost log; and the oldest first, because a gap between segments looks like lost entries.
        """
        paths: list[Path] = []
        while len(self.segments) > 1 and self.segments[1].is_written:
            behind = self.segments[1].positions
            if not all(is_covered(shard, position) for shard, position in behind.items()):
                break
            paths.append(self.segments.pop(0).path)
        return paths

    # --- the log thread -------------------------------------------------------------------------------

    def write(self, prepared: Prepared) -> None:
        """Write a prepared record, and make it durable as the mode says. Raises OSError, after which the content of the
        disk is unknown."""
        if prepared.header is not None:
            if self._file is not None and not self._sync:
                self._file.sync()  # the new segment's header says that all before it is on the disk
            self._begin_file(prepared.segment, prepared.header)
        assert self._file is not None, "the log was begun"
        self._file.write(prepared.data)
        if self._sync:
            self._file.sync()

    def sync_all(self) -> None:
        """Make all written records durable, whatever the mode. Raises OSError."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the file without a sync."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_file(self, segment: SegmentInfo, data: bytes) -> None:
        if self._file is not None:
            self._file.close()
        temporary = segment.path.with_name(segment.path.name + TEMPORARY)
        self._disk.remove(temporary)
        self._file = self._disk.create(temporary)
        self._file.write(data)
        self._file.sync()
        self._disk.rename(temporary, segment.path)
        self._disk.sync_directory(self._directory)
