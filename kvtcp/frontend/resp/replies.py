"""Replies of the Redis protocol, versions 2 and 3.

Pure. Results of commands are plain Python values; `encode` makes the bytes of them:

| value            | RESP2                     | RESP3          |
|------------------|---------------------------|----------------|
| Simple("OK")     | +OK                       | the same       |
| Failure("ERR x") | -ERR x                    | the same       |
| int              | :1                        | the same       |
| bool             | :1, :0                    | #t, #f         |
| bytes, str       | $2 ok                     | the same       |
| None             | $-1                       | _              |
| NoArray          | *-1                       | _              |
| float            | $3 0.5                    | ,0.5           |
| list, tuple      | *2 ...                    | the same       |
| dict             | *4 key value key value    | %2 key value   |
"""

from __future__ import annotations

from typing import Any, Final

OK: Final = b"+OK\r\n"
CACHED_LENGTHS: Final = 4_096
HEADS: Final = [b"$%d\r\n" % n for n in range(CACHED_LENGTHS)]


class Simple:
    """A status line."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Failure:
    """An error; its text begins with a word in capitals, by which clients tell errors apart."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class NoArray:
    """The nil that stands in the place of an array."""


DONE: Final = Simple("OK")


def nil(version: int) -> bytes:
    """Return the bytes of nil."""
    return b"_\r\n" if version == 3 else b"$-1\r\n"


def bulk(value: bytes) -> bytes:
    """Return the bytes of a string."""
    n = len(value)
    return HEADS[n] + value + b"\r\n" if n < CACHED_LENGTHS else b"$%d\r\n%b\r\n" % (n, value)


def error(text: str) -> bytes:
    """Return the bytes of an error. Line breaks would end it."""
    return b"-%b\r\n" % text.replace("\r", " ").replace("\n", " ").encode("utf-8", "replace")


def encode(value: Any, version: int) -> bytes:
    """Return the bytes of a reply."""
    if type(value) is bytes:
        return bulk(value)
    parts: list[bytes] = []
    _add(value, version, parts)
    return b"".join(parts)


def _add(value: Any, version: int, parts: list[bytes]) -> None:
    if value is None:
        parts.append(nil(version))
    elif type(value) is bytes:
        parts.append(bulk(value))
    elif type(value) is bool:
        parts.append((b"#t\r\n" if value else b"#f\r\n") if version == 3 else b":%d\r\n" % value)
    elif type(value) is int:
        parts.append(b":%d\r\n" % value)
    elif type(value) is str:
        parts.append(bulk(value.encode()))
    elif type(value) is Simple:
        parts.append(b"+%b\r\n" % value.text.encode())
    elif type(value) is Failure:
        parts.append(error(value.text))
    elif value is NoArray:
        parts.append(b"_\r\n" if version == 3 else b"*-1\r\n")
    elif type(value) is float:
        parts.append(b",%r\r\n" % value if version == 3 else bulk(b"%r" % value))
    elif isinstance(value, dict):
        parts.append(b"%%%d\r\n" % len(value) if version == 3 else b"*%d\r\n" % (2 * len(value)))
        for key, item in value.items():
            _add(key, version, parts)
            _add(item, version, parts)
    else:
        assert isinstance(value, list | tuple), f"a reply cannot hold {type(value).__name__}"
        parts.append(b"*%d\r\n" % len(value))
        for item in value:
            _add(item, version, parts)
