"""Transactions: what each operation sees, watched revisions, limits of the whole. test_table.py has a model of them."""

from typing import Any

import msgpack
import pytest

from kvtcp.constants import MGET_VALUES_BYTES_MAX, MULTI_BYTES_MAX, TRANSACTION_COPY_BYTES_MAX, VALUE_BYTES_MAX
from kvtcp.errors import Code, ProtocolError
from kvtcp.protocol import operations as op
from kvtcp.storage.shard import transaction
from kvtcp.storage.shard.table import Table
from kvtcp.storage.shard.transaction import result_bytes
from tests.support.table_items import STAMP

STORE_PLAIN = (op.NO_DEADLINE, 0, op.ALWAYS, None)


class Shard:
    """A table, and one that replays its entries."""

    def __init__(self) -> None:
        self.table = Table(leaf_keys_max=4, fresh_keys_max=2)
        self.replayed = Table()

    def put(self, key: bytes, value: bytes, ttl_ms: int | None = None) -> None:
        """A plain write."""
        self.table.apply([op.PUT, 0, self.table.seq + 1, 0, key, value, ttl_ms], STAMP)
        self.replayed.apply_entry(self.table.last_entry)

    def run(self, *ops: tuple[Any, ...], watched: Any = (), at_ms: int = 0) -> Any:
        """A transaction that came over a link; its result as it comes back."""
        item = [op.TRANSACTION, 0, self.table.seq + 1, 1, b"k", [list(pair) for pair in watched], [*map(list, ops)]]
        item = msgpack.unpackb(msgpack.packb(item))
        result = self.table.apply(item, STAMP + at_ms)
        self.replayed.apply_entry(self.table.last_entry, self.table.chain)
        self.table.check()
        assert self.table.digest() == self.replayed.digest() and self.table.position == self.replayed.position
        return msgpack.unpackb(msgpack.packb(result))

    def cell(self, key: bytes, at_ms: int = 0) -> Any:
        """What is visible."""
        return self.table.get(key, STAMP + at_ms)


@pytest.fixture
def shard() -> Shard:
    """`k` lives 100 ms, `n` is a number."""
    shard = Shard()
    shard.put(b"k", b"value", 100)
    shard.put(b"n", b"5")
    return shard


def test_each_operation_sees_those_before_it(shard: Shard) -> None:
    """Deleted and set again, renamed along a chain, changed in place: one entry, one revision."""
    results = shard.run(
        (op.TAKE, b"k"), (op.EXISTS, b"k"), (op.GET, b"k"), (op.APPEND, b"k", b"new"), (op.APPEND, b"k", b"er"),
        (op.GET, b"k"), (op.TTL, b"k"), (op.RENAME, b"k", b"l", False), (op.RENAME, b"l", b"m", True),
        (op.EXISTS, b"k"), (op.RENAME, b"l", b"o", False), (op.GET, b"m"), (op.INCR, b"n", 2), (op.INCR, b"n", 2),
        (op.COPY, b"n", b"k", False), (op.STORE, b"k", b"z", *STORE_PLAIN, True), (op.DELETE, b"m"),
        (op.ADD, b"m", b"again"), (op.CAS, b"m", b"twice", None, 3),
    )  # fmt: skip
    assert results == [[
        b"value", False, None, 3, 5, [b"newer", 3, None], -1, op.RENAMED, op.RENAMED, False, op.NO_KEY,
        [b"newer", 3, None], 7, 9, True, b"9", True, 3, 3,
    ]]  # fmt: skip
    assert [shard.cell(key) for key in (b"k", b"l", b"m", b"n")] == [
        (b"z", 3, None), None, (b"twice", 3, None), (b"9", 3, None)
    ]  # fmt: skip
    assert shard.table.seq == 3 and len(shard.table) == 3


def test_deadlines_inside(shard: Shard) -> None:
    """Given, read, moved with the value, and over at once; what is over is absent for the next operation."""
    assert shard.run(
        (op.TTL, b"k"), (op.DEADLINE_OF, b"k"), (op.RENAME, b"k", b"l", False), (op.TTL, b"l"), (op.PERSIST, b"l"),
        (op.PERSIST, b"l"), (op.EXPIRE_IF, b"l", op.IN_MS, 7, op.IF_ABSENT), (op.DEADLINE_OF, b"l"), (op.GET, b"l"),
        (op.PUT, b"p", b"x", 0), (op.EXISTS, b"p"), (op.ADD, b"p", b"y"), (op.EXPIRE, b"n", 0), (op.GET, b"n"),
        (op.STORE, b"q", b"x", op.AT_MS, STAMP, op.ALWAYS, None, False), (op.TAKE, b"q"), (op.TTL, b"q"), at_ms=1,
    ) == [[
        99, STAMP + 100, op.RENAMED, 99, True, False, True, STAMP + 8, [b"value", 3, 7],
        3, False, 3, True, None, True, None, None,
    ]]  # fmt: skip
    assert shard.cell(b"l", 7) == (b"value", 3, 1) and shard.cell(b"l", 8) is None
    assert shard.cell(b"p") == (b"y", 3, None)


def test_errors_are_results_and_undo_nothing(shard: Shard) -> None:
    """What was done before and after an operation that fails stays."""
    [[first, failed, exists, last]] = shard.run(
        (op.APPEND, b"k", b"!"), (op.INCR, b"k", 1), (op.ADD, b"n", b"x"), (op.INCR, b"n", 1)
    )
    assert (first, failed[0], exists[0], exists[2], last) == (6, Code.NOT_A_NUMBER, Code.EXISTS, {"rev": 2}, 6)
    assert shard.cell(b"k") == (b"value!", 3, 100) and shard.cell(b"n") == (b"6", 3, None)


def test_nothing_and_only_reads(shard: Shard) -> None:
    """They are entries without effect."""
    assert shard.run() == [[]] and shard.run((op.EXISTS, b"k"), (op.EXISTS, b"x")) == [[True, False]]
    assert shard.table.seq == 4 and msgpack.unpackb(shard.table.last_entry)[3] == []


def test_watched_keys(shard: Shard) -> None:
    """Revisions are compared as they are before the first operation; one that is expired is absent."""
    take = (op.TAKE, b"n")
    assert shard.run(take, watched=[(b"n", 1)]) is None
    assert shard.run(take, watched=[(b"n", 2), (b"x", 5)]) is None
    assert shard.run(take, watched=[(b"n", 2), (b"k", 0)]) is None
    assert shard.run(take, watched=[(b"n", 0)]) is None
    assert shard.run(take, watched=[(b"n", 2), (b"k", 1)], at_ms=100) is None
    assert shard.table.seq == 7 and shard.cell(b"n") == (b"5", 2, None)
    assert msgpack.unpackb(shard.table.last_entry)[3] == []
    assert shard.run(take, (op.PUT, b"n", b"6"), watched=[(b"n", 2), (b"k", 0), (b"x", 0)], at_ms=100) == [[b"5", 8]]
    assert shard.run(take, watched=[(b"n", 8)]) == [[b"6"]]


def test_many_removals_of_one_key(shard: Shard) -> None:
    """Effects that only remove name each key once, however often it is asked for."""
    results = shard.run((op.DELETE, b"k"), (op.DELETE, b"k"), (op.TAKE, b"k"), (op.EXPIRE, b"n", -1), (op.DELETE, b"n"))
    assert results == [[True, False, None, True, False]]
    assert msgpack.unpackb(shard.table.last_entry)[3] == [[op.REMOVE, b"k"], [op.REMOVE, b"n"]]
    assert len(shard.table) == 0


def refused(shard: Shard, what: str, *ops: tuple[Any, ...]) -> bool:
    """Whether a transaction is refused for this reason; then nothing of it happened."""
    before = shard.table.digest()
    result = shard.run(*ops)
    if len(result) == 1:
        return False
    assert result[0] == Code.TOO_LARGE and f"the {what} of this" in result[1] and result[2].keys() == {"bytes_max"}
    assert shard.table.digest() == before and msgpack.unpackb(shard.table.last_entry)[3] == []
    return True


def test_limit_of_changes(shard: Shard) -> None:
    """MULTI_BYTES_MAX of keys and values that are set; reached and not exceeded."""
    half = bytes(VALUE_BYTES_MAX - transaction.EFFECT_BYTES - 1)
    puts = ((op.PUT, b"a", half), (op.PUT, b"b", half))
    assert 2 * (len(half) + 1 + transaction.EFFECT_BYTES) == MULTI_BYTES_MAX
    assert not refused(shard, "changes", *puts)
    assert refused(shard, "changes", (op.INCR, b"n", 1), *puts, (op.DELETE, b"k"))
    assert shard.cell(b"n") == (b"5", 2, None)


def test_limit_of_results(shard: Shard) -> None:
    """MGET_VALUES_BYTES_MAX of values among the results, whichever operation gives them; copies cost nothing else."""
    shard.put(b"big", bytes(VALUE_BYTES_MAX))
    shard.put(b"rest", bytes(MGET_VALUES_BYTES_MAX - VALUE_BYTES_MAX))
    reads = ((op.GET, b"big"), (op.TOUCH, b"rest", op.KEEP_DEADLINE, 0))
    assert not refused(shard, "results", *reads)
    assert refused(shard, "results", *reads, (op.GET, b"n"))
    assert refused(shard, "results", *reads, (op.TAKE, b"n"))
    assert not refused(shard, "changes", *[(op.COPY, b"big", b"%d" % copy, True) for copy in range(50)])
    assert shard.cell(b"49")[0] is shard.cell(b"big")[0], "the same bytes"


@pytest.mark.parametrize("begin", ["large", "small", "absent"])
def test_limit_of_changed_values(shard: Shard, monkeypatch: pytest.MonkeyPatch, begin: str) -> None:
    """What is changed in places is copied each time; a gap that a change leaves counts like what was there."""
    monkeypatch.setattr(transaction, "TRANSACTION_COPY_BYTES_MAX", 10_000)
    if begin == "large":
        shard.put(b"a", bytes(1_000))
        changes = [(op.SETBIT, b"a", 8 * n, 1) for n in range(11)]
    else:
        for n in range(11 if begin == "small" else 0):
            shard.put(b"%d" % n, b"x")
        changes = [(op.SETRANGE, b"%d" % n, 999, b"x") for n in range(11)]
    assert not refused(shard, "changed values", *changes[:10])
    if begin != "large":
        changes = [(op.SETRANGE, b"new%d" % n, 999, b"x") for n in range(11)] if begin == "absent" else changes
    assert refused(shard, "changed values", *changes)


def test_a_small_transaction_cannot_fill_the_memory(shard: Shard) -> None:
    """Forty new keys of 8 MiB of zeros would be 320 MiB from a kilobyte."""
    assert refused(shard, "changed values", *[(op.SETBIT, b"%d" % n, VALUE_BYTES_MAX * 8 - 1, 1) for n in range(40)])
    assert TRANSACTION_COPY_BYTES_MAX < 40 * VALUE_BYTES_MAX


@pytest.mark.parametrize("kind", [op.PURGE, op.CLEAR, op.TRANSACTION, op.COUNT, op.REVISION, 63])
def test_what_cannot_be_part_of_it(shard: Shard, kind: int) -> None:
    """Nothing on many keys, and no transaction in a transaction: the sender is mistaken, and nothing changes."""
    before = shard.table.position, shard.table.digest()
    with pytest.raises(ProtocolError, match="cannot be part of a transaction"):
        shard.table.apply([op.TRANSACTION, 0, 3, 1, b"k", [], [[op.TAKE, b"k"], [kind, b"k", 1]]], STAMP)
    assert (shard.table.position, shard.table.digest()) == before


def test_bytes_of_results() -> None:
    """Of values, of what a transaction has of them, of the sentences of its errors; other results are small."""
    assert [result_bytes(result) for result in (7, None, True, [20, "exists", {}])] == [0, 0, 0, 0]
    assert result_bytes(b"12345") == 5
    assert result_bytes([[]]) == 0
    assert result_bytes([[b"12345", (b"123", 1, None), None, 7]]) == 8 + 4 * 16
    assert result_bytes([[[20, "a sentence", {}]]]) == 16 + 64 + 10
