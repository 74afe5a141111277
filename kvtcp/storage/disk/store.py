"""The store of a node: its data directory, from recovery to a clean stop.

I/O shell over replay, log, snapshots and manifest. It decides which bytes go into which file; `node/durability.py`
runs it with two threads, the crash tests run it step by step in one. Methods that block or raise OSError say so.

    <data dir>/manifest.json        manifest.py
    <data dir>/log/                 log.py
    <data dir>/snapshots/           snapshot.py
    <data dir>/aside/<n>/           damaged files, and everything that may help to understand the damage

**Opening** has four steps: read everything (`replay`), settle doubts, begin a new segment, write the manifest. A copy
in doubt gets a new disk uuid and is incomplete, durably, before anything else is changed. If the log is damaged, every
whole copy is snapshotted and the segments are moved aside. So a damage is met once, and by then nothing depends on the
damaged file. After a crash at any step, opening again comes to the same result.

**A copy is replaced or dropped** by writing a manifest. The snapshot of the new copy gets its name before, the files of
the old copy are removed after it, and in between no segment of the log is deleted. Generations distinguish the entries
of both copies, so a crash at any moment leaves the old copy as it was, or the new one.

**After a power cut** in a mode that does not sync, any recent write may be missing: every copy gets a new disk uuid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kvtcp.constants import (
    KIB,
    SEGMENT_BYTES_MAX,
    SNAPSHOT_LOG_BYTES,
    SPACE_RESERVE_BYTES,
)
from kvtcp.storage.disk import log, snapshot
from kvtcp.storage.disk.log import LogWriter, Prepared
from kvtcp.storage.disk.log_format import DIRECTORY_BYTES, SALT_BYTES, FormatError, Position, VersionError
from kvtcp.storage.disk.manifest import Manifest, read_manifest, write_manifest
from kvtcp.storage.disk.replay import Damage, Replayed, ReplayProgress, replay
from kvtcp.storage.disk.snapshot import SnapshotFile, SnapshotHeader, SnapshotName, encode_snapshot
from kvtcp.storage.files import Disk
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.table import Logged

ASIDE: Final = "aside"
DISK_ID_BYTES: Final = 8
ESTIMATES_AT_ONCE: Final = 16  # shards whose snapshot length one call estimates
POWER_CUT: Final = (
    "the machine was restarted while the node ran in a mode that does not sync: what it wrote last may be lost"
)
NO_MANIFEST: Final = (
    "{directory} has data and no manifest.json: put back the file that belongs to this data, or the whole directory; "
    "without it the node begins anew, as one that lost its data (move the directory away)"
)


class StoreError(Exception):
    """The data directory cannot be opened; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A published snapshot."""

    name: SnapshotName
    size: int  # bytes


class NodeStore:
    """One open data directory. Made by `open_store`."""

    def __init__(
        self, disk: Disk, directory: Path, manifest: Manifest, log_writer: LogWriter, replayed: Replayed
    ) -> None:
        self.disk = disk
        self.directory = directory
        self.manifest = manifest
        self.log = log_writer
        self.copies: dict[int, Copy] = replayed.copies
        self.backlog = replayed.backlog
        self.damages: list[Damage] = replayed.damages
        self.replayed_entries = replayed.entries
        self.snapshots = {
            shard: SnapshotInfo(name, replayed.snapshot_bytes[shard]) for shard, name in replayed.snapshots.items()
        }
        self.aside: Path | None = None  # where this opening moved damaged files
        self._changes = 0  # changes of copies for which no manifest is on the disk yet
        self._estimates: dict[int, int] = {}  # shard -> length of its next snapshot, as of its last turn
        self._estimate_turn = 0

    # --- snapshots ------------------------------------------------------------------------------------

    @property
    def snapshot_bytes(self) -> int:
        """Length of all snapshots."""
        return sum(info.size for info in self.snapshots.values())

    @property
    def snapshot_directory(self) -> Path:
        """The directory of all snapshots."""
        return self.directory / snapshot.DIRECTORY

    def due_snapshot(self, log_bytes_max: int = SNAPSHOT_LOG_BYTES) -> int | None:
        """The next shard to snapshot, one that keeps the oldest segment from being deleted; None while the log is
        short.

        The log is long when it exceeds `log_bytes_max` and all snapshots together: so what is written for snapshots is
        about as much as what is logged.
        """
        if self.log.total_bytes <= max(log_bytes_max, self.snapshot_bytes) or len(self.log.segments) < 2:
            return None
        return next(iter(self.behind(self.log.segments[1].positions)), None)

    def behind(self, positions: dict[int, Position] | None = None) -> list[int]:
        """The shards whose snapshots are older than `positions`; None stands for the end of the log. In that case the
        shards that keep the oldest segment come first."""
        if positions is not None:
            return [shard for shard, position in positions.items() if not self._is_covered(shard, position)]
        first = self.behind(self.log.segments[1].positions) if len(self.log.segments) > 1 else []
        return list(dict.fromkeys(first + self.behind(self.log.positions)))

    def _is_covered(self, shard: int, position: Position) -> bool:
        """Whether a restart needs no entry up to this position."""
        generation, seq, _ = position
        # Entries of another generation, or of a copy that is not complete, are never replayed.
        copy = self.copies.get(shard)
        if seq == 0 or copy is None or not copy.complete or copy.generation != generation:
            return True
        info = self.snapshots.get(shard)
        return info is not None and info.name.generation == generation and info.name.seq >= seq

    def header_of(self, frozen: Frozen) -> SnapshotHeader:
        """The header for the snapshot of a frozen shard."""
        generation = self.copies[frozen.shard].generation
        return SnapshotHeader(
            self.manifest.directory, frozen.shard, generation, frozen.epoch, frozen.seq, frozen.chain
        )

    def create_snapshot(self, header: SnapshotHeader) -> SnapshotFile:
        """An unfinished snapshot with this header. Blocks, raises OSError."""
        return SnapshotFile(self.disk, self.snapshot_directory, header.name)

    def published(self, header: SnapshotHeader, size: int) -> list[Path]:
        """Take note of a published snapshot. Returns the files that are useless now, in the order to remove them."""
        copy = self.copies.get(header.shard)
        if copy is None or not copy.complete or copy.generation != header.generation:
            return [self.snapshot_directory / header.name.file]  # the copy was replaced meanwhile
        old = self.snapshots.get(header.shard)
        self.snapshots[header.shard] = SnapshotInfo(header.name, size)
        paths = [] if old is None or old.name == header.name else [self.snapshot_directory / old.name.file]
        return paths + self.needless_segments()

    def needless_segments(self) -> list[Path]:
        """Segments of the log that no restart needs any more, in the order to remove them. Each is named once."""
        # Not while a change is under way: after a crash before its manifest the old copy counts, and needs its entries.
        return [] if self._changes else self.log.deletable(self._is_covered)

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files, each durably before the next. Blocks, raises OSError."""
        for path in paths:
            self.disk.remove(path)
            self.disk.sync_directory(path.parent)

    def write_snapshot(self, copy: Copy, kept: Sequence[Logged]) -> None:
        """Write a snapshot of the present state of a copy. Blocks, raises OSError."""
        frozen = copy.table.freeze()
        header = self.header_of(frozen)
        file = self.create_snapshot(header)
        for piece in encode_snapshot(header, frozen, kept):
            file.write(piece)
        file.finish()
        self.snapshots[copy.shard] = SnapshotInfo(header.name, file.publish())

    # --- space ----------------------------------------------------------------------------------------

    def snapshot_estimate(self, shard: int) -> int:
        """About the length of the next snapshot of a shard."""
        copy = self.copies.get(shard)
        return 0 if copy is None else copy.table.bytes_estimate() * 9 // 8 + 4 * KIB

    def reserve_bytes(self) -> int:
        """Free space below which nothing may grow: room for the entries in flight, and for snapshots of everything in
        the log, because only snapshots make the log shorter."""
        return SPACE_RESERVE_BYTES + self.log.total_bytes + self._largest_estimate()

    def _largest_estimate(self) -> int:
        """The longest next snapshot of all shards in the log. Each call estimates a few shards again, in turn: all of
        them would take milliseconds."""
        shards = list(self.log.positions)
        for _ in range(min(len(shards), ESTIMATES_AT_ONCE)):
            self._estimate_turn = (self._estimate_turn + 1) % len(shards)
            shard = shards[self._estimate_turn]
            self._estimates[shard] = self.snapshot_estimate(shard)
        return max(self._estimates.values(), default=0)

    def space_level(self, level: int = 0) -> tuple[int, bool]:
        """How short of space the disk is, as in the SPACE frame, and whether the log should be shortened. `level` is
        the last one: it is left only when an eighth more is free than the bound, so that it does not flicker. Blocks
        for a moment, raises OSError."""
        free_bytes = self.disk.free_bytes(self.directory)
        reserve_bytes = self.reserve_bytes()
        now = 0
        for number, bound in ((1, reserve_bytes), (2, SPACE_RESERVE_BYTES // 2)):
            if free_bytes < (bound + bound // 8 if level >= number else bound):
                now = number
        return now, free_bytes < reserve_bytes + reserve_bytes // 2

    def has_room_for(self, shard: int) -> bool:
        """Whether a snapshot of the shard leaves the space that deletions need. Blocks for a moment, raises OSError."""
        needed_bytes = SPACE_RESERVE_BYTES // 2 + self.snapshot_estimate(shard)
        return self.disk.free_bytes(self.directory) >= needed_bytes

    # --- copies that come and go ----------------------------------------------------------------------

    def begin_change(
        self, copies: Iterable[Copy], pulled: tuple[SnapshotHeader, int] | None = None
    ) -> tuple[bytes, list[Path]]:
        """Change the copies: some were dropped, or one was replaced by a `pulled` one, whose snapshot (header, length)
        is published. Returns the manifest to write, and the files that are useless after that. When the manifest is
        written, call `end_change`, then remove the files."""
        self._changes += 1
        manifest = self.encode_manifest(copies)
        needless = [
            shard for shard, info in self.snapshots.items()
            if shard not in self.copies or self.copies[shard].generation != info.name.generation
        ]  # fmt: skip
        paths = [self.snapshot_directory / self.snapshots.pop(shard).name.file for shard in needless]
        if pulled is not None:
            header, size = pulled
            self.snapshots[header.shard] = SnapshotInfo(header.name, size)
        return manifest, paths

    def end_change(self) -> None:
        """Take note that the manifest of a change is written."""
        self._changes -= 1

    # --- manifest and end -----------------------------------------------------------------------------

    def write_record(self, prepared: Prepared, manifest: bytes | None) -> None:
        """Write a record, and the manifest if the record begins a segment. Blocks. After an OSError the content of the
        disk is unknown."""
        self.log.write(prepared)
        if manifest is not None:
            self.write_manifest(manifest)

    def manifest_for(self, prepared: Prepared) -> bytes | None:
        """The manifest to write with a record; None unless the record begins a segment. The manifest names the newest
        segment, so that its loss is noticed."""
        if prepared.header is None:
            return None
        self._fill_manifest()
        return replace(self.manifest, segment=prepared.segment.first_lsn).encode()

    def encode_manifest(self, copies: Iterable[Copy]) -> bytes:
        """Take `copies` over, and return the manifest with them for `write_manifest`."""
        self.copies = {copy.shard: copy for copy in copies}
        self._fill_manifest()
        return self.manifest.encode()

    def _fill_manifest(self) -> None:
        """Set the fields of the manifest that follow from copies and log."""
        written = [segment.first_lsn for segment in self.log.segments if segment.is_written]
        self.manifest.segment = max(written, default=self.manifest.segment)
        self.manifest.durable_lsn = max(self.manifest.durable_lsn, self.log.durable_lsn)
        self.manifest.shards = {
            copy.shard: (copy.disk, copy.generation, copy.complete, copy.reason) for copy in self.copies.values()
        }

    def write_manifest(self, data: bytes) -> None:
        """Replace the manifest on the disk. Blocks, raises OSError."""
        write_manifest(self.disk, self.directory, data)

    def close_clean(self) -> None:
        """Make everything written durable, cover it by a mark, and note the clean end in the manifest. Every prepared
        record must be written. Blocks, raises OSError."""
        self.log.sync_all()
        self.log.durable_lsn = self.log.last_lsn
        # The manifest does not count the mark that follows: it has no entries, so its loss is no damage.
        data_lsn = max(self.manifest.durable_lsn, self.log.last_lsn)
        mark = self.log.prepare_mark()
        self.log.write(mark)
        self.log.sync_all()
        self.log.written(mark)
        self.log.close()
        self._fill_manifest()
        self.manifest.clean, self.manifest.durable_lsn = True, data_lsn
        self.write_manifest(self.manifest.encode())


def open_store(
    disk: Disk, directory: Path, durability: str, new_id: Callable[[int], bytes], boot: str,
    progress: ReplayProgress = lambda *_: None, segment_bytes_max: int = SEGMENT_BYTES_MAX,
) -> NodeStore:  # fmt: skip
    """Recover the store in `directory`, or make a new one. `new_id` returns so many random bytes, `boot` is the present
    boot of the machine. Blocks. Raises StoreError, OSError.
    """
    manifest = read_store_manifest(disk, directory)
    for name in (log.DIRECTORY, snapshot.DIRECTORY):
        disk.make_directory(directory / name)
        disk.sync_directory(directory / name)
    disk.sync_directory(directory)  # a killed process may have left names that are not durable; from here on they count
    if manifest is None:
        if has_data(disk, directory):
            raise StoreError(NO_MANIFEST.format(directory=directory))
        manifest = Manifest(new_id(DIRECTORY_BYTES), durability)
        write_manifest(disk, directory, manifest.encode())  # before log and snapshots, which carry its directory id
    try:
        replayed = replay(disk, directory, manifest, progress, manifest.power_failed(boot))
    except VersionError as error:
        raise StoreError(f"{directory}: {error}") from error
    writer = LogWriter(
        disk, directory / log.DIRECTORY, manifest.directory, lambda: new_id(SALT_BYTES), sync=durability == "sync",
        segment_bytes_max=segment_bytes_max,
    )  # fmt: skip
    store = NodeStore(disk, directory, manifest, writer, replayed)
    _settle(store, replayed, lambda: new_id(DISK_ID_BYTES).hex(), boot)
    manifest.durability, manifest.boot, manifest.clean = durability, boot, False
    store.write_manifest(store.encode_manifest(store.copies.values()))
    store.remove(path for path in replayed.stale if disk.exists(path))
    return store


def has_data(disk: Disk, directory: Path) -> bool:
    """Whether a data directory has a log or a snapshot. Raises OSError."""
    parts = (directory / log.DIRECTORY, directory / snapshot.DIRECTORY)
    return any(disk.exists(part) and disk.list(part) for part in parts)


def read_store_manifest(disk: Disk, directory: Path) -> Manifest | None:
    """The manifest, None if there is none. Raises StoreError, OSError."""
    try:
        return read_manifest(disk, directory)
    except VersionError as error:
        raise StoreError(f"{directory / 'manifest.json'} is of another version: {error}") from error
    except FormatError as error:
        raise StoreError(
            f"{directory / 'manifest.json'} is damaged: {error}; put back the file that belongs to this data, or the "
            "whole directory; without it the node begins anew, as one that lost its data (move the directory away)"
        ) from error


def _settle(store: NodeStore, replayed: Replayed, new_disk: Callable[[], str], boot: str) -> None:
    """Give up copies that are in doubt, then begin a segment."""
    manifest = store.manifest
    renamed = False
    # A copy in doubt is incomplete on the disk before anything else changes. Otherwise a crash could leave a directory
    # without the damage and with a copy that still counts as complete.
    for shard, reason in replayed.doubts.items():
        old = store.copies[shard]
        store.copies[shard] = Copy(shard, new_disk(), generation=old.generation, complete=False, reason=reason)
        store.snapshots.pop(shard, None)
        renamed = True
    if manifest.power_failed(boot):
        for copy in store.copies.values():
            copy.disk, copy.reason = new_disk(), copy.reason or POWER_CUT
        renamed = bool(store.copies)
        manifest.boot = boot  # the power cut is dealt with: a restart of the process must not change the ids again
    if renamed:
        store.write_manifest(store.encode_manifest(store.copies.values()))
    positions = dict(replayed.positions)
    for shard, copy in store.copies.items():
        if copy.complete and copy.table.seq:
            positions[shard] = (copy.generation, copy.table.seq, copy.table.chain)
        elif not copy.complete:
            positions.pop(shard, None)
    if replayed.log_damaged:
        # Nothing of the old log is used again: what it has of whole copies goes into snapshots, the rest aside.
        for copy in store.copies.values():
            if copy.complete and copy.table.seq:
                older = store.snapshots.get(copy.shard)
                store.write_snapshot(copy, store.backlog.of_shard(copy.shard))
                if older is not None and older.name != store.snapshots[copy.shard].name:
                    replayed.stale.append(store.snapshot_directory / older.name.file)
        store.log.begin([], replayed.last_lsn + 1, [], positions, positions)
    else:
        store.log.begin(
            replayed.segments, replayed.mark + 1, replayed.tail, replayed.mark_positions, positions
        )
    if replayed.damages or replayed.doubts or replayed.given_up:
        _move_aside(store, replayed)


def _move_aside(store: NodeStore, replayed: Replayed) -> None:
    """Move damaged files, and those of copies that were given up, out of the way: nothing depends on them any more."""
    disk, directory = store.disk, store.directory
    disk.make_directory(directory / ASIDE)
    number = 1 + max((int(name) for name in disk.list(directory / ASIDE) if name.isdigit()), default=0)
    aside = store.aside = directory / ASIDE / str(number)
    disk.make_directory(aside)
    present = store.log.segments[-1].path.name
    moved: list[Path] = []
    if replayed.log_damaged:
        names = disk.list(directory / log.DIRECTORY)
        moved += [directory / log.DIRECTORY / name for name in names if name.endswith(log.SUFFIX) and name != present]
    wanted = {info.name.file for info in store.snapshots.values()}
    bad = {damage.path for damage in replayed.damages}.union(replayed.given_up)
    for name in disk.list(store.snapshot_directory):
        parsed = SnapshotName.parse(name)
        path = store.snapshot_directory / name
        if parsed is not None and name not in wanted and (parsed.shard in replayed.doubts or path in bad):
            moved.append(path)
    for path in sorted(moved, key=lambda path: path in bad):
        # Damaged files last: as long as they are in their places, an interrupted opening is repeated.
        disk.rename(path, aside / path.name)
    for parent in {path.parent for path in moved}:
        disk.sync_directory(parent)
    disk.sync_directory(aside)
    if not moved:
        with contextlib.suppress(OSError):  # an empty directory does no harm
            disk.remove_tree(aside)
        store.aside = None
