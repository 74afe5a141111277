"""Frames of the node link: numbers are unique and documented, and pass the codec."""

import re
from typing import Any

import msgpack
import pytest

from kvtcp.errors import ProtocolError
from kvtcp.protocol import link
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from tests.support import wire_golden

KINDS = {name: value for name, value in wire_golden.numbers(link).items() if name != "LINK_VERSION"}


def test_kinds_are_unique_and_small() -> None:
    """A kind has one meaning and takes one byte."""
    assert len(set(KINDS.values())) == len(KINDS)
    assert all(0 < kind < 128 for kind in KINDS.values())
    assert link.LINK_VERSION >= 1


def test_every_kind_is_in_the_header_with_its_number() -> None:
    """The layout in the module's header names each kind once, with the number of the code."""
    documented = dict(re.findall(r"^    ([A-Z_]+)\s+\[(\d+)", link.__doc__ or "", re.M))
    assert {name: int(number) for name, number in documented.items()} == KINDS


def test_every_kind_has_an_example_that_passes_the_codec() -> None:
    """The golden file shows each kind, and the frame comes out as it went in."""
    assert {frame[0] for frame in wire_golden.LINK_FRAMES} == set(KINDS.values())
    encoder, decoder = FrameEncoder(), FrameDecoder()
    for frame in wire_golden.LINK_FRAMES:
        (message,) = decoder.feed(encoder.encode(frame))
        assert message[0] == frame[0]
        assert len(message) == len(frame)


def report_fields() -> dict[bytes, Any]:
    """The report of the golden file as it arrives."""
    (fields,) = (frame[1] for frame in wire_golden.LINK_FRAMES if frame[0] == link.REPORT)
    found: dict[bytes, Any] = msgpack.unpackb(msgpack.packb(fields), raw=True)
    return found


def test_parse_report() -> None:
    """A report in Python's types; a copy has the node's sentence about it."""
    report = link.parse_report(report_fields())
    assert (report.node, report.pid, report.durability, report.promised, report.map_version, report.space) == (
        "n1", 42, "sync", 3, 8, 0,
    )  # fmt: skip
    assert report.copies == {
        0: link.CopyReport("d0", 1, True, 3, 7, 12345, 6, ""),
        5: link.CopyReport("d5", 2, False, 0, 0, 0, 0, "segment 3 is damaged"),
    }


ROW = [0, b"d0", 1, True, 3, 7, 12345, 6]


@pytest.mark.parametrize("changes", [
    {b"pid": b"42"},
    {b"space": None},
    {b"node": b"\xff"},
    {b"shards": {}},
    {b"shards": [ROW[:7]]},
    {b"shards": [[*ROW[:3], 1, *ROW[4:]]]},
    {b"shards": [[True, *ROW[1:]]]},
    {b"shards": [[0, b"\xff", *ROW[2:]]]},
    {b"shards": [ROW, ROW]},
    {b"shards": [7]},
    {b"damage": [[5]]},
    {b"damage": [[[], b"x"]]},
    {b"damage": [[5, 6]]},
], ids=str)  # fmt: skip
def test_reports_that_are_none(changes: dict[bytes, Any]) -> None:
    """Other types and shapes are a protocol error, never another exception."""
    with pytest.raises(ProtocolError, match="a report"):
        link.parse_report(report_fields() | changes)
    with pytest.raises(ProtocolError):
        link.parse_report([])
    for name in report_fields():
        if name != b"version":
            with pytest.raises(ProtocolError):
                link.parse_report({key: value for key, value in report_fields().items() if key != name})


def told_fields() -> dict[bytes, Any]:
    """The answer to ASK of the golden file as it arrives."""
    (fields,) = (frame[1] for frame in wire_golden.LINK_FRAMES if frame[0] == link.TOLD)
    found: dict[bytes, Any] = msgpack.unpackb(msgpack.packb(fields), raw=True)
    return found


def test_parse_told() -> None:
    """A report with the map of the node, or none, and whether there is a link; other types are a protocol error."""
    told = link.parse_told(told_fields())
    assert (told.report.node, told.map, told.linked) == ("n1", b"{}", False)
    assert told.report.copies == {0: link.CopyReport("d0", 1, True, 3, 7, 12345, 6, "")}
    assert link.parse_told(told_fields() | {b"map": None, b"linked": True}) == link.Told(told.report, b"", True)
    for changes in ({b"map": 1}, {b"linked": 1}, {b"linked": None}, {b"pid": b"42"}):
        with pytest.raises(ProtocolError):
            link.parse_told(told_fields() | changes)


def test_entries() -> None:
    """A chain and the packed entry."""
    assert link.is_entry([1, b"packed"])
    assert not any(map(link.is_entry, ([1], [1, b"p", 2], (1, b"p"), [b"1", b"p"], [1, "p"], None)))
