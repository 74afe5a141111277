"""Links between coordinator and nodes: cut, refused, slow, replaced. Nothing is lost, nothing happens twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import kvtcp
from kvtcp.constants import LINK_SILENCE_MS
from kvtcp.coordinator import links as links_module
from kvtcp.coordinator.links import LinkConnection
from kvtcp.errors import OutcomeUnknown
from kvtcp.node.connection import NodeConnection
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import BATCH, HELLO, RESULTS
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import (
    BOTH_LOOPS,
    Wire,
    cut_link,
    event_loop_policy,
    keys_of_shards,
    link_hello,
    link_number,
    linked,
    pack,
    until,
)
from tests.support.learning_tools import deafen

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


async def cut_and_wait(cluster: LocalCluster, node: str) -> None:
    """Cut a link and wait for the next one."""
    link = cluster.coordinator.links[node]
    number = link_number(cluster.coordinator, node)
    cut_link(cluster.coordinator, node)
    await until(lambda: link_number(cluster.coordinator, node) > number and link.progress.connected, "the next link")


async def test_cut_links_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links cut again and again under load: every counter is exactly what was acknowledged, or unknown but once."""
    monkeypatch.setattr(links_module, "BACKOFF_MIN_MS", 2)
    async with LocalCluster(3, shards=16) as cluster:
        keys = keys_of_shards(cluster)
        acked = dict.fromkeys(keys, 0)
        unknown = dict.fromkeys(keys, 0)
        stop = False

        async def count(kv: Any, key: str) -> None:
            while not stop:
                try:
                    answer = await kv.incr(key)
                except OutcomeUnknown:
                    unknown[key] += 1
                    continue
                acked[key] += 1
                assert acked[key] <= answer <= acked[key] + unknown[key]

        async with kvtcp.connect(cluster.url, timeout=10) as kv:
            tasks = [asyncio.ensure_future(count(kv, key)) for key in keys]
            for n in range(12):
                before = sum(acked.values())
                await until(lambda: sum(acked.values()) > before + 100, "progress")  # noqa: B023
                await cut_and_wait(cluster, f"n{n % 3 + 1}")
                cluster.coordinator.sequencer.check()
            stop = True
            await asyncio.gather(*tasks)
            for key in keys:
                value = int(await kv.get(key) or b"0")
                assert acked[key] <= value <= acked[key] + unknown[key], key
        await until(lambda: not cluster.coordinator.status.degraded(), "all nodes in sync")
        for number in range(16):
            tables = [node.replica.tables[number] for node in cluster.nodes.values()]
            assert len({(table.seq, table.chain, table.digest()) for table in tables}) == 1, "replicas are equal"
        assert {link_number(cluster.coordinator, node) for node in cluster.nodes} == {5}


async def test_heartbeats_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle link gets an empty batch now and then, which the node answers; a paused one gets none."""
    async with LocalCluster(1, shards=4) as cluster:
        link = cluster.coordinator.links["n1"]
        connection = link.connection
        assert connection is not None
        sent: list[Any] = []
        monkeypatch.setattr(connection, "send", sent.append)
        await until(lambda: sent, "a heartbeat")
        assert sent[0][0] == BATCH and sent[0][3] == []
        connection.write_paused = True
        count = len(sent)
        link.heartbeat()
        assert len(sent) == count


async def test_paused_link_keeps_its_batches() -> None:
    """While a node's socket takes nothing more, batches wait in the window; they leave when it does."""
    async with LocalCluster(1, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        link = cluster.coordinator.links["n1"]
        connection = link.connection
        assert connection is not None
        connection.pause_writing()
        writes = [asyncio.ensure_future(kv.put(f"k{n}", "v")) for n in range(10)]
        await until(lambda: link.progress.outgoing, "a batch that waits")
        assert not any(write.done() for write in writes)
        connection.resume_writing()
        await asyncio.gather(*writes)
        assert not link.progress.outgoing


async def test_one_write_per_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests of one read leave as one batch and one write to each node, and one write to the client."""
    async with LocalCluster(2, shards=8) as cluster, await Wire.open(cluster.coordinator.address) as wire:
        coordinator = cluster.coordinator
        writes: dict[str, int] = {"session": 0, "n1": 0, "n2": 0}
        session = next(iter(coordinator.clients.sessions))

        def counted(name: str, transport: Any) -> Any:
            class Counting:
                def __getattr__(self, attribute: str) -> Any:
                    return getattr(transport, attribute)

                def write(self, data: bytes) -> None:
                    writes[name] += 1
                    transport.write(data)

            return Counting()

        for name in ("n1", "n2"):
            connection = coordinator.links[name].connection
            assert connection is not None
            monkeypatch.setattr(coordinator.links[name], "heartbeat", lambda: None)
            connection.transport = counted(name, connection.transport)
        session.transport = counted("session", session.transport)
        wire.send(*([n, "put", f"k{n}", "v"] for n in range(100)))
        for _ in range(100):
            assert (await wire.receive())[1] == 0
        assert writes["n1"] == writes["n2"] == 1
        assert writes["session"] <= 4, "one for each frame of acknowledgements at most"


async def test_link_replaced_by_a_newer_one() -> None:
    """A newer link of the same coordinator takes over: the older one is closed with what was unread, once."""
    async with LocalCluster(1, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put("a", "1")
        node = cluster.nodes["n1"]
        async with await Wire.open(node.address, hello=False) as wire:
            wire.send([HELLO, link_hello(cluster, "n1")])
            await until(lambda: not cluster.coordinator.links["n1"].progress.connected, "the older link")
            # the coordinator dials with the number this one has used, is refused, and then with the next
            await linked(cluster.coordinator, 1)
        assert await kv.incr("a") == 2
        assert len(node.connections) <= 2


async def test_results_that_cannot_be_true(caplog: pytest.LogCaptureFixture) -> None:
    """A node that acknowledges what it was never sent, or sends other types, loses its link, and gets a new one."""
    async with LocalCluster(2, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put("a", "1")
        for frame in ([4, 10**6, 10**6, [], []], [4, "1", 1, [], []], [4, 0, 0, [1, 2, 3], []], [4, 1, 1, None, []]):
            node = cluster.nodes["n1"]
            number = link_number(cluster.coordinator, "n1")
            assert node.core.link is not None
            node.core.link.connection.send(frame)
            node.core.link.connection.flush()
            await until(lambda: link_number(cluster.coordinator, "n1") > number, "a new link")  # noqa: B023
            await linked(cluster.coordinator, 2)
            assert await kv.get("a") == b"1"
        assert "n1 applied ordinal 1000000" in caplog.text and "results that nobody asked for" in caplog.text
        assert not cluster.coordinator.failed.done()


async def test_unfinished_dial() -> None:
    """A connection that never was made or answered leaves no future with an exception that nobody looked at."""
    async with LocalCluster(1, shards=4) as cluster:
        connection = LinkConnection(cluster.coordinator.links["n1"])
        connection.closed("never made")
        with pytest.raises(ConnectionError, match="never made"):
            await connection.answered
        assert connection.lost.is_set() and not connection.live
        assert cluster.coordinator.links["n1"].connection is not connection


async def test_half_open_link(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A link on which nothing moves any more is given up and dialled again: what was on it goes on, once."""
    monkeypatch.setattr(links_module, "LINK_SILENCE_MS", 700)
    async with LocalCluster(2, shards=4) as cluster, kvtcp.connect(cluster.url, timeout=8) as kv:
        await kv.put("a", "1")
        node = cluster.nodes["n1"]
        deafen(node)
        assert sorted(await asyncio.gather(*(kv.incr("b") for _ in range(20)))) == list(range(1, 21))
        assert await kv.incr("a") == 2
        assert link_number(cluster.coordinator, "n1") == 2
        assert "event=link-down node=n1 reason=connection lost: nothing came or went for" in caplog.text
        cluster.coordinator.sequencer.check()


async def test_silence_is_told_from_slowness_and_stalls() -> None:
    """A link is not given up while the node's kernel takes bytes, nor after a stall of the coordinator itself."""
    async with LocalCluster(1, shards=4) as cluster:
        link = cluster.coordinator.links["n1"]
        connection = link.connection
        assert connection is not None
        now_ms = link.progress.heard_ms + LINK_SILENCE_MS - 1
        link.watch_silence(now_ms, excused=False)
        connection.untaken_bytes = 1  # it takes one byte
        link.watch_silence(now_ms + 1, excused=False)
        now_ms += LINK_SILENCE_MS
        link.watch_silence(now_ms, excused=False)
        link.watch_silence(now_ms + 1000, excused=True)
        now_ms += 999 + LINK_SILENCE_MS
        link.watch_silence(now_ms, excused=False)
        assert connection.given_up == ""
        link.watch_silence(now_ms + 1, excused=False)
        assert connection.given_up != ""


async def test_a_removed_node_is_not_listened_to() -> None:
    """What a node still says on its link when it was removed from the cluster changes nothing."""
    async with LocalCluster(3, replication_factor=3, shards=4) as cluster:
        coordinator = cluster.coordinator
        node = NodeServer("n4", cluster=coordinator.map.cluster, secret=coordinator.secret)
        await node.start("127.0.0.1", 0)
        async with kvtcp.connect(cluster.url) as kv:
            assert (await kv.node_add(*node.address)).node == "n4"
            link = coordinator.links["n4"]
            await until(lambda: link.connection is not None and link.connection.live, "the link to n4")
            connection = link.connection
            assert connection is not None
            await kv.node_remove("n4")
            connection.data_received(pack([RESULTS, 0, 0, [], []]))
            assert "n4" not in coordinator.links
            await kv.put("k", "v")
        await node.close()


async def test_a_node_on_this_machine_is_reached_by_its_socket(tmp_path: Path) -> None:
    """The link goes over the node's Unix socket where there is one, and over its port where there is none."""
    async with LocalCluster(2, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        cluster.coordinator.local_sockets = {"n1": tmp_path / "n1.sock", "n2": tmp_path / "gone.sock"}
        listening = await asyncio.get_running_loop().create_unix_server(
            lambda: NodeConnection(cluster.nodes["n1"]), str(tmp_path / "n1.sock")
        )
        for node in ("n1", "n2"):
            await cut_and_wait(cluster, node)
        peers = {}
        for node, link in cluster.coordinator.links.items():
            assert link.connection is not None
            peers[node] = link.connection.peer
        assert peers["n1"] == str(tmp_path / "n1.sock") and peers["n2"].startswith("127.0.0.1:")
        assert await kv.incr("a") == 1
        listening.close()


async def test_a_node_leaves_while_it_is_dialled() -> None:
    """The map does not name it any more, and its link is not removed yet: an attempt fails, the coordinator goes on."""
    async with LocalCluster(2, shards=2) as cluster:
        link = cluster.coordinator.links["n2"]
        link.node = "n9"
        with pytest.raises(ConnectionError, match="the node left the cluster"):
            _ = link.address
        assert [row["node"] for row in cluster.coordinator.status.nodes()] == ["n1"]
        link.node = "n2"
