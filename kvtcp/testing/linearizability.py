"""Linearizability: does an order of operations exist that explains all results for one key?

Pure. The algorithm is that of Wing and Gong with Lowe's cache of visited (set of linearized operations, state) pairs.
Keys are independent, so a history is checked one key at a time; that keeps the search small. Keep it to about ten
operations at once and a thousand per key: the problem is NP-complete.

An operation is a tuple `(call, ret, kind, argument, result)`:

    call, ret       times of the request and of its answer, in any unit; ret None = the outcome is not known: it may
                    take effect at any time after its call, or never
    "get"           argument None; result the value, None if absent
    "exists"        argument None; result whether the key was there
    "put"           argument the value; result "ok"
    "delete"        argument None; result whether the key was there
    "add"           argument the value; result True if it was set, False if the key existed
    "cas"           argument (expected, new); result whether the value was set
    "incr"          argument an integer; result the new integer
    "swap"          argument the value; result the old one, None if absent
    "append"        argument an integer whose digits are put behind those of the value; result the number of digits

If the numbers of the operations in the log are known, no search is needed: `check_order` compares results and times
with that one order, for millions of operations.

Unanswered operations that are the same but for their call are taken in the order of their calls: in any order that
explains a history they can change places. Without that a dozen of them makes the search hopeless.

The list of events (calls and returns in order of time) is doubly linked so that an operation is taken out and put back
in O(1); place `len(events)` is the sentinel before the first and behind the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

TimedOperation = tuple[float, float | None, str, Any, Any]
Numbered = tuple[int, TimedOperation]


def step(state: Any, kind: str, argument: Any) -> tuple[Any, Any]:
    """The specification of one key: (state, None = absent) and operation to (next state, result)."""
    if kind == "get":
        return state, state
    if kind == "exists":
        return state, state is not None
    if kind == "put":
        return argument, "ok"
    if kind == "delete":
        return None, state is not None
    if kind == "add":
        return (argument, True) if state is None else (state, False)
    if kind == "cas":
        return (argument[1], True) if state == argument[0] else (state, False)
    if kind == "incr":
        number = (state or 0) + argument
        return number, number
    if kind == "swap":
        return argument, state
    if kind == "append":
        digits = f"{'' if state is None else state}{argument}"
        return int(digits), len(digits)
    raise ValueError(f"unknown kind of operation: {kind}")


class _Events:
    """Calls and returns in order of time, linked; at equal times calls are first, which allows more orders."""

    def __init__(self, operations: Sequence[TimedOperation]) -> None:
        events = [(operation[0], 0, n) for n, operation in enumerate(operations)]
        events += [(operation[1], 1, n) for n, operation in enumerate(operations) if operation[1] is not None]
        events.sort()
        self.end = len(events)
        self.call_of = [n if not is_return else None for _, is_return, n in events]  # None = a return
        self.places: list[list[int]] = [[] for _ in operations]  # of the call and the return, if it has one
        for place, (_, _, n) in enumerate(events):
            self.places[n].append(place)
        self.after = [*range(1, self.end + 1), 0]
        self.before = [self.end, *range(self.end)]

    def take_out(self, n: int) -> None:
        for place in self.places[n]:
            self.after[self.before[place]] = self.after[place]
            self.before[self.after[place]] = self.before[place]

    def put_back(self, n: int) -> None:
        for place in reversed(self.places[n]):
            self.after[self.before[place]] = place
            self.before[self.after[place]] = place


def _earlier_twins(operations: Sequence[TimedOperation]) -> list[int]:
    """For each unanswered operation the same one that was called last before it, as a bit; 0 for none."""
    twins = [0] * len(operations)
    last: dict[tuple[str, Any], int] = {}
    for n in sorted(range(len(operations)), key=lambda n: operations[n][0]):
        _, ret, kind, argument, _ = operations[n]
        if ret is None:
            twins[n] = last.get((kind, argument), 0)
            last[kind, argument] = 1 << n
    return twins


def check_history(operations: Sequence[TimedOperation], initial: Any = None, budget: int = 5_000_000) -> bool | None:
    """Whether the history of one key is linearizable; None if `budget` steps did not decide it."""
    events = _Events(operations)
    twins = _earlier_twins(operations)
    left = sum(operation[1] is not None for operation in operations)  # answered operations without a place in the order
    state, taken = initial, 0
    order: list[tuple[int, Any]] = []  # operations in the order tried, each with the state before it
    seen: set[tuple[int, Any]] = set()
    place = events.after[events.end]
    while left:
        budget -= 1
        if budget < 0:
            return None
        n = events.call_of[place] if place != events.end else None
        if n is not None:
            _, ret, kind, argument, result = operations[n]
            next_state, outcome = step(state, kind, argument)
            next_taken = taken | 1 << n
            fits = outcome == result if ret is not None else not twins[n] & ~taken
            if fits and (next_taken, next_state) not in seen:
                seen.add((next_taken, next_state))
                order.append((n, state))
                state, taken = next_state, next_taken
                events.take_out(n)
                left -= ret is not None
                place = events.after[events.end]
            else:
                place = events.after[place]
            continue
        # the next event is the return of an operation without a place in the order: the last choice was wrong
        if not order:
            return False
        n, state = order.pop()
        taken &= ~(1 << n)
        events.put_back(n)
        left += operations[n][1] is not None
        place = events.after[events.places[n][0]]
    return True


def check_order(numbered: Iterable[Numbered], initial: Any = None) -> str:
    """The contradiction to the order of one key's log, or "" if there is none, in O(n log n).

    Each operation comes with its sequence number, a "get" with that of the last write it saw. Operations without an
    answer are given too if they are in the log.
    """
    state, called, last = initial, float("-inf"), -1  # called: the latest call of earlier operations
    for seq, operation in sorted(numbered, key=lambda each: (each[0], each[1][2] == "get", each[1][0])):
        call, ret, kind, argument, result = operation
        if kind != "get":
            if seq == last:
                return f"two writes have number {seq}"
            last = seq
        if ret is not None and ret < called:
            return f"{kind} at {seq} ended before something that is ordered before it began"
        called = max(called, call)
        state, outcome = step(state, kind, argument)
        if ret is not None and outcome != result:
            return f"{kind} at {seq} gave {result!r} instead of {outcome!r}"
    return ""
