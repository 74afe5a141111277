"""One process of a pysyncobj cluster, controlled by lines of JSON on stdin; see `bench.peers.servers.PySyncObj`.

    {"ask": "leader"}                                       true if this process is the leader and ready
    {"ask": "load", operations, outstanding, keys, value_bytes, seed}      sets in a closed loop: rate and latencies
    {"ask": "get", "number"}                                a value of the local copy

Load comes from within the leader, which spares pysyncobj the way from a client to it: it has no protocol for clients.
Its period of ticks is 5 ms instead of the default of 50, which suits it better here.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from typing import Any

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

from bench.measure import quantile

TICK_S = 0.005


class Store(SyncObj):
    """A replicated dict."""

    def __init__(self, address: str, others: list[str], journal: str) -> None:
        super().__init__(address, others, SyncObjConf(journalFile=journal, autoTickPeriod=TICK_S))
        self.data: dict[str, str] = {}

    @replicated
    def set(self, key: str, value: str) -> None:
        """Store a value."""
        self.data[key] = value


def key_of(number: int) -> str:
    """16 characters."""
    return f"key:{number:012d}"


def load(store: Store, operations: int, outstanding: int, keys: int, value_bytes: int, seed: int) -> dict[str, float]:
    """Keep `outstanding` sets under way until `operations` are answered. Raises RuntimeError if one fails."""
    rng = random.Random(seed)
    numbers = [rng.randrange(keys) for _ in range(operations)]
    latencies: list[float] = []
    failures: list[Any] = []
    done = threading.Event()
    slots = threading.Semaphore(outstanding)

    def submit(number: int) -> None:
        sent = time.monotonic()

        def answered(_: Any, error: Any) -> None:
            if error != FAIL_REASON.SUCCESS:
                failures.append(error)
            latencies.append((time.monotonic() - sent) * 1000)
            slots.release()
            if len(latencies) == operations:
                done.set()

        store.set(key_of(number), f"{number:012d}".ljust(value_bytes, "v"), callback=answered)

    began = time.monotonic()
    for number in numbers:
        slots.acquire()
        submit(number)
    if not done.wait(60.0):
        raise RuntimeError(f"{operations - len(latencies)} sets were not answered in a minute")
    took_s = time.monotonic() - began
    if failures:
        raise RuntimeError(f"{len(failures)} sets failed, the first with {failures[0]}")
    latencies.sort()
    return {
        "rate": operations / took_s, "p50_ms": quantile(latencies, 0.5), "p99_ms": quantile(latencies, 0.99),
        "max_ms": latencies[-1],
    }  # fmt: skip


def main() -> None:
    """Answer requests until stdin ends."""
    journal, address, *others = sys.argv[1:]
    store = Store(address, others, journal)
    for line in sys.stdin:
        request = json.loads(line)
        ask = request.pop("ask")
        if ask == "leader":
            answer: Any = store.isReady() and store._isLeader()
        elif ask == "load":
            answer = load(store, **request)
        else:
            answer = store.data.get(key_of(request["number"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
