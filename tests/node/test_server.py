"""The node's server: who may link, how results leave, and that it never goes on after an error while applying."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvtcp.node import stats
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import (
    ASK,
    BATCH,
    ENTRIES,
    FETCH,
    HELLO,
    LEARN_FAILED,
    LINK_VERSION,
    PULL,
    REFUSED,
    REPORT,
    RESULTS,
    SHIP,
    SHIPPED,
    SPACE,
    STOP,
    parse_told,
)
from kvtcp.protocol.operations import GET, PUT
from kvtcp.storage.disk.manifest import read_manifest
from tests.crash.disk import CrashDisk
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, pack, until
from tests.support.storage_tools import DIRECTORY, open_small

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


def hello(**changed: Any) -> list[Any]:
    """A HELLO for node n1 with shards 0 and 1."""
    fields = {
        "version": LINK_VERSION, "cluster": "c", "secret": "s", "epoch": 1, "coordinator": "k", "link": 1, "node": "n1",
        "map_version": 1, "heard_version": 0, "shards": [0, 1], "durability": "memory", "map": None,
    }  # fmt: skip
    return [HELLO, {**fields, **changed}]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames come when they are expected, however slow the machine is."""
    monkeypatch.setattr(stats, "STATS_MS", 10**9)


@pytest.fixture
async def node() -> AsyncIterator[NodeServer]:
    """A node without identity."""
    server = NodeServer("n1")
    await server.start("127.0.0.1", 0)
    yield server
    await server.close()


async def link(node: NodeServer, **changed: Any) -> Wire:
    """An accepted link."""
    wire = await Wire.open(node.address, hello=False)
    wire.send(hello(**changed))
    assert (await wire.receive())[0] == REPORT
    return wire


async def test_identity_is_given_once(node: NodeServer) -> None:
    """A refused HELLO leaves a new node without identity; the first accepted gives it, later ones must match."""
    for changed in ({"node": "n2"}, {"version": 9}):
        async with await Wire.open(node.address, hello=False) as wire:
            wire.send(hello(**changed, secret="of a stranger"))
            assert (await wire.receive())[0] == REFUSED
    assert node.secret is None and node.cluster is None
    async with await link(node):
        assert (node.cluster, node.secret) == ("c", "s")
        async with await Wire.open(node.address, hello=False) as wire:
            wire.send(hello(secret="of a stranger", link=2))
            assert (await wire.receive())[:2] == [REFUSED, b"SECRET"]


@pytest.mark.parametrize(
    "items", [[[PUT, 0, 5, 0, "a", "x"]], [[PUT, 9, 1, 0, "a", "x"]], [[200, 0]], [[]], [7], [[GET, 0]]]
)
async def test_error_while_applying_ends_the_node(
    node: NodeServer, caplog: pytest.LogCaptureFixture, items: list[Any]
) -> None:
    """An item that cannot be applied stops the node, with the reason: it might differ from the others if it went on."""
    async with await link(node) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", "x"], *items]])
        await wire.closed()
    assert node.stopped.is_set() and node.failure is not None
    assert "event=apply-failed" in caplog.text
    with pytest.raises(OSError):
        await Wire.open(node.address, hello=False)


async def test_frames_are_worked_off_in_order(node: NodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked behind a batch, in the same read, sees it; its results are sent before. An index is not hurried."""
    rounds: list[bool] = []
    index_some = node.replica.backlog.index_some

    def slowly() -> bool:
        rounds.append(len(rounds) >= 3)
        return rounds[-1] and index_some()

    monkeypatch.setattr(node.replica.backlog, "index_some", slowly)
    async with await link(node) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 1, "a", "x"]]], [FETCH, 0, 0], [BATCH, 1, 0, [[PUT, 0, 2, 1, "b", "x"]]])
        assert (await wire.receive())[3] == [1] and (await wire.receive())[3] == [2]
        kind, shard, after, chain, entries = await wire.receive()
        assert (kind, shard, after, chain, len(entries)) == (ENTRIES, 0, 0, 0, 2) and len(rounds) >= 4
        wire.send([PULL, 0, "127.0.0.1", 1, "t"])
        assert await wire.receive() == [LEARN_FAILED, 0, b"the shard is not being learned"]


async def test_stop(node: NodeServer) -> None:
    """The coordinator may ask an accepted link's node to stop; that is no failure."""
    async with await link(node) as wire:
        wire.send([STOP])
        await until(node.stopped.is_set, "the stop")
    assert node.failure is None


async def test_orphan() -> None:
    """A spawned node stops by itself some time after the last link closed, not while there is one."""
    server = NodeServer("n1", spawned=True, orphan_ms=80)
    await server.start("127.0.0.1", 0)
    async with await link(server):
        assert server._orphan is None
    await until(server.stopped.is_set, "the stop of the orphan")
    await server.close()


# --- with a disk ------------------------------------------------------------------------------------


class SlowDisk(CrashDisk):
    """A disk in memory whose syncs wait until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self.waiting = threading.Event()  # a sync is waiting

    def sync_until(self, node: int, path: Path, until_bytes: int) -> None:
        if not self.go.is_set():
            self.waiting.set()
            assert self.go.wait(10)
        super().sync_until(node, path, until_bytes)


@pytest.fixture
async def stored() -> AsyncIterator[NodeServer]:
    """A node with a disk."""
    server = NodeServer("n1", store=open_small(SlowDisk()))
    await server.start("127.0.0.1", 0)
    yield server
    disk_of(server).go.set()
    await server.close()


def disk_of(server: NodeServer) -> SlowDisk:
    """The disk of a node."""
    assert server.durability is not None
    disk = server.durability.store.disk
    assert isinstance(disk, SlowDisk)
    return disk


async def test_results_before_they_are_durable(stored: NodeServer) -> None:
    """Results are sent at once, and acknowledged in a frame of their own when the sync is done."""
    async with await link(stored) as wire:
        disk = disk_of(stored)
        disk.go.clear()
        wire.send([BATCH, 1, -1, [[PUT, 0, 1, 1, "a", "v"]]])
        assert (await wire.receive())[1:4] == [1, 0, [1]]
        await until(disk.waiting.is_set, "the sync")
        wire.send([BATCH, 2, -1, [[GET, 0, "a"]]], [BATCH, 3, -1, [[PUT, 0, 2, 1, "a", "w"]]])
        results: list[Any] = []
        while len(results) < 2:
            _, applied, durable, more, _ = await wire.receive()
            assert durable == 0
            results += more
        assert results == [[b"v", 1, None], 2] and applied == 3
        disk.go.set()
        frames = []
        while not frames or frames[-1][2] < 3:
            frames.append(await wire.receive())
        assert all(frame[0] == RESULTS and frame[1] == 3 and frame[3] == [] for frame in frames)
        wire.send([BATCH, 4, 3, [[GET, 0, "a"]]])
        assert (await wire.receive())[1:4] == [4, 4, [[b"w", 2, None]]], "a read alone is durable at once"


async def test_a_report_is_durable(stored: NodeServer) -> None:
    """Promise, map and new copies are on the disk before the report; what was reported is there again."""
    disk = disk_of(stored)
    async with await Wire.open(stored.address, hello=False) as wire:
        wire.send(hello(epoch=7, map_version=4, map="{}"))
        kind, report = await wire.receive()
        assert kind == REPORT
        manifest = read_manifest(disk, DIRECTORY)
        assert manifest is not None
        assert (manifest.promised, manifest.coordinator, manifest.map_version, manifest.map) == (7, "k", 4, b"{}")
        assert [row[1].decode() for row in report[b"shards"]] == [manifest.shards[shard][0] for shard in (0, 1)]
    again = open_small(disk.process_kill(), seed=1)
    assert {shard: copy.disk for shard, copy in again.copies.items()} == {
        shard: copy.disk for shard, copy in stored.replica.copies.items()
    }


async def test_a_report_waits_for_what_was_applied(stored: NodeServer) -> None:
    """A new link is told a position only when it is durable, and nothing of the older link afterwards."""
    disk = disk_of(stored)
    async with await link(stored) as older, await Wire.open(stored.address, hello=False) as newer:
        disk.go.clear()
        older.send([BATCH, 1, -1, [[PUT, 0, 1, 0, "a", "v"]]])
        await until(disk.waiting.is_set, "the sync")
        newer.send(hello(epoch=2))
        await until(lambda: stored.replica.promised == 2)
        newer.send([BATCH, 1, -1, [[GET, 0, "a"]]])
        await newer.closed()  # before the report no other frame is accepted
    async with await Wire.open(stored.address, hello=False) as newest:
        newest.send(hello(epoch=2, link=3))
        await until(lambda: stored.core.link_number == 3)
        disk.go.set()
        kind, report = await newest.receive()
        assert kind == REPORT and report[b"shards"][0][5] == 1
        assert open_small(disk.process_kill(), seed=1).copies[0].table.seq == 1


async def test_what_is_told_is_durable(stored: NodeServer) -> None:
    """Who asks is told a position and a map only when a restart would find them."""
    disk = disk_of(stored)
    async with await link(stored, map=b"{}") as older, await Wire.open(stored.address, hello=False) as wire:
        disk.go.clear()
        older.send([BATCH, 1, -1, [[PUT, 0, 1, 0, "a", "v"]]])
        await until(disk.waiting.is_set, "the sync")
        wire.send([ASK, {"version": LINK_VERSION, "cluster": "c", "secret": "s", "node": ""}])
        await older.close()
        await until(lambda: stored.core.link is None)
        disk.go.set()
        told = parse_told((await wire.receive())[1])
        assert told.report.copies[0].seq == 1 and told.map == b"{}"
        assert open_small(disk.process_kill(), seed=1).copies[0].table.seq == 1


async def test_takeover_frames(stored: NodeServer) -> None:
    """Entries are fetched, and shipped ones acknowledged when they are durable; no empty frame of results is sent."""
    disk = disk_of(stored)
    async with await link(stored) as wire:
        other = NodeServer("n1")
        other.replica.hello({**{k.encode(): v for k, v in hello()[1].items()}, b"node": b"n1", b"coordinator": b"k"})
        other.replica.begin(5, -1, [[PUT, 0, 1, 0, b"a", b"v"], [PUT, 0, 2, 0, b"b", b"v"]])
        assert other.replica.run([])
        _, entries = other.replica.entries_after(0, 0)
        wire.send([FETCH, 0, 0])
        assert await wire.receive() == [ENTRIES, 0, 0, 0, []]
        disk.go.clear()
        wire.send([SHIP, 0, entries])
        await until(disk.waiting.is_set, "the sync")
        disk.go.set()
        epoch, seq, chain = other.replica.tables[0].position
        assert await wire.receive() == [SHIPPED, 0, epoch, seq, chain, None]
        assert open_small(disk.process_kill(), seed=1).copies[0].table.position == (epoch, seq, chain)
        wire.send([SHIP, 0, [[1, b"nonsense"]]], [FETCH, 0, 1])
        kind, _, _, at, _, error = await wire.receive()
        assert (kind, at) == (SHIPPED, 2) and b"damaged" in error
        assert (await wire.receive())[4] == entries[1:]
        wire.send([BATCH, 6, -1, [[GET, 0, "b"]]])
        assert (await wire.receive())[1:4] == [1, 1, [[b"v", 2, None]]]


async def test_a_failed_disk_ends_the_node(stored: NodeServer, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is acknowledged, the links are closed and nobody is let in any more."""
    disk = disk_of(stored)
    async with await link(stored) as wire:
        disk.fail_at, disk.dead = len(disk.calls) + 2, True  # the sync of the record
        wire.send([BATCH, 1, -1, [[PUT, 0, 1, 1, "a", "v"]]])
        assert (await wire.receive())[1:4] == [1, 0, [1]]
        await wire.closed()
    assert stored.stopped.is_set() and isinstance(stored.failure, OSError)
    assert "event=disk-failed" in caplog.text
    with pytest.raises(OSError):
        await Wire.open(stored.address, hello=False)


async def test_space_on_the_link(stored: NodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the level is sent, and is in the report of the next link."""
    async with await link(stored) as wire:
        monkeypatch.setattr(disk_of(stored), "free_bytes", lambda _: 0)
        assert await wire.receive() == [SPACE, 2]
    async with await Wire.open(stored.address, hello=False) as wire:
        wire.send(hello(epoch=2))
        assert (await wire.receive())[1][b"space"] == 2


async def test_stopped_in_order(stored: NodeServer) -> None:
    """What was applied is written and covered, and the manifest says so."""
    disk = disk_of(stored)
    async with await link(stored) as wire:
        wire.send([BATCH, 1, -1, [[PUT, 0, n, 0, "a", "v"] for n in range(1, 9)]])
        assert (await wire.receive())[1] == 8
        await stored.close()
    manifest = read_manifest(disk, DIRECTORY)
    assert manifest is not None and manifest.clean
    assert open_small(disk, seed=1).copies[0].table.seq == 8


async def test_a_socket_for_this_machine(tmp_path: Path) -> None:
    """A node listens at a Unix socket too, in the place of one that an earlier process left; it may do without."""
    path = tmp_path / "link.sock"
    path.write_bytes(b"")
    for place, is_there in ((path, True), (tmp_path / "missing" / "link.sock", False)):
        server = NodeServer("n1")
        await server.start("127.0.0.1", 0, local=place)
        assert place.is_socket() == is_there
        if is_there:
            reader, writer = await asyncio.open_unix_connection(str(place))
            writer.write(pack(hello()))
            assert (await asyncio.wait_for(reader.readexactly(1), 10)) == b"\xce"
            writer.close()
        async with await link(server, link=2):
            pass
        await server.close()
