"""The command line of kvtcp-coordinator and what it settles; tests/test_processes.py runs it."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtcp.config_store.keeper import MapKeeper
from kvtcp.config_store.memory import MemoryConfigStore
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.server import coordinator_main, runtime
from kvtcp.server.coordinator import ClusterConfig
from kvtcp.server.coordinator_main import (
    Nodes,
    Shape,
    check_nodes,
    make_parser,
    parse_nodes,
    settle_nodes,
    settle_shape,
)
from kvtcp.server.node import NodeServer
from kvtcp.server.ownership import found_map
from kvtcp.server.runtime import StartError
from kvtcp.server.supervisor import Found, Supervisor
from tests.process_cluster import free_ports
from tests.replication_fakes import make_map


def parse(*arguments: object) -> argparse.Namespace:
    """The options of a command line."""
    return make_parser().parse_args([str(argument) for argument in arguments])


def settle(stored: ClusterMap | None, *arguments: object) -> Shape:
    """The fixed values of a cluster started so."""
    return settle_shape(parse(*arguments), stored, list(nodes_of(stored, *arguments).addresses))


def nodes_of(stored: ClusterMap | None, *arguments: object, spawned: list[str] | None = None) -> Nodes:
    """The nodes of a cluster started so."""
    options = parse(*arguments)
    check_nodes(options)
    return settle_nodes(options, stored, spawned)


def test_addresses_of_nodes() -> None:
    """`--nodes` takes host:port, brackets around IPv6, spaces after commas."""
    assert parse_nodes("a:1, 10.0.0.2:2,[::1]:3") == [("a", 1), ("10.0.0.2", 2), ("::1", 3)]
    for text in ("", "a", "a:", ":1", "a:0", "a:65536", "a:x", "a:1,", "a:1,,b:2"):
        with pytest.raises(StartError, match="is not HOST:PORT"):
            parse_nodes(text)
    with pytest.raises(StartError, match="there twice"):
        parse_nodes("a:1,a:1")


def test_local_nodes() -> None:
    """Local nodes are n1.. on ports from the base, on loopback whatever --host says."""
    made = nodes_of(None)
    assert made.addresses == {f"n{n + 1}": ("127.0.0.1", 5000 + n) for n in range(3)}
    assert made.local == {"n1": 5000, "n2": 5001, "n3": 5002}
    assert nodes_of(None, "--host", "::1", "--num-nodes", 1).addresses == {"n1": ("::1", 5000)}
    assert nodes_of(None, "--host", "0.0.0.0", "--num-nodes", 1).addresses == {"n1": ("127.0.0.1", 5000)}


def grown() -> ClusterMap:
    """Local nodes n1 and n3 (n2 was removed), and n4 that was added from elsewhere, beside them on this host."""
    local = {f"n{n}": ("127.0.0.1", 4999 + n) for n in (1, 2, 3)}
    stored, _ = replace(make_map(3, 1, shards=3), nodes=local).with_node("127.0.0.1", 5003)
    moved = stored.replaced(stored.shards_of("n2")[0], "n2", "n4", "disk")
    rows = [["n4" if node == "n2" else node for node in row] for row in stored.wanted]
    return moved.with_wanted(rows).without_node("n2")


def test_nodes_of_an_old_cluster(tmp_path: Path) -> None:
    """Nodes keep their ids and their ports by id; more local ones get the next ids; those that were added from
    elsewhere stay where they are."""
    stored, data = grown(), ["--data-dir", tmp_path]
    spawned = ["n1", "n2", "n3"]
    assert nodes_of(stored, *data, spawned=spawned) == nodes_of(stored, *data, "--num-nodes", 2, spawned=spawned)
    found = nodes_of(stored, *data, "--base-port", 7000, spawned=spawned)
    assert found.local == {"n1": 7000, "n3": 7002}, "it may move"
    assert found.addresses == {"n1": ("127.0.0.1", 7000), "n3": ("127.0.0.1", 7002), "n4": ("127.0.0.1", 5003)}
    found = nodes_of(stored, *data, "--num-nodes", 4, spawned=spawned)
    assert found.local == {"n1": 5000, "n3": 5002, "n5": 5004, "n6": 5005} and found.addresses.keys() >= {"n4", "n6"}
    with pytest.raises(StartError, match=r"has 2 local nodes, not 1: .* drain and remove nodes"):
        nodes_of(stored, *data, "--num-nodes", 1, spawned=spawned)
    (tmp_path / "n4").mkdir()
    assert nodes_of(stored, *data, spawned=spawned).local.keys() == {"n1", "n3", "n4"}, "it runs as if spawned here"
    assert nodes_of(stored, *data, "--base-port", 7000, spawned=spawned).local.keys() == {"n1", "n3"}
    assert nodes_of(stored, *data, spawned=None).local.keys() == {"n1", "n3", "n4"}, "an identity of an older version"
    assert nodes_of(stored, *data, spawned=[]).local.keys() == {"n4"}


def test_nodes_that_were_listed() -> None:
    """--nodes gives addresses to the nodes in the order of their ids, then more nodes."""
    stored = grown()
    found = nodes_of(stored, "--nodes", "a:1,b:2,c:3,d:4,e:5", spawned=["n1"])
    assert found == Nodes({"n1": ("a", 1), "n3": ("b", 2), "n4": ("c", 3), "n5": ("d", 4), "n6": ("e", 5)}, {})
    assert nodes_of(stored, "--nodes", "a:1").addresses == {**stored.nodes, "n1": ("a", 1)}
    assert nodes_of(None, "--nodes", "a:1").addresses == {"n1": ("a", 1)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-nodes", 0], "--num-nodes must be from 1 to 64, not 0"),
        (["--num-nodes", 65], "--num-nodes must be from 1 to 64, not 65"),
        (["--base-port", 65534], "leaves no room for 3 ports"),
        (["--base-port", 0], "leaves no room for 3 ports"),
        (["--main-port", 5001], "--main-port 5001 is also the port of node n2"),
        (["--nodes", "a:1", "--num-nodes", 1], "not both"),
        (["--nodes", ",".join(f"a:{n}" for n in range(1, 66))], "there are 65 nodes, the limit is 64"),
    ],
)
def test_nodes_that_cannot_be(arguments: list[object], words: str) -> None:
    """Counts and ports that do not fit are refused by the flag's name."""
    with pytest.raises(StartError, match=words):
        nodes_of(None, *arguments)


def test_a_new_cluster() -> None:
    """Defaults: 64 shards, factor 3 or the number of nodes, min_insync min(2, factor)."""
    assert settle(None) == Shape(shards=64, factor=3, min_insync=2)
    assert settle(None, "--num-nodes", 1) == Shape(shards=64, factor=1, min_insync=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shards", 0], "--shards must be from 1 to 4096, not 0"),
        (["--shards", 4097], "--shards must be from 1 to 4096, not 4097"),
        (["--replication-factor", 4], "needs at least 4 nodes, there are 3"),
        (["--replication-factor", 0], "must be at least 1, not 0"),
        (["--min-insync", 4], "--min-insync must be from 1 to the replication factor 3, not 4"),
        (["--min-insync", 0], "--min-insync must be from 1 to the replication factor 3, not 0"),
    ],
)
def test_values_that_cannot_be(arguments: list[object], words: str) -> None:
    """Values of a new cluster that do not fit together are refused."""
    with pytest.raises(StartError, match=words):
        settle(None, *arguments)


def test_an_old_cluster() -> None:
    """A restart takes the values of the map; asking for the same ones is fine, for others not. But min_insync may
    change, where every shard has as many copies in sync."""
    stored = replace(make_map(3, 3, shards=8), min_insync=3)
    shape = Shape(shards=8, factor=3, min_insync=3)
    assert settle(stored) == shape
    assert settle(stored, "--shards", 8, "--replication-factor", 3, "--min-insync", 3) == shape
    for arguments, words in (
        (["--shards", 9], "--shards 8, not 9"),
        (["--replication-factor", 2], "--replication-factor 3, not 2"),
        (["--min-insync", 4], "--min-insync must be from 1 to the replication factor 3, not 4"),
        (["--min-insync", 0], "--min-insync must be from 1 to the replication factor 3, not 0"),
    ):
        with pytest.raises(StartError, match=words):
            settle(stored, *arguments)
    assert settle(stored, "--min-insync", 2).min_insync == 2
    short = replace(stored, min_insync=2).without([0, 7], "n2")
    assert settle(short).min_insync == settle(short, "--min-insync", 2).min_insync == 2
    with pytest.raises(StartError, match="3 needs as many in-sync copies of every shard, and 2 have fewer"):
        settle(short, "--min-insync", 3)


def test_a_cluster_with_fewer_nodes_than_copies() -> None:
    """Where a node was declared destroyed and no other added, it starts all the same."""
    stored = make_map(3, 3, shards=2, min_insync=2).without([0, 1], "n3")
    stored = stored.with_destroyed("n3").with_wanted([["n1", "n2"]] * 2).without_node("n3")
    assert settle_shape(parse(), stored, list(stored.nodes)) == Shape(shards=2, factor=3, min_insync=2)


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`main` answers 2 and one sentence, and removes the directory it made."""
    for arguments in (["--shards", "0"], ["--main-port", "70000"], ["--nodes", "x"]):
        assert coordinator_main.main([*arguments, "--data-dir", str(tmp_path / "d")]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("kvtcp-coordinator: ")
    assert list(tmp_path.iterdir()) == []


async def test_foreign_nodes_that_can_never_join(kvtcp_cluster: Any) -> None:
    """An address of --nodes with a node of another cluster is refused; one where nobody listens yet is waited for."""
    address = kvtcp_cluster.nodes["n1"].address
    with pytest.raises(StartError, match="meant for n1, is a node of another cluster"):
        await coordinator_main.survey({"n1": address}, "other", "secret")
    with runtime.bind("127.0.0.1", 0) as silent:
        found = await coordinator_main.survey({"n1": silent.getsockname()}, "other", "secret")
        assert found == {"n1": Found("free")}


async def test_a_first_start_needs_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new cluster waits for every one of --nodes, and says which did not come; one with data begins without some."""
    monkeypatch.setattr(coordinator_main, "START_S", 0.1)
    monkeypatch.setattr(coordinator_main, "RECOVER_WAIT_MS", 50)
    node = NodeServer("n1")
    await node.start("127.0.0.1", 0)
    keeper = await MapKeeper.open(MemoryConfigStore())
    nodes = {"n1": node.address, "n2": ("127.0.0.1", free_ports(1))}
    first = found_map(cluster="c", shards=1, factor=2, min_insync=1, durability="memory", nodes=nodes)
    supervisor = Supervisor("127.0.0.1", {}, Path(), [], lambda: None)
    config = ClusterConfig("s", "memory", Path())
    coordinator = coordinator_main.Coordinator(config, keeper, supervisor, asyncio.Event())
    try:
        with pytest.raises(StartError, match=r"after 0 s these nodes had not reported: n2 \(connection refused\)"):
            await coordinator._answering(first)
        await keeper.found(first)
        found = await coordinator._answering(first)
        assert found == {"n1": Found("ours"), "n2": Found("free")}
        await node.close()
        with pytest.raises(StartError, match="n1 .*, n2 "):
            await coordinator._answering(first)
    finally:
        await node.close()
        await keeper.close()
