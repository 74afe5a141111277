"""The config store in a file: its format, and an error at every call of the disk."""

import json
from pathlib import Path
from random import Random

import pytest

from kvtcp.cluster.file_store import FileConfigStore, form, parse
from kvtcp.cluster.store import ConfigStoreError, Outcome, Stored
from tests.crash.disk import CrashDisk, Crashes
from tests.crash.fake_disk import FaultyDisk, QuickDisk

OLD, NEW = b'{"old": 1}', b'{"new": 2}'


def test_the_format() -> None:
    """A file is JSON, and the value is in it as it was given."""
    text = form(Stored(7, OLD))
    assert json.loads(text) == {"format": 1, "version": 7, "crc32": json.loads(text)["crc32"], "value": {"old": 1}}
    assert parse(text, Path("map.json")) == Stored(7, OLD)


def test_every_damage_is_found() -> None:
    """A file that is cut anywhere, or has any byte changed, is refused with one sentence, never read as another."""
    whole = form(Stored(7, OLD))
    for cut in range(len(whole)):
        with pytest.raises(ConfigStoreError, match=r"map\.json is damaged"):
            parse(whole[:cut], Path("map.json"))
    for place in range(len(whole)):
        for bit in (1, 16):
            other = bytearray(whole)
            other[place] ^= bit
            with pytest.raises(ConfigStoreError, match=r"map\.json (is damaged|has format)"):
                parse(bytes(other), Path("map.json"))


def test_another_format() -> None:
    """A file of a later version of kvtcp is refused by its number."""
    later = form(Stored(7, OLD)).replace(b'"format": 1', b'"format": 2')
    with pytest.raises(ConfigStoreError, match=r"map\.json has format 2, this version of kvtcp knows format 1"):
        parse(later, Path("map.json"))


async def test_what_cannot_be_read(tmp_path: Path) -> None:
    """An error of the disk is a sentence with the path; a damaged file is not overwritten by a change either."""
    (tmp_path / "map.json").mkdir()
    with pytest.raises(ConfigStoreError, match=r"map\.json cannot be read: Is a directory"):
        await FileConfigStore(tmp_path / "map.json", QuickDisk()).read()
    (tmp_path / "torn.json").write_bytes(form(Stored(7, OLD))[:-9])
    store = FileConfigStore(tmp_path / "torn.json", QuickDisk())
    with pytest.raises(ConfigStoreError, match="is damaged"):
        await store.compare_and_set(7, NEW)
    assert (tmp_path / "torn.json").read_bytes() == form(Stored(7, OLD))[:-9]


async def test_a_value_that_is_no_json(tmp_path: Path) -> None:
    """It could not be told from the end of the file, so it is refused."""
    with pytest.raises(ValueError):
        await FileConfigStore(tmp_path / "map.json", QuickDisk()).compare_and_set(None, b'1\n}\n{"')


async def count_calls(path: Path) -> FaultyDisk:
    """A disk that has seen one change without a fault."""
    disk = FaultyDisk()
    assert await FileConfigStore(path, disk).compare_and_set(1, NEW) is Outcome.DONE
    return disk


async def test_an_error_at_every_call(tmp_path: Path) -> None:
    """Before the rename an error is raised and the old value is there; after it the outcome is unknown, and the same
    change sent again settles it. The temporary file of a crash is in nobody's way."""
    path = tmp_path / "map.json"
    path.write_bytes(form(Stored(1, OLD)))
    calls = (await count_calls(path)).calls
    names = [what for what, _ in calls]
    assert names == ["read", "remove", "create", "write", "sync", "close", "rename", "sync_directory"]
    for number, name in enumerate(names, 1):
        path.write_bytes(form(Stored(1, OLD)))
        disk = FaultyDisk(number)
        store = FileConfigStore(path, disk)
        if name == "sync_directory":
            assert await store.compare_and_set(1, NEW) is Outcome.UNKNOWN
            assert await store.read() == Stored(2, NEW)
            assert await store.compare_and_set(1, OLD) is Outcome.CONFLICT, "another change is another one"
        else:
            with pytest.raises((OSError, ConfigStoreError)):
                await store.compare_and_set(1, NEW)
            assert await store.read() == Stored(1, OLD)
        disk.calls.append(("nothing", ""))  # past the call that fails
        assert await store.compare_and_set(1, NEW) is Outcome.DONE, name
        assert [what for what, _ in disk.calls][-2:] == ["rename", "sync_directory"], "all steps again"
        assert await store.read() == Stored(2, NEW)
        assert await store.compare_and_set(1, NEW) is Outcome.CONFLICT, "settled"


async def test_a_rename_that_fails_and_happens(tmp_path: Path) -> None:
    """An error of rename after which the new file is there counts as one after the rename."""

    class LateDisk(FaultyDisk):
        fails = True

        def rename(self, old: Path, new: Path) -> None:
            super().rename(old, new)
            if self.fails:
                raise OSError(5, "Input/output error", str(new))

    disk = LateDisk()
    store = FileConfigStore(tmp_path / "map.json", disk)
    await store.compare_and_set(None, NEW)
    assert await store.read() == Stored(1, NEW)
    disk.fails = False
    assert await store.compare_and_set(1, OLD) is Outcome.DONE


async def test_a_rename_that_fails_and_cannot_be_looked_at(tmp_path: Path) -> None:
    """Neither file is known to be there: the outcome is unknown, and the same change sent again settles it."""

    class BlindDisk(FaultyDisk):
        is_blind = False
        fails = True
        happens = True

        def rename(self, old: Path, new: Path) -> None:
            if self.happens:
                super().rename(old, new)
            if self.fails:
                self.is_blind = True
                raise OSError(5, "Input/output error", str(new))

        def read(self, path: Path) -> bytes:
            if self.is_blind:
                raise OSError(5, "Input/output error", str(path))
            return super().read(path)

    for happens in (False, True):
        path = tmp_path / f"map{happens}.json"
        path.write_bytes(form(Stored(1, OLD)))
        disk = BlindDisk()
        disk.happens = happens
        store = FileConfigStore(path, disk)
        assert await store.compare_and_set(1, NEW) is Outcome.UNKNOWN
        with pytest.raises(ConfigStoreError, match="cannot be read"):
            await store.compare_and_set(1, NEW)
        disk.is_blind, disk.fails, disk.happens = False, False, True
        assert await store.compare_and_set(1, NEW) is Outcome.DONE
        assert await store.read() == Stored(2, NEW)


@pytest.mark.parametrize("seed", range(20))
def test_a_power_cut_at_every_moment(seed: int) -> None:
    """Whenever the power is cut, the file holds the last value whose change was told to be done, or one that was under
    way or unknown, whole; and the next change goes on from there."""
    disk = CrashDisk()
    disk.make_directory(Path("/coordinator"))
    path = Path("/coordinator/map.json")
    store = FileConfigStore(path, disk)
    values = [b"[%s0]" % (b"%d, " % number * 400) for number in range(4)]
    done = []  # events after which each change was done
    for number, value in enumerate(values):
        assert store._compare_and_set(number or None, value) is Outcome.DONE
        done.append(len(disk.events))
    crashes = Crashes(disk)
    for boundary in crashes.walk():
        after = crashes.sample(Random(f"{seed} {boundary}"))
        made = sum(at <= boundary for at in done)
        found = FileConfigStore(path, after)._read() if after.exists(path) else None
        version = 0 if found is None else found.version
        assert made <= version <= made + 1, (boundary, made, version)
        assert found is None or found.value == values[version - 1]
        if after.is_directory(path.parent):
            assert FileConfigStore(path, after)._compare_and_set(version or None, NEW) is Outcome.DONE
