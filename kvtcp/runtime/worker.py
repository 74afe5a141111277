"""Worker: one thread that does blocking work for an event loop, in order.

I/O shell. The log and the files of a node have a worker each, so that a long write of a snapshot never stands before a
group commit. Handing work over costs a few microseconds and makes no future. Results come back by
`call_soon_threadsafe`, in the order of the work.

A worker that is stuck in the kernel (a disk that does not answer) does not keep the process from ending: its thread is
a daemon, and `stop` waits a bounded time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Done = Callable[[Any, BaseException | None], None]  # result, error


class Worker:
    """Does work one after the other; `done(result, error)` is called on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._queue: SimpleQueue[tuple[Callable[[], Any], Done] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        """Queue `work`; what it raises is handed to `done`."""
        self._queue.put((work, done))

    def stop(self, wait_s: float) -> bool:
        """Do what is queued, then end; false if it did not within `wait_s`. Their `done` may never be called."""
        self._queue.put(None)
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            work, done = task
            result: Any = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:  # handed to the loop, which ends the process if it must
                error = raised
            try:
                self._loop.call_soon_threadsafe(done, result, error)
            except RuntimeError:  # the loop is closed: nobody waits for results any more
                return
