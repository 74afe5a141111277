"""One bit of a node's files is wrong: a thousand random places, and never other data is served as data.

After each flip the directory is opened. Either every shard is exactly what was acknowledged, or it is incomplete with a
reason that names the file, or the start is refused with a sentence that names it, or the log is cut above every durable
mark. A flip that changes nothing is only one in bytes that nobody reads; which those are is worked out beforehand.

    KVTCP_FLIPS=100000 KVTCP_SEED=7 python -m pytest tests/crash/test_bit_flips.py -s
"""

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from kvtcp.storage.disk.log_format import RECORD_BYTES, parse_header, parse_records
from kvtcp.storage.disk.manifest import read_manifest
from kvtcp.storage.disk.replay import replay
from kvtcp.storage.disk.store import NodeStore, StoreError
from tests.crash.disk import CrashDisk
from tests.support import storage_tools as tools

FLIPS = int(os.environ.get("KVTCP_FLIPS", "1000"))
SEED = int(os.environ.get("KVTCP_SEED", str(time.time_ns() % 10**6)))
SHARDS = 5


@dataclass
class Origin:
    """A directory as a node left it, and what may become of a flipped bit in it."""

    disk: CrashDisk
    durability: str
    acknowledged: tools.State
    before_tail: tools.State  # if the record above the mark is cut
    tail: tuple[Path, int, int]  # where that record is
    unread: dict[Path, tuple[int, int]]  # bytes that nobody reads


def build(durability: str, ending: str) -> Origin:
    """Several lives of a node: snapshots, deleted segments, a kill with a record above the mark, and an ending."""
    disk = CrashDisk()
    store = tools.open_small(disk, durability=durability)
    tools.add_copies(store, SHARDS)
    tools.fill(store, 20, SHARDS)
    for shard in (0, 1, 2, 3, 4, 1):
        tools.take_snapshot(store, shard)
        tools.fill(store, 3, SHARDS, first=20 + 3 * shard)
    disk = disk.process_kill()
    store = tools.open_small(disk, durability=durability, seed=1)  # what was above the mark is void in the older one
    tools.fill(store, 9, SHARDS, first=50)
    store.write_snapshot(store.copies[2], store.backlog.of_shard(2))  # the older one stays: killed before its removal
    tools.mark(store)
    before_tail = tools.state_of(store.copies)
    if ending == "killed":
        prepared = store.log.prepare([tools.put(store.copies[shard], b"tail", b"value") for shard in (0, 3)])
        store.log.write(prepared)
        store.log.written(prepared)
    else:
        store.close_clean()
    return Origin(disk, durability, tools.state_of(store.copies), before_tail, tail_of(disk, store), unread_of(disk))


def bounds(disk: CrashDisk, path: Path) -> dict[int, tuple[int, int]]:
    """LSN -> first and last byte of each record."""
    data = disk.read(path)
    header = parse_header(data)
    found = {}
    offset = header.bytes
    for record in parse_records(data, header).records:
        end = offset + RECORD_BYTES + len(record.payload)
        found[record.lsn] = (offset, end)
        offset = end
    return found


def tail_of(disk: CrashDisk, store: NodeStore) -> tuple[Path, int, int]:
    """The last record: it is above the mark, and in mode sync the only one."""
    path = store.log.segments[-1].path
    return (path, *bounds(disk, path)[store.log.last_lsn])


def unread_of(disk: CrashDisk) -> dict[Path, tuple[int, int]]:
    """Stale snapshots, and what segments have of records that the next segment has again."""
    manifest = read_manifest(disk, tools.DIRECTORY)
    assert manifest is not None
    found = replay(disk, tools.DIRECTORY, manifest)
    assert not found.damages and not found.doubts
    unread = {path: (0, disk.size(path)) for path in found.stale}
    for segment, following in zip(found.segments, found.segments[1:], strict=False):
        void = [begin for lsn, (begin, _) in bounds(disk, segment.path).items() if lsn >= following.first_lsn]
        if void:
            unread[segment.path] = (min(void), segment.size)
    return unread


def judge(origin: Origin, path: Path, bit: int, seed: int) -> str:
    """Flip, open, and open again; the verdict. Raises AssertionError for one that must not be."""
    disk = origin.disk.process_kill()
    disk.flip_bit(path, bit)
    byte = bit // 8
    first, last = origin.unread.get(path, (0, 0))
    is_unread = first <= byte < last
    is_tail = path == origin.tail[0] and origin.tail[1] <= byte < origin.tail[2]
    try:
        store = tools.open_small(disk, durability=origin.durability, seed=seed)
    except StoreError as refused:
        assert str(path) in str(refused) and not is_unread and path.name == "manifest.json"
        return "refused"
    state = tools.state_of(store.copies)
    incomplete = {shard for shard, copy in store.copies.items() if not copy.complete}
    assert set(state) == set(range(SHARDS))
    for shard in incomplete:
        assert str(path) in store.copies[shard].reason, store.copies[shard].reason
    whole = {shard: row for shard, row in state.items() if shard not in incomplete}
    again = tools.open_small(disk, durability=origin.durability, seed=seed + 1)
    assert tools.state_of(again.copies) == state and not again.damages, "it is met once"
    if is_tail and not store.damages:
        assert state == origin.before_tail and not incomplete
        return "cut above every mark"
    assert whole == {shard: row for shard, row in origin.acknowledged.items() if shard not in incomplete}
    if is_unread:
        assert not store.damages and not incomplete
        return "unread"
    assert [damage.path for damage in store.damages] == [path], "it is told which file"
    assert store.aside is not None and path.name in disk.list(store.aside), "and the file is kept"
    return "incomplete" if incomplete else "damage without loss"


@pytest.mark.parametrize("durability", ["sync", "os"])
@pytest.mark.parametrize("ending", ["killed", "stopped"])
def test_a_flipped_bit_is_never_data(durability: str, ending: str) -> None:
    """Every flip changes the verdict, unless it is where nobody reads."""
    print(f"seed {SEED}")
    rng = Random(f"{SEED} {durability} {ending}")
    origin = build(durability, ending)
    files = [
        (Path(name), len(data)) for name, data in origin.disk.tree().items() if data is not None and "aside" not in name
    ]
    assert sum("snapshots" in path.parts for path, _ in files) >= SHARDS and len(files) >= SHARDS + 4
    verdicts: Counter[str] = Counter()
    for number in range(FLIPS // 4):
        path, size = rng.choices(files, [size for _, size in files])[0]
        bit = rng.randrange(8 * size)
        try:
            verdict = judge(origin, path, bit, 10 + number)
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}: bit {bit} of {path} ({durability}, {ending}): {error}") from error
        verdicts[verdict] += 1
    print(durability, ending, dict(verdicts))
    found = verdicts["incomplete"] + verdicts["damage without loss"] + verdicts["refused"]
    assert found > FLIPS // 4 * 0.5
    assert verdicts["refused"] and verdicts["incomplete"] and verdicts["damage without loss"]
    assert sum(verdicts.values()) == FLIPS // 4
