"""What the coordinator tells of itself: every key has its place in the document, every trouble its sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvtcp
from kvtcp.coordinator import status as module
from kvtcp.protocol.hashing import shard_of
from kvtcp.replication.membership.learner import Learner
from kvtcp.replication.membership.recovery import Recovery, _Shard
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import until

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "administration.md"


async def test_administration_keys_are_documented() -> None:
    """Every key of status, nodes and shards stands in the document, and no other."""
    async with LocalCluster(2, shards=2) as cluster, kvtcp.connect(cluster.url) as kv:
        shown = {
            "status": set(await kv.status()), "nodes": set().union(*await kv.nodes()),
            "shards": set().union(*await kv.shards()),
        }  # fmt: skip
    documented: dict[str, set[str]] = {}
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:].strip("` ")
        elif line.startswith("| `") and section in shown:
            documented.setdefault(section, set()).add(line.split("`")[1])
    assert documented == shown


async def test_counters_and_learners_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps within the maps have documented keys too."""
    text = DOCUMENT.read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    monkeypatch.setattr(Learner, "on_learned", lambda *_: None)
    async with LocalCluster(3, shards=2) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put("a", "1")
        await cluster.kill_node("n3")
        await until(lambda: cluster.coordinator.controller.membership.evictions, "the eviction")
        await cluster.restart_node("n3")
        await until(lambda: cluster.coordinator.status.shards()[0]["learners"], "a learner")
        [learner] = cluster.coordinator.status.shards()[0]["learners"]
        told = await kv.status()
        assert told["learning"] == 2 and told["moving"] == 2
        assert cluster.coordinator.status.nodes()[2]["state"] == "learning"
    assert all(f"`{key}`" in rows["learners"] for key in learner), learner
    assert all(f"`{key}`" in rows["counters"] for key in told["counters"]), told["counters"]


async def test_every_trouble_has_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are down or not served yet, bad and missing copies, nodes that hang, little space, time that stands
    still, a map that cannot change, a closed prefix: all at once."""
    async with LocalCluster(2, shards=6, min_insync=1) as cluster:
        server = cluster.coordinator
        assert server.status.degraded() == []
        sequencer = server.sequencer
        first = sequencer.links["n1"]
        down, bad, recovering, short = sequencer.shards[1:5]
        down.serving, down.reason = False, "its members differ"
        bad.mark(first, "has an incomplete copy")
        bad.update_writable()
        recovering.serving, recovering.reason = False, "its members have not reported yet"
        server.controller.recovery.shards = {recovering.number: _Shard(recovering.number)}
        sequencer.leave([short], first)
        sequencer.on_space("n2", 1)
        server.backups.restoring = b"in/"
        sequencer.links["n2"].heard_ms -= 60_000
        with monkeypatch.context() as patch:
            patch.setattr(module, "wall_ms", lambda: server.map.stamp_bound_ms + 1)
            sentences = server.status.degraded()
        assert sentences[0].startswith("n2 has not answered for 60")
        assert sentences[1:] == [
            "1 shards are down, the first is shard 1: its members differ",
            "1 shards are not served yet, the first is shard 3: its members have not reported yet",
            "1 shards take no writes, the first is shard 2: n1 has an incomplete copy",
            "1 shards have fewer copies than they should, the first is shard 4: n1 is not in sync (it will learn soon)",
            "4 shards refuse growing writes: too little disk space on n2",
            "deadlines do not pass: the config store does not take the next bound of time (its answer is awaited)",
            "keys that begin with \"in/\" are closed until a restore completes",
        ]
        assert [(row["state"], row["reason"]) for row in server.status.nodes()] == [
            ("up", "its copy of shard 2 cannot be used: it has an incomplete copy"), ("silent", ""),
        ]  # fmt: skip
        assert [row["state"] for row in server.status.shards()] == [
            "ok", "down", "read-only", "recovering", "under-replicated", "ok",
        ]  # fmt: skip
        server.map_store.changes.trouble = "no answer"
        assert "in-sync sets cannot change: no answer" in server.status.degraded()
        server.backups.restoring, server.map_store.changes.trouble = None, ""
        for shard in (down, recovering, bad, short):
            shard.serving = False  # nothing of this is to be healed
        server.controller.recovery.shards.clear()


async def test_a_takeover_with_a_shard_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named with its reason, and requests for it are refused with the same words; the others serve."""
    proceed = Recovery._proceed

    def judge(self: Any, shard: Any) -> None:
        if shard.number == 1:
            self._down(shard, "its members differ")
        else:
            proceed(self, shard)

    monkeypatch.setattr(Recovery, "_proceed", judge)
    async with LocalCluster(2, shards=2) as cluster, kvtcp.connect(cluster.url, timeout=0.2) as kv:
        told = await kv.status()
        assert told["degraded"] == ["1 shards are down, the first is shard 1: its members differ"] and told["down"] == 1
        with pytest.raises(kvtcp.Unavailable, match="shard 1 is down: its members differ"):
            await kv.count()
        key = next(key for key in "abcdef" if shard_of(key.encode(), 2) == 0)
        await kv.put(key, "1")


async def test_nodes_that_come_and_go() -> None:
    """A node that is drained says so, then that it holds nothing; one that was declared destroyed is named as such."""
    async with LocalCluster(3, replication_factor=2, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put_many({f"k{n}": "v" for n in range(40)})
        assert [row["shards"] for row in await kv.nodes()] == [row["wanted"] for row in await kv.nodes()]
        await kv.node_drain("n3")
        assert cluster.coordinator.status.nodes()[2]["wanted"] == 0
        await until(lambda: cluster.coordinator.status.nodes()[2]["state"] == "drained", "an empty node")
        row = (await kv.nodes())[2]
        assert row["shards"] == row["member_of"] == 0 and not cluster.nodes["n3"].replica.copies
        assert (await kv.status())["state"] == "ok" and await kv.count() == 40
