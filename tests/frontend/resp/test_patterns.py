"""Patterns of KEYS and SCAN against a matcher that tries everything, and the time they take."""

from __future__ import annotations

import random
import time
from functools import cache

import pytest

from kvtcp.constants import KEY_BYTES_MAX
from kvtcp.frontend.resp.patterns import PATTERN_BYTES_MAX, literal_prefix, matcher
from kvtcp.frontend.resp.plan import CommandError


def model(pattern: bytes, key: bytes) -> bool:
    """The rules of Redis, tried in every way."""

    @cache
    def matches(p: int, k: int) -> bool:
        if p == len(pattern):
            return k == len(key)
        byte = pattern[p : p + 1]
        if byte == b"*":
            return matches(p + 1, k) or (k < len(key) and matches(p, k + 1))
        if k == len(key):
            return False
        if byte == b"?":
            return matches(p + 1, k + 1)
        if byte == b"[":
            allowed, after = model_class(pattern, p + 1)
            return key[k] in allowed and matches(min(after, len(pattern)), k + 1)
        if byte == b"\\" and p + 1 < len(pattern):
            p += 1
        return pattern[p] == key[k] and matches(p + 1, k + 1)

    return matches(0, 0)


def model_class(pattern: bytes, p: int) -> tuple[set[int], int]:
    """The bytes that `[...]` allows, and where it ends."""
    negative = pattern[p : p + 1] == b"^"
    p += negative
    found: set[int] = set()
    while p < len(pattern) and pattern[p : p + 1] != b"]":
        if pattern[p : p + 1] == b"\\" and p + 1 < len(pattern):
            found.add(pattern[p + 1])
            p += 2
        elif pattern[p + 1 : p + 2] == b"-" and p + 2 < len(pattern):
            low, high = pattern[p], pattern[p + 2]
            found |= set(range(min(low, high), max(low, high) + 1))
            p += 3
        else:
            found.add(pattern[p])
            p += 1
    return (set(range(256)) - found if negative else found), p + 1


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (b"*", [b"a", b"a\nb", b"\xff\0"], []), (b"", [b""], [b"a"]),
        (b"h?llo", [b"hello", b"h\nllo"], [b"hllo", b"heello"]), (b"h*llo", [b"hllo", b"heeeello"], [b"hell"]),
        (b"h[ae]llo", [b"hello", b"hallo"], [b"hillo", b"h[ae]llo"]), (b"h[^e]llo", [b"hallo", b"h\nllo"], [b"hello"]),
        (b"h[a-b]llo", [b"hallo", b"hbllo"], [b"hcllo"]), (b"h[b-a]llo", [b"hallo", b"hbllo"], [b"hcllo"]),
        (b"[\\]-]", [b"]", b"-"], [b"\\"]), (b"[\\^a]", [b"^", b"a"], [b"b"]), (b"[.+(]", [b".", b"+", b"("], [b"a"]),
        (b"[]", [], [b"", b"]", b"a"]), (b"[^]", [b"a", b"]"], [b""]), (b"[ab", [b"a", b"b"], [b"c"]),
        (b"\\*\\?\\[", [b"*?["], [b"aaa"]), (b"a\\", [b"a\\"], [b"a"]), (b"a.b$", [b"a.b$"], [b"aab$", b"a.b"]),
        (b"**a**", [b"a", b"bab"], [b"b"]), (b"*a*b", [b"aab", b"abab"], [b"aba"]), (b"a*\n", [b"a\n"], [b"a"]),
    ],
)  # fmt: skip
def test_patterns(pattern: bytes, yes: list[bytes], no: list[bytes]) -> None:
    """What Redis's documentation says of each, and its corners."""
    matches = matcher(pattern)
    assert all(matches(key) for key in yes) and all(model(pattern, key) for key in yes)
    assert not any(matches(key) for key in no) and not any(model(pattern, key) for key in no)


def test_random_patterns_as_the_model() -> None:
    """Random patterns and keys of few bytes: both matchers say the same, and what matches begins with the prefix."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    matched = 0
    for _ in range(20_000):
        pattern = bytes(rng.choice(b"aab*?[]^-\\b") for _ in range(rng.randrange(9)))
        key = bytes(rng.choice(b"aab]^-\\") for _ in range(rng.randrange(7)))
        says = bool(matcher(pattern)(key))
        assert says == model(pattern, key), f"seed {seed}: {pattern!r} on {key!r}"
        if says:
            matched += 1
            assert key.startswith(literal_prefix(pattern)), f"seed {seed}: {pattern!r} on {key!r}"
    assert matched > 500, f"seed {seed}"


@pytest.mark.parametrize(
    ("pattern", "prefix"), [(b"user:*", b"user:"), (b"a", b"a"), (b"*", b""), (b"a\\*", b"a"), (b"a[b]", b"a")]
)
def test_literal_prefix(pattern: bytes, prefix: bytes) -> None:
    """What is before the first special character."""
    assert literal_prefix(pattern) == prefix


@pytest.mark.parametrize(
    "pattern",
    [
        b"a*" * (PATTERN_BYTES_MAX // 2 - 1) + b"b", b"*a?" * (PATTERN_BYTES_MAX // 3 - 1) + b"b*",
        b"*" + b"a" * (PATTERN_BYTES_MAX - 3) + b"b*", b"*" + b"?" * (PATTERN_BYTES_MAX - 3) + b"b*",
        b"*" + b"[ab]" * (PATTERN_BYTES_MAX // 4 - 1) + b"c*", b"*" + b"[ab]" * (PATTERN_BYTES_MAX // 4 - 1) + b"c",
    ],
    ids=lambda pattern: str(pattern[:6]),
)  # fmt: skip
def test_time_is_bounded(pattern: bytes) -> None:
    """The worst patterns on the longest keys: milliseconds, where trying every way would take longer than the world."""
    key = b"a" * KEY_BYTES_MAX
    began = time.process_time()
    matches = matcher(pattern)
    assert not matches(key)
    assert time.process_time() - began < 2  # ten times what a busy machine was seen to need


def test_time_to_compile_is_bounded() -> None:
    """Sets of many bytes become short expressions."""
    began = time.process_time()
    matcher((b"[^a]" * PATTERN_BYTES_MAX)[:PATTERN_BYTES_MAX])
    matcher(b"[" + bytes(range(32, 250, 2)) * 4 + b"]")
    assert time.process_time() - began < 2  # ten times what a busy machine was seen to need


def test_longest_pattern() -> None:
    """One byte more is refused."""
    assert matcher(b"a" * PATTERN_BYTES_MAX)(b"a" * PATTERN_BYTES_MAX)
    with pytest.raises(CommandError, match="a pattern is over the limit of 1024 bytes"):
        matcher(b"a" * (PATTERN_BYTES_MAX + 1))
