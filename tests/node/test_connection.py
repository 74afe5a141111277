"""Connections to a node: what a first frame may be, one answer for one read, and a coordinator that does not read."""

from __future__ import annotations

import pytest

from kvtcp.constants import MIB
from kvtcp.node import connection as node_connection
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import BATCH, FETCH, RESULTS
from kvtcp.protocol.operations import GET, PUT
from tests.node.test_server import link, no_figures, node
from tests.processes.raw_client import BOTH_LOOPS, event_loop_policy, until

__all__ = ["event_loop_policy", "no_figures", "node"]
pytestmark = BOTH_LOOPS


async def test_one_frame_for_one_read(node: NodeServer) -> None:
    """All batches of one read are acknowledged with one frame, in order."""
    async with await link(node) as wire:
        wire.send(*([BATCH, n, 0, [[PUT, 0, n, 0, "a", str(n)], [GET, 0, "a"]]] for n in range(1, 51)))
        kind, applied, durable, results, _ = await wire.receive()
        assert (kind, applied, durable) == (RESULTS, 100, 100)
        assert results == [[str(n).encode(), n, None] for n in range(1, 51)]


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


async def test_frames_of_other_types(node: NodeServer) -> None:
    """They end the link, not the node."""
    async with await link(node) as wire:
        wire.send([FETCH, "0", 0])
        await wire.closed()
    assert node.failure is None
