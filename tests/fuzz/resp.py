"""Fuzzer of the parser of the Redis protocol: `python -m tests.fuzz.resp [inputs] [seed]`, a million by default.

Random streams, valid ones and damaged ones, are given to `RespParser` whole, in pieces, and with its quick path
switched off, and to a model: the rules of the protocol written down once more, one byte at a time, without a thought
of speed. All must come to the same commands, the same error, and the same number of bytes held at the end. The limits
are small here, so that inputs pass them often.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvtcp.frontend.resp import parser as parser_module
from kvtcp.frontend.resp.parser import Command, RespParser
from tests.fuzz.framing import main, run_checks

LINE_BYTES_MAX = 100
ARGUMENTS_MAX = 10
COMMAND_BYTES_MAX = 600
VALUE_BYTES_MAX = 200
HEADER_BYTES_MAX = 32
SMALL: dict[str, Any] = {
    "RESP_LINE_BYTES_MAX": LINE_BYTES_MAX,
    "RESP_ARGUMENTS_MAX": ARGUMENTS_MAX,
    "RESP_COMMAND_BYTES_MAX": COMMAND_BYTES_MAX,
    "VALUE_BYTES_MAX": VALUE_BYTES_MAX,
    # what the quick path takes is always within the limits
    "_COUNTS": {b"*%d" % n: n for n in range(1, 9)},
    "_LENGTHS": {b"$%d" % n: n for n in range(65)},
}
WORDS = (b"GET", b"set", b"a", b"", b"user:1", b"\r\n", b"a\r\nb", b"$3\r\nGET\r\n", b"*1\r\n", b"\0\xff", b"x" * 63)
DAMAGE = (
    b"\r", b"\n", b"\r\n", b"*", b"$", b"*1\r\n", b"*0\r\n", b"*-1\r\n", b"$-1\r\n", b"*11\r\n", b"$201\r\n",
    b":1\r\n", b"+OK\r\n", b"*1\r\n*1\r\n", b"*9999999999999999999\r\n", b"$99999999999999999999\r\n",
    b"*1" + b" " * 40, b"*01\r\n", b"$+3\r\n", b"*\r\n", b"\"", b"'", b"\\", b"\\x4", b" ", b"\t", b"\0",
    b"ping\r\n", b"ping \"a\\x41\"\n", b"x" * 120, b"y" * 99 + b"\r\n", b"\xce\0\0\0\1",
)  # fmt: skip


# --- the model --------------------------------------------------------------------------------------------


class Refused(Exception):
    """The stream is over; the argument says why."""


class Model:
    """The rules, a byte at a time. `feed` returns the commands that are complete; `error` is sticky."""

    def __init__(self) -> None:
        self.error = ""
        self.commands: list[Command] = []
        self._steps = self._parse()
        next(self._steps)

    def feed(self, data: bytes) -> None:
        """Take these bytes."""
        for byte in data:
            if self.error:
                return
            try:
                self._steps.send(byte)
            except Refused as refused:
                self.error = f"Protocol error: {refused}"

    def _parse(self) -> Iterator[Any]:
        while True:
            byte = yield
            if byte == ord("*"):
                count = yield from self._header(byte, "too big mbulk count string")
                if count is None or count > ARGUMENTS_MAX:
                    raise Refused("invalid multibulk length")
                if count > 0:
                    yield from self._array(count)
            else:
                yield from self._line(byte)

    def _header(self, first: int, too_long: str) -> Any:
        text = bytes([first])
        while not text.endswith(b"\r\n"):
            if len(text) > HEADER_BYTES_MAX:
                raise Refused(too_long)
            byte = yield
            text += bytes([byte])
        if len(text) > HEADER_BYTES_MAX:
            raise Refused(too_long)
        digits = text[1:-2]
        if digits.startswith(b"-"):
            digits = digits[1:]
        if not digits or len(digits) > 19 or any(byte not in b"0123456789" for byte in digits):
            return None
        return int(text[1:-2])

    def _array(self, count: int) -> Any:
        arguments: Command = []
        for _ in range(count):
            byte = yield
            if byte != ord("$"):
                shown = chr(byte).encode("unicode_escape").decode()
                raise Refused(f"expected '$', got '{shown}'")
            length = yield from self._header(byte, "too big bulk count string")
            if length is None or length < 0 or length > VALUE_BYTES_MAX:
                raise Refused("invalid bulk length")
            if sum(map(len, arguments)) + length > COMMAND_BYTES_MAX:
                raise Refused(f"a command is over the limit of {COMMAND_BYTES_MAX} bytes")
            value = b""
            for _ in range(length):
                byte = yield
                value += bytes([byte])
            first = yield
            second = yield
            if bytes([first, second]) != b"\r\n":
                raise Refused("expected a line break after a bulk")
            arguments.append(value)
        self.commands.append(arguments)

    def _line(self, first: int) -> Any:
        line = b""
        byte = first
        while byte != ord("\n"):
            line += bytes([byte])
            if len(line) > LINE_BYTES_MAX:
                raise Refused("too big inline request")
            byte = yield
        words = model_words(line.removesuffix(b"\r"))
        if words is None:
            raise Refused("unbalanced quotes in request")
        if words:
            self.commands.append(words)


def model_words(line: bytes) -> Command | None:
    """The words of a line, by a machine of states."""
    words: Command = []
    word: bytearray | None = None  # None: between words
    quote = 0
    closed = False  # a quote was closed just now: only a space may follow
    place = 0
    while place < len(line):
        byte = line[place]
        place += 1
        if quote:
            following = line[place : place + 1]
            assert word is not None
            if byte == quote:
                quote, closed = 0, True
            elif byte == ord("\\") and quote == ord('"') and is_hex(line[place : place + 3]):
                word.append(int(line[place + 1 : place + 3], 16))
                place += 3
            elif byte == ord("\\") and quote == ord('"') and following:
                word += {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}.get(following, following)
                place += 1
            elif byte == ord("\\") and following == b"'":
                word += b"'"
                place += 1
            else:
                word.append(byte)
        elif byte in b" \t\n\r\0\v\f":
            if word is not None:
                words.append(bytes(word))
            word, closed = None, False
        elif closed:
            return None
        else:
            word = bytearray() if word is None else word
            if byte in b"\"'":
                quote = byte
            else:
                word.append(byte)
    if quote:
        return None
    if word is not None:
        words.append(bytes(word))
    return words


def is_hex(text: bytes) -> bool:
    """x and two hexadecimal digits."""
    return len(text) == 3 and text[:1] == b"x" and all(byte in b"0123456789abcdefABCDEF" for byte in text[1:])


# --- inputs -----------------------------------------------------------------------------------------------


def array(*arguments: bytes) -> bytes:
    """A command as clients send it."""
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a) for a in arguments)


def random_word(rng: random.Random) -> bytes:
    """An argument."""
    if rng.randrange(3):
        return rng.choice(WORDS)
    return rng.randbytes(rng.choice((1, 3, 10, 64, 65, 90, 200)))


def random_line(rng: random.Random) -> bytes:
    """A typed line, seldom a wrong one."""
    pieces = (b"get", b"a", b" ", b"  ", b'"', b"'", b'"a b"', b"'a\\'b'", b'"\\x41\\n"', b"\\", b"\\x", b"\0", b"\t")
    line = b"".join(rng.choice(pieces) for _ in range(rng.randrange(1, 7)))
    return line + rng.choice((b"\n", b"\r\n"))


def random_input(rng: random.Random) -> bytes:
    """Some commands, most of them valid, then perhaps damaged."""
    parts: list[bytes] = []
    for _ in range(rng.randrange(1, 6)):
        kind = rng.randrange(12)
        if kind < 9:
            parts.append(array(*(random_word(rng) for _ in range(rng.choice((1, 2, 2, 3, 3, 3, 4, 9))))))
        elif kind == 9:
            parts.append(random_line(rng))
        elif kind == 10:
            parts.append(rng.choice(DAMAGE))
        else:
            parts.append(b"get " + b"x" * rng.choice((50, 94, 95, 96, 97)) + rng.choice((b"\r\n", b"\n")))
    data = bytearray(b"".join(parts))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            data[place : place + 1] = bytes([rng.choice(b"\r\n*$0123456789 \"'\\x\xff")])
        elif kind == 1:
            data[place:place] = rng.choice(DAMAGE)
        else:
            del data[place : place + rng.randrange(1, 4)]
    return bytes(data)


# --- the comparison ---------------------------------------------------------------------------------------


class StepParser(RespParser):
    """Without the quick path."""

    def _quick(self, data: bytes, place: int, commands: list[Command]) -> int:
        return place


@contextmanager
def small_limits() -> Iterator[None]:
    """The parser has the limits of this module."""
    before = {name: getattr(parser_module, name) for name in SMALL}
    try:
        vars(parser_module).update(SMALL)
        yield
    finally:
        vars(parser_module).update(before)


def run(parser: RespParser, data: bytes, cuts: list[int]) -> tuple[list[Command], str, int]:
    """Commands, the error, and `buffered_bytes` at the end, for `data` fed in pieces."""
    commands: list[Command] = []
    for low, high in zip([0, *cuts], [*cuts, len(data)], strict=True):
        commands += parser.feed(data[low:high])
    return commands, parser.error, parser.buffered_bytes


def check(data: bytes, cuts: list[int]) -> bool:
    """Compares all ways; true if the input was valid as far as it goes."""
    model = Model()
    model.feed(data)
    whole = run(RespParser(), data, [])
    assert whole[:2] == (model.commands, model.error), f"the model says {model.commands}, {model.error!r}: {whole}"
    steps = run(StepParser(), data, [])
    assert steps == whole, f"without the quick path {steps}, with it {whole}"
    pieces = run(RespParser(), data, cuts)
    assert pieces == whole, f"in pieces {pieces}, whole {whole}"
    return not model.error


def fuzz(inputs: int, seed: int) -> int:
    """Checks of the parser with small limits."""
    with small_limits():
        return run_checks(random_input, check, inputs, seed)


if __name__ == "__main__":
    main(fuzz, " of the Redis protocol", "all ways came to the same")
