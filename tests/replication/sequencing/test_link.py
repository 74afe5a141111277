"""Tests of Link: stages, ordinals, frames that cannot be true, and what survives a lost link."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.protocol.operations import ADD, GET, PUT
from kvtcp.replication.sequencing import link as link_module
from kvtcp.replication.sequencing.link import ANSWERED, Link, LinkError, Op


def read_op(name: str) -> Op:
    """A read op; only its identity matters here."""
    return [GET, name]


def fill(link: Link, *items: tuple[Any, Op | None], stamp_ms: int = 1) -> None:
    """One closed batch of items with the ops that wait for them."""
    batch = link.new_batch(stamp_ms)
    for item, op in items:
        batch.items.append(item)
        batch.bytes += 10
        link.items += 1
        link.bytes += 10
        if item[0] < GET:
            batch.last_seqs[item[1]] = item[2]
        if op is not None:
            batch.answers.append(op)
    link.close_batch()


def linked() -> Link:
    """A link that is up."""
    link = Link("n1")
    link.connected = True
    return link


def put(seq: int) -> tuple[Any, ...]:
    """A put to shard 0 that nobody answers."""
    return (PUT, 0, seq, 0, b"k", b"v")


def test_stages() -> None:
    """A batch goes through the four stages and leaves the window when it is acknowledged."""
    link = linked()
    op = read_op("a")
    fill(link, (put(1), None), ((GET, 0, b"k"), op))
    link.check()
    assert link.next_outgoing(7) is not None and link.next_outgoing(7) is None
    assert link.written[0].written_ms == 7 and link.written_ordinal == 2
    assert link.on_applied(2, 0, ["r"]) == ([op], ["r"])
    link.check()
    assert link.on_durable(1) == [] and link.items == 2, "acknowledgements fall on ends of batches"
    assert [batch.last_seqs for batch in link.on_durable(2)] == [{0: 1}]
    assert (link.items, link.bytes) == (0, 0)
    link.check()


def test_one_frame_for_several_batches() -> None:
    """The results of several batches in one frame are given to their ops in order."""
    link = linked()
    ops = [read_op(str(n)) for n in range(5)]
    fill(link, ((GET, 0, b"a"), ops[0]), ((GET, 0, b"b"), ops[1]))
    fill(link, (put(1), None))
    fill(link, ((GET, 0, b"c"), ops[2]), ((GET, 0, b"d"), ops[3]))
    fill(link, ((GET, 0, b"e"), ops[4]))
    while link.next_outgoing(0):
        pass
    assert link.on_applied(5, 5, [1, 2, 3, 4]) == (ops[:4], [1, 2, 3, 4])
    assert link.on_applied(6, 6, [5]) == (ops[4:], [5])


def test_results_of_a_batch_in_pieces() -> None:
    """While the ordinal stands still results are handed on as they come; the batch counts when it is complete."""
    link = linked()
    ops = [read_op(str(n)) for n in range(3)]
    fill(link, *(((GET, 0, b"k"), op) for op in ops))
    fill(link, ((GET, 0, b"k"), read_op("next")))
    link.next_outgoing(0)
    link.next_outgoing(0)
    assert link.on_applied(0, 0, [1]) == (ops[:1], [1])
    link.check()
    with pytest.raises(LinkError, match="3 results that nobody asked for"):
        link.on_applied(0, 0, [2, 3, 4])
    assert link.on_applied(0, 0, [2]) == (ops[1:2], [2])
    assert len(link.written) == 2 and not link.applied
    assert link.on_applied(3, 3, [3]) == (ops[2:], [3])
    assert link.on_applied(3, 3, []) == ([], []), "a heartbeat changes nothing"
    assert link.answered == 0 and len(link.applied) == 1


def test_pieces_of_two_batches_in_one_frame() -> None:
    """The rest of one batch, a whole one and the beginning of a third may come together."""
    link = linked()
    ops = [read_op(str(n)) for n in range(6)]
    for first in (0, 2, 4):
        fill(link, *(((GET, 0, b"k"), op) for op in ops[first : first + 2]))
        link.next_outgoing(0)
    assert link.on_applied(0, 0, [0]) == (ops[:1], [0])
    assert link.on_applied(4, 4, [1, 2, 3, 4]) == (ops[1:5], [1, 2, 3, 4])
    link.check()
    assert (link.answered, len(link.written)) == (1, 1)
    assert link.on_applied(6, 6, [5]) == (ops[5:], [5])


@pytest.mark.parametrize(
    ("ordinal", "durable", "results", "text"),
    [
        (4, 0, [1, 2], "the last one sent is 3"), (3, 4, [1, 2], "the last one sent is 3"),
        (2, 3, [1], "applied ordinal 2, 3 durably"), (2, 0, [], "sent 0 results, 1 were due up to ordinal 2"),
        (3, 3, [1, 2, 3], "1 results that nobody asked for"), (2, 0, [1, 2, 3], "2 results that nobody asked for"),
        (0, 0, [1, 2], "2 results that nobody asked for"),
    ],
)  # fmt: skip
def test_frames_that_cannot_be_true(ordinal: int, durable: int, results: list[Any], text: str) -> None:
    """A wrong frame raises and changes nothing: what waits is moved or kept when the link is closed for it."""
    link = linked()
    ops = [read_op("a"), read_op("b")]
    fill(link, (put(1), None), ((GET, 0, b"k"), ops[0]))
    fill(link, ((GET, 0, b"k"), ops[1]))
    fill(link, (put(2), None))  # closed and not written: the node cannot have applied it
    link.next_outgoing(0)
    link.next_outgoing(0)
    with pytest.raises(LinkError, match=text):
        link.on_applied(ordinal, durable, results)
    link.check()
    assert not link.applied and len(link.written) == 2 and not link.answered
    kept, reads = link.disconnect("wrong frame")
    assert [batch.items for batch in kept] == [[put(1)], [put(2)]] and reads == ops


def test_disconnect_keeps_writes_and_returns_reads() -> None:
    """Batches stay apart with their stamps; writes with a result are marked; reads without a result come back."""
    link = linked()
    waiters: list[Op] = [[0, "w", n, None] for n in range(3)]
    reads = [read_op(str(n)) for n in range(3)]
    for n in range(3):
        fill(link, ((ADD, 0, n + 1, 1, b"k", b"v"), waiters[n]), ((GET, 0, b"k"), reads[n]), stamp_ms=n + 10)
    link.next_outgoing(0)
    link.next_outgoing(0)
    link.on_applied(2, 0, [1, 2])
    link.on_applied(2, 0, [1])  # a part of the second batch
    link.full = True
    kept, moved = link.disconnect("gone")
    assert [batch.stamp_ms for batch in kept] == [10, 11, 12]
    assert [batch.answers for batch in kept] == [[ANSWERED], [waiters[1]], [waiters[2]]]
    assert [batch.last_seqs for batch in kept] == [{0: 1}, {0: 2}, {0: 3}]
    assert moved == reads[1:]
    assert (link.connected, link.full, link.reason, link.items, link.last_ordinal) == (False, False, "gone", 0, 0)
    link.check()


def test_disconnect_after_reads_were_moved() -> None:
    """Only reads that could not be queued elsewhere come back; a batch of reads alone is not kept."""
    link = linked()
    ops = [read_op("a"), read_op("b")]
    fill(link, ((GET, 0, b"k"), ops[0]), ((GET, 0, b"k"), ops[1]))
    link.outgoing[0].unmoved = [ops[1]]
    kept, moved = link.disconnect("gone")
    assert kept == [] and moved == [ops[1]]


def test_new_batch_closes_the_open_one() -> None:
    """A second stamp is a second batch."""
    link = linked()
    first = link.new_batch(1)
    first.items.append(put(1))
    link.items += 1
    second = link.new_batch(2)
    assert list(link.outgoing) == [first] and link.open is second and first.last_ordinal == 1
    link.close_batch()
    link.close_batch()
    assert len(link.outgoing) == 2


def test_drop_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed batches behind an uncommitted one are forgotten, and not looked for again at once."""
    monkeypatch.setattr(link_module, "UNCOMMITTED_MAX", 4)
    link = linked()
    for seq in range(1, 8):
        fill(link, (put(seq), None))
    link.drop_committed(lambda shard, seq: seq not in (1, 5))
    assert list(link.uncommitted) == [(0, {0: 1}), (4, {0: 5})] and link.uncommitted_max == 8
