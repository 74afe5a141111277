r"""Words of a command line: how people write keys, values and options.

Pure. The same words come from two sides: `split_line` cuts a line of the interactive shell, `word_of_argument` takes
one argument that the system's shell has already cut. A word is one of

    user:1                 a plain word: its bytes as they stand, a backslash is a backslash
    "a \x00 b\n"           quoted: UTF-8 text with the escapes \n \t \r \" \\ \xHH; the only way to write a space in a
                           line, or text that looks like one of the following
    b64:AAEC               the bytes of standard base64
    @path, @"a path"       the content of a file; the parser only marks it, it opens nothing
    -                      standard input, marked likewise
    name=WORD              an option, where a command has one of this name: `ttl=60`, `from="a b"`, `prefix=b64:AA==`

Only the first character of a word decides its kind; a quote further inside is an ordinary character, so JSON without
spaces needs no quoting. The meaning of a word depends on its place (a value may well be `ttl=60`), so a Word keeps its
raw text, and `content`, `option` and `text` interpret it when they are called. `quote` is the inverse of a quoted word.
Every ParseError carries the position, counted in characters from 0, in the line or argument.

Text is str with undecodable bytes as lone surrogates (PEP 383), as `sys.argv` has them; they turn into the same bytes.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final, NamedTuple

_SPACE: Final = " \t\r\n"
_ESCAPES: Final = {"n": b"\n", "t": b"\t", "r": b"\r", '"': b'"', "\\": b"\\"}
_KNOWN_ESCAPES: Final = r"\n \t \r \" \\ \xHH"
_TEXT_FOLLOWS: Final = 'text follows the closing quote; leave a space, or write \\" for a quote inside'
_OPTION_NAME: Final = re.compile(r"([a-z][a-z_-]*)=")
_PLAIN_RUN: Final = re.compile(r'[^"\\]+')
_HEX: Final = re.compile(r"[0-9a-fA-F]{2}")
_BARE: Final = re.compile(r"[A-Za-z0-9_./:{}*+,;<>?!#$%&()\[\]^|~=@-]+")


class ParseError(ValueError):
    """A line or argument that cannot be read. `position` is the offending character, counted from 0."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} (at character {position + 1})")
        self.message = message
        self.position = position


class File(NamedTuple):
    """The content of a file stands here: `@path`."""

    path: str


class Stdin(NamedTuple):
    """Standard input stands here: `-`."""


Content = bytes | File | Stdin


class Word(NamedTuple):
    """One word as it was written. `position` is that of its first character in the line, 0 for an argument."""

    raw: str
    position: int

    @property
    def is_quoted(self) -> bool:
        """True for a word that stands for bytes in any case, never for an option or a flag."""
        return self.raw.startswith(('"', "b64:"))

    def content(self) -> Content:
        """The bytes of the word, or the file or stream that has them. Raises ParseError."""
        raw = self.raw
        if raw.startswith('"'):
            return _unquote(raw, self.position)
        if raw.startswith("b64:"):
            return _decode_base64(raw[4:], self.position + 4)
        if raw == "-":
            return Stdin()
        if raw.startswith("@"):
            return File(self._path(raw[1:]))
        return encode_text(raw)

    def _path(self, raw: str) -> str:
        if raw.startswith('"'):
            return decode_text(_unquote(raw, self.position + 1))
        if not raw:
            raise ParseError('a file name must follow "@"; for a single @ write "@" in quotes', self.position)
        return raw

    def text(self) -> str:
        """The word as text, for numbers, names and paths: quotes are read, `@`, `-` and `b64:` are not special."""
        return decode_text(_unquote(self.raw, self.position)) if self.raw.startswith('"') else self.raw

    def option(self) -> tuple[str, Word] | None:
        """Name and value, if the word has the form of an option."""
        match = _OPTION_NAME.match(self.raw)
        if match is None:
            return None
        return match[1], Word(self.raw[match.end() :], self.position + match.end())


def encode_text(text: str) -> bytes:
    """Bytes of text as the system gives it: UTF-8, surrogates of PEP 383 as the bytes they stand for."""
    return text.encode("utf-8", "surrogateescape")


def decode_text(data: bytes) -> str:
    """The inverse of `encode_text`."""
    return data.decode("utf-8", "surrogateescape")


def _decode_base64(text: str, position: int) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ParseError("what follows b64: is not standard base64", position) from error


def _unquote(raw: str, position: int) -> bytes:
    """Bytes of a quoted word, which must end with its closing quote."""
    data, end = _scan_quoted(raw, 0, position)
    if end != len(raw):
        raise ParseError(_TEXT_FOLLOWS, position + end)
    return data


def _scan_quoted(text: str, start: int, offset: int) -> tuple[bytes, int]:
    """Bytes of the quoted text that begins at `start`, and the index behind its closing quote.

    `offset` is added to the positions of errors.
    """
    assert text[start] == '"', "a quoted word begins with a quote"
    parts: list[bytes] = []
    index = start + 1
    while index < len(text):
        run = _PLAIN_RUN.match(text, index)
        if run is not None:
            parts.append(encode_text(run[0]))
            index = run.end()
        elif text[index] == '"':
            return b"".join(parts), index + 1
        else:
            escaped, index = _scan_escape(text, index, offset)
            parts.append(escaped)
    raise ParseError("the closing quote is missing", offset + start)


def _scan_escape(text: str, index: int, offset: int) -> tuple[bytes, int]:
    """Bytes of the escape whose backslash is at `index`, and the index behind it."""
    letter = text[index + 1 : index + 2]
    if letter in _ESCAPES:
        return _ESCAPES[letter], index + 2
    if letter == "x":
        digits = text[index + 2 : index + 4]
        if _HEX.fullmatch(digits):
            return bytes.fromhex(digits), index + 4
        raise ParseError("two hexadecimal digits must follow \\x", offset + index)
    if not letter:
        raise ParseError("the closing quote is missing", offset + index)
    raise ParseError(f"unknown escape \\{letter}; known are {_KNOWN_ESCAPES}", offset + index)


def split_line(line: str) -> list[Word]:
    """Return the words of a line. A quoted part is checked here, so that a missing quote is reported at once."""
    words: list[Word] = []
    index = 0
    while index < len(line):
        if line[index] in _SPACE:
            index += 1
            continue
        start = index
        index = _word_end(line, start)
        words.append(Word(line[start:index], start))
    return words


def _word_end(line: str, start: int) -> int:
    """Return the index behind the word that begins at `start`. A quote at its beginning, or at that of an option's
    value or a file's name, holds it together over spaces."""
    index = start
    option = _OPTION_NAME.match(line, start)
    if option is not None:
        index = option.end()
    if line.startswith("@", index):
        index += 1
    if line.startswith('"', index):
        _, index = _scan_quoted(line, index, 0)
        if index < len(line) and line[index] not in _SPACE:
            raise ParseError(_TEXT_FOLLOWS, index)
        return index
    while index < len(line) and line[index] not in _SPACE:
        index += 1
    return index


def word_of_argument(argument: str) -> Word:
    """The word of one argument of the process: the system's shell has already cut the line."""
    return Word(argument, 0)


def quote(data: bytes) -> str:
    """A word whose content is `data`: plain where that is possible, quoted otherwise. All ASCII control bytes and all
    bytes that are not UTF-8 become escapes, so it can be shown on any terminal."""
    text = decode_text(data)
    if _BARE.fullmatch(text) and not text.startswith(("@", "b64:")) and text != "-" and "=" not in text:
        return text
    return '"' + "".join(map(_quote_character, text)) + '"'


def _quote_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in encode_text(character))


_NAMED: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
