"""Tests of the shared state: what its checks find, and the sink that nobody listens to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from replication_fakes import Cluster

from kvtcp.replication.shard_state import IGNORE, ShardState

DAMAGE: list[tuple[str, Callable[[ShardState], object]]] = [
    ("commit is at most", lambda shard: setattr(shard, "commit", 9)),
    ("pending are the numbers", lambda shard: shard.pending.clear()),
    ("commit is what all members have", lambda shard: shard.acked.update(dict.fromkeys(shard.members, 1))),
    ("not given", lambda shard: shard.acked.update({shard.members[0]: 9})),
    ("is not held", lambda shard: shard.held.append((0, 1, 0, None, None, None))),
    ("that cannot come", lambda shard: (setattr(shard, "stuck", "x"), shard.held.append((1, 1, 0, None, None, None)))),
    ("waiting reads are counted", lambda shard: setattr(shard, "waiting_reads", 1)),
    ("nobody waits", lambda shard: setattr(shard, "serving", False)),
    ("all members can take", lambda shard: setattr(shard.members[1], "full", True)),
]


@pytest.mark.parametrize(("text", "damage"), DAMAGE, ids=[text for text, _ in DAMAGE])
def test_check_finds(text: str, damage: Callable[[ShardState], object]) -> None:
    """Each broken invariant is named."""
    cluster = Cluster(shards=1)
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


def test_ignore_is_a_sink() -> None:
    """The sequencer's own writes are answered to nobody."""
    IGNORE.reply(None, 1)
    IGNORE.fail(None, 1, "", {})
