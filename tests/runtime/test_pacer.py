"""The pacer: shares, rates, slices that are held, and what does not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvtcp.runtime import pacer
from kvtcp.runtime.pacer import IdleWatch, Pacer


class Timer:
    """One of a loop by hand."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        """It never comes."""
        self.is_cancelled = True


class Loop:
    """A loop and a clock that are moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[tuple[float, Timer]] = []

    def monotonic(self) -> float:
        """The clock."""
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Remember it."""
        timer = Timer(callback)
        self.timers.append((delay_s, timer))
        return timer

    def step(self) -> float:
        """The next timer is due; after how many seconds."""
        delay_s, timer = self.timers.pop(0)
        assert not timer.is_cancelled
        self.now_s += delay_s
        timer.callback()
        return delay_s


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loop whose clock the pacer looks at."""
    made = Loop()
    monkeypatch.setattr(pacer, "time", type("Clock", (), {"monotonic": made.monotonic}))
    return made


def slices(loop: Loop, *taken: tuple[float, int | None]) -> Callable[[], int | None]:
    """Slices that take so many seconds and move so many bytes."""
    left = iter(taken)

    def make() -> int | None:
        seconds, size = next(left)
        loop.now_s += seconds
        return size

    return make


def test_a_share_of_the_loop(loop: Any) -> None:
    """The pause follows from how long the slice took, and from the share at that time; after the last there is none."""
    shares = iter((0.25, 0.5))
    job = Pacer(loop, slices(loop, (0.1, 1), (0.2, 1), (0.1, None)), share=lambda: next(shares))
    job.run()
    assert loop.step() == pytest.approx(0.3) and loop.step() == pytest.approx(0.2)
    assert not loop.timers
    job.resume()
    assert not loop.timers


def test_a_rate(loop: Any) -> None:
    """The longer of the two pauses."""
    job = Pacer(loop, slices(loop, (0.1, 1000), (0.1, 10), (0.1, 0)), share=lambda: 0.5, rate_bytes_s=lambda: 1000)
    job.run()
    assert loop.step() == pytest.approx(0.9) and loop.step() == pytest.approx(0.1)


def test_what_is_held_goes_on_at_once(loop: Any) -> None:
    """Not before it is resumed, and not if it was stopped meanwhile."""
    def make() -> int:
        made.append(1)
        job.hold()
        return 1

    made: list[int] = []
    job = Pacer(loop, make, share=lambda: 0.5)
    job.run()
    assert len(made) == 1 and not loop.timers
    job.resume()
    assert len(made) == 2
    job.stop()
    job.resume()
    assert len(made) == 2


def test_stopped(loop: Any) -> None:
    """Between two slices, or within one."""
    job = Pacer(loop, slices(loop, (0.1, 1)), share=lambda: 0.5)
    job.run()
    job.stop()
    assert loop.timers.pop()[1].is_cancelled

    def make() -> int:
        job.stop()
        return 1

    job = Pacer(loop, make, share=lambda: 0.5)
    job.run()
    assert not loop.timers


def test_what_does_not_move(loop: Any) -> None:
    """It is told once, when nothing moved for so long; the watch is as long as what is left."""
    idle: list[float] = []
    watch = IdleWatch(loop, 2000, idle.append)
    loop.now_s += 0.5
    watch.moved()
    loop.timers[0] = (1.5, loop.timers[0][1])
    loop.step()
    assert not idle and loop.step() == pytest.approx(0.5)
    assert idle == [pytest.approx(2.0)] and not loop.timers
    watch = IdleWatch(loop, 2000, idle.append)
    watch.stop()
    assert loop.timers.pop()[1].is_cancelled
