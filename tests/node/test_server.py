"""The node's server: who may link, how results leave, and that it never goes on after an error while applying."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvtcp.node import stats
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import BATCH, REPORT, SPACE, STOP
from kvtcp.protocol.operations import GET, PUT
from kvtcp.storage.disk.manifest import read_manifest
from tests.node.test_durability import GatedDisk
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, pack, until
from tests.support.learning_tools import hello
from tests.support.storage_tools import DIRECTORY, open_small

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


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


async def test_error_while_applying_ends_the_node(node: NodeServer, caplog: pytest.LogCaptureFixture) -> None:
    """An item that cannot be applied stops the node, with the reason: it might differ from the others if it went on."""
    async with await link(node) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", "x"], [PUT, 0, 5, 0, "a", "x"]]])
        await wire.closed()
    assert node.stopped.is_set() and node.failure is not None
    assert "event=apply-failed" in caplog.text
    with pytest.raises(OSError):
        await Wire.open(node.address, hello=False)


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


@pytest.fixture
async def stored() -> AsyncIterator[NodeServer]:
    """A node with a disk."""
    server = NodeServer("n1", store=open_small(GatedDisk()))
    await server.start("127.0.0.1", 0)
    yield server
    disk_of(server).log_gate.open()
    await server.close()


def disk_of(server: NodeServer) -> GatedDisk:
    """The disk of a node."""
    assert server.durability is not None
    disk = server.durability.store.disk
    assert isinstance(disk, GatedDisk)
    return disk


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
        disk.log_gate.close()
        older.send([BATCH, 1, -1, [[PUT, 0, 1, 0, "a", "v"]]])
        await until(lambda: disk.log_gate.waiting, "the sync")
        newer.send(hello(epoch=2))
        await until(lambda: stored.replica.promised == 2)
        newer.send([BATCH, 1, -1, [[GET, 0, "a"]]])
        await newer.closed()  # before the report no other frame is accepted
    async with await Wire.open(stored.address, hello=False) as newest:
        newest.send(hello(epoch=2, link=3))
        await until(lambda: stored.core.link_number == 3)
        disk.log_gate.open()
        kind, report = await newest.receive()
        assert kind == REPORT and report[b"shards"][0][5] == 1
        assert open_small(disk.process_kill(), seed=1).copies[0].table.seq == 1


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
