"""Tests of reads over several shards: attempts, errors of parts, and pages merged from runs."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from kvtcp.errors import Code
from kvtcp.protocol.operations import ANY_KEY, COUNT, MGET, PAGE
from kvtcp.replication.sequencing import multi_read
from kvtcp.replication.sequencing.multi_read import (
    KEY_OVERHEAD_BYTES,
    MultiRead,
    any_key_read,
    count_read,
    merge_runs,
    mget_read,
    page_read,
)
from tests.support.replication_fakes import Answers


def rows(*keys: str) -> list[tuple[Any, ...]]:
    """Rows with these keys."""
    return [(key.encode(), b"v", 1, None) for key in keys]


def run(found: list[tuple[Any, ...]], is_cut: bool) -> list[Any]:
    """A node's part of a page with these rows."""
    columns = [[row[column] for row in found] for column in range(4)]
    values, ttls_ms = [None if all(cell is None for cell in columns[n]) else columns[n] for n in (1, 3)]
    return [columns[0], values, columns[2], ttls_ms, is_cut]


def keys(page: list[Any]) -> str:
    """The keys of a page, joined."""
    return "".join(row[0].decode() for row in page[0])


def test_parts_of_another_attempt_are_not_looked_at() -> None:
    """Only a complete attempt counts, and nothing after it is done."""
    multi = count_read([0, 1], b"", None, Answers(), "t")
    multi.start(2, {})
    assert not multi.take(1, 0, 5)
    multi.start(2, {})
    assert not multi.take(1, 1, 6) and not multi.take(2, 0, 1)
    multi.cancel_attempt()
    assert not multi.take(2, 1, 2)
    multi.start(1, {})
    assert multi.take(4, 0, 9) and multi.done and not multi.take(4, 0, 9)
    multi.answer()
    assert multi.sink.ok == {"t": 9}


def test_error_of_a_part_is_the_answer() -> None:
    """The first field an integer and the third a map: an error. A position [seq, chain] is none."""
    multi = mget_read([b"a"], [0], Answers(), "t")
    multi.start(1, {})
    assert multi.take(1, 0, [int(Code.TOO_LARGE), "too large", {"bytes_max": 1}])
    multi.answer()
    assert multi.sink.failed == {"t": (Code.TOO_LARGE, "too large", {"bytes_max": 1})}
    position = MultiRead([0], Answers(), "t", lambda numbers: ((), 0), lambda parts: parts[0], 0)
    position.start(1, {})
    assert position.take(1, 0, [3, 77])
    position.answer()
    assert position.sink.ok == {"t": [3, 77]}


def test_items() -> None:
    """Each kind of read builds its node's item, with a size that counts what is sent."""
    sink = Answers()
    page = page_read([0, 1], b"a", b"c", 7, True, False, sink, 0)
    assert page.build([1]) == ((PAGE, [1], b"a", b"c", 7, True, False), 5) and page.bytes == 2
    count = count_read([0, 1], b"a", None, sink, 0)
    assert count.build([0, 1]) == ((COUNT, [0, 1], b"a", None), 7) and count.bytes == 1
    mget = mget_read([b"x", b"yy", b"x"], [3, 1, 3], sink, 0)
    assert mget.shards == [3, 1] and mget.bytes == 4 + 3 * KEY_OVERHEAD_BYTES
    mget.start(1, {})
    assert mget.build([3]) == ((MGET, [(3, b"x"), (3, b"x")]), 2 + 2 * KEY_OVERHEAD_BYTES)


def test_a_node_is_asked_for_its_part_of_a_page() -> None:
    """And for a little more, so that the page is hardly ever cut short, and little; never for more than the page."""
    page = page_read(range(64), b"", None, 1_000, False, False, Answers(), 0)
    asked = [page.build(list(range(some)))[0][4] for some in (0, 1, 21, 22, 64)]
    assert asked == [8, 31, 365, 381, 1_000]
    few = page_read(range(64), b"", None, 10, False, False, Answers(), 0)
    assert [few.build(list(range(some)))[0][4] for some in (1, 21)] == [8, 10]
    rng = random.Random(3)
    short = 0
    for _ in range(200):  # keys fall to the nodes at random
        parts: list[list[tuple[Any, ...]]] = [[], [], []]
        for number in range(1_300):
            parts[rng.randrange(3)].append((b"%06d" % number, b"", 1, None))
        rows, cursor = merge_runs([run(part[:381], len(part) > 381) for part in parts], 1_000, False)
        assert [row[0] for row in rows] == [b"%06d" % number for number in range(len(rows))] and cursor is not None
        assert len(rows) > 950
        short += len(rows) < 1_000
    assert short <= 2


def test_any_key_of_all_parts() -> None:
    """A part is chosen by how many keys it has; one without a visible key is passed over; every key equally often."""
    seen: Counter[Any] = Counter()
    for number in range(24 * 6):
        sink = Answers()
        multi = any_key_read([0, 1, 2], number, sink, "t")
        assert multi.build([0, 1]) == ((ANY_KEY, [0, 1], number), 6)
        multi.start(3, {})
        assert not multi.take(1, 0, [b"a%d" % (number % 2), 2]) and not multi.take(1, 1, [None, 3])
        assert multi.take(1, 2, [b"b%d" % (number % 4), 4])
        multi.answer()
        seen[sink.ok["t"]] += 1
    assert len(seen) == 6 and set(seen.values()) == {24}
    multi = any_key_read([0, 1], 5, sink := Answers(), "none")
    multi.start(2, {})
    assert not multi.take(1, 0, [None, 0]) and multi.take(1, 1, [None, 2])
    multi.answer()
    assert sink.ok == {"none": None}


def test_mget_puts_cells_in_their_places() -> None:
    """Also when a second attempt is cut into other parts."""
    mget = mget_read([b"a", b"b", b"c", b"a"], [0, 1, 2, 0], Answers(), "t")
    mget.start(2, {})
    mget.build([0])
    mget.build([1, 2])
    mget.start(3, {})
    for index, number in enumerate((2, 0, 1)):
        mget.build([number])
        mget.take(2, index, {2: ["C"], 0: ["A", "A"], 1: [None]}[number])
    mget.answer()
    assert mget.sink.ok == {"t": ["A", None, "C", "A"]}


@pytest.mark.parametrize(
    ("runs", "limit", "reverse", "expected", "cursor"),
    [
        ([], 5, False, "", None), ([(rows(), False)], 5, False, "", None),
        ([(rows("a", "b"), False)], 5, False, "ab", None), ([(rows("a", "b"), True)], 5, False, "ab", b">b\0"),
        ([(rows("a", "c"), False), (rows("b", "d"), False)], 4, False, "abcd", None),
        ([(rows("a", "c"), False), (rows("b", "d"), False)], 3, False, "abc", b">c\0"),
        ([(rows("a", "c"), True), (rows("b", "d"), False)], 4, False, "abc", b">c\0"),
        ([(rows("a", "c"), True), (rows("b", "d"), True)], 4, False, "abc", b">c\0"),
        ([(rows("c", "a"), True), (rows("d", "b"), True)], 4, True, "dcb", b"<b"),
        ([(rows("c", "a"), False), (rows("d", "b"), False)], 2, True, "dc", b"<c"),
    ],
)  # fmt: skip
def test_merge_runs(runs: Any, limit: int, reverse: bool, expected: str, cursor: bytes | None) -> None:
    """A page ends where a run was cut, and at the limit; the cursor says where to go on."""
    page = merge_runs([run(*some) for some in runs], limit, reverse)
    assert (keys(page), page[1]) == (expected, cursor)


def test_merged_page_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most PAGE_BYTES_MAX, but one row at least; keys alone count too."""
    monkeypatch.setattr(multi_read, "PAGE_BYTES_MAX", 4)
    assert merge_runs([run(rows("a", "c"), False), run(rows("b"), False)], 9, False) == [rows("a", "b"), b">b\0"]
    large = [(b"a" * 9, None, 1, None)]
    assert merge_runs([run(large, False), run([(b"b", None, 1, None)], False)], 9, False) == [
        large, b">" + b"a" * 9 + b"\0",
    ]  # fmt: skip


def test_pages_of_random_runs_are_complete() -> None:
    """Whatever the nodes cut, going on at the cursors gives every key once and in order."""
    rng = random.Random(5)
    for _ in range(200):
        nodes: list[list[bytes]] = [[], [], []]
        everything = sorted({b"%03d" % rng.randrange(500) for _ in range(rng.randrange(60))})
        for key in everything:
            rng.choice(nodes).append(key)
        reverse = rng.random() < 0.5
        seen: list[bytes] = []
        cursor: bytes | None = b">" if not reverse else b"<\xff"
        while cursor is not None:
            runs = []
            for keys_of_node in nodes:
                rest = [k for k in keys_of_node if (k < cursor[1:] if reverse else k >= cursor[1:])]
                rest.sort(reverse=reverse)
                cut = rng.randrange(1, 12)
                runs.append(run([(k, b"v", 1, None) for k in rest[:cut]], len(rest) > cut))
            page, cursor = merge_runs(runs, rng.randrange(1, 12), reverse)
            assert page or cursor is None
            seen += [row[0] for row in page]
        assert seen == sorted(everything, reverse=reverse)
