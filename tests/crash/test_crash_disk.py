"""The disk of the crash tests is right itself: it agrees with a real one while it runs, and a power cut leaves what the
model says, all of it over enough seeds, and nothing else."""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvtcp.storage.files import Disk, OsDisk, OsFile
from tests.crash.disk import CrashDisk, Crashes, CrashFile
from tests.crash.state import BLOCK_BYTES, Create, Data, Names, Remove, Rename, Sync, SyncDirectory, Write

D = Path("/d")
SEEDS = range(400)


def new_disk(**faults: Any) -> CrashDisk:
    """A disk with the directory /d."""
    disk = CrashDisk(**faults)
    disk.make_directory(D)
    return disk


@pytest.fixture
def disk() -> CrashDisk:
    """A disk with the directory /d and no faults."""
    return new_disk()


def put(disk: CrashDisk, path: Path, *pieces: bytes, durable: bool = True) -> CrashFile:
    """A file of which every piece is one write; with its name, all of it durable or none."""
    file = disk.create(path)
    for piece in pieces:
        file.write(piece)
    if durable:
        file.sync()
        disk.sync_directory(path.parent)
    return file


def noise(count: int, seed: int = 1) -> bytes:
    """Bytes without a zero, so that zeros are recognized."""
    return bytes(Random(seed).choices(range(1, 256), k=count))


def outcomes(disk: CrashDisk, names: Names | None = None, data: Data | None = None) -> list[dict[str, bytes | None]]:
    """What power cuts leave, one per seed."""
    return [disk.power_cut(Random(seed), names, data).tree() for seed in SEEDS]


def names_left(disk: CrashDisk, how: Names | None = None) -> set[tuple[str, ...]]:
    """All sets of names, without the first slash, that power cuts leave."""
    return {tuple(sorted(name[1:] for name in tree)) for tree in outcomes(disk, how)}


def contents(disk: CrashDisk, path: Path, data: Data | None = None) -> set[bytes]:
    """All contents of a file that power cuts leave."""
    found = {tree[str(path)] for tree in outcomes(disk, Names.ALL, data)}
    return {content for content in found if content is not None}


# ---- while it runs


def read_stream(disk: Disk, path: Path) -> list[bytes]:
    """A file read in several ways."""
    with disk.open_read(path) as file:
        return [file.read(10), file.readline(50), file.read()]


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """A file in two writes."""
    file = disk.create(path)
    file.write(data[:10])
    file.write(data[10:])
    file.sync()
    file.close()


OWN_CALLS: dict[str, Callable[..., Any]] = {"write_file": write_file, "read_stream": read_stream}


def answer(disk: Disk, name: str, arguments: list[Any]) -> Any:
    """What a call returns, or the error."""
    try:
        result = OWN_CALLS[name](disk, *arguments) if name in OWN_CALLS else getattr(disk, name)(*arguments)
    except OSError as error:
        return ("failed", error.errno, str(error.filename), str(error.filename2))
    if isinstance(result, (CrashFile, OsFile)):
        result.close()
        return "a file"
    return result


@pytest.mark.parametrize("seed", range(10))
def test_it_agrees_with_a_real_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Random calls, many of them mistaken, have the same answers, errors and effects as in a real directory."""
    rng = Random(seed)
    disk, real = CrashDisk(), OsDisk()
    monkeypatch.setattr("kvtcp.storage.files.os.fsync", lambda fd: None)
    monkeypatch.setattr("kvtcp.storage.files._sync_data", lambda fd: None)
    disk.make_directory(tmp_path)
    one_path = ("create", "read", "list", "exists", "make_directory", "remove", "sync_directory")
    went_well: Counter[str] = Counter()

    def path() -> Path:
        return tmp_path.joinpath(*rng.choices("abc", k=rng.randint(1, 3)))

    for step in range(1500):
        name = rng.choice([*one_path, "rename", "rename", "write_file", "write_file", "read_stream"])
        if step % 30 == 0:
            name = "remove_tree"
        arguments: list[Any] = [path() for _ in range(1 + (name == "rename"))]
        if name == "write_file":
            arguments.append(noise(rng.randrange(2000), step))
        on_disk, on_real = (answer(one, name, arguments) for one in (disk, real))
        assert on_disk == on_real, f"seed {seed}, step {step}: {name} {arguments}"
        went_well[name] += not (isinstance(on_real, tuple) and on_real[0] == "failed")
    found = {str(path): path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    assert {path: content for path, content in disk.tree().items() if path.startswith(f"{tmp_path}/")} == found
    assert all(disk.size(Path(path)) == len(content) for path, content in found.items() if content is not None)
    assert len(went_well) == 11 and min(went_well.values()) > 5, went_well


def test_a_missing_file_has_no_size(disk: CrashDisk) -> None:
    """size and read fail for what is absent or a directory, free_bytes for an absent directory."""
    for ask in (disk.size, disk.read, disk.free_bytes):
        with pytest.raises(FileNotFoundError, match="/d/f"):
            ask(D / "f")
    with pytest.raises(IsADirectoryError):
        disk.size(D)


def test_relative_paths_start_at_the_root(disk: CrashDisk) -> None:
    """A relative path and the absolute one are the same file; one that leads upwards is refused."""
    put(disk, Path("d/f"), b"x")
    assert disk.read(D / "f") == b"x"
    with pytest.raises(AssertionError, match="downwards"):
        disk.exists(D / ".." / "d")


# ---- names


def test_a_name_needs_the_sync_of_its_directory(disk: CrashDisk) -> None:
    """A synced file is lost with its name until the directory is synced, and then never."""
    put(disk, D / "f", b"x", durable=False).sync()
    assert names_left(disk) == {("d",), ("d", "d/f")}
    disk.sync_directory(D)
    assert outcomes(disk) == [{"/d": None, "/d/f": b"x"}] * len(SEEDS)


def test_the_sync_of_a_directory_is_not_that_of_its_files(disk: CrashDisk) -> None:
    """A durable name may lead to a file without its bytes."""
    put(disk, D / "f", b"x", durable=False)
    disk.sync_directory(D)
    assert {tree["/d/f"] for tree in outcomes(disk)} == {b"", b"\0", b"x"}


def test_made_directories_are_durable(disk: CrashDisk) -> None:
    """make_directory syncs what is above each new directory; a crash inside it leaves a first part of the path."""
    disk.make_directory(D / "a" / "b")
    assert names_left(disk) == {("d", "d/a", "d/a/b")}
    crashes = Crashes(disk, 2)
    left = {tuple(crashes.sample(Random(seed)).tree()) for _ in crashes.walk() for seed in range(50)}
    assert left == {("/d",), ("/d", "/d/a"), ("/d", "/d/a", "/d/a/b")}
    count = len(disk.events)
    disk.make_directory(D / "a" / "b")
    assert len(disk.events) == count


def test_a_rename_is_undone_before_the_sync_and_never_after(disk: CrashDisk) -> None:
    """Old name or new one, not both and not neither; after sync_directory the new one, whatever it replaced."""
    put(disk, D / "tmp", b"new")
    put(disk, D / "f", b"old")
    disk.rename(D / "tmp", D / "f")
    before: dict[str, bytes | None] = {"/d": None, "/d/f": b"old", "/d/tmp": b"new"}
    after: dict[str, bytes | None] = {"/d": None, "/d/f": b"new"}
    trees = outcomes(disk)
    assert before in trees and after in trees and all(tree in (before, after) for tree in trees)
    disk.sync_directory(D)
    assert outcomes(disk) == [after] * len(SEEDS)


@pytest.mark.parametrize("synced", ["a", "b"])
def test_a_rename_between_directories_is_one_step(disk: CrashDisk, synced: str) -> None:
    """It is pending in both directories; the sync of either settles it, and the file is never lost."""
    disk.make_directory(D / "a")
    disk.make_directory(D / "b")
    put(disk, D / "a" / "f", b"x")
    disk.rename(D / "a" / "f", D / "b" / "g")
    assert names_left(disk) == {("d", "d/a", "d/a/f", "d/b"), ("d", "d/a", "d/b", "d/b/g")}
    disk.sync_directory(D / synced)
    assert names_left(disk) == {("d", "d/a", "d/b", "d/b/g")}


def test_a_sync_settles_what_it_needs_and_no_more(disk: CrashDisk) -> None:
    """The sync of the new directory makes the creation under the old name durable too, but not its neighbours."""
    disk.make_directory(D / "a")
    disk.make_directory(D / "b")
    put(disk, D / "a" / "f", durable=False)
    put(disk, D / "a" / "g", durable=False)
    disk.rename(D / "a" / "f", D / "b" / "f")
    disk.sync_directory(D / "b")
    assert names_left(disk) == {("d", "d/a", "d/b", "d/b/f"), ("d", "d/a", "d/a/g", "d/b", "d/b/f")}


def test_names_survive_as_the_strategy_says(disk: CrashDisk) -> None:
    """Prefixes cut at every place; subsets leave out any operation and what is impossible without it."""
    put(disk, D / "x", b"x")
    put(disk, D / "a", durable=False)
    put(disk, D / "b", durable=False)
    disk.rename(D / "a", D / "c")
    disk.remove(D / "x")
    prefixes = [("x",), ("a", "x"), ("a", "b", "x"), ("b", "c", "x"), ("b", "c")]
    subsets = [*prefixes, (), ("a",), ("a", "b"), ("b",), ("b", "x"), ("c",), ("c", "x")]

    def full(names: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
        return {("d", *(f"d/{name}" for name in some)) for some in names}

    assert names_left(disk, Names.NONE) == full([("x",)])
    assert names_left(disk, Names.ALL) == full([("b", "c")])
    assert names_left(disk, Names.PREFIX) == full(prefixes)
    assert names_left(disk, Names.SUBSET) == full(subsets)
    assert names_left(disk) == full(subsets)


def test_each_directory_has_its_own_prefix(disk: CrashDisk) -> None:
    """What was done later in one directory may survive what was done earlier in another."""
    disk.make_directory(D / "a")
    disk.make_directory(D / "b")
    put(disk, D / "a" / "f", durable=False)
    put(disk, D / "b" / "f", durable=False)
    assert ("d", "d/a", "d/b", "d/b/f") in names_left(disk, Names.PREFIX)


def test_a_prefix_without_a_rename_ends_before_it_in_both_directories(disk: CrashDisk) -> None:
    """Where the rename from a to b is cut off, what was done later in b is too."""
    put(disk, D / "f", b"x")
    disk.make_directory(Path("/b"))
    put(disk, D / "x", durable=False)
    disk.rename(D / "f", Path("/b/f"))
    put(disk, Path("/b/y"), durable=False)
    expected = {("b", "d", "d/f"), ("b", "d", "d/f", "d/x"), ("b", "b/f", "d", "d/x"), ("b", "b/f", "b/y", "d", "d/x")}
    assert names_left(disk, Names.PREFIX) == expected
    assert ("b", "b/y", "d", "d/f") in names_left(disk, Names.SUBSET)


def test_a_directory_with_files_is_never_replaced_or_removed() -> None:
    """A file that left its directory before that was removed, replaced or renamed survives the loss of any step."""
    changes: list[Callable[[CrashDisk], None]] = [
        lambda disk: disk.remove_tree(D / "t"),
        lambda disk: disk.rename(D / "u", D / "t"),
    ]
    for change in changes:
        disk = new_disk()
        disk.make_directory(D / "t")
        disk.make_directory(D / "u")
        put(disk, D / "t" / "f", b"x")
        disk.rename(D / "t" / "f", D / "f")
        change(disk)
        left = names_left(disk)
        assert all(("d/f" in names) != ("d/t/f" in names) for names in left)
        assert {"d/f" in names for names in left} == {True, False}
    disk = new_disk()
    disk.make_directory(D / "t")
    put(disk, D / "t" / "f", b"x")
    put(disk, D / "g", b"y")
    disk.rename(D / "t", D / "u")
    disk.rename(D / "g", D / "t")
    assert names_left(disk) == {
        ("d", "d/g", "d/t", "d/t/f"), ("d", "d/g", "d/u", "d/u/f"), ("d", "d/t", "d/u", "d/u/f"),
    }  # fmt: skip


@pytest.mark.parametrize("follower", ["file", "directory"])
def test_a_file_is_not_lost_to_what_took_its_name(disk: CrashDisk, follower: str) -> None:
    """A file was renamed and something else has its old name: whatever survives, the file has one of its names."""
    disk.make_directory(D / "t")
    put(disk, D / "f", b"x")
    disk.rename(D / "f", D / "g")
    if follower == "file":
        put(disk, D / "f", b"y", durable=False)
    else:
        disk.rename(D / "t", D / "f")
    trees = outcomes(disk)
    assert all((tree.get("/d/f") == b"x") != (tree.get("/d/g") == b"x") for tree in trees)
    assert {tree.get("/d/g") for tree in trees} == {None, b"x"}


def test_a_removal_needs_the_sync_of_the_directory(disk: CrashDisk) -> None:
    """A removed file may come back with its bytes, until the directory is synced."""
    put(disk, D / "f", b"x")
    disk.remove(D / "f")
    trees = outcomes(disk)
    assert {"/d": None} in trees and {"/d": None, "/d/f": b"x"} in trees
    disk.sync_directory(D)
    assert outcomes(disk) == [{"/d": None}] * len(SEEDS)


def test_a_tree_is_removed_file_by_file(disk: CrashDisk) -> None:
    """Any of the files may come back, with the directories above it; after the sync of the parent none does."""
    disk.make_directory(D / "t" / "u")
    put(disk, D / "t" / "f", b"x")
    put(disk, D / "t" / "u" / "g", b"y")
    disk.remove_tree(D / "t")
    left = names_left(disk)
    top, inner = ("d", "d/t"), ("d", "d/t", "d/t/u")
    assert left == {("d",), top, inner, ("d", "d/t", "d/t/f"), (*inner, "d/t/u/g"), ("d", "d/t", "d/t/f", "d/t/u"),
                    ("d", "d/t", "d/t/f", "d/t/u", "d/t/u/g")}  # fmt: skip
    disk.sync_directory(D)
    assert names_left(disk) == {("d",)}
    disk.make_directory(D / "t")
    assert disk.list(D / "t") == []


def test_a_renamed_directory_keeps_its_content(disk: CrashDisk) -> None:
    """The names in a directory are its own: they are as durable under its new name as under the old one."""
    disk.make_directory(D / "tmp")
    put(disk, D / "tmp" / "f", b"x")
    put(disk, D / "tmp" / "g", durable=False)
    disk.rename(D / "tmp", D / "t")
    disk.sync_directory(D)
    assert names_left(disk) == {("d", "d/t", "d/t/f"), ("d", "d/t", "d/t/f", "d/t/g")}


def test_directories_never_swallow_each_other(disk: CrashDisk) -> None:
    """Where the order of two renames of directories decides, the later one never survives alone."""
    disk.make_directory(D / "a" / "b")
    put(disk, D / "a" / "b" / "f", b"x")
    disk.rename(D / "a" / "b", D / "b")
    disk.rename(D / "a", D / "b" / "a")
    expected = {("d", "d/a", "d/a/b", "d/a/b/f"), ("d", "d/a", "d/b", "d/b/f"), ("d", "d/b", "d/b/a", "d/b/f")}
    assert names_left(disk) == expected
    disk.sync_directory(D / "b")
    assert names_left(disk) == {("d", "d/b", "d/b/a", "d/b/f")}


# ---- data


def test_unsynced_bytes_survive_as_the_strategy_says(disk: CrashDisk) -> None:
    """Each strategy gives its outcomes, all of them over enough seeds, and no other."""
    old, middle, last = noise(510), noise(1, 2), noise(3, 3)
    file = put(disk, D / "f", old)
    file.write(middle)
    file.write(last)
    full = old + middle + last
    prefixes = {full[:size] for size in range(510, 515)}
    assert contents(disk, D / "f", Data.NONE) == {old}
    assert contents(disk, D / "f", Data.ALL) == {full}
    assert contents(disk, D / "f", Data.PREFIX) == prefixes
    zeros = {full[:cut] + bytes(size - cut) for size in range(510, 515) for cut in range(510, size + 1)}
    assert contents(disk, D / "f", Data.ZEROS) == zeros
    first_block_lost, second_block_lost = old + middle + b"\0" + last[1:], full[:512] + b"\0\0"
    cuts = {full[:cut] for cut in range(511, 515)} | {full[:cut] + bytes(514 - cut) for cut in range(511, 515)}
    assert contents(disk, D / "f", Data.TORN) == cuts | {first_block_lost, second_block_lost}
    blocks = {
        (first + second)[:size]
        for first in (full[:512], old + b"\0\0")
        for second in (full[512:], b"\0\0")
        for size in range(510, 515)
    }
    assert contents(disk, D / "f", Data.BLOCKS) == blocks
    assert contents(disk, D / "f", Data.STALE) == blocks
    assert contents(disk, D / "f") == prefixes | zeros | cuts | blocks | {first_block_lost}


def test_blocks_are_lost_one_by_one(disk: CrashDisk) -> None:
    """Of many pending blocks any may be missing, first, middle and last, in every number; durable ones never."""
    full = noise(BLOCK_BYTES * 12)
    file = put(disk, D / "f", full[: BLOCK_BYTES * 4])
    file.write(full[BLOCK_BYTES * 4 :])
    lost_sets = set()
    for content in contents(disk, D / "f", Data.BLOCKS):
        blocks = range(len(content) // BLOCK_BYTES)
        lost = frozenset(b for b in blocks if content[b * BLOCK_BYTES : (b + 1) * BLOCK_BYTES] == bytes(BLOCK_BYTES))
        for block in set(blocks) - lost:
            span = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
            assert content[span] == full[span]
        lost_sets.add(lost)
    assert set().union(*lost_sets) == set(range(4, 12))
    assert {len(lost) for lost in lost_sets} >= {0, 1, 2, 3, 4, 5, 6, 7}
    assert frozenset({4}) in lost_sets or frozenset({4, 5}) in lost_sets


def test_lost_blocks_may_hold_old_files(disk: CrashDisk) -> None:
    """Blocks of a removed file are used again: they show up in the place of lost ones, never below the synced size."""
    old, full = noise(3000), noise(4000, 2)
    put(disk, D / "old", old)
    disk.remove(D / "old")
    disk.sync_directory(D)
    file = put(disk, D / "f", full[:600])
    file.write(full[600:])
    found = contents(disk, D / "f", Data.STALE)
    assert all(content[:600] == full[:600] for content in found)
    stale = {old[start : start + BLOCK_BYTES] for start in range(0, 2560, BLOCK_BYTES)}
    shown = {
        content[start : start + BLOCK_BYTES]
        for content in found
        for start in range(1024, len(content), BLOCK_BYTES)
    }  # fmt: skip
    assert stale <= shown
    assert not any(old[512:1024] in content for content in contents(disk, D / "f", Data.BLOCKS))


def test_a_sync_covers_what_was_written_before_it_began(disk: CrashDisk) -> None:
    """A write during a sync stays pending, in the same block too; the next sync covers it."""
    file = put(disk, D / "f", b"one")
    file.write(b"two")
    finish = file.start_sync()
    file.write(b"three")
    finish()
    assert {content[:6] for content in contents(disk, D / "f")} == {b"onetwo"}
    assert contents(disk, D / "f", Data.NONE) == {b"onetwo"}
    assert contents(disk, D / "f", Data.PREFIX) == {b"onetwothree"[:size] for size in range(6, 12)}
    file.sync()
    assert contents(disk, D / "f") == {b"onetwothree"}


def fail_to_sync(disk: CrashDisk, file: CrashFile) -> None:
    """The next call is the sync of the file, and it fails."""
    disk.fail_at = len(disk.calls) + 1
    with pytest.raises(OSError, match="Input/output error: '/d/"):
        file.sync()


def test_a_failed_sync_is_not_made_good_by_a_later_one(disk: CrashDisk) -> None:
    """What a failed sync left is read back but may be missing after any number of good syncs; later bytes are safe."""
    full = noise(BLOCK_BYTES * 4)
    file = put(disk, D / "f", full[:100])
    file.write(full[100:1024])
    fail_to_sync(disk, file)
    assert contents(disk, D / "f", Data.NONE) == {full[:100]}
    file.write(full[1024:])
    file.sync()
    file.sync()
    disk.sync_directory(D)
    assert disk.read(D / "f") == full
    first, second = (full[:512], full[:100] + bytes(412)), (full[512:1024], bytes(512))
    assert contents(disk, D / "f") == {a + b + full[1024:] for a in first for b in second}
    assert contents(disk, D / "f", Data.NONE) == {first[1] + second[1] + full[1024:]}
    for how in (Data.PREFIX, Data.ZEROS, Data.TORN, Data.BLOCKS, Data.STALE):
        assert contents(disk, D / "f", how) == {a + b + full[1024:] for a in first for b in second}


def test_a_second_failed_sync_changes_nothing(disk: CrashDisk) -> None:
    """A block that two failed syncs left holds what the last good one wrote."""
    full = noise(900)
    file = put(disk, D / "f", full[:100])
    for start, end in ((100, 300), (300, 700)):
        file.write(full[start:end])
        fail_to_sync(disk, file)
        assert contents(disk, D / "f", Data.NONE) == {full[:100]}
    file.write(full[700:])
    file.sync()
    assert contents(disk, D / "f") == {full, full[:100] + bytes(412) + full[512:]}


def test_what_a_failed_sync_left_may_hold_old_files(disk: CrashDisk) -> None:
    """Blocks in limbo are own ones, zeros or those of a removed file, and the file is not longer than it was."""
    old, full = noise(3000), noise(2000, 2)
    put(disk, D / "old", old)
    disk.remove(D / "old")
    file = put(disk, D / "f")
    file.write(full)
    fail_to_sync(disk, file)
    found = contents(disk, D / "f", Data.STALE)
    assert max(map(len, found)) == 2000
    for content in found:
        for start in range(0, len(content), BLOCK_BYTES):
            block = content[start : start + BLOCK_BYTES]
            assert block in full or not block.strip(b"\0") or block.rstrip(b"\0") in old


def test_both_extremes_are_frequent(disk: CrashDisk) -> None:
    """However much is pending, in about one crash of ten all of it is lost, and in one of ten all survives."""
    for number in range(12):
        put(disk, D / str(number), b"x", durable=False)
    kept = [sum(content == b"x" for content in tree.values()) for tree in outcomes(disk)]
    assert kept.count(0) > 20 and kept.count(12) > 20
    assert len(set(kept)) > 8


def test_a_block_that_is_written_again_leaves_limbo(disk: CrashDisk) -> None:
    """A write into the last block of a failed sync makes it dirty as a whole, and the next sync writes it."""
    full = noise(800)
    file = put(disk, D / "f")
    file.write(full[:700])
    fail_to_sync(disk, file)
    file.write(full[700:])
    assert contents(disk, D / "f", Data.NONE) == {b""}
    file.sync()
    assert contents(disk, D / "f") == {full, bytes(512) + full[512:]}


def test_a_killed_process_loses_nothing_and_makes_nothing_durable(disk: CrashDisk) -> None:
    """After kill -9 everything is there, still pending: a power cut then may take it, limbo included."""
    put(disk, D / "f", b"durable").write(b" pending")
    file = put(disk, D / "g", b"")
    forgotten = noise(BLOCK_BYTES)
    file.write(forgotten)
    fail_to_sync(disk, file)
    disk.rename(D / "g", D / "h")
    killed = disk.process_kill()
    assert killed.tree() == {"/d": None, "/d/f": b"durable pending", "/d/h": forgotten}
    assert (killed.events, killed.calls) == ([], [])
    none = killed.power_cut(Random(0), Names.NONE, Data.NONE)
    assert none.tree() == {"/d": None, "/d/f": b"durable", "/d/g": b""}
    assert {"/d/h" in tree for tree in outcomes(killed)} == {True, False}
    killed.sync_directory(D)
    assert {"/d/h" in tree for tree in outcomes(killed)} == {True}
    file.write(b"later")
    file.sync()
    killed = disk.process_kill()
    assert killed.read(D / "h") == forgotten + b"later"
    assert contents(killed, D / "h") == {forgotten + b"later", bytes(BLOCK_BYTES) + b"later"}


def test_bits_flip(disk: CrashDisk) -> None:
    """A flipped bit is another one in every read and after every crash; a second flip puts it right."""
    put(disk, D / "f", b"\x00\x01")
    disk.flip_bit(D / "f", 8)
    disk.flip_bit(D / "f", 7)
    assert disk.read(D / "f") == b"\x80\x00"
    assert contents(disk, D / "f") == {b"\x80\x00"}
    disk.flip_bit(D / "f", 7)
    assert disk.read(D / "f") == b"\x00\x00"


# ---- faults

KINDS = ("make_directory", "create", "write", "sync", "rename", "sync_directory", "remove", "remove_tree")


def one_of_each(disk: CrashDisk) -> None:
    """Every kind of call once, in the order of `KINDS`."""
    disk.make_directory(D)
    file = disk.create(D / "tmp")
    file.write(b"x" * 1000)
    file.sync()
    disk.rename(D / "tmp", D / "f")
    disk.sync_directory(D)
    disk.remove(D / "f")
    disk.remove_tree(D)


@pytest.mark.parametrize("number", range(1, len(KINDS) + 1), ids=KINDS)
@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC])
def test_the_chosen_call_fails(number: int, error_number: int) -> None:
    """Call n raises with number, text and path, and those before it have been done."""
    disk = CrashDisk(fail_at=number, error_number=error_number)
    with pytest.raises(OSError, match=os.strerror(error_number)) as caught:
        one_of_each(disk)
    assert caught.value.errno == error_number
    what, path = disk.calls[-1]
    assert (what, str(path)) == (KINDS[number - 1], caught.value.filename)
    assert len(disk.calls) == number
    without = CrashDisk()
    one_of_each(without)
    assert [what for what, _ in without.calls] == list(KINDS)
    before = number if number > 1 else 0  # make_directory gives two events, every other call one
    assert disk.events[:before] == without.events[:before]
    assert len(disk.events) <= before + 1


@pytest.mark.parametrize("dead", [False, True])
def test_a_dead_disk_stays_dead(dead: bool) -> None:
    """With `dead` every later call fails too, without it only the one."""
    disk = new_disk(fail_at=2, dead=dead)
    for fails in (True, dead, dead):
        with pytest.raises(OSError) if fails else contextlib.nullcontext():
            disk.sync_directory(D)
    new_disk(dead=dead).sync_directory(D)


def test_a_failed_write_leaves_a_first_part() -> None:
    """Of a failing write any number of first bytes is there, pending."""
    left = set()
    for seed in range(60):
        disk = new_disk(fail_at=3, rng=Random(seed))
        with pytest.raises(OSError, match="Input/output error"):
            put(disk, D / "f", b"12345")
        left.add(disk.read(D / "f"))
        assert contents(disk, D / "f", Data.NONE) == {b""}
    assert left == {b"12345"[:size] for size in range(6)}


def test_failed_changes_of_names_have_done_nothing(disk: CrashDisk) -> None:
    """A create, rename or remove that fails has no effect, and a failed sync_directory leaves names pending."""
    put(disk, D / "f", b"x")
    disk.rename(D / "f", D / "g")
    tree, count = disk.tree(), len(disk.events)
    disk.fail_at, disk.dead = len(disk.calls) + 1, True
    for call in (
        lambda: disk.create(D / "h"),
        lambda: disk.rename(D / "g", D / "h"),
        lambda: disk.remove(D / "g"),
        lambda: disk.sync_directory(D),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            call()
    assert disk.tree() == tree and len(disk.events) == count
    assert names_left(disk) == {("d", "d/f"), ("d", "d/g")}


def test_a_failed_remove_tree_has_done_a_part() -> None:
    """What is left of the tree is anything from all of it to the empty directory."""
    left = set()
    for seed in range(60):
        disk = new_disk(rng=Random(seed))
        for name in "abc":
            put(disk, D / name, b"x")
        disk.fail_at = len(disk.calls) + 1
        with pytest.raises(OSError, match="Input/output error"):
            disk.remove_tree(D)
        left.add("".join(disk.list(D)))
    assert left == {"abc", "bc", "c", ""}


def test_a_failed_make_directory_has_done_a_part() -> None:
    """Any first part of the path may be there, the last of it not durable."""
    left = set()
    for seed in range(60):
        disk = new_disk(rng=Random(seed), fail_at=2)
        with pytest.raises(OSError, match="Input/output error"):
            disk.make_directory(D / "a" / "b")
        durable = disk.power_cut(Random(seed), Names.NONE)
        left.add((tuple(disk.tree()), tuple(durable.tree())))
    d, a, b = ("/d",), ("/d", "/d/a"), ("/d", "/d/a", "/d/a/b")
    assert left == {(d, d), (a, d), (a, a), (b, a)}


def test_a_full_disk_takes_what_fits() -> None:
    """A write beyond the capacity leaves what fits and raises ENOSPC; removing makes room, replacing too."""
    disk = new_disk(capacity_bytes=1000)
    assert disk.free_bytes(D) == 1000
    put(disk, D / "f", bytes(700)).close()
    file = disk.create(D / "g")
    assert disk.free_bytes(D) == 300
    with pytest.raises(OSError, match=r"No space left on device: '/d/g'") as caught:
        file.write(noise(400))
    assert caught.value.errno == errno.ENOSPC
    assert disk.read(D / "g") == noise(400)[:300]
    assert disk.free_bytes(D) == 0
    with pytest.raises(OSError, match="No space left"):
        file.write(b"x")
    file.write(b"")
    disk.rename(D / "g", D / "f")
    assert disk.free_bytes(D) == 700
    assert disk.process_kill().free_bytes(D) == 700
    disk.sync_directory(D)
    cut = disk.power_cut(Random(0), Names.NONE, Data.NONE)
    assert cut.free_bytes(D) == 1000
    assert disk.power_cut(Random(0), Names.ALL, Data.ALL).free_bytes(D) == 700
    disk.remove(D / "f")
    assert disk.free_bytes(D) == 1000
    file.write(b"to a file without a name")
    assert disk.free_bytes(D) == 1000
    killed = Crashes(disk, len(disk.events) - 1).process_kill(Random(0))
    assert killed.free_bytes(D) == 1000


def test_files_that_come_back_may_overfill_a_disk() -> None:
    """A removed file and the one that took its space may both survive; there is then no room, not less than none."""
    disk = new_disk(capacity_bytes=1000)
    put(disk, D / "f", bytes(700))
    disk.remove(D / "f")
    put(disk, D / "g", bytes(700), durable=False).sync()
    cuts = (disk.power_cut(Random(seed), Names.SUBSET) for seed in SEEDS)
    cut = next(cut for cut in cuts if len(cut.list(D)) == 2)
    assert cut.free_bytes(D) == 0
    file = cut.create(D / "h")
    with pytest.raises(OSError, match="No space left"):
        file.write(b"x")
    assert cut.read(D / "h") == b""


# ---- walking along a journal


def random_workload(disk: CrashDisk, rng: Random, steps: int, after: Callable[[], None]) -> None:
    """Creates, writes, syncs, renames and removes files in two durable directories; `after` each call."""
    for name in "ab":
        disk.make_directory(Path("/") / name)
    files: dict[Path, CrashFile] = {}
    fresh = 0
    for _ in range(steps):
        choice = rng.random()
        path = rng.choice(list(files)) if files else Path("/")
        directory = Path("/") / rng.choice("ab")
        if choice < 0.15 or not files:
            fresh += 1
            files[directory / f"f{fresh}"] = disk.create(directory / f"f{fresh}")
        elif choice < 0.5:
            files[path].write(noise(rng.choice([1, 100, 511, 512, 513, 3000]), rng.getrandbits(30)))
        elif choice < 0.7:
            files[path].sync()
        elif choice < 0.85:
            disk.sync_directory(directory)
        elif choice < 0.95:
            new = rng.choice([directory / f"f{rng.randint(1, fresh)}", directory / path.name])
            disk.rename(path, new)
            files[new] = files.pop(path)
        else:
            disk.remove(path)
            del files[path]
        after()


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_passes_every_state(seed: int) -> None:
    """A replay of the journal is at each boundary what the disk was then, and a kill inside a write leaves a part."""
    disk, trees = CrashDisk(), dict[int, dict[str, bytes | None]]()
    random_workload(disk, Random(seed), 300, lambda: trees.update({len(disk.events): disk.tree()}))
    crashes = Crashes(disk)
    rng = Random(seed)
    passed = parts = 0
    for boundary in crashes.walk():
        if boundary not in trees:
            continue
        passed += 1
        assert crashes.process_kill().tree() == trees[boundary]
        assert crashes.sample(rng, Names.ALL, Data.ALL).tree() == trees[boundary]
        killed = crashes.process_kill(rng).tree()
        following = trees.get(boundary + 1, trees[boundary])
        if killed != trees[boundary] and killed != following:
            parts += 1
            (path,) = {path for path in killed if killed[path] != trees[boundary][path]}
            content, before, after = killed[path], trees[boundary][path], following[path]
            assert content is not None and before is not None and after is not None
            assert content.startswith(before) and after.startswith(content)
    assert passed == len(trees) and parts > 20
    assert Crashes(disk, 150).process_kill().tree() == trees[150]


class Durable:
    """What must survive of a workload, told from the calls alone and without any model of a disk.

    Watches the calls of a disk; files are told apart by the order of their creation.
    """

    def __init__(self, disk: CrashDisk) -> None:
        self.disk = disk
        self.names: dict[str, int] = {}  # where files are now
        self.places: dict[int, set[str]] = {}  # file whose name is durable -> where it may be after a crash
        self.bytes: dict[int, int] = {}  # how much of it is synced
        self.history: dict[int, tuple[dict[int, set[str]], dict[int, int]]] = {}
        self.seen = 0

    def note(self) -> None:
        """Looks at the events since the last call."""
        for event in self.disk.events[self.seen :]:
            self.seen += 1
            if isinstance(event, Create) and not event.is_directory:
                self.names[event.path] = event.node
                self.bytes[event.node] = 0
            elif isinstance(event, Sync):
                self.bytes[event.node] = event.until_bytes
            elif isinstance(event, Rename):
                self.places.pop(self.names.pop(event.new_path, -1), None)
                self.names[event.new_path] = self.names.pop(event.path)
                if event.node in self.places:
                    self.places[event.node].add(event.new_path)
            elif isinstance(event, Remove):
                self.places.pop(self.names.pop(event.path), None)
            elif isinstance(event, SyncDirectory):
                for path, node in self.names.items():
                    if path.startswith(event.path + "/"):
                        self.places[node] = {path}
            self.history[self.seen] = ({n: set(p) for n, p in self.places.items()}, dict(self.bytes))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_durable_is_never_lost(seed: int) -> None:
    """At every boundary of a random workload: a durable file is in one of its places with all of its synced bytes."""
    disk = CrashDisk()
    durable = Durable(disk)
    random_workload(disk, Random(seed), 250, durable.note)
    written: dict[int, bytes] = {}
    for event in disk.events:
        if isinstance(event, Write):
            written[event.node] = written.get(event.node, b"") + event.data
    crashes, rng, checked = Crashes(disk), Random(seed), 0
    for boundary in crashes.walk():
        places, synced = durable.history.get(boundary, ({}, {}))
        for _ in range(10):
            left = crashes.sample(rng)
            tree = left.tree()
            for node, paths in places.items():
                expected = written.get(node, b"")[: synced[node]]
                found = [path for path in paths if path in tree and (tree[path] or b"").startswith(expected)]
                assert len(found) >= 1, f"seed {seed}, {left.origin}: file {node} is in none of {paths}"
                checked += 1
    assert checked > 2000


@pytest.mark.parametrize("seed", range(3))
def test_samples_stand_alone(seed: int) -> None:
    """A sampled disk can be written to and crash in its turn; neither the walk nor other samples see it."""
    disk = CrashDisk()
    random_workload(disk, Random(seed), 100, lambda: None)
    crashes = Crashes(disk, 60)
    before = crashes.process_kill().tree()
    one, twin = (crashes.sample(Random(seed)) for _ in range(2))
    assert one.tree() == twin.tree() and one.events == []
    again = one.power_cut(Random(seed))
    assert again.tree() == one.tree(), "what a power cut left is durable"
    for name, content in one.tree().items():
        if content is None:
            put(one, Path(name) / "new", b"x", durable=False)
        else:
            one.flip_bit(Path(name), 0) if content else one.remove(Path(name))
    assert crashes.process_kill().tree() == before
    assert twin.tree() == again.tree() != one.tree()
    assert "/a/new" not in one.power_cut(Random(seed), Names.NONE).tree()
    assert Crashes(one).process_kill().tree() == twin.tree()
    assert {Crashes(one, len(one.events)).sample(Random(n)).tree().get("/a/new") for n in range(50)} >= {None, b"x"}


def test_the_same_seed_gives_the_same_disk() -> None:
    """Workload, walk and samples depend on nothing but their generators."""

    def trace() -> list[tuple[str, dict[str, bytes | None]]]:
        disk = CrashDisk()
        random_workload(disk, Random(7), 100, lambda: None)
        crashes = Crashes(disk)
        samples = [crashes.sample(Random(boundary)) for boundary in crashes.walk()]
        return [(sample.origin, sample.tree()) for sample in samples]

    assert trace() == trace()


def test_the_origin_tells_where_the_power_failed(disk: CrashDisk) -> None:
    """A disk says how it came about, crash by crash."""
    disk.create(D / "f")
    crashes = Crashes(disk)
    assert crashes.sample(Random(0)).origin == "(a new disk), power cut before the first event"
    crashes = Crashes(disk, 3)
    assert crashes.sample(Random(0)).origin == "(a new disk), power cut after event 3, Create /d/f"
    killed = crashes.process_kill().power_cut(Random(0))
    assert killed.origin == "((a new disk), killed after event 3, Create /d/f), power cut after 0 events"


def replace(disk: Disk, content: bytes, skip: str) -> None:
    """The classic way to replace a small file, or one step short of it."""
    disk.remove(D / "tmp")
    file = disk.create(D / "tmp")
    file.write(content)
    if skip != "sync":
        file.sync()
    file.close()
    disk.rename(D / "tmp", D / "f")
    if skip != "sync_directory":
        disk.sync_directory(D)


@pytest.mark.parametrize("skip", ["", "sync", "sync_directory"])
def test_a_missing_step_is_found(disk: CrashDisk, skip: str) -> None:
    """A harness sees that a file is replaced safely, and for each step left out that it is not."""
    done: dict[int, bytes] = {}  # number of events -> content that was promised then
    for number in range(8):
        content = noise(2000, number)
        replace(disk, content, skip)
        done[len(disk.events)] = content
    last, lost, samples = b"", 0, 0
    allowed: set[bytes] = set(done.values())
    crashes = Crashes(disk)
    for boundary in crashes.walk():
        last = done.get(boundary, last)
        for number in range(20):
            left = crashes.sample(Random(f"{boundary} {number}"))
            content = left.read(D / "f") if left.exists(D / "f") else b""
            at_least = list(done.values())[list(done.values()).index(last) :] if last else [b"", *allowed]
            lost += content not in at_least
            samples += 1
    assert samples > 500
    assert (lost > 0) == bool(skip), f"{lost} of {samples} lost a promise"
