"""What the histories of chaos clients must satisfy, and what the nodes must hold in the end.

Pure. `History` takes the lines of `chaos_client`; `check` returns sentences, one for each broken promise:

- hot and large keys are linearizable (refused calls never happened, unknown ones may have);
- counters: every answer is given once, grows in real time, and the final value lies between what was acknowledged and
  that plus what is unknown;
- a cut never shows b ahead of a, nor less than what was acknowledged before it was asked for, nor less than an earlier
  cut showed;
- a key with a deadline is there before it and gone after it, until a coordinator is killed: the next one goes on with
  the last stamp that the one before may have given, which is some seconds ahead.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, Final

from kvtcp.testing.linearizability import Operation, check_history

TTL_SLACK_S: Final = 0.06  # a stamp is of the tick in which a request came; wall clock and monotonic one drift
BUDGET: Final = 200_000


class History:
    """All calls of all clients."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[list[Any]]] = defaultdict(list)
        self.calls = 0
        self.outcomes: dict[str, int] = defaultdict(int)
        self.undecided = 0  # keys whose search went over the budget
        self.keys_checked = 0
        self.late_s = 0.0
        self.longest_s = 0.0  # longest time between two successes of all clients together
        self._successes: list[float] = []

    def read(self, path: Path) -> None:
        """Add the file of one client."""
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if type(line) is dict:
                self.late_s = max(self.late_s, line["late_s"])
                continue
            self.by_key[line[1]].append(line)
            self.calls += 1
            self.outcomes[line[6]] += 1
            if line[6] == "ok":
                self._successes.append(line[3])

    def check(self, final: dict[str, str] | None, ended_at: float = inf) -> list[str]:
        """The broken promises. `final` is what a node holds in the end; None if that is not known.

        After `ended_at` something was killed: successes are not counted for `longest_s`, and time may jump.
        """
        self._successes.sort()
        whole = [at for at in self._successes if at <= ended_at]
        self.longest_s = max((b - a for a, b in pairwise(whole)), default=0.0)
        broken: list[str] = []
        for key, lines in self.by_key.items():
            name = key.partition("-")[0]
            if name in ("hot", "large"):
                broken += self._check_register(key, lines, final)
            elif name == "count":
                broken += _check_counter(key, lines, final)
            elif name == "ttl":
                broken += _check_ttl(key, lines, ended_at)
        broken += self._check_pairs(final)
        return broken

    def _check_register(self, key: str, lines: list[list[Any]], final: dict[str, str] | None) -> Iterable[str]:
        operations: list[Operation] = []
        end = 0.0
        for kind, _, call, ret, argument, result, outcome in lines:
            end = max(end, call, ret or 0.0)
            if outcome == "refused" or (kind == "get" and outcome != "ok"):
                continue
            argument = tuple(argument) if kind == "cas" else argument
            operations.append((call, ret if outcome == "ok" else None, kind, argument, result))
        if final is not None:
            held = final.get(key)
            operations.append((end + 1, end + 2, "get", None, None if held is None else held.rstrip()))
        self.keys_checked += 1
        verdict = check_history(operations, budget=BUDGET)
        if verdict is None:
            self.undecided += 1
        elif not verdict:
            yield f"{key} is not linearizable: {sorted(operations, key=lambda o: o[0])}"

    def _check_pairs(self, final: dict[str, str] | None) -> Iterable[str]:
        """Cuts, against each other and against what was acknowledged."""
        events: dict[str, list[tuple[float, float, int, bool]]] = defaultdict(list)  # key -> (call, ret, n, is read)
        for key, lines in self.by_key.items():
            for kind, _, call, ret, argument, result, outcome in lines:
                if outcome != "ok":
                    continue
                if kind == "put" and key.startswith("pair-"):
                    events[key].append((call, ret, argument, False))
                elif kind in ("scan", "mget"):
                    for name, value in result.items():
                        events[name].append((call, ret, value, True))
                        if name.endswith("-b") and result.get(name[:-1] + "a", 0) < value:
                            yield f"{kind} at {call}: {name} is {value}, its a is {result.get(name[:-1] + 'a', 0)}"
        end = max((event[1] for many in events.values() for event in many), default=0.0)
        for key, many in events.items():
            if final is not None:
                many.append((end + 1, end + 2, int(final.get(key, 0)), True))
            yield from _never_backwards(key, many)


def _never_backwards(key: str, events: list[tuple[float, float, int, bool]]) -> Iterable[str]:
    """What a read shows is at least what was acknowledged or shown before it was asked for."""
    returns = sorted((ret, n) for _, ret, n, _ in events)
    highest, at = 0, 0
    for call, _, n, is_read in sorted(events):
        while at < len(returns) and returns[at][0] < call:
            highest = max(highest, returns[at][1])
            at += 1
        if is_read and n < highest:
            yield f"{key}: a read that began at {call} shows {n}, after {highest} was acknowledged or shown"


def _check_counter(key: str, lines: list[list[Any]], final: dict[str, str] | None) -> Iterable[str]:
    answered = [(line[2], line[3], line[5]) for line in lines if line[6] == "ok"]
    unknown = sum(line[6] == "unknown" for line in lines)
    numbers = [number for _, _, number in answered]
    if len(set(numbers)) != len(numbers):
        yield f"{key}: an answer was given twice"
    if numbers and max(numbers) > len(numbers) + unknown:
        yield f"{key}: counted {max(numbers)} with {len(numbers)} answers and {unknown} unknown"
    yield from _never_backwards(key, [(call, ret, number, True) for call, ret, number in answered])
    if final is not None:
        held = int(final.get(key, 0))
        if not max(numbers, default=0) <= held <= len(numbers) + unknown or held < len(numbers):
            yield f"{key}: holds {held} in the end, {len(numbers)} answered, {unknown} unknown"


def _check_ttl(key: str, lines: list[list[Any]], ended_at: float) -> Iterable[str]:
    _, _, put_call, put_ret, ttl_s, _, outcome = lines[0]
    if outcome != "ok":
        return
    for kind, _, call, ret, _, result, read in lines[1:]:
        if kind != "get" or read != "ok" or ret > ended_at:
            continue
        if result is not None and call > put_ret + ttl_s + TTL_SLACK_S:
            yield f"{key} is there {call - put_ret:.3f} s after it was written to live for {ttl_s:.3f} s"
        if result is None and ret < put_call + ttl_s - TTL_SLACK_S:
            yield f"{key} is gone {ret - put_call:.3f} s after it was written to live for {ttl_s:.3f} s"
