"""A node of a simulation: the product's Replica on a disk of the simulation, moved as the node's server moves it.

This is the counterpart of server/node.py and server/durability.py: frames of the newest link in their order, results at
once, acknowledgements when the disk is done, reports and promises in the disk's order, snapshots now and then, copies
that are pulled from another node over a connection of their own and published before anything of them counts.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

from kvtcp.protocol.link import (
    BATCH,
    CHUNK,
    ENTRIES,
    FETCH,
    GIVE,
    HELLO,
    LEARN_FAILED,
    LEARNED,
    LEAVE,
    PULL,
    REFUSED,
    REPORT,
    RESULTS,
    SHIP,
    SHIPPED,
    SPACE,
    STOP,
)
from kvtcp.replication.replica import Refused, Replica
from kvtcp.storage.copy import Copy
from kvtcp.storage.kept import KeptEntries
from kvtcp.storage.table import Table
from tests.simulation_disk import MEMORY, Base, NodeDisk
from tests.simulation_network import TO_CLIENT, TO_SERVER, Connection, Network
from tests.simulation_oracles import Oracles
from tests.simulation_world import SMALL, Process, World

CHUNK_ROWS = 4  # of a transfer in one frame
LEAVE_MS = 150  # for so long a node waits that it is let go
IDLE_MS = 400  # a transfer on which nothing moves for so long is given up


class _End:
    """The node's end of a link."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.accepted = False  # its HELLO was, and the report is sent
        self.inbox: deque[list[Any]] = deque()
        self.running = False  # the batch at the head of the inbox is half done
        self.durable = 0  # ordinal up to which everything is durable
        self.scheduled = False  # it will go on with its inbox later

    def send(self, frame: Any) -> None:
        """To the coordinator."""
        self.connection.send(TO_CLIENT, frame)


class _Pull:
    """A copy on its way from another node."""

    def __init__(self, shard: int, end: _End, connection: Connection) -> None:
        self.shard = shard
        self.end = end  # the link it was asked for on
        self.connection = connection
        self.keys: list[bytes] = []
        self.cells: list[Any] = []
        self.moved_ms = 0


class SimNode(Process):
    """One node. `port` is its address."""

    replica_class = Replica

    def __init__(
        self, world: World, name: str, port: int, mode: str, network: Network, oracles: Oracles, by_port: dict[int, Any]
    ) -> None:
        super().__init__(world, name)
        self.port = port
        self.mode = mode
        self.network = network
        self.oracles = oracles
        self.by_port = by_port
        self.disk = NodeDisk(self, mode, oracles.archive)
        self.snapshot_entries = world.rng.choice((50, 100, 300, 1_000))  # of a shard between two snapshots
        self.replica: Replica | None = None
        self.starts = 0
        self.is_destroyed = False  # it never comes back
        self.ended_ms = 0  # when its process ended last
        self._link: _End | None = None
        self._link_number = 0
        self._pulls: dict[int, _Pull] = {}
        self._snapshots: set[int] = set()  # shards that are being written
        self._catching_up = False  # the next slice of a buffer is due

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """A process that goes on with what is on the disk."""
        self.born()
        self.starts += 1
        manifest = self.disk.manifest
        kept = KeptEntries(SMALL["KEPT_BYTES_MAX"], SMALL["RECENT_BYTES_MAX"])  # its defaults are those of the product
        copies = []
        for shard in sorted(manifest.copies):
            stored = manifest.copies[shard]
            copies.append(stored.copy())
            if stored.complete:
                kept.add(0, stored.kept + stored.entries)
        self.replica = self.replica_class(
            self.name, self.starts, self.disk.new_disk, self.mode, copies, kept, manifest.promised,
            manifest.coordinator, manifest.map_version, 0, dict(manifest.generations),
        )  # fmt: skip
        self._link = None
        self._link_number = 0
        self._pulls = {}
        self._snapshots = set()
        self._catching_up = False
        self.world.note(f"{self.name} starts: {[copy.report() for copy in copies]}")

    def kill(self, power: bool = False, wipe: bool = False, damage: bool = False) -> None:
        """The process ends without a word; with `wipe` its disk is replaced by an empty one, with `damage` one of its
        copies will be found damaged."""
        before = list(self.disk.manifest.copies.values())
        self.ended_ms = self.world.now_ms
        self.died()
        self.network.process_died(self)
        self.disk.crash(power)
        if wipe:
            self.disk.wipe()
        if damage and self.disk.manifest.copies:
            self.disk.damage(self.world.rng.choice(sorted(self.disk.manifest.copies)))
        after = self.disk.manifest.copies
        lost = [stored for stored in before if after.get(stored.shard) is not stored]
        self.oracles.wiped(self.name, lost)
        if not after:
            self.oracles.forgot(self.name)
        self.replica = None

    def leave(self) -> None:
        """It is to stop soon: the coordinator lets it go first, if it can."""
        if self._link is not None and self._link.accepted:
            self._link.send((LEAVE,))
        self.later(LEAVE_MS, self.stop)

    def tell_space(self, level: int) -> None:
        """How short of space the disk is."""
        if self.replica is not None:
            self.replica.space = level
            if self._link is not None and self._link.accepted:
                self._link.send((SPACE, level))

    def stop(self) -> None:
        """The process ends when everything is on the disk."""
        self.disk.job(None, self.kill)

    # --- links ----------------------------------------------------------------------------------------

    def accept(self, connection: Connection) -> None:
        """Somebody connects."""
        end = _End(connection)
        connection.on_frame[TO_SERVER] = partial(self._received, end)
        connection.on_end[TO_SERVER] = partial(self._ended, end)

    def _received(self, end: _End, frame: list[Any]) -> None:
        kind = frame[0]
        if kind == HELLO:
            self._hello(end, frame[1])
        elif kind == GIVE:
            self._give(end.connection, frame[1])
        elif kind == STOP:
            self.stop()
        elif end.accepted:
            end.inbox.append(frame)
            self._work(end)

    def _ended(self, end: _End, reason: str) -> None:
        end.inbox.clear()
        if self._link is end:
            self._link = None
            self._link_lost()

    def _link_lost(self) -> None:
        for pull in list(self._pulls.values()):
            self._end_pull(pull)

    def _hello(self, end: _End, fields: dict[bytes, Any]) -> None:
        replica = self.replica
        assert replica is not None
        epoch, number = fields[b"epoch"], fields[b"link"]
        try:
            if epoch == replica.promised and number <= self._link_number and replica.coordinator:
                raise Refused("LINK", f"link {number} is older than link {self._link_number}")
            report = replica.hello(fields)
        except Refused as refused:
            end.send((REFUSED, refused.code, str(refused), replica.promised, replica.map_version))
            end.connection.close(TO_SERVER)
            return
        self._link_number = number
        older, self._link = self._link, end
        if older is not None:
            older.inbox.clear()
            older.accepted = False
            older.connection.close(TO_SERVER)
        self._link_lost()
        self._log(end)
        promise = (replica.promised, replica.coordinator, replica.map_version)
        copies = [_Named(copy) for copy in replica.copies.values()]
        remember = partial(self._remember, promise, copies, dict(replica.generations))
        self.disk.job(remember, partial(self._report, end, report))

    def _remember(self, promise: tuple[int, str, int], copies: list[Any], generations: dict[int, int]) -> None:
        """Part of a job: promise and new copies are durable."""
        manifest = self.disk.manifest
        manifest.promised, manifest.coordinator, manifest.map_version = promise
        manifest.generations = generations
        self.disk.found(copies)

    def _report(self, end: _End, report: dict[str, Any]) -> None:
        if end is self._link:
            end.accepted = True
            self.oracles.reported(self.name, report["promised"], self.disk.manifest.coordinator)
            end.send((REPORT, report))

    # --- frames ---------------------------------------------------------------------------------------

    def _work(self, end: _End) -> None:
        """What is in the inbox, in its order."""
        replica, rng = self.replica, self.world.rng
        assert replica is not None
        end.scheduled = False
        while end.inbox and end is self._link:
            frame = end.inbox[0]
            if frame[0] != BATCH:
                end.inbox.popleft()
                self._other(end, frame)
                self._settle(end)
                continue
            if not end.running:
                replica.begin(*frame[1:])
                end.running = True
            results: list[Any] = []
            finished = replica.run(results, 10_000 if rng.random() < 0.8 else rng.choice((0, 10)))
            if finished:
                end.running = False
                end.inbox.popleft()
            self._log(end)
            if results or not frame[3] or end.durable == replica.applied:
                end.send((RESULTS, replica.applied, end.durable, results, replica.take_flags()))
            self._settle(end)
            if not finished and rng.random() < 0.3:
                end.scheduled = True
                self.later(1, self._go_on, end)
                return
        self.disk.flush()

    def _go_on(self, end: _End) -> None:
        if end.scheduled:
            self._work(end)

    def _other(self, end: _End, frame: list[Any]) -> None:
        replica = self.replica
        assert replica is not None
        kind, shard, *rest = frame
        if kind == FETCH:
            self._fetch(end, shard, rest[0])
        elif kind == SHIP:
            error = replica.ship(shard, rest[0])
            copy = replica.copies.get(shard)
            position = (0, 0, 0) if copy is None else copy.table.position
            self._log(end)
            self.disk.job(None, partial(self._send_if_linked, end, (SHIPPED, shard, *position, error)))
            self._changed()
        elif kind == PULL:
            self._pull(end, shard, rest[1], rest[2])
        else:
            raise AssertionError(f"a node does not know the frame {frame}")

    def _fetch(self, end: _End, shard: int, after: int) -> None:
        """The answer may need an index of many entries, which is made in slices."""
        if end is not self._link or self.replica is None:
            return
        if not self.replica.kept.index_some():
            self.later(2, self._fetch, end, shard, after)
            return
        end.send((ENTRIES, shard, after, *self.replica.entries_after(shard, after)))

    def _log(self, end: _End) -> None:
        """What was applied is logged."""
        replica = self.replica
        assert replica is not None
        if replica.news:
            for shard in replica.take_dropped():
                self._stop_pull(shard)
                self.disk.job(partial(self.disk.dropped, shard), _nothing)
        entries = replica.take_logged()
        for entry in entries:
            copy = replica.copies.get(entry[0])  # none if it was dropped later in the same batch
            self.oracles.logged(self.name, "" if copy is None else copy.disk, entry, replica.promised)
        if self.disk.append(entries, end, replica.applied):
            end.durable = replica.applied
        if entries and self.mode != MEMORY:
            self._look_at_snapshots(entries[-1][0])

    def _changed(self) -> None:
        """Copies were changed without a batch: log it and tell it; what waits in buffers is applied in slices."""
        end, replica = self._link, self.replica
        if end is None or replica is None:
            return
        more = replica.catch_up(SMALL["LEARN_APPLY_ITEMS"])
        self._log(end)
        self._settle(end)
        if more and not self._catching_up:
            self._catching_up = True
            self.later(2, self._catch_up)

    def _catch_up(self) -> None:
        self._catching_up = False
        self._changed()

    def _settle(self, end: _End) -> None:
        """What else came of the last step."""
        replica = self.replica
        assert replica is not None
        self.disk.flush()
        if not replica.news:
            return
        replica.news = False
        for shard in replica.take_learned():
            copy = replica.copies[shard]
            frame = (LEARNED, shard, copy.disk, copy.generation, *copy.table.position)
            self.disk.job(None, partial(self._send_if_linked, end, frame))
        for shard, reason in replica.take_failed():
            self._stop_pull(shard)
            end.send((LEARN_FAILED, shard, reason))
        self.disk.flush()

    def _send_if_linked(self, end: _End, frame: Any) -> None:
        if end is self._link:
            end.send(frame)

    def on_durable(self, end: _End, ordinal: int) -> None:
        """The disk is done with everything up to this ordinal of a link."""
        if ordinal == end.durable:
            return
        end.durable = ordinal
        if end is self._link and end.accepted:
            assert self.replica is not None
            end.send((RESULTS, self.replica.applied, ordinal, [], self.replica.take_flags()))

    # --- snapshots ------------------------------------------------------------------------------------

    def _look_at_snapshots(self, shard: int) -> None:
        """Is one due?"""
        stored = self.disk.manifest.copies.get(shard)
        replica = self.replica
        assert replica is not None
        table = replica.tables.get(shard)
        if stored is None or table is None or shard in self._snapshots or table.generation != stored.generation:
            return
        if len(stored.entries) >= self.snapshot_entries:
            self._snapshots.add(shard)
            frozen, kept = table.freeze(), replica.kept.of_shard(shard)
            self.later(self.world.rng.randrange(1, 30), self._write_snapshot, stored, frozen, kept)

    def _write_snapshot(self, stored: Any, frozen: Any, kept: Any) -> None:
        base = Base.of(frozen)

        def publish() -> None:
            if self.disk.manifest.copies.get(stored.shard) is stored and stored.base.seq < base.seq <= stored.seq:
                stored.snapshot(base, kept)

        self.disk.job(publish, partial(self._snapshots.discard, stored.shard))

    # --- transfers ------------------------------------------------------------------------------------

    def _give(self, connection: Connection, fields: dict[bytes, Any]) -> None:
        """Another node comes for a copy."""
        replica = self.replica
        assert replica is not None
        donation = replica.donations.pop(fields[b"token"], None)
        if donation is None:
            connection.send(TO_CLIENT, (REFUSED, "TOKEN", "nothing is donated under this token", 0, 0))
            connection.close(TO_SERVER)
            return
        frozen = donation.frozen
        has_history = donation.position[1:] == (frozen.seq, frozen.chain)  # not after an accepted loss
        kept = [entry for entry in replica.kept.of_shard(donation.shard) if entry[2] <= frozen.seq and has_history]
        connection.on_end[TO_SERVER] = lambda reason: donation.close()
        self._give_more(connection, donation, kept)

    def _give_more(self, connection: Connection, donation: Any, kept: Any) -> None:
        frozen = donation.frozen
        if not connection.open[TO_SERVER]:
            donation.close()
        elif frozen.rows_left:
            keys, cells = frozen.next_cells(CHUNK_ROWS)
            connection.send(TO_CLIENT, (CHUNK, keys, cells))
            self.later(1, self._give_more, connection, donation, kept)
        else:
            connection.send(TO_CLIENT, (CHUNK, None, donation.position, kept))

    def _pull(self, end: _End, shard: int, port: int, token: bytes) -> None:
        """Fetch a copy."""
        self._stop_pull(shard)
        donor = self.by_port.get(port)
        if donor is None:
            self._pull_failed(shard)
            return
        connection = self.network.connect(self, donor)
        pull = self._pulls[shard] = _Pull(shard, end, connection)
        connection.on_frame[TO_CLIENT] = partial(self._take_chunk, pull)
        connection.on_end[TO_CLIENT] = lambda reason: self._lost_pull(pull)
        connection.send(TO_SERVER, (GIVE, {"token": token}))
        self._watch(pull)

    def _watch(self, pull: _Pull) -> None:
        """Nothing moves: give it up."""
        if self._pulls.get(pull.shard) is not pull:
            return
        if self.world.now_ms - pull.moved_ms > IDLE_MS and pull.moved_ms:
            self._lost_pull(pull)
            return
        pull.moved_ms = pull.moved_ms or self.world.now_ms
        self.later(IDLE_MS, self._watch, pull)

    def _take_chunk(self, pull: _Pull, frame: list[Any]) -> None:
        if self._pulls.get(pull.shard) is not pull:
            return
        pull.moved_ms = self.world.now_ms
        if frame[0] == REFUSED:
            self._lost_pull(pull)
        elif frame[1] is not None:
            pull.keys += frame[1]
            pull.cells += [tuple(cell) for cell in frame[2]]
        else:
            self._loaded(pull, *frame[2], [tuple(entry) for entry in frame[3]])

    def _loaded(self, pull: _Pull, epoch: int, seq: int, chain: int, kept: list[Any]) -> None:
        """All of it is here: its file is stored, and only then it is the copy of this node."""
        replica, shard = self.replica, pull.shard
        assert replica is not None
        pull.connection.close(TO_CLIENT)
        base = Base(epoch, seq, chain, pull.keys, pull.cells)
        table = Table(shard)
        table.load(base.pieces(), epoch, seq, chain)
        self.oracles.sample(shard, table)
        copy = replica.loaded(shard, table, kept)
        if copy is None:
            self._pulls.pop(shard, None)
            self._changed()
            return
        mine = [(shard, copy.generation, *entry[2:]) for entry in kept]
        wait_ms = self.world.rng.randrange(1, self.disk.sync_ms + 1) if self.mode != MEMORY else 0
        self.later(wait_ms, self._stored, pull, _Named(copy), base, mine)

    def _stored(self, pull: _Pull, copy: _Named, base: Base, kept: list[Any]) -> None:
        """The file is durable. The manifest names it before anything is logged of the new copy."""
        replica, shard = self.replica, pull.shard
        assert replica is not None
        if self._pulls.get(shard) is not pull:
            return
        del self._pulls[shard]
        if replica.published(shard):
            self._publish(copy, base, self.oracles.history(shard, base.epoch, base.seq, base.chain), kept)
        self._changed()

    def _publish(self, copy: _Named, base: Base, history: tuple[int, list[int]], kept: list[Any]) -> None:
        def publish() -> None:
            self.disk.publish(copy, base, history, kept)
            self.disk.manifest.generations[copy.shard] = copy.generation

        self.disk.job(publish, _nothing)

    def _lost_pull(self, pull: _Pull) -> None:
        if self._pulls.get(pull.shard) is pull:
            self._end_pull(pull)
            self._pull_failed(pull.shard)
            self._changed()

    def _pull_failed(self, shard: int) -> None:
        assert self.replica is not None
        self.replica.learn_failed(shard, "the transfer failed")

    def _stop_pull(self, shard: int) -> None:
        pull = self._pulls.get(shard)
        if pull is not None:
            self._end_pull(pull)

    def _end_pull(self, pull: _Pull) -> None:
        del self._pulls[pull.shard]
        pull.connection.close(TO_CLIENT)


class _Named:
    """A copy as it is named in a manifest now; the copy itself goes on."""

    def __init__(self, copy: Copy) -> None:
        self.shard = copy.shard
        self.disk = copy.disk
        self.generation = copy.generation
        self.table = copy.table


def _nothing() -> None:
    """Nobody waits for it."""
