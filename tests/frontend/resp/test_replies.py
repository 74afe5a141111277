"""Replies of both versions of the protocol, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.frontend.resp.replies import CACHED_LENGTHS, DONE, OK, Failure, NoArray, Simple, bulk, encode, error, nil


@pytest.mark.parametrize(
    ("value", "two", "three"),
    [
        (Simple("PONG"), b"+PONG\r\n", None), (DONE, OK, None), (Failure("ERR no"), b"-ERR no\r\n", None),
        (5, b":5\r\n", None), (-(2**63), b":-9223372036854775808\r\n", None), (True, b":1\r\n", b"#t\r\n"),
        (False, b":0\r\n", b"#f\r\n"), (b"a\r\nb", b"$4\r\na\r\nb\r\n", None), (b"", b"$0\r\n\r\n", None),
        ("\u00e9", b"$2\r\n\xc3\xa9\r\n", None), (None, b"$-1\r\n", b"_\r\n"), (NoArray, b"*-1\r\n", b"_\r\n"),
        (0.5, b"$3\r\n0.5\r\n", b",0.5\r\n"), ([], b"*0\r\n", None),
        ([1, [b"a", None]], b"*2\r\n:1\r\n*2\r\n$1\r\na\r\n$-1\r\n", b"*2\r\n:1\r\n*2\r\n$1\r\na\r\n_\r\n"),
        ((1,), b"*1\r\n:1\r\n", None),
        ({"a": 1, "b": {}}, b"*4\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n*0\r\n", b"%2\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n%0\r\n"),
    ],
)  # fmt: skip
def test_encode(value: Any, two: bytes, three: bytes | None) -> None:
    """Each kind of value in RESP2 and RESP3."""
    assert encode(value, 2) == two
    assert encode(value, 3) == (two if three is None else three)


def test_errors_are_one_line() -> None:
    """Line breaks in the text of an error do not end it."""
    assert error("ERR a\r\nb\nc") == b"-ERR a  b c\r\n"


@pytest.mark.parametrize("length", [0, 1, CACHED_LENGTHS - 1, CACHED_LENGTHS, CACHED_LENGTHS + 1, 1 << 20])
def test_bulk(length: int) -> None:
    """Lengths that are kept ready, and others."""
    assert bulk(b"x" * length) == b"$%d\r\n%b\r\n" % (length, b"x" * length)


def test_nil() -> None:
    """Nothing, in both versions."""
    assert nil(2) == b"$-1\r\n" and nil(3) == b"_\r\n"


def test_other_values_are_a_mistake() -> None:
    """What is no reply is no reply."""
    with pytest.raises(AssertionError, match="cannot hold set"):
        encode({1}, 2)
