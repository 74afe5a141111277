"""Frames: round trips, every way to be wrong, limits, and the memory that hostile bytes can cause."""

import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtcp import constants
from kvtcp.errors import Code, ProtocolError, RequestError
from kvtcp.protocol.framing import PREFIX_CACHE_LENGTHS, FrameDecoder, FrameEncoder, frame_prefix
from tests.fuzz import framing as fuzz_framing

KEYS = st.binary(max_size=10)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=100)
    | st.builds(bytes, st.integers(constants.STREAMED_BODY_BYTES_MAX - 20, constants.STREAMED_BODY_BYTES_MAX + 20))
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=30
)


def frame(body: bytes) -> bytes:
    """A frame around any body."""
    return frame_prefix(len(body)) + body


def refusal(data: bytes, frame_bytes_max: int = constants.FRAME_BYTES_MAX) -> ProtocolError:
    """The error of one feed."""
    with pytest.raises(ProtocolError) as caught:
        FrameDecoder(frame_bytes_max).feed(data)
    return caught.value


@settings(max_examples=150, deadline=None)
@given(messages=st.lists(VALUES, max_size=5), data=st.data())
def test_messages_survive_any_cut(messages: list[Any], data: st.DataObject) -> None:
    """What the encoder writes the decoder reads, however the stream is cut; `buffered_bytes` is right at every cut."""
    encoder = FrameEncoder()
    frames = [encoder.encode(message) for message in messages]
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    ends = [sum(map(len, frames[: i + 1])) for i in range(len(frames))]
    decoder = FrameDecoder()
    got: list[Any] = []
    for low, high in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += decoder.feed(stream[low:high])
        rest = high - max((end for end in ends if end <= high), default=0)
        assert len(got) == sum(end <= high for end in ends)
        assert decoder.buffered_bytes == rest
    assert got == messages


@pytest.mark.parametrize("body_bytes", [
    1, 2, PREFIX_CACHE_LENGTHS - 1, PREFIX_CACHE_LENGTHS,
    constants.STREAMED_BODY_BYTES_MAX - 1, constants.STREAMED_BODY_BYTES_MAX, constants.STREAMED_BODY_BYTES_MAX + 1,
    *(constants.READ_CHUNK_BYTES_MAX + more for more in (-6, 0, 1)), 3 * constants.READ_CHUNK_BYTES_MAX,
])  # fmt: skip
def test_every_way_of_decoding_at_its_edges(body_bytes: int) -> None:
    """Bodies around each internal threshold come out, alone, between small ones, whole and in halves."""
    value: Any = {1: None, 2: [None]}.get(body_bytes, bytes(max(0, body_bytes - (3 if body_bytes < 65539 else 5))))
    stream = frame(b"\x07") + frame(msgpack.packb(value)) + frame(b"\x08")
    assert len(stream) == 3 * constants.FRAME_PREFIX_BYTES + 2 + body_bytes
    assert FrameDecoder().feed(stream) == [7, value, 8]
    for cut in (1, 5, 6, 7, 10, 11, 12, len(stream) // 2, len(stream) - 7, len(stream) - 6, len(stream) - 1):
        decoder = FrameDecoder()
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == [7, value, 8], cut
        assert decoder.buffered_bytes == 0


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6))
@example(data=b"\xce\0\0\0\x01\x01\x00", cuts=[])
@example(data=b"\xce\0\0\0\x02\x01\x00", cuts=[3, 6])
def test_any_bytes_give_messages_or_one_protocol_error(data: bytes, cuts: list[int]) -> None:
    """Bytes of any kind, and the same as a body, have one verdict however they are cut."""
    for stream in (data, frame(data), frame(b"\xc0") + frame(data) + frame(b"\xc0")):
        fuzz_framing.check(stream, sorted(min(cut, len(stream)) for cut in cuts))


def test_fuzz() -> None:
    """A few thousand inputs of the fuzzer; `make fuzz` runs millions."""
    valid = fuzz_framing.fuzz(8_000, seed=20240229)
    assert 1_000 < valid < 7_000, "the fuzzer makes both kinds"


@pytest.mark.parametrize("first", [byte for byte in range(256) if byte not in (0xCE, 0xD2)])
def test_other_first_bytes_are_refused_at_once(first: int) -> None:
    """A peer that speaks something else is refused at its first byte, and with as many bytes as it likes."""
    for data in (bytes([first]), bytes([first]) + b"\0\0\0\x01", bytes([first]) * 5000):
        assert "byte 0 of the stream does not start a frame" in str(refusal(data))


def test_a_later_prefix_is_refused_with_its_position() -> None:
    """The sentence names the byte where the stream went wrong, behind small and large frames."""
    assert "byte 6 of the stream" in str(refusal(frame(b"\xc0") + b"G"))
    large = frame(msgpack.packb(bytes(5000)))
    assert f"byte {len(large) + 6} of the stream" in str(refusal(large + frame(b"\xc0") + b"GET /"))
    decoder = FrameDecoder()
    decoder.feed(large[:100])
    with pytest.raises(ProtocolError, match=f"byte {len(large)} of the stream"):
        decoder.feed(large[100:] + b"x")


def test_the_second_byte_of_a_prefix_may_be_anything() -> None:
    """A prefix cut after its first byte is waited for; negative int32 is not a length."""
    decoder = FrameDecoder()
    assert decoder.feed(b"\xce") == []
    assert decoder.feed(b"\0\0\0\x01") == []
    assert decoder.feed(b"\x05") == [5]
    assert "does not start a frame" in str(refusal(b"\xd2\xff\xff\xff\xff"))
    assert "does not start a frame" in str(refusal(b"\xce\0\0\0\0")), "an empty body"


@pytest.mark.parametrize("filler", [b"x" * 10, b"x" * 10_000])
@pytest.mark.parametrize("change", [-9, -2, -1, 1, 2, 9])
def test_prefix_and_body_must_agree(filler: bytes, change: int) -> None:
    """A body shorter or longer than its prefix says is refused, whatever follows it."""
    body = msgpack.packb([1, filler])
    for following in (b"", b"\xc0" * 20, frame(b"\xc0") * 4):
        data = frame_prefix(len(body) + change) + body + following
        if len(data) < constants.FRAME_PREFIX_BYTES + len(body) + change:
            decoder = FrameDecoder()
            assert decoder.feed(data) == []
            with pytest.raises(ProtocolError):
                decoder.feed(b"\xc0" * 20)
        else:
            text = str(refusal(data))
            assert f"the prefix says {len(body) + change} bytes" in text


def test_a_length_over_the_limit_is_refused_before_the_body() -> None:
    """The five bytes are enough; the limit itself is allowed."""
    error = refusal(frame_prefix(1001), frame_bytes_max=1000)
    assert error.code == Code.TOO_LARGE
    assert str(error) == "a frame of 1001 bytes is over the limit of 1000 bytes"
    assert refusal(frame_prefix(constants.FRAME_BYTES_MAX + 1)).code == Code.TOO_LARGE
    assert refusal(b"\xce\xff\xff\xff\xff").code == Code.TOO_LARGE
    assert refusal(b"\xd2\x7f\xff\xff\xff").code == Code.TOO_LARGE
    decoder = FrameDecoder(10_000)
    body = msgpack.packb(bytes(10_000 - 3))
    assert decoder.feed(frame(body)) == [bytes(10_000 - 3)]


def test_a_small_limit_holds_for_streamed_bodies() -> None:
    """A limit below the threshold of streaming is kept too."""
    assert refusal(frame_prefix(101) + bytes(101), frame_bytes_max=100).code == Code.TOO_LARGE
    assert FrameDecoder(100).feed(frame(msgpack.packb(bytes(98)))) == [bytes(98)]


def test_the_largest_frame() -> None:
    """A body of exactly the limit passes both ways; one more byte is refused with both numbers."""
    value = bytes(constants.FRAME_BYTES_MAX - 5)
    encoder = FrameEncoder()
    data = encoder.encode(value)
    assert FrameDecoder().feed(data) == [value]
    with pytest.raises(RequestError) as caught:
        encoder.encode(value + b"x")
    assert caught.value.code == Code.TOO_LARGE
    assert caught.value.details == {"bytes": constants.FRAME_BYTES_MAX + 1, "bytes_max": constants.FRAME_BYTES_MAX}
    assert encoder.encode(1) == b"\xce\0\0\0\x01\x01", "the encoder goes on after a refusal"


@pytest.mark.parametrize("body_bytes", [1, 100, PREFIX_CACHE_LENGTHS - 1, PREFIX_CACHE_LENGTHS, 100_000])
def test_prefix_and_body_apart(body_bytes: int) -> None:
    """A server that writes prefix and body one after the other sends the same bytes as `encode`."""
    encoder = FrameEncoder()
    value = bytes(body_bytes)
    body = encoder.pack(value)
    assert encoder.prefix(body) == frame_prefix(len(body))
    assert encoder.prefix(body) + body == encoder.encode(value)


def test_a_small_limit_of_the_encoder() -> None:
    """The encoder keeps a limit below the length of its prefix cache too."""
    with pytest.raises(RequestError, match="102 bytes, the limit of a frame is 100"):
        FrameEncoder(100).encode(bytes(100))


@pytest.mark.parametrize("padding", [0, 10_000])
@pytest.mark.parametrize("value", [
    b"\xd4\x05\x00", b"\xc7\x00\x05", b"\xc7\x03\x05abc", b"\xc8\x00\x01\x05a", b"\xc9\x00\x00\x00\x01\x05a",
    b"\xd6\xff\x00\x00\x00\x01", b"\xd7\xff" + bytes(8), b"\xc7\x0c\xff" + bytes(12), b"\xc7\x00\xff",
    b"\xd8\x01" + bytes(16), b"\xc1",
    b"\x81\x01\x01", b"\x81\xc0\x01", b"\x81\x90\x01", b"\x81\x91\x01\x01", b"\x81\x80\x01", b"\x81\xc3\x01",
    b"\x81\xcb" + struct.pack(">d", 1.5) + b"\x01",
], ids=lambda value: value[:6].hex())  # fmt: skip
def test_what_the_protocol_does_not_carry(value: bytes, padding: int) -> None:
    """Ext types, timestamps, the reserved byte and map keys that are not strings are refused, in small and large."""
    body = b"\x92" + value + msgpack.packb(bytes(padding))
    assert "malformed msgpack" in str(refusal(frame(body)))


def test_str_and_bin_arrive_as_bytes() -> None:
    """A client may send text or bytes, as keys of maps too."""
    assert FrameDecoder().feed(frame(msgpack.packb(["é", b"\xff", {"a": 1, b"b": 2}]))) == [
        ["é".encode(), b"\xff", {b"a": 1, b"b": 2}]
    ]
    assert FrameDecoder().feed(frame(b"\xa2\xff\xfe")) == [b"\xff\xfe"], "str need not be UTF-8"


def test_limits_of_containers() -> None:
    """Arrays, maps and the number of containers of one message pass at their limits and are refused one above."""
    decoder = FrameDecoder()
    assert len(decoder.feed(frame(msgpack.packb([None] * constants.ARRAY_ITEMS_MAX)))[0]) == constants.ARRAY_ITEMS_MAX
    assert "malformed" in str(refusal(frame(msgpack.packb([None] * (constants.ARRAY_ITEMS_MAX + 1)))))
    items = {b"%d" % i: 0 for i in range(constants.MAP_ITEMS_MAX)}
    assert len(decoder.feed(frame(msgpack.packb(items)))[0]) == len(items)
    assert "malformed" in str(refusal(frame(msgpack.packb({**items, b"one more": 0}))))
    padding = bytes(constants.READ_CHUNK_BYTES_MAX)
    # an array of 32 arrays, half of them with arrays and half with maps; the last leaves room for the 33 around
    chunk = constants.MESSAGE_CONTAINERS_MAX // 32
    full: list[Any] = [[[] for _ in range(chunk)] for _ in range(16)] + [[{} for _ in range(chunk)] for _ in range(16)]
    del full[-1][-34:]
    assert len(decoder.feed(frame(msgpack.packb([full, padding])))) == 1
    assert f"more than {constants.MESSAGE_CONTAINERS_MAX}" in str(refusal(frame(msgpack.packb([full, [], padding]))))
    assert len(decoder.feed(frame(msgpack.packb([full, padding])))) == 1, "every message counts for itself"


@pytest.mark.parametrize("header", [b"\x91", b"\x81\xa0", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"])
def test_deep_nesting_is_refused(header: bytes) -> None:
    """A value nested deeper than the decoder's stack is one error, not a crash."""
    for depth in (600, 1100, 100_000):
        try:
            FrameDecoder().feed(frame(header * depth + b"\xc0"))
        except ProtocolError as error:
            assert "malformed msgpack" in str(error)
        else:
            assert depth == 600


HOSTILE = {
    "arrays of 65535": b"\xdc\xff\xff",
    "arrays of 4 billion": b"\xdd\xff\xff\xff\xff",
    "arrays of 65536": b"\xdd\x00\x01\x00\x00",
    "arrays of 2000": b"\xdc\x07\xd0",
    "maps of 65535": b"\xde\xff\xff\xa0",
    "str of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bin of 16 MB": b"\xc6\x00\xff\xff\xff",
    "ext of 4 GB": b"\xc9\xff\xff\xff\xff\x05",
    "empty arrays": b"\xdc\x01\x00" + b"\x90" * 255,
    "maps of one": b"\xdc\x01\x00" + b"\x81\xa0\xc0" * 255,
}


@pytest.mark.parametrize("body_bytes", [constants.STREAMED_BODY_BYTES_MAX, 60 * constants.KIB, 2 * constants.MIB])
@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_promise_much_cost_little(name: str, body_bytes: int) -> None:
    """Memory stays within what the module promises, for frames that are cut short and for whole ones."""
    body = (HOSTILE[name] * (body_bytes // len(HOSTILE[name]) + 1))[:body_bytes]
    tracemalloc.start()
    try:
        decoders = [FrameDecoder() for _ in range(20)]
        base = tracemalloc.get_traced_memory()[0]
        for decoder in decoders:
            assert decoder.feed(frame(body)[:-1]) == []
        retained, _ = tracemalloc.get_traced_memory()
        # the bytes themselves, and the room by which a bytearray grows
        assert (retained - base) / len(decoders) < body_bytes * 1.2 + constants.READ_CHUNK_BYTES_MAX + 8 * constants.KIB
        with pytest.raises(ProtocolError):
            decoders[0].feed(body[-1:])
        assert tracemalloc.get_traced_memory()[1] - retained < 20 * body_bytes + 64 * constants.MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("item", [b"\xa2ab", b"\xcd\x01\x01", b"\xcb" + bytes(8), b"\xc0"], ids=lambda item: item.hex())
def test_memory_of_a_whole_message(item: bytes) -> None:
    """The worst valid messages stay under 20 bytes of memory for one of the wire and the fixed part."""
    body_bytes = 4 * constants.MIB
    inner = b"\xdc\xff\xff" + item * 65535
    count = body_bytes // len(inner)
    body = b"\xdc" + count.to_bytes(2, "big") + inner * count
    tracemalloc.start()
    try:
        messages = FrameDecoder().feed(frame(body))
        assert len(messages) == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(body) + 64 * constants.MIB + 2 * len(body), "and the input with its copy"


def test_an_idle_connection_keeps_little() -> None:
    """After its largest frame a decoder holds about one read's worth of buffer."""
    stream = FrameEncoder().encode(bytes(8 * constants.MIB))
    tracemalloc.start()
    try:
        decoder = FrameDecoder()
        for i in range(0, len(stream), 256 * constants.KIB):
            decoder.feed(stream[i : i + 256 * constants.KIB])
        assert decoder.buffered_bytes == 0
        assert tracemalloc.get_traced_memory()[0] < 2 * constants.READ_CHUNK_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_a_million_frames_keep_memory_flat() -> None:
    """Counters grow, memory does not; nothing is left behind between frames."""
    chunk = FrameEncoder().encode([1, b"get", b"k"]) * 5_000
    decoder = FrameDecoder()
    decoder.feed(chunk)
    tracemalloc.start()
    try:
        decoder.feed(chunk)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()  # tracing a million frames would take seconds; the ends are what is compared
        for _ in range(198):
            assert len(decoder.feed(chunk)) == 5_000
            assert decoder.buffered_bytes == 0
        tracemalloc.start()
        decoder.feed(chunk)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after < before + 64 * constants.KIB


def test_a_dead_decoder_takes_nothing() -> None:
    """Feeding after an error is the caller's bug."""
    decoder = FrameDecoder()
    with pytest.raises(ProtocolError):
        decoder.feed(b"GET / HTTP/1.1\r\n")
    with pytest.raises(AssertionError, match="should be closed"):
        decoder.feed(b"")


def test_an_unsendable_message_is_an_error_of_the_caller() -> None:
    """What msgpack cannot carry raises its TypeError, and the encoder goes on."""
    encoder = FrameEncoder()
    with pytest.raises(TypeError):
        encoder.encode([1, object()])
    assert FrameDecoder().feed(encoder.encode([1, 2])) == [[1, 2]]
