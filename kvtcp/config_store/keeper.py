"""The keeper: the coordinator's hand on the cluster map, which is one value in the config store.

I/O shell, without a clock of its own but for a pause. `map` is what the store is known to hold; nothing is decided by a
change before its outcome is known.

- One change is in flight at a time; those that came meanwhile are the next one, together, in order.
- After an unknown outcome the same change is sent again until the version has moved (R2).
- A conflict means that somebody else changed the map: this coordinator does not own the cluster any more. That is told
  once, to `on_lost`, and every change fails with NotOwner from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from kvtcp.config_store.store import ConfigStore, ConfigStoreError, Outcome, Stored
from kvtcp.constants import MAP_RESEND_MS
from kvtcp.replication.cluster_map import ClusterMap, MapError

Edit = Callable[[ClusterMap], ClusterMap]


class NotOwner(Exception):
    """Another coordinator owns the cluster; the sentence says how that showed."""


class MapKeeper:
    """The map of a store. Made by `open`."""

    def __init__(self, store: ConfigStore, stored: Stored | None) -> None:
        self._store = store
        self._version = None if stored is None else stored.version
        self._map = None if stored is None else ClusterMap.from_json(stored.value)
        self._waiting: list[tuple[Edit, asyncio.Future[ClusterMap]]] = []  # changes that are not in flight yet
        self._task: asyncio.Task[None] | None = None  # makes the changes; None = there are none
        self._lost: NotOwner | None = None
        self.on_change: Callable[[ClusterMap], None] = lambda cluster_map: None  # told of every map that was stored
        self.on_lost: Callable[[NotOwner], None] = lambda error: None

    @classmethod
    async def open(cls, store: ConfigStore) -> MapKeeper:
        """Read the store. Raises ConfigStoreError if what it holds is no map of this version."""
        stored = await store.read()
        try:
            return cls(store, stored)
        except MapError as error:
            raise ConfigStoreError(f"the config store holds something else than it should: {error}") from error

    @property
    def is_founded(self) -> bool:
        """Whether there is a map."""
        return self._map is not None

    @property
    def map(self) -> ClusterMap:
        """The map that the store holds."""
        assert self._map is not None, "the cluster is founded before its map is asked for"
        return self._map

    async def found(self, first: ClusterMap) -> None:
        """Store the first map. Raises OSError (nothing was stored), NotOwner, ConfigStoreError."""
        assert self._map is None, "a cluster is founded once"
        await self._settle(first)

    async def change(self, edit: Edit) -> ClusterMap:
        """Store what `edit` makes of the map; returns the map with it. `edit` is pure, and is called once.

        Raises OSError if nothing was changed, NotOwner, ConfigStoreError. A caller that is cancelled leaves its change
        to be made.
        """
        if self._lost is not None:
            raise self._lost
        future: asyncio.Future[ClusterMap] = asyncio.get_running_loop().create_future()
        self._waiting.append((edit, future))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="changes of the map")
        return await future

    async def close(self) -> None:
        """Give up what is under way: whether it is stored the next coordinator will read."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._drop(self._waiting, asyncio.CancelledError())
        self._waiting = []

    @property
    def is_busy(self) -> bool:
        """Whether a change is in flight."""
        return self._task is not None

    async def _work(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting, []
                try:
                    new = self.map
                    for edit, _ in taken:
                        new = edit(new)
                    if new != self.map:
                        await self._settle(replace(new, version=self.map.version + 1))
                except BaseException as error:
                    self._drop(taken, error)
                    if not isinstance(error, (OSError, NotOwner, ConfigStoreError)):
                        raise
                    continue
                for _, future in taken:
                    if not future.done():
                        future.set_result(self.map)
        finally:
            self._task = None

    @staticmethod
    def _drop(waiting: list[tuple[Edit, asyncio.Future[ClusterMap]]], error: BaseException) -> None:
        for _, future in waiting:
            if future.done():
                continue
            if isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)

    async def _settle(self, new: ClusterMap) -> None:
        """Store `new`, whatever it takes to know that it is stored."""
        value = new.to_json()
        is_unsure = False
        while True:
            try:
                outcome = await self._store.compare_and_set(self._version, value)
            except OSError:
                if not is_unsure:
                    raise
                outcome = Outcome.UNKNOWN  # this one changed nothing, the one before may have
            if outcome is Outcome.CONFLICT and is_unsure:
                stored = await self._store.read()
                if stored is not None and stored.value == value:
                    outcome = Outcome.DONE
            if outcome is Outcome.DONE:
                break
            if outcome is Outcome.CONFLICT:
                self._lost = NotOwner("the cluster map was changed by somebody else: another coordinator owns it now")
                self.on_lost(self._lost)
                raise self._lost
            is_unsure = True
            await asyncio.sleep(MAP_RESEND_MS / 1000)
        self._version = (self._version or 0) + 1
        self._map = new
        self.on_change(new)
