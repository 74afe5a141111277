"""Tests of answers: what waits for a commit, for how long, and that it is answered once."""

from __future__ import annotations

from kvtcp.constants import VALUE_BYTES_MAX, WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol import operations as op
from kvtcp.replication.sequencing.multi_read import count_read, mget_read, page_read
from tests.support.replication_fakes import Cluster, wire


def withheld() -> Cluster:
    """One shard with `old` = 1, `gone` deleted and `new` written: the last two applied by all, n3 withholds its
    acknowledgement."""
    cluster = Cluster(shards=1)
    cluster.put("old", key=b"old")
    cluster.put("gone", key=b"gone")
    cluster.pump()
    cluster.put("new", key=b"new")
    cluster.write(op.DELETE, "delete", key=b"gone")
    cluster.pump("n1", "n2")
    cluster.apply("n3")
    cluster.results("n3", durable=False)
    return cluster


def test_withheld_acknowledgement() -> None:
    """R11 b: an old key is answered at once; a key just written, a key just deleted, one that never was, a page, a
    count and an mget wait, and all are answered at the commit."""
    cluster = withheld()
    for key in (b"old", b"new", b"gone", b"never"):
        for kind in (op.GET, op.EXISTS, op.TTL):
            cluster.get((kind, key), key=key, op=kind)
    multi_read, answers = cluster.sequencer.multi_read, cluster.answers
    multi_read(page_read([0], b"", None, 10, False, True, answers, "page"))
    multi_read(count_read([0], b"", None, answers, "count"))
    multi_read(mget_read([b"old", b"new"], [0, 0], answers, "mget"))
    cluster.pump("n1", "n2")
    assert "new" not in answers and "delete" not in answers
    early = {token: result for token, result in answers.ok.items() if type(token) is tuple}
    assert early == {(op.GET, b"old"): (b"v", 1, None), (op.EXISTS, b"old"): True, (op.TTL, b"old"): -1}
    assert not {"page", "count", "mget"} & answers.ok.keys()
    cluster.pump("n3")
    assert (answers.ok["new"], answers.ok["delete"]) == (3, True)
    assert answers.ok[op.GET, b"new"] == (b"v", 3, None)
    assert answers.ok[op.EXISTS, b"gone"] is False
    assert answers.ok[op.GET, b"never"] is None and answers.ok[op.TTL, b"gone"] is None
    assert answers.ok["count"] == 2 and answers.ok["mget"] == [(b"v", 1, None), (b"v", 3, None)]
    assert [row[0] for row in answers.ok["page"][0]] == [b"new", b"old"]


def test_ttl_of_a_key_with_a_deadline(cluster: Cluster) -> None:
    """The time to live is answered as the milliseconds left at the stamp of the read."""
    cluster.write(op.ADD, "add", args=(b"v", 500))
    cluster.pump()
    cluster.begin(100)
    cluster.get("ttl", op=op.TTL)
    cluster.pump()
    assert cluster.answers.ok["ttl"] == 400


def test_results_and_errors_of_writes(cluster: Cluster) -> None:
    """A write is answered with what the answering member evaluated; its error has code, text and details."""
    cluster.write(op.ADD, "add", args=(b"1",))
    cluster.write(op.ADD, "again", args=(b"2",))
    cluster.write(op.CAS, "cas", args=(b"5", b"1", None))
    cluster.write(op.INCR, "incr", args=(2,))
    cluster.write(op.DELETE, "delete")
    cluster.pump()
    assert cluster.answers.ok == {"add": 1, "cas": 3, "incr": 7, "delete": True}
    assert cluster.answers.failed["again"][0] == Code.EXISTS and cluster.answers.failed["again"][2] == {"rev": 1}


def test_results_of_a_transaction(cluster: Cluster) -> None:
    """They come as a list, with errors as arrays among them; nil if a watched key was changed; refused it fails."""
    ops = [[op.ADD, b"k", b"v"], [op.ADD, b"k", b"w"], [op.GET, b"k"], [op.TAKE, b"k"]]
    cluster.write(op.TRANSACTION, "all", args=([[b"k", 0]], ops))
    cluster.write(op.TRANSACTION, "watched", args=([[b"k", 1]], [[op.PUT, b"k", b"v"]]))
    cluster.write(op.TRANSACTION, "none", args=([], []))
    large = bytes(VALUE_BYTES_MAX)
    cluster.write(op.TRANSACTION, "large", args=([], [[op.PUT, b"k", large], [op.PUT, b"k", large]]))
    cluster.write(op.STORE, "store", args=(b"v", op.NO_DEADLINE, 0, op.ALWAYS, None, True))
    cluster.write(op.TAKE, "take")
    cluster.write(op.APPEND, "append", args=(large,))
    cluster.write(op.APPEND, "too large", args=(b"x",))
    cluster.get("revision", op=op.REVISION)
    cluster.get("no revision", key=b"x", op=op.REVISION)
    cluster.get("no deadline", op=op.DEADLINE_OF)
    cluster.pump()
    results = wire(cluster.answers.ok.pop("all"))
    assert results[0] == 1 and results[1][0] == Code.EXISTS and results[2:] == [[b"v", 1, None], b"v"]
    assert cluster.answers.ok == {
        "watched": None, "none": [], "store": None, "take": b"v", "append": VALUE_BYTES_MAX, "revision": 7,
        "no revision": None, "no deadline": -1,
    }  # fmt: skip
    assert {token: failed[0] for token, failed in cluster.answers.failed.items()} == {
        "large": Code.TOO_LARGE, "too large": Code.TOO_LARGE
    }  # fmt: skip


def test_a_revision_is_answered_when_it_is_committed() -> None:
    """Like a value; an absent key when all before it is."""
    cluster = Cluster(shards=1, nodes=2, factor=2)
    cluster.put("put")
    cluster.get("revision", op=op.REVISION)
    cluster.get("absent", key=b"x", op=op.REVISION)
    cluster.get("deadline", op=op.DEADLINE_OF)
    for node in cluster.replicas:
        cluster.apply(node)
        cluster.results(node, durable=node == "n1")
    assert not {"revision", "absent", "deadline", "put"} & cluster.answers.ok.keys()
    cluster.pump()
    assert cluster.answers.ok == {"put": 1, "revision": 1, "absent": None, "deadline": -1}


def test_held_answers_are_refused_in_time(cluster: Cluster) -> None:
    """A commit that does not come does not keep readers waiting, or the memory of their answers; the text says which
    node is behind. Younger ones stay."""
    cluster.put("w")
    cluster.pump("n1")
    cluster.down("n3", "pulled out")
    cluster.get("get")
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    cluster.pump("n1", "n2")
    cluster.tick(WRITE_WAIT_MS - 1)
    cluster.get("young")
    cluster.pump("n1", "n2")
    assert "get" not in cluster.answers
    cluster.tick(1)
    for token in ("get", "count"):
        code, text, _ = cluster.answers.failed[token]
        assert code == Code.NOT_ENOUGH_REPLICAS and "not committed in 1000 ms (n3: pulled out)" in text
    cluster.up("n3")
    cluster.pump()
    assert cluster.answers.ok["w"] == 1 and cluster.answers.ok["young"] == (b"v", 1, None)


def test_slow_member_is_named(cluster: Cluster) -> None:
    """A held answer that is refused while all are linked names the slow one."""
    cluster.put("w")
    cluster.pump("n1", "n2")
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    cluster.pump("n1", "n2")
    assert cluster.sequencer.shards[0].held
    cluster.tick(WRITE_WAIT_MS)
    assert "(n3: slow)" in cluster.answers.failed["count"][1]


def test_multi_read_waits_for_every_shard() -> None:
    """Held at one shard after the other until all that was queued before it is committed."""
    cluster = Cluster(nodes=3, factor=2, shards=3)
    for number in range(3):
        cluster.put(number, number)
    cluster.pump("n1", "n2")
    cluster.sequencer.multi_read(count_read([0, 1, 2], b"", None, cluster.answers, "count"))
    cluster.pump("n1", "n2")
    assert "count" not in cluster.answers
    cluster.pump("n3")
    assert cluster.answers.ok["count"] == 3


def test_a_commit_before_its_result(cluster: Cluster) -> None:
    """The member that was to answer left the in-sync set: the write commits without it, and is answered once, when its
    result is here."""
    shard = cluster.sequencer.shards[0]
    first = shard.members[0]
    cluster.write(op.ADD, "add", args=(b"v",))
    cluster.write(op.ADD, "again", args=(b"w",))
    cluster.apply(first.node)
    cluster.pump(*(link.node for link in shard.members[1:]))
    cluster.sequencer.leave([shard], first)
    cluster.sequencer.check()
    assert shard.commit == 2 and not cluster.answers.ok and not cluster.answers.failed
    cluster.results(first.node)
    assert cluster.answers.ok == {"add": 1} and cluster.answers.failed["again"][0] == Code.EXISTS


def test_held_answers_of_a_shard_that_gets_stuck() -> None:
    """They are refused in the step in which a member that has to stay lost what they wait for, and so are those that
    come later."""
    cluster = Cluster(shards=1, min_insync=3)
    cluster.put("w")
    cluster.pump("n1")
    cluster.get("get")
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    cluster.pump("n1", "n2")
    cluster.down("n3")
    cluster.new_process("n3", "another")
    assert not cluster.answers.failed
    assert cluster.up("n3") == "came back without its data"
    cluster.get("late")
    cluster.pump("n1", "n2")
    for token in ("get", "count", "late"):
        code, text, _ = cluster.answers.failed[token]
        assert code == Code.NOT_ENOUGH_REPLICAS
        assert text == "shard 0 cannot commit what this read saw: n3 came back without its data"
