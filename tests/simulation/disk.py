"""The disk of a node in a simulation: what is durable there, and what of it a crash leaves.

A model of what the storage layer promises (the layer itself has its own tests with crashes at every write). It has one
log for all shards, written in groups, one at a time; jobs (a promise, a publication) have their place in the same queue
and are done at once or not at all; a crash in the middle of a group or a job leaves all of it or nothing.

- mode `sync`: what a group wrote is durable when it is done, and the node is told then.
- mode `os`: the node is told the same, and the kernel writes later: a power cut takes records from the end of the log.
  Every copy is another one then, with a new disk uuid, and the old uuid is gone with what it had acknowledged.
- mode `memory`: there is no log, and the end of the process takes everything.

A copy (`Stored`) is a snapshot and the entries that follow it. `chains` are those of its whole history, for the
oracles; a history begins at number 0, or, after all disks of a shard were lost, at some number above all of before. The
`archive` has every copy that there ever was, by disk uuid: what a member of the map had acknowledged is looked up
there, wherever its node is by now.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgpack

from kvtcp.node.replica import Replicas
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.table import Logged, Table
from tests.simulation.world import require

SYNC, OS, MEMORY = "sync", "os", "memory"
SYNC_MS = 3  # upper bound of a sync on a disk without trouble


class Base:
    """A snapshot: rows at a position."""

    __slots__ = ("cells", "chain", "epoch", "keys", "seq")

    def __init__(self, epoch: int, seq: int, chain: int, keys: Sequence[bytes], cells: Sequence[Any]) -> None:
        self.epoch = epoch
        self.seq = seq
        self.chain = chain
        self.keys = keys
        self.cells = cells

    @classmethod
    def of(cls, frozen: Frozen) -> Base:
        """Everything of a scan that was not read yet."""
        keys: list[bytes] = []
        cells: list[Any] = []
        while frozen.rows_left:
            more, found = frozen.next_cells(100)
            keys += more
            cells += found
        return cls(frozen.epoch, frozen.seq, frozen.chain, keys, cells)

    def pieces(self) -> list[tuple[Sequence[bytes], Sequence[Any]]]:
        """For `Table.load`."""
        return [(self.keys, self.cells)] if self.keys else []


class Stored:
    """One copy on a disk: everything in it is written."""

    __slots__ = (
        "base", "chains", "complete", "disk", "entries", "first", "generation", "kept", "node", "reason", "shard",
    )  # fmt: skip

    def __init__(self, node: str, shard: int, disk: str, generation: int) -> None:
        self.node = node
        self.shard = shard
        self.disk = disk
        self.generation = generation
        self.complete = True
        self.reason = ""
        self.base = Base(0, 0, 0, (), ())
        self.kept: list[Logged] = []  # entries up to the base that may be uncommitted
        self.entries: list[Logged] = []  # after the base
        self.first = 0  # number at which its history begins
        self.chains: list[int] = [0]  # of its history, from `first` on

    @property
    def seq(self) -> int:
        """The last number it has."""
        return self.first + len(self.chains) - 1

    @property
    def position(self) -> tuple[int, int, int]:
        """Epoch, number and chain of the last entry."""
        epoch = msgpack.unpackb(self.entries[-1][4])[0] if self.entries else self.base.epoch
        return epoch, self.seq, self.chains[-1]

    def append(self, entry: Logged) -> None:
        """One more entry."""
        _, _, seq, chain, packed = entry
        require(seq == self.seq + 1, f"I1: {self.disk} has {self.seq} and gets entry {seq}", self.shard)
        require(chain == zlib.crc32(packed, self.chains[-1]), f"I1: chain of entry {seq} on {self.disk}", self.shard)
        self.entries.append(entry)
        self.chains.append(chain)

    def truncate(self, seq: int) -> None:
        """Nothing after this number is there."""
        seq = max(seq, self.base.seq)
        del self.entries[seq - self.base.seq :]
        del self.chains[seq + 1 - self.first :]

    def holds(self, seq: int, chain: int) -> bool:
        """Whether this entry is in its history."""
        return seq < self.first or (seq <= self.seq and self.chains[seq - self.first] == chain)

    def between(self, first: int, last: int) -> list[int]:
        """The chains of these numbers."""
        return self.chains[first - self.first : last + 1 - self.first]

    def snapshot(self, base: Base, kept: list[Logged]) -> None:
        """A newer snapshot is published."""
        del self.entries[: base.seq - self.base.seq]
        self.base = base
        self.kept = kept

    def renamed(self, disk: str) -> Stored:
        """The same content under another uuid."""
        new = Stored(self.node, self.shard, disk, self.generation)
        new.complete, new.reason, new.base, new.kept = self.complete, self.reason, self.base, self.kept
        new.entries, new.first, new.chains = self.entries[:], self.first, self.chains[:]
        return new

    def table(self) -> Table:
        """Its content."""
        table, base = Table(self.shard), self.base
        table.generation = self.generation
        if base.seq:
            table.load(base.pieces(), base.epoch, base.seq, base.chain)
        for _, _, _, chain, entry in self.entries:
            table.apply_entry(entry, chain)
        return table

    def copy(self) -> Copy:
        """As a starting process finds it."""
        table = self.table() if self.complete else Table(self.shard)
        return Copy(
            self.shard, self.disk, generation=self.generation, complete=self.complete, reason=self.reason, table=table
        )


class Manifest:
    """What a node knows of itself after a restart."""

    def __init__(self) -> None:
        self.promised = 0
        self.coordinator = ""
        self.map_version = 0
        self.copies: dict[int, Stored] = {}
        self.generations: dict[int, int] = {}  # highest that was given for each shard


class Named:
    """A copy as it is named in a manifest now; the copy itself goes on."""

    def __init__(self, copy: Copy) -> None:
        self.shard = copy.shard
        self.disk = copy.disk
        self.generation = copy.generation
        self.reason = copy.reason
        self.table = copy.table


class _Group:
    """Entries that will be one record, and the ordinals that are durable with it, by connection."""

    __slots__ = ("entries", "marks")

    def __init__(self) -> None:
        self.entries: list[Logged] = []
        self.marks: dict[Any, int] = {}


class _Job:
    """Something that is done at once when everything before it is durable. `work` changes the disk."""

    __slots__ = ("done", "work")

    def __init__(self, work: Callable[[], None] | None, done: Callable[[], None]) -> None:
        self.work = work
        self.done = done


class NodeDisk:
    """The disk of one node, and the `Persistence` of its core. `later` is how its process waits, `on_durable` how it is
    told, `logged` how the oracles hear of entries."""

    def __init__(self, node: Any, mode: str, archive: dict[str, Stored]) -> None:
        self.node = node
        self.rng = node.world.rng
        self.mode = mode
        self.archive = archive
        self.manifest = Manifest()
        self.sync_ms = SYNC_MS  # upper bound of a sync now
        self._disks = 0  # given on this node
        self._written: dict[tuple[int, int], Stored] = {}  # copies by shard and generation, for the log
        self._unflushed: list[list[Logged]] = []  # records that a power cut may take, in order
        self._queue: deque[_Group | _Job] = deque()
        self._flight: _Group | _Job | None = None
        self._changes = 0  # of copies: jobs in the queue that name others

    def new_disk(self) -> str:
        """A uuid."""
        self._disks += 1
        return f"{self.node.name}/{self._disks}"

    def found(self, copies: Sequence[Named]) -> None:
        """The manifest is to name these copies: those it does not know are new and empty. Part of a job."""
        for copy in copies:
            known = self.manifest.copies.get(copy.shard)
            if known is None or known.disk != copy.disk:
                if copy.disk in self.archive:  # one that was to be replaced, and is not
                    self._adopt(self.archive[copy.disk])
                elif known is not None and known.generation == copy.generation:
                    self._adopt(known.renamed(copy.disk))  # another identity of what is there
                else:
                    assert copy.table.seq == 0, "what has entries is published, not found"
                    self._adopt(Stored(self.node.name, copy.shard, copy.disk, copy.generation))
            self.manifest.copies[copy.shard].reason = copy.reason

    def _adopt(self, stored: Stored) -> None:
        """This copy is the one of its shard from now on."""
        self.archive[stored.disk] = stored
        self.manifest.copies[stored.shard] = stored
        self._written[stored.shard, stored.generation] = stored

    def publish(self, copy: Named, base: Base, history: tuple[int, list[int]], kept: list[Logged]) -> None:
        """A copy that was learned as a whole takes the place of the one that was there. Part of a job."""
        stored = Stored(self.node.name, copy.shard, copy.disk, copy.generation)
        stored.base, stored.kept = base, kept
        stored.first, stored.chains = history
        self._adopt(stored)

    def dropped(self, shard: int) -> None:
        """There is no copy of the shard any more. Part of a job."""
        self.manifest.copies.pop(shard, None)

    # --- the log --------------------------------------------------------------------------------------

    def append(self, entries: list[Logged], connection: Any, ordinal: int) -> bool:
        """Log these entries, applied up to `ordinal` of a link. True if all of it is durable already."""
        if entries:
            self.node.logged(entries)
        if self.mode == MEMORY:
            self._write(entries)
            return True
        if self._changes and not entries:  # a copy that is not there any more may be what is waited for
            self.job(None, partial(self.node.on_durable, connection, ordinal))
            return False
        if entries:
            if not self._queue or not isinstance(self._queue[-1], _Group):
                self._queue.append(_Group())
            group = self._queue[-1]
            assert isinstance(group, _Group)
            group.entries += entries
            group.marks[connection] = ordinal
            return False
        for waiting in reversed(self._queue):
            if isinstance(waiting, _Group):
                waiting.marks[connection] = ordinal
                return False
        if isinstance(self._flight, _Group):
            self._flight.marks[connection] = ordinal
            return False
        return True

    def when_durable(self, done: Callable[[], None]) -> None:
        """Call `done` when everything queued so far is durable."""
        self.job(None, done)

    def remember(self, replica: Replicas, done: Callable[[], None]) -> None:
        """Promise and copies are durable as they are now."""
        promise = (replica.promised, replica.coordinator, replica.map_version)
        copies = [Named(copy) for copy in replica.copies.values()]
        self.job(partial(self._remember, promise, copies, dict(replica.generations)), done)

    def _remember(self, promise: tuple[int, str, int], copies: list[Named], generations: dict[int, int]) -> None:
        manifest = self.manifest
        manifest.promised, manifest.coordinator, manifest.map_version = promise
        manifest.generations = generations
        self.found(copies)

    def change_copies(self, copies: Iterable[Copy], pulled: tuple[Copy, Base, list[Logged]] | None = None) -> None:
        """There are these copies from now on. `pulled`: the new one, its content, and entries before it."""
        shards, generations = {copy.shard for copy in copies}, dict(self.node.replica.generations)
        publish: Callable[[], None] = _nothing
        if pulled is not None:
            copy, base, kept = pulled
            history = self.node.oracles.history(copy.shard, base.epoch, base.seq, base.chain)
            publish = partial(self.publish, Named(copy), base, history, kept)
        self._changes += 1

        def work() -> None:
            publish()
            for shard in [shard for shard in self.manifest.copies if shard not in shards]:
                self.dropped(shard)
            self.manifest.generations = generations

        def done() -> None:
            self._changes -= 1

        self.job(work, done)

    def job(self, work: Callable[[], None] | None, done: Callable[[], None]) -> _Job:
        """Do it when everything appended so far is durable."""
        job = _Job(work, done)
        if self.mode == MEMORY:
            if work is not None:
                work()
            done()
        else:
            self._queue.append(job)
            self.flush()
        return job

    def flush(self) -> None:
        """Begin to write, if nothing is being written."""
        if self._flight is None and self._queue:
            self._flight = self._queue.popleft()
            is_short = isinstance(self._flight, _Job) and self._flight.work is None
            self.node.later(0 if is_short else self.rng.randrange(1, self.sync_ms + 1), self._done)

    def _done(self) -> None:
        flight, self._flight = self._flight, None
        if isinstance(flight, _Group):
            self._write(flight.entries)
            for connection, ordinal in flight.marks.items():
                self.node.on_durable(connection, ordinal)
        elif flight is not None:
            if flight.work is not None:
                flight.work()
            flight.done()
        self.flush()

    def _write(self, entries: list[Logged]) -> None:
        """They are in the log."""
        for entry in entries:
            stored = self._written.get((entry[0], entry[1]))
            if stored is not None:
                stored.append(entry)
        if self.mode == OS and entries:
            self._unflushed.append(entries)
            if len(self._unflushed) > 12:
                del self._unflushed[: self.rng.randrange(1, 8)]

    # --- crashes --------------------------------------------------------------------------------------

    def crash(self, power: bool) -> None:
        """The process is gone; with `power` also what the kernel had not written."""
        flight, self._flight = self._flight, None
        self._queue.clear()
        self._changes = 0
        if flight is not None and self.rng.random() < 0.5:
            if isinstance(flight, _Group):
                self._write(flight.entries)
            elif flight.work is not None:
                flight.work()
        if self.mode == MEMORY:
            self.wipe()
        elif power and self.mode == OS:
            self._lose_tail()

    def _lose_tail(self) -> None:
        """Records from the end of the log are gone, and every copy is another one."""
        lost = [entry for record in self._unflushed[self.rng.randint(0, len(self._unflushed)) :] for entry in record]
        self._unflushed = []
        for shard, old in list(self.manifest.copies.items()):
            new = old.renamed(self.new_disk())
            new.reason = new.reason or "its machine lost power"
            mine = [seq for number, generation, seq, _, _ in lost if (number, generation) == (shard, old.generation)]
            if mine:
                new.truncate(min(mine) - 1)
            self._adopt(new)

    def damage(self, shard: int) -> None:
        """The copy of this shard cannot be read back: there is another one, incomplete."""
        old = self.manifest.copies[shard]
        new = Stored(self.node.name, shard, self.new_disk(), old.generation)
        new.complete, new.reason = False, "it was damaged"
        self._adopt(new)

    def wipe(self) -> None:
        """Nothing is there any more."""
        self.manifest = Manifest()
        self._written = {}
        self._unflushed = []


def _nothing() -> None:
    """Nothing is published."""
