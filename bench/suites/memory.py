"""The `memory` suite: resident bytes per key and copy, keys of 16 bytes with values of 128.

What the resident memory of the processes that hold the data grows by while the keys are put in random order, divided by
keys and copies; everything in mode `memory`, since logs are files. The coordinator's growth is a row of its own. Peers:
redis-server and memcached, filled over their own protocols. The floor is key and value themselves, 144 bytes.

A server is fresh for each run, so nothing that was freed earlier is used again; after the fill the suite waits until
the memory has been the same for a second.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.load import clients, resp
from bench.load.cluster import Cluster
from bench.load.raw import MEMCACHED, RawWorkload
from bench.measure import Options, Result, Sample, Workload, interleave, make_row, resident_bytes, with_floor
from bench.peers.servers import Memcached, PeerMissing, Redis, program

TITLE = "Memory: resident bytes per key and copy, 16-byte keys, 128-byte values"
VALUE_BYTES = 128
FLOOR_BYTES = 16 + VALUE_BYTES
SETTLED_S = 1.0
SETTLE_S_MAX = 30.0


class MemoryWorkload:
    """Starts a server, fills it, reads its memory before and after."""

    workload, unit = "memory", "bytes/key"

    def __init__(
        self, target: str, start: Callable[[], Any], holders: Callable[[Any], Sequence[int]],
        fill: Callable[[Any], None], count: Callable[[Any], int], keys: int, copies: int = 1,
    ) -> None:  # fmt: skip
        self.target, self.more = target, {"durability": "memory" if copies == 1 else f"memory x{copies}"}
        self._start, self._holders, self._fill, self._count = start, holders, fill, count
        self._keys, self._copies = keys, copies
        self._found = 0
        self.others: dict[str, list[float]] = {}  # growth of the other processes, bytes per key

    def prepare(self) -> None:
        """Each run has a server of its own."""

    def generate(self, run: int) -> int:
        """The order of the keys is random with a fixed seed."""
        return run

    def execute(self, plan: int) -> Sample:
        """One server from start to end."""
        system = self._start()
        try:
            roles: Mapping[str, Sequence[int]] = system.roles()
            holders = self._holders(system)
            before = {pid: resident_bytes(pid) for pids in roles.values() for pid in pids}
            self._fill(system)
            after = settled(list(before))
            self._found = self._count(system)
            grown = sum(after[pid] - before[pid] for pid in holders)
            for role, pids in roles.items():
                if not set(pids) <= set(holders):
                    growth = sum(after[pid] - before[pid] for pid in pids) / self._keys
                    self.others.setdefault(role, []).append(growth)
            return Sample(grown / self._keys / self._copies)
        finally:
            system.stop()

    def verify(self, plan: int) -> None:
        """It held all of them."""
        if self._found != self._keys:
            raise AssertionError(f"{self.target} holds {self._found} keys, not {self._keys}")


def settled(pids: Sequence[int]) -> dict[int, int]:
    """Resident bytes when they have not changed for a while, or after SETTLE_S_MAX."""
    began = since = time.monotonic()
    last = {pid: resident_bytes(pid) for pid in pids}
    while time.monotonic() < min(since + SETTLED_S, began + SETTLE_S_MAX):
        time.sleep(0.1)
        now = {pid: resident_bytes(pid) for pid in pids}
        if any(abs(now[pid] - last[pid]) > 65_536 for pid in pids):
            last, since = now, time.monotonic()
    return last


def _fill_redis(system: Redis, keys: int) -> None:
    order = list(range(keys))
    random.Random(1).shuffle(order)
    value = b"v" * VALUE_BYTES
    with resp.RespClient(system.port) as client:
        for first in range(0, keys, 1_000):
            client.pipeline([(b"SET", resp.key_of(number), value) for number in order[first : first + 1_000]])


def _count_redis(system: Redis) -> int:
    with resp.RespClient(system.port) as client:
        return int(client.command(b"DBSIZE"))


def _fill_memcached(system: Memcached, keys: int) -> None:
    RawWorkload("memcached", system.port, system.roles, MEMCACHED, "set", 16, 16, "memory", VALUE_BYTES, keys).prepare()


def _count_memcached(system: Memcached) -> int:
    import socket

    with socket.create_connection(("127.0.0.1", system.port), 10.0) as client, client.makefile("rb") as reader:
        client.sendall(b"stats\r\n")
        for line in iter(reader.readline, b"END\r\n"):
            if line.startswith(b"STAT curr_items "):
                return int(line.split()[2])
    raise AssertionError("memcached does not tell how many keys it has")


def _kvtcp(factor: int, keys: int) -> MemoryWorkload:
    return MemoryWorkload(
        f"kvtcp RF {factor}", lambda: Cluster(3, factor), lambda cluster: cluster.node_pids(),
        lambda cluster: clients.fill(cluster.url, keys, VALUE_BYTES), lambda cluster: clients.count_keys(cluster.url),
        keys, factor,
    )  # fmt: skip


def measure(options: Options) -> list[Result]:
    """kvtcp with one and three copies, and the peers."""
    keys = options.keys_or(1_000_000, 100_000)
    workloads: list[MemoryWorkload] = [_kvtcp(1, keys)] if options.quick else [_kvtcp(1, keys), _kvtcp(3, keys)]

    def peer(make: type[Any], name: str, fill: Callable[[Any, int], None], count: Callable[[Any], int]) -> None:
        try:
            program(name)
        except PeerMissing as error:
            options.skip(make.name, str(error))
            return
        workloads.append(
            MemoryWorkload(make.name, make, lambda system: [p.pid for p in system.processes],
                           lambda system: fill(system, keys), count, keys)
        )  # fmt: skip

    peer(Redis, "redis-server", _fill_redis, _count_redis)
    peer(Memcached, "memcached", _fill_memcached, _count_memcached)
    every: Sequence[Workload] = workloads
    rows = interleave(every, options.runs_or(5), options.seed, warmups=0)
    rows = [with_floor(row, "key and value", FLOOR_BYTES) for row in rows]
    for each in workloads:
        for role, values in each.others.items():
            rows.append(make_row(each.target, f"memory of the {role}", "bytes/key", [statistics.median(values)]))
    return rows
