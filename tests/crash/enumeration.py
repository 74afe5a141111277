"""Crash enumeration: a node's store on a disk in memory, and every crash of it.

    python -m tests.crash.enumeration [STATES] [SEED]      until so many recovered states are checked; `make crash`

A workload drives the real store as a node does: entries of a few shards are applied and logged by group commit, shards
are snapshotted in slices while entries go on, old segments are removed, the promise is raised, the process is killed or
stopped and started again. Segments hold a few records, so rotation, publication and removal happen all the time. If
`changes` are asked for, copies are also replaced by pulled ones, dropped, and made anew. Each promise given (an
acknowledgement, a report) is noted with the number of disk calls made until then.

Then every boundary between two calls is looked at: the power is cut there in at least `SAMPLES` sampled ways, or the
process is killed. The disk that is left is recovered by `open_store`, and

- every shard is complete, has the disk uuid that was reported, and is at a position at or above what was acknowledged;
  while a copy is being replaced or dropped it is the old one, as it was, or the new one, or none;
- table and chain are exactly those of that position: nothing is lost before it, nothing invented, nothing twice;
- the promise is at least what was reported; no damage is reported, for there was none;
- every entry that may be uncommitted can still be shipped;
- recovering again, also after a crash in the middle of the recovery, comes to the same.

In mode `os` an acknowledgement holds for killed processes; after a power cut every copy must have a new disk uuid, and
what it has must still be a state that was.
"""

from __future__ import annotations

import errno
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from kvtcp.protocol import operations as op
from kvtcp.storage.disk.snapshot import SnapshotFile, SnapshotHeader, decode_snapshot, encode_snapshot
from kvtcp.storage.disk.store import NodeStore, open_store, read_store_manifest
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged, Table
from tests.crash.disk import CrashDisk, Crashes

DIRECTORY = Path("/node")
SHARDS = 3
SAMPLES = 20
SEGMENT_BYTES = 700
LOG_BYTES = 900
KEYS = [b"k%d" % n for n in range(12)]


class Lost(AssertionError):
    """A recovered state that should not be."""


@dataclass
class Life:
    """One copy from one opening of the store to the next: what it held at each number."""

    chains: dict[int, int] = field(default_factory=lambda: {0: 0})
    digests: dict[int, int] = field(default_factory=lambda: {0: Table(0).digest()})

    def cut(self, seq: int) -> Life:
        """The history up to a number."""
        return Life(
            {n: chain for n, chain in self.chains.items() if n <= seq},
            {n: digest for n, digest in self.digests.items() if n <= seq},
        )

    def note(self, table: Table) -> None:
        """The state of a table is one that was."""
        self.chains[table.seq] = table.chain
        self.digests[table.seq] = table.digest()


@dataclass
class Noted:
    """What holds from a number of events on. Copies are known by their disks."""

    events: int
    acked: dict[str, int]  # disk -> number
    promised: int
    committed: dict[str, int]
    lives: dict[str, Life]  # of the present opening; shared by all notes of it
    disks: dict[int, frozenset[str]]  # shard -> which may be there; "" = none


class Workload:
    """A store, and notes of what it promised. `run` raises OSError if the disk was told to fail."""

    def __init__(self, seed: int, disk: CrashDisk, durability: str = "sync", changes: bool = False) -> None:
        self.rng = Random(f"workload {seed}")
        self.change_rng = Random(f"changes {seed}")
        self.ids = Random(f"ids {seed}")
        self.disk = disk
        self.durability = durability
        self.changes = changes
        self.notes: list[Noted] = []
        self.lives: dict[str, Life] = {}
        self.acked: dict[str, int] = {}
        self.committed: dict[str, int] = {}
        self.disks: dict[int, frozenset[str]] = {shard: frozenset({""}) for shard in range(SHARDS)}
        self.promised = 0
        self.ordinal = 0
        self.number = 0  # of copies that were pulled or made anew
        self.pending: list[Logged] = []
        self.snapshot: SnapshotInSlices | None = None
        self.pull: PullInSlices | None = None
        self.change: Change | None = None
        self.stamp_ms = 1_000
        self.seen: Counter[str] = Counter()
        self.store: NodeStore

    # --- the life of a node -----------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """So many steps of a node."""
        self.open()
        for _ in range(steps):
            if self.changes and self.change_rng.random() < 0.25:
                self.change_step()
            else:
                self.step()
        self.note()

    def open(self) -> None:
        """A process starts."""
        self.pending = []
        self.snapshot = self.pull = self.change = None
        self.store = open_store(
            self.disk, DIRECTORY, self.durability, self.ids.randbytes, "boot", segment_bytes_max=SEGMENT_BYTES
        )
        self.seen["opened"] += 1
        if self.seen["opened"] == 1:
            copies = [Copy(shard, f"disk-{shard}") for shard in range(SHARDS)]
            self.promised += 1
            self.store.manifest.promised = self.promised
            self.store.write_manifest(self.store.encode_manifest(copies))
            for copy in copies:
                self.begin_copy(copy, 0)
        self.lives = {
            copy.disk: self.lives.get(copy.disk, Life()).cut(copy.table.seq) for copy in self.store.copies.values()
        }
        for shard in range(SHARDS):
            copy = self.store.copies.get(shard)
            disk = "" if copy is None else copy.disk
            if disk not in self.disks[shard]:
                raise Lost(f"shard {shard} came back as {disk!r}, one of {set(self.disks[shard])} was there")
            self.disks[shard] = frozenset({disk})
            if copy is not None:
                self.check_opened(copy)
        self.store.backlog.new_link()
        self.ordinal = 0
        self.note()

    def check_opened(self, copy: Copy) -> None:
        """A copy after a restart; what is reported of it counts as acknowledged."""
        table, life = copy.table, self.lives[copy.disk]
        if (table.chain, table.digest()) != (life.chains.get(table.seq), life.digests.get(table.seq)):
            raise Lost(f"shard {copy.shard} came back as something else")
        if table.seq < self.acked[copy.disk]:
            raise Lost(f"shard {copy.shard} came back at {table.seq}, {self.acked[copy.disk]} was acknowledged")
        table.epoch = self.promised
        self.acked[copy.disk] = table.seq

    def begin_copy(self, copy: Copy, committed: int) -> None:
        """There is another copy, with what it has."""
        life = self.lives[copy.disk] = Life()
        life.note(copy.table)
        self.acked[copy.disk] = copy.table.seq
        self.committed[copy.disk] = committed
        self.disks[copy.shard] |= {copy.disk}

    def table(self, shard: int) -> Table:
        """The table of a shard."""
        return self.store.copies[shard].table

    def note(self) -> None:
        """From here on the present promises hold."""
        now = len(self.disk.events)
        self.notes.append(
            Noted(now, dict(self.acked), self.promised, dict(self.committed), self.lives, dict(self.disks))
        )

    def step(self) -> None:
        """Something that a node does."""
        rng = self.rng
        choice = rng.random()
        if choice < 0.35:
            for _ in range(rng.randrange(1, 5)):
                self.apply()
        elif choice < 0.58:
            self.write()
        elif choice < 0.9:
            self.slice()
        elif choice < 0.93:
            self.commit()
        elif choice < 0.95:
            self.write()
            self.mark()
        elif choice < 0.96:
            self.promise()
        elif choice < 0.99:
            self.restart()
        else:
            self.store.log.begin_new_segment()

    def apply(self) -> None:
        """One entry."""
        rng = self.rng
        shard = rng.randrange(SHARDS)
        if shard not in self.store.copies or (self.pull is not None and self.pull.shard == shard):
            return  # there is none, or it is being learned
        table = self.table(shard)
        key = rng.choice(KEYS)
        self.stamp_ms += rng.randrange(3)
        head = (shard, table.seq + 1, 0)
        kind = rng.random()
        if kind < 0.6:
            item = (op.PUT, *head, key, rng.randbytes(rng.choice([0, 8, 60, 600])), rng.choice([None, None, None, 5]))
        elif kind < 0.8:
            item = (op.DELETE, *head, key)
        elif kind < 0.9:
            item = (op.INCR, *head, b"n", 1)
        elif kind < 0.95:
            item = (op.PURGE, *head, b"", 3)
        elif kind < 0.98:
            item = (op.EXPIRE, *head, key, 7)
        else:
            item = (op.CLEAR, *head, b"", None, 100)
        table.apply(item, self.stamp_ms)
        self.pending.append((shard, table.generation, table.seq, table.chain, table.last_entry))
        self.lives[self.store.copies[shard].disk].note(table)

    def write(self) -> None:
        """Group commit of what is pending: written, synced, acknowledged."""
        self.finish_change()
        if self.pending:
            self.keep()
            entries, self.pending = self.pending, []
            self.log(entries)
            for shard, _, seq, _, _ in entries:
                self.acked[self.store.copies[shard].disk] = seq
            self.note()

    def keep(self) -> None:
        """What is pending is kept for shipping."""
        self.ordinal += len(self.pending)
        self.store.backlog.add(self.ordinal, list(self.pending))

    def log(self, entries: list[Logged]) -> None:
        """One record."""
        log = self.store.log
        segments = len(log.segments)
        prepared = log.prepare(entries)
        self.store.write_record(prepared, self.store.manifest_for(prepared))
        log.written(prepared)
        self.seen["rotated"] += len(log.segments) > segments

    def mark(self) -> None:
        """A pause: the empty record."""
        prepared = self.store.log.prepare_mark()
        self.store.write_record(prepared, self.store.manifest_for(prepared))
        self.store.log.written(prepared)

    def commit(self) -> None:
        """The coordinator says that something is committed."""
        committed = self.store.backlog.commit(self.rng.randrange(self.ordinal + 1))
        self.committed |= {self.store.copies[shard].disk: seq for shard, seq in committed.items()}
        self.note()

    def slice(self) -> None:
        """Go on with the snapshot, or begin one that is due."""
        if self.snapshot is not None:
            if self.snapshot.step():
                self.snapshot = None
            return
        shard = self.store.due_snapshot(LOG_BYTES)
        if shard is None and self.rng.random() < 0.3:
            shard = self.rng.choice(self.store.behind() or [None])
        if shard is not None:
            self.snapshot = SnapshotInSlices(self, shard)

    def promise(self) -> None:
        """HELLO of a new epoch: the log is flushed, then the promise is durable, then the report."""
        self.write()
        self.promised += 1
        self.store.manifest.promised = self.promised
        self.promised -= 1
        self.store.write_manifest(self.store.encode_manifest(self.store.copies.values()))
        self.promised += 1
        for copy in self.store.copies.values():
            copy.table.epoch = self.promised
        self.store.backlog.new_link()
        self.ordinal = 0
        self.note()

    def restart(self) -> None:
        """The process is stopped or killed, and started again."""
        if self.rng.random() < 0.3:
            self.write()
            self.store.close_clean()
            self.seen["stopped"] += 1
        else:
            self.seen["killed"] += 1
        self.open()

    # --- copies that come and go ------------------------------------------------------------------

    def change_step(self) -> None:
        """Go on with what changes, or begin something."""
        rng = self.change_rng
        if self.change is not None and rng.random() < 0.5:
            self.store.remove(self.store.needless_segments())  # which is looked for all the time
        elif self.change is not None:
            self.finish_change()
        elif self.pull is not None:
            if self.pull.step():
                self.pull = None
        elif rng.random() < 0.6:
            self.pull = PullInSlices(self, rng.randrange(SHARDS))
        else:
            shard = rng.randrange(SHARDS)
            if shard in self.store.copies:
                self.begin_change(shard, None)
            else:
                self.number += 1
                self.begin_change(shard, Copy(shard, f"new-{self.number}", generation=self.next_generation(shard)))

    def next_generation(self, shard: int) -> int:
        """As the replica counts them."""
        copy = self.store.copies.get(shard)
        generations = self.store.manifest.generations
        generations[shard] = 1 + max(generations.get(shard, 0), 0 if copy is None else copy.generation)
        return generations[shard]

    def begin_change(self, shard: int, copy: Copy | None, pulled: PullInSlices | None = None) -> None:
        """The manifest that says it is queued, behind what is pending."""
        old = self.store.copies.get(shard)
        self.keep()
        before, self.pending = self.pending, []
        self.store.backlog.forget(shard)
        copies = {number: each for number, each in self.store.copies.items() if number != shard}
        if old is not None:
            generations = self.store.manifest.generations
            generations[shard] = max(generations.get(shard, 0), old.generation)
        if copy is None:
            self.disks[shard] |= {""}
        else:
            copies[shard] = copy
            copy.table.epoch = self.promised
            self.begin_copy(copy, 0 if pulled is None else copy.table.seq - len(pulled.kept))
            if pulled is not None and pulled.kept:
                self.store.backlog.add_shipped(shard, pulled.kept)
        self.note()
        snapshot = None if pulled is None else (pulled.header, pulled.size)
        manifest, paths = self.store.begin_change(copies.values(), snapshot)
        self.change = Change(before, manifest, paths, shard, "" if copy is None else copy.disk)

    def finish_change(self) -> None:
        """It is written; then what nobody needs is removed."""
        change, self.change = self.change, None
        if change is None:
            return
        if change.before:
            self.log(change.before)
            for shard, generation, seq, _, _ in change.before:
                copy = self.store.copies.get(shard)
                if copy is not None and copy.generation == generation:
                    self.acked[copy.disk] = seq
            self.note()
        self.store.write_manifest(change.manifest)
        self.store.end_change()
        self.disks[change.shard] = frozenset({change.disk})
        self.note()
        self.seen["changed"] += 1
        self.store.remove(change.paths)


@dataclass
class Change:
    """Of copies, not durable yet."""

    before: list[Logged]  # what was appended before it
    manifest: bytes
    paths: list[Path]  # to be removed behind it
    shard: int
    disk: str  # of the copy from then on; "" = none


class PullInSlices:
    """A copy that is pulled as `node/puller.py` does it."""

    def __init__(self, workload: Workload, shard: int) -> None:
        self.workload = workload
        self.shard = shard
        workload.number += 1
        rng = workload.change_rng
        generation = workload.next_generation(shard)
        donor = Table(shard)
        donor.epoch = workload.promised
        entries: list[Logged] = []
        for seq in range(1, rng.randrange(2, 25)):
            donor.apply((op.PUT, shard, seq, 0, rng.choice(KEYS), rng.randbytes(rng.choice([3, 200]))), 1_000)
            entries.append((shard, generation, seq, donor.chain, donor.last_entry))
        self.kept = entries[len(entries) - rng.randrange(min(4, len(entries))) :]
        frozen = donor.freeze()
        directory = workload.store.manifest.directory
        self.header = SnapshotHeader(directory, shard, generation, frozen.epoch, frozen.seq, frozen.chain)
        self.data = b"".join(encode_snapshot(self.header, frozen, self.kept))
        self.left = self.data
        self.file: SnapshotFile | None = None
        self.whole = False
        self.size = 0

    def step(self) -> bool:
        """The next thing to do; true if the copy is there, or was given up for lack of space."""
        workload = self.workload
        store = workload.store
        try:
            if self.file is None:
                self.file = store.create_snapshot(self.header)
                return False
            if self.left:
                self.file.write(self.left[:1_500])
                self.left = self.left[1_500:]
                return False
            if not self.whole:
                self.file.finish()
                self.whole = True
                return False
            table, kept = decode_snapshot(self.file.read_back(), self.header.name, store.manifest.directory)
            assert kept == self.kept
            self.size = self.file.publish()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if self.file is not None:
                self.file.abort()
                store.remove([self.file.path])
            return True
        workload.seen["pulled"] += 1
        disk = f"pulled-{workload.number}"
        workload.begin_change(self.shard, Copy(self.shard, disk, generation=table.generation, table=table), self)
        return True


class SnapshotInSlices:
    """A snapshot of one shard as `node/durability.py` takes it."""

    def __init__(self, workload: Workload, shard: int) -> None:
        self.workload = workload
        store = workload.store
        # what is kept for shipping is added before the freeze, as a node does
        workload.write()
        self.frozen = workload.table(shard).freeze()
        self.header = store.header_of(self.frozen)
        self.pieces = encode_snapshot(self.header, self.frozen, store.backlog.of_shard(shard))
        self.file: SnapshotFile | None = None
        self.whole = False

    def step(self) -> bool:
        """The next thing to do; true if the snapshot is published, or was given up for lack of space."""
        store = self.workload.store
        if self.whole and self.workload.change is None:
            self.workload.write()  # the log is durable up to the position before the snapshot is published
        try:
            if self.file is None:
                self.file = store.create_snapshot(self.header)
                return False
            piece = next(self.pieces, None)
            if piece is not None:
                self.file.write(piece)
                return False
            if not self.whole:
                self.file.finish()
                self.whole = True
                return False
            paths = store.published(self.header, self.file.publish())  # also of a copy that is gone meanwhile
            self.workload.seen["published"] += 1
            self.workload.seen["segments removed"] += sum(path.name.endswith(".log") for path in paths)
            store.remove(paths)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.frozen.close()
            if self.file is not None:
                self.file.abort()
        return True


# --- looking at crashes ---------------------------------------------------------------------------------


def reopen(disk: CrashDisk, workload: Workload, boot: str) -> NodeStore:
    """A start on what a crash left."""
    return open_store(disk, DIRECTORY, workload.durability, Random(7).randbytes, boot, segment_bytes_max=SEGMENT_BYTES)


def outcome(store: NodeStore) -> list[tuple[object, ...]]:
    """What a recovered store is, for comparison."""
    return [
        (copy.shard, copy.disk, copy.complete, copy.table.position, copy.table.digest())
        for copy in store.copies.values()
    ]


class Judge:
    """Checks recovered states of one workload. Boundaries must ascend."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.states = 0
        self._at = 0  # notes[:_at] hold
        self._now: Noted | None = None
        self._amnesia = False  # the disk being judged must have forgotten who it is

    def advance(self, boundary: int) -> None:
        """What was promised when so many events had happened."""
        notes = self.workload.notes
        while self._at < len(notes) and notes[self._at].events <= boundary:
            self._now = notes[self._at]
            self._at += 1

    def check(self, disk: CrashDisk, rng: Random, power_cut: bool) -> None:
        """Recover a disk, and again, and judge it. Raises Lost."""
        boot = "boot after a power cut" if power_cut else "boot"
        manifest = read_store_manifest(disk, DIRECTORY)
        # a process that does not sync and did not end in order: nobody knows what it lost
        self._amnesia = (
            power_cut and self.workload.durability == "os" and manifest is not None and not manifest.clean
            and manifest.boot != ""
        )  # fmt: skip
        store = reopen(disk, self.workload, boot)
        self.states += 1
        self._judge(store)
        first = outcome(store)
        if outcome(reopen(disk, self.workload, boot)) != first:
            raise Lost("recovered twice, it is something else")
        # a crash in the middle of the first recovery: the second one comes to the same
        crashes = Crashes(disk)
        for _ in range(rng.randrange(len(disk.events) + 1)):
            crashes.advance()
        if self.workload.durability == "sync":
            again = crashes.sample(rng) if power_cut or rng.random() < 0.5 else crashes.process_kill(rng)
            self.states += 1
            store = reopen(again, self.workload, boot)
            self._judge(store)

    def _judge(self, store: NodeStore) -> None:
        now = self._now
        if store.damages:
            raise Lost(f"damage is reported where there is none: {store.damages[0]}")
        if now is None:
            return
        following = self.workload.notes[self._at] if self._at < len(self.workload.notes) else now
        if store.manifest.promised < now.promised:
            raise Lost(f"promised {now.promised}, recovered {store.manifest.promised}")
        for shard in range(SHARDS):
            disks = now.disks[shard] | following.disks[shard]
            copy = store.copies.get(shard)
            if copy is not None:
                self._judge_copy(store, copy, now, following, disks)
            elif "" not in disks:
                raise Lost(f"shard {shard} is gone")

    def _judge_copy(self, store: NodeStore, copy: Copy, now: Noted, following: Noted, disks: frozenset[str]) -> None:
        shard, amnesia = copy.shard, self._amnesia
        if not copy.complete:
            raise Lost(f"shard {shard} is incomplete: {copy.reason}")
        if (copy.disk in disks) == amnesia:
            raise Lost(f"shard {shard} has the disk {copy.disk}, not one of {set(disks)}")
        table = copy.table
        table.check()
        state = (table.chain, table.digest())
        known = disks if amnesia else {copy.disk}
        lives = [life for noted in (now, following) for disk, life in noted.lives.items() if disk in known]
        if all(state != (life.chains.get(table.seq), life.digests.get(table.seq)) for life in lives):
            raise Lost(f"shard {shard} at {table.seq} is no state that was")
        if not amnesia:
            acked = now.acked.get(copy.disk, following.acked.get(copy.disk, 0))
            if table.seq < acked:
                raise Lost(f"shard {shard}: {acked} was acknowledged, {table.seq} is there")
            kept = [entry[2] for entry in store.backlog.of_shard(shard)]
            committed = now.committed.get(copy.disk, following.committed.get(copy.disk, 0))
            if following is now or following.committed == now.committed:
                missing = [seq for seq in range(committed + 1, table.seq + 1) if seq not in kept]
                if missing:
                    raise Lost(f"shard {shard}: entries {missing} may be uncommitted and are not kept")
            if any(entry[1] != copy.generation for entry in store.backlog.of_shard(shard)):
                raise Lost(f"shard {shard}: entries of another copy are kept")
        copy.table.epoch = now.promised


def enumerate_crashes(
    seed: int, steps: int, samples: int = SAMPLES, durability: str = "sync", changes: bool = False
) -> tuple[int, Workload]:
    """Every boundary of a workload, `samples` power cuts and one kill each; the number of recovered states."""
    disk = CrashDisk()
    workload = Workload(seed, disk, durability, changes)
    workload.run(steps)
    judge = Judge(workload)
    crashes = Crashes(disk)
    for boundary in crashes.walk():
        judge.advance(boundary)
        for number in range(samples + 1):
            rng = Random(f"{seed} {boundary} {number}")
            crashed = crashes.sample(rng) if number < samples else crashes.process_kill(rng)
            try:
                judge.check(crashed, rng, power_cut=number < samples)
            except Exception as error:
                error.add_note(f"seed {seed}, {durability}, {crashed.origin}, sample {number}")
                raise
    return judge.states, workload


def enumerate_errors(seed: int, steps: int, error_number: int, durability: str = "sync", changes: bool = False) -> int:
    """A disk that fails at its n-th call, for every n: no acknowledgement after the error, nothing lost. States."""
    states = 0
    for fail_at in range(1, 1 << 30):
        rng = Random(f"{seed} {fail_at}")
        disk = CrashDisk(fail_at=fail_at, error_number=error_number, rng=rng)
        workload = Workload(seed, disk, durability, changes)
        failed: OSError | None = None
        try:
            workload.run(steps)
        except OSError as error:
            failed = error
        if len(disk.calls) < fail_at:
            return states
        disk.fail_at = 0
        judge = Judge(workload)
        judge.advance(len(disk.events))
        for crashed, power_cut in ((disk.process_kill(), False), (disk.power_cut(rng), True)):
            try:
                judge.check(crashed, rng, power_cut)
            except Exception as error:
                error.add_note(f"seed {seed}, {durability}, call {fail_at} failed ({failed}), {crashed.origin}")
                raise
        states += judge.states
    raise AssertionError("the workload ends before the calls do")


def main() -> None:
    """Run seeds until enough states are checked."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    states = 0
    seen: Counter[str] = Counter()
    began = time.monotonic()
    while states < wanted:
        for changes in (False, True):
            for durability in ("sync", "os"):
                found, workload = enumerate_crashes(seed, 120, durability=durability, changes=changes)
                states += found
                seen.update(workload.seen)
            for error_number in (errno.EIO, errno.ENOSPC):
                states += enumerate_errors(seed, 60, error_number, changes=changes)
        print(f"seed {seed}: {states} states, {dict(seen)}, {time.monotonic() - began:.0f} s", flush=True)
        seed += 1
    print(f"{states} recovered states, none wrong")


if __name__ == "__main__":
    main()
