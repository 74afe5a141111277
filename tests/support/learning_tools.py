"""Nodes that learn from each other in tests: a member and a learner with a link each, spoken by hand."""

from __future__ import annotations

from typing import Any

from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import BATCH, HELLO, LINK_VERSION, PULL, REPORT, RESULTS, STATS
from kvtcp.protocol.operations import DONATE, LEARN, PUT
from tests.processes.raw_client import Wire


def hello_fields(**changed: Any) -> dict[bytes, Any]:
    """The fields of a HELLO for node n1 with shards 0 and 1."""
    fields: dict[str, Any] = {
        "version": LINK_VERSION, "cluster": b"c", "secret": b"s", "epoch": 1, "coordinator": b"k", "link": 1,
        "node": b"n1", "map_version": 1, "heard_version": 0, "shards": [0, 1], "durability": b"memory", "map": None,
    }  # fmt: skip
    return {name.encode(): value for name, value in (fields | changed).items()}


def hello(**changed: Any) -> list[Any]:
    """The frame."""
    return [HELLO, hello_fields(**changed)]


class Link:
    """The coordinator's end of a link, by hand. Frames of figures are passed over."""

    def __init__(self, node: NodeServer, wire: Wire, report: dict[bytes, Any]) -> None:
        self.node = node
        self.wire = wire
        self.report = report
        self.sent = 0  # items
        self.applied = self.durable = 0
        self.seqs: dict[int, int] = {}
        self.results: list[Any] = []

    @classmethod
    async def open(cls, node: NodeServer, **changed: Any) -> Link:
        """An accepted link."""
        wire = await Wire.open(node.address, hello=False)
        wire.send(hello(**{"node": node.replica.node} | changed))
        kind, report = await wire.receive()
        assert kind == REPORT, (kind, report)
        return cls(node, wire, report)

    def batch(self, *items: Any, commit: int = -1) -> None:
        """Send a batch."""
        self.wire.send([BATCH, 1000, commit, list(items)])
        self.sent += len(items)

    def puts(self, shard: int, count: int, value: bytes = b"v", keys: int = 1 << 30) -> list[Any]:
        """So many puts, numbered on."""
        first = self.seqs.get(shard, 0) + 1
        self.seqs[shard] = first + count - 1
        return [[PUT, shard, seq, 0, b"k%d" % (seq % keys), value] for seq in range(first, first + count)]

    async def frame(self, kind: int) -> Any:
        """The next frame of this kind; results before it are noted."""
        while True:
            message = await self.wire.receive()
            if message[0] == RESULTS:
                self.applied, self.durable = message[1:3]
                self.results += message[3]
            if message[0] == kind:
                return message
            assert message[0] in (RESULTS, STATS), message

    async def settled(self) -> None:
        """Everything sent is applied and durable."""
        while self.durable < self.sent:
            await self.frame(RESULTS)

    async def ask(self, *items: Any) -> list[Any]:
        """Send a batch of items that have results each, and wait for these."""
        self.batch(*items)
        wanted = len(self.results) + len(items)
        while len(self.results) < wanted:
            await self.frame(RESULTS)
        return self.results[-len(items) :]


def deafen(node: NodeServer) -> Any:
    """A node stops reading its link. Returns the transport, which resumes it."""
    assert node.core.link is not None
    transport = node.core.link.connection.transport
    transport.pause_reading()
    return transport


async def begin_transfer(member: Link, learner: Link, shard: int = 0, token: bytes = b"t", seq_min: int = 0) -> Any:
    """LEARN, DONATE and PULL; what LEARN said."""
    last_seq = seq_min or member.seqs.get(shard, 0)
    (answer,) = await learner.ask([LEARN, shard, 1, last_seq, 1])
    (donated,) = await member.ask([DONATE, shard, token, seq_min])
    assert donated is not None
    host, port = member.node.address
    learner.wire.send([PULL, shard, host, port, token])
    return answer
