"""The `scan` suite: reading in order through the coordinator, three nodes, three copies.

    pages, rows       the page iterator and the iterator of rows over all keys, pages of 1,000, rows a second
    scan 10 ... 1000  scans from random keys, 16 at a time, scans a second
    from memory       what the same client needs to decode the very same pages when they are in memory: the floor

A page has to come from all shards at one point in time, be merged, sent and decoded; the ratio to the floor says what
the way costs. Every row that comes back is checked: ascending, complete, with its value.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

import kvtcp
from bench.load import clients
from bench.load.cluster import Cluster
from bench.measure import Options, Result, make_row, usage_s, with_floor
from kvtcp.client.requests import PageRequest, open_rows
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder

TITLE = "Scan: three nodes, three copies, 16-byte keys, 128-byte values"
VALUE_BYTES = 128
PAGE_ROWS = 1_000
LENGTHS = (10, 100, 1_000)
TASKS = 16
FLOOR = "decoding the same pages from memory"
Pages = list[list[tuple[bytes, bytes]]]


def check_pages(pages: Pages, keys: int) -> None:
    """Every key once, in order, with its value. Raises AssertionError."""
    number = 0
    for page in pages:
        for key, value in page:
            if key != clients.key_of(number) or value != clients.value_of(number, VALUE_BYTES):
                raise AssertionError(f"row {number} of the scan is {key!r}: {value!r}")
            number += 1
    if number != keys:
        raise AssertionError(f"the scan returned {number} of {keys} rows")


class Scans:
    """One cluster with one client."""

    def __init__(self, kv: Any, cluster: Cluster, keys: int, seed: int) -> None:
        self.kv, self.cluster, self.keys = kv, cluster, keys
        self.random = random.Random(seed)
        self.figures: dict[tuple[str, str], list[tuple[float, dict[str, float]]]] = {}
        self.frames: list[bytes] = []

    def record(self, workload: str, unit: str, count: int, took_s: float, cpu_us: dict[str, float]) -> None:
        """One run."""
        self.figures.setdefault((workload, unit), []).append((count / took_s, cpu_us))

    async def timed(self, workload: str, unit: str, count: int, work: Callable[[], Awaitable[None]]) -> None:
        """Run and record."""
        before, began = usage_s(self.cluster.roles()), time.perf_counter()
        await work()
        took_s, after = time.perf_counter() - began, usage_s(self.cluster.roles())
        cpu_us = {role: (after[role] - before[role]) / count * 1e6 for role in before}
        self.record(workload, unit, count, took_s, cpu_us)

    async def pages(self) -> None:
        """All keys, page by page."""
        found: Pages = []

        async def work() -> None:
            found.extend([page async for page in self.kv.scan_pages(page_items=PAGE_ROWS)])

        await self.timed("pages", "rows/s", self.keys, work)
        check_pages(found, self.keys)

    async def rows(self) -> None:
        """All keys, row by row."""
        found: list[tuple[bytes, bytes]] = []

        async def work() -> None:
            async for pair in self.kv.scan():
                found.append(pair)

        await self.timed("rows", "rows/s", self.keys, work)
        check_pages([found], self.keys)

    async def short(self, length: int, scans: int) -> None:
        """Scans from random keys, a few at a time."""
        starts = iter([self.random.randrange(self.keys - length) for _ in range(scans)])

        async def worker() -> None:
            for start in starts:
                found = [pair async for pair in self.kv.scan(start=clients.key_of(start), limit=length)]
                if len(found) != length or found[0][0] != clients.key_of(start):
                    raise AssertionError(f"a scan of {length} from key {start} returned {len(found)} rows")

        async def work() -> None:
            await asyncio.gather(*(worker() for _ in range(TASKS)))

        await self.timed(f"scan {length}", "ops/s", scans, work)

    async def keep_frames(self) -> None:
        """The pages as the coordinator sends them."""
        encode = FrameEncoder().encode
        rows = [[e.key, e.value, e.rev, None] async for e in self.kv.scan_entries()]
        for first in range(0, len(rows), PAGE_ROWS):
            self.frames.append(encode([first, 0, [rows[first : first + PAGE_ROWS], b"c" * 17]]))

    async def from_memory(self) -> None:
        """Decode these, with the client's own steps, the same checks included."""
        found: Pages = []
        decoder, pages, pair = FrameDecoder(), PageRequest(None, None, None, None, False, False), self.kv._pair
        began = time.perf_counter()
        for frame in self.frames:
            for message in decoder.feed(frame):
                found.append([pair(row) for row in open_rows(pages.rows(message[2]))])
        self.record(FLOOR, "rows/s", self.keys, time.perf_counter() - began, {})
        check_pages(found, self.keys)

    async def run(self, runs: int, scans: int) -> None:
        """All workloads take turns."""
        await self.keep_frames()
        steps: list[Callable[[], Awaitable[None]]] = [self.pages, self.rows, self.from_memory]
        for length in LENGTHS:
            steps.append(lambda length=length: self.short(length, max(TASKS, scans // length)))
        for run in range(runs + 1):
            for step in self.random.sample(steps, len(steps)):
                await step()
            if run == 0:
                self.figures.clear()  # that was to warm up

    def results(self) -> list[Result]:
        """Rows, those of whole scans with the floor beside them."""
        found = []
        floor = [value for value, _ in self.figures[FLOOR, "rows/s"]]
        for (workload, unit), values in self.figures.items():
            roles = values[0][1]
            more: dict[str, Any] = {}
            if roles:
                more["cpu_us"] = {role: sorted(cpu[role] for _, cpu in values)[len(values) // 2] for role in roles}
            target = "client" if workload == FLOOR else "kvtcp RF 3"
            row = make_row(target, workload, unit, [value for value, _ in values], **more)
            is_whole = workload in ("pages", "rows")
            found.append(with_floor(row, FLOOR, sorted(floor)[len(floor) // 2]) if is_whole else row)
        return found


async def _run(cluster: Cluster, keys: int, runs: int, scans: int, seed: int) -> list[Result]:
    async with kvtcp.connect(cluster.url, timeout=60.0) as kv:
        suite = Scans(kv, cluster, keys, seed)
        await suite.run(runs, scans)
        return suite.results()


def measure(options: Options) -> list[Result]:
    """All workloads."""
    keys = options.keys_or(300_000, 20_000)
    with Cluster(3, 3) as cluster:
        clients.fill(cluster.url, keys, VALUE_BYTES)
        return uvloop.run(_run(cluster, keys, options.runs_or(5), options.size(100_000, 10_000), options.seed))
