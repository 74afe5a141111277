"""The `failover` suite: how long clients wait when something dies, and how soon all is as before.

`run` returns a list of results and prints nothing; a result is a dict:

    target      "nothing happens" | "kill -9 of a node" | "SIGSTOP of a node" | "kill -9 of the coordinator"
    workload    "longest stall of a writer" | "... of a reader" | "back in full sync" | "calls without a result"
    unit        "ms" | "s" | "calls"
    median, min, max, runs      over the events

A cluster of three nodes, RF 3, `sync`, that the coordinator spawns and supervises; a client process with WRITERS and
READERS that each make a call every PACE_S on keys of all shards. A *stall* is the time between two successes of one of
them, so it holds the retries and everything else that a program would wait for. After an event the suite waits until
`status` finds nothing wrong any more: *back in full sync* counts from the kill, or from SIGCONT, STOPPED_S after the
SIGSTOP; a node that was thrown out for being slow may come back SLOW_INTERVAL_MS after that, and so long it takes. The
coordinator is started again at once; what an init needs to notice is not in the figures.

In the end of each target everything is read: a write that was acknowledged and is not there, or a count that is higher
than what was asked for, ends the suite with an AssertionError.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from itertools import zip_longest
from typing import Any, Final

import uvloop

import kvtcp
from bench.load.cluster import Cluster
from bench.measure import Options, Result, make_row
from kvtcp.errors import KvtcpError, OutcomeUnknown

WRITERS: Final = 24
READERS: Final = 8
KEYS: Final = 200  # of a writer
PACE_S: Final = 0.01
STOPPED_S: Final = 3.0
QUIET_S: Final = 2.0  # before each event, and the length of one in which nothing happens
WHOLE_S: Final = 60.0
TIMELINE_S: Final = (-0.5, 4.0)  # before and after an event
WATCHED_S: Final = 2.0  # after an event, at least
BIN_S: Final = 0.05  # several calls of each worker
TITLE = "Failover: three nodes, RF 3, sync; no acknowledged write was lost or doubled"


class Worker:
    """Calls at a pace; `stall_s` is the longest time between two successes since it was last set to 0."""

    def __init__(self, kv: Any, number: int, seed: int) -> None:
        self.kv = kv
        self.name = f"{number:02d}"
        self.random = random.Random(seed * 1000 + number)
        self.last = time.monotonic()
        self.stall_s = 0.0
        self.failed = 0
        self.successes: list[float] = []  # times since the last event began to be waited for

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            try:
                await self.step()
            except KvtcpError:
                self.failed += 1
            else:
                now = time.monotonic()
                self.stall_s = max(self.stall_s, now - self.last)
                self.last = now
                self.successes.append(now)
            await asyncio.sleep(PACE_S)

    async def step(self) -> None:
        """One call."""
        raise NotImplementedError


class Writer(Worker):
    """Puts numbers into keys of its own, and counts; knows what must be there.

    A key whose last put has an unknown outcome is not written again, another takes its place: so a put that was
    acknowledged is never overtaken by one that came late.
    """

    def __init__(self, kv: Any, number: int, seed: int) -> None:
        super().__init__(kv, number, seed)
        self.generation = [0] * KEYS
        self.held: dict[str, int] = {}  # acknowledged
        self.possible: dict[str, int] = {}  # of unknown outcome
        self.count = self.count_unknown = self.next = 0

    async def step(self) -> None:
        self.next += 1
        if self.next % 4 == 0:
            await self._incr()
            return
        place = self.random.randrange(KEYS)
        key = f"w{self.name}-{place}-{self.generation[place]}"
        self.possible[key] = self.next  # until it is known
        try:
            await self.kv.put(key, str(self.next))
        except (OutcomeUnknown, asyncio.CancelledError):
            self.generation[place] += 1
            raise
        except KvtcpError:
            del self.possible[key]  # not executed
            raise
        del self.possible[key]
        self.held[key] = self.next

    async def _incr(self) -> None:
        self.count_unknown += 1
        try:
            value = await self.kv.incr(f"count-{self.name}")
        except OutcomeUnknown:
            raise
        except KvtcpError:
            self.count_unknown -= 1
            raise
        self.count_unknown -= 1
        self.count += 1
        if not self.count <= value <= self.count + self.count_unknown:
            raise AssertionError(
                f"count-{self.name} is {value} after {self.count} answers and {self.count_unknown} unknown"
            )

    def check(self, found: dict[str, str]) -> None:
        """Compare with all pairs of the cluster. AssertionError if something is lost or doubled."""
        for key, number in self.held.items():
            value = int(found.get(key, 0))
            if value not in (number, self.possible.get(key)):
                raise AssertionError(f"{key} holds {value}, {number} was acknowledged, {self.possible.get(key)} may be")
        count = int(found.get(f"count-{self.name}", 0))
        if not self.count <= count <= self.count + self.count_unknown:
            raise AssertionError(f"count-{self.name} is {count}, {self.count} were acknowledged")


class Reader(Worker):
    """Reads keys of all writers."""

    async def step(self) -> None:
        place = self.random.randrange(KEYS)
        await self.kv.get(f"w{self.random.randrange(WRITERS):02d}-{place}-0")


async def wait_whole(kv: Any, wait_s: float = WHOLE_S) -> float:
    """Wait until `status` finds nothing wrong; the time of that. Raises TimeoutError."""
    until = time.monotonic() + wait_s
    said: Any = "nothing"
    while time.monotonic() < until:
        try:
            status = await kv.status(timeout=1.0)
            said = status["degraded"]
            if status["state"] == "ok" and not status["moving"] and not status["learning"]:
                return time.monotonic()
        except KvtcpError as error:
            said = error
        await asyncio.sleep(0.02)
    raise TimeoutError(f"in {wait_s:.0f} s the cluster did not become whole: {said}")


def timeline(times: list[float], at: float, until: float) -> list[int]:
    """How many of these times fall into each whole bin around `at`, of those that end before `until`."""
    begin, end = TIMELINE_S
    counts = [0] * min(round((end - begin) / BIN_S), math.floor((until - at - begin) / BIN_S))
    for time_ in times:
        number = math.floor((time_ - at - begin) / BIN_S)
        if 0 <= number < len(counts):
            counts[number] += 1
    return counts


def fewest(timelines: list[list[int]]) -> list[int]:
    """For each bin the fewest of those that reach so far."""
    return [min(count for count in counts if count is not None) for counts in zip_longest(*timelines)]


class Suite:
    """One cluster under load, and what happens to it."""

    def __init__(self, cluster: Cluster, kv: Any, seed: int) -> None:
        self.cluster = cluster
        self.kv = kv
        self.random = random.Random(seed)
        self.timelines: list[list[int]] = []  # of the events of the target that is measured
        self.writers: list[Worker] = [Writer(kv, number, seed) for number in range(WRITERS)]
        self.readers: list[Worker] = [Reader(kv, WRITERS + number, seed) for number in range(READERS)]

    async def pid(self) -> int:
        """Of a node chosen at random."""
        return int(self.random.choice(await self.kv.nodes())["pid"])

    async def nothing(self) -> float:
        """No event, for comparison; like those below it returns when healing could begin."""
        await asyncio.sleep(QUIET_S)
        return time.monotonic()

    async def kill_node(self) -> float:
        """Its supervisor starts it again."""
        os.kill(await self.pid(), signal.SIGKILL)
        began = time.monotonic()
        # the coordinator may not know of it yet
        await asyncio.sleep(0.2)
        return began

    async def stop_node(self) -> float:
        """Long enough to be thrown out."""
        pid = await self.pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(STOPPED_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        return time.monotonic()

    async def kill_coordinator(self) -> float:
        """And start it again, while its nodes run on."""
        began = time.monotonic()
        self.cluster.kill_coordinator()
        await asyncio.to_thread(self.cluster.start_coordinator)
        return began

    async def event(self, happen: Callable[[], Awaitable[float]]) -> dict[str, float]:
        """One event and its figures."""
        workers = self.writers + self.readers
        await wait_whole(self.kv)
        await asyncio.sleep(QUIET_S)
        for worker in workers:
            worker.stall_s, worker.failed = 0.0, 0
            worker.successes = worker.successes[-int(QUIET_S / PACE_S) :]
        at = time.monotonic()
        began = await happen()
        whole = await wait_whole(self.kv)
        while min(worker.last for worker in workers) < max(at, whole):  # noqa: ASYNC110 - each sets its own
            await asyncio.sleep(0.01)
        await asyncio.sleep(max(0.0, at + WATCHED_S - time.monotonic()))
        times = [success for worker in workers for success in worker.successes]
        self.timelines.append(timeline(times, at, time.monotonic()))
        return {
            "longest stall of a writer": max(worker.stall_s for worker in self.writers) * 1000,
            "longest stall of a reader": max(worker.stall_s for worker in self.readers) * 1000,
            "back in full sync": whole - began,
            "calls without a result": float(sum(worker.failed for worker in workers)),
        }

    async def check(self) -> int:
        """Everything that was acknowledged is there, once; how many writes that were."""
        found = {key.decode(): value.decode() async for key, value in self.kv.scan()}
        writers = [worker for worker in self.writers if isinstance(worker, Writer)]
        for writer in writers:
            writer.check(found)
        return sum(len(writer.held) + writer.count for writer in writers)

    async def target(self, name: str, happen: Callable[[], Awaitable[float]], events: int) -> list[Result]:
        """All events of one kind."""
        self.timelines = []
        tasks = [asyncio.ensure_future(worker.run()) for worker in self.writers + self.readers]
        try:
            rows = []
            for _ in range(events):
                rows.append(await self.event(happen))
                for task in tasks:
                    if task.done():
                        task.result()  # raises
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError(f"{name}: a worker ended") from error
        acknowledged = await self.check()
        units = {"back in full sync": "s", "calls without a result": "calls"}
        found = [
            make_row(name, workload, units.get(workload, "ms"), [row[workload] for row in rows],
                     acknowledged=acknowledged, lost=0)
            for workload in rows[0]
        ]  # fmt: skip
        # the worst of the events for each time: an average would hide how long nothing is answered
        found[0]["timeline"] = {
            "begin_s": TIMELINE_S[0],
            "bin_s": BIN_S,
            "answers": fewest(self.timelines),
        }
        return found


async def _run(cluster: Cluster, events: int, seed: int) -> list[Result]:
    async with kvtcp.connect(cluster.url) as kv:
        suite = Suite(cluster, kv, seed)
        targets = {
            "nothing happens": suite.nothing,
            "kill -9 of a node": suite.kill_node,
            "SIGSTOP of a node": suite.stop_node,
            "kill -9 of the coordinator": suite.kill_coordinator,
        }
        results: list[Result] = []
        for name, happen in targets.items():
            results += await suite.target(name, happen, events)
        return results


def run(events: int = 20, seed: int = 1) -> list[Result]:
    """The results; takes about eleven minutes with the defaults."""
    with Cluster(3, 3, "sync") as cluster:
        return uvloop.run(_run(cluster, events, seed))


def measure(options: Options) -> list[Result]:
    """All events."""
    return run(options.runs_or(8, 2), options.seed)
