"""A config store in memory: for clusters in one process, and for tests.

The value lasts as long as the object: one that is handed to the next coordinator is like a data directory.
"""

from __future__ import annotations

from kvtcp.cluster.store import Outcome, Stored


class MemoryConfigStore:
    """`ConfigStore` without a disk."""

    def __init__(self) -> None:
        self.stored: Stored | None = None

    async def read(self) -> Stored | None:
        """The value."""
        return self.stored

    async def compare_and_set(self, expected_version: int | None, value: bytes) -> Outcome:
        """Store `value` if the version is the expected one."""
        version = None if self.stored is None else self.stored.version
        if version != expected_version:
            return Outcome.CONFLICT
        self.stored = Stored((version or 0) + 1, value)
        return Outcome.DONE
