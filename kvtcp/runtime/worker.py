"""Worker: one thread that does blocking work for an event loop, in order.

I/O shell. The log and the files of a node have a worker each, so that a long write of a snapshot never stands before a
group commit. Handing work over costs a few microseconds and makes no future. Results come back by
`call_soon_threadsafe`, in the order of the work.

A worker that is stuck in the kernel (a disk that does not answer) does not keep the process from ending: its thread is
a daemon, and `stop` waits a bounded time.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

NO_SPACE_ERRORS: Final = {errno.ENOSPC, errno.EDQUOT}

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


class FileTasks:
    """The work of one job with files, in order. If the disk has no space for it, `on_full` is called once and nothing
    more is done: that ends the job, not the node."""

    def __init__(
        self, submit: Callable[[Callable[[], Any], Callable[[Any], None]], None], on_full: Callable[[OSError], None]
    ) -> None:
        """`submit` takes work for a thread, and what is called on the loop with its result; other errors are its
        business."""
        self.is_over = False  # set by the job: what is queued is not done any more
        self._submit = submit
        self._on_full = on_full
        self._full: OSError | None = None  # set in the thread

    def add(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do this, then call `done` with the result, unless the job is over."""

        def run() -> Any:
            if self.is_over or self._full is not None:
                return None
            try:
                return work()
            except OSError as error:
                if error.errno not in NO_SPACE_ERRORS:
                    raise
                self._full = error
                return None

        def finished(result: Any) -> None:
            if self.is_over:
                return
            if self._full is None:
                done(result)
            else:
                self.is_over = True
                self._on_full(self._full)

        self._submit(run, finished)
