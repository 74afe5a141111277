"""Callers of a node that are no coordinator: who asks what is here is told it, if he knows the secret."""

from __future__ import annotations

from typing import Any

from kvtcp.protocol.link import ASK, BATCH, LINK_VERSION, REFUSED, TOLD, parse_told
from kvtcp.protocol.operations import GET, PUT
from kvtcp.server.node import NodeServer
from tests.server_tools import BOTH_LOOPS, Wire, event_loop_policy
from tests.test_node import link, node

__all__ = ["event_loop_policy", "node"]
pytestmark = BOTH_LOOPS


async def ask(server: NodeServer, **changed: Any) -> Any:
    """The answer to an ASK, after which the node closes the connection."""
    fields = {"version": LINK_VERSION, "cluster": "c", "secret": "s", "node": "n1", **changed}
    async with await Wire.open(server.address, hello=False) as wire:
        wire.send([ASK, fields])
        answer = await wire.receive()
        assert await wire.closed() == b""
        return answer


async def test_asking_changes_nothing(node: NodeServer) -> None:
    """Whoever knows the secret is told copies, promise and map; promise, identity and link stay as they are."""
    told = parse_told((await ask(node, node=""))[1])
    assert (told.report.promised, told.report.copies, told.map, told.linked) == (0, {}, b"", False)
    assert node.secret is None, "asking founds no cluster"
    async with await link(node, epoch=3, map=b"{}", map_version=7) as wire:
        wire.send([BATCH, 1, 0, [[PUT, 0, 1, 0, "a", "1"]]])
        await wire.receive()
        kind, fields = await ask(node)
        told = parse_told(fields)
        assert (kind, told.map, told.linked, told.report.node) == (TOLD, b"{}", True, "n1")
        assert (told.report.promised, told.report.map_version) == (3, 7)
        assert {shard: (copy.epoch, copy.seq) for shard, copy in told.report.copies.items()} == {0: (3, 1), 1: (0, 0)}
        wire.send([BATCH, 2, 0, [[GET, 0, "a"]]])
        assert (await wire.receive())[3] == [[b"1", 1, None]], "the link goes on"


async def test_strangers_are_told_nothing(node: NodeServer) -> None:
    """Another secret, cluster, node or version is refused; an ASK that is none is a protocol error."""
    async with await link(node):
        for changed, code in (
            ({"secret": "x"}, b"SECRET"), ({"cluster": "x"}, b"CLUSTER"), ({"node": "n2"}, b"NODE"),
            ({"version": 9}, b"VERSION"),
        ):  # fmt: skip
            assert (await ask(node, **changed))[:2] == [REFUSED, code]
        for fields in ([], {"version": LINK_VERSION}):
            async with await Wire.open(node.address, hello=False) as wire:
                wire.send([ASK, fields])
                assert await wire.closed() == b""
