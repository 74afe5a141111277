"""Tests of admission: order, waiting, refusals, windows, turns, and that everything is bounded."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol import operations as op
from kvtcp.replication.sequencing import link as link_module
from kvtcp.replication.sequencing import reads
from kvtcp.replication.sequencing import shard as shard_module
from kvtcp.replication.sequencing.multi_read import count_read, mget_read, page_read
from tests.support.replication_fakes import Cluster


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 8 items and 4,000 bytes, batches of 300 bytes, turns of 2, queues of 4 and 2."""
    for module in (shard_module, link_module):
        monkeypatch.setattr(module, "WINDOW_ITEMS_MAX", 8)
        monkeypatch.setattr(module, "WINDOW_BYTES_MAX", 4_000)
    for module in (shard_module, link_module):
        monkeypatch.setattr(module, "BATCH_BYTES_MAX", 300)
    monkeypatch.setattr(shard_module, "DRAIN_SLICE", 2)
    monkeypatch.setattr(shard_module, "WAITING_ITEMS_MAX", 4)
    monkeypatch.setattr(reads, "WAITING_MULTI_MAX", 2)


def test_one_member_answers(cluster: Cluster) -> None:
    """All members get the entry, one with the bit to answer; a put needs nobody."""
    cluster.put("put")
    cluster.write(op.ADD, "add", args=(b"v",))
    items = [cluster.apply(node) for node in cluster.replicas]
    assert [[item[:3] for item in each] for each in items] == [[(op.PUT, 0, 1), (op.ADD, 0, 2)]] * 3
    assert sorted(each[1][3] for each in items) == [0, 0, 1] and all(each[0][3] == 0 for each in items)


def test_reads_go_to_the_member_with_the_least_outstanding(cluster: Cluster) -> None:
    """Reads are spread, also while a member is missing."""
    for n in range(6):
        cluster.get(n)
    assert [link.items for link in cluster.sequencer.links.values()] == [2, 2, 2]
    cluster.down("n2")
    assert [link.items for link in cluster.sequencer.links.values()] == [3, 0, 3]
    cluster.pump()
    assert len(cluster.answers.ok) == 6


def test_write_waits_for_a_missing_member_and_is_refused_in_time(cluster: Cluster) -> None:
    """R4: nothing is numbered while a member is missing; the text names it."""
    cluster.down("n2", "pulled out")
    cluster.put("late")
    cluster.tick(WRITE_WAIT_MS - 1)
    assert "late" not in cluster.answers and cluster.sequencer.waiting_bytes > 0
    cluster.put("later")
    cluster.tick(1)
    code, text, details = cluster.answers.failed["late"]
    assert (code, details) == (Code.NOT_ENOUGH_REPLICAS, {"shard": 0})
    assert "shard 0 takes no writes: n2 is missing (pulled out); nothing was executed" in text
    cluster.up("n2")
    cluster.pump()
    assert cluster.answers.ok == {"later": 1}
    assert (cluster.sequencer.waiting_items, cluster.sequencer.waiting_bytes) == (0, 0)
    assert cluster.sequencer.unavailable == 1


def test_reads_pass_writes_that_wait_for_a_missing_member(cluster: Cluster) -> None:
    """A read goes to another member at once; reads that came while no member was there go when one is back, though
    writes before them still wait."""
    cluster.down("n1")
    cluster.put("write")
    cluster.get("new")
    cluster.pump()
    assert "new" in cluster.answers
    cluster.down("n2")
    cluster.down("n3")
    cluster.get("old")
    assert cluster.sequencer.shards[0].waiting_reads == 1
    cluster.up("n3")
    cluster.pump()
    assert "old" in cluster.answers and "write" not in cluster.answers
    assert cluster.sequencer.shards[0].waiting_reads == 0


def test_waiting_reads_go_past_when_a_member_is_lost(small: None) -> None:
    """Reads wait behind writes for room; when a member is lost the writes cannot go on, so the reads do."""
    cluster = Cluster(nodes=2, factor=2, shards=1)
    for n in range(8):
        cluster.put(n)
    cluster.pump("n2")  # n1's window stays full
    cluster.put("write")
    cluster.get("read")
    assert cluster.sequencer.shards[0].waiting_reads == 1
    cluster.down("n1")
    assert [item[0] for item in cluster.apply("n2")] == [op.GET]
    assert cluster.sequencer.waiting_items == 1


def test_full_window_keeps_the_order_of_a_shard(small: None) -> None:
    """Requests wait when the window is full and go in their order when it opens at three quarters."""
    cluster = Cluster(nodes=1, factor=1, shards=1)
    for n in range(8):
        cluster.put(n, value=b"%d" % n)
    assert cluster.sequencer.links["n1"].full and not cluster.sequencer.shards[0].writable
    cluster.put("w1", value=b"w1")
    cluster.get("r1")
    cluster.put("w2", value=b"w2")
    cluster.get("r2")
    assert cluster.sequencer.waiting_items == 4
    cluster.get("too many")
    assert cluster.answers.failed["too many"][0] == Code.OVERLOADED
    cluster.pump()
    assert [item[0] for item in cluster.apply("n1")] == [op.PUT, op.GET, op.PUT, op.GET]
    cluster.results("n1")
    assert cluster.answers.ok["r1"][0] == b"w1" and cluster.answers.ok["r2"][0] == b"w2"


def test_window_that_stays_full_is_named(small: None) -> None:
    """After the wait the text says that there was no room."""
    cluster = Cluster(nodes=1, factor=1, shards=1)
    for n in range(8):
        cluster.put(n)
    cluster.put("late")
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    cluster.tick(WRITE_WAIT_MS)
    for token in ("late", "count"):
        code, text, _ = cluster.answers.failed[token]
        assert code == Code.OVERLOADED and "no room in the windows of shard 0 for 1000 ms" in text


def test_bytes_fill_a_window_too(small: None) -> None:
    """One large value fills it, and travels; batches are closed at their size."""
    cluster = Cluster(nodes=1, factor=1, shards=1)
    cluster.put("small")
    cluster.put("large", value=b"x" * 5_000)
    assert cluster.sequencer.links["n1"].full
    cluster.pump()
    assert cluster.answers.ok == {"small": 1, "large": 2}
    for n in range(3):
        cluster.put(n, value=b"x" * 299)
    cluster.get("read", key=b"k" * 300)
    cluster.sequencer.multi_read(mget_read([b"k" * 290], [0], cluster.answers, "mget"))
    cluster.sequencer.close_batches()
    assert [len(batch.items) for batch in cluster.sequencer.links["n1"].outgoing] == [1, 1, 1, 1, 1]
    cluster.get("long", key=b"k" * 4_000)
    assert cluster.sequencer.links["n1"].full
    cluster.pump()
    cluster.sequencer.multi_read(mget_read([b"k" * 4_000], [0], cluster.answers, "long mget"))
    assert cluster.sequencer.links["n1"].full
    cluster.pump()
    assert cluster.answers.ok["long mget"] == [None]


def test_shards_take_turns(small: None) -> None:
    """When a window opens the shards that waited get turns of DRAIN_SLICE, and the next time those that got none."""
    cluster = Cluster(nodes=1, factor=1, shards=6)
    for n in range(8):
        cluster.put(n)
    for number in range(6):
        for n in range(4):
            cluster.put((number, n), number)
    cluster.pump()
    first = [item[1] for item in cluster.apply("n1")]
    cluster.results("n1")
    second = [item[1] for item in cluster.apply("n1")]
    cluster.results("n1")
    assert first == [0, 0, 1, 1, 2, 2, 3, 3]
    assert second == [4, 4, 5, 5, 0, 0, 1, 1]
    cluster.pump()
    cluster.pump()
    assert len(cluster.answers.ok) == 32


def test_several_reads_over_shards_wait_without_blocking_others(small: None) -> None:
    """A read over shards whose node is missing waits; another one is answered; the queue is bounded; those that wait
    go when the node is back, in order."""
    cluster = Cluster(nodes=2, factor=1, shards=2)
    cluster.down("n1")
    missing = next(n for n in range(2) if cluster.map.nodes_of(n) == ["n1"])
    answers, multi_read = cluster.answers, cluster.sequencer.multi_read
    multi_read(count_read([0, 1], b"", None, answers, "all"))
    multi_read(mget_read([b"k"], [1 - missing], answers, "other"))
    multi_read(mget_read([b"k"], [missing], answers, "same"))
    multi_read(mget_read([b"k"], [missing], answers, "too many"))
    assert answers.failed["too many"][0] == Code.OVERLOADED
    cluster.pump()
    assert answers.ok == {"other": [None]}
    cluster.down("n2")
    cluster.up("n2")
    cluster.up("n1")
    cluster.pump()
    assert answers.ok == {"other": [None], "all": 0, "same": [None]}


def test_reads_over_shards_go_before_waiting_writes(small: None) -> None:
    """They would find every window full again behind them."""
    cluster = Cluster(nodes=1, factor=1, shards=4)
    for n in range(8):
        cluster.put(n)
    for number in range(4):
        for n in range(4):
            cluster.put((number, n), number)
    cluster.sequencer.multi_read(page_read([0, 1], b"", None, 10, False, False, cluster.answers, "page"))
    cluster.pump()
    assert [item[0] for item in cluster.apply("n1")] == [op.PAGE] + [op.PUT] * 7


def test_read_over_shards_is_refused_with_the_missing_node() -> None:
    """The text names the shard and the node."""
    cluster = Cluster(nodes=2, factor=1, shards=2)
    cluster.down("n2", "pulled out")
    cluster.sequencer.multi_read(count_read([0, 1], b"", None, cluster.answers, "count"))
    cluster.tick(WRITE_WAIT_MS)
    code, text, _ = cluster.answers.failed["count"]
    assert code == Code.NOT_ENOUGH_REPLICAS and "shard 1 cannot be read: n2 is missing (pulled out)" in text


def test_cover_uses_few_nodes() -> None:
    """One node if it has all shards, the least busy of equals; else the parts are disjoint and complete."""
    cluster = Cluster(nodes=3, factor=3, shards=4)
    cluster.get("busy")
    cluster.sequencer.multi_read(count_read([0, 1, 2, 3], b"", None, cluster.answers, "count"))
    assert sorted(link.items for link in cluster.sequencer.links.values()) == [0, 1, 1]
    spread = Cluster(nodes=4, factor=2, shards=8)
    spread.sequencer.multi_read(mget_read([b"k"] * 8, list(range(8)), spread.answers, "mget"))
    spread.sequencer.close_batches()
    items = [item for link in spread.sequencer.links.values() for b in link.outgoing for item in b.items]
    assert len(items) <= 3 and all(item[0] == op.MGET for item in items)
    assert sorted(number for item in items for number, _ in item[1]) == list(range(8))


def test_large_page_is_shared_out_over_idle_nodes() -> None:
    """Over two for a thousand rows: every shard once. A busy node has no part of it, small pages are of one node, and
    where the idle ones do not have all shards it is read as usual."""

    def parts(cluster: Cluster, limit: int) -> dict[str, list[int]]:
        read = page_read(range(8), b"", None, limit, False, False, cluster.answers, "page")
        cluster.sequencer.multi_read(read)
        cluster.sequencer.close_batches()
        found = {
            link.node: item[1]
            for link in cluster.sequencer.links.values()
            for batch in link.outgoing
            for item in batch.items
            if item[0] == op.PAGE
        }
        cluster.pump()
        assert cluster.answers.ok.pop("page") == [[], None]
        return found

    cluster = Cluster(nodes=3, factor=3, shards=8)
    assert parts(cluster, 1_000) == {"n1": [0, 2, 4, 6], "n2": [1, 3, 5, 7]}
    assert list(parts(cluster, 999).values()) == [list(range(8))]
    cluster.get("busy")
    (busy,) = [link.node for link in cluster.sequencer.links.values() if link.items]
    found = parts(cluster, 2_000)
    assert len(found) == 2 and busy not in found
    assert sorted(n for part in found.values() for n in part) == list(range(8))
    assert len(parts(cluster, 2_000)) == 3
    cluster.down("n1")
    cluster.down("n2")
    assert parts(cluster, 1_000) == {"n3": list(range(8))}
    thin = Cluster(nodes=4, factor=1, shards=8)
    assert len(parts(thin, 1_000)) == 4


def test_refuse_waiting() -> None:
    """What waits is refused by its key, the rest goes on waiting, and a shard where nobody waits takes writes again."""
    cluster = Cluster(nodes=1, factor=1, shards=2)
    cluster.down("n1")
    cluster.put("a", 0, b"a1")
    cluster.put("b", 0, b"b1")
    cluster.get("c", 1, b"a2")
    cluster.sequencer.refuse_waiting(Code.RESTORING, "being restored", lambda key: key.startswith(b"a"))
    cluster.sequencer.check()
    assert {token: failed[0] for token, failed in cluster.answers.failed.items()} == {
        "a": Code.RESTORING, "c": Code.RESTORING,
    }  # fmt: skip
    cluster.up("n1")
    cluster.pump()
    assert cluster.answers.ok == {"b": 1}


def test_every_write_operation_is_below_the_reads() -> None:
    """What is waiting is told apart by its operation."""
    assert max(op.PUT, op.ADD, op.DELETE) < op.WRITE_OP_END <= min(op.GET, op.PAGE, op.MGET)


def test_waiting_multi_reads_are_refused_together() -> None:
    """Reads over several shards that wait to begin can be refused, and are no longer counted as waiting."""
    cluster = Cluster(nodes=1, factor=1, shards=1)
    cluster.down("n1")
    for token in ("one", "two"):
        cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, token))
    assert cluster.sequencer.waiting_items == 2
    cluster.sequencer.reads.refuse_waiting(Code.RESTORING, "closed")
    cluster.sequencer.check()
    assert (cluster.sequencer.waiting_items, cluster.sequencer.waiting_bytes) == (0, 0)
    assert {token: failed[0] for token, failed in cluster.answers.failed.items()} == {
        "one": Code.RESTORING, "two": Code.RESTORING,
    }  # fmt: skip


# --- space ------------------------------------------------------------------------------------------


def test_no_growing_writes_without_space() -> None:
    """At level 1 what may grow is refused at once, before it is sequenced; removals, reads and purges go on. At level 2
    no write is taken. When there is space again everything is as before."""
    cluster = Cluster(shards=2, nodes=2, factor=2)
    cluster.commit("before")
    sequencer, answers = cluster.sequencer, cluster.answers
    sequencer.on_space("n2", 1)
    sequencer.check()
    growing: list[tuple[int, tuple[Any, ...]]] = [
        (op.PUT, (b"v",)), (op.ADD, (b"v",)), (op.CAS, (b"v", b"v", None)), (op.INCR, (1,)), (op.APPEND, (b"v",)),
        (op.SETBIT, (0, 1)), (op.STORE, (b"v", op.NO_DEADLINE, 0, op.ALWAYS, None, False)), (op.SETRANGE, (0, b"v")),
        (op.INCR_DECIMAL, (b"1",)), (op.RENAME, (b"l", False)), (op.COPY, (b"l", False)),
        (op.PUT_ALL, ([[b"k", b"v"]], False)), (op.TRANSACTION, ([], [])),
    ]  # fmt: skip
    for kind, args in growing:
        cluster.write(kind, kind, args=args)
        code, text, details = answers.failed[kind]
        assert (code, details) == (Code.NO_SPACE, {"shard": 0})
        assert text == "shard 0 takes no growing writes: too little disk space on n2; nothing was executed"
    sequencer.on_results("n1", 1, 1, [], [0])
    cluster.tick()
    others: list[tuple[int, tuple[Any, ...]]] = [
        (op.DELETE, ()), (op.EXPIRE, (5,)), (op.PERSIST, ()), (op.CLEAR, (b"l", 10)), (op.PURGE, (10,)), (op.TAKE, ()),
        (op.TOUCH, (op.NO_DEADLINE, 0)), (op.EXPIRE_IF, (op.IN_MS, 5, op.ALWAYS)),
    ]  # fmt: skip
    assert {kind for kind, _ in growing} | {kind for kind, _ in others} == set(op.WRITE_NAMES)
    for kind, args in others:
        cluster.write(kind, kind, args=args)
    cluster.get("read")
    cluster.pump()
    assert {kind for kind, _ in others} | {"read"} <= answers.ok.keys()
    assert sequencer.shards[0].last_seq == 1 + len(others) + 1, "and the purge of the sequencer itself"
    sequencer.on_space("n1", 2)
    cluster.write(op.DELETE, "late")
    code, text, _ = answers.failed["late"]
    assert code == Code.NO_SPACE
    assert text == "shard 0 takes no writes: too little disk space on n1; nothing was executed"
    for node in ("n1", "n2"):
        sequencer.on_space(node, 0)
    sequencer.check()
    assert all(shard.writable for shard in sequencer.shards)
    cluster.commit("after")
    assert answers.ok["after"] == 11


def test_what_waits_is_refused_when_space_ends(small: None) -> None:
    """Growing writes that wait for a window are refused at once, the others keep their places and go when it opens."""
    cluster = Cluster(shards=1, nodes=1, factor=1)
    for n in range(8):
        cluster.put(n)
    cluster.put("grows")
    cluster.write(op.DELETE, "shrinks")
    cluster.get("read")
    cluster.sequencer.on_space("n1", 1)
    cluster.sequencer.check()
    assert cluster.answers.failed["grows"][0] == Code.NO_SPACE
    cluster.write(op.DELETE, "next")
    assert cluster.sequencer.waiting_items == 3, "it waits like any other"
    cluster.pump()
    cluster.pump()
    assert cluster.answers.ok["shrinks"] is True and cluster.answers.ok["read"] is None
    assert cluster.answers.ok["next"] is False
    for n in range(10, 18):
        cluster.write(op.DELETE, n)
    cluster.write(op.DELETE, "waits")
    cluster.sequencer.on_space("n1", 2)
    assert cluster.answers.failed["waits"][0] == Code.NO_SPACE
    cluster.pump()
    assert all(cluster.answers.ok[n] is False for n in range(10, 18)), "what was sequenced goes on"


def test_space_of_a_shard_that_is_down_or_missing_a_member() -> None:
    """The reason that will not pass by itself is the one that is told."""
    cluster = Cluster(shards=1, nodes=2, factor=2)
    cluster.sequencer.on_space("n1", 1)
    cluster.down("n2", "cut")
    cluster.put("refused")
    assert cluster.answers.failed["refused"][0] == Code.NO_SPACE
    cluster.write(op.DELETE, "waits")
    cluster.tick(WRITE_WAIT_MS)
    assert cluster.answers.failed["waits"][0] == Code.NOT_ENOUGH_REPLICAS
    cluster.sequencer.shards[0].serving = False
    cluster.put("down")
    assert cluster.answers.failed["down"][0] == Code.SHARD_DOWN
