"""The node's server: who may link, how results leave, and that it never goes on after an error while applying."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from server_tools import BOTH_LOOPS, Wire, event_loop_policy, until

from kvtcp.constants import MIB
from kvtcp.protocol.link import BATCH, HELLO, REFUSED, REPORT, RESULTS, STOP
from kvtcp.protocol.operations import GET, MGET, PUT
from kvtcp.server import node as node_module
from kvtcp.server.node import NodeServer

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


def hello(**changed: Any) -> list[Any]:
    """A HELLO for node n1 with shards 0 and 1."""
    fields = {
        "version": 1, "cluster": "c", "secret": "s", "epoch": 1, "coordinator": "k", "link": 1, "node": "n1",
        "map_version": 1, "shards": [0, 1],
    }  # fmt: skip
    return [HELLO, {**fields, **changed}]


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


async def test_newest_link_is_the_only_one(node: NodeServer) -> None:
    """A newer link closes the older one, and nothing unread of that is applied; an older number is refused."""
    async with await link(node) as older, await link(node, link=2) as newer:
        older.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", "old"]]])
        await older.closed()
        newer.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", "new"], [GET, 0, "a"]]])
        assert (await newer.receive())[3] == [[b"new", 1, None]]
        async with await Wire.open(node.address, hello=False) as wire:
            wire.send(hello(link=2))
            assert (await wire.receive())[:2] == [REFUSED, b"LINK"]
    async with await link(node, epoch=2, coordinator="other"):
        assert node.replica.promised == 2


async def test_one_frame_for_one_read(node: NodeServer) -> None:
    """All batches of one read are acknowledged with one frame, in order."""
    async with await link(node) as wire:
        wire.send(*([BATCH, n, 0, [[PUT, 0, n, 0, "a", str(n)], [GET, 0, "a"]]] for n in range(1, 51)))
        kind, applied, durable, results, _ = await wire.receive()
        assert (kind, applied, durable) == (RESULTS, 100, 100)
        assert results == [[str(n).encode(), n, None] for n in range(1, 51)]


async def test_large_results_are_split(node: NodeServer) -> None:
    """Large results leave in several frames, over batches and within one; the ordinal stands still within a batch."""
    async with await link(node) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", b"v" * 700_000], [PUT, 0, 2, 0, "b", b"w" * (15 * MIB)]]])
        assert (await wire.receive())[1] == 2
        wire.send(
            *([BATCH, 2, 0, [[GET, 0, "a"]]] for _ in range(10)),
            [BATCH, 2, 0, [[MGET, [[0, "b"]]], [MGET, [[0, "b"], [0, "a"]]], [GET, 0, "b"], [GET, 0, "none"]]],
        )
        got: list[Any] = []
        ordinals = []
        while len(got) < 14:
            _, applied, _, results, _ = await wire.receive()
            got += results
            ordinals.append(applied)
        assert [len(cell[0]) for cell in got[:10]] == [700_000] * 10
        assert len(got[10][0][0]) == 15 * MIB and got[11][0] >= 10, "an mget over its limit is an error"
        assert len(got[12][0]) == 15 * MIB and got[13] is None
        assert ordinals == sorted(ordinals) and ordinals[-1] == 16 and len(ordinals) > 6


async def test_reader_that_stops(node: NodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the coordinator does not read, nothing more is applied, and the node reads no more either."""
    monkeypatch.setattr(node_module, "LINK_WRITE_BUFFER_BYTES", 2 * MIB)
    async with await link(node) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", b"v" * MIB]]])
        assert (await wire.receive())[1] == 1
        wire.send(*([BATCH, 2, 0, [[GET, 0, "a"]]] for _ in range(60)), [BATCH, 3, 0, [[PUT, 0, 2, 0, "b", "x"]]])
        connection = await until(lambda: node._link)
        await until(lambda: connection.write_paused, "the pause")
        assert node.replica.tables[0].seq == 1
        assert connection.transport.get_write_buffer_size() < 8 * MIB
        count = 0
        while count < 60:
            count += len((await wire.receive())[3])
        await until(lambda: node.replica.tables[0].seq == 2, "the rest")


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
