"""Patterns of KEYS and SCAN: `*`, `?`, `[a-c]`, `[^a]` and `\\` before a character that means itself.

Pure. A pattern becomes a regular expression whose parts between stars are matched at the first place where they fit
and never again (atomic groups), so the time grows with pattern times key and not with its power. A pattern is no longer
than PATTERN_BYTES_MAX: to compile one of these takes 20 ms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from kvtcp.frontend.resp.plan import CommandError

PATTERN_BYTES_MAX: Final = 1_024


def literal_prefix(pattern: bytes) -> bytes:
    """Return the prefix of every key that matches."""
    for place, byte in enumerate(pattern):
        if byte in b"*?[\\":
            return pattern[:place]
    return pattern


def matcher(pattern: bytes) -> Callable[[bytes], object]:
    """Return a function that is true of the keys that match."""
    if len(pattern) > PATTERN_BYTES_MAX:
        raise CommandError(f"ERR a pattern is over the limit of {PATTERN_BYTES_MAX} bytes")
    parts: list[bytes] = [b""]
    place = 0
    while place < len(pattern):
        byte = pattern[place : place + 1]
        place += 1
        if byte == b"*":
            if len(parts) == 1 or parts[-1]:
                parts.append(b"")
        elif byte == b"?":
            parts[-1] += b"."
        elif byte == b"[":
            text, place = _one_of(pattern, place)
            parts[-1] += text
        elif byte == b"\\" and place < len(pattern):
            parts[-1] += re.escape(pattern[place : place + 1])
            place += 1
        else:
            parts[-1] += re.escape(byte)
    first, *others = parts
    if not others:
        text = first
    else:
        text = first + b"".join(b"(?>.*?" + part + b")" for part in others[:-1]) + b".*" + others[-1]
    return re.compile(text, re.DOTALL).fullmatch


def _one_of(pattern: bytes, place: int) -> tuple[bytes, int]:
    """Return the regular expression of `[...]` whose first character is at `place`, and the place behind it. Without a
    closing bracket it extends to the end."""
    negative = pattern[place : place + 1] == b"^"
    place += negative
    allowed: set[int] = set()
    while place < len(pattern) and pattern[place] != 0x5D:
        if pattern[place] == 0x5C and place + 1 < len(pattern):
            place += 1
            allowed.add(pattern[place])
            place += 1
        elif place + 2 < len(pattern) and pattern[place + 1] == 0x2D:
            low, high = sorted((pattern[place], pattern[place + 2]))
            allowed.update(range(low, high + 1))
            place += 3
        else:
            allowed.add(pattern[place])
            place += 1
    if negative:
        allowed = set(range(256)) - allowed
    text = b""
    low = 0
    for high in range(256):  # runs, for a short expression
        if high not in allowed:
            low = high + 1
        elif high + 1 not in allowed:
            text += b"\\x%02x-\\x%02x" % (low, high)
    return b"[" + text + b"]" if text else b"(?!)", place + 1
