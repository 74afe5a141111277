"""A node of a simulation: the product's core of a node, moved as the node's server moves it.

This is the counterpart of node/server.py and node/connection.py, and decides nothing: frames go to the NodeCore, and
what that wants is performed on a disk of the simulation (disk.py), on connections that sometimes take
nothing for a while, and by transfers of copies over connections of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from kvtcp.node.access import Identity
from kvtcp.node.core import CoordinatorLink, NodeCore
from kvtcp.node.learning import Donation, Learning
from kvtcp.node.replica import Replicas
from kvtcp.protocol.link import ASK, CHUNK, GIVE, HELLO, LEARNED, LINK_VERSION, REFUSED, REPORT, RESULTS
from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.table import Logged, Table
from tests.simulation.disk import MEMORY, Base, NodeDisk
from tests.simulation.network import TO_CLIENT, TO_SERVER, Connection, Network
from tests.simulation.oracles import Oracles
from tests.simulation.world import SMALL, Process, World, require

CHUNK_ROWS = 4  # of a transfer in one frame
IDLE_MS = 400  # a transfer on which nothing moves for so long is given up
DIRECTORY = b"12345678"  # id of every data directory


class _End:
    """The node's end of a connection, as its core sees it."""

    def __init__(self, node: SimNode, connection: Connection) -> None:
        self.peer = connection.name
        self.write_paused = False
        self.connection = connection
        self.link = CoordinatorLink(self)
        self._node = node

    def send(self, frame: Any) -> None:
        """To the caller, whose kernel takes nothing more for a while now and then."""
        self._node.look_at(frame)
        self.connection.send(TO_CLIENT, frame)
        rng = self._node.world.rng
        if frame[0] == RESULTS and self.link.inbox and rng.random() < 0.1:
            self.write_paused = True
            self._node.later(rng.randrange(1, 4), self._resume)

    def _resume(self) -> None:
        self.write_paused = False
        if self.connection.open[TO_SERVER] and self._node.core is not None:
            self._node.core.run(self.link)

    def flush(self) -> None:
        """Everything is sent at once."""

    def close(self) -> None:
        """Nothing more is received."""
        self.connection.close(TO_SERVER)

    def abort(self) -> None:
        """Nothing more is received."""
        self.connection.close(TO_SERVER)


class _Pull:
    """A copy on its way from another node."""

    def __init__(self, learning: Learning, connection: Connection) -> None:
        self.learning = learning
        self.shard = learning.shard
        self.connection = connection
        self.keys: list[bytes] = []
        self.cells: list[Any] = []
        self.moved_ms = 0


class SimNode(Process):
    """One node, and the `NodeProcess` of its core. `port` is its address."""

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
        self.identity = Identity()
        self.snapshot_entries = world.rng.choice((50, 100, 300, 1_000))  # of a shard between two snapshots
        self.replica: Replicas | None = None
        self.core: NodeCore | None = None
        self.starts = 0
        self.is_destroyed = False  # it never comes back
        self.ended_ms = 0  # when its process ended last
        self._newest = (0, 0)  # epoch and number of the newest link of this process
        self._pulls: dict[int, _Pull] = {}
        self._given: dict[Connection, Donation] = {}  # on their way to other nodes
        self._snapshots: set[int] = set()  # shards that are being written

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """A process that goes on with what is on the disk."""
        self.born()
        self.starts += 1
        manifest = self.disk.manifest
        kept = Backlog(SMALL["KEPT_BYTES_MAX"], SMALL["RECENT_BYTES_MAX"])  # its defaults are those of the product
        copies = []
        for shard in sorted(manifest.copies):
            stored = manifest.copies[shard]
            copies.append(stored.copy())
            if stored.complete:
                kept.add(0, stored.kept + stored.entries)
        self.replica = Replicas(
            self.name, self.starts, self.disk.new_disk, self.mode, copies, kept, manifest.promised,
            manifest.coordinator, manifest.map_version, generations=dict(manifest.generations),
        )  # fmt: skip
        self.core = NodeCore(self.replica, self, self.identity)
        self.core.persistence = self.disk
        self._newest = (0, 0)
        self._pulls = {}
        self._given = {}
        self._snapshots = set()
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
            self.identity = Identity()
        if damage and self.disk.manifest.copies:
            self.disk.damage(self.world.rng.choice(sorted(self.disk.manifest.copies)))
        after = self.disk.manifest.copies
        lost = [stored for stored in before if after.get(stored.shard) is not stored]
        self.oracles.wiped(self.name, lost)
        if not after:
            self.oracles.forgot(self.name)
        self.replica = self.core = None

    def leave(self) -> None:
        """It is to stop soon: the coordinator lets it go first, if it can."""
        assert self.core is not None
        self.core.leave()

    def tell_space(self, level: int) -> None:
        """How short of space the disk is."""
        if self.core is not None:
            self.core.space_changed(level)

    # --- connections ----------------------------------------------------------------------------------

    def accept(self, connection: Connection) -> None:
        """Somebody connects."""
        end = _End(self, connection)
        connection.on_frame[TO_SERVER] = partial(self._received, end)
        connection.on_end[TO_SERVER] = partial(self._ended, end)

    def _received(self, end: _End, frame: list[Any]) -> None:
        core, rng = self.core, self.world.rng
        assert core is not None
        if end.link.accepted:
            core.results_bytes_max = 10_000 if rng.random() < 0.8 else rng.choice((0, 10))
            core.received(end.link, [frame])
        elif frame[0] == HELLO:
            core.hello(end.link, frame[1])
        elif frame[0] == ASK:
            core.ask(end, frame[1])
        else:
            require(frame[0] == GIVE, f"{self.name} is sent {frame} before its report")
            self._give(end, frame[1])

    def _ended(self, end: _End, reason: str) -> None:
        assert self.core is not None
        donation = self._given.pop(end.connection, None)
        if donation is not None:
            donation.close()
        self.core.closed(end.link, reason)

    def look_at(self, frame: Any) -> None:
        """What the oracles see of what is sent."""
        if frame[0] == REPORT:
            self.oracles.reported(self.name, frame[1]["promised"], self.disk.manifest.coordinator)
        elif frame[0] == LEARNED:
            assert self.replica is not None
            shard, disk = frame[1:3]
            copy = self.replica.copies.get(shard)
            if copy is not None and copy.disk == disk:
                require(not copy.reason, f"{self.name} has learned {disk}, and doubts it: {copy.reason}", shard)

    # --- what the core wants ----------------------------------------------------------------------------

    def event(self, level: str, word: str, **fields: Any) -> None:
        """Nobody reads it; but a link that was accepted is newer than all before."""
        if word == "linked":
            newest = (fields["epoch"], fields["link"])
            require(newest > self._newest, f"R5: {self.name} had link {self._newest}, {newest} takes its place")
            self._newest = newest

    def failed(self, error: BaseException) -> None:
        """There is no error that a node may end by."""
        raise error

    def stop(self) -> None:
        """The process ends when everything is on the disk."""
        self.later(0, self.disk.job, None, self.kill)

    def founded(self, cluster: str, secret: str) -> None:
        """The identity is kept."""

    def linked(self) -> None:
        """There is a coordinator."""

    def unlinked(self) -> None:
        """It waits for the next one."""

    def collect_young(self) -> None:
        """There is nothing to collect."""

    def donations_changed(self) -> None:
        """They wait as long as the link."""

    def start_backup(self, request: Any) -> None:
        """Clients make none."""
        raise AssertionError("there is no backup in a simulation")

    # --- the disk -------------------------------------------------------------------------------------

    def logged(self, entries: list[Logged]) -> None:
        """These entries are about to be written."""
        replica = self.replica
        assert replica is not None
        for entry in entries:
            copy = replica.copies.get(entry[0])  # none if it was dropped later in the same batch
            self.oracles.logged(self.name, "" if copy is None else copy.disk, entry, replica.promised)
        if self.mode != MEMORY:
            self._look_at_snapshots(entries[-1][0])

    def on_durable(self, link: CoordinatorLink, ordinal: int) -> None:
        """The disk is done with everything up to this ordinal of a link."""
        assert self.core is not None
        self.core.durable(link, ordinal)

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
            frozen, kept = table.freeze(), replica.backlog.of_shard(shard)
            self.later(self.world.rng.randrange(1, 30), self._write_snapshot, stored, frozen, kept)

    def _write_snapshot(self, stored: Any, frozen: Any, kept: Any) -> None:
        base = Base.of(frozen)

        def publish() -> None:
            if self.disk.manifest.copies.get(stored.shard) is stored and stored.base.seq < base.seq <= stored.seq:
                stored.snapshot(base, kept)

        self.disk.job(publish, partial(self._snapshots.discard, stored.shard))

    # --- transfers ------------------------------------------------------------------------------------

    def end_transfers(self, reason: str) -> None:
        """Those of the link that was lost."""
        for shard in list(self._pulls):
            self.end_pull(shard, reason)
        for connection, donation in self._given.items():
            donation.close()
            connection.close(TO_SERVER)
        self._given = {}

    def _give(self, end: _End, fields: dict[bytes, Any]) -> None:
        """Another node comes for a copy."""
        assert self.core is not None
        given = self.core.give(end, fields)
        if given is not None:
            self._given[end.connection] = given[0]
            self._give_more(end.connection, *given)

    def _give_more(self, connection: Connection, donation: Donation, kept: list[Logged]) -> None:
        if self._given.get(connection) is not donation:
            return
        if donation.frozen.rows_left:
            keys, cells = donation.frozen.next_cells(CHUNK_ROWS)
            connection.send(TO_CLIENT, (CHUNK, keys, cells))
            self.later(1, self._give_more, connection, donation, kept)
        else:
            connection.send(TO_CLIENT, (CHUNK, None, donation.position, kept))

    def start_pull(self, learning: Learning, host: str, port: int, token: bytes) -> None:
        """Fetch a copy."""
        assert self.core is not None
        donor = self.by_port.get(port)
        if donor is None:
            self.later(1, self.core.pull_failed, learning, "there is no such node")
            return
        connection = self.network.connect(self, donor)
        pull = self._pulls[learning.shard] = _Pull(learning, connection)
        connection.on_frame[TO_CLIENT] = partial(self._take_chunk, pull)
        connection.on_end[TO_CLIENT] = lambda reason: self._lost_pull(pull)
        connection.send(TO_SERVER, (GIVE, {
            "version": LINK_VERSION, "cluster": self.identity.cluster, "secret": self.identity.secret, "token": token,
            "directory": DIRECTORY, "generation": learning.generation,
        }))  # fmt: skip
        self._watch(pull)

    def end_pull(self, shard: int, reason: str) -> None:
        """Nobody wants it."""
        pull = self._pulls.pop(shard, None)
        if pull is not None:
            pull.connection.close(TO_CLIENT)

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
        assert self.core is not None
        if self._pulls.get(pull.shard) is not pull:
            return
        pull.moved_ms = self.world.now_ms
        if not self.core.is_wanted(pull.learning):
            self.end_pull(pull.shard, "it is not wanted any more")
        elif frame[0] == REFUSED:
            self._lost_pull(pull)
        elif frame[1] is not None:
            pull.keys += frame[1]
            pull.cells += [tuple(cell) for cell in frame[2]]
        else:
            self._loaded(pull, *frame[2], [tuple(entry) for entry in frame[3]])

    def _loaded(self, pull: _Pull, epoch: int, seq: int, chain: int, kept: list[Any]) -> None:
        """All of it is here: its file is stored, and only then it is the copy of this node."""
        core, shard, learning = self.core, pull.shard, pull.learning
        assert core is not None
        pull.connection.close(TO_CLIENT)
        base = Base(epoch, seq, chain, pull.keys, pull.cells)
        table = Table(shard)
        table.load(base.pieces(), epoch, seq, chain)
        self.oracles.sample(shard, table)
        if not core.loaded(learning, table, kept):
            self.end_pull(shard, "it is of no use")
            return
        mine = [(shard, learning.generation, *entry[2:]) for entry in kept]
        wait_ms = self.world.rng.randrange(1, self.disk.sync_ms + 1) if self.mode != MEMORY else 0
        self.later(wait_ms, self._stored, pull, base, mine)

    def _stored(self, pull: _Pull, base: Base, kept: list[Logged]) -> None:
        """The file is durable."""
        assert self.core is not None
        if self._pulls.get(pull.shard) is pull:
            del self._pulls[pull.shard]
            self.core.published(pull.learning, (pull.learning.copy, base, kept))

    def _lost_pull(self, pull: _Pull) -> None:
        if self._pulls.get(pull.shard) is pull:
            assert self.core is not None
            self.end_pull(pull.shard, "the transfer failed")
            self.core.pull_failed(pull.learning, "the transfer failed")
