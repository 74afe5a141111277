"""Codecs: how values of Python become the bytes the store keeps, and back.

Pure. A codec is chosen once, when a client is made, and is explicit: nothing is guessed from a value, nothing is
marked in the stored bytes, and no stored value can run code (there is no pickle here).

    raw      bytes; text on the way in is stored as UTF-8 (the default)
    text     str, stored as UTF-8
    json     values of JSON, stored as compact UTF-8; NaN and infinities are refused, they are not JSON
    msgpack  values of msgpack; ext types are refused

Every codec encodes text or refuses it. Counters (`incr`) are decimal text: `raw`, `text` and `json` read them,
`msgpack` does not. Keys never pass through a codec.

`encode` raises TypeError or ValueError for a value it cannot hold and `decode` ValueError for bytes that are not of
its form; the client turns them into RequestError and DataError with the key in the sentence.
"""

from __future__ import annotations

import json as _json
from typing import Any, Final, Protocol, TypeVar

import msgpack as _msgpack

V = TypeVar("V")


class Codec(Protocol[V]):
    """The interface of a codec; any object with these three members will do."""

    @property
    def name(self) -> str:
        """Name for sentences, for example `JSON`."""

    def encode(self, value: V | str, /) -> bytes:
        """Bytes for a value. Raises TypeError or ValueError."""

    def decode(self, data: bytes, /) -> V:
        """Value for bytes. Raises ValueError."""


class RawCodec:
    """Bytes as they are; text is encoded."""

    name: Final = "bytes"

    def encode(self, value: bytes | str, /) -> bytes:
        if type(value) is bytes:
            return value
        if isinstance(value, str):
            return value.encode("utf-8")
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        raise TypeError(f"it must be bytes or text, not {type(value).__name__}")

    def decode(self, data: bytes, /) -> bytes:
        return data


class TextCodec:
    """Text, UTF-8 in the store."""

    name: Final = "UTF-8 text"

    def encode(self, value: str, /) -> bytes:
        if not isinstance(value, str):
            raise TypeError(f"it must be text, not {type(value).__name__}")
        return value.encode("utf-8")

    def decode(self, data: bytes, /) -> str:
        return data.decode("utf-8")


class JsonCodec:
    """JSON: None, bool, numbers, text, lists and dicts with text as keys (other keys become text, as in `json`)."""

    name: Final = "JSON"

    def __init__(self) -> None:
        self._dumps = _json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

    def encode(self, value: Any, /) -> bytes:
        try:
            return self._dumps(value).encode("utf-8")
        except RecursionError as error:
            raise ValueError("it is nested too deeply or contains itself") from error

    def decode(self, data: bytes, /) -> Any:
        try:
            return _json.loads(data.decode("utf-8"))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"ext type {code} is not supported")


class MsgpackCodec:
    """msgpack: None, bool, numbers, text, bytes, lists and dicts."""

    name: Final = "msgpack"

    def encode(self, value: Any, /) -> bytes:
        try:
            data: bytes = _msgpack.packb(value, use_bin_type=True, strict_types=False)
        except OverflowError as error:
            raise ValueError(f"an integer is over 64 bits: {error}") from error
        return data

    def decode(self, data: bytes, /) -> Any:
        try:
            return _msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_refuse_ext)
        except (TypeError, RecursionError) as error:  # a list as a key of a map, for example
            raise ValueError(str(error)) from error


raw: Final = RawCodec()
text: Final = TextCodec()
json: Final = JsonCodec()
msgpack: Final = MsgpackCodec()
