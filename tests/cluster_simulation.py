"""The sequencer and real replicas in one thread, from one seed: the links are queues, time is a number.

Run many seeds: python -m tests.cluster_simulation [SEEDS] [FIRST]

A run has three nodes with slow, uneven, FIFO links, tiny windows, acknowledgements that are withheld, sockets that take
nothing for a while, links that are cut (what was under way is lost from a random point on) and come back, and nodes
that come back without their memory; the process that has the memory may come back after them. Clients write and read a
few hot keys, by themselves and many at once.

Oracles, besides `check()` after every step:
- a request is answered exactly once, and after healing every request is answered;
- when a write is answered, every member of its shard has applied it;
- the history of every hot key is linearizable, where a refused request did not happen and an unanswered one may have;
- *survivor*: at several moments the least advanced member of each shard is read as if everything else were lost. The
  history with these reads at its end must be linearizable. So no answer may show what is not on every member (R11);
- after healing all members of a shard have the same chain and the same digest.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgpack

from kvtcp.errors import Code
from kvtcp.protocol.link import LINK_VERSION
from kvtcp.protocol.operations import ADD, CAS, CHAIN_AT, DELETE, EXISTS, GET, INCR, PUT, TTL
from kvtcp.replication import admission, answers, progress, sequencer
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.multi_read import count_read, mget_read, page_read
from kvtcp.replication.replica import Replica
from kvtcp.replication.sequencer import Sequencer
from kvtcp.testing.linearizability import Operation, check_history

SHARDS = 4
HOT = [(b"a", 0), (b"b", 1), (b"c", 1), (b"n", 2)]  # keys and shards; the last one is a counter
CLIENTS = 6
STEPS = 350
REFUSED = {Code.OVERLOADED, Code.NOT_ENOUGH_REPLICAS, Code.SHARD_DOWN}

SMALL = {
    admission: {"WINDOW_ITEMS_MAX": 12, "WINDOW_BYTES_MAX": 700, "WRITE_WAIT_MS": 150, "WAITING_ITEMS_MAX": 5,
                "WAITING_MULTI_MAX": 3, "DRAIN_SLICE": 2, "BATCH_BYTES_MAX": 150},
    progress: {"WINDOW_ITEMS_MAX": 12, "WINDOW_BYTES_MAX": 700, "UNCOMMITTED_MAX": 4, "READ_RETRY_MS": 40},
    answers: {"WRITE_WAIT_MS": 150},
    sequencer: {"PURGE_INTERVAL_MS": 60},
}  # fmt: skip


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    """Windows of a few items, waits of a few steps."""
    with contextlib.ExitStack() as stack:
        for module, names in SMALL.items():
            stack.enter_context(mock.patch.multiple(module, **names))
        yield


def wire(message: Any) -> Any:
    """What arrives of a message that was sent."""
    return msgpack.unpackb(msgpack.packb(message), raw=True)


class Node:
    """A replica behind a link of two queues. `member` is the process whose memory counts."""

    def __init__(self, name: str, shards: list[int]) -> None:
        self.name = name
        self.shards = shards
        self.member = self.replica = Replica(name, "disk-0", 1)
        self.inbox: deque[tuple[int, Any]] = deque()  # (arrival, batch)
        self.outbox: deque[tuple[int, Any]] = deque()  # (arrival, frame)
        self.running = False  # the head of the inbox is half applied
        self.durable = 0  # last ordinal it acknowledged as durable
        self.withholds_until = 0  # it applies, but acknowledges nothing until then
        self.blocked_until = 0  # the coordinator's socket takes nothing until then
        self.delay_ms = 5  # upper bound of the delays of its link now
        self.back_at: int | None = 0  # when it will be linked again; None = linked

    def hello(self, epoch: int) -> dict[int, int]:
        """A new link: unread input is dropped; the positions."""
        fields = {"version": LINK_VERSION, "epoch": epoch, "coordinator": "c", "node": self.name, "shards": self.shards}
        report = self.replica.hello(wire(fields))
        self.inbox.clear()
        self.outbox.clear()
        self.running = False
        self.durable = 0
        return {number: seq for number, _, seq, _ in report["shards"]}


class Request:
    """One request of a client, and the sink of its answer."""

    def __init__(self, simulation: Simulation, kind: str, keys: list[tuple[bytes, int]], argument: Any = None) -> None:
        self.simulation = simulation
        self.kind = kind
        self.keys = keys
        self.argument = argument
        self.call = simulation.next_event()
        self.ret: int | None = None
        self.outcome = ""  # "ok", "refused", "unknown"
        self.results: list[Any] = []  # one for each key, in the terms of the checker

    def reply(self, token: Any, result: Any) -> None:
        """See Sink."""
        self._answered("ok")
        kind = self.kind
        if kind in ("put", "add", "cas"):
            self.simulation.check_applied(self.keys[0][1], result)
        if kind == "put":
            self.results = ["ok"]
        elif kind in ("add", "cas"):
            self.results = [True]
        elif kind == "get":
            self.results = [number_of(result)]
        elif kind == "mget":
            self.results = [number_of(cell) for cell in result]
        elif kind == "scan":
            found = {row[0]: int(row[1]) for row in result[0]}
            self.results = [found.get(key) for key, _ in self.keys]
        else:
            self.results = [result]

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """See Sink."""
        if code in (Code.EXISTS, Code.MISMATCH):
            self._answered("ok")
            self.results = [False]
        elif code == Code.UNKNOWN:
            self._answered("unknown")
        else:
            assert code in REFUSED, (code, message)
            self._answered("refused")

    def _answered(self, outcome: str) -> None:
        assert not self.outcome, f"answered {self.outcome}, and then {outcome}"
        self.outcome = outcome
        self.ret = self.simulation.next_event()


def number_of(cell: Any) -> int | None:
    """The value of a cell as the checker's state."""
    return None if cell is None else int(cell[0])


class Simulation:
    """One run. `sequencer_class` may be a wrong one."""

    def __init__(self, seed: int, sequencer_class: type[Sequencer] = Sequencer) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        names = ["n1", "n2", "n3"]
        self.map = ClusterMap.create(
            cluster="c", epoch=1, owner="c", shards=SHARDS, factor=rng.choice([1, 2, 2, 3, 3]), min_insync=1,
            nodes=dict.fromkeys(names, ("h", 1)),
        )  # fmt: skip
        self.sequencer = sequencer_class(self.map)
        self.nodes = {name: Node(name, self.map.shards_of(name)) for name in names}
        self.now_ms = 1_000
        self.events = 0  # order of calls and answers
        self.requests: list[Request] = []
        self.outstanding: list[Request | None] = [None] * CLIENTS
        self.next_value = 100
        self.faults = 0
        self.fault_rate = rng.choice([0.0, 0.02, 0.05])
        self.wipes = rng.random() < 0.3

    def next_event(self) -> int:
        """A time for the history: every call and answer has its own."""
        self.events += 1
        return self.events

    def run(self) -> None:
        """Everything, with all oracles."""
        with small_limits():
            self.sequencer.begin(self.now_ms, self.now_ms)
            for node in self.nodes.values():
                node.hello(1)
            self.sequencer.take_over({name: {} for name in self.nodes})
            for step in range(STEPS):
                self.step()
                if step % 70 == 69:
                    self.check_survivors()
            self.heal()
            self.check_histories([])

    # --- steps --------------------------------------------------------------------------------------

    def step(self, clients: bool = True) -> None:
        """A few milliseconds."""
        rng = self.rng
        self.now_ms += rng.randrange(1, 8)
        self.sequencer.begin(self.now_ms + 10**6, self.now_ms)
        for node in rng.sample(list(self.nodes.values()), len(self.nodes)):
            self.work(node)
            self.receive(node)
            if node.back_at is not None and node.back_at <= self.now_ms:
                self.link(node)
        if clients:
            self.act()
            if rng.random() < self.fault_rate:
                self.fault(rng.choice(list(self.nodes.values())))
        if rng.random() < 0.2:
            self.sequencer.tick()
        self.sequencer.check()
        for link in self.sequencer.close_batches():
            self.send(link)
        self.sequencer.check()

    def send(self, link: progress.Progress) -> None:
        """The coordinator's socket takes what there is, or some of it, or nothing."""
        node = self.nodes[link.node]
        if node.back_at is not None or node.blocked_until > self.now_ms:
            return
        arrival = self.arrival(node, node.inbox)
        committed = self.sequencer.committed_ordinal(link)
        assert committed <= link.last_ordinal
        while (batch := link.next_outgoing(self.now_ms)) is not None:
            node.inbox.append((arrival, wire((batch.stamp_ms, batch.items))))
            if self.rng.random() < 0.1:
                break

    def arrival(self, node: Node, queue: deque[tuple[int, Any]]) -> int:
        """When something sent now arrives: never before what was sent earlier."""
        return max(queue[-1][0] if queue else 0, self.now_ms + self.rng.randrange(node.delay_ms))

    def work(self, node: Node) -> None:
        """The node applies what arrived, perhaps in pieces, and answers."""
        replica = node.replica
        while node.inbox and node.inbox[0][0] <= self.now_ms:
            if not node.running:
                replica.begin(*node.inbox[0][1])
                node.running = True
            results: list[Any] = []
            finished = replica.run(results, self.rng.choice([0, 10, 10_000]))
            if finished:
                node.running = False
                node.inbox.popleft()
            self.answer(node, results)
            if not finished and self.rng.random() < 0.3:
                return
        if node.durable < replica.applied and node.withholds_until <= self.now_ms:
            self.answer(node, [])

    def answer(self, node: Node, results: list[Any]) -> None:
        """A RESULTS frame."""
        if node.back_at is not None:
            return
        replica = node.replica
        if node.withholds_until <= self.now_ms:
            node.durable = replica.applied
        frame = (replica.applied, node.durable, results, replica.take_flags())
        node.outbox.append((self.arrival(node, node.outbox), wire(frame)))

    def receive(self, node: Node) -> None:
        """The coordinator reads what arrived."""
        while node.outbox and node.outbox[0][0] <= self.now_ms:
            self.sequencer.on_results(node.name, *node.outbox.popleft()[1])
            self.sequencer.check()

    # --- faults -------------------------------------------------------------------------------------

    def fault(self, node: Node) -> None:
        """One of the things that happen to a link or a node."""
        rng = self.rng
        self.faults += 1
        kind = rng.choice(["slow", "withhold", "block", "cut", "cut"])
        until = self.now_ms + rng.randrange(10, 300)
        if kind == "slow":
            node.delay_ms = rng.choice([2, 20, 100, 200])
        elif kind == "withhold":
            node.withholds_until = until
        elif kind == "block":
            node.blocked_until = until
        elif node.back_at is None:
            self.cut(node, until)
            if self.wipes and rng.random() < 0.3:
                node.replica = Replica(node.name, f"disk-{until}", 2)
                node.inbox.clear()
                node.running = False

    def cut(self, node: Node, back_at: int) -> None:
        """The link is lost: what was under way is lost from a random point on, in both directions."""
        while node.inbox and self.rng.random() < 0.7 and not (node.running and len(node.inbox) == 1):
            node.inbox.pop()
        node.outbox.clear()
        node.back_at = back_at
        self.sequencer.link_down(node.name, "cut")
        self.sequencer.check()

    def link(self, node: Node) -> None:
        """HELLO. A process that lost what it acknowledged is refused; the one that has it may come back later."""
        positions = node.hello(1)
        reason = self.sequencer.link_up(node.name, positions)
        self.sequencer.check()
        if reason is None:
            node.member = node.replica
            node.back_at = None
            return
        assert node.replica is not node.member, f"the member itself was refused: {reason}"
        node.back_at = self.now_ms + self.rng.randrange(10, 300)
        if self.rng.random() < 0.5:
            node.replica = node.member

    def heal(self) -> None:
        """No more faults and no new requests: everything must be answered and every replica equal."""
        for node in self.nodes.values():
            node.delay_ms = 2
            node.withholds_until = node.blocked_until = 0
            node.replica = node.member
        for _ in range(400):
            self.step(clients=False)
        unanswered = [r.kind for r in self.requests if not r.outcome]
        assert not unanswered, f"never answered: {unanswered}"
        for shard in self.sequencer.shards:
            tables = [self.nodes[link.node].member.tables[shard.number] for link in shard.members]
            assert {(t.seq, t.chain, t.digest()) for t in tables} == {
                (shard.last_seq, tables[0].chain, tables[0].digest())
            }, "the members of a shard are equal"
            assert shard.commit == shard.last_seq and shard.writable and not shard.held
        for node in self.nodes.values():
            node.member.check()
        assert not self.sequencer.waiting_items and not self.sequencer._kept

    # --- clients ------------------------------------------------------------------------------------

    def act(self) -> None:
        """Idle clients ask for something; sometimes one does not wait for its answer."""
        rng = self.rng
        for client in range(CLIENTS):
            busy = self.outstanding[client]
            if busy is not None and (not busy.outcome and rng.random() < 0.998):
                continue
            if rng.random() < 0.4:
                self.outstanding[client] = self.ask()

    def ask(self) -> Request:
        """One request."""
        rng, seq = self.rng, self.sequencer
        key, number = rng.choice(HOT)
        self.next_value += 1
        value = self.next_value
        text = b"%d" % value
        kind = rng.choice(["get", "get", "get", "put", "put", "delete", "add", "cas", "mget", "scan", "other"])
        if key == HOT[-1][0] and kind in ("put", "add", "cas"):
            kind = "incr"
        keys = [(key, number)] if kind not in ("mget", "scan") else HOT[:]
        request = Request(self, kind, keys)
        self.requests.append(request)
        size = len(key) + len(text)
        if kind == "get":
            seq.read(GET, number, key, request, 0)
        elif kind == "put":
            request.argument = value
            seq.write(PUT, number, key, (text,), size, request, 0)
        elif kind == "add":
            request.argument = value
            seq.write(ADD, number, key, (text,), size, request, 0)
        elif kind == "cas":
            expected = value - rng.randrange(1, 12)
            request.argument = (expected, value)
            seq.write(CAS, number, key, (text, b"%d" % expected, None), size, request, 0)
        elif kind == "delete":
            seq.write(DELETE, number, key, (), size, request, 0)
        elif kind == "incr":
            request.argument = 1
            seq.write(INCR, number, key, (1,), size, request, 0)
        elif kind == "mget":
            seq.multi_read(mget_read([k for k, _ in HOT], [n for _, n in HOT], request, 0))
        elif kind == "scan":
            seq.multi_read(page_read(list(range(SHARDS)), b"a", b"o", 100, False, False, request, 0))
        else:
            self.ask_other(request, text)
        return request

    def ask_other(self, request: Request, text: bytes) -> None:
        """Requests whose results are not in the histories: they still have to be answered, and change tables."""
        seq = self.sequencer
        kind = self.rng.randrange(6)
        if kind == 0:
            seq.read(EXISTS, 3, b"cold", request, 0)
        elif kind == 1:
            seq.read(TTL, 3, b"cold", request, 0)
        elif kind == 2:
            seq.multi_read(count_read(list(range(SHARDS)), b"", None, request, 0))
        elif kind == 3:
            node = self.rng.choice(list(self.nodes))
            number = self.rng.choice(self.nodes[node].shards)
            if not seq.control(node, (CHAIN_AT, number), [number], request, 0):
                request.fail(0, Code.NOT_ENOUGH_REPLICAS, "the node is not linked", {})
        else:
            ttl_ms = self.rng.choice([30, None])
            seq.write(PUT, 3, b"cold" + text[-1:], (text, ttl_ms), 10, request, 0)

    # --- oracles ------------------------------------------------------------------------------------

    def check_applied(self, number: int, rev: int) -> None:
        """A write with this number is answered: every member has it."""
        for link in self.sequencer.shards[number].members:
            assert self.nodes[link.node].member.tables[number].seq >= rev, "answered before every member had it"

    def check_survivors(self) -> None:
        """If all but the least advanced member of each shard were lost now, nobody could tell by what was answered."""
        reads: list[tuple[bytes, Any]] = []
        for key, number in HOT:
            members = [self.nodes[link.node].member for link in self.sequencer.shards[number].members]
            table = min((m.tables[number] for m in members), key=lambda table: table.seq)
            reads.append((key, number_of(table.get(key, 0))))
        self.check_histories(reads)

    def check_histories(self, reads: list[tuple[bytes, Any]]) -> None:
        """Every hot key, with `reads` (key, value) after everything else."""
        last = self.events + 1
        for key, _ in HOT:
            history: list[Operation] = [(last, last + 1, "get", None, value) for k, value in reads if k == key]
            for request in self.requests:
                for index, (asked, _) in enumerate(request.keys):
                    if asked == key and request.kind != "other":
                        history += operations_of(request, index)
            verdict = check_history(history, budget=200_000)
            assert verdict is not False, f"the history of {key!r} is not linearizable: {sorted(history)[-40:]}"


def operations_of(request: Request, index: int) -> list[Operation]:
    """What the history has of one key of a request: nothing if it was refused or only wanted to read."""
    kind = "get" if request.kind in ("mget", "scan") else request.kind
    if request.outcome == "ok":
        return [(request.call, request.ret, kind, request.argument, request.results[index])]
    if request.outcome == "refused" or kind == "get":
        return []
    return [(request.call, None, kind, request.argument, None)]


def main() -> None:
    """Run seeds until one fails."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    faults = answered = refused = unknown = 0
    for seed in range(first, first + seeds):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except BaseException:
            print(f"seed {seed} fails", file=sys.stderr)
            raise
        faults += simulation.faults
        answered += sum(request.outcome == "ok" for request in simulation.requests)
        refused += sum(request.outcome == "refused" for request in simulation.requests)
        unknown += sum(request.outcome == "unknown" for request in simulation.requests)
    print(f"{seeds} seeds: {faults} faults, {answered} answered, {refused} refused, {unknown} unknown; no violation")


if __name__ == "__main__":
    main()
