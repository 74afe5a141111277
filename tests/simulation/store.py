"""The config store of a simulation: one value changed by compare-and-set, and all that can be slow or unsure about it.

*Shared*, it is a service elsewhere: a request may be under way for long, be applied after its sender was told that its
outcome is unknown, or after its sender is dead; its reply may be lost. *Local*, it is a file: a change is applied by
the process that asks for it, or dies with it; only the sync of the directory may leave it unsure.

Every value that is stored is looked at by the oracles before anybody else hears of it.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtcp.cluster.store import Outcome, Stored
from tests.simulation.world import Process, World

TIMEOUT_MS = 60  # after which a request to the shared store has an unknown outcome

# the outcome, or an error after which nothing was changed; and what the store holds, if it answered
Reply = Callable[[Outcome | OSError, Stored | None], None]


class SimStore:
    """The store. `on_stored(before, after)` is told of every change."""

    def __init__(self, world: World, value: bytes, shared: bool, on_stored: Callable[[Stored, Stored], None]) -> None:
        self.world = world
        self.stored = Stored(1, value)
        self.shared = shared
        self.on_stored = on_stored
        self.down_until_ms = 0  # nothing gets there, or nobody answers
        self.cut_off: dict[str, int] = {}  # process -> until when it does not reach the store
        self.delay_ms = 3  # upper bound, one way
        self.loses_replies = 0.0  # share of changes that are applied and whose reply is lost
        self.unsure = 0  # changes whose outcome was told as unknown
        self.under_way: list[bytes] = []  # values that may be stored yet, be their senders alive or not

    @property
    def is_down(self) -> bool:
        """Whether it does not answer now."""
        return self.down_until_ms > self.world.now_ms

    def is_cut_off(self, process: Process) -> bool:
        """Whether this process does not reach it now."""
        return self.cut_off.get(process.name, 0) > self.world.now_ms

    def _delay(self) -> int:
        return self.world.rng.randrange(1, self.delay_ms + 1)

    def read(self, process: Process, reply: Callable[[Stored | None], None]) -> None:
        """The value as it was at some moment until now; None if the store does not answer."""
        if self.is_down or self.is_cut_off(process):
            process.later(self._delay(), reply, None)
        elif not self.shared:
            process.later(0, reply, self.stored)
        else:
            life = process.life

            def arrive() -> None:
                if process.life == life:
                    process.later(self._delay(), reply, self.stored)

            self.world.at(self._delay(), arrive)

    def compare_and_set(self, process: Process, expected: int | None, value: bytes, reply: Reply) -> None:
        """Ask for a change. `reply` is called once."""
        rng = self.world.rng
        if not self.shared:
            self._change_file(process, expected, value, reply)
            return
        if self.is_down and rng.random() < 0.3:
            process.later(self._delay(), reply, ConnectionRefusedError("nobody listens"), None)
            return
        answered = [False]  # one answer for each request, be it that the time is over
        life = process.life

        def answer(outcome: Outcome, stored: Stored | None) -> None:
            if not answered[0] and process.life == life:
                answered[0] = True
                self.unsure += outcome is Outcome.UNKNOWN
                process.now(reply, outcome, stored)

        def arrive() -> None:
            if self.is_down or self.is_cut_off(process):
                if rng.random() < 0.5:  # it is in a queue somewhere
                    until_ms = max(self.down_until_ms, self.cut_off.get(process.name, 0))
                    self.world.at(until_ms - self.world.now_ms + self._delay(), arrive)
                else:
                    self.under_way.remove(value)
                return
            self.under_way.remove(value)
            outcome = self._apply(expected, value)
            if rng.random() >= self.loses_replies:
                self.world.at(self._delay(), come_back, outcome, self.stored)

        def come_back(outcome: Outcome, stored: Stored) -> None:
            if not self.is_cut_off(process):
                answer(outcome, stored)

        self.under_way.append(value)
        self.world.at(self._delay(), arrive)
        self.world.at(TIMEOUT_MS, answer, Outcome.UNKNOWN, None)

    def _change_file(self, process: Process, expected: int | None, value: bytes, reply: Reply) -> None:
        rng = self.world.rng

        def done() -> None:
            if self.is_down:  # the disk is full: nothing was changed
                reply(OSError("no space left on the device"), None)
                return
            outcome = self._apply(expected, value)
            unsure = rng.random() < self.loses_replies
            self.unsure += unsure
            # the process may be killed before it knows
            process.later(1, reply, Outcome.UNKNOWN if unsure else outcome, None if unsure else self.stored)

        process.later(self._delay(), done)

    def _apply(self, expected: int | None, value: bytes) -> Outcome:
        if self.stored.version != expected:
            return Outcome.CONFLICT
        before, self.stored = self.stored, Stored(self.stored.version + 1, value)
        self.world.note(f"store: version {self.stored.version}")
        self.on_stored(before, self.stored)
        return Outcome.DONE
