"""A coordinator of a simulation: the product's Controller, moved as the coordinator's server moves it.

This is the counterpart of coordinator/server.py and coordinator/links.py: it reads the store and takes the map over
with a new epoch, dials the nodes, brings their frames to the core, and does what the core asks for. What happens in one
millisecond is one tick: it is flushed once. A coordinator that hears that it does not own the map any more, from the
store or from a node, says nothing more to anybody and ends (R13).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.store import Outcome, Stored
from kvtcp.protocol.link import (
    BATCH,
    ENTRIES,
    HELLO,
    LEARN_FAILED,
    LEARNED,
    LEAVE,
    LINK_VERSION,
    REFUSED,
    REPORT,
    RESULTS,
    SHIPPED,
    SPACE,
    parse_report,
)
from kvtcp.replication.controller import Controller
from kvtcp.replication.sequencing.confirm import ConfirmingSequencer
from kvtcp.replication.sequencing.sequencer import Sequencer
from tests.simulation.network import TO_CLIENT, TO_SERVER, Connection, Network
from tests.simulation.store import SimStore
from tests.simulation.world import SMALL, Process, Violation, World, require

if TYPE_CHECKING:
    from tests.simulation.clients import Clients, Request
    from tests.simulation.node import SimNode
    from tests.simulation.oracles import Member, Oracles

TICK_MS = SMALL["TICK_MS"]
HEARTBEAT_MS = SMALL["HEARTBEAT_MS"]
SILENCE_MS = SMALL["LINK_SILENCE_MS"]
AHEAD_MS = SMALL["STAMP_AHEAD_MS"]
MOVE_MS = SMALL["STAMP_MOVE_MS"]
LEAVE_MS = 60  # for so long one that is stopped waits for the store
READ_AGAIN_MS = 20  # after the store did not answer
BACKOFF_MS = (6, 60)
FRAMES = (ENTRIES, SHIPPED, LEARNED, LEARN_FAILED, LEAVE)


class SimLink:
    """The link to one node: dials, and dials again."""

    def __init__(self, coordinator: SimCoordinator, node: str) -> None:
        self.coordinator = coordinator
        self.node = node
        self.connection: Connection | None = None
        self.live = False  # the report was accepted: batches flow
        self.backoff_ms = BACKOFF_MS[0]
        self.heard_ms = 0
        self.attempts = 0

    def dial(self) -> None:
        """Connect, and say HELLO."""
        owner = self.coordinator
        controller = owner.controller
        if owner.silent or controller is None or self.connection is not None or self.node not in controller.map.nodes:
            return
        server = owner.by_port.get(controller.map.nodes[self.node][1])
        if server is None:  # it was added, and is not started yet
            owner.later(BACKOFF_MS[1], self.dial)
            return
        connection = self.connection = owner.network.connect(owner, server)
        connection.on_frame[TO_CLIENT] = partial(self._received, connection)
        connection.on_end[TO_CLIENT] = partial(self._ended, connection)
        fields = controller.hello_fields(self.node)
        fields |= {"version": LINK_VERSION, "secret": "s", "durability": owner.mode}
        connection.send(TO_SERVER, (HELLO, fields))
        self.heard_ms = owner.world.now_ms
        owner.later(SILENCE_MS, self._watch, connection)

    def _watch(self, connection: Connection) -> None:
        """Nothing came for long: the other side, or the way to it, is gone."""
        if connection is not self.connection:
            return
        silent_ms = self.coordinator.world.now_ms - self.heard_ms
        if silent_ms >= SILENCE_MS:
            self.close(f"nothing came for {silent_ms} ms")
        else:
            self.coordinator.later(SILENCE_MS - silent_ms, self._watch, connection)

    def close(self, reason: str) -> None:
        """Give the connection up, and dial again soon."""
        connection, self.connection = self.connection, None
        owner = self.coordinator
        if connection is None:
            return
        connection.close(TO_CLIENT)
        self.live = False
        controller = owner.controller
        assert controller is not None
        owner.step(controller.node_down, self.node, reason)
        owner.later(owner.world.rng.randrange(self.backoff_ms // 2, self.backoff_ms + 1), self.dial)
        self.backoff_ms = min(2 * self.backoff_ms, BACKOFF_MS[1])

    def _ended(self, connection: Connection, reason: str) -> None:
        if connection is self.connection:
            self.close(reason)

    def _received(self, connection: Connection, frame: list[Any]) -> None:
        owner = self.coordinator
        controller = owner.controller
        if connection is not self.connection or owner.silent or controller is None:
            return
        self.heard_ms = owner.world.now_ms
        kind = frame[0]
        if kind == REFUSED:
            _, code, text, promised, _ = frame
            if code == b"FENCED":
                owner.epoch_seen = max(owner.epoch_seen, promised)
                owner.depose(f"{self.node} says {text!r}")
            else:
                self.close(f"refused: {text!r}")
        elif kind == REPORT:
            self.live = True
            self.backoff_ms = BACKOFF_MS[0]
            owner.step(controller.node_up, self.node, parse_report(frame[1]))
        elif self.node in controller.map.destroyed:
            self.close("it was declared destroyed")  # the core has forgotten the link
        elif self.live and kind == RESULTS:
            controller.sequencer.heard(self.node)
            owner.step(controller.on_results, self.node, *frame[1:])
        elif self.live and kind == SPACE:
            owner.step(controller.sequencer.on_space, self.node, frame[1])
        elif self.live and kind in FRAMES:
            controller.sequencer.heard(self.node)
            owner.step(controller.on_frame, self.node, frame)
        else:
            raise Violation(f"{self.node} sent {frame} to {owner.name}")

    def write(self) -> None:
        """Write what is outgoing, as far as the kernel takes it."""
        connection, owner = self.connection, self.coordinator
        if connection is None or not self.live or owner.controller is None or connection.path.untaken:
            return
        sequencer = owner.controller.sequencer
        link = sequencer.links[self.node]
        if not link.outgoing:
            return
        committed = sequencer.committed_ordinal(link)
        require(-1 <= committed <= link.last_ordinal, f"{owner.name} tells {self.node} of ordinal {committed}")
        while (batch := link.next_outgoing(owner.world.now_ms)) is not None:
            connection.send(TO_SERVER, (BATCH, batch.stamp_ms, committed, batch.items))
            if owner.world.rng.random() < 0.05:
                owner.later(owner.world.rng.randrange(1, 12), self.write)  # the kernel's buffer is full for a moment
                break

    def heartbeat(self) -> None:
        """An empty batch: an answer is due, whatever happens."""
        connection, owner = self.connection, self.coordinator
        if connection is not None and self.live and owner.controller is not None and not connection.path.untaken:
            sequencer = owner.controller.sequencer
            committed = sequencer.committed_ordinal(sequencer.links[self.node])
            connection.send(TO_SERVER, (BATCH, sequencer.stamp_ms, committed, []))


class SimCoordinator(Process):
    """One coordinator. `by_port` are the nodes by their addresses."""

    controller_class = Controller
    sequencer_class: type[Sequencer] = Sequencer
    confirming_class: type[Sequencer] = ConfirmingSequencer
    changes_class = MapChanges

    def __init__(
        self, world: World, name: str, mode: str, network: Network, store: SimStore, oracles: Oracles,
        by_port: dict[int, SimNode],
    ) -> None:  # fmt: skip
        super().__init__(world, name)
        self.mode = mode
        self.network = network
        self.store = store
        self.oracles = oracles
        self.by_port = by_port
        self.clients: Clients | None = None
        self.controller: Controller | None = None
        self.changes: MapChanges | None = None
        self.links: dict[str, SimLink] = {}
        self.silent = True  # it answers nobody
        self.clock_ms = 1_000_000 + world.rng.randrange(1_000)  # what its clock is ahead of the world's time
        self.epoch_seen = 0
        self.takeovers = 0
        self.starts = 0
        self.owner = ""
        self._commits: list[int] = []  # of the shards at the last look; -1 = not served then
        self._flushing = False
        self._leaving = False  # it is being stopped: time stands still
        self._asking = False  # the store has a request of this process
        self.dies_writing = 0.0  # share of its writes in which it is killed
        self.killed_writing = 0
        self._tokens = 0
        self._checks = 0

    # --- life -----------------------------------------------------------------------------------------

    @property
    def takes_requests(self) -> bool:
        """Whether clients can talk to it."""
        return self.alive and not self.silent and not self._leaving

    @property
    def is_ready(self) -> bool:
        """Whether every shard was judged once."""
        return self.takes_requests and self.controller is not None and self.controller.is_ready

    def wall_ms(self) -> int:
        """Its clock."""
        return self.world.now_ms + self.clock_ms

    def start(self) -> None:
        """A new process: it takes the map over."""
        self.born()
        self.starts += 1
        self.owner = f"{self.name}/{self.starts}"
        self.controller = self.changes = None
        self.links = {}
        self.silent = True
        self._commits = [-1] * self.oracles.map.shards
        self._flushing = self._asking = self._leaving = False
        self.world.note(f"{self.name} starts")
        self.store.read(self, self._found)

    def kill(self) -> None:
        """The process ends without a word."""
        self.silent = True
        self.died()
        self.network.process_died(self)
        self.controller = self.changes = None
        assert self.clients is not None
        self.clients.lost(self)

    def leave(self) -> None:
        """It is stopped in order: no stamp is given any more, and the next one may begin where this one was."""
        controller, changes = self.controller, self.changes
        if controller is None or changes is None:
            return
        stamp_ms = controller.sequencer.end_time()
        self._leaving = True
        changes.propose(lambda old: old.with_last_stamp(stamp_ms), lambda _: self.later(1, self.kill))
        self.later(LEAVE_MS, self.kill)
        self._schedule_flush()

    def depose(self, reason: str) -> None:
        """R13: it does not own the map any more."""
        self.world.note(f"{self.name} is deposed: {reason}")
        self.kill()

    def _found(self, stored: Stored | None) -> None:
        """The map as it was read: own it."""
        if stored is None:
            self.later(READ_AGAIN_MS, self.store.read, self, self._found)
            return
        changes = self.changes = self.changes_class.of(stored)
        before = changes.map
        epoch = max(before.epoch, self.epoch_seen) + 1
        bound_ms = self.wall_ms() + AHEAD_MS
        changes.propose(
            lambda old: old.taken_over(owner=self.owner, epoch=epoch, nodes={}, stamp_bound_ms=bound_ms),
            lambda _: self._owned(before),
        )
        self._send_changes()

    def _owned(self, before: Any) -> None:
        """The map is this coordinator's."""
        changes = self.changes
        assert changes is not None
        self.takeovers += 1
        controller = self.controller = self.make_controller(changes, before)
        self.silent = False
        self.world.note(f"{self.name} owns epoch {changes.map.epoch}")
        controller.begin(self.wall_ms(), self.world.now_ms)
        self._look_at_nodes()
        self.later(TICK_MS, self._tick)
        self.later(HEARTBEAT_MS, self._heartbeat)
        self._schedule_flush()

    def make_controller(self, changes: MapChanges, before: Any) -> Controller:
        """The core."""
        return self.controller_class(
            changes,
            durability=self.mode, map_version_before=before.version,
            stamp_before_ms=before.stamp_bound_ms,
            sequencer=self.confirming_class if self.store.shared else self.sequencer_class,
            new_token=self._new_token,
        )

    def _new_token(self) -> bytes:
        self._tokens += 1
        return b"%s-%d" % (self.owner.encode(), self._tokens)

    # --- steps ----------------------------------------------------------------------------------------

    def step(self, call: Any, *args: Any) -> None:
        """One step of the core, and at the end of the millisecond everything that comes of it."""
        controller = self.controller
        if controller is None or self.silent:
            return
        controller.begin(self.wall_ms(), self.world.now_ms)
        call(*args)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.later(0, self._flush)

    def _flush(self) -> None:
        self._flushing = False
        controller = self.controller
        if controller is None or self.silent:
            return
        self.look()
        ready = controller.sequencer.close_batches()
        if ready and self.dies_writing and self.world.rng.random() < self.dies_writing:
            self._die_writing([link.node for link in ready])
            return
        for link in ready:
            self.links[link.node].write()
        for kind, node, *what in controller.take_actions():
            link = self.links.get(node)
            if kind == "send" and link is not None and link.connection is not None and link.live:
                link.connection.send(TO_SERVER, what[0])
            elif kind == "close" and link is not None:
                link.close(what[0])
            else:
                assert kind in ("send", "close", "add", "remove"), kind
        for level, word, fields in controller.take_events():
            self.world.note(f"{self.name} {level} {word} {fields}", fields.get("shard", fields.get("first")))
            require(word != "alarm", f"{self.name}: alarm: {fields}", fields.get("shard"))
        self._send_changes()

    def _die_writing(self, nodes: list[str]) -> None:
        """The process is killed when some links were written to, and others not."""
        for node in self.world.rng.sample(nodes, self.world.rng.randint(0, len(nodes))):
            self.links[node].write()
        self.world.note(f"fault: {self.name} is killed while it writes")
        self.killed_writing += 1
        self.kill()

    def look(self) -> None:
        """The oracles after a step."""
        controller = self.controller
        assert controller is not None
        commits = self._commits
        for number, shard in enumerate(controller.sequencer.shards):
            commit = shard.commit if shard.serving else -1
            before = commits[number]
            if commit == before:
                continue
            commits[number] = commit
            if commit < 0:
                continue
            require(commit > before, f"I11: commit {before} of {self.name} becomes {commit}", number)
            if before < 0 and controller.map.epoch == self.oracles.map.epoch:
                self.oracles.takes_over(self.name, number, commit)
            if commit:
                self.oracles.committed(self.name, number, commit, self.members(number))

    def check(self) -> None:
        """The core's own invariants."""
        if self.controller is not None and not self.silent:
            self.controller.check()
            self._checks += 1
            if self._checks % 8 == 0:  # it reads the map back from its text
                self.controller.changes.check()

    def serves(self, shard: int, epoch: int) -> bool:
        """Whether it serves this shard, as the owner of this epoch."""
        controller = self.controller
        if controller is None or self.silent or controller.map.epoch != epoch:
            return False
        return bool(controller.sequencer.shards[shard].serving)

    def members(self, shard: int) -> list[Member]:
        """E of a shard: its members in the map, and in the change of the map that may be stored already."""
        changes = self.changes
        assert changes is not None
        members = list(changes.map.members[shard])
        if changes.proposed is not None:
            members += [member for member in changes.proposed.members[shard] if member not in members]
        return members

    def _tick(self) -> None:
        controller = self.controller
        if controller is None or self.silent:
            return
        self._move_bound()
        self._look_at_nodes()
        self.step(controller.tick)
        self.later(TICK_MS, self._tick)

    def _heartbeat(self) -> None:
        for link in list(self.links.values()):
            link.heartbeat()
        self.later(HEARTBEAT_MS, self._heartbeat)

    def _move_bound(self) -> None:
        """R12: the bound of stamps goes ahead of the clock."""
        changes = self.changes
        assert changes is not None
        if self._leaving:
            return
        if self.wall_ms() + MOVE_MS > changes.map.stamp_bound_ms and not changes.is_busy:
            bound_ms = self.wall_ms() + AHEAD_MS
            changes.propose(lambda old: old.with_stamp_bound(bound_ms), lambda _: None)

    def _look_at_nodes(self) -> None:
        """A link for every node of the map, and for no other one."""
        controller = self.controller
        assert controller is not None
        nodes = controller.map.nodes
        for node in nodes:
            if node not in self.links:
                self.links[node] = SimLink(self, node)
                self.links[node].dial()
        for node in [node for node in self.links if node not in nodes]:
            self.links.pop(node).close("it is no node of the map")

    # --- the store ------------------------------------------------------------------------------------

    def _send_changes(self) -> None:
        """The next change of the map, if one is to be sent."""
        changes = self.changes
        if changes is None or self._asking:
            return
        sending = changes.to_send(self.world.now_ms)
        if sending is not None:
            self._asking = True
            expected, value = sending
            if self.controller is not None and changes.proposed is not None and not changes.is_unsure:
                self._check_removals(changes.map.members, changes.proposed.members)
            self.store.compare_and_set(self, expected, value, self._outcome)
        elif changes.is_busy and changes.due_ms > self.world.now_ms:
            self.later(changes.due_ms - self.world.now_ms, self._send_changes)

    def _check_removals(self, before: Any, after: Any) -> None:
        """R6: no change removes a member with its data and leaves only members that are known to be bad."""
        for shard, (old, new) in enumerate(zip(before, after, strict=True)):
            kept = [member for member in new if member in old]
            gone = [disk for node, disk in old if (node, disk) not in new and disk and self.oracles.has_data(disk)]
            if gone and new == tuple(kept) and all(self._knows_bad(shard, node, disk) for node, disk in kept):
                require(False, f"R6: {self.name} removes {gone} and leaves {kept}, which it knows to be bad", shard)

    def _knows_bad(self, shard: int, node: str, disk: str) -> bool:
        controller = self.controller
        assert controller is not None
        report = controller.reports.get(node)
        if report is None:
            return False
        copy = report.copies.get(shard)
        return copy is None or copy.disk != disk

    def check_bounds(self) -> None:
        """I12: what waits has its bound."""
        if self.controller is None or self.silent:
            return
        for shard in self.controller.sequencer.shards:
            waiting = len(shard.waiting)
            require(waiting <= SMALL["WAITING_ITEMS_MAX"], f"I12: {waiting} requests wait", shard.number)
        for link in self.controller.sequencer.links.values():
            most = 3 * SMALL["WINDOW_ITEMS_MAX"]  # what was kept is sent again, behind that the queue that waited
            require(link.items <= most, f"I12: {link.items} items are queued to {link.node}")

    def _outcome(self, outcome: Outcome | OSError, stored: Stored | None) -> None:
        """What the store said."""
        changes = self.changes
        assert changes is not None
        self._asking = False
        self.world.note(f"{self.name} hears {outcome} of its change of the map")
        if self.controller is not None:
            self.controller.begin(self.wall_ms(), self.world.now_ms)
        if isinstance(outcome, OSError):
            changes.on_failed(outcome, now_ms=self.world.now_ms)
        else:
            changes.on_outcome(outcome, stored if outcome is Outcome.CONFLICT else None, now_ms=self.world.now_ms)
        if changes.lost:
            self.depose(changes.lost)
            return
        if self.controller is None:
            self._send_changes()
        else:
            self._look_at_nodes()
            self._schedule_flush()

    # --- clients --------------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """A request arrives."""
        controller = self.controller
        assert self.clients is not None
        if controller is None or not self.takes_requests:
            return
        controller.begin(self.wall_ms(), self.world.now_ms)
        self.clients.issue(request, controller.sequencer)
        self._schedule_flush()
