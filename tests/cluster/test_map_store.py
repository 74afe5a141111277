"""The map_store of the map: one change at a time, unknown outcomes settled, conflicts final."""

import asyncio
from collections import deque
from dataclasses import replace

import pytest

from kvtcp.cluster import changes as module
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.map_store import MapStore, NotOwner
from kvtcp.cluster.memory_store import MemoryConfigStore
from kvtcp.cluster.store import ConfigStoreError, Outcome, Stored
from tests.processes.raw_client import until
from tests.support.replication_fakes import make_map


class ScriptedStore(MemoryConfigStore):
    """A store that plays a script: "lost" applies and says UNKNOWN, "late" does not apply and says UNKNOWN, "error"
    raises OSError, "wait" waits for `go_on`; without a script it does what it should."""

    def __init__(self, *script: str) -> None:
        super().__init__()
        self.script = deque(script)
        self.calls = 0
        self.expected: list[int | None] = []
        self.bad_reads = 0  # reads that will fail
        self.go_on = asyncio.Event()

    async def read(self) -> Stored | None:
        if self.bad_reads:
            self.bad_reads -= 1
            raise ConfigStoreError("it cannot be read") if self.bad_reads else OSError(5, "Input/output error")
        return await super().read()

    async def compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
        self.calls += 1
        self.expected.append(expected_version)
        step = self.script.popleft() if self.script else ""
        if step == "error":
            raise OSError(28, "No space left on device")
        if step == "late":
            return Outcome.UNKNOWN
        if step == "wait":
            await self.go_on.wait()
        outcome = await super().compare_and_set(expected_version, value)
        return Outcome.UNKNOWN if step == "lost" else outcome


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAP_RESEND_MS", 1)


async def founded(*script: str) -> tuple[MapStore, ScriptedStore]:
    """A map_store with a map; the script is for what comes after."""
    store = ScriptedStore()
    map_store = await MapStore.open(store)
    assert not map_store.is_founded
    await map_store.found(make_map())
    assert map_store.is_founded and map_store.map.version == 1
    store.script.extend(script)
    store.calls, store.expected = 0, []
    return map_store, store


async def held(store: ScriptedStore) -> ClusterMap:
    """What the store has."""
    stored = await store.read()
    assert stored is not None
    return ClusterMap.from_json(stored.value)


async def test_a_change() -> None:
    """A change is stored with the next version before it is told; the next map_store finds it."""
    map_store, store = await founded()
    told: list[ClusterMap] = []
    map_store.changes.on_change.append(told.append)
    new = await map_store.change(lambda old: replace(old, restoring=b"p"))
    assert (new.version, new.restoring) == (2, b"p")
    assert told == [new] and new == map_store.map == await held(store)
    assert (await MapStore.open(store)).map == new


async def test_a_change_that_changes_nothing() -> None:
    """It costs nothing."""
    map_store, store = await founded()
    assert (await map_store.change(lambda old: old)).version == 1
    assert store.calls == 0


async def test_changes_that_wait_go_together() -> None:
    """One change is in flight; those that come meanwhile are the next one, in their order."""
    map_store, store = await founded("wait")
    changes = [asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=b"1")))]
    await until(lambda: store.calls, "the first change")
    assert map_store.is_busy
    changes += [
        asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=(old.restoring or b"") + b"2"))),
        asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=(old.restoring or b"") + b"3"))),
    ]
    await asyncio.sleep(0)
    store.go_on.set()
    maps = await asyncio.gather(*changes)
    assert [each.version for each in maps] == [2, 3, 3] and store.calls == 2
    assert map_store.map.restoring == b"123" and not map_store.is_busy


@pytest.mark.parametrize(
    "script", [("lost",), ("late",), ("late", "lost"), ("lost", "late"), ("late", "error", "late")], ids=" ".join
)
async def test_an_unknown_outcome_is_settled(script: tuple[str, ...]) -> None:
    """The same change is sent until it is known to be stored, once; nothing is told before."""
    map_store, store = await founded(*script)
    new = await map_store.change(lambda old: replace(old, restoring=b"p"))
    assert new.version == 2 and await held(store) == new
    assert store.calls == len(script) + 1


async def test_an_error_that_changed_nothing() -> None:
    """It is raised to everybody whose change was in it; the map is the old one, and the next change is made."""
    map_store, store = await founded("error")
    changes = [map_store.change(lambda old: replace(old, restoring=b"1")) for _ in range(2)]
    errors = await asyncio.gather(*changes, return_exceptions=True)
    assert [type(error) for error in errors] == [OSError, OSError] and store.calls == 1
    assert map_store.map.restoring is None and await held(store) == map_store.map
    assert (await map_store.change(lambda old: replace(old, restoring=b"2"))).restoring == b"2"


@pytest.mark.parametrize("script", [(), ("late",)])
async def test_a_conflict_is_final(script: tuple[str, ...]) -> None:
    """Somebody else changed the map: that is told once, and no change is tried any more."""
    map_store, store = await founded(*script)
    other = await MapStore.open(store)
    store.script.clear()
    await other.change(lambda old: replace(old, owner="other"))
    store.script.extend(script)
    lost: list[NotOwner] = []
    map_store.changes.on_lost = lost.append
    with pytest.raises(NotOwner, match="another coordinator owns it now"):
        await map_store.change(lambda old: replace(old, restoring=b"p"))
    calls = store.calls
    with pytest.raises(NotOwner):
        await map_store.change(lambda old: replace(old, restoring=b"p"))
    assert store.calls == calls and len(lost) == 1
    assert (await held(store)).owner == "other"


async def test_close_gives_up() -> None:
    """A change whose outcome will not be known any more is cancelled, those behind it as well."""
    map_store, store = await founded("wait")
    changes = [asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=b"1")))]
    await until(lambda: store.calls, "the first change")
    changes.append(asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=b"2"))))
    await asyncio.sleep(0)
    await map_store.close()
    await asyncio.gather(*changes, return_exceptions=True)
    assert all(change.cancelled() for change in changes)


async def test_a_caller_that_is_cancelled() -> None:
    """Its change is made all the same."""
    map_store, store = await founded("wait")
    change = asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=b"1")))
    await until(lambda: store.calls, "the change")
    change.cancel()
    store.go_on.set()
    await until(lambda: not map_store.is_busy, "the end of it")
    assert map_store.map.restoring == b"1"


async def test_a_store_with_something_else() -> None:
    """What is no map is refused in one sentence."""
    store = MemoryConfigStore()
    store.stored = Stored(1, b"{}")
    with pytest.raises(ConfigStoreError, match="the config store holds something else than it should: the cluster map"):
        await MapStore.open(store)


async def test_propose() -> None:
    """Who proposes is told the map after `on_change`, and is not asked again; an error of the disk is tried again."""
    map_store, store = await founded("error", "lost")
    told: list[object] = []
    map_store.changes.on_change.append(lambda stored: told.append(stored.version))
    map_store.changes.propose(lambda old: replace(old, restoring=b"p"), lambda stored: told.append(stored.restoring))
    map_store.changes.propose(lambda old: replace(old, factor=9), told.append, told.append)
    map_store.wake()
    await until(lambda: not map_store.is_busy, "the change")
    assert [type(each) for each in told] == [OSError, int, bytes] and told[1:] == [2, b"p"]
    assert store.calls == 3 and await held(store) == map_store.map
    assert store.expected == [1, 1, 1] and map_store.changes.trouble == ""


async def test_wake() -> None:
    """What was proposed to the core itself is taken up."""
    map_store, store = await founded()
    map_store.wake()
    assert not map_store.is_busy
    map_store.changes.propose(lambda old: replace(old, restoring=b"p"), lambda stored: None)
    assert store.calls == 0 and not map_store.is_busy
    map_store.wake()
    await until(lambda: not map_store.is_busy, "the change")
    assert (await held(store)).restoring == b"p"


async def test_an_edit_that_does_not_fit() -> None:
    """Its caller alone is told; those beside it are made."""
    map_store, _ = await founded()
    good = asyncio.ensure_future(map_store.change(lambda old: replace(old, restoring=b"p")))
    with pytest.raises(ValueError, match="from 1 to the replication factor 3, not 7"):
        await map_store.change(lambda old: old.with_min_insync(7))
    assert (await good).restoring == b"p"


async def test_an_edit_that_is_wrong() -> None:
    """An error of the program is told to all who wait, and to whoever ends the process."""
    map_store, store = await founded()
    crashes: list[BaseException] = []
    map_store.on_crash = crashes.append
    changes = [
        map_store.change(lambda old: replace(old, restoring=b"p")), map_store.change(lambda old: old.without([0], "n9"))
    ]  # fmt: skip
    errors = await asyncio.gather(*changes, return_exceptions=True)
    assert [type(error) for error in errors] == [AssertionError, AssertionError] and len(crashes) == 1
    assert store.calls == 0 and not map_store.is_busy


async def test_a_read_that_fails_after_a_conflict() -> None:
    """It tells nothing; the change is sent again, and the next read settles it."""
    map_store, store = await founded("lost")
    store.bad_reads = 2
    new = await map_store.change(lambda old: replace(old, restoring=b"p"))
    assert new.version == 2 and store.calls == 4 and store.bad_reads == 0
