"""The store: opening what a crash or a damage left, settling it once, and stopping in order."""

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtcp.constants import SPACE_RESERVE_BYTES
from kvtcp.storage.disk import log_format, snapshot
from kvtcp.storage.disk.log_format import RECORD_BYTES, parse_header, parse_records
from kvtcp.storage.disk.manifest import Manifest, read_manifest
from kvtcp.storage.disk.snapshot import encode_snapshot
from kvtcp.storage.disk.store import ASIDE, POWER_CUT, NodeStore, StoreError
from kvtcp.storage.shard.copy import Copy
from tests.crash.disk import CrashDisk
from tests.crash.fake_disk import FaultyDisk, QuickDisk
from tests.support import storage_tools as tools


def disks(store: NodeStore) -> dict[int, str]:
    """The uuids of the copies."""
    return {shard: copy.disk for shard, copy in store.copies.items()}


def verdict(store: NodeStore) -> dict[int, Any]:
    """What a report would say of each shard, the names of new disks excepted."""
    state = tools.state_of(store.copies)
    return {
        shard: (copy.generation, state[shard], copy.disk) if copy.complete else (copy.generation, "incomplete")
        for shard, copy in store.copies.items()
    }


def worked(disk: Any, **options: Any) -> NodeStore:
    """A store with several segments, two snapshots, some segments deleted, and entries beyond."""
    store = tools.make(disk, 12, **options)
    for shard in range(3):
        tools.take_snapshot(store, shard)
    tools.fill(store, 9, first=12)
    tools.take_snapshot(store, 1)
    tools.fill(store, 4, first=21)
    return store


def dying(disk: CrashDisk, calls: int) -> Iterator[CrashDisk]:
    """Disks of a killed process on which one of the calls is the last that is tried, each of them once."""
    for number in range(1, calls + 1):
        one = disk.process_kill()
        one.fail_at, one.dead = number, True
        yield one


# --- opening ----------------------------------------------------------------------------------------


def test_a_new_directory(disk: CrashDisk) -> None:
    """Everything is made, the manifest first: a crash in the middle leaves what the next start takes up."""
    store = tools.open_small(disk)
    assert store.copies == {} and store.log.last_lsn == 0 and not store.manifest.clean
    made = [path.name for what, path in disk.calls if what == "create"]
    assert made[0] == "manifest.json.tmp"
    manifest = read_manifest(disk, tools.DIRECTORY)
    assert manifest == store.manifest
    assert (manifest.segment, manifest.boot, manifest.durability) == (1, tools.BOOT, "sync")
    for number in range(1, len(disk.calls) + 1):
        broken = CrashDisk(fail_at=number, dead=True)
        with pytest.raises(OSError, match="Input/output"):
            tools.open_small(broken)
        again = broken.process_kill()
        store = tools.open_small(again, seed=1)
        tools.add_copies(store)
        tools.fill(store, 3)
        assert tools.state_of(tools.open_small(again.process_kill(), seed=2).copies) == tools.state_of(store.copies)


def test_opening_again_after_a_kill(disk: CrashDisk) -> None:
    """Killed at any point between two records, the same is there again, with the same uuids, however often."""
    store = worked(disk)
    for seed in range(1, 5):
        again = tools.open_small(disk.process_kill(), seed=seed)
        assert verdict(again) == verdict(store) and not again.damages and again.aside is None
        disk = again.disk  # type: ignore[assignment]
    assert [entry[2] for entry in again.backlog.of_shard(0)][-1] == store.copies[0].table.seq
    tools.fill(again, 5, first=25)
    last = tools.open_small(disk.process_kill(), seed=9)
    assert tools.state_of(last.copies) == tools.state_of(again.copies)


def test_stopped_in_order(disk: CrashDisk) -> None:
    """A clean stop is in the manifest until the next start; everything is covered by a mark."""
    store = worked(disk)
    last = store.log.last_lsn
    store.close_clean()
    manifest = read_manifest(disk, tools.DIRECTORY)
    assert manifest is not None and manifest.clean
    assert manifest.segment == store.log.segments[-1].first_lsn, "none may be missing"
    again = tools.open_small(disk, seed=1)
    assert verdict(again) == verdict(store) and again.log.last_lsn == last + 1
    manifest = read_manifest(disk, tools.DIRECTORY)
    assert manifest is not None and not manifest.clean


def test_a_lost_last_segment_after_a_clean_stop(disk: CrashDisk) -> None:
    """The manifest knows the newest segment there was, also if it was begun long after the start."""
    store = worked(disk)
    store.close_clean()
    disk.remove(store.log.segments[-1].path)
    again = tools.open_small(disk, seed=1)
    assert not any(copy.complete for copy in again.copies.values())
    assert again.log.segments[-1].first_lsn > store.log.segments[-1].first_lsn


def test_a_lost_last_segment_after_a_kill(disk: CrashDisk) -> None:
    """The manifest is written with each new segment, so the newest one cannot get lost unnoticed."""
    store = worked(disk)
    assert len(store.log.segments) > 2, "it rotated"
    disk.remove(store.log.segments[-1].path)
    again = tools.open_small(disk, seed=1)
    assert not any(copy.complete for copy in again.copies.values())


@pytest.mark.parametrize("cut", ["within the last record of data", "before the last record of data"])
def test_a_log_that_was_cut_off_after_a_clean_stop(disk: CrashDisk, cut: str) -> None:
    """It is damage, also where it ends with a whole record: the manifest knows how far it went."""
    store = tools.make(disk, 2)
    store.close_clean()
    path = store.log.segments[-1].path
    data = disk.read(path)
    found = parse_records(data, parse_header(data))
    sizes = [RECORD_BYTES + len(record.payload) for record in found.records]
    assert len(sizes) >= 2 and not found.records[-1].entries(), "the mark of the end"
    end = len(data) - sizes[-1] - (sizes[-2] if cut.startswith("before") else 3)
    tools.replace_file(disk, path, data[:end])
    again = tools.open_small(disk, seed=1)
    assert again.damages and not all(copy.complete for copy in again.copies.values())


def test_the_mark_of_a_clean_stop_may_be_missing(disk: CrashDisk) -> None:
    """It has no entry: without it nothing is missing."""
    store = worked(disk)
    store.close_clean()
    path = store.log.segments[-1].path
    data = disk.read(path)
    found = parse_records(data, parse_header(data))
    tools.replace_file(disk, path, data[: len(data) - RECORD_BYTES - len(found.records[-1].payload)])
    again = tools.open_small(disk, seed=1)
    assert verdict(again) == verdict(store) and not again.damages


def test_stale_files_are_removed(disk: CrashDisk) -> None:
    """Temporary files and older snapshots go when everything is settled."""
    store = worked(disk)
    tools.fill(store, 3, first=25)
    older = store.snapshots[0].name.file
    store.write_snapshot(store.copies[0], [])
    disk.create(tools.DIRECTORY / "log" / f"{77:020d}.log.tmp")
    disk.create(tools.DIRECTORY / "snapshots" / "0002-1-00000000000000000099.snapshot.tmp")
    again = tools.open_small(disk, seed=1)
    assert older not in tools.names(disk, "snapshots") and len(tools.names(disk, "snapshots")) == 3
    assert not any(name.endswith(".tmp") for name in [*tools.names(disk), *tools.names(disk, "snapshots")])
    assert verdict(again) == verdict(store)


def test_many_restarts_do_not_grow_the_log(disk: CrashDisk) -> None:
    """A start that finds nothing new begins the same segment again."""
    store = worked(disk)
    for seed in range(1, 4):
        store = tools.open_small(disk, seed=seed)
    count = len(tools.names(disk))
    for seed in range(4, 12):
        store = tools.open_small(disk, seed=seed)
    assert len(tools.names(disk)) == count == len(store.log.segments)


# --- refusals ---------------------------------------------------------------------------------------


def test_data_without_a_manifest(disk: CrashDisk) -> None:
    """Nobody knows whose data it is: one sentence, and nothing is changed."""
    worked(disk)
    disk.remove(tools.DIRECTORY / "manifest.json")
    before = disk.tree()
    with pytest.raises(StoreError, match="/node has data and no manifest.json: put back"):
        tools.open_small(disk, seed=1)
    assert disk.tree() == before


@pytest.mark.parametrize(("edit", "sentence"), [
    (lambda data: data[:-3], "manifest.json is damaged: it is not a manifest"),
    (lambda data: data.replace(b'"promised": 0', b'"promised": 7'), "manifest.json is damaged: its sum is wrong"),
    (lambda data: data.replace(b'"format": 1', b'"format": 2'), "manifest.json is of another version"),
    (lambda data: b"", "manifest.json is damaged"),
])  # fmt: skip
def test_a_damaged_manifest(disk: CrashDisk, edit: Callable[[bytes], bytes], sentence: str) -> None:
    """It is refused with a sentence, and nothing is changed."""
    worked(disk)
    path = tools.DIRECTORY / "manifest.json"
    tools.replace_file(disk, path, edit(disk.read(path)))
    before = disk.tree()
    with pytest.raises(StoreError, match=sentence):
        tools.open_small(disk, seed=1)
    assert disk.tree() == before


def test_files_of_another_version(disk: CrashDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log or a snapshot that a later version wrote is refused, not given up."""
    for module, name in ((log_format, "LOG_FORMAT_VERSION"), (snapshot, "SNAPSHOT_FORMAT_VERSION")):
        disk = CrashDisk()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 9)
            worked(disk)
        manifest = disk.read(tools.DIRECTORY / "manifest.json")
        with pytest.raises(StoreError, match="has format 9, this version of kvtcp knows format 1"):
            tools.open_small(disk, seed=1)
        assert disk.read(tools.DIRECTORY / "manifest.json") == manifest


# --- a power cut in a mode that does not sync ---------------------------------------------------------


def test_power_cut_in_mode_os(disk: CrashDisk) -> None:
    """Another boot after an end that was not in order: every copy has a new uuid, once."""
    store = worked(disk, durability="os")
    cut = tools.open_small(disk, durability="os", boot="boot 2", seed=1)
    assert tools.state_of(cut.copies) == tools.state_of(store.copies)
    assert not set(disks(cut).values()) & set(disks(store).values())
    assert all(copy.complete and copy.reason == POWER_CUT for copy in cut.copies.values())
    again = tools.open_small(disk, durability="os", boot="boot 2", seed=2)
    assert disks(again) == disks(cut)


@pytest.mark.parametrize(("first", "boot", "clean"), [
    ("os", tools.BOOT, False), ("os", "boot 2", True), ("sync", "boot 2", False), ("sync", tools.BOOT, False),
])  # fmt: skip
def test_the_same_uuids(disk: CrashDisk, first: str, boot: str, clean: bool) -> None:
    """In the same boot, after a clean stop or in mode sync nothing is missing."""
    store = worked(disk, durability=first)
    if clean:
        store.close_clean()
    again = tools.open_small(disk, durability="os", boot=boot, seed=1)
    assert verdict(again) == verdict(store)


def test_from_os_to_sync_and_back(disk: CrashDisk) -> None:
    """After a start in mode sync everything is on the disk: the mode of the last process counts."""
    worked(disk, durability="os")
    store = tools.open_small(disk, durability="sync", seed=1)
    assert disks(tools.open_small(disk, durability="os", boot="boot 2", seed=2)) == disks(store)
    assert disks(tools.open_small(disk, durability="sync", boot="boot 3", seed=3)) != disks(store)


def test_a_power_cut_while_the_new_uuids_are_written(disk: CrashDisk) -> None:
    """Whatever call the second start dies in, the third comes to new uuids, and the fourth to the same as the third."""
    store = worked(disk, durability="os")
    probe = disk.process_kill()
    tools.open_small(probe, durability="os", boot="boot 2", seed=1)
    for one in dying(disk, len(probe.calls)):
        with pytest.raises(OSError, match="Input/output"):
            tools.open_small(one, durability="os", boot="boot 2", seed=1)
        left = one.process_kill()
        third = tools.open_small(left, durability="os", boot="boot 2", seed=2)
        assert not set(disks(third).values()) & set(disks(store).values()), one.fail_at
        assert tools.state_of(third.copies) == tools.state_of(store.copies)
        assert disks(tools.open_small(left, durability="os", boot="boot 2", seed=3)) == disks(third)


# --- damage -----------------------------------------------------------------------------------------


def flip(disk: CrashDisk, path: Path, offset: int) -> None:
    """Damage a byte."""
    disk.flip_bit(path, offset * 8 + 2)


def snapshot_of(store: NodeStore, shard: int = 0) -> Path:
    """The file of a snapshot."""
    return tools.DIRECTORY / "snapshots" / store.snapshots[shard].name.file


def middle_of(store: NodeStore) -> Path:
    """The segment in the middle of the log."""
    return store.log.segments[len(store.log.segments) // 2].path


def damage_last(disk: CrashDisk, store: NodeStore) -> None:
    tools.mark(store)
    flip(disk, store.log.segments[-1].path, store.log.segments[-1].size - 40)


def damage_covered_snapshot(disk: CrashDisk, store: NodeStore) -> None:
    store.write_snapshot(store.copies[2], [])
    flip(disk, snapshot_of(store, 2), 70)


def damage_both(disk: CrashDisk, store: NodeStore) -> None:
    flip(disk, snapshot_of(store), 70)
    flip(disk, middle_of(store), 100)


def lose_newest(disk: CrashDisk, store: NodeStore) -> None:
    store.write_manifest(store.encode_manifest(store.copies.values()))
    disk.remove(store.log.segments[-1].path)


def tear(disk: CrashDisk, store: NodeStore) -> None:
    path = store.log.segments[-1].path
    tools.commit(store, [tools.put(store.copies[0], b"torn", b"v")])
    tools.replace_file(disk, path, disk.read(path)[:-5])


DAMAGES: dict[str, Callable[[CrashDisk, NodeStore], object]] = {
    "damage_oldest": lambda disk, store: flip(disk, store.log.segments[0].path, store.log.segments[0].size - 3),
    "damage_middle": lambda disk, store: flip(disk, middle_of(store), 100),
    "damage_header": lambda disk, store: flip(disk, store.log.segments[-2].path, 30),
    "damage_last": damage_last,
    "damage_snapshot": lambda disk, store: flip(disk, snapshot_of(store), 70),
    "damage_covered_snapshot": damage_covered_snapshot,
    "damage_both": damage_both,
    "lose_oldest": lambda disk, store: disk.remove(store.log.segments[0].path),
    "lose_middle": lambda disk, store: disk.remove(middle_of(store)),
    "lose_newest": lose_newest,
    "lose_snapshot": lambda disk, store: disk.remove(snapshot_of(store)),
    "tear": tear,
    "nothing": lambda disk, store: None,  # a kill alone
}


def before_damage(disk: CrashDisk) -> NodeStore:
    """A store with snapshots and at least five segments."""
    store = worked(disk)
    tools.fill(store, 6, first=25)
    assert len(store.log.segments) >= 5
    return store


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_met_once(disk: CrashDisk, damage: str) -> None:
    """Shards that are complete are exactly what was acknowledged; the others say why; the next start finds the same
    and nothing more to settle, and what was damaged is kept aside."""
    store = before_damage(disk)
    DAMAGES[damage](disk, store)
    acknowledged = tools.state_of(store.copies)
    if damage == "tear":
        acknowledged = {**acknowledged, 0: tools.state_of(tools.open_small(disk.process_kill(), seed=7).copies)[0]}
        assert acknowledged[0][0][1] == store.copies[0].table.seq - 1
    files_before = disk.tree()
    first = tools.open_small(disk, seed=1)
    for shard, copy in first.copies.items():
        if copy.complete:
            assert tools.state_of({shard: copy}) == {shard: acknowledged[shard]} and copy.disk == f"disk {shard}"
        else:
            assert copy.reason and "/node/" in copy.reason and copy.disk != f"disk {shard}" and copy.table.seq == 0
    if damage in ("tear", "nothing"):
        assert all(copy.complete for copy in first.copies.values()) and first.aside is None and not first.damages
    elif damage in ("lose_snapshot", "lose_oldest"):
        assert not first.damages, "nothing that is there is wrong"
    else:
        assert first.damages
    if first.aside is not None:
        for name in disk.list(first.aside):
            content = disk.read(first.aside / name)
            assert content in files_before.values(), "kept as it was"
    for seed in (2, 3):
        again = tools.open_small(disk, seed=seed)
        assert verdict(again) == verdict(first) and disks(again) == disks(first)
        assert not again.damages and again.aside is None
    for number in range(6):
        whole = [copy for copy in again.copies.values() if copy.complete]
        tools.commit(again, [tools.put(copy, b"k%d" % number, b"new") for copy in whole])
    last = tools.open_small(disk, seed=4)
    assert tools.state_of(last.copies) == tools.state_of(again.copies) and not last.damages


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_process_dies_while_it_opens(disk: CrashDisk, damage: str) -> None:
    """Killed in any call of an opening, the next one comes to the same verdict, and loses no file that was damaged."""
    store = before_damage(disk)
    DAMAGES[damage](disk, store)
    probe = disk.process_kill()
    expected = tools.open_small(probe, seed=1)
    damaged = kept_aside(probe)
    for one in dying(disk, len(probe.calls)):
        with pytest.raises(OSError, match="Input/output"):
            tools.open_small(one, seed=1)
        left = one.process_kill()
        again = tools.open_small(left, seed=2)
        assert verdict(again) == verdict(expected), one.calls[one.fail_at - 1]
        assert damaged <= kept_aside(left), one.calls[one.fail_at - 1]
        third = tools.open_small(left, seed=3)
        assert verdict(third) == verdict(expected) and disks(third) == disks(again) and not third.damages


def kept_aside(disk: CrashDisk) -> set[bytes]:
    """The content of all files that were kept aside."""
    aside = f"{tools.DIRECTORY}/{ASIDE}/"
    return {data for path, data in disk.tree().items() if path.startswith(aside) and data is not None}


@pytest.mark.parametrize("damage", ["nothing", "damage_middle", "damage_snapshot"])
def test_on_real_files(tmp_path: Path, damage: str) -> None:
    """The same with files of the system: a start that dies in any call, then another."""
    origin = tmp_path / "origin"
    store = worked(QuickDisk(), directory=origin)
    if damage == "damage_middle":
        path = store.log.segments[1].path
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    elif damage == "damage_snapshot":
        path = origin / "snapshots" / store.snapshots[0].name.file
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    probe = FaultyDisk()
    shutil.copytree(origin, tmp_path / "probe")
    expected = verdict(tools.open_small(probe, directory=tmp_path / "probe", seed=1))
    for number in range(1, len(probe.calls) + 1):
        directory = tmp_path / str(number)
        shutil.copytree(origin, directory)
        with pytest.raises(OSError, match="Input/output"):
            tools.open_small(FaultyDisk(number, dead=True), directory=directory, seed=1)
        assert verdict(tools.open_small(QuickDisk(), directory=directory, seed=2)) == expected, probe.calls[number - 1]
        shutil.rmtree(directory)


# --- a running store --------------------------------------------------------------------------------


def test_which_snapshot_is_due(disk: CrashDisk) -> None:
    """None while the log is short; then the shard that holds the oldest segment back."""
    store = tools.make(disk)
    tools.commit(store, [tools.put(store.copies[2], b"k", b"v")])
    tools.fill(store, 20, shards=2)
    assert store.due_snapshot(10**6) is None and store.due_snapshot(100) == 2
    assert store.behind() == [2, 0, 1]
    tools.take_snapshot(store, 2)
    assert store.due_snapshot(100) in (0, 1) and 2 not in store.behind()
    for shard in (0, 1):
        tools.take_snapshot(store, shard)
    assert store.behind() == [] and store.due_snapshot(100) is None and len(store.log.segments) == 1
    folder = tools.DIRECTORY / "snapshots"
    assert store.snapshot_bytes == sum(disk.size(folder / name) for name in disk.list(folder))


def test_old_files_go_in_order(disk: CrashDisk) -> None:
    """After a publication the older snapshot and then needless segments go, oldest first, each for good."""
    store = worked(disk)
    for shard in (0, 2):
        tools.take_snapshot(store, shard)
    tools.fill(store, 6, first=25)
    copy = store.copies[1]
    frozen = copy.table.freeze()
    header = store.header_of(frozen)
    frozen.close()
    store.write_snapshot(copy, [])
    store.snapshots[1] = store.snapshots[1].__class__(header.name.__class__(1, 1, 3), 5)
    paths = store.published(header, 100)
    assert paths[0].name == "0001-1-00000000000000000003.snapshot" and paths[1:] == sorted(paths[1:])
    before = len(disk.calls)
    store.remove(paths)
    assert [what for what, _ in disk.calls[before:]] == ["remove", "sync_directory"] * len(paths)


def test_a_snapshot_of_a_copy_that_was_begun_anew(disk: CrashDisk) -> None:
    """It does not take the place of the present copy's: it is removed."""
    store = worked(disk)
    copy = store.copies[0]
    frozen = copy.table.freeze()
    header = store.header_of(frozen)
    frozen.close()
    present = store.snapshots[0]
    copy.table.generation = 2
    assert store.published(header, 100) == [tools.DIRECTORY / "snapshots" / header.name.file]
    assert store.snapshots[0] == present


def test_levels_of_space(disk: CrashDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level is left only when there is an eighth more than what makes it."""
    store = tools.open_small(disk)
    reserve, half = store.reserve_bytes(), SPACE_RESERVE_BYTES // 2
    assert reserve == SPACE_RESERVE_BYTES + store.log.total_bytes, "what is in flight, and what the log may give back"
    free = [0]
    monkeypatch.setattr(disk, "free_bytes", lambda _: free[0])
    level = 0
    steps = [(reserve * 2, 0, False), (reserve, 0, True), (reserve - 1, 1, True), (reserve + reserve // 8 - 1, 1, True),
             (reserve + reserve // 8, 0, True), (half - 1, 2, True), (half + half // 8 - 1, 2, True),
             (half + half // 8, 1, True), (0, 2, True), (reserve * 2, 0, False)]  # fmt: skip
    for bytes_free, expected, tight in steps:
        free[0] = bytes_free
        assert store.space_level(level) == (expected, tight), bytes_free
        level = expected
    tools.add_copies(store)
    tools.fill(store, 12)
    for shard in range(3):
        tools.take_snapshot(store, shard)
    largest = max(map(store.snapshot_estimate, store.copies))
    assert largest >= max(info.size for info in store.snapshots.values())
    assert store.reserve_bytes() == SPACE_RESERVE_BYTES + store.log.total_bytes + largest
    free[0] = half + largest
    assert store.has_room_for(0)
    free[0] = half
    assert not store.has_room_for(0), "deletions need this space"


def test_a_full_disk_at_the_start(disk: CrashDisk) -> None:
    """Opening says that there is no space, and has changed nothing that matters."""
    store = worked(disk)
    expected = verdict(store)
    full = disk.process_kill()
    full.capacity_bytes = sum(len(data) for data in full.tree().values() if data is not None)
    with pytest.raises(OSError, match="No space") as refused:
        tools.open_small(full, seed=1)
    assert refused.value.errno == errno.ENOSPC
    full.capacity_bytes = 1 << 30
    assert verdict(tools.open_small(full, seed=2)) == expected


def test_errors_of_a_clean_stop(disk: CrashDisk) -> None:
    """Whatever call of it fails, the next start finds everything."""
    store = worked(disk)
    state: tools.State = tools.state_of(store.copies)
    before = len(disk.calls)
    probe = disk.process_kill()
    again = tools.open_small(probe, seed=1)
    begun = len(probe.calls)
    again.close_clean()
    for number in range(begun + 1, len(probe.calls) + 1):
        dying = disk.process_kill()
        again = tools.open_small(dying, seed=1)
        assert len(dying.calls) == begun
        dying.fail_at, dying.dead = number, True
        with pytest.raises(OSError, match="Input/output"):
            again.close_clean()
        last = tools.open_small(dying.process_kill(), seed=2)
        assert tools.state_of(last.copies) == state and all(copy.complete for copy in last.copies.values())
    assert len(disk.calls) == before


def test_a_manifest_is_not_behind_its_log(disk: CrashDisk) -> None:
    """`segment` names one that is on the disk, never one that is only prepared."""
    store = tools.make(disk, 10)
    newest = store.log.segments[-1].first_lsn
    store.log.begin_new_segment()
    prepared = store.log.prepare_mark()
    assert Manifest.parse(store.encode_manifest(store.copies.values())).segment == newest
    store.log.write(prepared)
    store.log.written(prepared)
    assert Manifest.parse(store.encode_manifest(store.copies.values())).segment == prepared.lsn


def test_estimates_are_made_in_turn(disk: CrashDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look for space costs the same however many shards there are; after some of them every shard was looked at."""
    store = tools.make(disk, shards=50, segment_bytes=10**6)
    before = store.reserve_bytes() - store.log.total_bytes
    sizes = [*[10] * 49, 9000]
    tools.commit(store, [tools.put(copy, b"k", b"v" * sizes[shard]) for shard, copy in store.copies.items()])
    looked: list[int] = []
    original = store.snapshot_estimate

    def snapshot_estimate(shard: int) -> int:
        looked.append(shard)
        return original(shard)

    monkeypatch.setattr(store, "snapshot_estimate", snapshot_estimate)
    for calls in range(1, 5):
        reserve = store.reserve_bytes() - store.log.total_bytes
        assert len(looked) == 16 * calls
    assert set(looked) == set(range(50)) and reserve - before > 9000


# --- copies that come and go ------------------------------------------------------------------------------


def test_a_copy_is_replaced(disk: CrashDisk) -> None:
    """From the manifest on it is the pulled one: entries of the old one in the log are not its entries, and its
    snapshot is gone; what is logged of the new one is there after a restart."""
    store = tools.make(disk, 12)
    tools.take_snapshot(store, 1)
    tools.fill(store, 6, first=12)
    copy, header, size = tools.pulled(store, 1, 2, 4, 4)
    tools.change(store, store.copies[0], copy, store.copies[2], pulled=(header, size))
    assert [name for name in tools.names(disk, "snapshots") if name.startswith("0001")] == [header.name.file]
    assert store.snapshots[1].name == header.name and store.behind() == [0, 2]
    tools.commit(store, [tools.put(copy, b"new", b"v"), tools.put(store.copies[0], b"other", b"v")])
    state = tools.state_of(store.copies)
    again = tools.open_small(disk.process_kill(), seed=1)
    assert tools.state_of(again.copies) == state and not again.damages
    assert (again.copies[1].disk, again.copies[1].generation) == ("disk 1/2", 2) and again.copies[1].complete
    assert [entry[1:3] for entry in again.backlog.of_shard(1)] == [(2, 5)]
    tools.take_snapshot(again, 1)
    assert tools.open_small(again.disk, seed=2).copies[1].table.seq == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("until", ["written", "published"])
def test_a_copy_that_was_not_replaced_in_the_end(disk: CrashDisk, until: str) -> None:
    """A crash before the manifest: the old copy with all it had, and nothing is left of the other one."""
    store = tools.make(disk, 12)
    state = tools.state_of(store.copies)
    header = tools.pulled(store, 1, 2, 4, 4)[1]
    if until == "written":
        path = tools.DIRECTORY / "snapshots" / header.name.file
        disk.rename(path, path.with_name(path.name + ".tmp"))
    again = tools.open_small(disk, seed=1)
    assert tools.state_of(again.copies) == state and again.copies[1].disk == "disk 1"
    assert tools.names(disk, "snapshots") == []


def test_the_log_stays_while_copies_change(disk: CrashDisk) -> None:
    """Until the manifest is written a crash comes back to the old copy, which needs its part of the log."""
    store = tools.make(disk, 12)
    state = tools.state_of(store.copies)
    copy, header, size = tools.pulled(store, 1, 2, 4, 4)
    manifest, paths = store.begin_change([store.copies[0], copy], (header, size))
    tools.take_snapshot(store, 0)
    assert store.behind() == [] and store.needless_segments() == []
    crashed = tools.open_small(disk.process_kill(), seed=1)
    assert tools.state_of(crashed.copies) == state
    store.write_manifest(manifest)
    store.end_change()
    store.remove(paths)
    assert len(store.needless_segments()) > 1
    assert sorted(tools.open_small(disk.process_kill(), seed=1).copies) == [0, 1]


def test_a_copy_is_dropped_and_comes_back(disk: CrashDisk) -> None:
    """Its files are removed; a later copy of the shard meets none of its entries, and no generation is used twice."""
    store = tools.make(disk, 12)
    tools.take_snapshot(store, 1)
    tools.fill(store, 6, first=12)
    store.manifest.generations[1] = 1
    tools.change(store, store.copies[0], store.copies[2])
    assert tools.names(disk, "snapshots") == [] and sorted(store.copies) == [0, 2]
    again = tools.open_small(disk.process_kill(), seed=1)
    assert sorted(again.copies) == [0, 2] and again.manifest.generations == {1: 1} and not again.damages
    fresh = Copy(1, "another", generation=2)
    tools.change(again, *again.copies.values(), fresh)
    tools.commit(again, [tools.put(fresh, b"k", b"v")])
    state = tools.state_of(again.copies)
    assert isinstance(again.disk, CrashDisk)
    last = tools.open_small(again.disk.process_kill(), seed=2)
    assert tools.state_of(last.copies) == state and last.copies[1].table.seq == 1 and not last.damages


def test_a_snapshot_of_a_copy_that_is_gone(disk: CrashDisk) -> None:
    """It was being taken when its copy was replaced: it is removed as soon as it is published."""
    store = tools.make(disk, 12)
    frozen = store.copies[1].table.freeze()
    old_header = store.header_of(frozen)
    copy, header, size = tools.pulled(store, 1, 2, 4, 4)
    tools.change(store, store.copies[0], copy, pulled=(header, size))
    file = store.create_snapshot(old_header)
    file.write(b"".join(encode_snapshot(old_header, frozen, [])))
    file.finish()
    paths = store.published(old_header, file.publish())
    assert [path.name for path in paths] == [old_header.name.file] and store.snapshots[1].name == header.name
    again = tools.open_small(disk.process_kill(), seed=1)
    assert again.copies[1].generation == 2 and again.copies[1].complete
