"""Tests of the replica: HELLO, batches in order, results in pieces, flags, freezes."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.errors import Code
from kvtcp.protocol.link import LINK_VERSION
from kvtcp.protocol.operations import (
    ADD,
    CHAIN_AT,
    COUNT,
    EXISTS,
    FREEZE,
    GET,
    MGET,
    PAGE,
    PUT,
    TTL,
)  # fmt: skip
from kvtcp.replication import replica as replica_module
from kvtcp.replication.replica import FLAG_INTERVAL_MS, Refused, Replica
from kvtcp.storage.table import SequenceError


def hello(epoch: int = 1, coordinator: bytes = b"c", **changes: Any) -> dict[bytes, Any]:
    """The fields of a HELLO."""
    fields = {
        b"version": LINK_VERSION, b"epoch": epoch, b"coordinator": coordinator, b"node": b"n1", b"shards": [0, 1],
    }  # fmt: skip
    return fields | {name.encode(): value for name, value in changes.items()}


@pytest.fixture
def replica() -> Replica:
    """A replica that said HELLO, with `a` in shard 0 and `b`, living until stamp 150, in shard 1."""
    node = Replica("n1", "d", 42)
    node.hello(hello())
    batch(node, 100, (PUT, 0, 1, 0, b"a", b"va"), (PUT, 1, 1, 0, b"b", b"vb", 50))
    return node


def batch(node: Replica, stamp_ms: int, *items: Any) -> list[Any]:
    """Apply a batch whole; its results."""
    results: list[Any] = []
    node.begin(stamp_ms, items)
    assert node.run(results)
    node.check()
    return results


def test_report(replica: Replica) -> None:
    """What a node has: positions, the highest stamp, its promise."""
    report = replica.report()
    chains = [replica.tables[n].chain for n in (0, 1)]
    assert report["shards"] == [[0, 1, 1, chains[0]], [1, 1, 1, chains[1]]]
    assert (report["node"], report["disk"], report["pid"], report["stamp_ms"], report["promised"]) == (
        "n1", "d", 42, 100, 1,
    )  # fmt: skip
    assert report["durability"] == "memory" and report["version"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (hello(version=99), "VERSION"),
        (hello(node=b"n2"), "NODE"),
        (hello(epoch=4), "FENCED"),
        (hello(epoch=5, coordinator=b"d"), "FENCED"),
    ],
)
def test_refused_hello_changes_nothing(replica: Replica, fields: dict[bytes, Any], code: str) -> None:
    """R5: an epoch below the promise, or the same of another coordinator, is refused."""
    replica.hello(hello(epoch=5))
    before = replica.report()
    with pytest.raises(Refused) as refused:
        replica.hello(fields)
    assert refused.value.code == code and replica.report() == before


def test_hello_of_a_new_epoch(replica: Replica) -> None:
    """The tables stay; new entries carry the epoch; ordinals begin again."""
    assert replica.applied == 2
    replica.hello(hello(epoch=7, coordinator=b"d"))
    assert (replica.promised, replica.coordinator, replica.applied) == (7, "d", 0)
    batch(replica, 101, (PUT, 0, 2, 0, b"a", b"w"))
    assert replica.tables[0].position[:2] == (7, 2)


def test_reads_and_writes_in_order(replica: Replica) -> None:
    """A read sees exactly the items before it; only writes with the bit and reads have results."""
    results = batch(
        replica, 110,
        (GET, 0, b"a"), (PUT, 0, 2, 0, b"a", b"new"), (GET, 0, b"a"), (ADD, 0, 3, 1, b"c", b"vc"),
        (ADD, 0, 4, 1, b"c", b"again"), (EXISTS, 0, b"c"), (EXISTS, 0, b"x"), (TTL, 1, b"b"), (TTL, 0, b"x"),
        (COUNT, [0, 1], b"", None), (CHAIN_AT, 0),
    )  # fmt: skip
    assert results[:3] == [(b"va", 1, None), (b"new", 2, None), 3]
    assert results[3][0] == Code.EXISTS
    assert results[4:] == [[3], None, (1, 40), None, 3, (4, replica.tables[0].chain)]
    assert replica.applied == 13 and replica.operations == 13


def test_page_and_mget(replica: Replica) -> None:
    """Both see several shards at one stamp; an expired key is not there."""
    page, mget = batch(
        replica, 110, (PAGE, [0, 1], b"", None, 10, False, True), (MGET, [[1, b"b"], [0, b"a"], [0, b"x"]])
    )
    assert page == ([[b"a", None, 1, None], [b"b", None, 1, 40]], False)
    assert mget == [(b"vb", 1, 40), (b"va", 1, None), None]
    assert batch(replica, 150, (MGET, [[1, b"b"]]), (COUNT, [1], b"", None)) == [[None], 0]


def test_mget_that_is_too_large(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error with the limit, in the place of the result."""
    monkeypatch.setattr(replica_module, "MGET_VALUES_BYTES_MAX", 3)
    code, text, details = batch(replica, 110, (MGET, [[0, b"a"], [1, b"b"]]))[0]
    assert code == Code.TOO_LARGE and "over 3 bytes" in text and details == {"bytes_max": 3}


def test_results_in_pieces(replica: Replica) -> None:
    """`run` stops when enough bytes are ready, counting what reads really return, and goes on where it was."""
    batch(replica, 101, (PUT, 0, 2, 0, b"a", b"x" * 100))
    items = [
        (GET, 0, b"a"), (GET, 0, b"none"), (MGET, [[0, b"a"], [0, b"none"]]),
        (PAGE, [0], b"", None, 1, False, False), (PAGE, [0], b"", None, 1, False, True), (EXISTS, 0, b"a"),
        (GET, 0, b"a"),
    ]  # fmt: skip
    replica.begin(102, items)
    pieces = []
    finished = False
    while not finished:
        piece: list[Any] = []
        finished = replica.run(piece, 99)
        pieces.append(len(piece))
    assert pieces == [1, 2, 1, 3, 0]
    assert replica.applied == 3 + len(items)
    replica.begin(103, [(PAGE, [0, 1], b"", None, 9, False, True)] * 3)
    assert not replica.run([], 1), "a page of several rows counts as a whole one"


def test_batch_before_the_last_is_finished(replica: Replica) -> None:
    """Its items would be lost: a defect. A new link drops them on purpose."""
    replica.begin(101, [(GET, 0, b"a"), (GET, 0, b"a")])
    assert not replica.run([], 0)
    with pytest.raises(AssertionError, match="is finished before"):
        replica.begin(102, [])
    replica.hello(hello())
    assert batch(replica, 103, (EXISTS, 0, b"a")) == [[1]] and replica.applied == 1


def test_gap_stops_the_node(replica: Replica) -> None:
    """I1: a number that is not the next one raises, and so does an operation or a shard that is not known."""
    for error, item in ((SequenceError, (PUT, 0, 3, 0, b"a", b"v")), (ValueError, (99, 0)), (KeyError, (GET, 5, b"a"))):
        replica.hello(hello())
        replica.begin(101, [item])
        with pytest.raises(error):
            replica.run([])


def test_flags(replica: Replica) -> None:
    """Shards with expired keys are flagged once per interval of stamps; taking the flags clears them."""
    assert replica.take_flags() == []
    batch(replica, 100 + FLAG_INTERVAL_MS - 1)
    assert replica.take_flags() == []
    batch(replica, 100 + FLAG_INTERVAL_MS)
    assert replica.take_flags() == [1] and replica.take_flags() == []


def test_stamps_are_remembered(replica: Replica) -> None:
    """The highest stamp is reported; an older one, of a batch that was sent again, does not lower it."""
    batch(replica, 90, (PUT, 0, 2, 0, b"z", b"v"))
    assert replica.stamp_ms == 100


def test_freeze(replica: Replica) -> None:
    """A freeze is exact at its place in the batch, and left for the server."""
    chains = [replica.tables[number].chain for number in (0, 1)]
    (frozen,) = batch(replica, 120, (FREEZE, [0, 1], b"name", b"/dir"), (PUT, 0, 2, 0, b"later", b"v"))
    assert frozen == [[0, 1, 1, chains[0]], [1, 1, 1, chains[1]]]
    request = replica.freezes.popleft()
    assert (request.name, request.directory, request.stamp_ms) == ("name", "/dir", 120)
    assert [row[0] for row in request.frozen[0].next_rows(10)] == [b"a"]
