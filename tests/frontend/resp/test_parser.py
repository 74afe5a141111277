"""The parser of the Redis protocol: every split of the bytes, every limit, inline lines, and what it holds."""

from __future__ import annotations

import os
import random
import time
import tracemalloc

import pytest

from kvtcp.constants import KIB, RESP_ARGUMENTS_MAX, RESP_COMMAND_BYTES_MAX, RESP_LINE_BYTES_MAX, VALUE_BYTES_MAX
from kvtcp.frontend.resp.parser import Command, RespParser, split_line
from tests.fuzz.resp import Model, StepParser, array, fuzz, model_words, run, small_limits

INPUTS = 20_000


def feed(data: bytes) -> tuple[list[Command], str]:
    """The commands and the error of these bytes."""
    parser = RespParser()
    return parser.feed(data), parser.error


STREAMS = [
    array(b"GET", b"a") + array(b"SET", b"a", b"1") + array(b"PING"),
    array(b"SET", b"key", b"a\r\nb") + array(b"GET", b"key"),
    array(b"SET", b"\r\n", b"\r\n\r\n$1\r\n") + b"ping\r\n" + array(b"MSET", *[b"x"] * 9),
    b"get a\r\nset \"b c\" 'd'\n\r\n\n  \r\nping\r\n" + array(b"PING"), b"*0\r\n*-1\r\n" + array(b"PING") + b"*00\r\n",
    array(b"", b"", b"") + array(b"ECHO", b"\0\xff\r"), array(b"PING") + b"*1\r\n\r\n",
    array(b"PING") + b"*2\r\n$3\r\nGET\r\n:1\r\n", b"*1\r\n$4\r\nPINGxx" + array(b"PING"), b"*1\r\n$-1\r\n", b"*x\r\n",
    b"*1\r\n$1" + b"0" * 40 + b"\r\n", b"*" + b"1" * 40, b"ping\r\nset 'a\r\n" + array(b"PING"),
    b"\xce\x00\x00\x00\x05hello",
]  # fmt: skip


@pytest.mark.parametrize("data", STREAMS)
def test_every_split_gives_the_same(data: bytes) -> None:
    """Whole, in two pieces cut anywhere, byte by byte and without the quick path: same commands, same error, same bytes
    held; and they are those of the model."""
    whole = run(RespParser(), data, [])
    model = Model()
    model.feed(data)
    assert whole[:2] == (model.commands, model.error)
    for cut in range(len(data) + 1):
        assert run(RespParser(), data, [cut]) == whole, f"cut at {cut}"
    assert run(RespParser(), data, list(range(1, len(data)))) == whole
    assert run(StepParser(), data, []) == whole


def test_random_streams() -> None:
    """Random streams, most of them valid, agree with the model in every way of feeding them."""
    seed = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(2**32)
    valid = fuzz(INPUTS, seed)
    assert INPUTS // 4 < valid < INPUTS * 3 // 4, f"seed {seed}: both kinds are there"


def test_the_fuzzer_sees_a_difference() -> None:
    """A parser that loses a byte of a line is found within the inputs of this module."""
    before = RespParser._take_line

    def loses(self: RespParser, line: bytes, commands: list[Command]) -> None:
        before(self, line[1:], commands)

    try:
        RespParser._take_line = loses  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="seed 1, input"):
            fuzz(INPUTS, 1)
    finally:
        RespParser._take_line = before  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'set "a b" \'c d\'', [b"set", b"a b", b"c d"]),
        (b'"\\x41\\n\\r\\t\\b\\a\\"\\\\\\q\\x4"', [b'A\n\r\t\b\a"\\qx4']), (b"'\\n\\'\\q'", [b"\\n'\\q"]),
        (b"'a\\\\'", None), (b"a\"b c\"", [b"ab c"]), (b'"" \'\'', [b"", b""]),
        (b"  \t get\x0b\x0ca\0b ", [b"get", b"a", b"b"]), (b"", []), (b'"a"b', None), (b"'a'\"b\"", None),
        (b'"a', None), (b"'a\\'", None), (b'"\\', None),
    ],
)  # fmt: skip
def test_typed_lines(line: bytes, words: Command | None) -> None:
    """Quotes and escapes of typed lines, as in redis-cli."""
    assert split_line(line) == words == model_words(line)


def test_unbalanced_quotes_end_the_stream() -> None:
    """What came before is a command still, nothing behind is looked at."""
    assert feed(b"ping\r\nget 'a\r\nping\r\n") == ([[b"ping"]], "Protocol error: unbalanced quotes in request")


# --- limits -----------------------------------------------------------------------------------------------


def test_line_limit() -> None:
    """The longest line is a command; one byte more is refused, before its end is here."""
    word = b"x" * (RESP_LINE_BYTES_MAX - 4)
    assert feed(b"get " + word + b"\n") == ([[b"get", word]], "")
    assert feed(b"get " + word + b"x\n") == ([], "Protocol error: too big inline request")
    assert feed(b"get " + word) == ([], "")
    assert feed(b"get " + word + b"x") == ([], "Protocol error: too big inline request")


def test_argument_limit() -> None:
    """So many arguments are a command; one more is refused at the header."""
    arguments = [b"a"] * RESP_ARGUMENTS_MAX
    assert feed(array(*arguments)) == ([arguments], "")
    assert feed(b"*%d\r\n" % (RESP_ARGUMENTS_MAX + 1)) == ([], "Protocol error: invalid multibulk length")


def test_value_limit() -> None:
    """The largest value is taken; one byte more is refused at its header."""
    value = b"v" * VALUE_BYTES_MAX
    assert feed(array(b"SET", b"a", value)) == ([[b"SET", b"a", value]], "")
    assert feed(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$%d\r\n" % (VALUE_BYTES_MAX + 1)) == (
        [], "Protocol error: invalid bulk length"
    )


def test_command_limit() -> None:
    """The arguments together are limited, at the header of the one that is too much."""
    value = b"v" * VALUE_BYTES_MAX
    rest = RESP_COMMAND_BYTES_MAX - VALUE_BYTES_MAX - 4
    head = b"*4\r\n$4\r\nMSET\r\n$%d\r\n%b\r\n" % (len(value), value)
    commands, error = feed(head + b"$%d\r\n%b\r\n$0\r\n\r\n" % (rest, value[:rest]))
    assert [len(argument) for argument in commands[0]] == [4, VALUE_BYTES_MAX, rest, 0] and not error
    assert feed(head + b"$%d\r\n" % (rest + 1)) == (
        [], f"Protocol error: a command is over the limit of {RESP_COMMAND_BYTES_MAX} bytes"
    )


@pytest.mark.parametrize("header", [b"*", b"*1\r\n$"])
def test_header_limit(header: bytes) -> None:
    """A header without end is refused after 32 bytes."""
    assert feed(header + b"1" * 31)[1] == ""
    assert "count string" in feed(header + b"1" * 32)[1]


def test_nothing_after_an_error() -> None:
    """An error is the end: nothing is held and nothing more is taken."""
    parser = RespParser()
    assert parser.feed(array(b"PING") + b"*2\r\n$3\r\nGET\r\n+\r\n") == [[b"PING"]]
    assert parser.error == "Protocol error: expected '$', got '+'"
    assert parser.buffered_bytes == 0
    assert parser.feed(array(b"PING")) == [] and parser.error.endswith("got '+'")


# --- time and memory --------------------------------------------------------------------------------------


def seconds(parser: RespParser, data: bytes, piece_bytes: int) -> float:
    """How long the parser takes for this, in pieces."""
    began = time.process_time()
    commands: list[Command] = []
    for low in range(0, len(data), piece_bytes):
        commands += parser.feed(data[low : low + piece_bytes])
    assert commands and not parser.error
    return time.process_time() - began


def test_a_large_value_in_pieces_takes_linear_time() -> None:
    """Eight MiB in pieces of 1 KiB: were each piece to copy what was there before, it would take a hundred times as
    long as this allows."""
    large = array(b"SET", b"a", b"\r\n" * (VALUE_BYTES_MAX // 2))
    assert seconds(RespParser(), large, KIB) < 1.0


def test_many_arguments_in_pieces_take_linear_time() -> None:
    """The most arguments in small pieces: an unfinished command goes on where it was."""
    assert seconds(RespParser(), array(*[b"12345678"] * RESP_ARGUMENTS_MAX), 64) < 2.0


def test_a_longest_line_byte_by_byte() -> None:
    """A line is looked at anew with every byte, but it is short enough for that."""
    assert seconds(RespParser(), b"get " + b"x" * (RESP_LINE_BYTES_MAX - 4) + b"\n", 16) < 2.0


def test_what_is_held_is_counted() -> None:
    """`buffered_bytes` is not far from the memory that an unfinished command takes, whatever it consists of; it is 0
    only between commands."""
    for argument, count in ((b"", 60_000), (b"ab", 60_000), (b"x" * 100, 20_000), (b"v" * 1_000_000, 5)):
        data = array(*[argument] * count)[: -len(argument) - 3]
        parser = RespParser()
        tracemalloc.start()
        for low in range(0, len(data), 4096):
            parser.feed(data[low : low + 4096])
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert not parser.error
        assert held < 1.3 * parser.buffered_bytes + 20_000, f"{count} x {len(argument)}: {held} bytes"
    parser = RespParser()
    for piece, is_whole in ((b"*2\r\n", False), (b"$3\r\n", False), (b"GET\r\n$1\r\n", False), (b"a\r\n", True)):
        parser.feed(piece)
        assert (parser.buffered_bytes == 0) == is_whole, piece


def test_a_header_reserves_nothing() -> None:
    """What a header claims is not made room for before it is here."""
    parser = RespParser()
    tracemalloc.start()
    parser.feed(b"*65536\r\n$%d\r\n" % VALUE_BYTES_MAX)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10_000


def test_small_limits_are_taken_back() -> None:
    """The fuzzer's limits are gone when it is done."""
    with small_limits():
        assert feed(b"*11\r\n")[1]
    assert not feed(b"*11\r\n")[1]
