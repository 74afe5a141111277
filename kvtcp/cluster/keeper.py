"""The keeper: the coordinator's hand on the cluster map, which is one value in the config store.

I/O shell around cluster/changes.py, where the rules are: one change at a time, unknown outcomes settled,
conflicts final. `map` is what the store is known to hold.

A task runs while a change is in flight or waits. It must not fail: if an edit or a callback does, those who wait in
`change` are told, and `on_crash`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvtcp.cluster.changes import Done, Edit, Failed, MapChanges, NotOwner
from kvtcp.cluster.map import ClusterMap, MapError
from kvtcp.cluster.store import NOTHING, ConfigStore, ConfigStoreError, Outcome, Stored

__all__ = ["Edit", "MapKeeper", "NotOwner", "ends_of"]


class MapKeeper:
    """The map of a store. Made by `open`."""

    def __init__(self, store: ConfigStore, changes: MapChanges) -> None:
        self._store = store
        self.changes = changes
        self._task: asyncio.Task[None] | None = None  # makes the changes; None = there are none
        self._futures: set[asyncio.Future[ClusterMap]] = set()  # of `change`
        self.on_crash: Callable[[BaseException], None] = lambda error: None

    @classmethod
    async def open(cls, store: ConfigStore) -> MapKeeper:
        """Read the store. Raises ConfigStoreError if what it holds is no map of this version."""
        stored = await store.read()
        try:
            return cls(store, MapChanges.of(stored))
        except MapError as error:
            raise ConfigStoreError(f"the config store holds something else than it should: {error}") from error

    @property
    def is_founded(self) -> bool:
        """Whether there is a map."""
        return self.changes.is_founded

    @property
    def map(self) -> ClusterMap:
        """The map that the store holds."""
        return self.changes.map

    @property
    def is_busy(self) -> bool:
        """Whether a change is in flight."""
        return self._task is not None

    async def found(self, first: ClusterMap) -> None:
        """Store the first map. Raises OSError (nothing was stored), NotOwner, ConfigStoreError."""
        future = self._future()
        self.changes.found(first, *ends_of(future))
        self.wake()
        await future

    async def change(self, edit: Edit) -> ClusterMap:
        """Store what `edit` makes of the map; returns the map with it. `edit` is pure, see MapChanges.propose.

        Raises OSError if nothing was changed, NotOwner, ConfigStoreError, and a ValueError of the edit. A caller that
        is cancelled leaves its change to be made.
        """
        future = self._future()
        self.propose(edit, *ends_of(future))
        return await future

    def propose(self, edit: Edit, done: Done, failed: Failed | None = None) -> None:
        """`MapChanges.propose`: `done` is told the map with the change."""
        self.changes.propose(edit, done, failed)
        self.wake()

    def wake(self) -> None:
        """Begin with what was proposed to `changes` itself."""
        if self._task is None and self.changes.is_busy:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="changes of the map")

    async def close(self) -> None:
        """Give up what is under way: whether it is stored the next coordinator will read."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for future in list(self._futures):
            future.cancel()

    def _future(self) -> asyncio.Future[ClusterMap]:
        future: asyncio.Future[ClusterMap] = asyncio.get_running_loop().create_future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    async def _work(self) -> None:
        try:
            while self.changes.is_busy:
                sent = self.changes.to_send(_now_ms())
                if sent is not None:
                    await self._compare_and_set(*sent)
                elif self.changes.is_busy:
                    await asyncio.sleep(max(0, self.changes.due_ms - _now_ms()) / 1000)
        except Exception as error:
            for future in list(self._futures):
                if not future.done():
                    future.set_exception(error)
            self.on_crash(error)
            raise
        finally:
            self._task = None

    async def _compare_and_set(self, expected_version: int | None, value: bytes) -> None:
        stored = None
        try:
            outcome = await self._store.compare_and_set(expected_version, value)
        except (OSError, ConfigStoreError) as error:
            self.changes.on_failed(error, now_ms=_now_ms())
            return
        if outcome is Outcome.CONFLICT and self.changes.is_unsure:
            stored = await self._read()
        self.changes.on_outcome(outcome, stored, now_ms=_now_ms())

    async def _read(self) -> Stored | None:
        """What is there; None if that cannot be told now."""
        try:
            return await self._store.read() or NOTHING
        except (OSError, ConfigStoreError):
            return None  # the change is sent again, and then it is read again


def ends_of(future: asyncio.Future[ClusterMap]) -> tuple[Done, Failed]:
    """What becomes of a future whose caller may have been cancelled."""

    def done(cluster_map: ClusterMap) -> None:
        if not future.done():
            future.set_result(cluster_map)

    def failed(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    return done, failed


def _now_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)
