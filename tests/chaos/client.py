"""A client process of the chaos driver: works on a cluster until SIGTERM, then writes down all that it saw.

Run as `python -m tests.chaos.client URL SEED NAME FILE`. A line of FILE is one call, as JSON:

    [kind, key, call_s, ret_s, argument, result, outcome]

Times are of CLOCK_MONOTONIC, which all processes of a machine share. `outcome` is "ok", "refused" (Unavailable: not
executed) or "unknown" (OutcomeUnknown, cancelled, or not answered at the end: may have happened, and at any time after
`call_s`). What the calls are is what `chaos_checks` can judge:

- `hot-*`: get, put, add, cas, delete of few keys by all clients. Values are unique, keys change every second, so that
  the history of each is short;
- `count-*`: incr;
- `pair-<owner>-<n>-a` and `-b`: one writer each, 1 to a, 1 to b, 2 to a, ...; others read both with mget and scans.
  After an unknown outcome the owner goes on with a new pair, so a >= b in every cut;
- `ttl-*`: written once with a deadline, then read until after it;
- `large-*`: values of up to 2 MiB, which fill windows;
- `cold-*`: very many keys in all shards, each with one writer that counts in it and reads it now and then; after an
  unknown outcome it goes on with a new key, so the last value acknowledged, or the one after it, is what must be found.
  Some of them, one for each shard, are written ten times a second by `probe` alone: where no writes are acknowledged,
  and for how long, is seen in them whatever the others wait for.

Some calls are cancelled after a moment, some have short timeouts. The last line tells of the process: `late_s` is by
how much the slowest answer came after its timeout, `lag_s` how late the event loop was at most, `counts` the outcomes
of calls that had the usual timeout.
"""

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from typing import Any, Final

import kvtcp
from kvtcp.errors import ConditionFailed, OutcomeUnknown, Unavailable
from kvtcp.protocol.hashing import shard_of

WORKERS: Final = 4
HOT_SLOTS: Final = 3
COUNTERS: Final = 6
BURST: Final = 50
TIMEOUT_S: Final = 2.0
LARGE_BYTES: Final = 2 << 20
LARGE_S: Final = 20  # then there are other large keys
COLD_KEYS: Final = 640
COLD_WORKERS: Final = 4
COLD_BYTES: Final = 200
COLD_PAUSE_S: Final = 0.02
PROBE_S: Final = 0.1
LAG_TICK_S: Final = 0.05


class Recorder:
    """What the calls of this process gave."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[list[Any]] = []
        self.late_s = 0.0  # by how much an answer came after its timeout, at most
        self.lag_s = 0.0  # how late this process itself was, at most
        self.counts: Counter[str] = Counter()
        self.open: dict[int, list[Any]] = {}  # calls under way: they end as unknown

    async def call(
        self, kind: str, key: str, argument: Any, calling: Awaitable[Any], timeout_s: float, cancels: bool = True
    ) -> Any:
        """Make a call and write it down; `cancels`: it may be given up at once. Its result, None if there is none."""
        line = [kind, key, time.monotonic(), None, argument, None, "unknown"]
        self.open[id(line)] = line
        cancel_s = self.random.uniform(0.0, 0.03) if cancels and self.random.random() < 0.03 else None
        task = asyncio.ensure_future(calling)
        try:
            done, _ = await asyncio.wait({task}, timeout=cancel_s)
            if not done:
                task.cancel()
            line[5] = await task
            line[6] = "ok"
        except asyncio.CancelledError:
            if not task.cancelled():  # this worker is cancelled, not its call
                task.cancel()
                raise
        except ConditionFailed:
            line[5], line[6] = False, "ok"
        except Unavailable:
            line[6] = "refused"
        except OutcomeUnknown:
            pass
        if timeout_s >= TIMEOUT_S and cancel_s is None:
            self.counts[line[6]] += 1
        line[3] = time.monotonic()
        self.late_s = max(self.late_s, line[3] - line[2] - timeout_s)
        del self.open[id(line)]
        self.lines.append(line)
        return line[5] if line[6] == "ok" else None

    async def watch_lag(self) -> None:
        """Notice when this process does not run."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_TICK_S)
            self.lag_s = max(self.lag_s, time.monotonic() - began - LAG_TICK_S)

    def dump(self, path: str) -> None:
        """Write everything down."""
        with open(path, "w", encoding="utf-8") as file:
            for line in [*self.lines, *self.open.values()]:
                file.write(json.dumps(line) + "\n")
            file.write(json.dumps({"late_s": self.late_s, "lag_s": self.lag_s, "counts": self.counts}) + "\n")


class Worker:
    """One call at a time."""

    def __init__(self, kv: Any, recorder: Recorder, name: str, peers: list[str]) -> None:
        self.kv = kv
        self.recorder = recorder
        self.random = recorder.random
        self.name = name
        self.peers = peers  # owners of pairs that this one reads
        self.pair = 0  # number of the present pair
        self.step = 0  # last number written to it
        self.unique = 0  # of values and keys

    async def run(self) -> None:
        """Work until cancelled."""
        kinds = [self.hot, self.count, self.burst, self.pairs, self.look, self.expiring, self.large]
        weights = [30, 10, 3, 20, 20, 3, 0.3]
        while True:
            timeout_s = TIMEOUT_S if self.random.random() < 0.9 else self.random.uniform(0.02, 0.3)
            await self.random.choices(kinds, weights)[0](timeout_s)
            await asyncio.sleep(self.random.uniform(0, 0.01))

    def value(self) -> str:
        self.unique += 1
        return f"{self.name}.{self.unique}"

    async def hot(self, timeout_s: float) -> None:
        """A call on one of the keys of this second."""
        kv, call = self.kv, self.recorder.call
        key = f"hot-{self.random.randrange(HOT_SLOTS)}-{int(time.monotonic())}"
        dice = self.random.random()
        if dice < 0.45:
            await call("get", key, None, self.text(kv.get(key, timeout=timeout_s)), timeout_s)
        elif dice < 0.65:
            value = self.value()
            await call("put", key, value, self.done(kv.put(key, value, timeout=timeout_s), "ok"), timeout_s)
        elif dice < 0.75:
            value = self.value()
            await call("add", key, value, self.done(kv.add(key, value, timeout=timeout_s), True), timeout_s)
        elif dice < 0.82:
            await call("delete", key, None, kv.delete(key, timeout=timeout_s), timeout_s)
        else:
            seen = await call("get", key, None, self.text(kv.get(key, timeout=timeout_s)), timeout_s)
            if seen is not None:
                value = self.value()
                calling = kv.cas(key, value, if_value=seen, timeout=timeout_s)
                await call("cas", key, [seen, value], self.done(calling, True), timeout_s)

    async def count(self, timeout_s: float) -> None:
        """Count."""
        key = f"count-{self.random.randrange(COUNTERS)}"
        await self.recorder.call("incr", key, 1, self.kv.incr(key, timeout=timeout_s), timeout_s)

    async def burst(self, timeout_s: float) -> None:
        """Many at once."""
        await asyncio.gather(*(self.count(timeout_s) for _ in range(BURST)))

    async def pairs(self, timeout_s: float) -> None:
        """One step of the pair that this worker owns."""
        self.step += 1
        for half in "ab":
            key = f"pair-{self.name}-{self.pair}-{half}"
            calling = self.kv.put(key, str(self.step), timeout=timeout_s)
            if await self.recorder.call("put", key, self.step, calling, timeout_s) is None:
                # Refused or unknown. Either way the other half must not be ahead, and this one not be written again.
                self.pair, self.step = self.pair + 1, 0
                return

    async def look(self, timeout_s: float) -> None:
        """Read the pairs of an owner in one cut."""
        owner = self.random.choice(self.peers)
        if self.random.random() < 0.5:
            calling = self.page(f"pair-{owner}-", timeout_s)
            await self.recorder.call("scan", owner, None, calling, timeout_s)
        else:
            pair = self.random.randrange(self.pair + 1)
            keys = [f"pair-{owner}-{pair}-{half}" for half in "ba"]
            await self.recorder.call("mget", owner, None, self.mget(keys, timeout_s), timeout_s)

    async def mget(self, keys: list[str], timeout_s: float) -> dict[str, int]:
        values = await self.kv.get_many(keys, timeout=timeout_s)
        return {key: int(value) for key, value in zip(keys, values, strict=True) if value is not None}

    async def page(self, prefix: str, timeout_s: float) -> dict[str, int]:
        """The first page of a scan, which is one cut."""
        async for rows in self.kv.scan_pages(prefix=prefix, timeout=timeout_s):
            return {key.decode(): int(value) for key, value in rows}
        return {}

    async def expiring(self, timeout_s: float) -> None:
        """A key with a deadline, read until after it."""
        kv, call = self.kv, self.recorder.call
        self.unique += 1
        key = f"ttl-{self.name}-{self.unique}"
        ttl_s = self.random.uniform(0.05, 0.5)
        if await call("put", key, ttl_s, kv.put(key, "x", ttl=ttl_s, timeout=timeout_s), timeout_s) is None:
            return
        for _ in range(3):
            await call("get", key, None, self.text(kv.get(key, timeout=timeout_s)), timeout_s)
            await asyncio.sleep(ttl_s / 2.5)

    async def large(self, timeout_s: float) -> None:
        """A large value, and a look at it."""
        key = f"large-{self.random.randrange(2)}-{int(time.monotonic() / LARGE_S)}"
        size = self.random.randrange(LARGE_BYTES)
        mark = self.value()
        calling = self.kv.put(key, mark + " " * size, timeout=timeout_s)
        await self.recorder.call("put", key, mark, self.done(calling, "ok"), timeout_s)
        await self.recorder.call("get", key, None, self.text(self.kv.get(key, timeout=timeout_s)), timeout_s)

    @staticmethod
    async def text(calling: Awaitable[bytes | None]) -> str | None:
        value = await calling
        return None if value is None else value.decode().rstrip()

    @staticmethod
    async def done(calling: Awaitable[Any], result: Any) -> Any:
        await calling
        return result


class Cold:
    """One key after another of a place in a shard, each written by this object alone."""

    def __init__(self, kv: Any, recorder: Recorder, name: str, shard: int, tag: str) -> None:
        self.kv = kv
        self.recorder = recorder
        self.shard = shard
        self._name = f"cold-{{{tag}}}-{name}"
        self._generation = 0
        self._number = 0  # last one written to the present key
        self.is_busy = False

    async def step(self) -> None:
        """Write the next number, or read the last."""
        self.is_busy = True
        key = f"{self._name}-{self._generation}"
        kv, call, dice = self.kv, self.recorder.call, self.recorder.random.random()
        if dice < 0.25 and self._number:
            await call("get", key, None, self._read(kv.get(key, timeout=TIMEOUT_S)), TIMEOUT_S, False)
        else:
            self._number += 1
            value = f"{self._number}".ljust(int(dice * COLD_BYTES))
            if await call("put", key, self._number, kv.put(key, value, timeout=TIMEOUT_S), TIMEOUT_S, False) is None:
                self._generation, self._number = self._generation + 1, 0
        self.is_busy = False

    @staticmethod
    async def _read(calling: Awaitable[bytes | None]) -> int:
        value = await calling
        return 0 if value is None else int(value)


class ColdWorker:
    """Walks over all shards and many keys of each, so that every shard is written all the time."""

    def __init__(self, places: list[list[Cold]], seed: int) -> None:
        self.places = places  # of each shard
        self.random = random.Random(seed)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            for shard in self.random.sample(range(len(self.places)), len(self.places)):
                place = self.random.choice(self.places[shard])
                if not place.is_busy:
                    await place.step()
                await asyncio.sleep(self.random.uniform(0, COLD_PAUSE_S))


async def probe(place: Cold) -> None:
    """Write one place of a shard at a steady pace until cancelled."""
    while True:
        began = time.monotonic()
        await place.step()
        await asyncio.sleep(max(began + PROBE_S - time.monotonic(), 0))


def cold_jobs(kv: Any, recorder: Recorder, name: str, seed: int, with_probes: bool) -> list[Any]:
    """Coroutines for the cold keys of a process."""
    shards = kv.info.shards
    tags: dict[int, str] = {}
    while len(tags) < shards:
        tag = f"t{recorder.random.randrange(10**6)}"
        tags.setdefault(shard_of(tag.encode(), shards), tag)
    places = [
        [Cold(kv, recorder, f"{name}.{number}", shard, tags[shard]) for number in range(COLD_KEYS // shards)]
        for shard in range(shards)
    ]
    jobs = [ColdWorker(places, seed + number).run() for number in range(COLD_WORKERS)]
    if with_probes:
        jobs += [probe(Cold(kv, recorder, f"{name}.probe", shard, tags[shard])) for shard in range(shards)]
    return jobs


async def work(url: str, seed: int, name: str, path: str) -> None:
    """Everything that this process does."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    recorder = Recorder(seed)
    async with kvtcp.connect(url, timeout=TIMEOUT_S, name=name) as kv:
        names = [f"{name}{letter}" for letter in "abcdefgh"[:WORKERS]]
        jobs: list[Any] = [recorder.watch_lag()]
        jobs += [Worker(kv, recorder, own, names).run() for own in names]
        jobs += cold_jobs(kv, recorder, name, seed, with_probes=name == "c0")
        workers = [asyncio.ensure_future(job) for job in jobs]
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({stopping, *workers}, return_when=asyncio.FIRST_COMPLETED)
        for worker in workers:
            if worker.done():
                worker.result()  # raises: an error that no promise allows
            worker.cancel()
        await asyncio.wait(workers)
        recorder.dump(path)


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))
