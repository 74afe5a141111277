"""Clusters of real processes whose nodes come, go, hang and are lost for good: what is left serves, what comes back
learns, and a restart of everything finds the cluster as it was left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvtcp
from kvtcp.errors import Code
from kvtcp.protocol.hashing import shard_of
from tests.processes.cluster import ROOT, Command, ProcessCluster, fill, wait_for

SHARDS = 8
FEW = ("--shards", SHARDS)


def content(url: str) -> dict[bytes, bytes]:
    """Every pair."""
    with kvtcp.sync.connect(url, timeout=5.0) as kv:
        return dict(kv.scan())


def healed(url: str, what: str = "a whole cluster") -> None:
    """Wait until everything is as it should be, also in the map."""
    with kvtcp.sync.connect(url, timeout=5.0) as kv:

        def look() -> bool:
            return kv.status()["state"] == "ok" and not kv.status()["moving"] and all(map(is_placed, kv.shards()))

        def is_placed(shard: dict[str, Any]) -> bool:
            return set(shard["insync"]) == set(shard["wanted"])

        wait_for(look, what)


def unstartable(directory: Path) -> None:
    """A local node that was destroyed: its data is gone, and its process ends at once whenever it is started."""
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "manifest.json").write_text("not a manifest")


def shell(url: str, *words: str) -> Any:
    """What a command of the shell answers, as JSON."""
    command = [sys.executable, str(ROOT / "bin" / "kvtcp-shell"), url, "-o", "json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stderr}"
    return json.loads(done.stdout)


# --- starts without some nodes ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_start_without_some_nodes(cluster: ProcessCluster) -> None:
    """The directory of one node is gone, that of another makes its process end at once: what is left serves, writes
    too, and they are in sync again when they can be. Only if too few are left the start is refused."""
    cluster.start(*FEW).stop()
    shutil.rmtree(cluster.data / "n3")
    command = cluster.start(*FEW)
    pairs = fill(cluster.url)
    healed(cluster.url)
    command.stop()
    n2 = cluster.data / "n2"
    n2.rename(cluster.directory / "n2")
    shutil.copytree(cluster.directory / "n2", n2)
    (n2 / "manifest.json").write_text("not a manifest")
    command = cluster.start(*FEW)
    assert content(cluster.url) == pairs
    pairs |= fill(cluster.url, 50, "more")
    with kvtcp.sync.connect(cluster.url) as kv:
        told = kv.status()
        assert (told["nodes"], told["nodes_linked"], told["under_replicated"]) == (3, 2, SHARDS)
        assert any("n2 is not linked" in sentence for sentence in told["degraded"])
    shutil.copy(cluster.directory / "n2" / "manifest.json", n2)
    healed(cluster.url, "n2 in sync")
    command.stop()
    for node in ("n2", "n3"):
        (cluster.data / node / "manifest.json").write_text("not a manifest")
    command = cluster.launch(*FEW)
    assert command.ended() == 2
    assert "ended with code 2 while starting; its message is above" in command.err.read_text()
    for node in ("n2", "n3"):
        shutil.rmtree(cluster.data / node)
    cluster.start(*FEW)
    healed(cluster.url, "two new nodes in sync")
    assert content(cluster.url) == pairs


def test_a_node_that_hangs_during_a_restart(cluster: ProcessCluster) -> None:
    """A coordinator takes over while one node is stopped by SIGSTOP: the others serve within seconds, and the node is
    in sync again when it goes on."""
    first = cluster.start(*FEW)
    pairs = fill(cluster.url)
    hung = cluster.pid("n2")
    os.kill(hung, signal.SIGSTOP)
    try:
        first.signal(signal.SIGKILL)
        first.ended()
        cluster.start(*FEW)
        assert content(cluster.url) == pairs
        pairs |= fill(cluster.url, 50, "more")
    finally:
        os.kill(hung, signal.SIGCONT)
    healed(cluster.url, "n2 in sync")
    assert cluster.pid("n2") == hung, "it was adopted"
    assert content(cluster.url) == pairs


def test_nodes_elsewhere(cluster: ProcessCluster) -> None:
    """Nodes started by hand: a coordinator starts without one that is missing, which comes back later; one that is
    stopped is let go first, and forgotten when it was destroyed; another one takes its place, and after a restart of
    everything it all is so still."""
    ports = [cluster.base_port + number for number in range(3)]

    def node(number: int) -> Command:
        node = f"n{number}"
        return cluster.run("kvtcp-node", "--id", node, "--port", ports[number - 1], "--data-dir", cluster.data / node)

    def start(*numbers: int) -> tuple[Command, str]:
        addresses = ",".join(f"127.0.0.1:{ports[number - 1]}" for number in numbers)
        command = cluster.run("kvtcp-coordinator", "--nodes", addresses, "--main-port", 0, *FEW,
                              "--data-dir", cluster.data, "--backup-dir", cluster.directory / "b")  # fmt: skip
        return command, command.ready().split()[3]

    nodes = {number: node(number) for number in (1, 2, 3)}
    command, url = start(1, 2, 3)
    pairs = fill(url)
    command.stop()
    nodes[3].stop()
    command, url = start(1, 2, 3)
    pairs |= fill(url, 50, "more")
    nodes[3] = node(3)
    healed(url, "n3 in sync")
    nodes[3].stop()
    with kvtcp.sync.connect(url) as kv:
        assert all(set(shard["insync"]) == {"n1", "n2"} for shard in kv.shards()), "it was let go before it ended"
    assert "event=left-in-sync node=n3 shards=8 first=0 reason=it is about to stop" in command.err.read_text()
    shutil.rmtree(cluster.data / "n3")
    fourth = cluster.run("kvtcp-node", "--id", "n4", "--port", 0, "--data-dir", cluster.data / "n4")
    ports.append(int(fourth.ready().rpartition(":")[2].split()[0]))
    with kvtcp.sync.connect(url) as kv:
        assert kv.node_forget("n3").node == "n3"
        assert shell(url, "node", "add", f"127.0.0.1:{ports[3]}")["node"] == "n4"
        healed(url, "n4 in sync")
        assert [row["node"] for row in kv.nodes()] == ["n1", "n2", "n4"]
        assert all(set(shard["insync"]) == {"n1", "n2", "n4"} for shard in kv.shards())
    command.stop()
    fourth.stop()
    nodes[4] = node(4)
    command, url = start(1, 2, 4)
    healed(url, "the cluster with n4")
    assert content(url) == pairs
    command.stop()


# --- more nodes, and fewer ------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_local_nodes_and_fewer(cluster: ProcessCluster) -> None:
    """--num-nodes 5 on a cluster of three: two nodes more, which hold nothing before a rebalance; one is drained and
    removed; min_insync is raised and lowered at a start. A restart of everything finds all of it."""
    cluster.start(*FEW).stop()
    cluster.nodes += ["n4", "n5"]
    command = cluster.start(*FEW)
    pairs = fill(cluster.url)
    healed(cluster.url, "the new nodes are linked")
    with kvtcp.sync.connect(cluster.url) as kv:
        assert [row["wanted"] for row in kv.nodes()] == [8, 8, 8, 0, 0] and kv.status()["state"] == "ok"
        assert len(kv.rebalance(dry_run=True).moves) == len(kv.rebalance().moves) == 9
        healed(cluster.url, "an even cluster")
        assert sorted(row["member_of"] for row in kv.nodes()) == [4, 5, 5, 5, 5]
        shell(cluster.url, "node", "drain", "n1", "wait")
        kv.node_remove("n1")
        wait_for(lambda: not cluster.pid("n1"), "the end of n1")
        assert [row["node"] for row in kv.nodes()] == ["n2", "n3", "n4", "n5"] and dict(kv.scan()) == pairs
    command.stop()
    assert "Traceback" not in command.err.read_text()
    command = cluster.start("--num-nodes", 4, "--min-insync", 3)
    assert cluster.pid("n1") == 0, "it is none of the cluster any more"
    with kvtcp.sync.connect(cluster.url) as kv:
        assert kv.status()["min_insync"] == 3 and dict(kv.scan()) == pairs
        key = next(iter(keys_of(cluster.url, lambda shard: "n5" in shard["insync"]).values()))
        os.kill(cluster.pid("n5"), signal.SIGSTOP)  # all copies are needed now
        with pytest.raises(kvtcp.KvtcpError):
            kv.put(key, pairs[key.encode()], timeout=0.5)
        os.kill(cluster.pid("n5"), signal.SIGCONT)
        kv.put(key, pairs[key.encode()], timeout=10)
    command.stop()
    cluster.start("--num-nodes", 4, "--min-insync", 1).stop()
    for node in ("n2", "n3"):
        unstartable(cluster.data / node)
    cluster.start("--num-nodes", 4)
    assert content(cluster.url) == pairs, "one copy of each shard is left"
    fill(cluster.url)


# --- losses -----------------------------------------------------------------------------------------------


def keys_of(url: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[int, str]:
    """A key of each shard that is `wanted`."""
    with kvtcp.sync.connect(url) as kv:
        numbers = {shard["shard"] for shard in kv.shards() if wanted(shard)}
    keys: dict[int, str] = {}
    for number in range(1_000):
        keys.setdefault(shard_of(b"k%05d" % number, SHARDS), f"k{number:05d}")
    return {number: keys[number] for number in numbers}


@pytest.mark.parametrize("factor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_accepted_losses(cluster: ProcessCluster, factor: int) -> None:
    """All copies of some shards are destroyed: these are down and say so, the others serve; when the loss is accepted
    they serve again, empty, with numbers above every number ever shown, and do so after the next start."""
    command = cluster.start(*FEW, "--replication-factor", factor)
    pairs = fill(cluster.url)
    gone = {"n2", "n3"} if factor == 2 else {"n2"}
    keys = keys_of(cluster.url, lambda shard: set(shard["insync"]) <= gone)
    assert 0 < len(keys) < SHARDS
    with kvtcp.sync.connect(cluster.url) as kv:
        shown = {number: kv.put(key, pairs[key.encode()]) for number, key in keys.items()}
    command.stop()
    for node in gone:
        shutil.rmtree(cluster.data / node)
    command = cluster.start(*FEW)
    with kvtcp.sync.connect(cluster.url, timeout=2.0) as kv:
        wait_for(lambda: kv.status()["down"] == len(keys), "the shards with a copy left")
        for number, key in keys.items():
            with pytest.raises(kvtcp.Unavailable, match="came back without its data") as down:
                kv.get(key, timeout=0.1)
            assert down.value.code == Code.SHARD_DOWN
            assert kv.shard_accept_loss(number).shard == number
        healed(cluster.url, "shards that serve again")
        left = {key: value for key, value in pairs.items() if shard_of(key, SHARDS) not in keys}
        assert dict(kv.scan()) == left
        for number, key in keys.items():
            rev = kv.put(key, "after")
            assert rev > shown[number] + 1_000_000
            left[key.encode()] = b"after"
    said = command.err.read_text()
    assert said.count("event=shard-down") >= len(keys) and said.count("event=loss-accepted") == len(keys)
    if factor == 1:
        command.stop()
        cluster.start(*FEW)
    assert content(cluster.url) == left


@pytest.mark.parametrize("factor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_node_is_forgotten(cluster: ProcessCluster, factor: int) -> None:
    """A node that cannot come back keeps shards down, as it may have what others lack, until it is declared destroyed:
    with a copy left nothing is lost; without one the loss is accepted, and the shards begin empty on other nodes."""
    command = cluster.start(*FEW, "--replication-factor", factor)
    pairs = fill(cluster.url)
    keys = keys_of(cluster.url, lambda shard: "n3" in shard["insync"])
    command.stop()
    unstartable(cluster.data / "n3")
    command = cluster.start(*FEW)
    with kvtcp.sync.connect(cluster.url, timeout=2.0) as kv:
        assert kv.status()["down"] == len(keys)
        assert shell(cluster.url, "node", "forget", "n3", "destroyed", "yes")["shards"] == len(keys)
        if factor == 1:
            for number in keys:
                assert shell(cluster.url, "shard", "accept-loss", str(number), "yes")["shard"] == number
            pairs = {key: value for key, value in pairs.items() if shard_of(key, SHARDS) not in keys}
        wait_for(lambda: [row["node"] for row in kv.nodes()] == ["n1", "n2"], "a cluster without n3")
        healed(cluster.url)
        assert dict(kv.scan()) == pairs
    pairs |= fill(cluster.url, 50, "more")
    command.stop()
    cluster.start("--num-nodes", 2)
    assert content(cluster.url) == pairs and cluster.pid("n3") == 0
