"""The coordinator's server with real nodes: nodes that die, come back empty, are slow; acknowledgements withheld."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_tools import BOTH_LOOPS, Wire, event_loop_policy, keys_of_shards, kill_node, restart_empty, until

import kvtcp
from kvtcp.constants import WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.protocol.link import RESULTS
from kvtcp.testing.local_cluster import LocalCluster

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS
DOCUMENT = Path(__file__).parent.parent / "docs" / "administration.md"


@contextlib.contextmanager
def withheld(cluster: LocalCluster, node: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The node applies and answers, but acknowledges nothing as durable; at the end it acknowledges everything."""
    connection = cluster.nodes[node]._link
    assert connection is not None
    send, replica = connection.send, cluster.nodes[node].replica

    def hold(message: Any) -> None:
        send((RESULTS, message[1], durable, *message[3:]) if message[0] == RESULTS else message)

    durable = replica.applied
    with monkeypatch.context() as patch:
        patch.setattr(connection, "send", hold)
        yield
    send((RESULTS, replica.applied, replica.applied, [], []))
    connection.flush()


async def test_node_killed() -> None:
    """With a node gone, writes of its shards are refused within about WRITE_WAIT_MS, reads go on from the others."""
    async with LocalCluster(3, replication_factor=2, shards=16) as cluster:
        keys = keys_of_shards(cluster)
        async with kvtcp.connect(cluster.url) as kv, await Wire.open(cluster.coordinator.address) as wire:
            await kv.put_many(dict.fromkeys(keys, "v"))
            await kill_node(cluster, "n2")
            missing = set(cluster.coordinator.map.shards_of("n2"))
            started = time.monotonic()
            wire.send(*([n, "incr", f"{{{key}}}n", 1] for n, key in enumerate(keys)))
            answers = {answer[0]: answer for answer in [await wire.receive() for _ in keys]}
            took_ms = (time.monotonic() - started) * 1000
            assert WRITE_WAIT_MS * 0.9 < took_ms < WRITE_WAIT_MS * 2
            refused = {n for n, answer in answers.items() if answer[1] == Code.NOT_ENOUGH_REPLICAS}
            assert {n for n, answer in answers.items() if answer[1] == 0} | refused == set(range(len(keys)))
            assert len(refused) == len(missing) > 0
            assert all(b"takes no writes: n2 is missing" in answers[n][2] for n in refused)
            started = time.monotonic()
            assert await kv.get_many(keys) == [b"v"] * len(keys)
            assert [await kv.get(key) for key in keys] == [b"v"] * len(keys)
            assert await kv.count() == 2 * len(keys) - len(refused)
            assert time.monotonic() - started < 1
            status = await kv.status()
            assert status["state"] == "degraded" and status["nodes_linked"] == 2
            assert any("n2 is not linked" in sentence for sentence in status["degraded"])
            assert any(f"{len(missing)} shards refuse writes" in sentence for sentence in status["degraded"])
            cluster.coordinator.sequencer.check()


async def test_node_restarted_empty(caplog: pytest.LogCaptureFixture) -> None:
    """A node that comes back without its data serves nothing, `status` and `nodes` say why; reads never see it."""
    async with LocalCluster(2, shards=8) as cluster, kvtcp.connect(cluster.url, timeout=1.5) as kv:
        keys = keys_of_shards(cluster)
        await kv.put_many(dict.fromkeys(keys, "v"))
        await kill_node(cluster, "n1")
        await restart_empty(cluster, "n1")
        link = cluster.coordinator.links["n1"]
        await until(lambda: link.bad, "the report of the empty node")
        assert not link.progress.connected
        for _ in range(5):
            assert await kv.get_many(keys) == [b"v"] * len(keys)
            assert [await kv.get(key) for key in keys] == [b"v"] * len(keys)
        async with await Wire.open(cluster.coordinator.address) as wire:
            assert (await wire.ask("put", keys[0], "x"))[1] == Code.NOT_ENOUGH_REPLICAS
        node = next(node for node in await kv.nodes() if node["node"] == "n1")
        assert node["state"] == "bad" and "came back without its data" in node["reason"]
        assert any("n1 serves nothing" in sentence for sentence in (await kv.status())["degraded"])
        assert {shard["state"] for shard in await kv.shards()} == {"read-only"}
        assert "event=node-not-a-member node=n1" in caplog.text
        assert not cluster.nodes["n1"].replica.operations, "it was asked nothing"


async def test_empty_node_of_an_empty_cluster() -> None:
    """A node that had acknowledged nothing may come back with another disk and is a member again."""
    async with LocalCluster(2, shards=8) as cluster, kvtcp.connect(cluster.url, timeout=5) as kv:
        await kill_node(cluster, "n1")
        await restart_empty(cluster, "n1")
        await kv.put("a", "1")
        assert (await kv.status())["state"] == "ok"


async def test_withheld_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read waits while what it saw is not committed (a new value, an absence after a delete); an old key answers."""
    async with LocalCluster(2, shards=1) as cluster, await Wire.open(cluster.coordinator.address) as wire:
        for key in ("old", "gone"):
            assert (await wire.ask("put", key, "v"))[1] == 0
        with withheld(cluster, "n2", monkeypatch):
            wire.send([100, "put", "new", "v"], [101, "get", "new"], [102, "delete", "gone"], [103, "get", "gone"])
            wire.send([104, "exists", "none"], [105, "count", "", None], [106, "mget", ["old"]])
            wire.send([107, "get", "old"], [108, "ttl", "old"], [109, "exists", "old"])
            answers = [await wire.receive() for _ in range(3)]
            assert {answer[0] for answer in answers} == {107, 108, 109}
            await until(lambda: not any(link.written for link in cluster.coordinator.sequencer.links.values()))
            assert len(cluster.coordinator.sequencer.shards[0].held) == 5, "results are here, and held"
            assert cluster.coordinator.sequencer.shards[0].commit == 2
        answers = [await wire.receive() for _ in range(7)]
        assert {answer[0]: answer[2] for answer in answers} == {
            100: 3, 101: [b"v", 3, None], 102: True, 103: None, 104: False, 105: 2, 106: [[b"v", 1, None]],
        }  # fmt: skip
        cluster.coordinator.sequencer.check()


async def test_slow_node() -> None:
    """A slow replica slows writes down to its pace and loses none; reads come from the other one."""
    async with LocalCluster(2, shards=4) as cluster, kvtcp.connect(cluster.url, timeout=8) as kv:
        await kv.put("a", "0")
        node = cluster.nodes["n2"]
        assert node._link is not None and node._link.transport is not None
        transport = node._link.transport
        transport.pause_reading()
        writes = [asyncio.ensure_future(kv.incr("a")) for _ in range(200)]
        await until(lambda: cluster.coordinator.links["n2"].progress.items >= 200, "writes on their way")
        assert not any(write.done() for write in writes)
        transport.resume_reading()
        assert sorted(await asyncio.gather(*writes)) == list(range(1, 201))
        assert await kv.get("a") == b"200"


async def test_silent_node_is_named() -> None:
    """A node whose link is up and that does not answer heartbeats is named by status and nodes, until it answers."""
    async with LocalCluster(2, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        assert (await kv.status())["state"] == "ok"
        node = cluster.nodes["n2"]
        assert node._link is not None and node._link.transport is not None
        transport = node._link.transport
        transport.pause_reading()
        silent = cluster.coordinator.links["n2"]
        await until(lambda: cluster.coordinator.nodes()[1]["state"] == "silent", "the silence")
        [sentence] = (await kv.status())["degraded"]
        assert sentence.startswith("n2 has not answered for") and silent.progress.connected
        transport.resume_reading()
        await until(lambda: not cluster.coordinator.degraded(), "an answer")
        assert silent.number == 1, "the link was never lost"


async def test_core_task_that_fails_ends_the_coordinator() -> None:
    """An exception nobody foresaw in a task of the coordinator is reported in `failed`, which ends the process."""
    async with LocalCluster(1, shards=1) as cluster:

        async def fail() -> None:
            raise RuntimeError("a defect")

        task = asyncio.get_running_loop().create_task(fail())
        task.add_done_callback(cluster.coordinator.core_task_done)
        with pytest.raises(RuntimeError, match="a defect"):
            await cluster.coordinator.failed


async def test_administration_keys_are_documented() -> None:
    """Every key of status, nodes and shards stands in the document, and no other."""
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
        elif line.startswith("| `"):
            documented.setdefault(section, set()).add(line.split("`")[1])
    assert documented == shown
