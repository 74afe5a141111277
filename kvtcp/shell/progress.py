"""A progress bar on a terminal's stderr, for import, export, backup and restore, and for moves of shards.

    import  45% [#############.................] 120,034 pairs, 61,200/s
    node drain  75% [######################........] 5 shards left

The bar is drawn at most ten times a second, on one line that is cleared at the end, and not at all where stderr is no
terminal. The time comes from a clock that can be passed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

_BAR_COLUMNS: Final = 30
_INTERVAL_S: Final = 0.1
_CLEAR: Final = "\r\x1b[K"


class ProgressBar:
    """One piece of work. Use as a context manager; `update` as often as there is news."""

    def __init__(self, stderr: TextIO, label: str, *, shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stderr = stderr
        self._label = label
        self._shown = shown
        self._clock = clock
        self._started = clock()
        self._drawn_at = -_INTERVAL_S + self._started
        self._is_drawn = False  # there is a line to clear
        self._left_max = 0  # the most that was ever left

    def update(self, items: int, fraction: float | None = None, noun: str = "pairs") -> None:
        """Show that `items` of `noun` are done, `fraction` (0..1, None = not known) of the work."""
        rate = items / max(self._clock() - self._started, _INTERVAL_S)
        self._draw(fraction, f"{items:,} {noun}, {rate:,.0f}/s")

    def left(self, items: int, noun: str = "shards") -> None:
        """Show that `items` of `noun` are left, of the most that ever were."""
        self._left_max = max(self._left_max, items)
        self._draw(1 - items / self._left_max if self._left_max else None, f"{items:,} {noun} left")

    def _draw(self, fraction: float | None, text: str) -> None:
        if not self._shown:
            return
        now = self._clock()
        if now - self._drawn_at < _INTERVAL_S:
            return
        self._drawn_at = now
        bar = ""
        if fraction is not None:
            filled = round(min(max(fraction, 0.0), 1.0) * _BAR_COLUMNS)
            bar = f" {min(max(fraction, 0.0), 1.0):4.0%} [{'#' * filled}{'.' * (_BAR_COLUMNS - filled)}]"
        self._stderr.write(f"{_CLEAR}{self._label}{bar} {text}")
        self._stderr.flush()
        self._is_drawn = True

    def report(self, progress: Mapping[str, Any]) -> None:
        """Show progress as the servers report it: a map with `pairs_done` and `pairs`, or `files_done` and `files`."""
        for noun in ("pairs", "files"):
            done, total = progress.get(f"{noun}_done"), progress.get(noun)
            if isinstance(done, int):
                self.update(done, done / total if isinstance(total, int) and total > 0 else None, noun)

    def clear(self) -> None:
        """Remove the line, before something else is written."""
        if self._is_drawn:
            self._stderr.write(_CLEAR)
            self._stderr.flush()
            self._is_drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()
