"""A controller with real replicas and a store of the map in memory, all of them moved by hand.

Nothing moves by itself: `tick` lets time pass, `pump` brings everything that is on its way to where it goes, also the
changes of the map, unless something was told to stand still: `store.is_held`, `node.is_paused` (it reads nothing and
says nothing), `node.withholds` (it applies and syncs nothing), `node.holds_pulls` (a bulk transfer does not end).
After every step the cores check themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Outcome, Stored
from kvtcp.constants import TICK_MS
from kvtcp.node.access import Identity
from kvtcp.node.core import CoordinatorLink, NodeCore
from kvtcp.node.learning import Learning
from kvtcp.node.replica import FreezeRequest, Replicas
from kvtcp.protocol.link import BATCH, LINK_VERSION, REPORT, parse_report
from kvtcp.protocol.operations import GET, PUT, WRITE_OP_END
from kvtcp.replication.controller import Controller
from kvtcp.replication.sequencing.link import Link
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.replication.sequencing.shard import Shard
from kvtcp.storage.disk.snapshot import SnapshotHeader, decode_snapshot, encode_snapshot
from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged
from tests.support.replication_fakes import STAMP_MAX_MS, Answers, wire

CLUSTER = b"12345678"


class MapStore:
    """The config store: one value with a version."""

    def __init__(self, value: bytes, version: int) -> None:
        self.value = value
        self.version = version
        self.is_held = False  # no compare-and-set has an outcome
        self.maps = [ClusterMap.from_json(value)]  # all that were ever stored

    def compare_and_set(self, expected: int | None, value: bytes) -> Outcome:
        """Make it."""
        if expected != self.version:
            return Outcome.CONFLICT
        self.value, self.version = value, self.version + 1
        self.maps.append(ClusterMap.from_json(value))
        return Outcome.DONE

    def read(self) -> Stored:
        """What it holds."""
        return Stored(self.version, self.value)


class Node:
    """One node: a core whose frames wait in two queues. Everything applied is durable at once, unless withheld. It is
    the connection, the `Persistence` and the `NodeProcess` of its core."""

    peer = "the coordinator"
    write_paused = False

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.port = world.map.nodes[name][1]
        self.disks = (f"{name}-{number}" for number in count(1))
        self.copies: list[Copy] = []
        self.backlog = Backlog()
        self.generations: dict[int, int] = {}
        self.promise = (0, "", 0)  # epoch, coordinator, map version
        self.is_paused = False
        self.withholds = False
        self.holds_pulls = False
        self.frames: list[Any] = []  # every frame it got
        self.start()

    def start(self) -> None:
        """A process that goes on with what it had."""
        promised, coordinator, version = self.promise
        self.replica = Replicas(
            self.name, 1, lambda: next(self.disks), self.world.durability, self.copies, self.backlog, promised,
            coordinator, version, generations=self.generations,
        )  # fmt: skip
        self.core = NodeCore(self.replica, self, Identity())
        self.core.persistence = self
        self.link = CoordinatorLink(self)
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque()
        self.pulls: list[tuple[Learning, int, bytes]] = []  # with the port of the donor, and the token
        self.due: deque[Callable[[], None]] = deque()  # what is to be called later
        self.withheld: list[Callable[[], None]] = []  # what is to be called when it is durable, in order
        self.is_stopped = False

    def stop(self) -> None:
        """The process ends; what it had is on its disk. Or the coordinator wants it to."""
        self.is_stopped = True
        replica = self.replica
        self.copies = list(replica.copies.values())
        self.generations = replica.generations
        self.promise = (replica.promised, replica.coordinator, replica.map_version)

    def wipe(self, *shards: int) -> None:
        """The copies of these shards are gone, or all."""
        self.stop()
        for shard in shards or range(self.world.controller.map.shards):
            self.backlog.forget(shard)
            self.copies = [copy for copy in self.copies if copy.shard != shard]
        self.start()

    def hello(self, fields: dict[str, Any]) -> Any:
        """A new link; the report."""
        self.lost("another link")
        self.link = CoordinatorLink(self)
        more = {"version": LINK_VERSION, "secret": "s", "durability": self.world.durability}
        self.core.hello(self.link, wire({**more, **fields}))
        kind, report = self.outbox.popleft()
        assert kind == REPORT, report
        return report

    def lost(self, reason: str) -> None:
        """The link is lost, with all that is under way."""
        self.core.closed(self.link, reason)
        self.inbox.clear()
        self.outbox.clear()
        self.withheld.clear()

    def work(self) -> None:
        """Everything in the inbox."""
        while self.inbox:
            frame = self.inbox.popleft()
            self.frames.append(frame)
            self.core.received(self.link, [frame])
            while self.due:
                self.due.popleft()()
        if not self.holds_pulls:
            self.pull()

    def release(self) -> None:
        """What was withheld is durable now, and that is told."""
        self.withholds = False
        withheld, self.withheld = self.withheld, []
        for done in withheld:
            done()

    def tell_news(self) -> None:
        """Something was done to the replica by hand."""
        self.core.changed()
        while self.due:
            self.due.popleft()()

    def pull(self) -> None:
        """The bulk transfers end: by the bytes of a snapshot, as between servers."""
        pulls, self.pulls = self.pulls, []
        for learning, port, token in pulls:
            donor = next(node for node in self.world.nodes.values() if node.port == port).replica
            given = donor.take_donation(token) if self.core.is_wanted(learning) else None
            if given is None:
                self.core.pull_failed(learning, "nothing is donated under this token")
                continue
            donation, kept = given
            header = SnapshotHeader(CLUSTER, learning.shard, learning.generation, *donation.position)
            data = b"".join(encode_snapshot(header, donation.frozen, kept))
            if self.core.loaded(learning, *decode_snapshot(data, header.name, CLUSTER)):
                self.core.published(learning, None)

    # --- the connection, the disk and the process of the core ---------------------------------------------

    def send(self, frame: Any) -> None:
        """To the coordinator."""
        self.outbox.append(wire(frame))

    def close(self, *_: Any, **__: Any) -> None:
        """The world does it, or nobody reads it."""

    flush = abort = linked = unlinked = donations_changed = collect_young = change_copies = event = founded = close

    def append(self, entries: list[Logged], link: CoordinatorLink, ordinal: int) -> bool:
        """Durable, unless it is withheld."""
        if self.withholds:
            self.withheld.append(partial(self.core.durable, link, ordinal))
        return not self.withholds

    def when_durable(self, done: Callable[[], None]) -> None:
        """At once, or when it is released."""
        if self.withholds:
            self.withheld.append(done)
        else:
            done()

    def remember(self, replica: Replicas, done: Callable[[], None]) -> None:
        """A promise is never withheld."""
        done()

    def later(self, delay_ms: int, callback: Callable[[], None], /) -> None:
        """When the frame is worked off."""
        self.due.append(callback)

    def failed(self, error: BaseException) -> None:
        """There is no error that a node may end by."""
        raise error

    def end_transfers(self, reason: str) -> None:
        """Those of the link that was lost."""
        self.pulls.clear()

    def start_pull(self, learning: Learning, host: str, port: int, token: bytes) -> None:
        """The next time that bulk transfers end."""
        self.pulls.append((learning, port, token))

    def end_pull(self, shard: int, reason: str) -> None:
        """Nobody wants it."""
        self.pulls = [pull for pull in self.pulls if pull[0].shard != shard]

    def start_backup(self, request: FreezeRequest) -> None:
        """Nobody makes one."""
        raise AssertionError("there is no backup in this world")


class World:
    """The controller, nodes n1, n2, ..., and the store. `wanted` are the nodes that hold the shards: the first
    `wanted` of them, all if it is 0."""

    def __init__(
        self, nodes: int = 3, factor: int = 3, shards: int = 1, *, min_insync: int = 2, durability: str = "sync",
        wanted: int = 0, up: bool = True, changes: Callable[[ClusterMap], ClusterMap] = lambda founded: founded,
        writes: int = 0, ships: bool = True,
    ) -> None:  # fmt: skip
        """With so many `writes` to every shard. Unless it `ships`, no node has the entries of them: a learner needs a
        whole copy."""
        addresses = {f"n{number}": ("h", number) for number in range(1, nodes + 1)}
        held = {node: addresses[node] for node in list(addresses)[: wanted or nodes]}
        founded = ClusterMap.found(
            cluster="c", owner="o", shards=shards, factor=factor, min_insync=min_insync, durability=durability,
            nodes=held, stamp_bound_ms=STAMP_MAX_MS,
        )  # fmt: skip
        for host, port in list(addresses.values())[len(held) :]:
            founded, _ = founded.with_node(host, port)
        founded = changes(founded)
        self.durability = durability
        self.store = MapStore(founded.to_json(), founded.version)
        self.now_ms = 0
        self.answers = Answers()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.closed: list[tuple[str, str]] = []  # links that the core had closed, and why
        self.actions: list[tuple[Any, ...]] = []  # all others but frames
        self.sent: tuple[int | None, bytes] | None = None  # the change of the map in flight, without an outcome
        self.nodes: dict[str, Node] = {}
        self._tokens = count(1)
        self.take_over()
        if up:
            self.up(*self.nodes)
            self.pump()
            assert all(shard.serving for shard in self.shards)
        self.fill(writes)
        if not ships:
            self.forget_entries()

    # --- what is asked of it --------------------------------------------------------------------------

    @property
    def map(self) -> ClusterMap:
        """As it is stored."""
        return self.controller.map

    @property
    def sequencer(self) -> Sequencer:
        """The sequencer."""
        return self.controller.sequencer

    @property
    def shards(self) -> list[Shard]:
        """The shards as the sequencer sees them."""
        return self.sequencer.shards

    def members(self, number: int = 0) -> list[str]:
        """E of a shard."""
        return [link.node for link in self.shards[number].members]

    def row(self, number: int = 0) -> list[str]:
        """The members of a shard as they are stored."""
        return self.map.nodes_of(number)

    def rows(self, number: int = 0) -> list[list[str]]:
        """All rows of a shard that were stored one after the other."""
        rows = [each.nodes_of(number) for each in self.store.maps]
        return [row for at, row in enumerate(rows) if not at or row != rows[at - 1]]

    def words(self, *words: str) -> list[dict[str, Any]]:
        """The fields of the events of these words."""
        return [fields for word, fields in self.events if word in words]

    def items(self, node: str, *ops: int) -> list[Any]:
        """The items of these operations that the node got."""
        batches = [frame for frame in self.nodes[node].frames if frame[0] == BATCH]
        return [item for batch in batches for item in batch[3] if item[0] in ops]

    def put(self, token: Any, number: int = 0, key: bytes = b"k", value: bytes = b"v") -> None:
        """A put."""
        self.sequencer.shards[number].write(PUT, key, (value,), len(key) + len(value), self.answers, token)
        self.check()

    def commit(self, token: Any, number: int = 0, key: bytes = b"k") -> Any:
        """A put, and all that comes of it. Returns its result, None if it has none yet."""
        self.put(token, number, key)
        self.pump()
        return self.answers.ok.get(token)

    def fill(self, count: int = 1, token: Any = None) -> None:
        """So many writes to every shard, answered, with `token` and the shard for their tokens, or others."""
        for n in range(count):
            name = token or len(self.answers.ok) + len(self.answers.failed)
            tokens = [(name, shard.number) for shard in self.shards]
            for each in tokens:
                self.put(each, each[1], key=b"%d" % n if n else b"k")
            self.pump()
            assert all(each in self.answers.ok for each in tokens)

    def write(self, op: int, token: Any, number: int = 0, key: bytes = b"k", args: tuple[Any, ...] = ()) -> None:
        """Any other write."""
        self.sequencer.shards[number].write(op, key, args, len(key), self.answers, token)
        self.check()

    def get(self, token: Any, number: int = 0, key: bytes = b"k", op: int = GET) -> None:
        """A read of one key."""
        assert op >= WRITE_OP_END
        self.sequencer.shards[number].read(op, key, self.answers, token)
        self.check()

    # --- steps ------------------------------------------------------------------------------------------

    def take_over(self, *up: str) -> None:
        """A new coordinator. No link is up but those of the nodes `up`, which come after it."""
        if self.nodes:
            self.down(*self.controller.reports)
        self.sent = None
        before = ClusterMap.from_json(self.store.value)
        self.changes = MapChanges(before, self.store.version)
        owned: list[ClusterMap] = []
        self.changes.propose(
            lambda old: old.taken_over(
                owner=f"o{old.epoch + 1}", epoch=old.epoch + 1, nodes={}, stamp_bound_ms=STAMP_MAX_MS
            ),
            owned.append,
        )
        sent = self.changes.to_send(self.now_ms)
        assert sent is not None
        self.changes.on_outcome(self.store.compare_and_set(*sent), now_ms=self.now_ms)
        assert owned
        self.controller = Controller(
            self.changes, durability=self.durability, map_version_before=before.version,
            stamp_before_ms=before.stamp_bound_ms, new_token=lambda: b"token%d" % next(self._tokens),
        )  # fmt: skip
        self.begin()
        for node in self.map.nodes:
            if node not in self.nodes:
                self.nodes[node] = Node(self, node)
        self.up(*up)

    def check(self) -> None:
        """The cores check themselves."""
        self.controller.check()
        self.changes.check()

    def begin(self, ms: int = 1) -> None:
        """Time passes."""
        self.now_ms += ms
        self.controller.begin(10**6 + self.now_ms, self.now_ms)

    def tick(self, ms: int = TICK_MS) -> None:
        """Time passes and the core looks at it; what comes of it is not brought anywhere."""
        self.begin(ms)
        self.controller.tick()
        self.check()
        self.act()

    def run(self, ms: int) -> None:
        """So much time passes, and everything goes its way meanwhile."""
        end_ms = self.now_ms + ms
        while self.now_ms < end_ms:
            self.tick(min(TICK_MS, end_ms - self.now_ms))
            self.pump()

    def up(self, *nodes: str) -> None:
        """Link these nodes."""
        for node in nodes:
            report = self.nodes[node].hello(self.controller.hello(node, "s")[1])
            self.controller.node_up(node, parse_report(report))
            self.check()
            self.act()

    def down(self, *nodes: str, reason: str = "cut") -> None:
        """Lose the links of these nodes."""
        for node in nodes:
            self.nodes[node].lost(reason)
            self.controller.node_down(node, reason)
            self.check()
            self.act()

    def pull(self, node: str) -> None:
        """Link a node whose transfers do not end."""
        self.nodes[node].holds_pulls = True
        self.up(node)
        self.pump()

    def act(self) -> None:
        """What the core wants, but for batches."""
        self.controller.act(self)

    def event(self, level: str, word: str, **fields: Any) -> None:
        """See CoordinatorProcess, also below."""
        assert level in ("info", "warning", "error")
        self.events.append((word, fields))

    def send(self, node: str, frame: tuple[Any, ...]) -> None:
        """A frame is on its way."""
        self.nodes[node].inbox.append(wire(frame))

    def close_link(self, node: str, reason: str) -> None:
        """The link is lost."""
        self.closed.append((node, reason))
        self.down(node, reason=reason)

    def add_node(self, node: str) -> None:
        """The process of a node that came."""
        self.actions.append(("add", node))
        self.nodes[node] = Node(self, node)

    def remove_node(self, node: str) -> None:
        """Remembered."""
        self.actions.append(("remove", node))

    def open(self) -> None:
        """Clients ask when a test says so."""

    def store_map(self) -> None:
        """They are stored with `send_map`."""

    def write_batches(self, links: list[Link]) -> None:
        """Batches are on their way."""
        for link in links:
            self.nodes[link.node].inbox += [wire(frame) for frame in self.controller.batch_frames(link)]

    def flush(self) -> None:
        """Batches and frames go to the nodes, changes of the map to the store."""
        self.controller.end_turn(self)
        self.send_map()
        self.check()

    def send_map(self) -> None:
        """The next change of the map is sent; unless the store is held, they are all stored."""
        while True:
            if self.sent is None:
                self.sent = self.changes.to_send(self.now_ms)
            if self.sent is None or self.store.is_held:
                return
            self.settle(self.store.compare_and_set(*self.sent))

    def check_step(self, new: ClusterMap) -> None:
        """I7: of a shard in service one member comes, goes, or is replaced; R4: there are never fewer than M."""
        for shard, old_row, row in zip(self.shards, self.map.members, new.members, strict=True):
            assert len(row) >= new.min_insync, f"R4: shard {shard.number} has {row}"
            if shard.serving:
                gone, come = set(old_row) - set(row), set(row) - set(old_row)
                assert len(gone) <= 1 and len(come) <= 1, f"I7: shard {shard.number} had {old_row}, has {row}"
                assert not (gone and come) or len(row) == len(old_row), "one comes in the place of another"

    def settle(self, outcome: Outcome) -> None:
        """The outcome of the change in flight."""
        if outcome is Outcome.DONE:
            assert self.changes.proposed is not None
            self.check_step(self.changes.proposed)
        self.sent = None
        stored = self.store.read() if outcome is Outcome.CONFLICT and self.changes.is_unsure else None
        self.changes.on_outcome(outcome, stored, now_ms=self.now_ms)
        self.check()
        self.act()

    def release_store(self) -> None:
        """What is in flight, or waits, is stored."""
        self.store.is_held = False
        self.send_map()

    def work(self, *nodes: str) -> bool:
        """These nodes, or all, work off what they have; whether they said anything."""
        said = False
        for node in nodes or list(self.nodes):
            found = self.nodes[node]
            if found.is_paused or node not in self.controller.reports:
                continue
            found.work()
            said = said or bool(found.outbox)
        return said

    def deliver(self, node: str, frames: int = -1) -> None:
        """So many frames of a node arrive, or all."""
        outbox = self.nodes[node].outbox
        while outbox and frames and node in self.controller.reports:
            frames -= 1
            frame = outbox.popleft()
            assert self.controller.receive(node, frame)
            self.check()
            self.act()

    def pump(self, *nodes: str) -> None:
        """Everything that is on its way, to and from these nodes or all, goes where it goes, until nothing moves."""
        names = nodes or tuple(self.nodes)
        for _ in range(1_000):
            self.flush()
            said = self.work(*names)
            for node in names:
                if node in self.nodes and not self.nodes[node].is_paused:
                    self.deliver(node)
            busy = self.changes.is_busy and not self.store.is_held and self.changes.due_ms <= self.now_ms
            linked = [self.nodes[node] for node in names if node in self.controller.reports]
            idle = all(node.is_paused or not node.inbox for node in linked)
            quiet = not any(self.sequencer.links[node].open for node in names if node in self.sequencer.links)
            if not said and not busy and idle and quiet:
                return
        raise AssertionError("it does not come to an end")

    def replace(self, node: str, *shards: int) -> None:
        """A new process of the node without the copies of these shards, or of all; its link was lost."""
        if node in self.controller.reports:
            self.down(node, reason="killed")
        self.nodes[node].wipe(*shards)

    def restart(self, node: str) -> None:
        """A new process of the node that has everything; its link was lost."""
        if node in self.controller.reports:
            self.down(node, reason="killed")
        self.nodes[node].stop()
        self.nodes[node].start()

    def forget_entries(self) -> None:
        """No node has entries to ship any more."""
        for node in self.nodes.values():
            for number in range(self.map.shards):
                node.backlog.forget(number)

    def settled(self, ms: int = 3_000, *, up: str = "") -> None:
        """After so long every shard has its wanted members, which are equal, and takes writes. `up` is linked first."""
        if up:
            self.up(up)
        self.run(ms)
        for shard in self.shards:
            number = shard.number
            assert set(self.row(number)) == set(self.members(number)) == set(self.map.wanted[number])
            assert shard.writable and not shard.learners
            self.assert_equal(number)
        assert not self.words("alarm")

    def assert_equal(self, number: int = 0) -> None:
        """All members of the shard have the same, which is all there is, by the disks that are stored."""
        shard = self.shards[number]
        assert shard.serving and shard.commit == shard.last_seq
        positions = set()
        for node, disk in self.map.members[number]:
            copy = self.nodes[node].replica.copies[number]
            assert copy.disk == disk and copy.complete
            table = self.nodes[node].replica.tables[number]
            table.check()
            positions.add((table.seq, table.chain, table.digest()))
        assert len(positions) == 1 and positions.pop()[0] == shard.last_seq
