"""Real processes that are killed while records are imported: whatever was acknowledged must be there afterwards.

    python -m tests.crash.kill_run [--kills N] [--seed S] [--factor F] [--durability sync|os]      also `make kills`

Writers put records with unique keys, many at once, and note which were acknowledged. Meanwhile a random node, the
coordinator, or all processes at once get SIGKILL; the supervisor, or a new coordinator on the same directory, starts
them again. After each kill the cluster must take writes of all shards within HEAL_S, and then everything that was
acknowledged is read back: each record is there with its value, and nothing is there that nobody wrote.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvtcp
from kvtcp.errors import KvtcpError, OutcomeUnknown
from tests.processes.cluster import Command, ProcessCluster, free_ports, is_running

WRITERS = 16
CHUNK = 8  # puts of one writer at once
PAUSE_S = 0.04  # of a writer after each of them: what was written is read back often, and must not become too much
HEAL_S = 30.0
SHARDS = 16


class Lost(AssertionError):
    """An acknowledged record is missing, or something is there that nobody wrote."""


@dataclass
class Report:
    """What a run did."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    unknown: int = 0
    refused: int = 0
    longest_heal_s: float = 0.0


class KillRun:
    """One cluster, its writers, and what they know."""

    def __init__(self, directory: Path, factor: int, durability: str, seed: int) -> None:
        self.cluster = ProcessCluster(directory)
        self.random = random.Random(seed)
        self.report = Report()
        self.acknowledged: dict[bytes, bytes] = {}
        self.possible: dict[bytes, bytes] = {}  # written, with an outcome that nobody knows
        self._arguments = (
            "--replication-factor", factor, "--durability", durability, "--shards", SHARDS,
            "--main-port", free_ports(1), "--log-level", "error",
        )  # fmt: skip
        self._next = 0
        self._stop = False
        self._coordinator: Command

    async def run(self, kills: int) -> Report:
        """So many kills."""
        self._coordinator = await asyncio.to_thread(self.cluster.start, *self._arguments)
        try:
            async with kvtcp.connect(self.cluster.url, timeout=2.0) as kv:
                writers = [asyncio.ensure_future(self._write(kv)) for _ in range(WRITERS)]
                try:
                    for number in range(kills):
                        await asyncio.sleep(self.random.uniform(0.05, 0.6))
                        await self._kill(number)
                        await self._heal(kv)
                        await self._check(kv)
                finally:
                    self._stop = True
                    await asyncio.gather(*writers)
                await self._check(kv)
            self._coordinator.signal(signal.SIGTERM)
            code = await asyncio.to_thread(self._coordinator.ended)
            assert code == 0, f"the last stop ended with {code}: {self._coordinator.err.read_text()}"
        finally:
            await asyncio.to_thread(self.cluster.close)
        self.report.acknowledged = len(self.acknowledged)
        self.report.unknown = len(self.possible)
        return self.report

    async def _write(self, kv: Any) -> None:
        async def put(key: bytes, value: bytes) -> None:
            try:
                await kv.put(key, value)
            except OutcomeUnknown:
                self.possible[key] = value
            except KvtcpError:
                self.report.refused += 1
            else:
                self.acknowledged[key] = value

        while not self._stop:
            pairs = []
            for _ in range(CHUNK):
                self._next += 1
                pairs.append((b"record:%08d" % self._next, self.random.randbytes(self.random.choice((20, 100, 1000)))))
            for key, value in pairs:
                self.possible[key] = value  # until its answer is here
            await asyncio.gather(*(put(key, value) for key, value in pairs))
            for key, _ in pairs:
                if key in self.acknowledged:
                    del self.possible[key]
            await asyncio.sleep(PAUSE_S)

    async def _kill(self, number: int) -> None:
        kinds = ("node", "node", "coordinator", "all")
        kind = kinds[number % 4] if number < 4 else self.random.choice(kinds)
        self.report.kills[kind] += 1
        pids = {node: pid for node, pid in self.cluster.pids().items() if pid}
        if kind == "node":
            self._end(self.random.choice(sorted(pids.values())))
            return
        victims = [self._coordinator.pid, *(pids.values() if kind == "all" else ())]
        self.random.shuffle(victims)
        for pid in victims:
            self._end(pid)
        await asyncio.to_thread(self._coordinator.ended)
        if kind == "all":
            until = time.monotonic() + HEAL_S
            while any(is_running(pid) for pid in pids.values()):
                assert time.monotonic() < until, "killed processes go on"
                await asyncio.sleep(0.01)
        self._coordinator = await asyncio.to_thread(self.cluster.start, *self._arguments)

    @staticmethod
    def _end(pid: int) -> None:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)

    async def _heal(self, kv: Any) -> None:
        """Every shard takes a write again."""
        began = time.monotonic()
        left = {f"probe{{{n}}}" for n in range(8 * SHARDS)}
        while left:
            outcomes = await asyncio.gather(*(kv.incr(key, timeout=1.0) for key in left), return_exceptions=True)
            failed = {}
            for key, outcome in zip(list(left), outcomes, strict=True):
                if isinstance(outcome, KvtcpError):
                    failed[key] = outcome
                elif isinstance(outcome, BaseException):
                    raise outcome
            left = set(failed)
            if left and time.monotonic() - began > HEAL_S:
                raise AssertionError(f"after {HEAL_S} s: {failed}; {await kv.status()}")
        self.report.longest_heal_s = max(self.report.longest_heal_s, time.monotonic() - began)

    async def _check(self, kv: Any) -> None:
        """Read everything back."""
        expected = dict(self.acknowledged)
        found: dict[bytes, bytes] = {}
        until = time.monotonic() + HEAL_S
        while True:
            try:
                async for key, value in kv.scan(prefix="record:"):
                    found[key] = value
                break
            except KvtcpError:
                if time.monotonic() > until:
                    raise
                found.clear()
        missing = [key for key, value in expected.items() if found.get(key) != value]
        if missing:
            raise Lost(f"{len(missing)} acknowledged records are missing, the first is {missing[0]!r}")
        for key, value in found.items():
            if key not in expected and value not in (self.possible.get(key), self.acknowledged.get(key)):
                raise Lost(f"{key!r} has a value that nobody wrote")


def run(directory: Path, kills: int, factor: int, durability: str, seed: int) -> Report:
    """One run in a directory. Raises Lost."""
    return asyncio.run(KillRun(directory, factor, durability, seed).run(kills))


def main() -> None:
    """All modes and factors, or those asked for."""
    parser = argparse.ArgumentParser(description="Kill real processes under load and look for what was acknowledged.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--factor", type=int, choices=(1, 2, 3))
    parser.add_argument("--durability", choices=("sync", "os"))
    options = parser.parse_args()
    for durability in ("sync", "os") if options.durability is None else (options.durability,):
        for factor in (1, 3) if options.factor is None else (options.factor,):
            with tempfile.TemporaryDirectory(prefix="kvtcp-kills-") as directory:
                began = time.monotonic()
                try:
                    report = run(Path(directory), options.kills, factor, durability, options.seed)
                except BaseException:
                    print(f"seed {options.seed}, RF {factor}, {durability}", file=sys.stderr)
                    for path in sorted(Path(directory).glob("*.err")):
                        print(f"--- {path.name}\n{path.read_text()[-3000:]}", file=sys.stderr)
                    raise
                took_s = time.monotonic() - began
                print(f"RF {factor} {durability}, seed {options.seed}: {report}, {took_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
