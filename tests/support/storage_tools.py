"""Small stores for tests: a disk in memory, segments of a few records, copies that are written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from kvtcp.protocol import operations as op
from kvtcp.storage.disk.snapshot import SnapshotHeader, decode_snapshot, encode_snapshot
from kvtcp.storage.disk.store import NodeStore, open_store
from kvtcp.storage.files import Disk
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged, Table
from tests.crash.disk import CrashDisk

DIRECTORY = Path("/node")
SEGMENT_BYTES = 300
BOOT = "boot 1"

State = dict[int, tuple[tuple[int, int, int], int]]  # shard -> position, digest


def ids(seed: int = 0) -> Callable[[int], bytes]:
    """A source of random bytes that repeats."""
    return Random(seed).randbytes


def open_small(
    disk: Disk, *, durability: str = "sync", boot: str = BOOT, seed: int = 0, directory: Path = DIRECTORY,
    segment_bytes: int = SEGMENT_BYTES,
) -> NodeStore:  # fmt: skip
    """A store whose segments hold a few records. The `seed` is another one for every opening of a test."""
    return open_store(disk, directory, durability, ids(seed), boot, segment_bytes_max=segment_bytes)


def add_copies(store: NodeStore, shards: int = 3) -> None:
    """New, empty copies, as a HELLO makes them."""
    copies = dict(store.copies)
    for shard in range(shards):
        copies.setdefault(shard, Copy(shard, f"disk {shard}"))
    store.write_manifest(store.encode_manifest(copies.values()))


def put(copy: Copy, key: bytes, value: bytes, epoch: int = 1) -> Logged:
    """Apply a put; the entry to log."""
    table = copy.table
    table.epoch = epoch
    table.apply((op.PUT, table.shard, table.seq + 1, 0, key, value), 1000)
    return (table.shard, table.generation, table.seq, table.chain, table.last_entry)


def commit(store: NodeStore, entries: list[Logged]) -> None:
    """One group commit, as the server does it with its two threads."""
    prepared = store.log.prepare(entries)
    store.write_record(prepared, store.manifest_for(prepared))
    store.log.written(prepared)
    store.backlog.add(0, entries)


def mark(store: NodeStore) -> None:
    """What a log that is idle gets."""
    prepared = store.log.prepare_mark()
    store.write_record(prepared, store.manifest_for(prepared))
    store.log.written(prepared)


def fill(store: NodeStore, records: int, shards: int = 3, first: int = 0) -> None:
    """So many records; each has an entry of one or two shards."""
    for number in range(first, first + records):
        entries = [put(store.copies[number % shards], b"k%d" % (number % 7), b"v%d" % number)]
        if number % 2:
            entries.append(put(store.copies[(number + 1) % shards], b"x%d" % (number % 5), b"w%d" % number))
        commit(store, entries)


def make(disk: Disk, records: int = 0, shards: int = 3, **options: Any) -> NodeStore:
    """A new store with this many records."""
    store = open_small(disk, **options)
    add_copies(store, shards)
    fill(store, records, shards)
    return store


def take_snapshot(store: NodeStore, shard: int) -> None:
    """Snapshot a shard and remove what nobody needs any more."""
    copy = store.copies[shard]
    frozen = copy.table.freeze()
    header = store.header_of(frozen)
    file = store.create_snapshot(header)
    for piece in encode_snapshot(header, frozen, store.backlog.of_shard(shard)):
        file.write(piece)
    file.finish()
    store.remove(store.published(header, file.publish()))


def pulled(store: NodeStore, shard: int, generation: int, rows: int, seq: int) -> tuple[Copy, SnapshotHeader, int]:
    """A copy as it comes from another member, its snapshot published and not yet in the manifest."""
    table = Table(shard)
    for number in range(1, rows + 1):
        table.apply((op.PUT, shard, number, 0, b"pulled %d" % number, b"v"), 1000)
    donated = table.freeze()
    header = SnapshotHeader(store.manifest.directory, shard, generation, 1, seq, 0 if seq != rows else table.chain)
    file = store.create_snapshot(header)
    data = b"".join(encode_snapshot(header, donated, []))
    file.write(data)
    file.finish()
    loaded, _ = decode_snapshot(data, header.name, store.manifest.directory)
    return Copy(shard, f"disk {shard}/{generation}", generation=generation, table=loaded), header, file.publish()


def change(store: NodeStore, *copies: Copy, pulled: tuple[SnapshotHeader, int] | None = None) -> None:
    """These are the copies from now on."""
    manifest, paths = store.begin_change(copies, pulled)
    store.write_manifest(manifest)
    store.end_change()
    store.remove(paths)


def state_of(tables: dict[int, Table] | dict[int, Copy]) -> State:
    """Where every shard is, and what is in it."""
    found: State = {}
    for shard, one in sorted(tables.items()):
        table = one.table if isinstance(one, Copy) else one
        table.check()
        found[shard] = (table.position, table.digest())
    return found


def names(disk: Disk, folder: str = "log", directory: Path = DIRECTORY) -> list[str]:
    """What is in a folder of the store."""
    return disk.list(directory / folder)


def new_disk() -> CrashDisk:
    """An empty disk in memory."""
    return CrashDisk()


def replace_file(disk: CrashDisk, path: Path, data: bytes) -> None:
    """Give a file another content."""
    disk.remove(path)
    file = disk.create(path)
    file.write(data)
    file.sync()
    file.close()
    disk.sync_directory(path.parent)
