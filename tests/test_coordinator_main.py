"""The command line of kvtcp-coordinator and what it settles; tests/test_processes.py runs it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from replication_fakes import make_map

from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.server import coordinator_main, runtime
from kvtcp.server.coordinator_main import Shape, make_parser, node_addresses, parse_nodes, settle_shape
from kvtcp.server.runtime import StartError
from kvtcp.server.supervisor import Found


def parse(*arguments: object) -> argparse.Namespace:
    """The options of a command line."""
    return make_parser().parse_args([str(argument) for argument in arguments])


def settle(stored: ClusterMap | None, *arguments: object) -> Shape:
    """The fixed values of a cluster started so."""
    options = parse(*arguments)
    return settle_shape(options, stored, list(node_addresses(options)))


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
    assert node_addresses(parse()) == {f"n{n + 1}": ("127.0.0.1", 5000 + n) for n in range(3)}
    assert node_addresses(parse("--host", "::1", "--num-nodes", 1)) == {"n1": ("::1", 5000)}
    assert node_addresses(parse("--host", "0.0.0.0", "--num-nodes", 1)) == {"n1": ("127.0.0.1", 5000)}


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
        node_addresses(parse(*arguments))


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
    """A restart takes the values of the map; asking for the same ones is fine, for others not."""
    stored = replace(make_map(3, 3, shards=8), min_insync=3)
    shape = Shape(shards=8, factor=3, min_insync=3)
    assert settle(stored) == shape
    assert settle(stored, "--shards", 8, "--replication-factor", 3, "--min-insync", 3) == shape
    for arguments, words in (
        (["--shards", 9], "--shards 8, not 9"),
        (["--replication-factor", 2], "--replication-factor 3, not 2"),
        (["--min-insync", 2], "--min-insync 3, not 2"),
        (["--num-nodes", 4], "the number of nodes 3, not 4"),
    ):
        with pytest.raises(StartError, match=words):
            settle(stored, *arguments)


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
