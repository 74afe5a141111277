"""The keyspace: which keys and ranges a restore closes."""

from __future__ import annotations

import pytest

from kvtcp.errors import Code, RequestError
from kvtcp.frontend.keyspace import Keyspace


def test_is_open() -> None:
    """Not while anything is restored, be it everything."""
    keyspace = Keyspace(3)
    assert keyspace.is_open and keyspace.all_shards == [0, 1, 2]
    for prefix in (b"", b"a"):
        keyspace.restoring = prefix
        assert not keyspace.is_open


@pytest.mark.parametrize(
    ("restoring", "lower", "upper", "is_closed"),
    [
        (None, b"", None, False), (b"", b"a", b"b", True), (b"m", b"", None, True), (b"m", b"a", b"m", False),
        (b"m", b"a", b"m\0", True), (b"m", b"mz", b"mzz", True), (b"m", b"n", None, False),
        (b"\xff", b"\xff\xff", None, True), (b"\xff", b"a", b"\xff", False),
    ],
)  # fmt: skip
def test_ranges_that_are_closed(restoring: bytes | None, lower: bytes, upper: bytes | None, is_closed: bool) -> None:
    """A range is closed if a key that is restored could be in it."""
    keyspace = Keyspace(8)
    keyspace.restoring = restoring
    if is_closed:
        with pytest.raises(RequestError, match="closed until a restore completes") as closed:
            keyspace.check_range_open(lower, upper)
        assert closed.value.code == Code.RESTORING
    else:
        keyspace.check_range_open(lower, upper)


def test_keys_that_are_closed() -> None:
    """A key is closed if it begins with what is restored."""
    keyspace = Keyspace(8)
    for restoring, key, is_closed in (
        (None, b"a", False), (b"", b"a", True), (b"m", b"m", True), (b"m", b"mx", True), (b"m", b"l", False),
        (b"mm", b"m", False),
    ):  # fmt: skip
        keyspace.restoring = restoring
        if is_closed:
            with pytest.raises(RequestError) as closed:
                keyspace.check_open(key)
            assert closed.value.code == Code.RESTORING
        else:
            keyspace.check_open(key)
