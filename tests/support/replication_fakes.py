"""A sequencer with real replicas whose links are moved by hand, and a sink that remembers its answers."""

from __future__ import annotations

from typing import Any

import msgpack

from kvtcp.cluster.map import ClusterMap
from kvtcp.node.replica import Replicas
from kvtcp.protocol.link import LINK_VERSION, CopyReport, parse_report
from kvtcp.protocol.operations import GET, PUT
from kvtcp.replication.sequencing.sequencer import Sequencer


class Answers:
    """Sink: `ok[token]` is a result, `failed[token]` a (code, message, details); each token is answered once."""

    def __init__(self) -> None:
        self.ok: dict[Any, Any] = {}
        self.failed: dict[Any, tuple[int, str, dict[str, Any]]] = {}

    def reply(self, token: Any, result: Any) -> None:
        assert token not in self.ok and token not in self.failed, f"{token} is answered twice"
        self.ok[token] = result

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        assert token not in self.ok and token not in self.failed, f"{token} is answered twice"
        self.failed[token] = (code, message, details)

    def __contains__(self, token: Any) -> bool:
        return token in self.ok or token in self.failed


STAMP_MAX_MS = 10**15


def make_map(nodes: int = 3, factor: int = 3, shards: int = 4, disk: str = "disk", min_insync: int = 1) -> ClusterMap:
    """A map with nodes n1, n2, ... whose copies all have this disk, and a bound of stamps that is never met."""
    founded = ClusterMap.found(
        cluster="c", owner="o", shards=shards, factor=factor, min_insync=min_insync, durability="sync",
        nodes={f"n{n + 1}": ("h", n + 1) for n in range(nodes)}, stamp_bound_ms=STAMP_MAX_MS,
    )  # fmt: skip
    return founded.with_replica_ids({n: dict.fromkeys(founded.nodes_of(n), disk) for n in range(shards)})


def wire(message: Any) -> Any:
    """What arrives of a message that was sent."""
    return msgpack.unpackb(msgpack.packb(message), raw=True)


class Cluster:
    """All links are up after the start. Time is `now_ms`; nothing moves by itself."""

    def __init__(
        self, nodes: int = 3, factor: int = 3, shards: int = 4, *, min_insync: int = 1, link: bool = True
    ) -> None:
        """`link` False: the shards are not served yet, and no link is up."""
        self.map = make_map(nodes, factor, shards, min_insync=min_insync)
        self.sequencer = Sequencer(self.map)
        self.replicas: dict[str, Replicas] = {}
        self.applied: dict[str, tuple[int, list[Any]]] = {}  # last applied ordinal, results not yet handed over
        self.answers = Answers()
        self.now_ms = 1_000
        self.begin(0)
        for node in self.map.nodes:
            self.new_process(node)
        if link:
            for number in range(shards):
                self.sequencer.shards[number].serve(0, 0)
            for node in self.map.nodes:
                assert self.up(node) is None

    def begin(self, ms: int = 1) -> None:
        """Time passes."""
        self.now_ms += ms
        self.sequencer.begin(10**6 + self.now_ms, self.now_ms)

    def tick(self, ms: int = 1) -> None:
        """Time passes and the sequencer looks at it."""
        self.begin(ms)
        self.sequencer.tick()
        self.sequencer.check()

    def new_process(self, node: str, disk: str = "disk") -> None:
        """The node is a new, empty process. With the disk of the map it claims to be what it was."""
        self.replicas[node] = Replicas(node, 1, lambda: disk)
        self.hello(node)

    def hello(self, node: str) -> dict[int, CopyReport]:
        """A new link, as the node sees it; its copies."""
        report = self.replicas[node].hello({
            b"version": LINK_VERSION, b"epoch": 1, b"coordinator": b"o", b"node": node.encode(), b"map_version": 1,
            b"heard_version": 0, b"shards": self.map.shards_of(node),
        })  # fmt: skip
        self.applied[node] = (0, [])
        return parse_report(wire(report)).copies

    def up(self, node: str) -> str | None:
        """Link the node again. Returns why its first bad shard is bad, if it has one."""
        bad = self.sequencer.link_up(node, self.hello(node))
        self.sequencer.check()
        return next(iter(bad.values()), None)

    def down(self, node: str, reason: str = "cut") -> None:
        """Lose the link."""
        self.sequencer.link_down(node, reason)
        self.sequencer.check()

    def apply(self, node: str) -> list[Any]:
        """The node gets all that is queued to it and applies it; its results stay there. Returns the items."""
        self.sequencer.close_batches()
        link, replica = self.sequencer.links[node], self.replicas[node]
        items: list[Any] = []
        results = self.applied[node][1]
        while (batch := link.next_outgoing(self.now_ms)) is not None:
            replica.begin(batch.stamp_ms, self.sequencer.committed_ordinal(link), batch.items)
            assert replica.run(results)
            items += batch.items
        self.applied[node] = (replica.applied, results)
        self.sequencer.check()
        return items

    def results(self, node: str, durable: bool = True) -> None:
        """The results of what the node applied arrive; without `durable` nothing of it is acknowledged."""
        ordinal, results = self.applied[node]
        self.applied[node] = (ordinal, [])
        self.sequencer.on_results(node, ordinal, ordinal if durable else 0, results, self.replicas[node].take_flags())
        self.sequencer.check()

    def pump(self, *nodes: str) -> None:
        """Everything queued is applied and answered, by these nodes or all."""
        for node in nodes or self.map.nodes:
            if self.sequencer.links[node].connected:
                self.apply(node)
                self.results(node)

    def put(self, token: Any, number: int = 0, key: bytes = b"k", value: bytes = b"v") -> None:
        """A put by the common sink."""
        self.sequencer.shards[number].write(PUT, key, (value,), len(key) + len(value), self.answers, token)

    def commit(self, token: Any, number: int = 0) -> Any:
        """A put, applied and answered by all. Returns its result."""
        self.put(token, number)
        self.pump()
        return self.answers.ok.get(token)

    def write(self, op: int, token: Any, number: int = 0, key: bytes = b"k", args: tuple[Any, ...] = ()) -> None:
        """Any other write."""
        self.sequencer.shards[number].write(op, key, args, len(key), self.answers, token)

    def get(self, token: Any, number: int = 0, key: bytes = b"k", op: int = GET) -> None:
        """A read of one key."""
        self.sequencer.shards[number].read(op, key, self.answers, token)
