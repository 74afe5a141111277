"""What the coordinator tells of itself: every key has its place in the document, every trouble its sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_tools import until

import kvtcp
from kvtcp.replication.recovery import Takeover, Verdict
from kvtcp.server import status as module
from kvtcp.testing.local_cluster import LocalCluster

DOCUMENT = Path(__file__).parent.parent / "docs" / "administration.md"


# documented and shown by the shell where the coordinator tells them; it does not yet
AWAITED = {
    "status": {"map_version", "moving", "learning", "under_replicated", "down", "counters"},
    "nodes": {
        "member_of", "wanted", "lag_entries", "lag_bytes", "learning", "learn_rate_bytes_s", "sync_p99_ms",
        "operations", "loop_lag_ms", "memory_bytes", "restarts",
    },
    "shards": {"epoch", "insync", "wanted", "learners", "lag_entries", "lag_bytes"},
}  # fmt: skip


async def test_administration_keys_are_documented() -> None:
    """Every key of status, nodes and shards stands in the document, and no other but those that are awaited."""
    async with LocalCluster(2, shards=2) as cluster, kvtcp.connect(cluster.url) as kv:
        shown = {
            "status": set(await kv.status()),
            "nodes": set().union(*await kv.nodes()),
            "shards": set().union(*await kv.shards()),
        }
    documented: dict[str, set[str]] = {}
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:].strip("` ")
        elif line.startswith("| `") and section in shown:
            documented.setdefault(section, set()).add(line.split("`")[1])
    assert documented == {name: keys | AWAITED[name] for name, keys in shown.items()}


async def test_every_trouble_has_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are down, bad copies, missing nodes, little space, time that stands still, a closed prefix: all at
    once."""
    async with LocalCluster(2, shards=4) as cluster:
        server = cluster.coordinator
        assert module.degraded(server) == []
        sequencer = server.sequencer
        first = sequencer.links["n1"]
        down, bad = sequencer.shards[1], sequencer.shards[2]
        down.serving, down.reason = False, "its members differ"
        bad.mark(first, "has an incomplete copy")
        bad.update_writable()
        sequencer.on_space("n2", 1)
        server.backups.restoring = b"in/"
        monkeypatch.setattr(module, "wall_ms", lambda: server.map.stamp_bound_ms + 1)
        assert module.degraded(server) == [
            "n1: 1 of 4 shards are bad, the first is shard 2: it has an incomplete copy",
            "1 shards are down, the first is shard 1: its members differ",
            "1 shards refuse writes: a replica of each is missing or bad",
            "3 shards refuse growing writes: too little disk space on n2",
            "deadlines do not pass: the config store does not take the next bound of time (its answer is awaited)",
            "keys that begin with \"in/\" are closed until a restore completes",
        ]
        assert [row["state"] for row in module.nodes(server)] == ["bad", "linked"]
        assert [(row["state"], row["reason"]) for row in module.shards(server)] == [
            ("ok", ""), ("down", "its members differ"), ("read-only", "n1 has an incomplete copy"), ("ok", ""),
        ]  # fmt: skip
        server.backups.restoring = None


async def test_a_takeover_with_a_shard_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named with its reason, and requests for it are refused with the same words; the others serve."""
    verdicts: list[Any] = []
    def judge(self: Any, shard: Any) -> None:
        if shard.number == 1:
            shard.verdict = Verdict(down="its members differ")
        verdicts.append(shard.number)

    monkeypatch.setattr(Takeover, "_judge", judge)
    async with LocalCluster(2, shards=2) as cluster, kvtcp.connect(cluster.url, timeout=0.2) as kv:
        await until(lambda: len(verdicts) == 2)
        [sentence] = (await kv.status())["degraded"]
        assert sentence == "1 shards are down, the first is shard 1: its members differ"
        with pytest.raises(kvtcp.Unavailable, match="shard 1 is down: its members differ"):
            await kv.count()
