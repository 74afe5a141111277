"""Pacer: long work of an event loop, in slices between everything else.

I/O shell: two timers. A `Pacer` calls for one slice after the other. Each is measured, and the pause after it is long
enough for the slices to take no more than their share of the loop, and to move no more than their rate. The maker of a
slice may `hold` the next one until more can be taken (`resume`). An `IdleWatch` ends what does not move.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Pacer:
    """Slices of one job, until one returns None or `stop` is called."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, make_slice: Callable[[], int | None], *, share: Callable[[], float],
        rate_bytes_s: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """`make_slice` returns how many bytes it moved, None at the end. `share` is of the loop's time, above 0.
        Without `rate_bytes_s` any rate is allowed."""
        self._loop = loop
        self._make_slice = make_slice
        self._share = share
        self._rate_bytes_s = rate_bytes_s
        self._is_held = False
        self._is_over = False
        self._next: asyncio.TimerHandle | None = None

    def run(self) -> None:
        """Make the next slice now."""
        begin_s = time.monotonic()
        size = self._make_slice()
        if size is None:
            self._is_over = True
            return
        if self._is_over or self._is_held:
            return
        taken_s = time.monotonic() - begin_s
        pause_s = taken_s * (1 / self._share() - 1)
        if self._rate_bytes_s is not None:
            pause_s = max(pause_s, size / self._rate_bytes_s() - taken_s)
        self._next = self._loop.call_later(pause_s, self.run)

    def hold(self) -> None:
        """For the maker of a slice: no further one before `resume`."""
        self._is_held = True

    def resume(self) -> None:
        """Make the next slice now, if it was held."""
        if self._is_held and not self._is_over:
            self._is_held = False
            self.run()

    def stop(self) -> None:
        """Make no more."""
        self._is_over = True
        if self._next is not None:
            self._next.cancel()


class IdleWatch:
    """Calls `on_idle` with the seconds that passed when nothing moved for `idle_ms`, once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle_ms: float, on_idle: Callable[[float], None]) -> None:
        self._loop = loop
        self._idle_s = idle_ms / 1000
        self._on_idle = on_idle
        self._moved_s = time.monotonic()
        self._timer = loop.call_later(self._idle_s, self._look)

    def moved(self) -> None:
        """Something moved."""
        self._moved_s = time.monotonic()

    def stop(self) -> None:
        """Watch no more."""
        self._timer.cancel()

    def _look(self) -> None:
        idle_s = time.monotonic() - self._moved_s
        if idle_s >= self._idle_s:
            self._on_idle(idle_s)
        else:
            self._timer = self._loop.call_later(self._idle_s - idle_s, self._look)
