"""A coordinator of a simulation: the product's Controller, and a process in the simulation that performs what it says.

This is the counterpart of coordinator/server.py and coordinator/links.py, and decides as little as they do: it reads
the store and takes the map over with a new epoch, dials the nodes, brings their frames to the core, and does what the
core asks for. What happens in one millisecond is one turn. A process that was deposed lives on for a moment (R13).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.store import Outcome, Stored
from kvtcp.protocol.link import REFUSED, REPORT, STOP, parse_report
from kvtcp.replication.controller import Controller
from kvtcp.replication.ownership import next_epoch
from kvtcp.replication.sequencing.confirm import ConfirmingSequencer
from kvtcp.replication.sequencing.link import Link, LinkError
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
LEAVE_MS = 60  # for so long one that is stopped waits for the store
READ_AGAIN_MS = 20  # after the store did not answer
BACKOFF_MS = (6, 60)


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
        self.is_closing = False  # the node belongs to the cluster no more

    def dial(self) -> None:
        """Connect, and say HELLO."""
        owner = self.coordinator
        controller = owner.controller
        if self.is_closing or controller is None or self.connection is not None:
            return
        if self.node not in controller.map.nodes:
            return  # the core is about to have this link removed
        server = owner.by_port.get(controller.map.nodes[self.node][1])
        if server is None:  # it was added, and is not started yet
            owner.later(BACKOFF_MS[1], self.dial)
            return
        connection = self.connection = owner.network.connect(owner, server)
        connection.on_frame[TO_CLIENT] = partial(self._received, connection)
        connection.on_end[TO_CLIENT] = partial(self._ended, connection)
        connection.send(TO_SERVER, controller.hello(self.node, "s"))
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
        if connection is not self.connection or controller is None:
            return
        self.heard_ms = owner.world.now_ms
        kind = frame[0]
        if kind == REFUSED:
            _, code, text, _, _ = frame
            owner.step(controller.refused, self.node, code, text.decode())
            self.close(f"refused: {text!r}")
        elif kind == REPORT:
            report = parse_report(frame[1])
            require(not controller.mismatch(report), f"{self.node} is of another mode than {owner.name}")
            self.live = True
            self.backoff_ms = BACKOFF_MS[0]
            owner.step(controller.node_up, self.node, report)
        elif self.live:
            controller.sequencer.heard(self.node)
            owner.step(self._receive, frame)
        else:
            raise Violation(f"{self.node} sent {frame} to {owner.name}")

    def _receive(self, frame: list[Any]) -> None:
        controller = self.coordinator.controller
        assert controller is not None
        try:
            if not controller.receive(self.node, frame):
                raise Violation(f"{self.node} sent {frame} to {self.coordinator.name}")
        except LinkError as error:
            if self.node not in controller.map.destroyed:  # else the core has forgotten the link
                raise
            self.close(str(error))

    def send(self, frame: tuple[Any, ...]) -> None:
        """To the node, if it is linked."""
        if self.connection is not None and self.live:
            self.connection.send(TO_SERVER, frame)

    def end(self) -> None:
        """The node left the cluster: it is stopped, and dialled no more."""
        self.is_closing = True
        connection, self.connection = self.connection, None
        if connection is not None:
            if self.live:
                connection.send(TO_SERVER, (STOP,))
            connection.close(TO_CLIENT)

    def write(self) -> None:
        """Write what is outgoing, as far as the kernel takes it."""
        connection, owner = self.connection, self.coordinator
        if connection is None or not self.live or owner.controller is None or connection.path.untaken:
            return
        controller = owner.controller
        link = controller.sequencer.links[self.node]
        if not link.outgoing:
            return
        for frame in controller.batch_frames(link):
            require(-1 <= frame[2] <= link.last_ordinal, f"{owner.name} tells {self.node} of ordinal {frame[2]}")
            connection.send(TO_SERVER, frame)
            if owner.world.rng.random() < 0.05:
                owner.later(owner.world.rng.randrange(1, 12), self.write)  # the kernel's buffer is full for a moment
                break

    def heartbeat(self) -> None:
        """An empty batch: an answer is due, whatever happens."""
        connection, owner = self.connection, self.coordinator
        if connection is not None and self.live and owner.controller is not None and not connection.path.untaken:
            controller = owner.controller
            connection.send(TO_SERVER, controller.heartbeat(controller.sequencer.links[self.node]))


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
        self.takeovers = 0
        self.starts = 0
        self.owner = ""
        self._commits: list[int] = []  # of the shards at the last look; -1 = not served then
        self._flushing = False
        self._leaving = False  # it is being stopped: time stands still
        self._asking = False  # the store has a request of this process
        self._has_written = False  # the batches of this turn are sent
        self._changing: tuple[int, set[int]] = (0, set())  # version of the map, and rows in change, when it began
        self.dies_writing = 0.0  # share of its writes in which it is killed
        self.killed_writing = 0
        self._tokens = 0
        self._checks = 0

    # --- life -----------------------------------------------------------------------------------------

    @property
    def takes_requests(self) -> bool:
        """Whether it owns the map, as far as it knows, and is not being stopped."""
        return self.alive and not self.silent and not self._leaving

    @property
    def is_ready(self) -> bool:
        """Whether clients are let in."""
        return self.takes_requests and self.controller is not None and self.controller.ownership.is_open

    def wall_ms(self) -> int:
        """Its clock."""
        return self.world.now_ms + self.clock_ms

    def start(self) -> None:
        """A new process: it takes the map over."""
        self.born()
        self.starts += 1
        self.owner = f"{self.name}/{self.starts}"
        self.controller = self.changes = None
        self._changing = (0, set())
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
        if self.controller is None:
            return
        self._leaving = True
        self.controller.ownership.end(lambda _: self.later(1, self.kill), lambda _: None)
        self.later(LEAVE_MS, self.kill)
        self._schedule_flush()

    def _deposed(self, reason: str) -> None:
        """R13: its clients are cut off at once, the process takes a moment to end."""
        self.world.note(f"{self.name} is deposed: {reason}")
        self.silent = True
        assert self.clients is not None
        self.clients.lost(self)
        self.later(self.world.rng.randrange(4), self.kill)

    def _found(self, stored: Stored | None) -> None:
        """The map as it was read: own it."""
        if stored is None:
            self.later(READ_AGAIN_MS, self.store.read, self, self._found)
            return
        changes = self.changes = self.changes_class.of(stored)
        before = changes.map
        first = replace(before, owner=self.owner, stamp_bound_ms=self.wall_ms() + AHEAD_MS)
        changes.propose(lambda old: next_epoch(old, first), lambda _: self._owned(before))
        self._send_changes()

    def _owned(self, before: Any) -> None:
        """The map is this coordinator's."""
        changes = self.changes
        assert changes is not None
        self.takeovers += 1
        controller = self.controller = self.make_controller(changes, before)
        controller.ownership.on_deposed = self._deposed
        self.silent = False
        self.world.note(f"{self.name} owns epoch {changes.map.epoch}")
        controller.begin(self.wall_ms(), self.world.now_ms)
        for node in controller.map.nodes:
            self.add_node(node)
        self.later(TICK_MS, self._tick)
        self.later(HEARTBEAT_MS, self._heartbeat)
        self._schedule_flush()

    def make_controller(self, changes: MapChanges, before: Any) -> Controller:
        """The core."""
        return self.controller_class(
            changes, durability=self.mode, map_version_before=before.version, stamp_before_ms=before.stamp_bound_ms,
            sequencer=self.confirming_class if self.store.shared else self.sequencer_class, new_token=self._new_token,
        )  # fmt: skip

    def _new_token(self) -> bytes:
        self._tokens += 1
        return b"%s-%d" % (self.owner.encode(), self._tokens)

    # --- steps ----------------------------------------------------------------------------------------

    def step(self, call: Any, *args: Any) -> None:
        """One step of the core, and at the end of the millisecond everything that comes of it."""
        if self.controller is None:
            return
        self.controller.begin(self.wall_ms(), self.world.now_ms)
        call(*args)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.later(0, self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self.controller is not None:
            if not self.silent:
                self.look()
            self._has_written = False
            self.controller.end_turn(self)
        if self.controller is not None:  # else it was killed while it wrote
            self._changing = (self.controller.map.version, set(self.controller.membership.changing))

    def event(self, level: str, word: str, **fields: Any) -> None:
        """See CoordinatorProcess, also below."""
        self.world.note(f"{self.name} {level} {word} {fields}", fields.get("shard", fields.get("first")))
        require(word != "alarm", f"{self.name}: alarm: {fields}", fields.get("shard"))

    def send(self, node: str, frame: tuple[Any, ...]) -> None:
        """To a node, if it is linked."""
        self._check_let_out(f"{frame} to {node}")
        require(not self._has_written, f"{self.name}: {frame} to {node} comes behind the batches of its turn")
        if frame == (STOP,):
            self._check_left(node)
        self.links[node].send(frame)

    def close_link(self, node: str, reason: str) -> None:
        """It is dialled again."""
        self.links[node].close(reason)

    def add_node(self, node: str) -> None:
        """A node of the map."""
        self.links[node] = SimLink(self, node)
        self.links[node].dial()

    def remove_node(self, node: str) -> None:
        """It is none any more."""
        self.links.pop(node).end()

    def open(self) -> None:
        """Clients find it by `is_ready`."""
        self.world.note(f"{self.name} lets clients in")

    def store_map(self) -> None:
        """The next change of the map, if the store has no request."""
        self._send_changes()

    def write_batches(self, links: list[Link]) -> None:
        """Batches of these links."""
        self._check_let_out("batches")
        if links and self.dies_writing and self.world.rng.random() < self.dies_writing:
            self._die_writing([link.node for link in links])
            return
        self._has_written = True
        for link in links:
            self.links[link.node].write()

    def _check_left(self, node: str) -> None:
        """A node that asked to leave is stopped when the map is stored in which it has left, not before: none of its
        shards has been changing since the turn began."""
        controller = self.controller
        assert controller is not None
        version, changing = self._changing
        if controller.map.version == version:
            for number in changing & controller.membership.changing:
                row = controller.map.nodes_of(number)
                require(node not in row, f"R14: {self.name} stops {node} while the row {row} is being changed", number)

    def _check_let_out(self, what: str) -> None:
        require(not self.silent, f"R13: {self.name} was deposed, and sends {what}")

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
        if self.controller is not None:
            self.step(self.controller.tick)
            self.later(TICK_MS, self._tick)

    def _heartbeat(self) -> None:
        for link in list(self.links.values()):
            link.heartbeat()
        self.later(HEARTBEAT_MS, self._heartbeat)

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
        return copy is None or copy.replica_id != disk

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
        if self.controller is not None:
            self._schedule_flush()
        elif changes.lost_reason:  # before it owned the map
            self.world.note(f"{self.name} does not take over: {changes.lost_reason}")
            self.kill()
        else:
            self._send_changes()

    # --- clients --------------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """A request arrives."""
        controller = self.controller
        assert self.clients is not None
        if controller is None or not self.is_ready:
            return
        controller.begin(self.wall_ms(), self.world.now_ms)
        self.clients.issue(request, controller.sequencer)
        self._schedule_flush()
