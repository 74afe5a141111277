"""A node's figures: what the STATS frame says once a second.

I/O shell: a timer that looks how late the event loop is, and the size of the process as the system tells it. Operations
are counted since the start, the coordinator takes differences; syncs, lateness and the rate of what is pulled are of
the last second.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvtcp.constants import KIB, LAG_LOOK_MS, STATS_MS
from kvtcp.node.durability import Durability
from kvtcp.node.replica import Replicas

STATM: Final = Path("/proc/self/statm")


class NodeStats:
    """Tells the figures by `tell` as long as it runs."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, replica: Replicas, durability: Durability | None,
        pulled_bytes: Callable[[], int], tell: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        """`pulled_bytes` is how many bytes of whole copies came from other nodes."""
        self._loop = loop
        self._replica = replica
        self._durability = durability
        self._pulled_bytes = pulled_bytes
        self._pulled_before = 0  # at the last telling
        self._tell = tell
        self._due_s = 0.0  # of the next look
        self._lag_s = 0.0  # the longest since the last telling
        self._told_s = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on."""
        self._due_s = time.monotonic() + LAG_LOOK_MS / 1000
        self._timer = self._loop.call_later(LAG_LOOK_MS / 1000, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now_s = time.monotonic()
        self._lag_s = max(self._lag_s, now_s - self._due_s)
        if now_s - self._told_s >= STATS_MS / 1000:
            elapsed_s, self._told_s = now_s - self._told_s, now_s
            self._tell(self.take(elapsed_s))
        self.start()

    def take(self, elapsed_s: float) -> dict[str, Any]:
        """The figures now; what is of the time since the last ones begins anew."""
        durability = self._durability
        syncs_ms = [] if durability is None else sorted(durability.take_syncs())
        lag_s, self._lag_s = self._lag_s, 0.0
        before, self._pulled_before = self._pulled_before, self._pulled_bytes()
        return {
            "operations": self._replica.operations,
            "keys": sum([table.keys_count for table in self._replica.tables.values()]),
            "log_bytes": 0 if durability is None else durability.store.log.total_bytes,
            "syncs": len(syncs_ms),
            "sync_p99_ms": round(syncs_ms[len(syncs_ms) * 99 // 100], 3) if syncs_ms else 0.0,
            "lag_ms": round(lag_s * 1000, 3),
            "memory_bytes": memory_bytes(),
            "learn_rate_bytes_s": round((self._pulled_before - before) / elapsed_s, 1),
        }


def memory_bytes() -> int:
    """Resident size of this process; where the system does not tell it, the largest it ever was."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
