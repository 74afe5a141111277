"""The map store: holds the cluster map for a coordinator, over a config store in which the map is one value.

I/O shell around cluster/changes.py, where the rules are: one change at a time, unknown outcomes settled, conflicts
final. A task runs while a change is in flight or waits. It must not fail: an error of an edit or a callback is raised
in every pending `change`, and goes to `on_crash`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvtcp.cluster.changes import Done, Edit, Failed, MapChanges, NotOwner
from kvtcp.cluster.map import ClusterMap, MapError
from kvtcp.cluster.store import NOTHING, ConfigStore, ConfigStoreError, Outcome, Stored

__all__ = ["Edit", "MapStore", "NotOwner", "ends_of"]


class MapStore:
    """The map of a config store. Made by `open`."""

    def __init__(self, store: ConfigStore, changes: MapChanges) -> None:
        self._store = store
        self.changes = changes
        self._task: asyncio.Task[None] | None = None  # makes the changes; None if there are none
        self._futures: set[asyncio.Future[ClusterMap]] = set()  # of `change`
        self.on_crash: Callable[[BaseException], None] = lambda error: None

    @classmethod
    async def open(cls, store: ConfigStore) -> MapStore:
        """Read the store. Raises ConfigStoreError if its value is no map of this version."""
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
        """The map that the store is known to hold."""
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
        """Store the map that `edit` makes of the current one, and return it; see MapChanges.propose.

        Raises OSError if nothing was changed, NotOwner, ConfigStoreError, and a ValueError of the edit. If the caller
        is cancelled its change is made all the same.
        """
        future = self._future()
        self.changes.propose(edit, *ends_of(future))
        self.wake()
        return await future

    def wake(self) -> None:
        """Begin to store the changes proposed to `changes`."""
        if self._task is None and self.changes.is_busy:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="changes of the map")

    async def close(self) -> None:
        """Give up the change under way: the next coordinator will read whether it was stored."""
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
        """The value, None if it cannot be read now: the change is then sent again, and the store read again."""
        try:
            return await self._store.read() or NOTHING
        except (OSError, ConfigStoreError):
            return None


def ends_of(future: asyncio.Future[ClusterMap]) -> tuple[Done, Failed]:
    """The `done` and `failed` that end a future whose caller may have been cancelled."""

    def done(cluster_map: ClusterMap) -> None:
        if not future.done():
            future.set_result(cluster_map)

    def failed(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    return done, failed


def _now_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)
