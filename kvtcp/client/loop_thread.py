"""The thread behind the synchronous clients: one event loop per process, shared by all of them.

A caller hands in a coroutine and sleeps on a plain lock until its task is done. The cost beside the coroutine itself is
one wake-up of the loop, one task, one release of a lock.

- The thread starts with the first client and ends with the last one, or at the exit of the interpreter.
- An exception in the sleeping caller (Ctrl-C) cancels its task and propagates; other callers do not notice.
- After a fork the thread exists only in the parent. The child starts its own when it needs one, and never touches the
  parent's loop again: the objects are kept (to free them would change the polling of the kernel for the parent).
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

_STOP_S: Final = 5.0
_inherited: list[Any] = []  # objects that a forked child must neither use nor free


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Job:
    """One coroutine on its way through the loop. `done` is held until `result` or `error` is set."""

    __slots__ = ("cancelled", "coroutine", "done", "error", "result", "task")

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.coroutine = coroutine
        self.done = threading.Lock()
        self.done.acquire()
        self.task: asyncio.Task[Any] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.cancelled = False  # the caller has left

    def start(self) -> None:
        if self.cancelled:
            self.coroutine.close()
            return
        self.task = asyncio.get_running_loop().create_task(self.coroutine)
        self.task.add_done_callback(self._finish)

    def cancel(self) -> None:
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()

    def _finish(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.error = asyncio.CancelledError()
        else:
            self.error = task.exception()
            if self.error is None:
                self.result = task.result()
        self.done.release()


class LoopThread:
    """A thread that runs an event loop. `users` clients hold it."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self.users = 0
        self._gate = threading.Lock()  # held to give the loop something: nothing comes after `stop`
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvtcp-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine run in the loop. Call from any other thread."""
        result: T = self.wait(self.start(coroutine))
        return result

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Job:
        """Hand a coroutine to the loop. Raises RuntimeError in the loop's own thread and after `stop`."""
        job = Job(coroutine)
        with self._gate:
            if not self._stopping and threading.get_ident() != self._thread.ident:
                self.loop.call_soon_threadsafe(job.start)
                return job
        coroutine.close()
        raise RuntimeError(
            "the client is closed"
            if self._stopping
            else "a synchronous client was called in its own event loop; use kvtcp.connect there"
        )

    def wait(self, job: Job) -> Any:
        """Sleep until a job is done; returns its result or raises its error."""
        try:
            job.done.acquire()
        except BaseException:
            self.cancel(job)
            raise
        error = job.error
        if error is None:
            return job.result
        if isinstance(error, asyncio.CancelledError):
            raise RuntimeError("the client was closed during the call")
        try:
            raise error
        finally:
            error = job.error = None  # it would hold itself alive through its own traceback

    def cancel(self, job: Job) -> None:
        """Cancel a job whose caller has left."""
        with self._gate:
            if not self._stopping:
                self.loop.call_soon_threadsafe(job.cancel)

    def stop(self) -> None:
        """End the loop and the thread; jobs that still run are cancelled."""
        with self._gate:
            if self._stopping:
                return
            self._stopping = True
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()


_lock = threading.Lock()
_current: LoopThread | None = None


def acquire() -> LoopThread:
    """The process's loop thread, started if need be, for one more user."""
    global _current
    with _lock:
        if _current is None:
            _current = LoopThread()
        _current.users += 1
        return _current


def release(thread: LoopThread) -> None:
    """Count one user less; the last one ends the thread."""
    global _current
    with _lock:
        thread.users -= 1
        if thread.users > 0 or thread is not _current:
            return
        _current = None
    thread.stop()


def _at_exit() -> None:
    if _current is not None:
        _current.stop()


def _after_fork_in_child() -> None:
    global _current, _lock
    _lock = threading.Lock()
    if _current is not None:
        _inherited.append(_current)
        _current = None


def keep(inherited: object) -> None:
    """Keep an object of the parent process alive in a forked child."""
    _inherited.append(inherited)


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
