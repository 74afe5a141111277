"""Replay: read the content of a data directory without changing anything.

I/O shell that only reads. `store.py` acts on the result, `check.py` prints it. Of each shard the newest valid snapshot
is loaded, then the entries of the log are applied, each verified by number and chain. The log is read one segment at a
time, oldest first.

**Doubt.** A copy is complete only if no entry of it can be missing. It is in doubt

- if entries are missing between its table and the next one in the log, or the position in the header of a segment;
- if a chain does not match;
- if the log is damaged and nothing behind the damage proves that it held no entry of this shard. Proof is a later entry
  that follows the last one of the table, or the position in the header of a later segment.

A damaged snapshot alone is no doubt if an older one and the log, or the log by itself, lead to a proven position. It is
reported all the same (`damages`), and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvtcp.errors import DataError
from kvtcp.storage.disk import log, snapshot
from kvtcp.storage.disk.log import SegmentInfo
from kvtcp.storage.disk.log_format import (
    FormatError,
    Position,
    Record,
    Segment,
    SegmentHeader,
    VersionError,
    parse_header,
    parse_records,
)
from kvtcp.storage.disk.manifest import Manifest
from kvtcp.storage.disk.snapshot import SnapshotName, load_snapshot
from kvtcp.storage.files import Disk
from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged

ReplayProgress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Damage:
    """A place on the disk that differs from what was written there."""

    path: Path
    offset: int | None  # None: the whole file
    reason: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.path}{place}: {self.reason}"


@dataclass(slots=True)
class Replayed:
    """The content of a data directory."""

    copies: dict[int, Copy] = field(default_factory=dict)
    doubts: dict[int, str] = field(default_factory=dict)  # shard that is complete in the manifest -> why it is not
    damages: list[Damage] = field(default_factory=list)
    snapshots: dict[int, SnapshotName] = field(default_factory=dict)  # loaded ones
    snapshot_bytes: dict[int, int] = field(default_factory=dict)  # lengths of the loaded ones
    stale: list[Path] = field(default_factory=list)  # useless files: temporary ones, older snapshots
    given_up: list[Path] = field(default_factory=list)  # snapshots of copies that are not complete any more
    segments: list[SegmentInfo] = field(default_factory=list)  # with a valid header, oldest first
    mark: int = 0  # the durable mark of the log
    last_lsn: int = 0  # highest LSN seen anywhere, damaged places included
    tail: list[Record] = field(default_factory=list)  # valid records above the mark, all in the last segment
    cut: str = ""  # for people: where the log is torn above the mark; empty = nowhere
    mark_positions: dict[int, Position] = field(default_factory=dict)  # shard -> last entry logged up to the mark
    positions: dict[int, Position] = field(default_factory=dict)  # shard -> last entry logged, `tail` included
    backlog: Backlog = field(default_factory=Backlog)
    log_damaged: bool = False
    entries: int = 0  # entries applied from the log


def replay(
    disk: Disk, directory: Path, manifest: Manifest, progress: ReplayProgress = lambda *_: None,
    power_failed: bool = False,
) -> Replayed:  # fmt: skip
    """Read a data directory. `power_failed`: any part of the writes that were not synced may be on the disk, see
    `Manifest.power_failed`. Raises VersionError for files of another format, OSError for a disk that cannot be read."""
    return _Replay(disk, directory, manifest, progress, power_failed).run()


class _Replay:
    """One pass over a directory."""

    def __init__(
        self, disk: Disk, directory: Path, manifest: Manifest, progress: ReplayProgress, power_failed: bool
    ) -> None:
        self.disk = disk
        self.power_failed = power_failed
        self.log_directory = directory / log.DIRECTORY
        self.snapshot_directory = directory / snapshot.DIRECTORY
        self.manifest = manifest
        self.progress = progress
        self.found = Replayed()
        self.positions: dict[int, Position] = {}  # shard -> its last entry in the records read so far
        self.bad_snapshots: dict[int, Damage] = {}
        self.bad_seqs: dict[int, int] = {}  # shard -> highest position of its damaged snapshots, by their names
        self.unproven: dict[int, str] = {}  # shards that may have lost entries by a damage -> the damage

    def run(self) -> Replayed:
        found = self.found
        for shard, (disk, generation, complete, reason) in self.manifest.shards.items():
            found.copies[shard] = Copy(shard, disk, generation=generation, complete=complete, reason=reason)
        self._read_snapshots()
        self._read_log()
        for shard, reason in list(self.unproven.items()):
            self._doubt(shard, reason)
        # The log may have let go of entries because of a snapshot that is damaged now.
        for shard, seq in self.bad_seqs.items():
            if found.copies[shard].table.seq < seq:
                self._doubt(shard, f"the entries up to {seq} are not in the log")
        for shard in found.doubts:
            found.backlog.forget(shard)
        found.positions = self.positions
        if not found.tail:
            found.mark_positions = dict(self.positions)
        return found

    # --- snapshots ------------------------------------------------------------------------------------

    def _read_snapshots(self) -> None:
        by_shard: dict[int, list[SnapshotName]] = {}
        sizes: dict[SnapshotName, int] = {}
        for name in self._names(self.snapshot_directory):
            parsed = SnapshotName.parse(name)
            if parsed is None:
                if name.endswith(snapshot.TEMPORARY):
                    self.found.stale.append(self.snapshot_directory / name)
                continue
            by_shard.setdefault(parsed.shard, []).append(parsed)
            sizes[parsed] = self.disk.size(self.snapshot_directory / name)
        total, done = sum(sizes.values()), 0
        for shard, names in by_shard.items():
            names.sort(key=lambda name: (name.generation, name.seq), reverse=True)
            self._read_newest(shard, names)
            done += sum(sizes[name] for name in names)
            self.progress("snapshots", done, total)
        self.found.snapshot_bytes = {shard: sizes[name] for shard, name in self.found.snapshots.items()}

    def _read_newest(self, shard: int, names: list[SnapshotName]) -> None:
        """Load the newest valid snapshot of a shard's present generation; the others are stale."""
        copy = self.found.copies.get(shard)
        for name in names:
            path = self.snapshot_directory / name.file
            if copy is None or name.generation != copy.generation:
                # an older generation was reset; a newer one than the manifest names was never published
                self.found.stale.append(path)
                continue
            if not copy.complete:
                self.found.given_up.append(path)
                continue
            if shard in self.found.snapshots:
                self.found.stale.append(path)
                continue
            try:
                table, kept = load_snapshot(self.disk, path, self.manifest.directory)
            except VersionError:
                raise
            except (FormatError, DataError) as error:
                damage = Damage(path, None, str(error))
                self.found.damages.append(damage)
                self.bad_snapshots[shard] = damage
                self.bad_seqs[shard] = max(self.bad_seqs.get(shard, 0), name.seq)
                continue
            copy.table = table
            self.found.snapshots[shard] = name
            if kept:
                self.found.backlog.add(0, kept)

    # --- the log --------------------------------------------------------------------------------------

    def _read_log(self) -> None:
        found = self.found
        names: list[tuple[int, Path]] = []
        for name in self._names(self.log_directory):
            lsn = log.segment_lsn(name)
            if lsn is not None:
                names.append((lsn, self.log_directory / name))
            elif name.endswith(log.TEMPORARY):
                found.stale.append(self.log_directory / name)
        found.mark = self.manifest.durable_lsn
        total, done = sum(self.disk.size(path) for _, path in names), 0
        for index, (lsn, path) in enumerate(names):
            following = names[index + 1][0] if index + 1 < len(names) else None
            data = self.disk.read(path)
            self._read_segment(path, lsn, data, following)
            done += len(data)
            self.progress("log", done, total)
        # After all segments: none of them proves anything about entries in the missing one.
        if self.manifest.segment > max((lsn for lsn, _ in names), default=0):
            path = self.log_directory / log.segment_name(self.manifest.segment)
            found.last_lsn = max(found.last_lsn, self.manifest.segment)
            self._damaged(Damage(path, None, "the manifest names this segment, and there is none so new"))
        found.last_lsn = max(found.last_lsn, self.manifest.durable_lsn)  # no LSN is given twice

    def _read_segment(self, path: Path, lsn: int, data: bytes, following: int | None) -> None:
        found = self.found
        found.last_lsn = max(found.last_lsn, lsn - 1)
        try:
            header = parse_header(data)
            if header.directory != self.manifest.directory:
                raise FormatError("the segment belongs to another data directory")
            if header.first_lsn != lsn:
                raise FormatError(f"the segment begins with record {header.first_lsn} by its header")
        except VersionError:
            raise
        except FormatError as error:
            found.last_lsn = max(found.last_lsn, lsn)  # a new segment must not get the name of this one
            self._damaged(Damage(path, None, str(error)))
            return
        self._check_positions(path, header)
        found.segments.append(SegmentInfo(path, lsn, header.positions, len(data)))
        segment = parse_records(data, header)
        # Records at or above the first LSN of the next segment are void: that segment has them again.
        end_lsn = None if following is None else following - 1
        records = [record for record in segment.records if end_lsn is None or record.lsn <= end_lsn]
        # A segment that has a successor is durable to its end: the successor got its name after that.
        found.mark = max(found.mark, header.durable_lsn, segment.mark if following is None else following - 1)
        found.last_lsn = max(found.last_lsn, lsn - 1, *(record.lsn for record in segment.later), 0)
        self.positions = {**self.positions, **header.positions}
        for record in records:
            self._read_record(path, record)
        bad_lsn = lsn + len(segment.records)
        last_lsn = found.mark if end_lsn is None else end_lsn  # the last record that must be here
        if end_lsn is None and segment.later and not self.power_failed:
            last_lsn = max(last_lsn, segment.later[-1].lsn)  # a killed process leaves no holes
        if bad_lsn <= last_lsn:
            self._read_behind(path, segment, bad_lsn, last_lsn, end_lsn)
        elif segment.bad_offset is not None and following is None:
            found.cut = f"{path} at byte {segment.bad_offset}: {segment.bad_reason}"

    def _read_behind(self, path: Path, segment: Segment, bad_lsn: int, last_lsn: int, end_lsn: int | None) -> None:
        """Read the records behind a bad or missing one at or below the mark. Their entries prove of some shards that no
        entry was lost."""
        reason = segment.bad_reason or f"the file ends before record {bad_lsn}, which was on the disk"
        offset = segment.end_offset if segment.bad_offset is None else segment.bad_offset
        damage = Damage(path, offset, reason)
        self._damaged(damage)
        self.found.last_lsn = max(self.found.last_lsn, bad_lsn)  # a new segment must not get the name of this one
        next_lsn: int | None = None
        for record in segment.later:
            if end_lsn is not None and record.lsn > end_lsn:
                break
            if next_lsn is not None and record.lsn != next_lsn:  # another hole: what was proven is in doubt again
                if next_lsn > last_lsn:
                    break  # above the mark: a torn end
                self._unprove(damage)
            self._read_record(path, record)
            next_lsn = record.lsn + 1
        if next_lsn is not None and next_lsn <= last_lsn:
            self._unprove(damage)

    def _read_record(self, path: Path, record: Record) -> None:
        found = self.found
        found.last_lsn = max(found.last_lsn, record.lsn)
        if record.lsn > found.mark and not found.log_damaged:
            found.tail.append(record)
            if len(found.tail) == 1:
                found.mark_positions = dict(self.positions)
        try:
            entries = record.entries()
        except FormatError as error:
            self._damaged(Damage(path, None, str(error)))
            return
        present = [entry for entry in entries if self._is_present(entry)]
        for entry in present:
            self._apply(path, entry)
        self.positions |= {entry[0]: entry[1:4] for entry in entries}
        if present:
            found.backlog.add(0, present)

    def _is_present(self, entry: Logged) -> bool:
        """Whether an entry belongs to the present copy of its shard."""
        shard, generation, _, _, _ = entry
        copy = self.found.copies.get(shard)
        return copy is not None and copy.complete and generation == copy.generation

    def _apply(self, path: Path, entry: Logged) -> None:
        shard, _, seq, chain, packed = entry
        copy = self.found.copies[shard]
        if shard in self.found.doubts:
            return
        table = copy.table
        # Entries at or below the position of the snapshot are in the table already.
        if seq > table.seq:
            if seq != table.seq + 1:
                self._doubt(shard, f"the entries {table.seq + 1} to {seq - 1} are missing before one in {path}")
                return
            try:
                table.apply_entry(packed, chain)
            except DataError as error:
                self._doubt(shard, f"{path}: {error.message}")
                return
            self.found.entries += 1
        elif seq == table.seq and chain != table.chain:
            self._doubt(shard, f"{path}: entry {seq} has another chain than the snapshot")
            return
        self.unproven.pop(shard, None)

    def _check_positions(self, path: Path, header: SegmentHeader) -> None:
        """Verify that every table has reached the position that the header of a segment names for its shard."""
        for shard, (generation, seq, chain) in header.positions.items():
            copy = self.found.copies.get(shard)
            if copy is None or generation != copy.generation or not copy.complete:
                continue
            table = copy.table
            if table.seq < seq:
                why = f"the entries {table.seq + 1} to {seq} are missing before {path}"
                self._doubt(shard, self.unproven.get(shard, why))
            elif table.seq == seq and table.chain != chain:
                self._doubt(shard, f"another chain than {path} has at entry {seq}")
            else:
                self.unproven.pop(shard, None)
        # The header names all shards with entries before this segment: the others have lost none.
        for shard in [shard for shard in self.unproven if shard not in header.positions]:
            del self.unproven[shard]

    def _damaged(self, damage: Damage) -> None:
        """Note a damage of the log. From here on every copy has to prove that it misses no entry."""
        self.found.damages.append(damage)
        self.found.log_damaged = True
        self.found.tail = []  # not written again: `open_store` begins a log without any of the old records
        self._unprove(damage)

    def _unprove(self, damage: Damage) -> None:
        for shard, copy in self.found.copies.items():
            if copy.complete:
                self.unproven[shard] = f"the log is damaged, {damage}"

    def _doubt(self, shard: int, reason: str) -> None:
        self.unproven.pop(shard, None)
        if shard in self.bad_snapshots:
            reason = f"{reason}; {self.bad_snapshots[shard]}"
        self.found.doubts.setdefault(shard, reason)

    def _names(self, directory: Path) -> list[str]:
        return self.disk.list(directory) if self.disk.exists(directory) else []
