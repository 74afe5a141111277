"""LocalCluster: start, faults, close; in the caller's loop and in a thread."""

import asyncio
import socket
import threading

import pytest

import kvtcp
from kvtcp.coordinator.server import CoordinatorServer
from kvtcp.testing import LocalCluster
from tests.processes.cluster import wait_for
from tests.processes.raw_client import link_number, until


def refuses(url: str) -> bool:
    """Whether nobody listens at the address of a cluster."""
    host, _, port = url.removeprefix("kvtcp://").rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


async def test_start_serve_close() -> None:
    """It serves when started, nobody listens after close, and close may be called twice or before start."""
    cluster = LocalCluster(nodes=3, shards=8)
    async with cluster:
        url = cluster.url
        async with kvtcp.connect(url) as kv:
            await kv.put("a", "1")
            assert await kv.get("a") == b"1"
        with pytest.raises(RuntimeError, match="started already"):
            await cluster.start()
    await cluster.close()
    assert refuses(url)
    assert not cluster.backup_dir.exists()
    with pytest.raises(RuntimeError, match="not started"):
        _ = cluster.url
    await LocalCluster().close()


def test_values_that_do_not_fit() -> None:
    """A factor larger than the nodes, and a durability that it has not, are refused when it is made."""
    with pytest.raises(ValueError, match="needs at least 3 nodes, there are 2"):
        LocalCluster(nodes=2, replication_factor=3)
    with pytest.raises(ValueError, match="durability cannot be 'sync'"):
        LocalCluster(durability="sync")


async def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the client port cannot be opened, nodes and links are closed again and the error is the caller's."""

    async def fail(self: CoordinatorServer, bound: socket.socket) -> None:
        raise OSError("no port")

    monkeypatch.setattr(CoordinatorServer, "listen", fail)
    cluster = LocalCluster(nodes=2)
    with pytest.raises(OSError, match="no port"):
        await cluster.start()
    assert cluster.nodes == {}
    assert not cluster.backup_dir.exists()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await until(lambda: all(task.done() for task in others))


async def test_a_killed_node_and_its_return() -> None:
    """Reads and writes go on without a node; restarted it is empty, learns everything, and is in sync again."""
    async with LocalCluster(nodes=3, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put_many({f"k{n}": b"v" for n in range(50)})
        await cluster.kill_node("n2")
        assert await kv.get("k1") == b"v"
        await kv.put("k1", "w")
        await until(lambda: any("n2 is not linked" in text for text in cluster.coordinator.status.degraded()))
        await cluster.restart_node("n2")
        await until(lambda: not cluster.coordinator.status.degraded())
        assert await kv.count() == 50
        assert len({node.replica.tables[n].digest() for node in cluster.nodes.values() for n in range(4)}) == 4
        with pytest.raises(KeyError):
            await cluster.kill_node("n9")


async def test_a_restart_before_the_first_write() -> None:
    """A node that lost nothing, since there was nothing, is a member again."""
    async with LocalCluster(nodes=3, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await cluster.restart_node("n3")
        await until(lambda: cluster.coordinator.links["n3"].progress.connected)
        await kv.put("a", "1", timeout=5)
        assert (await kv.status())["state"] == "ok"


async def test_a_cut_link_heals() -> None:
    """Writes under way when a link is cut are answered after it is back."""
    async with LocalCluster(nodes=3, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put("a", "1")
        link, before = cluster.coordinator.links["n1"], link_number(cluster.coordinator, "n1")
        puts = [asyncio.ensure_future(kv.put(f"k{n}", "v", timeout=5)) for n in range(100)]
        await asyncio.sleep(0)
        cluster.cut_link("n1")
        assert len(await asyncio.gather(*puts)) == 100
        await until(lambda: link_number(cluster.coordinator, "n1") > before and link.progress.connected)
        assert await kv.count() == 101


async def test_another_coordinator() -> None:
    """The next coordinator has the address, the epoch and the data of the one before, and goes on."""
    async with LocalCluster(nodes=3, shards=4) as cluster, kvtcp.connect(cluster.url, timeout=5) as kv:
        for n in range(3):
            await kv.put("a", str(n))
            await cluster.restart_coordinator()
            assert await kv.get("a") == str(n).encode()
        assert cluster.coordinator.map.epoch == 4
        assert (await kv.status())["state"] == "ok"


@pytest.mark.parametrize("also_coordinator", [True, False])
async def test_everything_restarted_in_memory(also_coordinator: bool) -> None:
    """A cluster all of whose nodes ended at the same time is empty, and serves again by itself."""
    async with LocalCluster(nodes=3, shards=4) as cluster, kvtcp.connect(cluster.url, timeout=5) as kv:
        await kv.put_many({f"k{n}": b"v" for n in range(50)})
        for node in ("n1", "n2", "n3"):
            await cluster.kill_node(node)
        for node in ("n1", "n2", "n3"):
            await cluster.restart_node(node)
        if also_coordinator:
            await cluster.restart_coordinator()
        else:
            await until(lambda: not cluster.coordinator.status.degraded())
        assert await kv.count() == 0
        await kv.put("a", "1")
        assert (await kv.status())["state"] == "ok"


async def test_drain_answers_what_was_read() -> None:
    """A coordinator that drains takes no new clients and answers every request it has read."""
    async with LocalCluster(nodes=3, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        done = cluster.coordinator.clients.requests
        puts = [asyncio.ensure_future(kv.put(f"k{n}", b"v" * 1000)) for n in range(500)]
        await until(lambda: cluster.coordinator.clients.requests >= done + 500)
        await cluster.coordinator.drain(5_000)
        assert len(await asyncio.gather(*puts)) == 500
        assert refuses(cluster.url)


def test_in_a_thread() -> None:
    """run_in_thread serves kvtcp.sync, has the same faults, and ends its thread."""
    with LocalCluster.run_in_thread(nodes=2, shards=4) as cluster:
        with kvtcp.sync.connect(cluster.url) as kv:
            kv.put_many({f"k{n}": b"1" for n in range(50)})
            kv["a"] = b"1"
            cluster.cut_link("n1")
            kv.put("b", "2", timeout=5)
            cluster.restart_coordinator()
            assert kv.get("b", timeout=5) == b"2"
            cluster.kill_node("n2")
            assert kv.get("a") == b"1"
            with pytest.raises(kvtcp.Unavailable, match="n2 is missing"):
                kv.put("a", "2")
            cluster.restart_node("n2")
            wait_for(lambda: kv.status()["state"] == "ok", "the node to be in sync again")
            cluster.kill_node("n1")
            assert kv.get("a") == b"1", "from the node that was empty"
        url = cluster.url
        cluster.close()
    assert refuses(url)
    assert "kvtcp-cluster" not in {thread.name for thread in threading.enumerate()}


def test_a_failed_start_in_a_thread() -> None:
    """A start that fails raises in the caller and ends the thread."""
    with pytest.raises(ValueError, match="needs at least"), LocalCluster.run_in_thread(nodes=1, replication_factor=2):
        raise AssertionError("never reached")
    assert "kvtcp-cluster" not in {thread.name for thread in threading.enumerate()}
