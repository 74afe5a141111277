"""The coordinator's cores and real replicas in one thread, from one seed: the links are queues, time is a number.

Run many seeds: python -m tests.cluster_simulation [SEEDS] [FIRST]

A run has three nodes with slow, uneven, FIFO links, tiny windows, acknowledgements that come after the results or are
withheld, sockets that take nothing for a while, links that are cut (what was under way is lost from a random point on)
and come back. Nodes are restarted with what was durable, perhaps with a little more; copies of one node at a time are
lost, in memory with every restart, and the data may come back after them. Coordinators are killed, also in the middle
of a takeover, and the next one has another clock. Clients write and read a few hot keys, by themselves and many at
once.

Oracles, besides `check()` after every step:
- a request is answered exactly once, and after healing every request is answered, or its coordinator was killed;
- when a write is answered, every member of its shard has it durable, in the copy that the map names;
- stamps never decrease, over coordinators too;
- the history of every hot key is linearizable, where a refused request did not happen and an unanswered one may have;
- *survivor*: at several moments the durable part of the least advanced member of each shard that is not known to be bad
  is read as if everything else were lost. The history with these reads at its end must be linearizable. So no answer
  may show what is not on every member (R11);
- no takeover has an alarm, and after healing all members of a shard have the same chain and the same digest.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from replication_fakes import wire

from kvtcp.errors import Code
from kvtcp.protocol.link import BATCH, ENTRIES, FETCH, LINK_VERSION, RESULTS, SHIPPED, Report, parse_report
from kvtcp.protocol.operations import ADD, CAS, CHAIN_AT, DELETE, EXISTS, GET, INCR, PUT, TTL
from kvtcp.replication import admission, answers, copy_set, progress, recovery, sequencer
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.replication.multi_read import count_read, mget_read, page_read
from kvtcp.replication.recovery import Action, Takeover
from kvtcp.replication.replica import Replica
from kvtcp.replication.sequencer import Sequencer
from kvtcp.storage import kept
from kvtcp.storage.copy import Copy, Logged
from kvtcp.storage.kept import KeptEntries
from kvtcp.storage.table import Table
from kvtcp.testing.linearizability import Operation, check_history

SHARDS = 4
HOT = [(b"a", 0), (b"b", 1), (b"c", 1), (b"n", 2)]  # keys and shards; the last one is a counter
CLIENTS = 6
STEPS = 350
AHEAD_MS = 60  # how far the bound of stamps is stored ahead
REFUSED = {Code.OVERLOADED, Code.NOT_ENOUGH_REPLICAS, Code.SHARD_DOWN}

SMALL = {
    admission: {"WINDOW_ITEMS_MAX": 12, "WINDOW_BYTES_MAX": 700, "WRITE_WAIT_MS": 150, "WAITING_ITEMS_MAX": 5,
                "WAITING_MULTI_MAX": 3, "DRAIN_SLICE": 2, "BATCH_BYTES_MAX": 150},
    progress: {"WINDOW_ITEMS_MAX": 12, "WINDOW_BYTES_MAX": 700, "UNCOMMITTED_MAX": 4, "READ_RETRY_MS": 40},
    answers: {"WRITE_WAIT_MS": 150},
    sequencer: {"PURGE_INTERVAL_MS": 60},
    recovery: {"RECOVERY_SHARDS_MAX": 2},
    copy_set: {"BATCH_BYTES_MAX": 150},
    kept: {"WINDOW_ITEMS_MAX": 30, "KEPT_SHARD_BYTES_MAX": 3_000, "KEPT_PASS_ENTRIES": 5},
}  # fmt: skip


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    """Windows of a few items, waits of a few steps."""
    with contextlib.ExitStack() as stack:
        for module, names in SMALL.items():
            stack.enter_context(mock.patch.multiple(module, **names))
        yield


@dataclass
class Stored:
    """One copy of a shard on a disk: the entries that were logged, and how many of them are durable."""

    disk: str
    entries: list[Logged] = field(default_factory=list)
    durable: int = 0
    complete: bool = True

    def table(self, shard: int, count: int) -> Table:
        """The table after the first `count` entries."""
        table = Table(shard)
        if not self.complete:  # a snapshot of which nothing but the position was read
            _, _, seq, chain, _ = self.entries[count - 1]
            table.load([], 1, seq, chain)
            return table
        for _, _, _, chain, entry in self.entries[:count]:
            table.apply_entry(entry, chain)
        return table


class Node:
    """A node, its disk, and its link of two queues."""

    def __init__(self, name: str, shards: list[int], rng: random.Random) -> None:
        self.name = name
        self.shards = shards
        self.rng = rng
        self.copies: dict[int, Stored] = {}  # what it has now
        self.archive: dict[str, Stored] = {}  # every copy it ever had, by disk
        self.promised = 0
        self.coordinator = ""
        self.inbox: deque[tuple[int, Any]] = deque()  # (arrival, frame)
        self.outbox: deque[tuple[int, Any]] = deque()  # (arrival, frame)
        self.running = False  # the head of the inbox is half applied
        self.durable = 0  # last ordinal of the link that is durable
        self.withholds_until = 0  # it applies, but syncs nothing until then
        self.blocked_until = 0  # the coordinator's socket takes nothing until then
        self.delay_ms = 5  # upper bound of the delays of its link now
        self.back_at: int | None = 0  # when it will be linked again; None = linked
        for shard in shards:
            self.new_copy(shard)
        self.start()

    def new_copy(self, shard: int) -> None:
        """The copy of a shard is gone; there is another, empty one."""
        disk = f"{self.name}/{shard}/{len(self.archive)}"
        self.copies[shard] = self.archive[disk] = Stored(disk)

    def start(self) -> None:
        """A process that finds what is durable, and perhaps a little more."""
        found = []
        entries = KeptEntries(2_000)
        for shard, stored in self.copies.items():
            stored.durable = self.rng.randint(stored.durable, len(stored.entries))
            del stored.entries[stored.durable :]
            table = stored.table(shard, stored.durable)
            found.append(Copy(shard, stored.disk, complete=stored.complete, table=table))
            entries.add(0, stored.entries[:])
        self.replica = Replica(self.name, 1, lambda: "never", "sync", found, entries, self.promised, self.coordinator)
        self.inbox.clear()
        self.outbox.clear()
        self.running = False
        self.durable = 0

    def hello(self, cluster_map: ClusterMap) -> Report:
        """A new link: unread input is dropped; the report."""
        fields = {
            "version": LINK_VERSION, "epoch": cluster_map.epoch, "coordinator": cluster_map.owner, "node": self.name,
            "map_version": cluster_map.version, "heard_version": 0, "map": b"", "shards": self.shards,
        }  # fmt: skip
        report = self.replica.hello(wire(fields))
        self.promised, self.coordinator = cluster_map.epoch, cluster_map.owner
        self.log()
        self.sync()
        self.inbox.clear()
        self.outbox.clear()
        self.running = False
        self.durable = 0
        return parse_report(wire(report))

    def log(self) -> None:
        """What was applied is written, and not durable yet."""
        for entry in self.replica.take_logged():
            self.copies[entry[0]].entries.append(entry)

    def sync(self) -> None:
        """Everything written is durable."""
        for stored in self.copies.values():
            stored.durable = len(stored.entries)
        self.durable = self.replica.applied


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
    """One run. The classes may be wrong ones."""

    def __init__(
        self,
        seed: int,
        sequencer_class: type[Sequencer] = Sequencer,
        takeover_class: type[Takeover] = Takeover,
    ) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.sequencer_class = sequencer_class
        self.takeover_class = takeover_class
        names = ["n1", "n2", "n3"]
        self.in_memory = rng.random() < 0.2
        self.now_ms = 1_000
        self.clock_ms = 1_000_000  # what the clock of the present coordinator is ahead of `now_ms`
        self.map = ClusterMap.found(
            cluster="c", owner="c1", shards=SHARDS, factor=rng.choice([1, 2, 2, 3, 3]), min_insync=1,
            durability="memory" if self.in_memory else "sync", nodes=dict.fromkeys(names, ("h", 1)),
            stamp_bound_ms=self.wall_ms() + AHEAD_MS,
        )  # fmt: skip
        self.before_ms = 0  # bound of stamps of the coordinators before
        self.stamp_ms = 0  # highest that anything was queued with
        self.nodes = {name: Node(name, self.map.shards_of(name), rng) for name in names}
        self.sequencer = sequencer_class(self.map)
        self.takeover: Takeover | None = takeover_class(self.map)  # None = the shards are served
        self.map_change_at: int | None = None  # when the store has the next bound; None = none is on its way
        self.events = 0  # order of calls and answers
        self.requests: list[Request] = []
        self.outstanding: list[Request | None] = [None] * CLIENTS
        self.next_value = 100
        self.faults = 0
        self.takeovers = 0
        self.fault_rate = rng.choice([0.0, 0.02, 0.05])
        # in memory the only copy of a shard is not lost: it would begin anew, and rightly so
        self.loses_copies = rng.random() < 0.3 and not (self.in_memory and self.map.factor == 1)
        self.bad_nodes: set[str] = set()  # nodes with a copy that is lost, or bad

    def wall_ms(self) -> int:
        """The clock of the coordinator."""
        return self.now_ms + self.clock_ms

    def next_event(self) -> int:
        """A time for the history: every call and answer has its own."""
        self.events += 1
        return self.events

    def run(self) -> None:
        """Everything, with all oracles."""
        with small_limits():
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
        self.sequencer.begin(self.wall_ms(), self.now_ms)
        for node in rng.sample(list(self.nodes.values()), len(self.nodes)):
            self.work(node)
            self.receive(node)
            if node.back_at is not None and node.back_at <= self.now_ms:
                self.link(node)
        self.move_bound()
        if clients:
            if self.takeover is None:
                self.act()
            if rng.random() < self.fault_rate:
                self.fault(rng.choice(list(self.nodes.values())))
        if self.takeover is not None:
            return
        assert self.stamp_ms <= self.sequencer.stamp_ms, "time goes backwards"
        self.stamp_ms = self.sequencer.stamp_ms
        if rng.random() < 0.2:
            self.sequencer.tick()
        self.sequencer.check()
        for link in self.sequencer.close_batches():
            self.send(link)
        self.sequencer.check()

    def move_bound(self) -> None:
        """The store takes its time for the next bound of stamps."""
        if self.map_change_at is None and self.wall_ms() + AHEAD_MS // 2 > self.map.stamp_bound_ms:
            self.map_change_at = self.now_ms + self.rng.choice([1, 10, 100])
        elif self.map_change_at is not None and self.map_change_at <= self.now_ms:
            self.map_change_at = None
            self.map = self.map.with_stamp_bound(self.wall_ms() + AHEAD_MS)
            self.sequencer.map_changed(self.map)

    def send(self, link: progress.Progress) -> None:
        """The coordinator's socket takes what there is, or some of it, or nothing."""
        node = self.nodes[link.node]
        if node.back_at is not None or node.blocked_until > self.now_ms:
            return
        arrival = self.arrival(node, node.inbox)
        committed = self.sequencer.committed_ordinal(link)
        assert -1 <= committed <= link.last_ordinal
        while (batch := link.next_outgoing(self.now_ms)) is not None:
            node.inbox.append((arrival, wire((BATCH, batch.stamp_ms, committed, batch.items))))
            if self.rng.random() < 0.1:
                break

    def arrival(self, node: Node, queue: deque[tuple[int, Any]]) -> int:
        """When something sent now arrives: never before what was sent earlier."""
        return max(queue[-1][0] if queue else 0, self.now_ms + self.rng.randrange(node.delay_ms))

    def work(self, node: Node) -> None:
        """The node does what arrived, perhaps in pieces, and answers."""
        replica = node.replica
        while node.inbox and node.inbox[0][0] <= self.now_ms:
            frame = node.inbox[0][1]
            if frame[0] != BATCH:
                node.inbox.popleft()
                self.ship(node, frame)
                continue
            if not node.running:
                replica.begin(*frame[1:])
                node.running = True
            results: list[Any] = []
            finished = replica.run(results, self.rng.choice([0, 10, 10_000]))
            node.log()
            if finished:
                node.running = False
                node.inbox.popleft()
            self.answer(node, results)
            if not finished and self.rng.random() < 0.3:
                return
        if node.durable < replica.applied and self.syncs(node):
            self.answer(node, [])

    def syncs(self, node: Node) -> bool:
        """Whether the disk gets done now; then everything applied is durable."""
        done = node.withholds_until <= self.now_ms and (self.in_memory or self.rng.random() < 0.5)
        if done and not node.running:
            node.sync()
        return done and not node.running

    def answer(self, node: Node, results: list[Any]) -> None:
        """A RESULTS frame."""
        self.syncs(node)
        if node.back_at is None:
            self.reply(node, (RESULTS, node.replica.applied, node.durable, results, node.replica.take_flags()))

    def ship(self, node: Node, frame: Any) -> None:
        """A frame of a takeover."""
        kind, shard, argument = frame
        if kind == FETCH:
            self.reply(node, (ENTRIES, shard, argument, *node.replica.entries_after(shard, argument)))
            return
        error = node.replica.ship(shard, argument)
        node.log()
        node.sync()
        self.reply(node, (SHIPPED, shard, *node.replica.copies[shard].table.position, error))

    def reply(self, node: Node, frame: Any) -> None:
        """The node sends something."""
        if node.back_at is None:
            node.outbox.append((self.arrival(node, node.outbox), wire(frame)))

    def receive(self, node: Node) -> None:
        """The coordinator reads what arrived."""
        while node.outbox and node.outbox[0][0] <= self.now_ms:
            kind, *rest = node.outbox.popleft()[1]
            if kind == RESULTS:
                self.sequencer.on_results(node.name, *rest)
                self.sequencer.check()
            else:
                assert self.takeover is not None, "entries are shipped during a takeover only"
                event = self.takeover.on_entries if kind == ENTRIES else self.takeover.on_shipped
                self.go_on(event(node.name, *rest))

    # --- takeover -----------------------------------------------------------------------------------

    def go_on(self, actions: list[Action]) -> None:
        """Frames of the takeover leave; if it is done, the shards are served."""
        takeover = self.takeover
        assert takeover is not None
        for name, frame in actions:
            node = self.nodes[name]
            node.inbox.append((self.arrival(node, node.inbox), wire(frame)))
        if not takeover.is_done:
            return
        assert not takeover.alarms, takeover.alarms
        self.takeovers += 1
        self.takeover = None
        self.map = self.map.with_disks(takeover.new_disks)
        self.sequencer.map_changed(self.map)
        highest_ms = max(report.stamp_ms for report in takeover.reports.values())
        self.sequencer.take_over(takeover.verdicts, max(self.before_ms, highest_ms))
        self.bad_nodes = set()
        for node in self.nodes.values():
            bad = self.sequencer.link_up(node.name, takeover.copies(node.name), judged=True)
            self.check_bad(node, bad)
        self.sequencer.check()

    def begin_anew(self) -> None:
        """A link was lost during a takeover: all nodes are asked again."""
        self.takeover = self.takeover_class(self.map)
        for node in self.nodes.values():
            if node.back_at is None:
                self.drop(node, self.now_ms + self.rng.randrange(1, 20))

    def kill_coordinator(self) -> None:
        """It is gone with all that it knew; the next one has its own clock, and only the map to begin with."""
        for request in self.requests:
            if not request.outcome:
                request.outcome = "unknown"
        self.outstanding = [None] * CLIENTS
        for node in self.nodes.values():
            self.drop(node, self.now_ms + self.rng.randrange(1, 60))
        self.now_ms += self.rng.choice([1, 50, 300])
        self.clock_ms += self.rng.choice([0, 0, 0, -500, 40])
        self.before_ms = self.map.stamp_bound_ms
        epoch = self.map.epoch + 1
        self.map = self.map.taken_over(
            owner=f"c{epoch}", epoch=epoch, nodes=self.map.nodes, stamp_bound_ms=self.wall_ms() + AHEAD_MS
        )
        self.map_change_at = None
        self.sequencer = self.sequencer_class(self.map)
        self.sequencer.begin(self.wall_ms(), self.now_ms)
        self.takeover = self.takeover_class(self.map)

    # --- faults -------------------------------------------------------------------------------------

    def fault(self, node: Node) -> None:
        """One of the things that happen to a link, a node or the coordinator."""
        rng = self.rng
        self.faults += 1
        kind = rng.choice(["slow", "withhold", "block", "cut", "cut", "restart", "coordinator"])
        until = self.now_ms + rng.randrange(10, 300)
        if kind == "slow":
            node.delay_ms = rng.choice([2, 20, 100, 200])
        elif kind == "withhold":
            node.withholds_until = until
        elif kind == "block":
            node.blocked_until = until
        elif kind == "coordinator":
            self.kill_coordinator()
        elif kind == "cut":
            self.cut(node, until)
        elif not self.in_memory:
            self.cut(node, until)
            if self.loses_copies and rng.random() < 0.5:
                self.lose_copies(node)
            node.start()
        elif self.loses_copies and not self.bad_nodes - {node.name}:
            self.cut(node, until)
            self.lose_copies(node)
            node.start()

    def lose_copies(self, node: Node) -> None:
        """Copies of some shards, in memory of all, are gone; or what was lost is there again. What good members had
        while a copy was bad may be more than that copy ever had, so they are not lost before it is good again."""
        rng = self.rng
        lost = [shard for shard in node.shards if node.copies[shard].disk != self.map.disk_of(shard, node.name)]
        if lost and not self.in_memory and rng.random() < 0.5:
            self.find_copies(node)
            return
        if any(name != node.name for name in self.bad_nodes):
            return
        self.bad_nodes.add(node.name)
        for shard in node.shards:
            dice = rng.random()
            if self.in_memory or dice < 0.4:
                node.new_copy(shard)
            elif dice < 0.5 and node.copies[shard].durable:
                whole = node.copies[shard]
                torso = Stored(whole.disk, whole.entries[: whole.durable], whole.durable, complete=False)
                node.copies[shard] = torso

    def find_copies(self, node: Node) -> None:
        """The copies that the map names are there again."""
        for shard in node.shards:
            disk = self.map.disk_of(shard, node.name)
            if disk:
                node.copies[shard] = node.archive[disk]

    def cut(self, node: Node, back_at: int) -> None:
        """The link is lost: what was under way is lost from a random point on, in both directions."""
        if node.back_at is not None:
            return
        self.drop(node, back_at)
        if self.takeover is not None:
            self.begin_anew()
        else:
            self.sequencer.link_down(node.name, "cut")
            self.sequencer.check()

    def drop(self, node: Node, back_at: int) -> None:
        """As `cut`, before the coordinator hears of it."""
        while node.inbox and self.rng.random() < 0.7 and not (node.running and len(node.inbox) == 1):
            node.inbox.pop()
        node.outbox.clear()
        node.back_at = back_at

    def link(self, node: Node) -> None:
        """HELLO."""
        report = node.hello(self.map)
        node.back_at = None
        if self.takeover is not None:
            self.go_on(self.takeover.on_report(report, self.map.version))
            return
        disks = self.sequencer.new_disks(node.name, report.copies)
        self.map = self.map.with_disks(disks)
        self.sequencer.map_changed(self.map)
        bad = self.sequencer.link_up(node.name, report.copies)
        self.check_bad(node, bad)
        self.sequencer.check()

    def check_bad(self, node: Node, bad: dict[int, str]) -> None:
        """A copy that is not the map's, or not whole, is bad."""
        self.bad_nodes.discard(node.name)
        for shard in self.sequencer.links[node.name].shards:
            stored = node.copies[shard.number]
            is_member = stored.complete and stored.disk == self.map.disk_of(shard.number, node.name)
            if shard.serving:
                assert is_member or shard.number in bad, (node.name, shard.number, stored.disk, bad)
            if not is_member or shard.number in bad:
                self.bad_nodes.add(node.name)

    def heal(self) -> None:
        """No more faults and no new requests: everything must be answered and every replica equal."""
        for node in self.nodes.values():
            node.delay_ms = 2
            node.withholds_until = node.blocked_until = 0
            disks = {shard: self.map.disk_of(shard, node.name) for shard in node.shards}
            if any(not copy.complete or copy.disk != disks[shard] for shard, copy in node.copies.items()):
                self.cut(node, self.now_ms)
                self.find_copies(node)
                node.start()
        for _ in range(200):
            self.step(clients=False)
        if any(shard.bad or not shard.serving for shard in self.sequencer.shards) and self.takeover is None:
            self.kill_coordinator()  # what a copy lacks is shipped by the next takeover
        for _ in range(300):
            self.step(clients=False)
        unanswered = [r.kind for r in self.requests if not r.outcome]
        assert not unanswered, f"never answered: {unanswered}"
        assert self.takeover is None, "a takeover ends when the faults do"
        for shard in self.sequencer.shards:
            tables = [self.nodes[link.node].replica.tables[shard.number] for link in shard.members]
            assert {(t.seq, t.chain, t.digest()) for t in tables} == {
                (shard.last_seq, tables[0].chain, tables[0].digest())
            }, "the members of a shard are equal"
            assert shard.commit == shard.last_seq and shard.writable and not shard.held and not shard.bad
        for node in self.nodes.values():
            node.replica.check()
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
            is_bad = seq.links[node] in seq.shards[number].bad
            if is_bad or not seq.control(node, (CHAIN_AT, number), [number], request, 0):
                request.fail(0, Code.NOT_ENOUGH_REPLICAS, "the node is not linked", {})
        else:
            ttl_ms = self.rng.choice([30, None])
            seq.write(PUT, 3, b"cold" + text[-1:], (text, ttl_ms), 10, request, 0)

    # --- oracles ------------------------------------------------------------------------------------

    def member(self, shard: int, name: str) -> Stored:
        """The copy by which a node is a member."""
        return self.nodes[name].archive[self.map.disk_of(shard, name)]

    def check_applied(self, number: int, rev: int) -> None:
        """A write with this number is answered: every member has it durable."""
        for name in self.map.nodes_of(number):
            assert self.member(number, name).durable >= rev, "answered before every member had it"

    def check_survivors(self) -> None:
        """If all but the least advanced member of each shard were lost now, nobody could tell by what was answered."""
        reads: list[tuple[bytes, Any]] = []
        if not self.map.disk_of(0, self.map.nodes_of(0)[0]):
            return  # nothing was ever served
        for key, number in HOT:
            members = [self.member(number, name) for name in self.map.nodes_of(number) if name not in self.bad_nodes]
            if not members:
                continue
            least = min(members, key=lambda stored: stored.durable)
            reads.append((key, number_of(least.table(number, least.durable).get(key, 0))))
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
    faults = takeovers = answered = refused = unknown = 0
    for seed in range(first, first + seeds):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except BaseException:
            print(f"seed {seed} fails", file=sys.stderr)
            raise
        faults += simulation.faults
        takeovers += simulation.takeovers
        answered += sum(request.outcome == "ok" for request in simulation.requests)
        refused += sum(request.outcome == "refused" for request in simulation.requests)
        unknown += sum(request.outcome == "unknown" for request in simulation.requests)
    print(
        f"{seeds} seeds: {faults} faults, {takeovers} takeovers, {answered} answered, {refused} refused, "
        f"{unknown} unknown; no violation"
    )


if __name__ == "__main__":
    main()
