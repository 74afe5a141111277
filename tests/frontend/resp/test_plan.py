"""Plans: errors in the words of Redis, partial failures, keys and integers as they are checked."""

from __future__ import annotations

import pytest

from kvtcp.constants import INTEGER_MIN, KEY_BYTES_MAX
from kvtcp.errors import CLASS_OF, Code, OutcomeUnknown, RequestError, Unavailable
from kvtcp.frontend.resp.plan import CommandError, Failed, Plan, error_text, integer, read, write
from kvtcp.frontend.resp.replies import Failure
from kvtcp.protocol import operations as op


@pytest.mark.parametrize("code", [code for code in Code if code in CLASS_OF])
def test_error_words(code: Code) -> None:
    """The first word says what to do: TRYAGAIN only of what was not executed, UNKNOWN of what may have been."""
    word = error_text(Failed(int(code), "text")).split()[0]
    kind = CLASS_OF[code]
    assert word == ("TRYAGAIN" if kind is Unavailable else "UNKNOWN" if kind is OutcomeUnknown else "ERR")


def test_an_unknown_code_is_unknown() -> None:
    """A code of a newer node is not taken for a refusal."""
    assert error_text(Failed(9_999, "text")) == "UNKNOWN text"


@pytest.mark.parametrize("code", [Code.NOT_ENOUGH_REPLICAS, Code.UNKNOWN])
def test_partial_failure_of_writes(code: Code) -> None:
    """When some keys were written and others not, nobody may think that nothing was: UNKNOWN, and how many."""
    plan = Plan([write(op.PUT, b"a", b"1"), write(op.PUT, b"b", b"2")], lambda results: "done")
    reply = plan.reply([7, Failed(code, "no room")])
    assert type(reply) is Failure
    assert reply.text.startswith("UNKNOWN 1 of 2 keys were written, of the others the first says: ")
    nothing = plan.reply([Failed(code, "no room"), Failed(code, "no")])
    assert type(nothing) is Failure and nothing.text == error_text(Failed(code, "no room"))
    assert plan.reply([7, 8]) == "done"


def test_partial_failure_of_reads() -> None:
    """Reads change nothing: the error is told as it is."""
    plan = Plan([read(op.EXISTS, b"a"), read(op.EXISTS, b"b")], sum)
    reply = plan.reply([True, Failed(Code.RECOVERING, "wait")])
    assert type(reply) is Failure and reply.text == "TRYAGAIN wait"


def test_texts_of_a_plan() -> None:
    """A plan says errors in its own words, or not at all."""
    plan = Plan([write(op.CAS, b"a")], sum, {int(Code.MISMATCH): None, int(Code.RANGE): "ERR too far"})
    assert plan.reply([Failed(Code.MISMATCH, "x")]) is None
    reply = plan.reply([Failed(Code.RANGE, "x")])
    assert type(reply) is Failure and reply.text == "ERR too far"


def test_keys() -> None:
    """1 to KEY_BYTES_MAX bytes."""
    assert read(op.GET, b"x" * KEY_BYTES_MAX).key
    for key, text in ((b"", "must not be empty"), (b"x" * (KEY_BYTES_MAX + 1), "over the limit of 4096 bytes")):
        with pytest.raises(RequestError, match=text):
            read(op.GET, key)


def test_integers() -> None:
    """Texts of 64 bits in their only spelling, as in Redis; anything else is refused, with the command's own words."""
    assert integer(b"-9223372036854775808") == INTEGER_MIN
    for text in (b"", b"01", b"9223372036854775808"):
        with pytest.raises(CommandError, match="ERR value is not an integer or out of range"):
            integer(text)
    with pytest.raises(CommandError, match="ERR invalid cursor"):
        integer(b"x", "ERR invalid cursor")


def test_all_keys_of_an_operation() -> None:
    """Those that must be of one shard."""
    assert write(op.RENAME, b"a", b"b", False).keys == [b"a", b"b"]
    assert write(op.COPY, b"a", b"b", False).keys == [b"a", b"b"]
    assert write(op.PUT_ALL, b"a", [(b"a", b"1"), (b"c", b"2")], False).keys == [b"a", b"c"]
    assert read(op.GET, b"a").keys == [b"a"]
