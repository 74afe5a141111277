"""Tests of confirmed reads: what counts as a confirmation, when an answer is released or refused (R11 c)."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol.operations import AUDIT, GET
from kvtcp.replication.sequencing import link as link_module
from kvtcp.replication.sequencing import shard as shard_module
from kvtcp.replication.sequencing.confirm import ConfirmingSequencer
from kvtcp.replication.sequencing.multi_read import count_read
from kvtcp.replication.sequencing.shard import Following
from tests.support.replication_fakes import Cluster


class Confirming(Cluster):
    """A cluster with a shared store: its sequencer confirms."""

    def __init__(self, nodes: int = 3, factor: int = 3, shards: int = 1, min_insync: int = 2) -> None:
        super().__init__(nodes, factor, shards, min_insync=min_insync, link=False)
        self.sequencer = ConfirmingSequencer(self.map)
        self.begin(0)
        for number in range(shards):
            self.sequencer.shards[number].serve(0, 0)
        for node in self.map.nodes:
            assert self.up(node) is None

    def read(self, token: Any = "read", number: int = 0) -> str:
        """A read of one key; the node that it was sent to, which is asked and answers it alone."""
        before = {node: link.items for node, link in self.sequencer.links.items()}
        self.get(token, number)
        [node] = [node for node, link in self.sequencer.links.items() if link.items > before[node]]
        return node

    def others(self, *nodes: str) -> list[str]:
        """All but these."""
        return [node for node in self.replicas if node not in nodes]


@pytest.mark.parametrize(("min_insync", "needed"), [(1, 3), (2, 2), (3, 1)])
def test_how_many_have_to_confirm(min_insync: int, needed: int) -> None:
    """|E| - M + 1: any M members have one in common with them."""
    cluster = Confirming(min_insync=min_insync)
    reader = cluster.read()
    order = [reader, *cluster.others(reader)]
    for count, node in enumerate(order, 1):
        assert "read" not in cluster.answers
        cluster.pump(node)
        if count == needed:
            break
    assert cluster.answers.ok == {"read": None}


def test_only_what_was_sent_after_the_read_confirms_it() -> None:
    """An answer to a probe of a tick before says nothing of the time since."""
    cluster = Confirming()
    cluster.read("first")
    for node in cluster.replicas:
        cluster.apply(node)
    reader = cluster.read("second")
    other, third = cluster.others(reader)
    for node in cluster.replicas:
        cluster.results(node)
    assert cluster.answers.ok == {"first": None}
    cluster.pump(reader)
    assert "second" not in cluster.answers
    cluster.pump(other)
    assert cluster.answers.ok == {"first": None, "second": None}
    cluster.pump(third)


def test_reads_of_a_tick_share_their_probes() -> None:
    """One for each link, behind the reads, and none in a tick without reads."""
    cluster = Confirming()
    for n in range(6):
        cluster.get(n)
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    items = {node: [item[0] for item in cluster.apply(node)] for node in cluster.replicas}
    assert all(ops.count(AUDIT) == 1 and ops[-1] == AUDIT for ops in items.values())
    assert sum(ops.count(GET) for ops in items.values()) == 6
    cluster.put("w")
    assert all(AUDIT not in [item[0] for item in cluster.apply(node)] for node in cluster.replicas)
    cluster.pump()
    for node in cluster.replicas:
        cluster.results(node)
    assert cluster.answers.ok.keys() == {*range(6), "count", "w"}


def test_a_read_over_shards_is_confirmed_for_each_of_them() -> None:
    """By members of each."""
    cluster = Confirming(nodes=4, factor=2, shards=2, min_insync=1)
    assert [cluster.map.nodes_of(number) for number in range(2)] == [["n1", "n2"], ["n3", "n4"]]
    cluster.sequencer.multi_read(count_read([0, 1], b"", None, cluster.answers, "count"))
    for node in ("n1", "n3", "n4"):
        cluster.pump(node)
    assert "count" not in cluster.answers
    cluster.pump("n2")
    assert cluster.answers.ok == {"count": 0}


def test_a_read_that_is_confirmed_and_not_committed_waits() -> None:
    """All of the rule holds, not a part of it."""
    cluster = Confirming()
    cluster.put("w")
    reader = cluster.read()
    other, third = cluster.others(reader)
    cluster.pump(reader, other)
    assert "read" not in cluster.answers
    cluster.pump(third)
    assert cluster.answers.ok["read"][1] == 1


def test_a_link_that_is_lost_confirms_nothing() -> None:
    """Its probe died with it, and it is not asked before it is back."""
    cluster = Confirming(min_insync=1)
    reader = cluster.read()
    other, third = cluster.others(reader)
    cluster.apply(third)
    cluster.down(third)
    cluster.pump(reader, other)
    assert "read" not in cluster.answers
    assert cluster.up(third) is None
    cluster.pump(third)
    assert "read" not in cluster.answers, "nothing was asked since"
    cluster.get("next")
    cluster.pump()
    assert cluster.answers.ok.keys() == {"read", "next"}


def test_a_bad_member_confirms_nothing() -> None:
    """Another disk is not the member's, whatever it answers (R9)."""
    cluster = Confirming(min_insync=1)
    cluster.commit("w")
    cluster.down("n3")
    cluster.new_process("n3", "another")
    assert cluster.up("n3") is not None
    cluster.get("read")
    cluster.pump()
    assert "read" not in cluster.answers
    cluster.sequencer.leave([cluster.sequencer.shards[0]], cluster.sequencer.links["n3"])
    cluster.get("next")
    cluster.pump()
    assert cluster.answers.ok.keys() == {"w", "read", "next"}


def test_a_member_that_was_good_when_it_was_asked() -> None:
    """And is bad, or gone, when the answer comes: it confirms nothing."""
    cluster = Confirming(min_insync=1)
    reader = cluster.read()
    other, third = cluster.others(reader)
    cluster.apply(third)
    shard, link = cluster.sequencer.shards[0], cluster.sequencer.links[third]
    shard.mark(link, "is in doubt")
    shard.update_writable()
    cluster.results(third)
    cluster.pump(reader, other)
    assert "read" not in cluster.answers
    cluster.tick(WRITE_WAIT_MS)
    assert cluster.answers.failed["read"][0] == Code.NOT_ENOUGH_REPLICAS


@pytest.mark.parametrize("how", ["join", "swap"])
def test_what_a_learner_answered_does_not_confirm(how: str) -> None:
    """It did not answer as a member."""
    cluster = Confirming(nodes=3, factor=2, shards=1, min_insync=1)
    assert cluster.map.nodes_of(0) == ["n1", "n2"]
    sequencer = cluster.sequencer
    shard, link = sequencer.shards[0], sequencer.links["n3"]
    cluster.read("first")
    cluster.pump("n1", "n2")
    cluster.apply("n3")
    cluster.results("n3")
    shard.learners[link] = following = Following(lambda seq: None)
    following.replica_id = "disk"
    if how == "join":
        sequencer.join(shard, link)
    else:
        sequencer.swap(shard, shard.members[1], link)
    sequencer.check()
    assert sequencer._confirmed.get(link) is None and cluster.answers.ok == {"first": None}


def test_a_read_that_is_not_confirmed_is_refused_in_time() -> None:
    """This coordinator may not own the cluster any more; younger ones wait on."""
    cluster = Confirming()
    reader = cluster.read()
    cluster.pump(reader)
    cluster.tick(WRITE_WAIT_MS - 1)
    assert "read" not in cluster.answers
    younger = cluster.read("younger")
    cluster.pump(younger)
    cluster.tick(1)
    code, text, details = cluster.answers.failed["read"]
    assert (code, details) == (Code.NOT_ENOUGH_REPLICAS, {"shard": 0})
    assert text == "too few members confirmed in 1000 ms that this coordinator still owns the cluster"
    assert cluster.sequencer.unavailable == 1 and "younger" not in cluster.answers
    cluster.pump()
    assert cluster.answers.ok == {"younger": None}


def test_refusals_need_no_confirmation() -> None:
    """They show nothing."""
    cluster = Confirming()
    cluster.sequencer.stop_serving(0, "a test")
    cluster.get("read")
    cluster.sequencer.multi_read(count_read([0], b"", None, cluster.answers, "count"))
    assert cluster.answers.failed["read"][0] == cluster.answers.failed["count"][0] == Code.SHARD_DOWN


def test_a_link_without_room_is_asked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of a node that hangs do not pile up; when it answers again it is asked for all reads since. A node without
    shards is never asked."""
    for module in (shard_module, link_module):
        monkeypatch.setattr(module, "WINDOW_ITEMS_MAX", 64)
    cluster = Confirming(nodes=4, min_insync=1)
    [idle] = [node for node, link in cluster.sequencer.links.items() if not link.shards]
    hanging = cluster.sequencer.links[next(node for node in cluster.replicas if node != idle)]
    rounds = 0
    while not hanging.full:
        cluster.get(f"read {rounds}", 0)
        cluster.sequencer.close_batches()
        rounds += 1
    items = hanging.items
    for number in range(5):
        cluster.get(f"late {number}", 0)
        cluster.sequencer.close_batches()
    assert hanging.items == items and rounds > 10
    assert cluster.sequencer.links[idle].items == 0
    for _ in range(3):
        cluster.pump(*cluster.replicas)
        cluster.sequencer.close_batches()
    assert all(cluster.answers.ok[f"late {number}"] is None for number in range(5))
