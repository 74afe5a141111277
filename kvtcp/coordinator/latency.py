"""Write times: how long writes take in the coordinator, from a sample.

One write at a time is followed: the newest of some shard, from the end of the tick in which it was queued to the tick
in which it is committed. That costs nothing on the path of the others, and gives a few hundred samples a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kvtcp.replication.sequencing.link import Link
from kvtcp.replication.sequencing.shard import Shard

SAMPLES = 1_000


class WriteTimes:
    """The last SAMPLES of them."""

    def __init__(self, shards: list[Shard], clock: Callable[[], float]) -> None:
        self._shards = shards
        self._clock = clock  # seconds
        self._times_ms: deque[float] = deque(maxlen=SAMPLES)
        self._followed: tuple[Shard, int, float] | None = None

    def look(self, ready: list[Link]) -> None:
        """The end of a tick, with the links that have something to send."""
        if self._followed is not None:
            shard, seq, began = self._followed
            if shard.commit < seq and shard.serving:
                return
            if shard.serving:
                self._times_ms.append((self._clock() - began) * 1000)
            self._followed = None
        for link in ready:
            for number, seq in link.outgoing[-1].last_seqs.items() if link.outgoing else ():
                if self._shards[number].commit < seq:
                    self._followed = (self._shards[number], seq, self._clock())
                return

    def p99_ms(self) -> float | None:
        """The 99th percentile; None before there are samples."""
        if not self._times_ms:
            return None
        ordered = sorted(self._times_ms)
        return round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 2)
