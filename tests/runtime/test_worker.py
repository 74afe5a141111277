"""The worker: work in order in another thread, results on the loop, an end that does not wait for ever."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvtcp.runtime.worker import FileTasks, Worker


async def test_work_is_done_in_order_in_another_thread() -> None:
    """Results come back on the loop in the order of the work, errors as errors."""
    loop = asyncio.get_running_loop()
    worker = Worker(loop, "test")
    results: list[Any] = []
    finished = asyncio.Event()
    here = threading.get_ident()

    def done(result: Any, error: BaseException | None) -> None:
        assert threading.get_ident() == here
        results.append(error or result)
        if len(results) == 4:
            finished.set()

    def fail() -> None:
        raise OSError(28, "full")

    worker.submit(lambda: 1, done)
    worker.submit(fail, done)
    worker.submit(lambda: threading.current_thread().name, done)
    worker.submit(lambda: threading.get_ident() != here, done)
    await asyncio.wait_for(finished.wait(), 10)
    assert results[0] == 1 and results[2:] == ["test", True]
    assert isinstance(results[1], OSError) and results[1].errno == 28
    assert worker.stop(10)


async def test_errors_of_every_kind_come_back() -> None:
    """Also what is no Exception: somebody has to end the process."""
    got: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    worker = Worker(asyncio.get_running_loop(), "test")

    def leave() -> None:
        raise SystemExit(3)

    worker.submit(leave, lambda _, error: got.set_result(error))
    assert isinstance(await asyncio.wait_for(got, 10), SystemExit)
    assert worker.stop(10)


async def test_stop_does_what_is_queued() -> None:
    """`stop` ends the thread behind everything that was handed over."""
    worker = Worker(asyncio.get_running_loop(), "test")
    made: list[int] = []
    for number in range(100):
        worker.submit(lambda number=number: made.append(number), lambda *_: None)  # type: ignore[misc]
    assert worker.stop(10) and made == list(range(100))
    assert worker.stop(0), "it ended"


async def test_stop_waits_a_bounded_time() -> None:
    """Work that is stuck does not keep the process: `stop` says so and goes on."""
    worker = Worker(asyncio.get_running_loop(), "test")
    release = threading.Event()
    worker.submit(release.wait, lambda *_: None)
    assert not worker.stop(0.01)
    release.set()
    assert worker.stop(10)


def test_a_closed_loop_ends_the_worker() -> None:
    """When the loop is gone, so is whoever wanted results: the thread ends without a word."""
    loop = asyncio.new_event_loop()
    worker = Worker(loop, "test")
    loop.close()
    worker.submit(lambda: 1, lambda *_: None)
    worker._thread.join(10)
    assert not worker._thread.is_alive()


def raising(number: int) -> Callable[[], Any]:
    """Work that ends in an error of the system."""

    def work() -> None:
        raise OSError(number, "no")

    return work


def test_no_space_ends_the_job() -> None:
    """It is told once, nothing that was queued is done any more; other errors are those of the thread."""
    queue: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
    told: list[Any] = []
    tasks = FileTasks(lambda *task: queue.append(task), lambda full: told.append(full.errno))
    for work in (lambda: 1, raising(errno.ENOSPC), lambda: 2):
        tasks.add(work, told.append)
    for work, done in queue:
        done(work())
    tasks.add(lambda: told.append("done"), told.append)
    assert queue[-1][0]() is None and told == [1, errno.ENOSPC] and tasks.is_over
    tasks = FileTasks(lambda *task: queue.append(task), told.append)
    tasks.add(raising(errno.EIO), told.append)
    with pytest.raises(OSError):
        queue[-1][0]()


def test_a_job_that_is_over() -> None:
    """Its results concern nobody any more."""
    queue: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
    told: list[Any] = []
    tasks = FileTasks(lambda *task: queue.append(task), told.append)
    tasks.add(lambda: 1, told.append)
    result = queue[0][0]()
    tasks.is_over = True
    queue[0][1](result)
    assert result == 1 and not told
