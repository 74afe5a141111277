"""The bytes of the log: golden ones, every flipped bit, every torn byte, records behind a bad place, other versions."""

from random import Random
from zlib import crc32

import pytest

from kvtcp.constants import LOG_RECORD_BYTES_MAX
from kvtcp.storage.disk import log_format

SALT = b"salt"
HEADER = log_format.SegmentHeader(b"DIRECTRY", SALT, 7, 6, {1: (1, 20, 0xDEAD), 0: (2, 300, 5)})
WHOLE = log_format.encode_header(HEADER)
ENTRIES = [(0, 2, 301, 0x01020304, b"entry"), (1, 1, 21, 9, b"")]

GOLDEN_HEADER = (
    "4b565443504c4f47"  # magic
    "0001" "0000"  # version, reserved
    "0000003f" "6a816563"  # length, sum
    "4449524543545259" "73616c74"  # directory, salt
    "0000000000000007" "0000000000000006"  # first LSN, durable LSN
    "92" "940002cd012c05" "94010114cddead"  # positions
)  # fmt: skip
GOLDEN_RECORD = (
    "73616c74" "0000001a" "50e0d1f0"  # salt, length, sum
    "0000000000000007" "0000000000000006"  # LSN, durable LSN
    "92" "950002cd012dce01020304c405656e747279" "9501011509c400"  # entries
)  # fmt: skip
GOLDEN_MARK = "73616c74" "00000001" "5b49d6db" "0000000000000008" "0000000000000007" "90"  # fmt: skip


def segment(*records: bytes) -> bytes:
    """A whole file."""
    return log_format.encode_header(HEADER) + b"".join(records)


def record(lsn: int, entries: list[tuple[int, int, int, int, bytes]] | None = None) -> bytes:
    """A record as mode sync writes it."""
    packed = log_format.encode_entries(ENTRIES if entries is None else entries)
    return log_format.encode_record(SALT, lsn, lsn - 1, packed)


def resealed(header: bytes) -> bytes:
    """A changed header with its right sum."""
    total = crc32(header[20:], crc32(header[:16]))
    return header[:16] + total.to_bytes(4, "big") + header[20:]


def flipped(data: bytes, bit: int) -> bytes:
    """With one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_golden() -> None:
    """The format is what it was: a change of these bytes needs a new version."""
    assert log_format.encode_header(HEADER).hex() == GOLDEN_HEADER
    assert record(7).hex() == GOLDEN_RECORD
    assert record(8, []).hex() == GOLDEN_MARK


def test_round_trip() -> None:
    """What was encoded is parsed again."""
    data = segment(record(7), record(8, []), record(9))
    header = log_format.parse_header(data)
    names = ("directory", "salt", "first_lsn", "durable_lsn", "positions")
    assert header == log_format.SegmentHeader(**{name: getattr(HEADER, name) for name in names}, bytes=0x3F)
    found = log_format.parse_records(data, header)
    assert [(each.lsn, each.durable_lsn) for each in found.records] == [(7, 6), (8, 7), (9, 8)]
    assert [each.entries() for each in found.records] == [ENTRIES, [], ENTRIES]
    assert (found.bad_offset, found.later, found.end_offset, found.mark) == (None, [], len(data), 8)
    empty = log_format.parse_records(segment(), header)
    assert (empty.records, empty.bad_offset, empty.mark, empty.end_offset) == ([], None, 0, header.bytes)


def test_every_flipped_bit() -> None:
    """No bit of a segment can change unnoticed; what is not in the damaged record is found all the same."""
    records = [record(7), record(8), record(9), record(10, [])]
    data = segment(*records)
    size = len(data) - sum(map(len, records))
    whole = log_format.parse_records(data, log_format.parse_header(data)).records
    for bit in range(8 * len(data)):
        changed = flipped(data, bit)
        if bit < 8 * size:
            with pytest.raises(log_format.FormatError):
                log_format.parse_header(changed)
            continue
        found = log_format.parse_records(changed, log_format.parse_header(changed))
        place = bit // 8 - size
        index = next(index for index in range(4) if place < sum(map(len, records[: index + 1])))
        assert found.records == whole[:index] and found.later == whole[index + 1 :], bit
        assert found.bad_offset == found.end_offset == size + sum(map(len, records[:index])) and found.bad_reason


def test_every_torn_byte() -> None:
    """A file may end anywhere: the records before are found, and where they end."""
    records = [record(7), record(8), record(9)]
    data = segment(*records)
    header = log_format.parse_header(data)
    ends = [header.bytes + sum(map(len, records[:count])) for count in range(4)]
    for length in range(len(data) + 1):
        if length < header.bytes:
            with pytest.raises(log_format.FormatError):
                log_format.parse_header(data[:length])
            continue
        found = log_format.parse_records(data[:length], header)
        count = sum(end <= length for end in ends) - 1
        assert [each.lsn for each in found.records] == [7, 8, 9][:count] and found.later == []
        assert found.end_offset == ends[count]
        assert found.bad_offset == (None if length == ends[count] else ends[count])
        if length != ends[count]:
            assert found.bad_reason.startswith("the file ends within")


def test_records_behind_a_bad_place() -> None:
    """Valid records are found behind any bytes, in ascending order and only once."""
    rng = Random(5)
    others = [rng.randbytes(500), record(8)[:-1], record(7), b"x" + record(3)]
    for garbage in (b"", b"\0", SALT, SALT * 9, SALT[:3], *others):
        data = segment(record(7), garbage, record(9), b"?" * 7, record(12), record(11), SALT, record(13))
        found = log_format.parse_records(data, log_format.parse_header(data))
        assert [each.lsn for each in found.records] == [7], garbage
        assert [each.lsn for each in found.later] == [9, 12, 13], garbage
        assert found.bad_offset == len(segment(record(7))) and found.mark == 12


def test_the_mark_is_the_highest() -> None:
    """A mark counts wherever it is found."""
    data = segment(record(7), b"?", log_format.encode_record(SALT, 9, 8, log_format.encode_entries([])))
    assert log_format.parse_records(data, log_format.parse_header(data)).mark == 8
    data = segment(log_format.encode_record(SALT, 7, 6, b"\x90"), log_format.encode_record(SALT, 8, 5, b"\x90"))
    assert log_format.parse_records(data, log_format.parse_header(data)).mark == 6


def test_records_of_another_segment() -> None:
    """A record under another salt is none, and the sum covers the salt, length, numbers and payload."""
    foreign = log_format.encode_record(b"SALT", 7, 6, log_format.encode_entries(ENTRIES))
    data = segment(foreign)
    found = log_format.parse_records(data, log_format.parse_header(data))
    assert not found.records and found.bad_reason == "there is no record here"
    data = segment(SALT + foreign[4:])
    found = log_format.parse_records(data, log_format.parse_header(data))
    assert not found.records and found.bad_reason == "the sum of a record is wrong"


def test_a_number_that_does_not_follow() -> None:
    """A valid record in a wrong place ends what is without a gap."""
    data = segment(record(7), record(9))
    found = log_format.parse_records(data, log_format.parse_header(data))
    assert found.bad_reason == "record 9 stands where record 8 belongs" and [each.lsn for each in found.later] == [9]


def test_a_length_over_the_limit() -> None:
    """It is not even looked for."""
    head = record(7)[:log_format.RECORD_BYTES]
    data = segment(head[:4] + (LOG_RECORD_BYTES_MAX + 1).to_bytes(4, "big") + head[8:], b"x" * 50)
    assert "over the limit" in log_format.parse_records(data, log_format.parse_header(data)).bad_reason


def test_other_versions() -> None:
    """A header with a right sum and another version is of that version; with a wrong one it is damaged."""
    data = log_format.encode_header(HEADER)
    other = data[:8] + (2).to_bytes(2, "big") + data[10:]
    with pytest.raises(log_format.VersionError, match="the log has format 2, this version of kvtcp knows format 1"):
        log_format.parse_header(resealed(other))
    with pytest.raises(log_format.FormatError, match="sum of the header") as error:
        log_format.parse_header(other)
    assert not isinstance(error.value, log_format.VersionError)
    longer = resealed(other[:12] + (len(other) + 9).to_bytes(4, "big") + other[16:] + b"something")
    with pytest.raises(log_format.VersionError):
        log_format.parse_header(longer)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "has 0 bytes"),
    (b"KVTCPLOG" * 3, "has 24 bytes"),
    (b"\0" * 200, "does not begin as a segment"),
    (WHOLE[:12] + (3).to_bytes(4, "big") + WHOLE[16:], "no right length (3)"),
    (WHOLE[:-1], "no right length (63)"),
])  # fmt: skip
def test_no_header(data: bytes, reason: str) -> None:
    """What it is not is said in a sentence."""
    with pytest.raises(log_format.FormatError) as error:
        log_format.parse_header(data)
    assert reason in str(error.value)


@pytest.mark.parametrize("payload", [
    b"", b"\xc1", b"\x01", b"\x91\x01", b"\x91\x94\x01\x01\x01\x01", b"\x91\x95\x01\x01\x01\x01\x01", b"\x90\x90",
])  # fmt: skip
def test_wrong_payloads(payload: bytes) -> None:
    """A payload that is no list of entries was written wrong."""
    with pytest.raises(log_format.FormatError, match="record 4 has a right sum and no right payload"):
        log_format.Record(4, 3, payload).entries()
