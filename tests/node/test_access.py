"""Access to a node: which callers are refused, and what those are told that are no coordinator."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.errors import ProtocolError
from kvtcp.node.access import Identity, check, check_fields, names_copy
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import ASK, BATCH, GIVE, HELLO, LINK_VERSION, REFUSED, TOLD, parse_told
from kvtcp.protocol.operations import GET, PUT
from tests.node.test_server import link, node
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy

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
    async with await Wire.open(node.address, hello=False) as wire:
        wire.send([ASK, {"version": LINK_VERSION}])
        assert await wire.closed() == b""
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
        assert (await ask(node, secret="x"))[:2] == [REFUSED, b"SECRET"]


def test_one_check_for_all_callers() -> None:
    """Version, secret and cluster, in this order; a node of no cluster yet has only a version."""
    fields = {b"version": LINK_VERSION, b"secret": b"s", b"cluster": b"c"}
    ours = Identity("c", "s")
    assert check(fields, ours) is None and check(fields, Identity()) is None
    assert check(fields | {b"secret": b"x"}, Identity()) is None
    wrong = {b"version": 0, b"secret": b"x", b"cluster": b"x"}
    for name, code in ((b"version", "VERSION"), (b"secret", "SECRET"), (b"cluster", "CLUSTER")):
        refused = check(fields | wrong, ours)
        assert refused is not None and refused.code == code
        del wrong[name]


@pytest.mark.parametrize("kind", [HELLO, ASK, GIVE])
def test_fields_of_first_frames(kind: int) -> None:
    """Each kind has its fields, of their types; a version of any type may be refused later."""
    fields: dict[bytes, Any] = {b"cluster": b"c", b"secret": b"s", b"node": b"n1"}
    if kind == HELLO:
        fields |= {b"version": 1, b"epoch": 1, b"coordinator": b"k", b"link": 1, b"shards": [0], b"map_version": 1}
        fields |= {b"heard_version": 0, b"durability": b"sync", b"map": None}
    check_fields(kind, fields)
    wrong: list[Any] = [7, [], {}, fields | {b"secret": "s"}, fields | {b"cluster": None}]
    if kind == HELLO:
        wrong += [fields | {b"map": 7}, fields | {b"map": b"\xff"}]
        wrong += [fields | {b"shards": [-1]}, fields | {b"shards": [5000]}, fields | {b"node": b"\xff"}]
        wrong += [fields | {b"epoch": b"1"}, fields | {b"durability": None}]
    for each in wrong:
        with pytest.raises(ProtocolError, match="lacks fields"):
            check_fields(kind, each)


def test_what_a_copy_will_be_called() -> None:
    """A token, the directory of eight bytes, and a generation from 1 on."""
    fields: dict[bytes, Any] = {b"token": b"t", b"directory": bytes(8), b"generation": 1}
    assert names_copy(fields)
    for changed in ({b"token": 1}, {b"directory": bytes(7)}, {b"generation": 0}, {b"generation": 1 << 63}):
        assert not names_copy(fields | changed)
