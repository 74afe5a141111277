"""Changes of the cluster map: one compare-and-set at a time, each sent until its outcome is known.

Pure: edits in, bytes for the config store out, outcomes in. map_store.py is the shell with a real store, the simulation
has another. A change counts only when it is known to be stored.

- One change is in flight. Those proposed meanwhile are combined into the next one, in order.
- Two changes of one shard's row are never combined: the stored in-sync sets of a shard follow each other by one step
  (I7). The second waits for the first, and later proposals wait too.
- After an unknown outcome the *same bytes* are sent again every MAP_RESEND_MS (R2). That is safe: they can be stored
  once only, as they expect one version of the store. A conflict then means either that the first attempt was stored,
  which the value that was read shows, or that another coordinator was faster.
- Any other conflict means that another coordinator changed the map and owns the cluster. That is final (`lost_reason`),
  reported once, and fails every change.

The version that a compare-and-set expects is the store's. The map's own `version` grows by one with each change, and is
the same number unless the first map was founded with another one. Our value is recognized by all its bytes, which
contain the owner and that version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Outcome, Stored
from kvtcp.constants import MAP_RESEND_MS

Edit = Callable[[ClusterMap], ClusterMap]
Done = Callable[[ClusterMap], None]
Failed = Callable[[Exception], None]

LOST: Final = "the cluster map was changed by somebody else: another coordinator owns it now"


class NotOwner(Exception):
    """Raised when another coordinator owns the cluster; the sentence says how that showed."""


@dataclass(frozen=True)
class _Change:
    edit: Edit
    done: Done
    failed: Failed | None  # None: tried until it is stored


@dataclass
class _Flight:
    """The change that the store was given, or is given next."""

    expected: int | None  # version of the store
    new: ClusterMap
    value: bytes
    changes: list[_Change]
    is_sent: bool = False  # an outcome is awaited
    is_unsure: bool = False  # an attempt may have been stored, or may be stored later


class MapChanges:
    """The map that a store is known to hold, and its next changes."""

    def __init__(self, cluster_map: ClusterMap | None, store_version: int | None = None) -> None:
        """`store_version` defaults to the version of the map. Without a map the store has no value."""
        assert cluster_map is not None or store_version is None, "a store without a map has no version"
        self._map = cluster_map
        self.store_version = cluster_map.version if cluster_map is not None and store_version is None else store_version
        self._waiting: list[_Change] = []  # not in flight, in order
        self._flight: _Flight | None = None
        self.due_ms = 0  # `to_send` has nothing before that time
        self.lost_reason = ""  # sentence: another coordinator owns the map, for good
        self.trouble = ""  # sentence: why the last compare-and-set did not succeed; empty = it did
        # called in order with every map that was stored, before the `done` of its changes
        self.on_change: list[Callable[[ClusterMap], None]] = []
        self.on_lost: Callable[[NotOwner], None] = lambda error: None  # called once: another coordinator owns the map

    @classmethod
    def of(cls, stored: Stored | None) -> MapChanges:
        """Make one for the value of a store. Raises MapError."""
        return cls(None) if stored is None else cls(ClusterMap.from_json(stored.value), stored.version)

    # --- questions ----------------------------------------------------------------------------------

    @property
    def is_founded(self) -> bool:
        """Whether there is a map."""
        return self._map is not None

    @property
    def map(self) -> ClusterMap:
        """The map that the store is known to hold."""
        assert self._map is not None, "the cluster is founded before its map is asked for"
        return self._map

    @property
    def proposed(self) -> ClusterMap | None:
        """The map that the store may hold already, or may hold next: that of the change in flight."""
        return None if self._flight is None else self._flight.new

    @property
    def is_busy(self) -> bool:
        """Whether a change is in flight or waits."""
        return self._flight is not None or bool(self._waiting)

    @property
    def is_unsure(self) -> bool:
        """Whether the change in flight had an unknown outcome: after a conflict the store is then read."""
        return self._flight is not None and self._flight.is_unsure

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        if self._map is not None:
            assert ClusterMap.from_json(self._map.to_json()) == self._map, "the map can be read back"
        assert (self._map is None) == (self.store_version is None), "the map has a version in the store"
        assert not (self.lost_reason and self.is_busy), "a lost map is not changed"
        flight = self._flight
        if flight is None:
            return
        assert flight.expected == self.store_version, "the change in flight expects the stored version"
        assert ClusterMap.from_json(flight.value) == flight.new, "the bytes in flight are the map in flight"
        assert flight.changes, "the map in flight was proposed"
        if self._map is not None:
            assert flight.new.version == self._map.version + 1, "the version grows by one"
            assert flight.new.epoch >= self._map.epoch, "the epoch only grows"

    # --- changes ------------------------------------------------------------------------------------

    def found(self, first: ClusterMap, done: Done, failed: Failed) -> None:
        """Store the first map."""
        assert self._map is None and not self.is_busy, "a cluster is founded once"
        self._flight = _Flight(None, first, first.to_json(), [_Change(lambda none: first, done, failed)])

    def propose(self, edit: Edit, done: Done, failed: Failed | None = None) -> None:
        """Store the map that `edit` makes of the current one; then call `done` with it.

        `edit` is pure. It is called when its turn comes, and again if it then has to wait. With `failed`, a change ends
        if its edit raises ValueError or the store certainly changed nothing: `failed` gets the error. Without it the
        change is tried until it is stored. Once the map is lost, `failed` gets NotOwner, perhaps in this call, and
        `done` is never called.
        """
        assert self._map is not None, "a cluster is founded before its map is changed"
        if not self.lost_reason:
            self._waiting.append(_Change(edit, done, failed))
        elif failed is not None:
            failed(NotOwner(self.lost_reason))

    def to_send(self, now_ms: int) -> tuple[int | None, bytes] | None:
        """The next compare-and-set, (expected version, value), whose outcome is then awaited; None if there is none.

        Changes that change nothing are done in this call. Raises MapError if the edits together make no map, and any
        error of an edit except a ValueError that `failed` gets.
        """
        if self.lost_reason or now_ms < self.due_ms or (self._flight is not None and self._flight.is_sent):
            return None
        while self._flight is None and self._waiting:
            self._combine()
        if self._flight is None:
            return None
        self._flight.is_sent = True
        return self._flight.expected, self._flight.value

    def on_outcome(self, outcome: Outcome, stored: Stored | None = None, *, now_ms: int) -> None:
        """Take the outcome of the compare-and-set. After a conflict while `is_unsure`, `stored` is the value read since
        (NOTHING for an empty store), None if it could not be read."""
        flight = self._awaited()
        if outcome is Outcome.CONFLICT and flight.is_unsure:
            expected = flight.expected or 0
            if stored is None or stored.version == expected:
                outcome = Outcome.UNKNOWN  # a read that shows the value from before is an old one
            elif stored == Stored(expected + 1, flight.value):
                outcome = Outcome.DONE
        if outcome is Outcome.DONE:
            self._settle(flight)
        elif outcome is Outcome.CONFLICT:
            self._lose(flight)
        else:
            self._unsettle(flight, "it is not known whether the cluster map was stored", now_ms)

    def on_failed(self, error: Exception, *, now_ms: int) -> None:
        """Take an error of the store, which certainly changed nothing, and will not; earlier attempts may have."""
        flight = self._awaited()
        if flight.is_unsure:
            self._unsettle(flight, f"it is not known whether the cluster map was stored: {error}", now_ms)
            return
        self._flight = None
        self.trouble = f"the cluster map cannot be stored: {error}"
        again = [change for change in flight.changes if change.failed is None]
        self._waiting[:0] = again
        self.due_ms = now_ms + MAP_RESEND_MS if again else 0
        _tell(flight.changes, error)

    # --- one change ---------------------------------------------------------------------------------

    def _combine(self) -> None:
        """Put into flight those of the waiting changes that can go together."""
        new = self.map
        rows: set[int] = set()  # whose members `new` changes
        count = 0
        while count < len(self._waiting):
            change = self._waiting[count]
            try:
                made = change.edit(new)
            except ValueError as error:
                del self._waiting[count]
                if change.failed is None:
                    raise
                change.failed(error)
                continue
            changed = _changed_rows(new, made)
            if changed & rows:
                break
            rows |= changed
            new = made
            count += 1
        taken = self._waiting[:count]
        if new != self.map:
            assert new.epoch >= self.map.epoch, "the epoch only grows"
            new = replace(new, version=self.map.version + 1)
            new.check()
            self._flight = _Flight(self.store_version, new, new.to_json(), taken)
        del self._waiting[:count]
        if self._flight is None:
            for change in taken:
                change.done(self.map)

    def _awaited(self) -> _Flight:
        assert self._flight is not None and self._flight.is_sent, "an outcome belongs to a compare-and-set"
        return self._flight

    def _unsettle(self, flight: _Flight, trouble: str, now_ms: int) -> None:
        flight.is_sent = False
        flight.is_unsure = True
        self.trouble = trouble
        self.due_ms = now_ms + MAP_RESEND_MS

    def _settle(self, flight: _Flight) -> None:
        self._flight = None
        self._map = flight.new
        self.store_version = (flight.expected or 0) + 1
        self.due_ms = 0
        self.trouble = ""
        for on_change in self.on_change:
            on_change(flight.new)
        for change in flight.changes:
            change.done(flight.new)

    def _lose(self, flight: _Flight) -> None:
        self.lost_reason = LOST
        ended = flight.changes + self._waiting
        self._flight, self._waiting = None, []
        error = NotOwner(LOST)
        self.on_lost(error)
        _tell(ended, error)


def _changed_rows(old: ClusterMap, new: ClusterMap) -> set[int]:
    """The shards whose members, or their order, are others."""
    if old.members is new.members:
        return set()
    return {n for n, (was, now) in enumerate(zip(old.members, new.members, strict=True)) if was != now}


def _tell(changes: list[_Change], error: Exception) -> None:
    for change in changes:
        if change.failed is not None:
            change.failed(error)
