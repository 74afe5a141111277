"""Frames: cutting a byte stream into messages, and messages into frames.

Pure. Every connection of kvtcp (client to coordinator, coordinator to node) uses one decoder and one encoder of this
module per direction; nothing above it sees bytes of the wire.

    frame  = 0xCE, N as 4 bytes big-endian, N bytes of body
    body   = exactly one msgpack value: nil, bool, integer, float, str, bin, array or map (keys str or bin)

The prefix is itself a msgpack uint32, so the stream is valid msgpack and one streaming C decoder reads prefix and body
of small frames without slicing in Python (about 0.25 us a request in all, against 0.45 us for slice and `unpackb`).

Invariants:
- A length over the limit is refused when the prefix is read, before any of the body is buffered.
- A body is decoded when all of it is here, so an unfinished frame costs only the bytes that came.
- The body is exactly N bytes, measured with `tell()`.
- Any input, cut anywhere, gives messages or one ProtocolError; after the error the decoder is dead.
- str and bin both arrive as bytes. Ext types and timestamps are refused.

Memory. An array header of 3 bytes makes the C decoder reserve 80 KB (0.5 MB before msgpack 1.2), and a thousand of them
may be nested. Hence two ways. Bodies up to STREAMED_BODY_BYTES_MAX come from the stream, whose limit on arrays is that
same number: at most 11 MB for a moment. Larger ones are gathered here, walked once without building anything (`skip`,
0.04 us an item: it proves that every header is followed by its items), then decoded. There remains the ratio of objects
to bytes: containers are counted in bodies over READ_CHUNK_BYTES_MAX, and the worst of the rest, strings of two bytes,
takes 20 bytes for one. So decoding N bytes needs at most 20 N + 64 MiB, until the message is dropped, and an idle
connection keeps about READ_CHUNK_BYTES_MAX.

Simplifications: 0xD2 (int32) with a positive length is read as a prefix too, since the decoder does not show which
integer type it met; it denotes the same length, so nothing can be confused by it. Messages complete before a fault in
the same `feed` are dropped with the connection: none was acted on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import msgpack

from kvtcp.constants import (
    ARRAY_ITEMS_MAX,
    FRAME_BYTES_MAX,
    FRAME_PREFIX_BYTES,
    MAP_ITEMS_MAX,
    MESSAGE_CONTAINERS_MAX,
    READ_CHUNK_BYTES_MAX,
    STREAMED_BODY_BYTES_MAX,
)
from kvtcp.errors import Code, ProtocolError, RequestError

PREFIX_BYTE: Final = 0xCE
PREFIX_BYTES: Final = (0xCE, 0xD2)
PREFIX_CACHE_LENGTHS: Final = 4096


def frame_prefix(body_bytes: int) -> bytes:
    """The five bytes before a body of `body_bytes` bytes."""
    return b"\xce" + body_bytes.to_bytes(4, "big")


# Making a prefix costs 0.15 us, taking it from here 0.03 us; nearly all frames of the data path are this short.
PREFIXES: Final = [frame_prefix(n) for n in range(PREFIX_CACHE_LENGTHS)]


def _refuse_ext(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"ext type {code} is not part of the protocol")


def _container_counter() -> Callable[[Any], Any]:
    """A hook that lets MESSAGE_CONTAINERS_MAX containers pass."""
    left = MESSAGE_CONTAINERS_MAX

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MESSAGE_CONTAINERS_MAX} arrays and maps in one message")
        return container

    return count


def _decode_body(body: bytearray) -> Any:
    """The value of a body over STREAMED_BODY_BYTES_MAX. Raises ValueError or an exception of msgpack."""
    walker = msgpack.Unpacker(max_buffer_size=len(body), read_size=len(body))
    walker.feed(body)
    walker.skip()
    if walker.tell() != len(body):
        raise ValueError(f"the prefix says {len(body)} bytes, the body has {walker.tell()}")
    del walker  # it holds a copy of the body
    counter = _container_counter() if len(body) > READ_CHUNK_BYTES_MAX else None
    return msgpack.unpackb(
        body, raw=True, strict_map_key=True, use_list=True, ext_hook=_refuse_ext, list_hook=counter,
        object_hook=counter, max_array_len=ARRAY_ITEMS_MAX, max_map_len=MAP_ITEMS_MAX, max_ext_len=0,
    )  # fmt: skip


class FrameDecoder:
    """Bytes in, messages out. One per connection; `feed` after an error is a programmer's error."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._streamed_bytes_max = min(STREAMED_BODY_BYTES_MAX, frame_bytes_max)
        self._unpacker = msgpack.Unpacker(
            raw=True, strict_map_key=True, use_list=True, ext_hook=_refuse_ext,
            # one unfinished frame and the bytes that one read may bring behind it
            max_buffer_size=FRAME_PREFIX_BYTES + STREAMED_BODY_BYTES_MAX + READ_CHUNK_BYTES_MAX,
            max_str_len=STREAMED_BODY_BYTES_MAX, max_bin_len=STREAMED_BODY_BYTES_MAX,
            max_array_len=STREAMED_BODY_BYTES_MAX, max_map_len=STREAMED_BODY_BYTES_MAX, max_ext_len=0,
        )  # fmt: skip
        self._unpack: Callable[[], Any] = self._unpacker.unpack
        self._tell: Callable[[], int] = self._unpacker.tell  # bytes that left the unpacker; <= _taken_bytes
        self._fed_bytes = 0  # bytes fed to the unpacker since the start of the stream; >= _start
        self._start = 0  # offset, in those bytes, of the value now awaited: a prefix if _body_bytes < 0, else a body
        self._body_bytes = -1  # length the prefix promised, -1 while the prefix itself is awaited
        self._gathered: bytearray | None = None  # the large body now arriving; the unpacker is empty meanwhile
        self._dead = False  # an error was raised; nothing more may be fed
        self._gathered_bytes = 0  # bytes that did not pass through the unpacker; for the positions in texts

    @property
    def buffered_bytes(self) -> int:
        """Bytes fed that have not become a message yet, the prefix of the frame now arriving among them."""
        bytes_ = self._fed_bytes - self._start + (FRAME_PREFIX_BYTES if self._body_bytes >= 0 else 0)
        return bytes_ + len(self._gathered) if self._gathered is not None else bytes_

    def feed(self, data: bytes | memoryview) -> list[Any]:
        """The messages that `data` completes. Raises ProtocolError with the reason; the connection must be closed."""
        assert not self._dead, "the decoder raised before: the connection should be closed"
        messages: list[Any] = []
        if len(data) > READ_CHUNK_BYTES_MAX:
            view = memoryview(data)
            for i in range(0, len(view), READ_CHUNK_BYTES_MAX):
                messages += self.feed(view[i : i + READ_CHUNK_BYTES_MAX])
            return messages
        unpack = self._unpack
        tell = self._tell
        streamed_bytes_max = self._streamed_bytes_max
        start = self._start
        body_bytes = self._body_bytes
        try:
            if self._gathered is not None:
                data = self._gather(self._gathered, data, messages)
                body_bytes = self._body_bytes
                if not data:
                    return messages
            self._unpacker.feed(data)
            fed = self._fed_bytes = self._fed_bytes + len(data)
            while True:  # 0.25 us a small frame: state in locals, and no exception where the bytes end
                if body_bytes < 0:
                    if fed - start < FRAME_PREFIX_BYTES:
                        # the first byte of a cut prefix is looked at in the piece that brought it
                        if 0 < fed - start <= len(data) and data[start - fed] not in PREFIX_BYTES:
                            self._fail_prefix(start)
                        break
                    body_bytes = unpack()
                    if type(body_bytes) is not int or tell() - start != FRAME_PREFIX_BYTES or body_bytes < 1:
                        self._fail_prefix(start)
                    start += FRAME_PREFIX_BYTES
                    if body_bytes > streamed_bytes_max:
                        message, here = self._take_large(body_bytes, fed - start)
                        start += here
                        if here < body_bytes:
                            break
                        messages.append(message)
                        body_bytes = -1
                        continue
                if fed - start < body_bytes:
                    break
                message = unpack()
                if tell() != start + body_bytes:
                    self._fail(f"the prefix says {body_bytes} bytes, the body has {tell() - start}")
                messages.append(message)
                start += body_bytes
                body_bytes = -1
        except ProtocolError:
            raise
        except msgpack.OutOfData:
            if body_bytes < 0:
                self._fail_prefix(start)
            self._fail(f"the prefix says {body_bytes} bytes, the body does not end there")
        except Exception as error:
            # the decoder raises ValueError, its own FormatError, StackError, BufferFull, TypeError and others for
            # malformed input: all of them mean the same to the peer
            if body_bytes < 0:
                self._fail_prefix(start)
            text = str(error) or type(error).__name__
            self._fail(f"malformed msgpack in a body of {body_bytes} bytes: {text}", cause=error)
        self._start = start
        self._body_bytes = body_bytes
        return messages

    def _take_large(self, body_bytes: int, here_bytes: int) -> tuple[Any, int]:
        """Return message and length of a large body if it is here (`here_bytes` are), else begin to gather it."""
        if body_bytes > self._frame_bytes_max:
            text = f"a frame of {body_bytes} bytes is over the limit of {self._frame_bytes_max} bytes"
            self._fail(text, Code.TOO_LARGE)
        taken = bytearray(self._unpacker.read_bytes(min(body_bytes, here_bytes)))
        if len(taken) == body_bytes:
            return _decode_body(taken), body_bytes
        self._gathered = taken
        return None, len(taken)

    def _gather(self, body: bytearray, data: bytes | memoryview, messages: list[Any]) -> bytes | memoryview:
        """Add to the body now arriving, and its message to `messages` when it is whole. Returns the bytes behind it."""
        missing_bytes = self._body_bytes - len(body)
        body += data[:missing_bytes]
        self._gathered_bytes += min(missing_bytes, len(data))
        if len(body) == self._body_bytes:
            self._gathered = None
            messages.append(_decode_body(body))
            self._body_bytes = -1
        return data[missing_bytes:]

    def _fail_prefix(self, start: int) -> NoReturn:
        place = start + self._gathered_bytes
        self._fail(f"byte {place} of the stream does not start a frame (0xCE and four bytes of length)")

    def _fail(self, reason: str, code: Code = Code.BAD_REQUEST, cause: Exception | None = None) -> NoReturn:
        self._dead = True
        raise ProtocolError(reason, code) from cause


class FrameEncoder:
    """Messages in, frames out. One per connection or server; it keeps its buffer between calls."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._cached_end = min(PREFIX_CACHE_LENGTHS, frame_bytes_max + 1)  # bodies below it are allowed and cached
        self.pack: Callable[[Any], bytes] = msgpack.Packer(autoreset=True).pack  # a body

    def encode(self, message: Any) -> bytes:
        """One frame. Raises RequestError (TOO_LARGE) for a message whose body is over the limit."""
        body = self.pack(message)
        n = len(body)
        return PREFIXES[n] + body if n < self._cached_end else self.prefix(body) + body

    def prefix(self, body: bytes) -> bytes:
        """The prefix of a body that `pack` made. Raises RequestError (TOO_LARGE) if it is over the limit."""
        n = len(body)
        if n > self._frame_bytes_max:
            text = f"the message has {n} bytes, the limit of a frame is {self._frame_bytes_max}"
            raise RequestError(text, Code.TOO_LARGE, {"bytes": n, "bytes_max": self._frame_bytes_max})
        return frame_prefix(n)
