"""Tests of the replica: HELLO, batches in order, results in pieces, flags, freezes, entries kept and shipped."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import RECENT_ENTRY_BYTES
from kvtcp.errors import Code
from kvtcp.node import copies as copy_set
from kvtcp.node import replica as replica_module
from kvtcp.node import write_results
from kvtcp.node.replica import FLAG_INTERVAL_MS, OLDER_COPY, Refused, Replicas
from kvtcp.protocol import operations as op
from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import SequenceError, Table
from tests.support.replica_tools import batch, hello, make, put


@pytest.fixture
def replica() -> Replicas:
    """A replica that said HELLO, with `a` in shard 0 and `b`, living until stamp 150, in shard 1."""
    node = make()
    node.hello(hello())
    batch(node, 100, (op.PUT, 0, 1, 0, b"a", b"va"), (op.PUT, 1, 1, 0, b"b", b"vb", 50))
    return node


def test_report(replica: Replicas) -> None:
    """What a node has: positions, the highest stamp, its promise."""
    report = replica.report()
    chains = [replica.tables[n].chain for n in (0, 1)]
    assert report["shards"] == [[0, "d1", 1, True, 1, 1, chains[0], 0], [1, "d2", 1, True, 1, 1, chains[1], 0]]
    assert (report["node"], report["pid"], report["stamp_ms"], report["promised"]) == ("n1", 42, 100, 1)
    assert (report["durability"], report["map_version"], report["space"], report["damage"]) == ("memory", 3, 0, [])
    assert report["version"]


def test_the_report_of_a_hello_is_of_before(replica: Replicas) -> None:
    """It says what the node had: its map version is the highest seen before this HELLO. New shards are in it."""
    report = replica.hello(hello(epoch=2, map_version=9, shards=[0, 1, 5], map=b"{}"))
    assert report["map_version"] == 3 and report["shards"][2] == [5, "d3", 1, True, 0, 0, 0, 0]
    assert replica.map_version == 9 and replica.map == b"{}"
    assert replica.hello(hello(epoch=3, map_version=7))["map_version"] == 9 and replica.map_version == 9


def test_an_older_copy_of_the_directory() -> None:
    """A node that does not know the map which it once stored is another one: all its copies get new disks, once."""
    copies = [Copy(0, "old-0"), Copy(1, "old-1", complete=False, reason="damaged")]
    node = make(copies=copies, map_version=6)
    rows = node.hello(hello(epoch=2, map_version=9, heard_version=6))["shards"]
    assert [row[1] for row in rows] == ["old-0", "old-1"]
    node = make(copies=copies, map_version=5)
    report = node.hello(hello(epoch=2, map_version=9, heard_version=6))
    assert [row[1] for row in report["shards"]] == ["d1", "d2"]
    assert [row[1] for row in report["damage"]] == [OLDER_COPY, "damaged"]
    rows = node.hello(hello(epoch=3, map_version=10, heard_version=9))["shards"]
    assert [row[1] for row in rows] == ["d1", "d2"]


def test_what_was_recovered() -> None:
    """Copies, promise and entries of before a restart; an incomplete copy is reported with its reason and not used."""
    table = Table(0)
    table.apply((op.PUT, 0, 1, 0, b"a", b"v"), 5)
    whole, lost = Copy(0, "x", table=table, generation=4), Copy(1, "y", complete=False, reason="the log is damaged")
    node = make(durability="sync", copies=[whole, lost], promised=6, coordinator="c", map_version=8)
    for fields in (hello(epoch=5), hello(epoch=6, coordinator=b"other")):
        with pytest.raises(Refused):
            node.hello(fields)
    report = node.hello(hello(epoch=6))
    assert report["shards"][0] == [0, "x", 4, True, 0, 1, table.chain, 0]
    assert report["shards"][1] == [1, "y", 1, False, 0, 0, 0, 0] and report["damage"] == [[1, "the log is damaged"]]
    assert list(node.tables) == [0] and report["durability"] == "sync" and report["map_version"] == 8
    node.begin(10, -1, [(op.PUT, 1, 1, 0, b"b", b"v")])
    with pytest.raises(KeyError):
        node.run([])


def test_hello_of_a_new_epoch(replica: Replicas) -> None:
    """The tables stay; new entries carry the epoch; ordinals begin again."""
    assert replica.applied == 2
    replica.hello(hello(epoch=7, coordinator=b"d"))
    assert (replica.promised, replica.coordinator, replica.applied) == (7, "d", 0)
    batch(replica, 101, (op.PUT, 0, 2, 0, b"a", b"w"))
    assert replica.tables[0].position[:2] == (7, 2)


def test_reads_and_writes_in_order(replica: Replicas) -> None:
    """A read sees exactly the items before it; only writes with the bit and reads have results."""
    results = batch(
        replica, 110, (op.GET, 0, b"a"), (op.PUT, 0, 2, 0, b"a", b"new"), (op.GET, 0, b"a"),
        (op.ADD, 0, 3, 1, b"c", b"vc"), (op.ADD, 0, 4, 1, b"c", b"again"), (op.EXISTS, 0, b"c"), (op.EXISTS, 0, b"x"),
        (op.TTL, 1, b"b"), (op.TTL, 0, b"x"), (op.COUNT, [0, 1], b"", None), (op.AUDIT, [0]),
    )  # fmt: skip
    assert results[:3] == [(b"va", 1, None), (b"new", 2, None), 3]
    assert results[3][0] == Code.EXISTS
    assert results[4:] == [[3], None, (1, 40), None, 3, [(4, replica.tables[0].chain)]]
    assert replica.applied == 13 and replica.operations == 13


def test_page_and_mget(replica: Replicas) -> None:
    """Both see several shards at one stamp; an expired key is not there."""
    page, mget = batch(
        replica, 110, (op.PAGE, [0, 1], b"", None, 10, False, True), (op.MGET, [[1, b"b"], [0, b"a"], [0, b"x"]])
    )
    assert page == ([b"a", b"b"], None, (1, 1), [None, 40], False)
    assert mget == [(b"vb", 1, 40), (b"va", 1, None), None]
    assert batch(replica, 150, (op.MGET, [[1, b"b"]]), (op.COUNT, [1], b"", None)) == [[None], 0]


def test_mget_that_is_too_large(replica: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error with the limit, in the place of the result."""
    monkeypatch.setattr(replica_module, "MGET_VALUES_BYTES_MAX", 3)
    code, text, details = batch(replica, 110, (op.MGET, [[0, b"a"], [1, b"b"]]))[0]
    assert code == Code.TOO_LARGE and "over 3 bytes" in text and details == {"bytes_max": 3}


def test_results_in_pieces(replica: Replicas) -> None:
    """`run` stops when enough bytes are ready, counting what reads really return, and goes on where it was."""
    batch(replica, 101, (op.PUT, 0, 2, 0, b"a", b"x" * 100))
    items = [
        (op.GET, 0, b"a"), (op.GET, 0, b"none"), (op.MGET, [[0, b"a"], [0, b"none"]]),
        (op.PAGE, [0], b"", None, 1, False, False), (op.PAGE, [0], b"", None, 1, False, True), (op.EXISTS, 0, b"a"),
        (op.GET, 0, b"a"),
    ]  # fmt: skip
    replica.begin(102, -1, items)
    pieces = []
    finished = False
    while not finished:
        piece: list[Any] = []
        finished = replica.run(piece, 99)
        pieces.append(len(piece))
    assert pieces == [1, 2, 1, 3, 0]
    assert replica.applied == 3 + len(items)
    replica.begin(103, -1, [(op.PAGE, [0, 1], b"", None, 9, False, True)] * 3)
    assert not replica.run([], 1), "a page of several rows counts as a whole one"


@pytest.mark.parametrize("asked", [0, 1])
def test_results_of_writes_in_pieces(replica: Replicas, asked: int) -> None:
    """Values among the results of writes count too: of strings, and of a transaction. What nobody asked for is taken
    while the batch goes on, so that what is kept of it is bounded."""
    batch(replica, 101, (op.PUT, 0, 2, 0, b"a", b"x" * 100))
    get = [[op.GET, b"a"], [op.APPEND, b"a", b"y"]]
    items = [
        (op.STORE, 0, 3, asked, b"a", b"z" * 100, 1, 0, 0, None, 1), (op.APPEND, 0, 4, asked, b"a", b"z"),
        (op.TRANSACTION, 0, 5, asked, b"a", [], get), (op.INCR, 0, 6, asked, b"n", 1),
        (op.TOUCH, 0, 7, asked, b"a", 0, 0), (op.RENAME, 0, 8, asked, b"a", b"b", 0),
    ]  # fmt: skip
    replica.begin(102, -1, items)
    pieces = []
    finished = False
    while not finished:
        piece: list[Any] = []
        finished = replica.run(piece, 99)
        pieces.append(piece)
    if asked:
        assert pieces == [[b"x" * 100], [101, [[(b"z" * 101, 4, None), 102]]], [1, b"z" * 101 + b"y"], [1]]
    else:
        assert pieces == [[]]
    assert replica.applied == 3 + len(items) and [entry[2] for entry in replica.take_logged()][3:] == list(range(3, 9))
    found, size = replica._results.of(0, [3, 4, 5, 8])
    assert found == [[b"x" * 100], [101], [[[(b"z" * 101, 4, None), 102]]], [1]] and size == 100 + 101 + 32


def test_results_that_are_asked_for_again_fill_frames_too(replica: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards may have lost their answering member at once, each with large results."""
    monkeypatch.setattr(write_results, "RESULTS_BYTES_MAX", 99)
    batch(replica, 102, *[(op.STORE, 0, seq, 0, b"a", b"x" * 60, 1, 0, 0, None, 1) for seq in (2, 3, 4, 5)])
    replica.begin(103, -1, [(op.RESULTS_OF, 0, [2, 3, 4, 5]), (op.RESULTS_OF, 0, [5]), (op.RESULTS_OF, 0, [5])])
    first: list[Any] = []
    assert not replica.run(first, 99)
    assert first == [[[b"va"], [b"x" * 60], [b"x" * 60]]], "the rest is to be asked for again"
    second: list[Any] = []
    assert not replica.run(second, 99) and second == [[[b"x" * 60]]] * 2
    assert replica.run([], 99)


def test_reads_of_strings(replica: Replicas) -> None:
    """Deadlines as times since 1970, revisions alone, any key with the number of keys."""
    assert batch(
        replica, 110, (op.DEADLINE_OF, 1, b"b"), (op.DEADLINE_OF, 0, b"a"), (op.DEADLINE_OF, 0, b"x"),
        (op.REVISION, 0, b"a"), (op.REVISION, 1, b"x"), (op.ANY_KEY, [0, 1], 2), (op.ANY_KEY, [0, 1], 3),
        (op.ANY_KEY, [], 3),
    ) == [(1, 150), (1, None), None, [1], None, (b"a", 2), (b"b", 2), (None, 0)]  # fmt: skip
    items = ((op.DEADLINE_OF, 1, b"b"), (op.REVISION, 1, b"b"), (op.ANY_KEY, [0, 1], 1), (op.ANY_KEY, [1], 0))
    assert batch(replica, 150, *items) == [None, None, (b"a", 2), (None, 1)]


def test_batch_before_the_last_is_finished(replica: Replicas) -> None:
    """Its items would be lost: a defect. A new link drops them on purpose."""
    replica.begin(101, -1, [(op.GET, 0, b"a"), (op.GET, 0, b"a")])
    assert not replica.run([], 0)
    with pytest.raises(AssertionError, match="is finished before"):
        replica.begin(102, -1, [])
    replica.hello(hello())
    assert batch(replica, 103, (op.EXISTS, 0, b"a")) == [[1]] and replica.applied == 1


def test_gap_stops_the_node(replica: Replicas) -> None:
    """I1: a number that is not the next one raises, and so does an operation or a shard that is not known."""
    gap, unknown = (op.PUT, 0, 3, 0, b"a", b"v"), (op.GET, 5, b"a")
    for error, item in ((SequenceError, gap), (ValueError, (99, 0)), (KeyError, unknown)):
        replica.hello(hello())
        replica.begin(101, -1, [item])
        with pytest.raises(error):
            replica.run([])


def test_flags(replica: Replicas) -> None:
    """Shards with expired keys are flagged once per interval of stamps; taking the flags clears them."""
    assert replica.take_flags() == []
    batch(replica, 100 + FLAG_INTERVAL_MS - 1)
    assert replica.take_flags() == []
    batch(replica, 100 + FLAG_INTERVAL_MS)
    assert replica.take_flags() == [1] and replica.take_flags() == []


def test_stamps_are_remembered(replica: Replicas) -> None:
    """The highest stamp is reported; an older one, of a batch that was sent again, does not lower it."""
    batch(replica, 90, (op.PUT, 0, 2, 0, b"z", b"v"))
    assert replica.stamp_ms == 100


def test_freeze(replica: Replicas) -> None:
    """A freeze is exact at its place in the batch, and left for the server."""
    chains = [replica.tables[number].chain for number in (0, 1)]
    (frozen,) = batch(replica, 120, (op.FREEZE, [0, 1], b"name", b"/dir"), (op.PUT, 0, 2, 0, b"later", b"v"))
    assert frozen == [[0, 1, 1, chains[0]], [1, 1, 1, chains[1]]]
    request = replica.freezes.popleft()
    assert (request.name, request.directory, request.stamp_ms) == ("name", "/dir", 120)
    assert [row[0] for row in request.frozen[0].next_rows(10)] == [b"a"]


# --- entries: logged, kept, shipped -----------------------------------------------------------------


def test_entries_are_handed_over_once(replica: Replicas) -> None:
    """What a batch wrote, in the order in which it was applied, also if it was applied in pieces."""
    first = replica.take_logged()
    assert [(shard, generation, seq) for shard, generation, seq, _, _ in first] == [(0, 1, 1), (1, 1, 1)]
    assert first[0][3:] == (replica.tables[0].chain, replica.tables[0].last_entry) and replica.take_logged() == []
    replica.begin(101, -1, [put(1, 2), (op.GET, 0, b"a"), put(0, 2), put(1, 3)])
    assert not replica.run([], 0)
    assert [entry[:3] for entry in replica.take_logged()] == [(1, 1, 2)]
    assert replica.run([])
    assert [entry[:3] for entry in replica.take_logged()] == [(0, 1, 2), (1, 1, 3)]


def test_what_is_committed_is_forgotten(replica: Replicas) -> None:
    """By the ordinal of the link; the hint of the commit grows."""
    batch(replica, 101, put(0, 2), put(1, 2))  # ordinals 3 and 4
    batch(replica, 102, put(0, 3), commit=2)
    assert [entry[2] for entry in replica.backlog.of_shard(0)] == [2, 3]
    assert [copy.commit for copy in replica.copies.values()] == [1, 1]
    batch(replica, 103, commit=3)
    assert [entry[2] for entry in replica.backlog.of_shard(0)] == [2, 3], "a batch is committed as a whole"
    batch(replica, 103, commit=5)
    assert replica.backlog.bytes == 0 and [copy.commit for copy in replica.copies.values()] == [3, 2]
    assert replica.report()["shards"][0][-1] == 3


def test_what_is_from_before_the_link_is_kept(replica: Replicas) -> None:
    """-1 commits nothing of it, whatever its ordinal was; 0 all of it."""
    replica.hello(hello(epoch=2))
    batch(replica, 101, put(0, 2), commit=-1)
    assert [entry[2] for entry in replica.backlog.of_shard(0)] == [1, 2] and replica.copies[0].commit == 0
    batch(replica, 102, commit=0)
    assert [entry[2] for entry in replica.backlog.of_shard(0)] == [2] and replica.copies[0].commit == 1


def test_a_half_done_batch_is_kept_over_a_new_link(replica: Replicas) -> None:
    """What was applied of it stays; the items that were not are dropped."""
    replica.begin(101, -1, [put(0, 2), (op.GET, 0, b"a"), put(0, 3)])
    assert not replica.run([], 0)
    replica.hello(hello(epoch=2))
    assert replica.tables[0].seq == 2 and [entry[2] for entry in replica.backlog.of_shard(0)] == [1, 2]
    batch(replica, 102, put(0, 3, b"other"))
    assert replica.tables[0].position[:2] == (2, 3)


def chains(entries: list[list[Any]] | None) -> list[int]:
    """Of what `entries_after` returned."""
    assert entries is not None
    return [chain for chain, _ in entries]


def test_entries_after(replica: Replicas) -> None:
    """The chain at a number and what follows; nothing of what is not known or not complete."""
    batch(replica, 101, put(0, 2), put(0, 3))
    kept = replica.backlog.of_shard(0)
    assert replica.entries_after(0, 0) == (0, [[entry[3], entry[4]] for entry in kept])
    chain, entries = replica.entries_after(0, 2)
    assert chain == kept[1][3] and chains(entries) == [kept[2][3]]
    assert replica.entries_after(0, 3) == (replica.tables[0].chain, [])
    assert replica.entries_after(0, 4) == (None, None) and replica.entries_after(9, 0) == (None, None)
    batch(replica, 102, commit=4)
    assert chains(replica.entries_after(0, 0)[1]) == [entry[3] for entry in kept], "committed entries are recent"
    replica.copies[0].complete = False
    assert replica.entries_after(0, 3) == (None, None)


def test_entries_after_of_what_is_not_recent_any_more() -> None:
    """The oldest committed entries are gone: what follows them is not shipped, what follows the others is."""
    node = make(backlog=Backlog(recent_bytes_max=2 * (RECENT_ENTRY_BYTES + 20)))
    node.hello(hello())
    batch(node, 100, put(0, 1))
    batch(node, 101, put(0, 2), put(0, 3))
    kept = node.backlog.of_shard(0)
    batch(node, 102, put(0, 4), commit=3)  # number 1 is too old
    assert node.entries_after(0, 0) == (0, None) and node.entries_after(0, 1)[0] is None
    assert chains(node.entries_after(0, 1)[1])[:2] == [kept[1][3], kept[2][3]]
    batch(node, 103, put(0, 5), put(0, 6), commit=6)
    assert node.entries_after(0, 2) == (None, None)
    assert node.entries_after(0, 6) == (node.tables[0].chain, [])


def test_entries_after_in_pieces(replica: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many bytes at once, and at least one entry however large."""
    monkeypatch.setattr(copy_set, "SHIP_BYTES_MAX", 200)
    batch(replica, 101, *(put(0, seq, b"v" * size) for seq, size in enumerate([60, 60, 500, 60, 60], 2)))
    pieces = []
    after = 0
    while after < replica.tables[0].seq:
        _, entries = replica.entries_after(0, after)
        assert entries
        pieces.append(len(entries))
        after += len(entries)
    assert pieces == [3, 1, 2]


def test_entries_that_are_kept_twice() -> None:
    """A snapshot keeps entries that the log has too: they are shipped once, in order."""
    kept = Backlog()
    table = Table(0)
    logged = []
    for seq in range(1, 7):
        table.apply(put(0, seq), 5)
        logged.append((0, 1, seq, table.chain, table.last_entry))
    kept.add(0, logged[3:5])  # of a snapshot at 5
    kept.add(0, logged)
    node = make(copies=[Copy(0, "x", table=table)], backlog=kept)
    for after in range(7):
        chain, entries = node.entries_after(0, after)
        assert chain == (logged[after - 1][3] if after else 0) and chains(entries) == [e[3] for e in logged[after:]]


def shipped(source: Replicas, target: Replicas, shard: int, after: int) -> str | None:
    """Move entries from one member to another as a takeover does."""
    _, entries = source.entries_after(shard, after)
    assert entries is not None
    return target.ship(shard, entries)


def test_ship(replica: Replicas) -> None:
    """The other member has the same afterwards, logs it, and can ship it further; epoch and stamp are the old ones."""
    other = make()
    other.hello(hello(epoch=5))
    batch(replica, 150, put(0, 2), (op.DELETE, 0, 3, 0, b"a"), (op.PUT, 0, 4, 0, b"t", b"v", 1000))
    assert shipped(replica, other, 0, 0) is None
    assert other.tables[0].position == replica.tables[0].position and other.tables[0].position[0] == 1
    assert other.tables[0].digest() == replica.tables[0].digest()
    assert [entry[:4] for entry in other.take_logged()] == [entry[:4] for entry in replica.backlog.of_shard(0)]
    assert other.backlog.of_shard(0) == replica.backlog.of_shard(0)
    batch(other, 160, commit=0)
    assert [entry[2] for entry in other.backlog.of_shard(0)] == [1, 2, 3, 4], "no ordinal of the link commits them"
    batch(other, 160, put(0, 5), commit=0)
    assert other.tables[0].position[:2] == (5, 5) and other.copies[0].commit == 0
    batch(other, 160, commit=1)
    assert other.backlog.of_shard(0) == [] and other.copies[0].commit == 5


def test_ship_what_does_not_follow(replica: Replicas) -> None:
    """A gap, another chain or damage: what came before is applied, the rest is not, and it says why."""
    batch(replica, 101, *(put(0, seq) for seq in range(2, 6)))
    _, entries = replica.entries_after(0, 0)
    assert entries is not None
    for index, wrong, reason in (
        (2, entries[3], "entry 4 does not follow entry 2"),
        (1, [entries[1][0] ^ 1, entries[1][1]], "the chain of entry 2 is"),
        (3, [entries[3][0], entries[3][1][:-2]], "what should be entry 4 is damaged"),
        (0, entries[1], "entry 2 does not follow entry 0"),
    ):
        other = make()
        other.hello(hello())
        error = other.ship(0, [*entries[:index], wrong, *entries[index + 1 :]])
        assert error is not None and reason in error
        assert other.tables[0].seq == index == len(other.take_logged()) == len(other.backlog.of_shard(0))
        other.check()


def test_ship_to_another_history(replica: Replicas) -> None:
    """R7: a member with other entries takes none of these."""
    batch(replica, 101, put(0, 2))
    other = make()
    other.hello(hello())
    batch(other, 100, put(0, 1, b"another"))
    error = shipped(replica, other, 0, 1)
    assert error is not None and "chain" in error and other.tables[0].seq == 1


def test_ship_to_no_copy(replica: Replicas) -> None:
    """A copy that is not complete takes no entries, and one that is not there neither."""
    replica.copies[1].complete = False
    for shard in (1, 7):
        assert replica.ship(shard, [[1, b""]]) == f"this node has no complete copy of shard {shard}"
    replica.take_logged()
    assert replica.ship(0, []) is None and replica.take_logged() == []
