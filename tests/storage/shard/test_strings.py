"""Operations of strings: limits, deadlines, decimal sums, and the size of what they log. test_table.py compares all of
them with a model."""

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtcp.constants import INTEGER_MAX, VALUE_BYTES_MAX
from kvtcp.errors import Code
from kvtcp.protocol import operations as op
from kvtcp.storage.shard.strings import patched
from kvtcp.storage.shard.table import Table
from tests.support.table_items import STAMP, as_item, string_items

ENTRY_BYTES = 64  # of an entry beyond its item
SUM_BYTES_MAX = 330  # a sign, 309 digits, a point, 17 places


class Shard:
    """A table and one that replays its entries; both are compared after each write."""

    def __init__(self) -> None:
        self.table = Table()
        self.replayed = Table()

    def write(self, kind: int, key: bytes, *args: Any, at_ms: int = 0) -> Any:
        """Apply the next item; its result as it travels."""
        result = self.table.apply([kind, 0, self.table.seq + 1, 0, key, *args], STAMP + at_ms)
        self.replayed.apply_entry(self.table.last_entry, self.table.chain)
        assert self.table.digest() == self.replayed.digest()
        self.table.check()
        return msgpack.unpackb(msgpack.packb(result), raw=False) if isinstance(result, list) else result

    def effects(self) -> list[Any]:
        """Of the last entry."""
        effects: list[Any] = msgpack.unpackb(self.table.last_entry)[3]
        return effects

    def cell(self, key: bytes, at_ms: int = 0) -> Any:
        """What is visible."""
        return self.table.get(key, STAMP + at_ms)


@pytest.fixture
def shard() -> Iterator[Shard]:
    """A shard that holds `k`, 100 ms more, and `eternal`."""
    shard = Shard()
    shard.write(op.PUT, b"k", b"value", 100)
    shard.write(op.PUT, b"eternal", b"1")
    yield shard
    shard.table.check()


@pytest.mark.parametrize(("data", "offset", "expected"), [
    (b"", 0, b"valu"), (b"AB", 0, b"ABlu"), (b"AB", 2, b"vaAB"), (b"AB", 3, b"valAB"), (b"AB", 4, b"valuAB"),
    (b"AB", 6, b"valu\0\0AB"), (b"ABCDEF", 0, b"ABCDEF"), (b"", 6, b"valu\0\0"),
])  # fmt: skip
def test_patched(data: bytes, offset: int, expected: bytes) -> None:
    """Inside, over the end, at the end and behind it."""
    assert patched(b"valu", offset, data) == expected


def test_changes_in_place_keep_the_deadline(shard: Shard) -> None:
    """Append, set range, set bit and sums; each gives a new revision."""
    assert shard.write(op.APPEND, b"k", b"!") == 6
    assert shard.cell(b"k", 1) == (b"value!", 3, 99)
    assert shard.effects() == [[op.PATCH, b"k", 5, b"!"]]
    assert shard.write(op.SETRANGE, b"k", 8, b"xy") == 10
    assert shard.cell(b"k") == (b"value!\0\0xy", 4, 100)
    assert shard.write(op.SETBIT, b"k", 2, 0) == 1  # of b"v", 0111 0110
    assert shard.cell(b"k") == (b"Value!\0\0xy", 5, 100)
    assert shard.write(op.STORE, b"k", b"1.5", op.KEEP_DEADLINE, 0, op.ALWAYS, None, False) is True
    assert shard.write(op.INCR_DECIMAL, b"k", b"-2") == b"-0.5"
    assert shard.cell(b"k") == (b"-0.5", 7, 100)
    assert shard.write(op.APPEND, b"k", b"") == 4 and shard.write(op.SETRANGE, b"k", 50, b"") == 4
    assert shard.cell(b"k") == (b"-0.5", 7, 100), "without data nothing happens, not even a revision"
    assert shard.cell(b"k", 100) is None


def test_an_expired_key_is_absent(shard: Shard) -> None:
    """It is there physically, but every operation begins with nothing, and a new key has no deadline."""
    late = {"at_ms": 100}
    assert shard.write(op.STORE, b"k", b"x", op.KEEP_DEADLINE, 0, op.IF_PRESENT, None, False, **late) is False
    assert shard.write(op.STORE, b"k", b"x", op.KEEP_DEADLINE, 0, op.IF_EQUAL, b"value", True, **late) is None
    assert shard.write(op.TAKE, b"k", **late) is None and shard.write(op.TOUCH, b"k", op.IN_MS, 5, **late) is None
    assert shard.write(op.EXPIRE_IF, b"k", op.IN_MS, 5, op.ALWAYS, **late) is False
    assert shard.write(op.RENAME, b"k", b"n", False, **late) == op.NO_KEY
    assert shard.write(op.COPY, b"k", b"n", True, **late) is False
    assert shard.write(op.RENAME, b"eternal", b"k", True, **late) == op.RENAMED, "it is in nobody's way"
    assert shard.write(op.PUT, b"k", b"value", 100) and shard.write(op.APPEND, b"k", b"new", **late) == 3
    assert shard.cell(b"k", 200) == (b"new", shard.table.seq, None)
    assert shard.write(op.PUT, b"k", b"value", 100) and shard.write(op.PUT_ALL, b"k", [[b"k", b"2"]], True, **late)
    assert shard.cell(b"k", 200) == (b"2", shard.table.seq, None)


def test_store_and_the_old_value(shard: Shard) -> None:
    """With `get` the result is the old value, whether the condition holds or not."""
    store = (op.NO_DEADLINE, 0)
    assert shard.write(op.STORE, b"k", b"a", *store, op.IF_ABSENT, None, True) == b"value"
    assert shard.cell(b"k") == (b"value", 1, 100) and shard.effects() == []
    assert shard.write(op.STORE, b"k", b"a", *store, op.IF_EQUAL, b"value", True) == b"value"
    assert shard.cell(b"k") == (b"a", 4, None)
    assert shard.write(op.STORE, b"n", b"b", *store, op.IF_PRESENT, None, True) is None and shard.cell(b"n") is None
    assert shard.write(op.STORE, b"n", b"b", op.IN_MS, 7, op.IF_ABSENT, None, True) is None
    assert shard.cell(b"n") == (b"b", 6, 7)
    assert shard.write(op.STORE, b"n", b"", op.AT_MS, STAMP + 9, op.ALWAYS, None, True) == b"b"
    assert shard.write(op.STORE, b"n", b"c", op.KEEP_DEADLINE, 0, op.IF_EQUAL, b"", False) is True
    assert shard.cell(b"n") == (b"c", 8, 9)


def test_deadlines_that_are_over_remove(shard: Shard) -> None:
    """A key whose new deadline is not after the stamp goes, and what gives no other deadline is no change."""
    assert shard.write(op.TOUCH, b"k", op.KEEP_DEADLINE, 0) == b"value" and shard.effects() == []
    assert shard.write(op.TOUCH, b"k", op.AT_MS, STAMP + 100) == b"value" and shard.effects() == []
    assert shard.write(op.TOUCH, b"k", op.NO_DEADLINE, 0) == b"value" and shard.cell(b"k") == (b"value", 5, None)
    assert shard.write(op.EXPIRE_IF, b"k", op.IN_MS, 1, op.IF_LATER) is False, "none is later than all"
    assert shard.write(op.EXPIRE_IF, b"k", op.IN_MS, INTEGER_MAX >> 1, op.IF_PRESENT_EARLIER) is False
    assert shard.write(op.EXPIRE_IF, b"k", op.IN_MS, INTEGER_MAX >> 1, op.IF_EARLIER) is True
    assert shard.cell(b"k") == (b"value", 8, INTEGER_MAX >> 1)
    assert shard.write(op.EXPIRE_IF, b"k", op.AT_MS, INTEGER_MAX, op.IF_LATER) is True
    assert shard.table.deadline_of(b"k", STAMP) == (9, INTEGER_MAX)
    assert shard.write(op.EXPIRE_IF, b"k", op.AT_MS, STAMP, op.IF_ABSENT) is False
    assert shard.write(op.EXPIRE_IF, b"k", op.AT_MS, STAMP, op.IF_PRESENT_EARLIER) is True
    assert len(shard.table) == 1 and shard.effects() == [[op.REMOVE, b"k"]]
    assert shard.write(op.EXPIRE_IF, b"eternal", op.IN_MS, -(INTEGER_MAX >> 1), op.ALWAYS) is True
    assert len(shard.table) == 0


def test_the_largest_value(shard: Shard) -> None:
    """VALUE_BYTES_MAX is reached and not exceeded, by each way there is; nothing is done beyond it."""
    last = VALUE_BYTES_MAX - 1
    assert shard.write(op.SETBIT, b"bits", VALUE_BYTES_MAX * 8 - 1, 1) == 0
    assert shard.write(op.SETRANGE, b"k", last, b"x") == VALUE_BYTES_MAX
    assert shard.write(op.SETRANGE, b"new", last, b"x") == VALUE_BYTES_MAX
    assert [len(shard.cell(key)[0]) for key in (b"bits", b"k", b"new")] == [VALUE_BYTES_MAX] * 3
    assert shard.cell(b"bits")[0][-1] == 1 and shard.cell(b"k")[0][:6] == b"value\0"
    before = shard.table.digest()
    for write in [
        (op.APPEND, b"k", b"y"), (op.SETRANGE, b"k", last, b"xy"), (op.SETRANGE, b"absent", VALUE_BYTES_MAX, b"x"),
        (op.SETBIT, b"k", VALUE_BYTES_MAX * 8, 0), (op.SETBIT, b"absent", VALUE_BYTES_MAX * 8, 1),
    ]:  # fmt: skip
        code, text, details = shard.write(*write)
        assert code == Code.TOO_LARGE and "the limit is" in text
        assert details == {"value_bytes": VALUE_BYTES_MAX + 1, "value_bytes_max": VALUE_BYTES_MAX}
        assert shard.effects() == [] and shard.table.digest() == before
    assert shard.write(op.SETRANGE, b"k", 3 * VALUE_BYTES_MAX, b"") == VALUE_BYTES_MAX, "no data goes nowhere"


def test_rename_and_copy(shard: Shard) -> None:
    """The deadline goes with the value, what was there goes; the entry names the source and has no value."""
    assert shard.write(op.COPY, b"k", b"eternal", False) is False
    assert shard.write(op.COPY, b"k", b"eternal", True) is True
    assert shard.cell(b"eternal", 1) == (b"value", 4, 99) and shard.cell(b"k") == (b"value", 1, 100)
    assert shard.effects() == [[op.CLONE, b"eternal", b"k"]]
    assert shard.write(op.RENAME, b"k", b"eternal", True) == op.NEW_KEY_EXISTS
    assert shard.write(op.RENAME, b"k", b"k", True) == op.NEW_KEY_EXISTS
    assert shard.write(op.RENAME, b"k", b"k", False) == op.RENAMED and shard.effects() == []
    assert shard.write(op.RENAME, b"k", b"eternal", False) == op.RENAMED
    assert shard.cell(b"k") is None and shard.cell(b"eternal", 1) == (b"value", 8, 99)
    assert shard.effects() == [[op.CLONE, b"eternal", b"k"], [op.REMOVE, b"k"]]
    assert shard.write(op.RENAME, b"eternal", b"n", True) == op.RENAMED and len(shard.table) == 1
    assert shard.table._deadlines.pairs() == [(STAMP + 100, b"n")]


def test_all_or_none(shard: Shard) -> None:
    """PUT_ALL removes deadlines; the last of equal keys counts; with `if_absent` one present key keeps all away."""
    assert shard.write(op.PUT_ALL, b"x", [[b"x", b"1"], [b"k", b"2"]], True) is False
    assert shard.cell(b"x") is None and shard.effects() == []
    assert shard.write(op.PUT_ALL, b"x", [[b"x", b"1"], [b"k", b"2"], [b"x", b"3"]], False) is True
    assert (shard.cell(b"x"), shard.cell(b"k")) == ((b"3", 4, None), (b"2", 4, None))


@pytest.mark.parametrize(("value", "by", "expected"), [
    (b"0.1", b"0.2", b"0.3"), (b"10.50", b"0.1", b"10.6"), (b"5.0e3", b"200", b"5200"), (b"1", b"-1", b"0"),
    (b"0", b"-1e-18", b"0"), (b"100", b"0", b"100"), (b"1e-17", b"0", b"0.00000000000000001"), (b"-3", b".5", b"-2.5"),
    (b"1e308", b"-1e-999", b"1" + b"0" * 308), (b"0e999", b"0e999", b"0"),
])  # fmt: skip
def test_decimal_sums(shard: Shard, value: bytes, by: bytes, expected: bytes) -> None:
    """Exact, rounded to 17 places, without an exponent and without zeros behind; the result can be added to again."""
    shard.write(op.PUT, b"n", value)
    assert shard.write(op.INCR_DECIMAL, b"n", by) == expected
    assert shard.cell(b"n")[0] == expected
    assert shard.write(op.INCR_DECIMAL, b"n", b"0") == expected


def test_decimal_sums_that_fail(shard: Shard) -> None:
    """Beyond the range, by however little; and of what is no number. Nothing is changed."""
    shard.write(op.PUT, b"n", b"1e308")
    for by in (b"1e308", b"1e-17", b"1"):
        assert shard.write(op.INCR_DECIMAL, b"n", by)[0] == Code.RANGE and shard.effects() == []
    assert shard.write(op.INCR_DECIMAL, b"k", b"1")[0] == Code.NOT_A_NUMBER and shard.effects() == []
    assert shard.write(op.INCR_DECIMAL, b"n", b"one")[0] == Code.NOT_A_NUMBER
    assert shard.cell(b"n") == (b"1e308", 3, None)
    assert shard.write(op.INCR_DECIMAL, b"n", b"-9e307") == b"1" + b"0" * 307


@settings(deadline=None, max_examples=300)
@given(writes=st.lists(string_items(), min_size=1, max_size=8))
def test_entries_are_about_as_large_as_their_items(writes: list[tuple[Any, ...]]) -> None:
    """Windows, kept entries and records of the log are bounded by the bytes of items: 20 copies of the largest value in
    one batch must not be 160 MiB of log."""
    table, replayed = Table(), Table()
    for key in (b"a", b"b", b"c"):
        table.apply([op.PUT, 0, table.seq + 1, 0, key, bytes(5_000)], STAMP)
        replayed.apply_entry(table.last_entry)
    for write in writes:
        item = as_item(list(write), table.seq + 1)
        table.apply(item, STAMP)
        replayed.apply_entry(table.last_entry, table.chain)
        grown = SUM_BYTES_MAX if write[0] == op.INCR_DECIMAL else 0
        assert len(table.last_entry) <= len(msgpack.packb(item)) + ENTRY_BYTES + grown
    assert table.digest() == replayed.digest()
