"""The coordinator's server with real nodes: nodes that die, come back empty, are slow, come and go for good; takeovers,
and coordinators that are deposed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

import kvtcp
from kvtcp.constants import SEND_REQUESTS, STAMP_AHEAD_MS, WRITE_WAIT_MS
from kvtcp.coordinator import server as module
from kvtcp.coordinator import status
from kvtcp.coordinator.takeover import CannotServe
from kvtcp.errors import Code
from kvtcp.protocol.link import HELLO, REPORT, RESULTS
from kvtcp.replication import ownership
from kvtcp.replication.membership.insync import Membership
from kvtcp.testing import local_cluster
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import (
    BOTH_LOOPS,
    Wire,
    bad_shards,
    event_loop_policy,
    keys_of_shards,
    kill_node,
    link_hello,
    link_number,
    pack,
    restart_empty,
    until,
)
from tests.support.learning_tools import deafen

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


@contextlib.contextmanager
def withheld(cluster: LocalCluster, node: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The node applies and answers, but acknowledges nothing as durable; at the end it acknowledges everything."""
    link = cluster.nodes[node].core.link
    assert link is not None
    connection = link.connection
    send, replica = connection.send, cluster.nodes[node].replica

    def hold(message: Any) -> None:
        send((RESULTS, message[1], durable, *message[3:]) if message[0] == RESULTS else message)

    durable = replica.applied
    with monkeypatch.context() as patch:
        patch.setattr(connection, "send", hold)
        yield
    send((RESULTS, replica.applied, replica.applied, [], []))
    connection.flush()


def all_equal(cluster: LocalCluster, nodes: int) -> bool:
    """Whether so many nodes have every shard, all with the same position and content."""
    for number in range(cluster.shards):
        tables = [n.replica.tables[number] for n in cluster.nodes.values() if number in n.replica.tables]
        if len(tables) != nodes or len({(table.seq, table.chain, table.digest()) for table in tables}) != 1:
            return False
    return True


async def test_node_killed() -> None:
    """As many copies as `min_insync`: with a node gone, writes of its shards are refused within about WRITE_WAIT_MS,
    reads go on from the others."""
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
            told = await kv.status()
            assert told["state"] == "degraded" and told["nodes_linked"] == 2
            assert any("n2 is not linked" in sentence for sentence in told["degraded"])
            assert any(f"{len(missing)} shards take no writes" in sentence for sentence in told["degraded"])
            cluster.coordinator.controller.check()


async def test_writes_go_on_without_a_node(caplog: pytest.LogCaptureFixture) -> None:
    """More copies than `min_insync`: a node that is gone leaves the in-sync sets, and no write is refused, as
    it would be after WRITE_WAIT_MS. When it comes back, empty, it learns everything, and is in sync again by itself."""
    async with LocalCluster(3, shards=16) as cluster:
        keys = keys_of_shards(cluster)
        coordinator = cluster.coordinator
        async with kvtcp.connect(cluster.url) as kv, await Wire.open(coordinator.address) as wire:
            await kv.put_many(dict.fromkeys(keys, "v"))
            await kill_node(cluster, "n2")
            wire.send(*([n, "incr", f"{{{key}}}n", 1] for n, key in enumerate(keys)))
            assert all([(await wire.receive())[1] == 0 for _ in keys]), "what waits for WRITE_WAIT_MS is refused"
            assert all(set(coordinator.map.nodes_of(n)) == {"n1", "n3"} for n in range(16)), "the map comes first"
            assert "event=left-in-sync node=n2 shards=16 first=0" in caplog.text
            told = await kv.status()
            assert told["under_replicated"] == told["moving"] == 16 and told["counters"]["left_in_sync"] == 1
            assert {row["state"] for row in await kv.shards()} == {"under-replicated"}
            await restart_empty(cluster, "n2")
            await until(lambda: not coordinator.status.degraded(), "all nodes in sync")
            assert (await kv.status())["counters"]["joined_in_sync"] == 16
            await kv.put_many(dict.fromkeys(keys, "w"))
            assert all_equal(cluster, 3)
            for node in ("n1", "n3"):
                cluster.cut_link(node)
            assert [await kv.get(key) for key in keys] == [b"w"] * 16
            coordinator.controller.check()


async def test_node_restarted_empty(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A node that comes back without its data and cannot be done without serves nothing, `status` and `nodes` say why;
    reads never see it. It is replaced in its place, and then its shards take writes."""
    async with LocalCluster(2, shards=8) as cluster, kvtcp.connect(cluster.url, timeout=1.5) as kv:
        keys = keys_of_shards(cluster)
        await kv.put_many(dict.fromkeys(keys, "v"))
        with monkeypatch.context() as patch:
            patch.setattr(Membership, "_can_learn", lambda *_: False)
            await kill_node(cluster, "n1")
            await restart_empty(cluster, "n1")
            await until(lambda: len(bad_shards(cluster.coordinator, "n1")) == 8, "the report of the empty node")
            for _ in range(5):
                assert await kv.get_many(keys) == [b"v"] * len(keys)
                assert [await kv.get(key) for key in keys] == [b"v"] * len(keys)
            async with await Wire.open(cluster.coordinator.address) as wire:
                assert (await wire.ask("put", keys[0], "x"))[1] == Code.NOT_ENOUGH_REPLICAS
            node = next(node for node in await kv.nodes() if node["node"] == "n1")
            assert "came back without its data" in node["reason"]
            [sentence] = (await kv.status())["degraded"]
            assert sentence.startswith("8 shards take no writes, the first is shard 0: n1 came back without its data")
            assert {shard["state"] for shard in await kv.shards()} == {"read-only"}
            assert "event=node-not-a-member node=n1 shards=8 first=0" in caplog.text
            assert not cluster.nodes["n1"].replica.operations, "it was asked nothing"
        await until(lambda: not cluster.coordinator.status.degraded(), "the new copies")
        await kv.put_many(dict.fromkeys(keys, "w"))
        assert all_equal(cluster, 2)
        replica = cluster.nodes["n1"].replica
        assert all(cluster.coordinator.map.replica_id_of(n, "n1") == replica.copies[n].disk for n in range(8))
        cluster.coordinator.controller.check()


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


async def test_many_requests_are_sent_in_between() -> None:
    """What some requests led to waits for the end of the tick; when very many were read it leaves without reading on,
    and with it the answers that were there. Nothing is answered twice or out of order."""
    async with LocalCluster(1, shards=4) as cluster, await Wire.open(cluster.coordinator.address) as wire:
        await wire.ask("put", "a", b"0")
        (session,) = cluster.coordinator.clients.sessions
        written = cluster.coordinator.links["n1"].progress.written
        first, some = 10, SEND_REQUESTS - 1
        session.data_received(b"".join(pack([ident, b"get", b"a"]) for ident in range(first, first + some)))
        assert not written, "they wait for the end of the tick"
        session.data_received(pack([first + some, b"incr", b"n", 1]))
        assert sum(len(batch.items) for batch in written) == SEND_REQUESTS
        session.data_received(pack([first + some + 1, b"get", b"n"]))
        answers = [await wire.receive() for _ in range(SEND_REQUESTS + 1)]
        assert sorted(answer[0] for answer in answers) == list(range(first, first + SEND_REQUESTS + 1))
        by_ident = {answer[0]: answer[1:] for answer in answers}
        assert by_ident[first + some] == [0, 1] and by_ident[first + some + 1][1][0] == b"1"


async def test_silent_node_is_named() -> None:
    """A node whose link is up and that does not answer heartbeats is named by status and nodes, until it answers."""
    async with LocalCluster(2, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        assert (await kv.status())["state"] == "ok"
        node = cluster.nodes["n2"]
        transport = deafen(node)
        node._stats.stop()
        silent = cluster.coordinator.links["n2"]
        await until(lambda: cluster.coordinator.status.nodes()[1]["state"] == "silent", "the silence")
        [sentence] = (await kv.status())["degraded"]
        assert sentence.startswith("n2 has not answered for") and silent.progress.connected
        transport.resume_reading()
        node._stats.start()
        await until(lambda: not cluster.coordinator.status.degraded(), "an answer")
        assert link_number(cluster.coordinator, "n2") == 1, "the link was never lost"


async def test_core_task_that_fails_ends_the_coordinator() -> None:
    """An exception nobody foresaw in a task of the coordinator is reported in `failed`, which ends the process."""
    async with LocalCluster(1, shards=1) as cluster:

        async def fail() -> None:
            raise RuntimeError("a defect")

        cluster.coordinator._start_task(fail(), "a task")
        with pytest.raises(RuntimeError, match="a defect"):
            await cluster.coordinator.failed


# --- takeover and ownership -------------------------------------------------------------------------


async def test_takeover_ships_what_a_member_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that is killed while one member lags leaves members that differ; the next one makes them equal, and
    what it finds is there for everybody."""
    async with LocalCluster(3, shards=2) as cluster, kvtcp.connect(cluster.url, timeout=8) as kv:
        await kv.put("a", "0")
        slow = cluster.nodes["n2"]
        deafen(slow)
        writes = [asyncio.ensure_future(kv.incr(f"n{n % 20}", timeout=0.3)) for n in range(300)]
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {kvtcp.OutcomeUnknown}
        behind = slow.replica.operations
        await cluster.restart_coordinator()
        assert [int(await kv.get(f"n{n}") or 0) for n in range(20)] == [15] * 20, "rolled forward"
        assert slow.replica.operations < behind + 300, "by effects, not by operations"
        assert (await kv.status())["state"] == "ok"
        for number in range(2):
            tables = [node.replica.tables[number] for node in cluster.nodes.values()]
            assert len({(table.seq, table.chain, table.digest()) for table in tables}) == 1


async def test_an_older_copy_of_the_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not know what the nodes know: the coordinator does not begin, and changes nothing anywhere. If
    a node tells only in its report, the coordinator does not begin either."""
    async with LocalCluster(2, shards=2) as cluster:
        old = cluster.store.stored
        await cluster.coordinator.remember_restoring(b"in/")
        for _ in range(2):
            number = link_number(cluster.coordinator, "n2")
            cluster.cut_link("n2")
            await until(lambda: link_number(cluster.coordinator, "n2") > number, "the next link")  # noqa: B023
            await until(lambda: cluster.coordinator.links["n2"].progress.connected, "the next report")
        cluster.store.stored = old
        coordinator = cluster.coordinator
        for _ in range(3):
            with pytest.raises(CannotServe, match=r"n2 has seen version 3 of the cluster map, it has 2: map\.json"):
                await cluster.restart_coordinator()
            assert cluster.store.stored == old
            assert {node.replica.promised for node in cluster.nodes.values()} == {1}
            cluster._coordinator = coordinator
        monkeypatch.setattr(local_cluster, "check_store", lambda *_: None)
        with pytest.raises(CannotServe, match=r"n2 has seen version 3 of the cluster map, the config store has ver"):
            await cluster.restart_coordinator()


async def test_fenced() -> None:
    """R13: a node that promised a higher epoch says so; the coordinator ends its clients' connections and itself."""
    async with LocalCluster(2, shards=2) as cluster:
        coordinator = cluster.coordinator
        async with await Wire.open(coordinator.address) as client:
            async with await Wire.open(cluster.nodes["n2"].address, hello=False) as other:
                hello = link_hello(cluster, "n2", epoch=coordinator.map.epoch + 1, coordinator="another")
                other.send([HELLO, hello])
                assert (await other.receive())[0] == REPORT
                with pytest.raises(CannotServe, match=r"does not own the cluster any more: n2 says: epoch 1 is over"):
                    await coordinator.failed
            await client.closed()
        assert coordinator.controller.ownership.deposed
        with pytest.raises(OSError):
            await Wire.open(coordinator.address)


async def test_time_and_a_store_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """R12: stamps stop at the stored bound, status says so, and they go on when the store takes the next bound."""
    async with LocalCluster(1, shards=2) as cluster, kvtcp.connect(cluster.url) as kv:
        coordinator = cluster.coordinator

        async def fail(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(cluster.store, "compare_and_set", fail)
            patch.setattr(ownership, "BOUND_RETRY_MS", 0)
            bound_ms = coordinator.map.stamp_bound_ms
            for each in (module, status):
                patch.setattr(each, "wall_ms", lambda: bound_ms + 700)
            await until(lambda: coordinator.sequencer.stamp_ms == bound_ms, "the bound")
            await until(lambda: coordinator.controller.ownership.bound_failed, "the failed move")
            await kv.put("a", "1", ttl=0.5)
            assert await kv.get("a") == b"1"
            [sentence] = (await kv.status())["degraded"]
            assert sentence.startswith("deadlines do not pass: the config store does not take the next bound of time")
            assert "No space left on device" in sentence
        monkeypatch.setattr(module, "wall_ms", lambda: bound_ms + 700)
        await until(lambda: coordinator.sequencer.stamp_ms == bound_ms + 700, "time to go on")
        assert await kv.get("a") is None
        assert coordinator.map.stamp_bound_ms == bound_ms + 700 + STAMP_AHEAD_MS
        assert (await kv.status())["degraded"] == []


async def test_time_after_a_clean_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that stops in peace leaves its last stamp, so that the next one's clock is not ahead; if the store
    does not take it in time it stops all the same."""
    async with LocalCluster(1, shards=2) as cluster, kvtcp.connect(cluster.url, timeout=5) as kv:
        await kv.put("a", "1", ttl=60)
        port, stamp_ms = cluster.coordinator.address[1], cluster.coordinator.sequencer.stamp_ms
        await cluster.coordinator.close()
        await cluster._start_coordinator(port)
        assert stamp_ms <= cluster.coordinator.sequencer.stamp_ms <= module.wall_ms()
        assert await kv.get("a") == b"1"

        async def never(*_: Any) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(cluster.store, "compare_and_set", never)
        bound_ms = cluster.coordinator.map.stamp_bound_ms
        await cluster.coordinator.close()
        assert cluster.coordinator.map.stamp_bound_ms == bound_ms


async def test_node_short_of_space() -> None:
    """A node that says so, in its report or later: growing writes are refused, status names it, until it has space."""
    async with LocalCluster(2, shards=2) as cluster, kvtcp.connect(cluster.url, timeout=0.2) as kv:
        await kv.put("a", "1")
        node = cluster.nodes["n2"]
        node.core.space_changed(1)
        await until(lambda: cluster.coordinator.status.degraded(), "the frame")
        with pytest.raises(kvtcp.Unavailable, match="takes no growing writes: too little disk space on n2") as refused:
            await kv.put("a", "2")
        assert refused.value.code == Code.NO_SPACE
        assert (await kv.status())["degraded"] == ["2 shards refuse growing writes: too little disk space on n2"]
        cluster.cut_link("n2")
        await until(lambda: link_number(cluster.coordinator, "n2") == 2, "the next link")
        await until(lambda: cluster.coordinator.links["n2"].progress.connected, "the next report")
        assert await kv.delete("a") and await kv.get("a") is None
        node.core.space_changed(2)
        await until(lambda: "refuse writes" in str(cluster.coordinator.status.degraded()), "the frame")
        with pytest.raises(kvtcp.Unavailable, match="takes no writes"):
            await kv.delete("a")
        node.core.space_changed(0)
        await until(lambda: not cluster.coordinator.status.degraded(), "the frame")
        await kv.put("a", "2")


async def test_node_of_another_durability() -> None:
    """A node that keeps its data otherwise than the coordinator was told is not used, and named."""
    async with LocalCluster(2, shards=2) as cluster:
        await kill_node(cluster, "n1")
        server = await restart_empty(cluster, "n1")
        server.replica.durability = "os"
        link = cluster.coordinator.links["n1"]
        await until(lambda: "started with --durability os, the coordinator with --durability memory" in link.refused)
        assert not link.progress.connected
        assert "n1 is not linked: not used: it was started with" in str(cluster.coordinator.status.degraded())
