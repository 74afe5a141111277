"""ConfigStore: the contract of a config store, one value that is changed by compare-and-set only.

Pure. MapChanges decides by the contract without a store, MapStore brings both together.

The value is JSON text, opaque to the store. Its version counts the changes: none at first, then 1, 2, 3... Calls are
asynchronous, because a store may be a service on other machines.

A compare-and-set has three outcomes. DONE and CONFLICT are certain. After UNKNOWN the change may be applied, at once or
later; a read that shows the old value settles nothing. The caller sends the same again until the version has moved,
which is safe: the same change can be applied once only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol


class Outcome(Enum):
    """Outcomes of a compare-and-set."""

    DONE = "done"  # the value is stored; its version is the expected one + 1
    CONFLICT = "conflict"  # the version is not the expected one; nothing was changed
    UNKNOWN = "unknown"  # the value may be stored, now or later


@dataclass(frozen=True)
class Stored:
    """The value of a store."""

    version: int
    value: bytes


NOTHING: Final = Stored(0, b"")  # stands for a store without a value


class ConfigStoreError(Exception):
    """The store cannot be used; the sentence says why and what to do."""


class ConfigStore(Protocol):
    """One value."""

    async def read(self) -> Stored | None:
        """The value, None if there is none yet. Raises ConfigStoreError for one that cannot be read."""

    async def compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
        """Store `value` if the version is the expected one, None = if there is none. Raises OSError if nothing was
        changed and nothing will be, ConfigStoreError if what is there cannot be read."""
