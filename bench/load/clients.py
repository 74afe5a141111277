"""Load on a kvtcp cluster from several client processes: closed loops, and open loops timed from the intended send.

`run_load(url, job, processes)` starts the processes (`python -m bench.load.clients`), gives each its job, lets them
connect and generate, starts them together, and adds up what they counted. A closed loop has `connections` x `depth`
coroutines in each process, each awaiting one operation after another; an open loop sends at `rate` operations a second,
whatever the answers do, and counts the time of each from when it should have been sent.

Every value names its key, so each answer of a get is checked: `value_of(7, n)` starts with the number of the key. Keys
are `key:` and twelve digits, as redis-benchmark makes them, so both may work on the same data. Inserted keys have
numbers from `first_insert` on, and belong to the process whose turn it is (number modulo processes).

Distributions: `uniform`; `zipfian` with theta 0.99, scattered over the keys (J. Gray et al., "Quickly generating
billion-record synthetic databases", 1994, as in YCSB); `latest`, the same counted back from the newest key.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

import kvtcp
from bench.measure import ROOT, Histogram
from kvtcp.errors import KvtcpError

THETA = 0.99
START_DELAY_S = 0.05
Operation = tuple[str, int, int]  # kind, number of the key, rows of a scan


def key_of(number: int) -> bytes:
    """16 bytes."""
    return b"key:%012d" % number


def value_of(number: int, value_bytes: int) -> bytes:
    """At least 12 bytes, beginning with the number of the key."""
    return (b"%012d" % number).ljust(value_bytes, b"v")


@dataclass
class Job:
    """What one process does."""

    url: str = ""
    mix: dict[str, float] = field(default_factory=lambda: {"get": 1.0})  # get, put, insert, scan, rmw, probe -> weight
    distribution: str = "uniform"
    keys: int = 100_000  # that are loaded
    first_insert: int = 0  # number of the first key that is inserted; 0 = `keys`
    value_bytes: int = 128
    operations: int = 10_000
    connections: int = 25
    depth: int = 16
    rate: float | None = None  # open loop
    scan_rows_max: int = 100
    seed: int = 1
    process: int = 0
    processes: int = 1


@dataclass
class Outcome:
    """What a run counted."""

    operations: int
    seconds: float
    histogram: Histogram
    inserted: int
    failed: int
    client_cpu_s: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


class Zipfian:
    """Ranks from 0 to items - 1, the small ones often."""

    def __init__(self, items: int, theta: float = THETA) -> None:
        self.items = items
        self._theta = theta
        self._zeta = sum(1 / rank**theta for rank in range(1, items + 1))
        zeta2 = 1 + 0.5**theta
        self._alpha = 1 / (1 - theta)
        self._eta = (1 - (2 / items) ** (1 - theta)) / (1 - zeta2 / self._zeta) if items > 2 else 0.0

    def draw(self, uniform: float) -> int:
        """The rank of a number from 0 to 1."""
        scaled = uniform * self._zeta
        if scaled < 1:
            return 0
        if scaled < 1 + 0.5**self._theta:
            return min(1, self.items - 1)
        return min(self.items - 1, int(self.items * (self._eta * uniform - self._eta + 1) ** self._alpha))


def scatter(rank: int, keys: int) -> int:
    """The key of a rank: neighbours in rank are far from each other in order."""
    return (rank * 2_654_435_761 + 12_345) % keys


def generate(job: Job) -> list[Operation]:
    """The operations of a process, the same for the same job."""
    rng = random.Random(f"{job.seed}/{job.process}")
    kinds = rng.choices(list(job.mix), list(job.mix.values()), k=job.operations)
    zipfian = Zipfian(job.keys) if job.distribution != "uniform" else None
    newest = job.keys - 1  # a key of this process, or loaded
    next_insert = (job.first_insert or job.keys) + job.process
    plan: list[Operation] = []
    for kind in kinds:
        if kind == "insert":
            plan.append((kind, next_insert, 0))
            newest, next_insert = next_insert, next_insert + job.processes
            continue
        if zipfian is None:
            number = rng.randrange(job.keys)
        elif job.distribution == "latest":
            number = _earlier(newest, zipfian.draw(rng.random()), job)
        else:
            number = scatter(zipfian.draw(rng.random()), job.keys)
        plan.append((kind, number, rng.randint(1, job.scan_rows_max) if kind == "scan" else 0))
    return plan


def _earlier(newest: int, back: int, job: Job) -> int:
    """The key `back` places before the newest that this process knows: its own inserts, then the loaded keys."""
    first = (job.first_insert or job.keys) + job.process
    own = (newest - first) // job.processes + 1 if newest >= first else 0
    if back < own:
        return newest - back * job.processes
    return max(0, job.keys - 1 - (back - own))


# --- in the process of a client ---------------------------------------------------------------------------


class Driver:
    """Executes the operations of one process."""

    def __init__(self, job: Job, clients: list[Any]) -> None:
        self.job = job
        self.clients = clients
        self.histogram = Histogram()
        self.inserted = self.failed = self.done = 0

    async def one(self, client: Any, operation: Operation) -> None:
        """Execute and check one. Raises AssertionError if an answer is wrong."""
        kind, number, rows = operation
        key, size = key_of(number), self.job.value_bytes
        if kind == "get":
            self.check(number, await client.get(key))
        elif kind == "probe":  # of the echo, which answers what it likes
            await client.get(key)
        elif kind == "put":
            await client.put(key, value_of(number, size))
        elif kind == "insert":
            await client.put(key, value_of(number, size))  # another operation may have put it just before
            self.inserted += 1
        elif kind == "rmw":
            entry = await client.get_entry(key)
            self.check(number, entry and entry.value)
            await client.put(key, value_of(number, size))
        elif kind == "scan":
            await self._scan(client, key, rows)
        else:
            raise ValueError(f"unknown operation {kind!r}")

    async def _scan(self, client: Any, key: bytes, rows: int) -> None:
        before = b""
        async for found, value in client.scan(start=key, limit=rows):
            if found < key or found <= before or not value.startswith(found[4:]):
                raise AssertionError(f"a scan from {key!r} returned {found!r}: {value!r} after {before!r}")
            before = found

    def check(self, number: int, value: bytes | None) -> None:
        """A key that was loaded has its value; one that is just being inserted may be missing."""
        if value is None and number >= self.job.keys:
            return
        if value != value_of(number, self.job.value_bytes):
            raise AssertionError(f"key {number} returned {value!r}")

    async def timed(self, client: Any, operation: Operation, due: float) -> None:
        """One, counted from `due`. A refusal counts with its time, and as failed."""
        try:
            await self.one(client, operation)
        except KvtcpError:
            self.failed += 1
        self.histogram.add((time.monotonic() - due) * 1000)
        self.done += 1

    async def closed(self, plan: list[Operation]) -> None:
        """All operations, by as many coroutines as the job says."""
        operations: Iterator[Operation] = iter(plan)

        async def worker(client: Any) -> None:
            for operation in operations:
                await self.timed(client, operation, time.monotonic())

        await asyncio.gather(*(worker(client) for client in self.clients for _ in range(self.job.depth)))

    async def open(self, plan: list[Operation], rate: float, began: float) -> None:
        """All operations, each begun when it is due."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        number, count = 0, len(plan)
        while number < count:
            due = min(count, int((time.monotonic() - began) * rate) + 1)
            while number < due:
                client = self.clients[number % len(self.clients)]
                task = loop.create_task(self.timed(client, plan[number], began + number / rate))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
            await asyncio.sleep(0.001)
        while tasks:
            await asyncio.gather(*tasks)
        if self.done != count:
            raise AssertionError(f"{count - self.done} operations ended without being counted")


async def _client(job: Job) -> dict[str, Any]:
    clients = [await kvtcp.connect(job.url, timeout=60.0) for _ in range(job.connections)]
    driver = Driver(job, clients)
    plan = generate(job)
    gc.collect()
    gc.freeze()
    gc.disable()  # a pause of this client is no latency of the servers
    print("ready", flush=True)
    began = float(await asyncio.to_thread(sys.stdin.readline))
    await asyncio.sleep(max(0.0, began - time.monotonic()))
    cpu = time.process_time()
    if job.rate is None:
        await driver.closed(plan)
    else:
        await driver.open(plan, job.rate, began)
    ended = time.monotonic()
    spent = time.process_time() - cpu
    for client in clients:
        await client.close()
    return {
        "operations": driver.done, "began": began, "ended": ended, "counts": driver.histogram.counts,
        "inserted": driver.inserted, "failed": driver.failed, "cpu_s": spent,
    }  # fmt: skip


# --- in the process of the suite --------------------------------------------------------------------------


class Load:
    """Client processes that are connected and have generated what they will do, and wait."""

    def __init__(self, job: Job, processes: int = 2) -> None:
        self.children: list[subprocess.Popen[str]] = []
        for process in range(processes):
            share = len(range(process, job.operations, processes))
            rate = None if job.rate is None else job.rate / processes
            own = Job(**{
                **asdict(job), "process": process, "processes": processes, "operations": share, "rate": rate,
                "connections": max(1, job.connections // processes),
            })  # fmt: skip
            child = subprocess.Popen(
                [sys.executable, "-m", "bench.load.clients"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                cwd=ROOT,
            )  # fmt: skip
            assert child.stdin is not None
            child.stdin.write(json.dumps(asdict(own)) + "\n")
            child.stdin.flush()
            self.children.append(child)
        for child in self.children:
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                self.stop()
                raise RuntimeError("a client process did not become ready")

    def execute(self) -> Outcome:
        """Start all of them together, wait, add up. Raises RuntimeError if one failed."""
        began = time.monotonic() + START_DELAY_S
        for child in self.children:
            assert child.stdin is not None
            child.stdin.write(f"{began}\n")
            child.stdin.flush()
        outputs = [child.communicate()[0] for child in self.children]
        if any(child.returncode for child in self.children):
            raise RuntimeError("a client process failed; its reason is above")
        parts = [json.loads(output) for output in outputs]
        histogram = Histogram()
        for part in parts:
            histogram.merge(Histogram({int(bucket): count for bucket, count in part["counts"].items()}))
        return Outcome(
            sum(part["operations"] for part in parts), max(part["ended"] for part in parts) - began, histogram,
            sum(part["inserted"] for part in parts), sum(part["failed"] for part in parts),
            sum(part["cpu_s"] for part in parts),
        )  # fmt: skip

    def stop(self) -> None:
        """End those that wait."""
        for child in self.children:
            child.kill()
            child.communicate()


def run_load(job: Job, processes: int = 2, before: Callable[[], None] = lambda: None) -> Outcome:
    """Generate and execute; `before` is called when all processes wait to begin."""
    load = Load(job, processes)
    before()
    return load.execute()


async def _fill(url: str, keys: int, value_bytes: int, seed: int) -> None:
    async with kvtcp.connect(url, timeout=60.0) as kv:
        order = list(range(keys))
        random.Random(seed).shuffle(order)
        for first in range(0, keys, 50_000):
            numbers = order[first : first + 50_000]
            await kv.put_many([(key_of(number), value_of(number, value_bytes)) for number in numbers])
        found = await kv.count()
        if found < keys:
            raise AssertionError(f"{keys} keys were put, {found} are there")


def fill(url: str, keys: int, value_bytes: int = 128, seed: int = 1) -> None:
    """Put keys 0 to `keys` - 1 in random order, and count them."""
    uvloop.run(_fill(url, keys, value_bytes, seed))


async def _count(url: str) -> int:
    async with kvtcp.connect(url, timeout=60.0) as kv:
        return int(await kv.count())


def count_keys(url: str) -> int:
    """How many keys there are."""
    return int(uvloop.run(_count(url)))


def main() -> None:
    """One client process: the job as JSON on stdin, then the time to begin; the outcome as JSON on stdout."""
    job = Job(**json.loads(sys.stdin.readline()))
    print(json.dumps(uvloop.run(_client(job))))


if __name__ == "__main__":
    main()
