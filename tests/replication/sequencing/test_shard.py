"""Tests of Shard: what its checks find, marks and space. test_admission.py has requests, test_answers.py answers,
test_members.py members."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvtcp.replication.sequencing.shard import Shard
from tests.support.replication_fakes import Cluster

DAMAGE: list[tuple[str, Callable[[Shard], object]]] = [
    ("commit is at most", lambda shard: setattr(shard, "commit", 9)),
    ("pending are the numbers", lambda shard: shard.pending.clear()),
    ("commit is what all members have", lambda shard: shard.acked.update(dict.fromkeys(shard.members, 1))),
    ("not given", lambda shard: shard.acked.update({shard.members[0]: 9})),
    ("is not held", lambda shard: shard.held.append((0, 1, 0, None, None, None))),
    (
        "that cannot come",
        lambda shard: (setattr(shard, "blocked_reason", "x"), shard.held.append((1, 1, 0, None, None, None))),
    ),
    ("waiting reads are counted", lambda shard: setattr(shard, "waiting_reads", 1)),
    ("no request waits", lambda shard: setattr(shard, "serving", False)),
    ("all members can take", lambda shard: setattr(shard.members[1], "full", True)),
    ("has no bad member, and space", lambda shard: shard.mark(shard.members[1], "is in doubt")),
    ("has no bad member, and space", lambda shard: setattr(shard, "space", 1)),
    ("good members are those not bad", lambda shard: setattr(shard, "good", shard.members[1:])),
]


@pytest.mark.parametrize(("text", "damage"), DAMAGE, ids=[f"{n} {text}" for n, (text, _) in enumerate(DAMAGE)])
def test_check_finds(cluster: Cluster, text: str, damage: Callable[[Shard], object]) -> None:
    """Each broken invariant is named."""
    cluster.put("w")
    shard = cluster.sequencer.shards[0]
    shard.check()
    damage(shard)
    with pytest.raises(AssertionError, match=text):
        shard.check()


def test_links_know_their_shards() -> None:
    """Each link lists the shards with a copy on its node."""
    cluster = Cluster(nodes=4, factor=2, shards=6)
    for node, link in cluster.sequencer.links.items():
        assert [shard.number for shard in link.shards] == cluster.map.shards_of(node)


def test_marks(cluster: Cluster) -> None:
    """A bad member is none of the good ones, in whatever order they are marked; a shard with one is not whole."""
    shard = cluster.sequencer.shards[0]
    first, second, third = shard.members
    assert shard.is_whole() and shard.takes_writes()
    shard.mark(second, "why")
    shard.mark(first, "why")
    assert shard.good == [third] and not shard.is_whole() and not shard.takes_writes()
    shard.mark(first, "")
    shard.mark(first, "")
    assert shard.good == [first, third] and list(shard.bad) == [second]


def test_the_worst_member_decides_on_space(cluster: Cluster) -> None:
    """A shard is as short of space as its worst member, and not writable while it is."""
    shard = cluster.sequencer.shards[0]
    for level, link in zip((1, 2, 0), shard.members, strict=True):
        link.space = level
    shard.update_space()
    shard.update_writable()
    assert shard.space == 2 and not shard.writable and shard.takes_writes()
