"""Frozen: the rows of a position, read in slices while everything changes."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtcp.protocol import operations as op
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.index import StoredRow
from kvtcp.storage.shard.table import Table
from tests.support.table_items import Model, as_item, run_model, write_items


class FreezeMachine(RuleBasedStateMachine):
    """Several scans, each with a copy of the model of its position, between random writes, wipes and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(1, leaf_keys_max=4, fresh_keys_max=3)
        self.model: Model = {}
        self.stamp_ms = 1000
        self.scans: list[tuple[Frozen, list[StoredRow], list[StoredRow]]] = []  # scan, rows expected, rows seen

    @rule(writes=st.lists(write_items(), min_size=1, max_size=8), passed_ms=st.integers(0, 3))
    def write(self, writes: list[list[Any]], passed_ms: int) -> None:
        self.stamp_ms += passed_ms
        for write in writes:
            seq = self.table.seq + 1
            self.table.apply(as_item(write, seq), self.stamp_ms)
            run_model(self.model, write, seq, self.stamp_ms)

    @rule(count=st.integers(1, 40))
    def put_many(self, count: int) -> None:
        self.write([[op.PUT, b"%02d" % number, b"many"] for number in range(count)], 0)

    @rule()
    def wipe(self) -> None:
        self.write([[op.CLEAR, b"", None, 10_000]], 0)
        assert len(self.table) == 0

    @rule()
    def load(self) -> None:
        """The table is replaced by a load: open scans go on."""
        self.table.load([([b"loaded"], [(b"x", 1, None)])], 0, self.table.seq + 1, self.table.chain)
        self.model = {b"loaded": (b"x", 1, None)}

    @precondition(lambda self: len(self.scans) < 4)
    @rule()
    def freeze(self) -> None:
        frozen = self.table.freeze()
        assert (frozen.epoch, frozen.seq, frozen.chain) == self.table.position
        assert frozen.rows_left == len(self.model)
        self.scans.append((frozen, [(key, *self.model[key]) for key in sorted(self.model)], []))

    @precondition(lambda self: self.scans)
    @rule(data=st.data(), limit=st.integers(1, 9))
    def read(self, data: st.DataObject, limit: int) -> None:
        scan = data.draw(st.sampled_from(self.scans))
        frozen, expected, seen = scan
        rows = frozen.next_rows(limit)
        seen += rows
        assert seen == expected[: len(seen)]
        assert len(rows) <= limit
        assert frozen.rows_left == len(expected) - len(seen)
        if not rows:
            assert seen == expected
            self.scans.remove(scan)

    @precondition(lambda self: self.scans)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        scan = data.draw(st.sampled_from(self.scans))
        scan[0].close()
        scan[0].close()
        self.scans.remove(scan)

    @invariant()
    def holds(self) -> None:
        self.table.check()
        for frozen, expected, seen in self.scans:
            passed = seen[-1][0] if seen else b""
            assert all(key > passed for key in frozen._saved), "saved cells are dropped when passed"
            assert not frozen._saved or len(seen) < len(expected)

    def teardown(self) -> None:
        for frozen, expected, seen in self.scans:
            while rows := frozen.next_rows(5):
                seen += rows
            assert seen == expected
            assert len(frozen._saved) == 0
        assert not self.table._frozen


TestFreezeMachine = FreezeMachine.TestCase
TestFreezeMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def filled(count: int) -> Table:
    table = Table()
    for number in range(count):
        table.apply([op.PUT, 0, number + 1, 0, b"%05d" % number, b"old"], 0)
    return table


def test_one_cell_is_saved_per_changed_key() -> None:
    """Many changes of one key save one cell, changes behind the scan none, and the scan drops what it passed."""
    table = filled(100)
    frozen = table.freeze()
    assert len(frozen.next_rows(50)) == 50
    for _ in range(3):
        for key in (b"00010", b"00060", b"00070", b"new", b"00055x"):
            table.apply([op.PUT, 0, table.seq + 1, 0, key, b"new"], 0)
    assert len(frozen._saved) == 4
    assert [row[1] for row in frozen.next_rows(30)] == [b"old"] * 29
    assert len(frozen._saved) == 1
    assert len(frozen.next_rows(30)) == 21
    assert (len(frozen._saved), frozen.next_rows(1)) == (0, [])


def test_keys_inserted_after_the_end_do_not_prolong_a_scan() -> None:
    """A scan that has returned all its rows is finished, however many keys came behind them."""
    table = filled(3)
    frozen = table.freeze()
    for number in range(500):
        table.apply([op.PUT, 0, table.seq + 1, 0, b"9%05d" % number, b"new"], 0)
    assert len(frozen.next_rows(10)) == 3
    assert len(frozen._saved) == 0
    assert frozen.next_rows(10) == []


def test_closed_scan_is_not_read() -> None:
    """Reading a scan after it was closed before its end is a programmer's error, not an empty shard."""
    frozen = filled(3).freeze()
    frozen.close()
    with pytest.raises(AssertionError, match="after close"):
        frozen.next_rows(1)
