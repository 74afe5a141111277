"""The bytes of the write-ahead log: segments and records.

Pure. `log.py` writes and reads files of this form; nothing else knows it. All integers are big-endian.

    segment = header, records                         file log/<first LSN as 20 digits>.log
    header  = "KVTCPLOG"  8   magic
              version     2   LOG_FORMAT_VERSION
              reserved    2   0
              length      4   of the whole header
              crc32       4   of the header without this field
              directory   8   id of the data directory: a segment copied from another one is not taken for ours
              salt        4   random, another one in every segment
              first LSN   8   of the first record
              durable LSN 8   highest LSN that was on the disk when the segment got its name; >= first LSN - 1
              positions       msgpack [[shard, generation, seq, chain], ...]: last entries logged before this segment
    record  = salt        4   of the segment: finds the next record behind damage
              length      4   of the payload
              crc32       4   of length, LSN, durable LSN and payload, begun with the salt
              LSN         8   1, 2, 3, ... over all segments
              durable LSN 8   highest LSN that was on the disk when this record was made
              payload         msgpack [[shard, generation, seq, chain, packed entry], ...]; empty: only the mark

A record is the entries of one group commit, in the order in which they were applied.

**Torn or corrupt** is decided by the durable mark alone: the highest durable LSN of any valid record or header. (A
segment gets its name only after everything before it is on the disk.) An invalid record at or below the mark is
corruption: it had been on the disk, and was perhaps acknowledged. An invalid record above the mark was never
acknowledged as durable, so the log ends before it. Without a power cut that can only be the last record: a killed
process leaves no valid record behind an invalid one.

Records at or above the first LSN of the next segment are void: a restart writes the records above the mark again, into
a new segment, because the kernel may never write the pages that it still holds of the old ones.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from zlib import crc32

import msgpack

from kvtcp.constants import LOG_FORMAT_VERSION, LOG_RECORD_BYTES_MAX
from kvtcp.storage.shard.table import Logged

MAGIC: Final = b"KVTCPLOG"
_HEADER: Final = struct.Struct(">8sHHII8s4sQQ")
_CRC_AT: Final = 16  # of the header's crc32
_RECORD: Final = struct.Struct(">4sIIQQ")
_RECORD_SUMMED: Final = struct.Struct(">IQQ")  # what the crc32 of a record covers before the payload
HEADER_BYTES: Final = _HEADER.size
RECORD_BYTES: Final = _RECORD.size
SALT_BYTES: Final = 4
DIRECTORY_BYTES: Final = 8

_pack = msgpack.Packer(autoreset=True).pack

Position = tuple[int, int, int]  # generation, seq, chain


class FormatError(ValueError):
    """Bytes are not in the format expected; the text says where they differ."""


class VersionError(FormatError):
    """A file that another version of kvtcp wrote."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """The beginning of a segment. `positions` maps each shard to its last entry in earlier segments."""

    directory: bytes
    salt: bytes
    first_lsn: int
    durable_lsn: int
    positions: dict[int, Position]
    bytes: int = 0  # length of the header itself, filled in by `parse_header`


@dataclass(frozen=True, slots=True)
class Record:
    """A valid record. `payload` is still packed."""

    lsn: int
    durable_lsn: int
    payload: bytes

    def entries(self) -> list[Logged]:
        """The entries in the payload. Raises FormatError if a record with a right sum was written wrong."""
        try:
            rows = msgpack.unpackb(self.payload, use_list=False)
            if any(tuple(map(type, row)) != _ROW_TYPES for row in rows):
                raise ValueError("an entry has fields of the wrong type")
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise FormatError(f"record {self.lsn} has a right sum and no right payload: {error}") from error
        return list(rows)


_ROW_TYPES: Final = (int, int, int, int, bytes)


@dataclass(slots=True)
class Segment:
    """The records that `parse_records` found behind a header."""

    records: list[Record] = field(default_factory=list)  # valid, without a gap from the first LSN on
    bad_offset: int | None = None  # where the first bad record begins; None = the file ends with a valid one
    bad_reason: str = ""
    later: list[Record] = field(default_factory=list)  # valid records behind the bad place, ascending
    end_offset: int = 0  # behind the last record

    @property
    def mark(self) -> int:
        """The highest durable LSN of all records, 0 if there is none."""
        return max((record.durable_lsn for record in (*self.records, *self.later)), default=0)


def encode_header(header: SegmentHeader) -> bytes:
    """The bytes of a header."""
    assert len(header.salt) == SALT_BYTES and len(header.directory) == DIRECTORY_BYTES, "ids have a fixed length"
    rows = [[shard, *position] for shard, position in sorted(header.positions.items())]
    tail = _pack(rows)
    length = HEADER_BYTES + len(tail)
    head = _HEADER.pack(
        MAGIC, LOG_FORMAT_VERSION, 0, length, 0, header.directory, header.salt, header.first_lsn, header.durable_lsn
    )
    total = crc32(tail, crc32(head[_CRC_AT + 4 :], crc32(head[:_CRC_AT])))
    return b"%b%b%b%b" % (head[:_CRC_AT], total.to_bytes(4, "big"), head[_CRC_AT + 4 :], tail)


def parse_header(data: bytes) -> SegmentHeader:
    """The header at the start of a segment. Raises VersionError, FormatError."""
    if len(data) < HEADER_BYTES:
        raise FormatError(f"the file has {len(data)} bytes, a header has at least {HEADER_BYTES}")
    magic, version, _, length, expected, directory, salt, first_lsn, durable_lsn = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("the file does not begin as a segment of the log")
    if not HEADER_BYTES <= length <= len(data):
        raise FormatError(f"the header has no right length ({length})")
    tail = data[HEADER_BYTES:length]
    if crc32(tail, crc32(data[_CRC_AT + 4 : HEADER_BYTES], crc32(data[:_CRC_AT]))) != expected:
        raise FormatError("the sum of the header is wrong")
    if version != LOG_FORMAT_VERSION:  # every version keeps magic, version, length and sum where they are
        raise VersionError(f"the log has format {version}, this version of kvtcp knows format {LOG_FORMAT_VERSION}")
    positions = {shard: (generation, seq, chain) for shard, generation, seq, chain in msgpack.unpackb(tail)}
    return SegmentHeader(directory, salt, first_lsn, durable_lsn, positions, length)


def encode_record(salt: bytes, lsn: int, durable_lsn: int, payload: bytes) -> bytes:
    """The bytes of a record."""
    # `parse_records` would refuse a longer one, after it was acknowledged
    assert len(payload) <= LOG_RECORD_BYTES_MAX, f"a record of {len(payload)} bytes is more than can be read back"
    total = crc32(payload, crc32(_RECORD_SUMMED.pack(len(payload), lsn, durable_lsn), _seed(salt)))
    return _RECORD.pack(salt, len(payload), total, lsn, durable_lsn) + payload


def encode_entries(entries: Sequence[Logged]) -> bytes:
    """The payload of a record."""
    packed: bytes = _pack(entries)
    return packed


def parse_records(data: bytes, header: SegmentHeader) -> Segment:
    """All valid records of a segment, whatever the bytes are. Raises nothing."""
    found = Segment(end_offset=header.bytes)
    offset, lsn = header.bytes, header.first_lsn
    while offset < len(data):
        try:
            record, size = _parse_record(data, offset, header.salt)
            if record.lsn != lsn:
                raise FormatError(f"record {record.lsn} stands where record {lsn} belongs")
        except FormatError as error:
            found.bad_offset, found.bad_reason = offset, str(error)
            found.later = _find_later(data, offset, header.salt, lsn)
            return found
        found.records.append(record)
        offset += size
        lsn += 1
        found.end_offset = offset
    return found


def _parse_record(data: bytes, offset: int, salt: bytes) -> tuple[Record, int]:
    """The record at `offset` and its length. Raises FormatError."""
    if len(data) - offset < RECORD_BYTES:
        raise FormatError("the file ends within the head of a record")
    marker, length, expected, lsn, durable_lsn = _RECORD.unpack_from(data, offset)
    if marker != salt:
        raise FormatError("there is no record here")
    if length > LOG_RECORD_BYTES_MAX:
        raise FormatError(f"a record of {length} bytes is over the limit")
    end = offset + RECORD_BYTES + length
    if end > len(data):
        raise FormatError("the file ends within a record")
    payload = data[offset + RECORD_BYTES : end]
    if crc32(payload, crc32(_RECORD_SUMMED.pack(length, lsn, durable_lsn), _seed(salt))) != expected:
        raise FormatError("the sum of a record is wrong")
    return Record(lsn, durable_lsn, payload), RECORD_BYTES + length


def _find_later(data: bytes, offset: int, salt: bytes, lsn: int) -> list[Record]:
    """Valid records behind a bad place, where record `lsn` belongs: searched by the salt, verified by the sums.

    Only ascending LSNs count: a value may contain the bytes of an older record.
    """
    later: list[Record] = []
    place = data.find(salt, offset)
    while place >= 0:
        try:
            record, size = _parse_record(data, place, salt)
        except FormatError:
            place = data.find(salt, place + 1)
            continue
        if record.lsn > lsn:
            later.append(record)
            lsn = record.lsn
        place = data.find(salt, place + size)
    return later


def _seed(salt: bytes) -> int:
    return int.from_bytes(salt, "big")
