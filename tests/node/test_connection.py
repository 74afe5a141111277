"""Connections to a node: what a first frame may be, one answer for one read, and a coordinator that does not read."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import MIB
from kvtcp.node import connection as node_connection
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import BATCH, FETCH, PULL, REFUSED, RESULTS, SHIP
from kvtcp.protocol.operations import GET, MGET, PUT
from tests.node.test_server import hello, link, no_figures, node
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, until

__all__ = ["event_loop_policy", "no_figures", "node"]
pytestmark = BOTH_LOOPS


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
    monkeypatch.setattr(node_connection, "LINK_WRITE_BUFFER_BYTES", 2 * MIB)
    async with await link(node) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", b"v" * MIB]]])
        assert (await wire.receive())[1] == 1
        wire.send(*([BATCH, 2, 0, [[GET, 0, "a"]]] for _ in range(60)), [BATCH, 3, 0, [[PUT, 0, 2, 0, "b", "x"]]])
        connection = (await until(lambda: node.core.link)).connection
        await until(lambda: connection.write_paused, "the pause")
        assert node.replica.tables[0].seq == 1
        assert connection.transport.get_write_buffer_size() < 8 * MIB
        count = 0
        while count < 60:
            count += len((await wire.receive())[3])
        await until(lambda: node.replica.tables[0].seq == 2, "the rest")


@pytest.mark.parametrize(
    "frame", [[FETCH, 0], [FETCH, "0", 0], [SHIP, 0, None], [PULL, 0, 7, 1, "t"], [BATCH, 1, 0], [99]]
)
async def test_frames_of_other_types(node: NodeServer, frame: list[Any]) -> None:
    """They end the link, not the node."""
    async with await link(node) as wire:
        wire.send(frame)
        await wire.closed()
    assert node.failure is None


async def test_fields_of_a_hello(node: NodeServer) -> None:
    """A HELLO that lacks a field, or has one of another type, closes the connection and changes nothing."""
    wrong = [{"shards": [5000]}, {"epoch": "1"}, {"map": 7}, {"map": b"\xff"}, {"durability": None}, {"node": b"\xff"}]
    for changed in wrong:
        async with await Wire.open(node.address, hello=False) as wire:
            wire.send(hello(**changed))
            await wire.closed()
    assert node.secret is None and node.replica.promised == 0
