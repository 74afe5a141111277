"""Frames of the node link: numbers are unique and documented, and pass the codec."""

from __future__ import annotations

import re

import wire_golden

from kvtcp.protocol import link
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder

KINDS = {name: value for name, value in wire_golden.numbers(link).items() if name != "LINK_VERSION"}


def test_kinds_are_unique_and_small() -> None:
    """A kind has one meaning and takes one byte."""
    assert len(set(KINDS.values())) == len(KINDS)
    assert all(0 < kind < 128 for kind in KINDS.values())
    assert link.LINK_VERSION >= 1


def test_every_kind_is_in_the_header_with_its_number() -> None:
    """The layout in the module's header names each kind once, with the number of the code."""
    documented = dict(re.findall(r"^    ([A-Z]+)\s+\[(\d+)", link.__doc__ or "", re.M))
    assert {name: int(number) for name, number in documented.items()} == KINDS


def test_every_kind_has_an_example_that_passes_the_codec() -> None:
    """The golden file shows each kind once, and the frame comes out as it went in."""
    assert sorted(frame[0] for frame in wire_golden.LINK_FRAMES) == sorted(KINDS.values())
    encoder, decoder = FrameEncoder(), FrameDecoder()
    for frame in wire_golden.LINK_FRAMES:
        (message,) = decoder.feed(encoder.encode(frame))
        assert message[0] == frame[0]
        assert len(message) == len(frame)
