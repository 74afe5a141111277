"""A copy: a table and who it is."""

from kvtcp.protocol import operations as op
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Table


def test_a_new_copy() -> None:
    """It is complete and empty, generation 1."""
    copy = Copy(5, "disk")
    assert (copy.shard, copy.generation, copy.complete, copy.reason, copy.commit) == (5, 1, True, "", 0)
    assert copy.report() == [5, "disk", 1, True, 0, 0, 0, 0]


def test_the_table_knows_its_generation() -> None:
    """It is logged with every entry."""
    copy = Copy(5, "disk", generation=3)
    assert copy.table.generation == copy.generation == 3
    table = Table(6)
    copy = Copy(0, "disk", generation=2, table=table, complete=False, reason="lost")
    assert copy.table is table and table.generation == 2 and copy.shard == 6


def test_report() -> None:
    """The position is that of the table."""
    copy = Copy(2, "disk")
    copy.table.epoch = 4
    copy.table.apply((op.PUT, 2, 1, 0, b"k", b"v"), 100)
    copy.commit = 1
    assert copy.report() == [2, "disk", 1, True, 4, 1, copy.table.chain, 1]
