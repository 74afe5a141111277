"""What the histories of chaos clients must satisfy, and what the nodes must hold in the end.

Pure. `History` takes the lines of `chaos_client`; `check` returns sentences, one for each broken promise:

- hot and large keys are linearizable (refused calls never happened, unknown ones may have);
- counters: every answer is given once, grows in real time, and the final value lies between what was acknowledged and
  that plus what is unknown;
- a cut never shows b ahead of a, nor less than what was acknowledged before it was asked for, nor less than an earlier
  cut showed;
- a cold key never shows less than what was acknowledged before, nor what was refused or not written yet; its revisions
  grow; in the end it holds the last number acknowledged, or the one after it if that is unknown;
- a key with a deadline is there before it and gone after it, but for the time after a takeover: the next coordinator
  goes on with the last stamp that the one before may have given, which is some seconds ahead.

`Availability` tells how long which shard took no writes.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from kvtcp.constants import STAMP_AHEAD_MS
from kvtcp.protocol.hashing import shard_of
from kvtcp.testing.linearizability import TimedOperation, check_history

TTL_SLACK_S: Final = 0.06  # a stamp is of the tick in which a request came; wall clock and monotonic one drift
JUMP_S: Final = STAMP_AHEAD_MS / 1000 + 1.0  # after a takeover deadlines may be off for so long
BUDGET: Final = 200_000
WRITES: Final = ("put", "add", "delete", "cas", "incr")
Line = list[Any]


class History:
    """All calls of all clients."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[Line]] = defaultdict(list)
        self.calls = 0
        self.outcomes: Counter[str] = Counter()  # of calls with the usual timeout that were not given up
        self.undecided = 0  # keys whose search went over the budget
        self.keys_checked = 0
        self.late_s = 0.0
        self.lag_s = 0.0  # how late the processes of the clients were themselves

    def read(self, path: Path) -> None:
        """Add the file of one client."""
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if type(line) is dict:
                self.late_s = max(self.late_s, line["late_s"])
                self.lag_s = max(self.lag_s, line["lag_s"])
                self.outcomes.update(line["counts"])
                continue
            self.by_key[line[1]].append(line)
            self.calls += 1

    @property
    def answered(self) -> float:
        """Share of calls that were answered with a result."""
        return self.outcomes["ok"] / max(1, self.outcomes.total())

    def check(self, final: dict[str, str] | None, takeovers: Sequence[float] = ()) -> list[str]:
        """The broken promises. `final` is what the members hold in the end, None if that is not known; `takeovers` are
        the times at which a coordinator ended."""
        broken: list[str] = []
        self.undecided = self.keys_checked = 0
        for key, lines in self.by_key.items():
            name = key.partition("-")[0]
            if name in ("hot", "large"):
                broken += self._check_register(key, lines, final)
            elif name == "count":
                broken += _check_counter(key, lines, final)
            elif name == "cold":
                broken += _check_cold(key, lines, final)
            elif name == "ttl":
                broken += _check_ttl(key, lines, takeovers)
        broken += self._check_pairs(final)
        return broken

    def _check_register(self, key: str, lines: list[Line], final: dict[str, str] | None) -> Iterable[str]:
        operations: list[TimedOperation] = []
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


def _check_cold(key: str, lines: list[Line], final: dict[str, str] | None) -> Iterable[str]:
    """One writer that counted until an outcome was not `ok`, and read now and then."""
    puts = [line for line in lines if line[0] == "put"]
    reads = [(call, ret, n, True) for kind, _, call, ret, _, n, outcome in lines if kind == "get" and outcome == "ok"]
    done = [(call, ret, n, False) for _, _, call, ret, n, _, outcome in puts if outcome == "ok"]
    yield from _never_backwards(key, done + reads)
    revisions = [line[5] for line in puts if line[6] == "ok"]
    if any(b <= a for a, b in pairwise(revisions)):
        yield f"{key}: its revisions do not grow: {revisions}"
    begun = {n: call for _, _, call, _, n, _, outcome in puts if outcome != "refused"}
    for call, ret, n, _ in reads:
        if n and begun.get(n, ret) >= ret:
            yield f"{key}: a read from {call} to {ret} shows {n}, which was refused or not written yet"
    if final is not None:
        last = max((n for _, _, n, _ in done), default=0)
        allowed = {last} | {line[4] for line in puts if line[6] == "unknown"}
        held = int(final.get(key, 0))
        if held not in allowed:
            yield f"{key}: holds {held} in the end, {last} was the last one acknowledged, allowed are {sorted(allowed)}"


def _check_counter(key: str, lines: list[Line], final: dict[str, str] | None) -> Iterable[str]:
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


def _check_ttl(key: str, lines: list[Line], takeovers: Sequence[float]) -> Iterable[str]:
    _, _, put_call, put_ret, ttl_s, _, outcome = lines[0]
    if outcome != "ok":
        return
    for kind, _, call, ret, _, result, read in lines[1:]:
        if kind != "get" or read != "ok" or any(put_call - JUMP_S < at < ret for at in takeovers):
            continue
        if result is not None and call > put_ret + ttl_s + TTL_SLACK_S:
            yield f"{key} is there {call - put_ret:.3f} s after it was written to live for {ttl_s:.3f} s"
        if result is None and ret < put_call + ttl_s - TTL_SLACK_S:
            yield f"{key} is gone {ret - put_call:.3f} s after it was written to live for {ttl_s:.3f} s"


@dataclass(frozen=True)
class Gap:
    """No write of a shard was acknowledged between two times."""

    shard: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.begin


class Availability:
    """When which shard acknowledged writes, between two times."""

    def __init__(self, history: History, shards: int, begin: float, end: float) -> None:
        self.shards = shards
        self.begin = begin
        self.end = end
        self.times: list[list[float]] = [[] for _ in range(shards)]
        for key, lines in history.by_key.items():
            shard = shard_of(key.encode(), shards)
            for line in lines:
                if line[6] == "ok" and line[0] in WRITES and begin < line[3] < end:
                    self.times[shard].append(line[3])
        for times in self.times:
            times.sort()

    def gaps(self, seconds: float) -> list[Gap]:
        """All that are at least so long."""
        return [
            Gap(shard, a, b)
            for shard, times in enumerate(self.times)
            for a, b in pairwise([self.begin, *times, self.end])
            if b - a >= seconds
        ]

    def worst(self) -> list[float]:
        """The longest gap of each shard, in seconds."""
        return [max(b - a for a, b in pairwise([self.begin, *times, self.end])) for times in self.times]

    def longest_stall_s(self) -> float:
        """The longest time without any write of any shard."""
        times = sorted(at for times in self.times for at in times)
        return max(b - a for a, b in pairwise([self.begin, *times, self.end]))

    def served(self) -> float:
        """Share of all seconds of all shards with a write in them."""
        seconds = max(1, int(self.end - self.begin))
        hit = sum(len({int(at - self.begin) for at in times if at - self.begin < seconds}) for times in self.times)
        return hit / (seconds * self.shards)


def blame(gaps: Iterable[Gap], faults: Sequence[tuple[float, str]]) -> dict[str, list[float]]:
    """The longest gap after each fault that had one, by its name. A gap belongs to the first fault that began within
    it, or else to the last one before it."""
    longest: dict[int, float] = {}
    for gap in gaps:
        within = [n for n, (at, _) in enumerate(faults) if gap.begin - 0.05 <= at <= gap.end]
        before = [n for n, (at, _) in enumerate(faults) if at < gap.begin]
        number = within[0] if within else before[-1] if before else None
        if number is not None:
            longest[number] = max(longest.get(number, 0.0), gap.seconds)
    by_name: dict[str, list[float]] = defaultdict(list)
    for number, seconds in sorted(longest.items()):
        by_name[faults[number][1]].append(round(seconds, 3))
    return dict(by_name)
