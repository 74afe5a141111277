"""The state of a shard that is being learned, and of one that is donated."""

from __future__ import annotations

from kvtcp.constants import LEARN_ITEM_BYTES
from kvtcp.node.learning import Donation, Learning
from kvtcp.protocol.operations import DELETE, INCR, PUT
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Table


def table_at(seq: int) -> Table:
    """A table with so many puts."""
    table = Table(3)
    for number in range(1, seq + 1):
        table.apply((PUT, 3, number, 0, b"k%d" % number, b"v"), 5)
    return table


def test_what_is_buffered_is_counted() -> None:
    """An item counts with its keys and values, and something for itself."""
    learning = Learning(3, 7, "d", 2, None)
    sizes = [
        learning.put_off(5, (PUT, 3, 8, 0, b"key", b"value")), learning.put_off(6, (INCR, 3, 9, 0, b"key", 1)),
        learning.put_off(6, (DELETE, 3, 10, 0, b"key", None, 7)),
    ]  # fmt: skip
    assert sizes == [LEARN_ITEM_BYTES + 8, LEARN_ITEM_BYTES + 3, LEARN_ITEM_BYTES + 3]
    assert learning.bytes == sum(sizes) == sum(size for _, _, size in learning.buffer)
    assert [stamp for stamp, _, _ in learning.buffer] == [5, 6, 6] and learning.seen_seq == 10


def test_when_it_is_live() -> None:
    """It has a copy that is ready, nothing in the buffer, and the link has brought all that the copy has."""
    copy = Copy(3, "d", table=table_at(2))
    learning = Learning(3, 2, "d", 1, copy)
    assert not learning.fresh and not learning.is_live
    learning.is_ready = True
    assert learning.is_live
    learning.put_off(5, (PUT, 3, 3, 0, b"a", b"v"))
    assert not learning.is_live
    learning.buffer.clear()
    assert learning.is_live
    copy.table.apply((PUT, 3, 3, 0, b"a", b"v"), 5)
    copy.table.apply((PUT, 3, 4, 0, b"a", b"v"), 5)
    assert not learning.is_live, "number 4 is still to come"
    fresh = Learning(3, 2, "e", 2, None)
    fresh.is_ready = True
    assert fresh.fresh and not fresh.is_live


def test_a_donation() -> None:
    """It has the rows of its position whatever is written later, and lets go of the table."""
    table = table_at(3)
    donation = Donation(table.freeze(), (9, 50, 0))
    assert (donation.shard, donation.position, donation.keys) == (3, (9, 50, 0), 3)
    table.apply((DELETE, 3, 4, 0, b"k1"), 5)
    assert [row[0] for row in donation.frozen.next_rows(2)] == [b"k1", b"k2"]
    donation.close()
    donation.close()
    table.check()
    assert not table._frozen
