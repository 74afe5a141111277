"""The shell against a real cluster in this process: what the other tests of the shell assume of the client holds."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtcp.shell.main import connect_to, main
from kvtcp.testing.local_cluster import LocalCluster
from tests.support.shell_fakes import Shell


class RealShell(Shell):
    """A shell whose client is the real one."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def run(self, *arguments: str, stdin: bytes = b"", terminal: bool = False) -> int:
        streams = self.streams(stdin, terminal=terminal)
        code = main([self.url, *arguments], streams=streams, connect=connect_to)
        self.out, self.err = streams.stdout.getvalue(), streams.stderr.getvalue()  # type: ignore[union-attr, attr-defined]
        return code


@pytest.fixture(scope="module")
def backup_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cluster keeps its backups."""
    return tmp_path_factory.mktemp("backups")


@pytest.fixture(scope="module")
def shell(backup_dir: Path) -> Iterator[RealShell]:
    """A shell and a cluster of three nodes, which has a thread and a loop of its own."""
    started, urls = threading.Event(), []
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with LocalCluster(nodes=3, shards=16, backup_dir=backup_dir) as cluster:
            urls.append(cluster.url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(20), "the cluster starts"
    yield RealShell(urls[0])
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


def test_keys(shell: RealShell) -> None:
    """Commands on one key: answers, conditions, deadlines and refusals."""
    assert (shell.run("add", "user:1", "Ada"), shell.out[:3]) == (0, b"OK ")
    assert (shell.run("add", "user:1", "Eve"), shell.out) == (6, b"")
    assert '"user:1"' in shell.err
    assert (shell.run("get", "user:1"), shell.out) == (0, b"Ada\n")
    assert (shell.run("cas", "user:1", "Bob", "Eve"), shell.out) == (1, b"")
    assert shell.run("cas", "user:1", "Ada", "Eve") == 0
    assert (shell.run("delete", "user:1", "Ada"), shell.out) == (1, b"0\n")
    assert (shell.run("incr", "hits", "5"), shell.out) == (0, b"5\n")
    assert shell.run("incr", "user:1") == 6
    assert (shell.run("expire", "user:1", "60"), shell.out) == (0, b"1\n")
    assert shell.run("ttl", "user:1") == 0 and 50 < float(shell.out) <= 60
    assert (shell.run("persist", "user:1"), shell.out) == (0, b"1\n")
    assert (shell.run("ttl", "user:1"), shell.out) == (0, b"-1\n")
    assert (shell.run("get", "none"), shell.out) == (1, b"")
    assert shell.run("put", "k" * 5000, "v") == 6
    assert (shell.run("delete", "user:1"), shell.run("delete", "hits")) == (0, 0)


def test_ranges_and_transfer(shell: RealShell, tmp_path: Path) -> None:
    """Import, scans in all directions, export and deletion of a few thousand keys."""
    lines = b"".join(b'{"key": "n:%05d", "value": "%d"}\n' % (n, n) for n in range(3000))
    assert (shell.run("import", "-", stdin=lines), shell.out) == (0, b"imported 3000\n")
    assert (shell.run("count", "n:"), shell.out) == (0, b"3000\n")
    assert shell.run("scan", "n:", "from=n:00010", "to=n:00013", "reverse") == 0
    assert shell.out == b"n:00012\t12\nn:00011\t11\nn:00010\t10\n"
    assert shell.run("scan", "n:", "keys") == 0
    assert shell.out == b"".join(b"n:%05d\n" % n for n in range(3000))
    assert (shell.run("export", str(tmp_path / "x.gz")), shell.out) == (0, b"exported 3000\n")
    assert (shell.run("delete-prefix", "n:", "yes"), shell.out) == (0, b"3000\n")
    assert (shell.run("import", str(tmp_path / "x.gz")), shell.out) == (0, b"imported 3000\n")
    assert (shell.run("delete-prefix", "n:", "yes", "max=3000"), shell.out) == (0, b"3000\n")
    assert (shell.run("all_values"), shell.out) == (0, b"")


def test_administration(shell: RealShell, backup_dir: Path) -> None:
    """status, nodes, shards and where fit together; a backup is written, verified, restored, and damage is found."""
    assert (shell.run("status", "-o", "json"), json.loads(shell.out)["shards"]) == (0, 16)
    assert (shell.run("nodes", "-o", "json"), len(json.loads(shell.out))) == (0, 3)
    assert shell.run("shards", "-o", "json") == 0
    shards = json.loads(shell.out)
    assert shell.run("where", "{a}b", "-o", "json") == 0
    where = json.loads(shell.out)
    assert len(where) == 1 and where[0]["nodes"] == shards[where[0]["shard"]]["nodes"] and len(where[0]["nodes"]) == 3
    assert shell.run("put", "a", "1") == 0
    assert (shell.run("backup", "b1", "-o", "json"), json.loads(shell.out)["pairs"]) == (0, 1)
    assert (shell.run("verify", str(backup_dir / "b1"), "-o", "json"), json.loads(shell.out)["pairs"]) == (0, 1)
    assert shell.run("put", "b", "2") == 0
    assert shell.run("restore", "b1", "replace") == 0
    assert (shell.run("all_values"), shell.out) == (0, b"a\t1\n")
    damaged = next(path for path in (backup_dir / "b1").glob("*.jsonl") if path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes().replace(b'"1"', b'"2"'))
    assert (shell.run("verify", str(backup_dir / "b1")), shell.out) == (7, b"")
    assert damaged.name in shell.err
    assert shell.run("delete", "a") == 0


def test_changes_of_the_cluster(shell: RealShell) -> None:
    """What cannot be done now is refused with the cluster's own sentence; an even cluster has nothing to move."""
    assert (shell.run("rebalance", "dry-run", "-o", "json"), json.loads(shell.out)["moves"]) == (0, [])
    for words, sentence in (
        (("node", "drain", "n1"), "without n1 there are 2 nodes for a replication factor of 3; add a node first"),
        (("node", "remove", "n2"), "n2 holds 16 shards; drain it first"),
        (("node", "forget", "n3", "destroyed", "yes"), "n3 is linked: a node that answers is not destroyed"),
        (("node", "add", "a..b:1"), "start the new node there with --id n4, then add it"),
        (("node", "drain", "n9"), "there is no node n9; the nodes are n1, n2, n3"),
        (("shard", "accept-loss", "0", "yes"), "shard 0 is not down: nothing is lost"),
    ):
        assert (shell.run(*words), shell.out) == (6, b""), words
        assert sentence in shell.err
    assert shell.run("nodes", "-o", "table") == 0
    assert shell.out.decode().splitlines()[-1] == "3 nodes: 3 up"
