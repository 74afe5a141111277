"""Settings: the nodes and the shape of a cluster, from the flags and from the map that is there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from kvtcp.cluster.map import ClusterMap
from kvtcp.coordinator.settings import (
    Nodes,
    Settings,
    Shape,
    check_nodes,
    find_places,
    parse_nodes,
    settle_nodes,
    settle_shape,
)
from kvtcp.runtime.process import StartError
from tests.support.replication_fakes import make_map


def settle(stored: ClusterMap | None, **flags: Any) -> Shape:
    """The fixed values of a cluster started so."""
    return settle_shape(Settings(**flags), stored, list(nodes_of(stored, **flags).addresses))


def nodes_of(
    stored: ClusterMap | None, spawned: list[str] | None = None, directories: Collection[str] = (), **flags: Any
) -> Nodes:
    """The nodes of a cluster started so."""
    settings = Settings(**flags)
    check_nodes(settings)
    return settle_nodes(settings, stored, spawned, directories)


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
    assert nodes_of(None, host="::1", num_nodes=1).addresses == {"n1": ("::1", 5000)}
    assert nodes_of(None, host="0.0.0.0", num_nodes=1).addresses == {"n1": ("127.0.0.1", 5000)}


def grown() -> ClusterMap:
    """Local nodes n1 and n3 (n2 was removed), and n4 that was added from elsewhere, beside them on this host."""
    local = {f"n{n}": ("127.0.0.1", 4999 + n) for n in (1, 2, 3)}
    stored, _ = replace(make_map(3, 1, shards=3), nodes=local).with_node("127.0.0.1", 5003)
    moved = stored.replaced(stored.shards_of("n2")[0], "n2", "n4", "disk")
    rows = [["n4" if node == "n2" else node for node in row] for row in stored.wanted]
    return moved.with_wanted(rows).without_node("n2")


def test_nodes_of_an_old_cluster() -> None:
    """Nodes keep their ids and their ports by id; more local ones get the next ids; those that were added from
    elsewhere stay where they are."""
    stored = grown()
    spawned = ["n1", "n2", "n3"]
    assert nodes_of(stored, spawned=spawned) == nodes_of(stored, num_nodes=2, spawned=spawned)
    found = nodes_of(stored, base_port=7000, spawned=spawned)
    assert found.local == {"n1": 7000, "n3": 7002}, "it may move"
    assert found.addresses == {"n1": ("127.0.0.1", 7000), "n3": ("127.0.0.1", 7002), "n4": ("127.0.0.1", 5003)}
    found = nodes_of(stored, num_nodes=4, spawned=spawned)
    assert found.local == {"n1": 5000, "n3": 5002, "n5": 5004, "n6": 5005} and found.addresses.keys() >= {"n4", "n6"}
    with pytest.raises(StartError, match=r"has 2 local nodes, not 1: .* drain and remove nodes"):
        nodes_of(stored, num_nodes=1, spawned=spawned)

    def local(spawned: list[str] | None, **flags: Any) -> set[str]:
        return set(nodes_of(stored, spawned, ["n4"], **flags).local)

    assert local(spawned) == {"n1", "n3", "n4"}, "it runs as if spawned here"
    assert local(spawned, base_port=7000) == {"n1", "n3"}
    assert local(None) == {"n1", "n3", "n4"}, "an identity that --recover-map made"
    assert local([]) == {"n4"}


def test_nodes_that_were_listed() -> None:
    """--nodes gives addresses to the nodes in the order of their ids, then more nodes."""
    stored = grown()
    found = nodes_of(stored, nodes="a:1,b:2,c:3,d:4,e:5", spawned=["n1"])
    assert found == Nodes({"n1": ("a", 1), "n3": ("b", 2), "n4": ("c", 3), "n5": ("d", 4), "n6": ("e", 5)}, {})
    assert nodes_of(stored, nodes="a:1").addresses == {**stored.nodes, "n1": ("a", 1)}
    assert nodes_of(None, nodes="a:1").addresses == {"n1": ("a", 1)}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_nodes": 0}, "--num-nodes must be from 1 to 64, not 0"),
        ({"num_nodes": 65}, "--num-nodes must be from 1 to 64, not 65"),
        ({"base_port": 65534}, "leaves no room for 3 ports"), ({"base_port": 0}, "leaves no room for 3 ports"),
        ({"main_port": 5001}, "--main-port 5001 is also the port of node n2"),
        ({"nodes": "a:1", "num_nodes": 1}, "not both"),
        ({"nodes": ",".join(f"a:{n}" for n in range(1, 66))}, "there are 65 nodes, the limit is 64"),
    ],
)  # fmt: skip
def test_nodes_that_cannot_be(flags: dict[str, Any], words: str) -> None:
    """Counts and ports that do not fit are refused by the flag's name."""
    with pytest.raises(StartError, match=words):
        nodes_of(None, **flags)


def test_a_new_cluster() -> None:
    """Defaults: 64 shards, factor 3 or the number of nodes, min_insync min(2, factor)."""
    assert settle(None) == Shape(shards=64, factor=3, min_insync=2)
    assert settle(None, num_nodes=1) == Shape(shards=64, factor=1, min_insync=1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"shards": 0}, "--shards must be from 1 to 4096, not 0"),
        ({"shards": 4097}, "--shards must be from 1 to 4096, not 4097"),
        ({"replication_factor": 4}, "needs at least 4 nodes, there are 3"),
        ({"replication_factor": 0}, "must be at least 1, not 0"),
        ({"min_insync": 4}, "--min-insync must be from 1 to the replication factor 3, not 4"),
        ({"min_insync": 0}, "--min-insync must be from 1 to the replication factor 3, not 0"),
    ],
)
def test_values_that_cannot_be(flags: dict[str, Any], words: str) -> None:
    """Values of a new cluster that do not fit together are refused."""
    with pytest.raises(StartError, match=words):
        settle(None, **flags)


def test_an_old_cluster() -> None:
    """A restart takes the values of the map; asking for the same ones is fine, for others not. But min_insync may
    change, where every shard has as many copies in sync."""
    stored = replace(make_map(3, 3, shards=8), min_insync=3)
    shape = Shape(shards=8, factor=3, min_insync=3)
    assert settle(stored) == shape
    assert settle(stored, shards=8, replication_factor=3, min_insync=3) == shape
    for flags, words in (
        ({"shards": 9}, "--shards 8, not 9"), ({"replication_factor": 2}, "--replication-factor 3, not 2"),
        ({"min_insync": 4}, "--min-insync must be from 1 to the replication factor 3, not 4"),
        ({"min_insync": 0}, "--min-insync must be from 1 to the replication factor 3, not 0"),
    ):  # fmt: skip
        with pytest.raises(StartError, match=words):
            settle(stored, **flags)
    assert settle(stored, min_insync=2).min_insync == 2
    short = replace(stored, min_insync=2).without([0, 7], "n2")
    assert settle(short).min_insync == settle(short, min_insync=2).min_insync == 2
    with pytest.raises(StartError, match="3 needs as many in-sync copies of every shard, and 2 have fewer"):
        settle(short, min_insync=3)


def test_a_cluster_with_fewer_nodes_than_copies() -> None:
    """Where a node was declared destroyed and no other added, it starts all the same."""
    stored = make_map(3, 3, shards=2, min_insync=2).without([0, 1], "n3")
    stored = stored.with_destroyed("n3").with_wanted([["n1", "n2"]] * 2).without_node("n3")
    assert settle_shape(Settings(), stored, list(stored.nodes)) == Shape(shards=2, factor=3, min_insync=2)


def test_places_without_a_map() -> None:
    """Local nodes are looked for where directories are, unless others were spawned here; --nodes gives all of them."""
    places = find_places(Settings(base_port=7000), None, ["n1", "n3"])
    assert (places.local, places.foreign, places.host) == ({"n1": 7000, "n3": 7002}, [], "127.0.0.1")
    assert find_places(Settings(), ["n1"], ["n1", "n3"]).local == {"n1": 5000}
    places = find_places(Settings(nodes="a:1,b:2"), None, ["n1"])
    assert (places.local, places.foreign) == ({}, [("a", 1), ("b", 2)])
