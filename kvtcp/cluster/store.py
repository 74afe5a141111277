"""ConfigStore: what kvtcp needs of a config store, one value that is changed by compare-and-set only.

Pure. The contract: MapChanges decides by it without a store, MapKeeper brings both together.

The value is JSON text that the store does not look into. Its version counts the changes: none at first, then 1, 2, 3...
Everything is asynchronous, because a store may be a service on other machines.

A compare-and-set has three outcomes. DONE and CONFLICT are certain. After UNKNOWN the change may be applied, at once or
later; a read that shows the old value settles nothing. Whoever made it sends the same again until the version has
moved, which is safe: it can be applied once only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol


class Outcome(Enum):
    """Of a compare-and-set."""

    DONE = "done"  # the value is stored; its version is the expected one + 1
    CONFLICT = "conflict"  # the version is not the expected one; nothing was changed
    UNKNOWN = "unknown"  # the value may be stored, now or later


@dataclass(frozen=True)
class Stored:
    """What a store holds."""

    version: int
    value: bytes


NOTHING: Final = Stored(0, b"")  # what a read shows of a store without a value


class ConfigStoreError(Exception):
    """The store cannot be used; the sentence says why and what to do."""


class ConfigStore(Protocol):
    """One value."""

    async def read(self) -> Stored | None:
        """The value, None if there is none yet. Raises ConfigStoreError for one that cannot be read."""

    async def compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
        """Store `value` if the version is the expected one, None = if there is none. Raises OSError if nothing was
        changed and nothing will be, ConfigStoreError if what is there cannot be read."""
