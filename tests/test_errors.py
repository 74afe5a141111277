"""Errors: codes, classes and the text of keys."""

import pytest

from kvtcp.errors import Code, KeyExists, KvtcpError, Mismatch, OutcomeUnknown, Unavailable, error_from_wire, show_bytes


def test_every_code_keeps_its_number() -> None:
    """The numbers are on the wire: a change here is a change of the protocol."""
    assert {code.name: int(code) for code in Code} == {
        "OK": 0, "PROGRESS": 1,
        "BAD_REQUEST": 10, "TOO_LARGE": 11, "NOT_A_NUMBER": 12, "RANGE": 13, "UNKNOWN_OP": 14, "VERSION": 15,
        "REFUSED": 16,
        "EXISTS": 20, "MISMATCH": 21,
        "OVERLOADED": 30, "NOT_ENOUGH_REPLICAS": 31, "NO_SPACE": 32, "RECOVERING": 33, "SHARD_DOWN": 34,
        "RESTORING": 35, "UNREACHABLE": 36, "UNKNOWN": 40, "BAD_DATA": 50,
    }  # fmt: skip


def test_error_from_wire_gives_the_class_the_caller_acts_on() -> None:
    """A code becomes its class, with the server's sentence and details."""
    error = error_from_wire(21, b"revision is 7", {b"rev": 7})
    assert isinstance(error, Mismatch)
    assert (error.rev, str(error)) == (7, "revision is 7")
    assert isinstance(error_from_wire(20, "there", {}), KeyExists)
    assert isinstance(error_from_wire(30, "busy", None), Unavailable)


def test_unknown_code_promises_nothing() -> None:
    """A code of a newer server must not be taken for 'not executed'."""
    error = error_from_wire(99, "new", {})
    assert isinstance(error, OutcomeUnknown)
    assert isinstance(error, KvtcpError)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"user:1", '"user:1"'),
        (b"\x00a", '"\\x00a"'),
        ("Zoë".encode(), '"Zoë"'),
        (b"x" * 50, '"' + "x" * 40 + '"... (50 bytes)'),
    ],
)
def test_show_bytes(data: bytes, text: str) -> None:
    """Keys in sentences are readable, escaped and short."""
    assert show_bytes(data) == text
