"""Table: results, reads, entries and chain against a plain dict; the same log gives the same table everywhere."""

import os
import subprocess
import sys
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtcp.constants import INTEGER_MAX, PURGE_KEYS_MAX, TTL_MS_MAX
from kvtcp.errors import Code, DataError, ProtocolError
from kvtcp.protocol import operations as op
from kvtcp.storage.shard.table import ChainError, SequenceError, Table
from tests.support import table_items as tools


def plain(result: Any) -> Any:
    """A result as the model gives it: an error without its sentence, which must be there, also in a transaction."""
    if isinstance(result, list):
        if len(result) == 1:
            return [[plain(each) for each in result[0]]]
        code, message, details = result
        assert isinstance(message, str) and message
        return Code(code), details
    return result


def write(table: Table, kind: int, key: bytes, *args: Any, stamp_ms: int = tools.STAMP) -> Any:
    """Apply the next item."""
    return table.apply([kind, table.shard, table.seq + 1, 0, key, *args], stamp_ms)


BOOLEAN = (op.DELETE, op.EXPIRE, op.PERSIST, op.EXPIRE_IF, op.COPY, op.PUT_ALL)


class TableMachine(RuleBasedStateMachine):
    """Random writes and reads on a table with tiny leaves, a replica with other leaves, one that replays the entries,
    and a model; time goes on in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(3, leaf_keys_max=4, fresh_keys_max=3)
        self.replica = Table(3, leaf_keys_max=7, fresh_keys_max=1)
        self.replayed = Table(3, leaf_keys_max=5)
        self.model: tools.Model = {}
        self.stamp_ms = tools.STAMP

    @rule(write=tools.write_items(), passed_ms=st.sampled_from([0, 0, 0, 1, 5]))
    def write(self, write: list[Any], passed_ms: int) -> None:
        self.stamp_ms += passed_ms
        chain, seq = self.table.chain, self.table.seq + 1
        result = self.table.apply(tools.as_item(write, seq), self.stamp_ms)
        assert plain(result) == tools.run_model(self.model, write, seq, self.stamp_ms)
        assert isinstance(result, bool) == (write[0] in BOOLEAN or (write[0] == op.STORE and not write[-1]))
        assert self.table.seq == seq
        assert self.table.chain == zlib.crc32(self.table.last_entry, chain)
        assert msgpack.unpackb(self.table.last_entry)[:3] == [0, seq, self.stamp_ms]
        assert self.replica.apply(tuple(tools.as_item(write, seq)), self.stamp_ms) == result
        self.replayed.apply_entry(self.table.last_entry, self.table.chain)

    @rule(
        write=tools.transactions(),
        watched=st.lists(st.tuples(tools.HOT, st.sampled_from([0, 0, 0, 0, 1])), min_size=1, max_size=3),
        passed_ms=st.sampled_from([0, 0, 1, 5]),
    )
    def transaction_of_watched_keys(
        self, write: tuple[Any, ...], watched: list[tuple[bytes, int]], passed_ms: int
    ) -> None:
        """The revisions are those that were read before, but for a few; keys may expire in between."""
        seen = tools.visible(self.model, self.stamp_ms)
        pairs = [(key, (seen[key][1] if key in seen else 0) + wrong) for key, wrong in watched]
        self.write([op.TRANSACTION, write[1], pairs, write[3]], passed_ms)

    @rule(count=st.integers(1, 40))
    def put_many(self, count: int) -> None:
        for number in range(count):
            self.write([op.PUT, b"many%02d" % number, b"v"], 0)

    @rule(key=tools.KEYS, passed_ms=st.integers(0, 12))
    def read_key(self, key: bytes, passed_ms: int) -> None:
        """Reads may carry a later stamp than the last write."""
        stamp_ms = self.stamp_ms + passed_ms
        row = tools.visible(self.model, stamp_ms).get(key)
        if row is None:
            expected = None
        else:
            expected = (row[0], row[1], None if row[2] is None else row[2] - stamp_ms)
        assert self.table.get(key, stamp_ms) == expected
        assert self.table.exists(key, stamp_ms) == (expected and expected[1])
        assert self.table.ttl(key, stamp_ms) == (expected and expected[1:])
        assert self.table.deadline_of(key, stamp_ms) == (row and row[1:])

    @rule(number=st.integers(0, 2**62), passed_ms=st.integers(0, 12))
    def read_any_key(self, number: int, passed_ms: int) -> None:
        """The key at this place of all that are physically there, or the next one that is visible."""
        stamp_ms = self.stamp_ms + passed_ms
        keys, seen = sorted(self.model), tools.visible(self.model, stamp_ms)
        place = number % len(keys) if keys else 0
        following = [key for key in (*keys[place:], *keys[:place]) if key in seen]
        assert self.table.any_key(number, stamp_ms) == (following[0] if following else None)

    @rule(
        lower=st.just(b"") | tools.KEYS, upper=st.none() | tools.KEYS, limit=st.none() | tools.LIMITS,
        reverse=st.booleans(), ms=st.integers(0, 12),
    )  # fmt: skip
    def read_range(self, lower: bytes, upper: bytes | None, limit: int | None, reverse: bool, ms: int) -> None:
        stamp_ms = self.stamp_ms + ms
        seen = tools.visible(self.model, stamp_ms)
        keys = sorted((k for k in seen if k >= lower and (upper is None or k < upper)), reverse=reverse)
        assert self.table.count(lower, upper, stamp_ms) == len(keys)
        assert self.table.has_expired(stamp_ms) == (len(seen) < len(self.model))
        rows = [(k, v, rev, None if d is None else d - stamp_ms) for k in keys for v, rev, d in [seen[k]]]
        expected = rows if limit is None else rows[: max(0, limit)]
        assert self.table.rows(lower, upper, limit, reverse, stamp_ms) == expected

    @rule()
    def load_elsewhere(self) -> None:
        """A table loaded from rows has the same position and digest, and goes on with the same chain."""
        keys = sorted(self.model)
        pieces = [(keys[n : n + 3], [self.model[key] for key in keys[n : n + 3]]) for n in range(0, len(keys), 3)]
        self.replayed.load(pieces, 0, self.table.seq, self.table.chain)

    @invariant()
    def holds(self) -> None:
        for table in (self.table, self.replica, self.replayed):
            table.check()
            assert len(table) == table.keys_count == len(self.model)
            assert table.position == self.table.position
        assert self.table.digest() == self.replica.digest() == self.replayed.digest()


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@settings(deadline=None, max_examples=150)
@given(st.lists(tools.write_items(), min_size=1, max_size=25), st.lists(st.integers(0, 2**63), max_size=25))
def test_apply_is_total(writes: list[list[Any]], stamps: list[int]) -> None:
    """No item of valid types raises, at any stamps in ascending order; every one is one entry."""
    table = Table(leaf_keys_max=4, fresh_keys_max=2)
    stamps = sorted(stamps) or [0]
    for seq, item in enumerate(writes, 1):
        table.apply(tools.as_item(item, seq), stamps[min(seq, len(stamps)) - 1])
        assert table.seq == seq
    table.check()


def test_golden_entries(table: Table) -> None:
    """The bytes of entries are logged and shipped: a change here is a change of the log's format."""
    table.epoch = 2
    assert write(table, op.PUT, b"k", b"v", stamp_ms=3) == 1
    assert table.last_entry == bytes.fromhex("94 02 01 03 91 94 01 c401 6b c401 76 c0")
    write(table, op.EXPIRE, b"k", 10, stamp_ms=3)
    assert table.last_entry == bytes.fromhex("94 02 02 03 91 93 03 c401 6b 0d")
    write(table, op.DELETE, b"k", stamp_ms=4)
    assert table.last_entry == bytes.fromhex("94 02 03 04 91 92 02 c401 6b")
    write(table, op.DELETE, b"k", stamp_ms=4)
    assert table.last_entry == bytes.fromhex("94 02 04 04 90")
    write(table, op.PUT, b"k", b"v", 7, stamp_ms=4)
    write(table, op.CLEAR, b"", None, 10, stamp_ms=4)
    assert table.last_entry == bytes.fromhex("94 02 06 04 91 91 04")
    assert (table.position, len(table)) == ((2, 6, 0xF2D28082), 0)


def test_chain_does_not_depend_on_the_hash_seed() -> None:
    """Two processes with different hash seeds come to the same chain and digest."""
    program = """
from kvtcp.protocol import operations as op
from kvtcp.storage.shard.table import Table
table = Table(leaf_keys_max=4, fresh_keys_max=5)
for seq in range(1, 400):
    key = b"k%d" % (seq * 7919 % 101)
    kind = [op.PUT, op.PUT, op.ADD, op.DELETE, op.PURGE, op.CLEAR][seq % 6]
    args = {op.PUT: [key, b"v", seq % 5 or None], op.ADD: [key, b"w"], op.DELETE: [key], op.PURGE: [b"", 3],
            op.CLEAR: [key, None, 2]}[kind]
    table.apply([kind, 0, seq, 0, *args], seq)
print(table.chain, table.digest(), len(table))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().strip()


def test_conditions_and_deadlines_of_each_operation(table: Table) -> None:
    """The table of operations in the protocol, line by line: which keep, clear or set a deadline, and which revision
    they leave."""
    assert write(table, op.ADD, b"k", b"1", 100) == 1
    assert write(table, op.CAS, b"k", b"2", None, 1) == 2
    assert write(table, op.CAS, b"k", b"3", b"2") == 3
    assert write(table, op.INCR, b"k", 4) == 7
    assert table.get(b"k", tools.STAMP) == (b"7", 4, 100)
    assert write(table, op.PUT, b"k", b"8", None, True, stamp_ms=tools.STAMP + 1) == 5
    assert table.get(b"k", tools.STAMP + 1) == (b"8", 5, 99)
    assert write(table, op.PUT, b"k", b"9", 50, True, stamp_ms=tools.STAMP + 1) == 6
    assert table.ttl(b"k", tools.STAMP + 1) == (6, 50)
    assert write(table, op.PUT, b"k", b"9") == 7
    assert write(table, op.PERSIST, b"k") is False
    assert write(table, op.EXPIRE, b"k", 10) is True
    assert write(table, op.PERSIST, b"k") is True
    assert table.get(b"k", tools.STAMP) == (b"9", 10, None)
    assert write(table, op.EXPIRE, b"k", 10) is True
    assert write(table, op.DELETE, b"k", stamp_ms=tools.STAMP + 10) is False
    assert write(table, op.CAS, b"k", b"again", None, 0, stamp_ms=tools.STAMP + 10) == 13
    assert write(table, op.DELETE, b"k", b"other", 13) is False
    assert write(table, op.DELETE, b"k", b"again", 13) is True
    assert write(table, op.EXPIRE, b"k", 10) is False
    assert write(table, op.ADD, b"k", b"x", 5) == 17
    assert write(table, op.EXPIRE, b"k", 0) is True
    assert (len(table), table.has_expired(tools.STAMP + 99)) == (0, False)


def test_error_results_name_key_and_revision(table: Table) -> None:
    """The sentences of failed operations are built from the fields they are about."""
    write(table, op.PUT, b"user:1", b"x")
    assert write(table, op.ADD, b"user:1", b"y") == [
        Code.EXISTS, 'the key "user:1" exists with revision 1', {"rev": 1}
    ]  # fmt: skip
    assert write(table, op.CAS, b"user:1", b"y", None, 9) == [
        Code.MISMATCH, 'the key "user:1" has revision 1, not 9', {"rev": 1}
    ]  # fmt: skip
    assert write(table, op.CAS, b"user:1", b"y", b"z") == [
        Code.MISMATCH, 'the key "user:1" has revision 1 and another value than the expected one', {"rev": 1}
    ]  # fmt: skip
    assert write(table, op.CAS, b"none", b"y", None, 3) == [Code.MISMATCH, 'the key "none" is absent', {"rev": 0}]
    assert write(table, op.CAS, b"none", b"y") == [Code.BAD_REQUEST, 'cas of the key "none" has no condition', {}]
    assert write(table, op.INCR, b"user:1", 1) == [
        Code.NOT_A_NUMBER, 'the value of the key "user:1" is not a signed 64-bit decimal integer', {}
    ]  # fmt: skip
    assert write(table, op.INCR, b"n", INTEGER_MAX) == INTEGER_MAX
    assert write(table, op.INCR, b"n", 1) == [
        Code.RANGE, f'{INTEGER_MAX} + 1 at the key "n" exceeds 64 bits', {}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", [b"", b"-", b"+1", b"01", b"-0", b" 1", b"1 ", b"1_0", b"9223372036854775808", b"9" * 5000, "١".encode()]
)
def test_incr_takes_canonical_numbers_only(table: Table, text: bytes) -> None:
    """What int() would accept but incr would never write is not a number; nothing is changed."""
    write(table, op.PUT, b"n", text)
    assert plain(write(table, op.INCR, b"n", 1)) == (Code.NOT_A_NUMBER, {})
    assert table.get(b"n", tools.STAMP) == (text, 1, None)


def test_deadline_arithmetic_is_bounded(table: Table) -> None:
    """A ttl beyond the limit is the limit, one that is not positive expires at once."""
    write(table, op.PUT, b"long", b"", 2**64 - 1)
    write(table, op.PUT, b"short", b"", -(2**63))
    assert table.ttl(b"long", tools.STAMP) == (1, TTL_MS_MAX)
    assert table.get(b"short", tools.STAMP) is None
    assert (len(table), table.count(b"", None, tools.STAMP), table.has_expired(tools.STAMP)) == (2, 1, True)


def test_sequence_and_operations_are_checked() -> None:
    """An item out of order or of an unknown operation raises, and changes nothing."""
    table = Table(5)
    write(table, op.PUT, b"a", b"1")
    before = (table.position, table.digest(), table.last_entry)
    for seq in (0, 1, 3):
        with pytest.raises(SequenceError, match=f"shard 5: entry {seq} does not follow entry 1"):
            table.apply([op.PUT, 5, seq, 0, b"b", b"2"], tools.STAMP)
    with pytest.raises(ProtocolError, match="write operation 33 is not known"):
        table.apply([33, 5, 2, 0, b"b"], tools.STAMP)
    assert (table.position, table.digest(), table.last_entry) == before
    table.check()


def entry(seq: int, *effects: Any) -> bytes:
    packed: bytes = msgpack.packb([0, seq, tools.STAMP, list(effects)])
    return packed


@pytest.mark.parametrize(("packed", "error"), [
    (b"", DataError),
    (b"\xc1", DataError),
    (entry(2) + b"\x00", DataError),
    (msgpack.packb([0, 2, tools.STAMP]), DataError),
    (msgpack.packb([0, 2, tools.STAMP, 5]), DataError),
    (entry(2, [9, b"k"]), DataError),
    (entry(2, []), DataError),
    (entry(2, [op.SET, b"k", b"v"]), DataError),
    (entry(2, [op.DEADLINE, b"absent", 5]), DataError),
    (entry(2, [op.PATCH, b"absent", 0, b"x"]), DataError),
    (entry(2, [op.PATCH, b"a", 0]), DataError),
    (entry(2, [op.CLONE, b"b", b"absent"]), DataError),
    (entry(2, [op.SET, b"b", b"v", None], [op.DEADLINE, b"absent", 5]), DataError),
    (entry(2, [op.REMOVE, b"a"], [op.PATCH, b"a", 0, b"x"]), DataError),
    (entry(2, [op.REMOVE, b"a"], [op.CLONE, b"b", b"a"]), DataError),
    (entry(3), SequenceError),
])  # fmt: skip
def test_damaged_entries_are_refused(table: Table, packed: bytes, error: type[Exception]) -> None:
    """Bytes that are no entry, or not the next one, raise; the table stays as it was."""
    write(table, op.PUT, b"a", b"1")
    before = (table.position, table.digest(), table.last_entry)
    with pytest.raises(error):
        table.apply_entry(packed)
    assert (table.position, table.digest(), table.last_entry) == before


def test_chain_of_a_shipped_entry_is_verified(table: Table) -> None:
    """An entry whose sender came to another chain is refused."""
    with pytest.raises(ChainError, match="shard 0: the chain of entry 1 is"):
        table.apply_entry(entry(1), chain=1)
    assert table.seq == 0
    table.apply_entry(entry(1), chain=zlib.crc32(entry(1)))
    assert table.seq == 1


def test_load_refuses_rows_out_of_order() -> None:
    """A load that fails leaves the table as it was."""
    table = Table(4)
    write(table, op.PUT, b"a", b"1")
    before = table.position
    with pytest.raises(DataError, match="shard 4: rows are not in ascending order"):
        table.load([([b"b", b"a"], [(b"", 1, None), (b"", 1, 7)])], 1, 9, 9)
    assert (table.position, table.get(b"a", tools.STAMP)) == (before, (b"1", 1, None))
    table.load([([b"a"], [(b"x", 8, tools.STAMP + 5)])], 1, 9, 77)
    assert (table.position, table.epoch, table.last_entry) == ((1, 9, 77), 1, b"")
    assert table.get(b"a", tools.STAMP) == (b"x", 8, 5)


def test_position_has_the_epoch_of_the_last_entry(table: Table) -> None:
    """A new epoch is not in the position before it made an entry."""
    table.epoch = 1
    write(table, op.PUT, b"a", b"1")
    table.epoch = 2
    assert table.position[0] == table.freeze().epoch == 1
    write(table, op.PUT, b"a", b"1")
    assert table.position[0] == 2


def test_purge_and_clear_work_in_bounded_steps(table: Table) -> None:
    """A large shard is purged and cleared by several entries of limited size; only the last clear is a wipe."""
    keys = 3 * PURGE_KEYS_MAX
    for number in range(keys):
        write(table, op.PUT, b"%05d" % number, b"v", 1 if number % 2 else None)
    assert write(table, op.PURGE, b"", 300, stamp_ms=tools.STAMP + 1) == 300
    assert write(table, op.PURGE, b"", PURGE_KEYS_MAX, stamp_ms=tools.STAMP + 1) == keys // 2 - 300
    assert write(table, op.PURGE, b"", PURGE_KEYS_MAX, stamp_ms=tools.STAMP + 1) == 0
    assert len(table) == keys // 2
    effects = []
    while write(table, op.CLEAR, b"", None, 300):
        effects.append(msgpack.unpackb(table.last_entry)[3])
    assert [len(e) for e in effects] == [300, 300, 1]
    assert effects[-1] == [[op.WIPE]]
    assert len(table) == 0
    table.check()


def test_release() -> None:
    """A table that nobody needs any more lets go of keys, values and deadlines; not under an open scan."""
    table = Table(0, leaf_keys_max=4, fresh_keys_max=2)
    for seq in range(1, 40):
        table.apply((op.PUT, 0, seq, 0, b"k%d" % seq, b"v", 1000 if seq % 3 else None), 5)
    leaf = table._index.tree._head
    frozen = table.freeze()
    assert table.is_scanned
    with pytest.raises(AssertionError, match="open scan"):
        table.release()
    frozen.close()
    table.release()
    assert not table.is_scanned and not table._index.cells
    assert leaf.following is None and leaf.keys == []
