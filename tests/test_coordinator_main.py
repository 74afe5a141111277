"""The command line of kvtcp-coordinator and what it settles; tests/test_processes.py runs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from kvtcp.server import coordinator_main
from kvtcp.server.coordinator_main import make_parser, node_addresses, parse_nodes, settle_identity
from kvtcp.server.runtime import StartError


def parse(*arguments: object) -> argparse.Namespace:
    """The options of a command line."""
    return make_parser().parse_args([str(argument) for argument in arguments])


def settle(stored: dict[str, Any] | None, *arguments: object) -> dict[str, Any]:
    """The fixed values of a cluster started so."""
    options = parse(*arguments)
    return settle_identity(options, stored, list(node_addresses(options)))


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
    """Defaults: 64 shards, factor 3 or the number of nodes, min_insync min(2, factor), fresh id and secret."""
    first, second = settle(None), settle(None)
    assert (first["shards"], first["factor"], first["min_insync"], first["epoch"]) == (64, 3, 2, 0)
    assert first["nodes"] == ["n1", "n2", "n3"]
    assert first["cluster"] != second["cluster"] and first["secret"] != second["secret"]
    single = settle(None, "--num-nodes", 1)
    assert (single["factor"], single["min_insync"]) == (1, 1)


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
    """A restart takes the stored values; asking for the same ones is fine, for others not; nothing is changed."""
    stored = {**settle(None, "--shards", 8, "--min-insync", 3), "epoch": 5}
    before = dict(stored)
    assert settle(stored) == stored
    assert settle(stored, "--shards", 8, "--replication-factor", 3, "--min-insync", 3) == stored
    for arguments, words in (
        (["--shards", 9], "--shards 8, not 9"),
        (["--replication-factor", 2], "--replication-factor 3, not 2"),
        (["--min-insync", 2], "--min-insync 3, not 2"),
        (["--num-nodes", 4], "the number of nodes 3, not 4"),
    ):
        with pytest.raises(StartError, match=words):
            settle(stored, *arguments)
    assert stored == before


def test_bind() -> None:
    """The main port is taken at once; a taken or impossible one is a sentence."""
    first = coordinator_main.bind("127.0.0.1", 0)
    with first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} of 127.0.0.1 cannot be used: Address already in use"):
            coordinator_main.bind("127.0.0.1", port)
    with pytest.raises(StartError, match="cannot be used"):
        coordinator_main.bind("203.0.113.1", 0)


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`main` answers 2 and one sentence, and removes the directory it made."""
    for arguments in (["--shards", "0"], ["--main-port", "70000"], ["--nodes", "x"], ["--durability", "sync"]):
        assert coordinator_main.main([*arguments, "--data-dir", str(tmp_path / "d")]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("kvtcp-coordinator: ")
    assert list(tmp_path.iterdir()) == []


async def test_foreign_nodes_that_can_never_join(kvtcp_cluster: Any) -> None:
    """An address of --nodes with a node of another cluster is refused; one where nobody listens yet is waited for."""
    address = kvtcp_cluster.nodes["n1"].address
    with pytest.raises(StartError, match="meant for n1, is a node of another cluster"):
        await coordinator_main.survey_foreign({"n1": address}, "other", "secret")
    with coordinator_main.bind("127.0.0.1", 0) as silent:
        assert await coordinator_main.survey_foreign({"n1": silent.getsockname()}, "other", "secret") == 0
