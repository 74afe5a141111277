r"""Bytes as text that is safe to show and unambiguous to read back.

Pure. `escape` is the form of the plain `key<TAB>value` lines: text stands as it is, a backslash becomes `\\`, tab,
newline and carriage return become `\t`, `\n`, `\r`, every other control character and every byte that is not UTF-8
becomes `\xHH`. No control byte gets through (C1 controls included, which some terminals obey), and two different byte
strings never give the same text. `display_width` and `cut` count terminal columns.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Final

_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\\\\\ud800-\udfff]")
_UNSAFE_FOR_PEOPLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_NAMED: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}


def _escape_character(match: re.Match[str]) -> str:
    character = match[0]
    if character in _NAMED:
        return _NAMED[character]
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def escape(data: bytes) -> str:
    """Return one line of text without control characters, which denotes exactly these bytes."""
    return _UNSAFE.sub(_escape_character, data.decode("utf-8", "surrogateescape"))


def for_people(data: bytes) -> str:
    """A single value for a terminal: text as it is with its lines and tabs; other control characters escaped."""
    return _UNSAFE_FOR_PEOPLE.sub(_escape_character, data.decode("utf-8", "surrogateescape"))


def _character_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def display_width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def cut(text: str, columns: int) -> str:
    """`text`, shortened to `columns` columns with an ellipsis as its last one if it is longer."""
    if len(text) * 2 <= columns or display_width(text) <= columns:
        return text
    used = 0
    for index, character in enumerate(text):
        used += _character_width(character)
        if used > columns - 1:
            return text[:index] + "…"
    return text


def decoded(value: Any) -> Any:
    """An answer of the server for JSON: byte strings as text (escaped where they are not), at any depth."""
    if isinstance(value, bytes):
        return escape(value)
    if isinstance(value, dict):
        return {decoded(k) if isinstance(k, str | bytes) else str(k): decoded(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [decoded(item) for item in value]
    return value


def cell(value: Any) -> str:
    """One member of an answer as the text of one cell: lists joined by `; `, and `-` for an absent or empty one."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, bytes):
        return escape(value) or "-"
    if isinstance(value, str):
        return escape(value.encode("utf-8", "surrogateescape")) or "-"
    if isinstance(value, dict):
        return ",".join(f"{cell(k)}={cell(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple | set | frozenset):
        return "; ".join(map(cell, value)) or "-"
    return str(value)


def number(value: float) -> str:
    """A float with up to three decimals, none when they are zero: seconds with milliseconds."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if value == value and abs(value) != float("inf") else str(value)
