"""`--recover-map` with real processes: the map is lost, the data is not; and when the start is refused instead."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtcp
from kvtcp.cluster.file_store import parse
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.map_store import MapStore
from kvtcp.cluster.memory_store import MemoryConfigStore
from kvtcp.coordinator.rebuild_map import Places, ask, local_nodes, recover_map
from kvtcp.coordinator.supervisor import Found
from kvtcp.node.server import NodeServer
from kvtcp.protocol.framing import FrameEncoder
from kvtcp.protocol.link import TOLD, Told
from kvtcp.runtime.data_directory import DataDirectory, write_identity
from kvtcp.runtime.process import StartError
from tests.processes.cluster import Command, ProcessCluster, free_ports, wait_for

SHARDS = ("--shards", 8)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ProcessCluster]:
    """Three nodes, not started."""
    made = ProcessCluster(tmp_path)
    yield made
    made.close()


def fill(url: str, prefix: str, count: int = 400) -> dict[bytes, bytes]:
    """Put pairs and return them."""
    pairs = {f"{prefix}{number:05d}".encode(): b"v%d" % number for number in range(count)}
    with kvtcp.sync.connect(url, timeout=5.0) as kv:
        kv.put_many(pairs)
    return pairs


def settled(url: str) -> dict[bytes, bytes]:
    """Every pair, when every shard has all its copies."""
    with kvtcp.sync.connect(url, timeout=5.0) as kv:
        wait_for(lambda: kv.status()["state"] == "ok", "all copies")
        return dict(kv.scan())


def stop(command: Command) -> None:
    """A clean stop."""
    command.signal(signal.SIGTERM)
    assert command.ended(15) == 0, command.err.read_text()


def map_of(cluster: ProcessCluster) -> ClusterMap:
    """The map in the coordinator's directory."""
    path = cluster.data / "coordinator" / "map.json"
    return ClusterMap.from_json(parse(path.read_bytes(), path).value)


def lose_map(cluster: ProcessCluster) -> ClusterMap:
    """Remove map.json; what it said."""
    lost = map_of(cluster)
    (cluster.data / "coordinator" / "map.json").unlink()
    return lost


def churn(cluster: ProcessCluster) -> dict[bytes, bytes]:
    """A cluster with data, of which the members are others than at its beginning; the pairs. It runs on."""
    pairs = fill(cluster.url, "a")
    os.kill(cluster.pid("n2"), signal.SIGKILL)
    pairs |= fill(cluster.url, "b")
    assert settled(cluster.url) == pairs
    os.kill(cluster.pid("n1"), signal.SIGKILL)
    pairs |= fill(cluster.url, "c")
    with kvtcp.sync.connect(cluster.url) as kv:
        kv.delete("a00000")
        del pairs[b"a00000"]
    assert settled(cluster.url) == pairs
    return pairs


# --- a map that is made again -------------------------------------------------------------------------


def test_a_lost_map_is_made_again(cluster: ProcessCluster) -> None:
    """Without the flag the start is refused with a sentence that names it; with it everything is there, after churn,
    and the cluster goes on: writes, restarts without the flag. A map that is there is not made again."""
    command = cluster.start(*SHARDS)
    pairs = churn(cluster)
    with kvtcp.sync.connect(cluster.url) as kv:
        rev = kv.put("counted", "1")
    pairs[b"counted"] = b"1"
    stop(command)
    lost = lose_map(cluster)
    assert "start with --recover-map to make it again" in cluster.launch().refused()
    assert not (cluster.data / "coordinator" / "map.json").exists()
    command = cluster.start("--recover-map")
    assert "event=map-recovered" in command.err.read_text()
    assert settled(cluster.url) == pairs
    made = map_of(cluster)
    assert (made.cluster, made.nodes, made.wanted) == (lost.cluster, lost.nodes, lost.wanted)
    assert made.epoch > lost.epoch and made.version > lost.version and made.owner != lost.owner
    assert made.stamp_bound_ms >= lost.stamp_bound_ms
    assert {node: sorted(made.shards_of(node)) for node in made.nodes} == {
        node: sorted(lost.shards_of(node)) for node in lost.nodes
    }
    with kvtcp.sync.connect(cluster.url) as kv:
        assert kv.put("counted", "2") > rev
    pairs[b"counted"] = b"2"
    stop(command)
    assert "map.json is there" in cluster.launch("--recover-map").refused()
    command = cluster.start()
    assert settled(cluster.url) == pairs
    stop(command)


@pytest.mark.slow
def test_a_node_without_its_directory(cluster: ProcessCluster) -> None:
    """Then data could be lost: the start is refused and names the node. It may be put back, or the loss accepted."""
    command = cluster.start(*SHARDS)
    pairs = churn(cluster)
    stop(command)
    lose_map(cluster)
    (cluster.data / "n3").rename(cluster.data / "elsewhere")
    said = cluster.launch("--recover-map").refused()
    assert f"n3 ({cluster.data / 'n3'} is missing)" in said and "--recover-map accept" in said
    assert not (cluster.data / "coordinator" / "map.json").exists() and not (cluster.data / "n3").exists()
    (cluster.data / "elsewhere").rename(cluster.data / "n3")
    command = cluster.start("--recover-map")
    assert settled(cluster.url) == pairs
    stop(command)
    lose_map(cluster)
    shutil.rmtree(cluster.data / "n3")
    command = cluster.start("--recover-map", "accept")
    assert "without=n3" in command.err.read_text()
    assert settled(cluster.url) == pairs, "n3 began anew and has everything again"
    stop(command)


def test_a_node_that_came_back_empty(cluster: ProcessCluster) -> None:
    """A directory that was made anew answers, and counts as missing."""
    stop(cluster.start(*SHARDS))
    lose_map(cluster)
    identity = json.loads((cluster.data / "n2" / "identity.json").read_text())
    shutil.rmtree(cluster.data / "n2")
    (cluster.data / "n2").mkdir()
    write_identity(cluster.data / "n2", "node", {name: identity[name] for name in ("cluster", "secret", "node")})
    assert "n2 (it has no data of this cluster)" in cluster.launch("--recover-map").refused()


def test_a_node_that_ends_while_starting(cluster: ProcessCluster) -> None:
    """It is not waited for; its own message comes before the sentence."""
    stop(cluster.start(*SHARDS))
    lose_map(cluster)
    (cluster.data / "n2" / "manifest.json").write_text("{}")
    command = cluster.launch("--recover-map")
    assert command.ended() == 2
    assert "n2 (node n2 ended with code 2 while starting, its message is above)" in command.err.read_text()
    assert not cluster.running()


def test_too_few_copies_left(cluster: ProcessCluster) -> None:
    """With fewer copies than min_insync the shards are down, until an operator accepts the loss of each."""
    command = cluster.start("--shards", 2)
    pairs = fill(cluster.url, "a", 50)
    stop(command)
    lose_map(cluster)
    for node in ("n1", "n3"):
        shutil.rmtree(cluster.data / node)
    command = cluster.start("--recover-map", "accept")
    assert "event=not-recovered shards=2 shards" in command.err.read_text()
    with kvtcp.sync.connect(cluster.url, timeout=5.0) as kv:
        degraded = " ".join(kv.status()["degraded"])
        assert "2 shards are down" in degraded and "n2 may lack writes: the cluster map" in degraded
        for shard in range(2):
            kv.shard_accept_loss(shard)
    assert settled(cluster.url) == pairs
    stop(command)


@pytest.mark.parametrize("durability", ["sync", "memory"])
def test_running_nodes_of_a_killed_coordinator(cluster: ProcessCluster, durability: str) -> None:
    """They are asked as they are, run on, and are adopted. The identity is taken from their directories."""
    command = cluster.start(*SHARDS, "--durability", durability)
    pairs = churn(cluster)
    pids = cluster.pids()
    command.signal(signal.SIGKILL)
    command.ended()
    shutil.rmtree(cluster.data / "coordinator")
    cluster.start("--recover-map", "--durability", durability)
    assert settled(cluster.url) == pairs
    assert cluster.pids() == pids


def test_nodes_started_by_hand(cluster: ProcessCluster) -> None:
    """Those of --nodes are asked, and those that their maps name too; while a coordinator is linked it is refused."""
    addresses = [f"127.0.0.1:{cluster.base_port + n}" for n in range(3)]
    for n, node in enumerate(cluster.nodes):
        cluster.run("kvtcp-node", "--id", node, "--port", cluster.base_port + n, "--data-dir", cluster.data / node)

    def arguments(count: int, *more: object) -> tuple[object, ...]:
        return ("--main-port", 0, "--data-dir", cluster.data, "--nodes", ",".join(addresses[:count]), *more)

    for each in cluster.commands[:]:
        each.ready()
    command = cluster.run("kvtcp-coordinator", *arguments(3, *SHARDS))
    url = command.ready().split()[3]
    pairs = fill(url, "a")
    other = cluster.directory / "other"
    (other / "coordinator").mkdir(parents=True)
    shutil.copy(cluster.data / "coordinator" / "identity.json", other / "coordinator" / "identity.json")
    said = cluster.run("kvtcp-coordinator", *arguments(3, "--recover-map", "--data-dir", other)).refused()
    assert "n1, n2, n3 has a link to a coordinator" in said
    stop(command)
    lose_map(cluster)
    command = cluster.run("kvtcp-coordinator", *arguments(2, "--recover-map"))
    url = command.ready().split()[3]
    assert settled(url) == pairs
    stop(command)


def test_nothing_to_make_a_map_from(cluster: ProcessCluster) -> None:
    """No directories of nodes, nodes without data, no identity, somebody else at an address."""
    assert "identity.json is missing" in cluster.launch("--recover-map").refused()
    assert not cluster.data.exists()
    base = free_ports(2)
    fresh = cluster.run("kvtcp-node", "--id", "n1", "--port", base, "--data-dir", cluster.directory / "fresh")
    fresh.ready()
    (cluster.data / "coordinator").mkdir(parents=True)
    write_identity(cluster.data / "coordinator", "coordinator", {"cluster": "c", "secret": "s"})
    assert "no node has a directory in" in cluster.launch("--recover-map").refused()
    arguments = ("--main-port", 0, "--data-dir", cluster.data, "--recover-map", "--nodes")
    said = cluster.run("kvtcp-coordinator", *arguments, f"127.0.0.1:{base}").refused()
    assert "no node has data of this cluster: start without --recover-map" in said
    stop(fresh)
    stranger = cluster.directory / "stranger"
    stranger.mkdir()
    write_identity(stranger, "node", {"cluster": "x", "secret": "x", "node": "n1"})
    cluster.run("kvtcp-node", "--id", "n1", "--port", base + 1, "--data-dir", stranger).ready()
    said = cluster.run("kvtcp-coordinator", *arguments, f"127.0.0.1:{base + 1}").refused()
    assert f"at 127.0.0.1:{base + 1} is a node of another cluster; give the right addresses" in said


def test_a_stop_meanwhile(cluster: ProcessCluster) -> None:
    """A signal while nodes are asked ends the start, and what was spawned, and no map is there."""
    stop(cluster.start(*SHARDS))
    lose_map(cluster)
    command = cluster.launch("--recover-map")
    wait_for(lambda: any(cluster.pids().values()), "a node")
    command.signal(signal.SIGTERM)
    assert command.ended() == 0, command.err.read_text()
    wait_for(lambda: not cluster.running(), "the end of the nodes")
    assert not (cluster.data / "coordinator" / "map.json").exists()


# --- parts ----------------------------------------------------------------------------------------------


def test_local_nodes(tmp_path: Path) -> None:
    """Directories with the name of a node and an identity, by their numbers."""
    for name in ("n10", "n2", "n0", "nx", "n3"):
        (tmp_path / name).mkdir()
        if name != "n3":
            (tmp_path / name / "identity.json").write_text("{}")
    assert local_nodes(tmp_path) == ["n2", "n10"]
    assert local_nodes(tmp_path / "none") == []


def test_places_of_local_nodes(tmp_path: Path) -> None:
    """A node of the map is one of this machine by its address, unless nodes elsewhere are given."""
    places = Places(tmp_path, "127.0.0.1", 5000, {}, [], [])
    assert places.is_local("n3", ("127.0.0.1", 5002))
    assert not places.is_local("n3", ("127.0.0.1", 5003)) and not places.is_local("x", ("127.0.0.1", 5002))
    assert not Places(tmp_path, "127.0.0.1", 5000, {}, [("h", 1)], []).is_local("n3", ("127.0.0.1", 5002))


async def test_who_answers() -> None:
    """A node tells; whoever answers something else is foreign; nobody is free."""
    node = NodeServer("n1", cluster="c", secret="s")
    await node.start("127.0.0.1", 0)
    told = await ask(node.address, "", "c", "s")
    assert isinstance(told, Told) and told.report.node == "n1"
    assert await ask(node.address, "n2", "c", "s") == Found("foreign", "another node of this cluster")
    address = node.address
    await node.close()
    assert await ask(address, "n1", "c", "s") == Found("free")

    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(FrameEncoder().encode([TOLD, {"node": "n1"}]))

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        found = await ask(server.sockets[0].getsockname()[:2], "n1", "c", "s")
        assert found == Found("foreign", "something that is not a kvtcp node")


async def test_directories_of_two_clusters(tmp_path: Path) -> None:
    """Without an identity it must be clear which cluster it is."""
    for node, cluster in (("n1", "a"), ("n2", "b")):
        (tmp_path / node).mkdir()
        write_identity(tmp_path / node, "node", {"cluster": cluster, "secret": "s", "node": node})
    base = free_ports(2)
    places = Places(tmp_path, "127.0.0.1", base, {"n1": base, "n2": base + 1}, [], [])
    directory = DataDirectory(tmp_path / "coordinator", "coordinator")
    map_store = await MapStore.open(MemoryConfigStore())
    with pytest.raises(StartError, match="are of several clusters"):
        await recover_map(map_store, directory, places, asyncio.Event(), accept=False)
    (tmp_path / "n1" / "identity.json").write_text("{}")
    with pytest.raises(StartError, match="not an identity"):
        await recover_map(map_store, directory, places, asyncio.Event(), accept=False)
    directory.unlock()
