r"""Commands of the Redis protocol out of a stream of bytes.

Pure; between a session's socket and `Pipeline`. A command is an array of bulk strings, or an *inline* line as a
person types it:

    *2\r\n$3\r\nGET\r\n$6\r\nuser:1\r\n            an array of two: "GET", "user:1"
    get user:1\r\n   or   get "user 1"\n          words; "" with escapes \n \r \t \b \a \xhh, or '' with \'

Nothing else is allowed: no integers, nils, nested arrays, or status lines in a command. Everything beyond a limit is
refused when its header is read, before the bytes are here. `feed` never raises: it returns the commands before a fault
and sets `error`; then the stream is over.

Commands that arrive whole and have no line break in a value are cut out of the bytes with one `split`, two thirds of a
microsecond each; the others are parsed step by step. hiredis needs a third of that, but gives no position, takes more
than commands, and makes room for as many elements as a header claims before they are here.
"""

from __future__ import annotations

import re
from typing import Final

from kvtcp.constants import (
    KEY_BYTES_MAX,
    RESP_ARGUMENTS_MAX,
    RESP_COMMAND_BYTES_MAX,
    RESP_LINE_BYTES_MAX,
    VALUE_BYTES_MAX,
)

Command = list[bytes]

_STAR: Final = 0x2A
_DOLLAR: Final = 0x24
_COUNTS: Final = {b"*%d" % n: n for n in range(1, 65)}
_LENGTHS: Final = {b"$%d" % n: n for n in range(4_097)}
_HEADER_BYTES_MAX: Final = 32
_ARGUMENT_OVERHEAD_BYTES: Final = 48  # of memory, beyond the bytes of an argument
_ESCAPES: Final = {0x6E: b"\n", 0x72: b"\r", 0x74: b"\t", 0x62: b"\b", 0x61: b"\a"}
_HEX_ESCAPE: Final = re.compile(rb"x[0-9a-fA-F]{2}")
_SPACE: Final = b" \t\n\r\0\v\f"

assert VALUE_BYTES_MAX + KEY_BYTES_MAX < RESP_COMMAND_BYTES_MAX, "a command takes one largest value"


class RespParser:
    """One stream of commands."""

    def __init__(self) -> None:
        self.error = ""  # the fault of the stream, in the words of Redis; empty = none
        self._rest = b""  # bytes after the last thing that was complete
        self._gathered: bytearray | None = None  # a large bulk that is arriving, after `_rest`
        self._arguments: Command = []  # of the unfinished command
        self._argument_bytes = 0
        self._left = 0  # arguments that it still lacks; 0 = none is unfinished
        self._bulk_bytes = -1  # length of the bulk whose header was read; -1 = a header is next

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of an unfinished command, with the memory of its arguments; 0 = nothing is unfinished."""
        gathered = 0 if self._gathered is None else len(self._gathered)
        overhead = _ARGUMENT_OVERHEAD_BYTES * (len(self._arguments) + 1) if self._left else 0
        return len(self._rest) + gathered + self._argument_bytes + overhead

    def feed(self, data: bytes) -> list[Command]:
        """Return the commands that these bytes complete."""
        if self.error:
            return []
        if self._gathered is not None:
            self._gathered += data
            if len(self._gathered) < self._bulk_bytes + 2:
                return []
            data, self._gathered = bytes(self._gathered), None
        elif self._rest:
            data, self._rest = self._rest + data, b""
        commands: list[Command] = []
        place = 0
        if self._left:  # the end of an unfinished command, then on with the quick way
            place = self._step(data, 0, commands, only_one=True)
        if place < len(data) and not self._left and not self.error:
            place = self._quick(data, place, commands)
            if place < len(data):
                place = self._step(data, place, commands, only_one=False)
        if place < len(data) and not self.error:
            self._keep(data[place:])
        return commands

    def _keep(self, rest: bytes) -> None:
        """Hold the unfinished rest; a large bulk in a buffer that grows."""
        if self._bulk_bytes >= 0:
            self._gathered = bytearray(rest)
        else:
            self._rest = rest

    def _quick(self, data: bytes, place: int, commands: list[Command]) -> int:
        """Take commands that are whole and plain, up to the first that is not. Returns where that begins."""
        tokens = (data[place:] if place else data).split(b"\r\n")
        last = len(tokens) - 1
        length = _LENGTHS.get
        n = 0
        while n < last:
            head = tokens[n]
            if head == b"*3":
                end = n + 7
                if end > last:
                    break
                _, name_bytes, name, key_bytes, key, value_bytes, value = tokens[n:end]
                if length(name_bytes) != len(name) or length(key_bytes) != len(key):
                    break
                if length(value_bytes) != len(value):
                    break
                commands.append([name, key, value])
            elif head == b"*2":
                end = n + 5
                if end > last:
                    break
                _, name_bytes, name, key_bytes, key = tokens[n:end]
                if length(name_bytes) != len(name) or length(key_bytes) != len(key):
                    break
                commands.append([name, key])
            else:
                count = _COUNTS.get(head)
                if count is None:
                    break
                end = n + 1 + 2 * count
                if end > last:
                    break
                arguments = tokens[n + 2 : end : 2]
                if list(map(length, tokens[n + 1 : end : 2])) != list(map(len, arguments)):
                    break
                commands.append(arguments)
            n = end
        if n == last and not tokens[last]:
            return len(data)
        return place + sum(map(len, tokens[:n])) + 2 * n

    def _step(self, data: bytes, place: int, commands: list[Command], only_one: bool) -> int:
        """Parse step by step, up to the end, an error or an unfinished command; with `only_one`, one command at most.
        Returns the place it reached."""
        end = len(data)
        while place < end:
            if not self._left and data[place] != _STAR:
                line_end = data.find(b"\n", place)
                if line_end < 0:
                    if end - place > RESP_LINE_BYTES_MAX:
                        self._fail("too big inline request")
                    return place
                self._take_line(data[place:line_end], commands)
                place = line_end + 1
            elif self._bulk_bytes < 0:
                if self._left and data[place] != _DOLLAR:
                    self._fail(f"expected '$', got '{_shown(data[place])}'")
                    return place
                line_end = data.find(b"\r\n", place, place + _HEADER_BYTES_MAX)
                if line_end < 0:
                    if end - place > _HEADER_BYTES_MAX:
                        self._fail("too big bulk count string" if self._left else "too big mbulk count string")
                    return place
                self._take_header(data[place:line_end])
                place = line_end + 2
            else:
                bulk_end = place + self._bulk_bytes
                if end < bulk_end + 2:
                    return place
                if data[bulk_end : bulk_end + 2] != b"\r\n":
                    self._fail("expected a line break after a bulk")
                    return place
                self._arguments.append(data[place:bulk_end])
                self._argument_bytes += self._bulk_bytes
                self._bulk_bytes = -1
                self._left -= 1
                place = bulk_end + 2
                if not self._left:
                    commands.append(self._arguments)
                    self._arguments, self._argument_bytes = [], 0
                    if only_one:
                        return place
            if self.error:
                return place
        return place

    def _take_header(self, line: bytes) -> None:
        """Take `*count` between commands, `$length` within one."""
        number = _integer(line[1:])
        if not self._left:
            if number is None or number > RESP_ARGUMENTS_MAX:
                self._fail("invalid multibulk length")
            else:
                self._left = max(0, number)  # Redis passes over empty ones
        elif number is None or not 0 <= number <= VALUE_BYTES_MAX:
            self._fail("invalid bulk length")
        elif self._argument_bytes + number > RESP_COMMAND_BYTES_MAX:
            self._fail(f"a command is over the limit of {RESP_COMMAND_BYTES_MAX} bytes")
        else:
            self._bulk_bytes = number

    def _take_line(self, line: bytes, commands: list[Command]) -> None:
        if len(line) > RESP_LINE_BYTES_MAX:
            self._fail("too big inline request")
            return
        words = split_line(line[:-1] if line.endswith(b"\r") else line)
        if words is None:
            self._fail("unbalanced quotes in request")
        elif words:
            commands.append(words)

    def _fail(self, reason: str) -> None:
        self.error = f"Protocol error: {reason}"
        self._rest, self._gathered = b"", None
        self._arguments, self._argument_bytes, self._left = [], 0, 0


def _shown(byte: int) -> str:
    """Return a byte as it is shown in a log."""
    return chr(byte).encode("unicode_escape").decode()


def _integer(text: bytes) -> int | None:
    digits = text[1:] if text[:1] == b"-" else text
    return int(text) if digits.isdigit() and len(digits) <= 19 else None


def split_line(line: bytes) -> Command | None:
    """Return the words of a typed line; None if a quote is not closed, or text follows it without a space."""
    words: Command = []
    place, end = 0, len(line)
    while True:
        while place < end and line[place] in _SPACE:
            place += 1
        if place >= end:
            return words
        word = bytearray()
        while place < end and line[place] not in _SPACE:
            byte = line[place]
            if byte not in b"\"'":
                word.append(byte)
                place += 1
                continue
            closed = _take_quoted(line, place + 1, byte, word)
            if closed is None or (closed < end and line[closed] not in _SPACE):
                return None
            place = closed
        words.append(bytes(word))


def _take_quoted(line: bytes, place: int, quote: int, word: bytearray) -> int | None:
    """Add the text up to the closing quote to `word`. Returns the place behind it; None if there is none."""
    while place < len(line):
        byte = line[place]
        if byte == quote:
            return place + 1
        following = line[place + 1 : place + 4]
        if byte == 0x5C and quote == 0x22 and _HEX_ESCAPE.fullmatch(following):
            word.append(int(following[1:], 16))
            place += 4
        elif byte == 0x5C and following and (quote == 0x22 or following[0] == quote):
            word += _ESCAPES.get(following[0], following[:1]) if quote == 0x22 else following[:1]
            place += 2
        else:
            word.append(byte)
            place += 1
    return None
