"""The `peers` suite: kvtcp beside the stores that people use instead, under the same generator on the same cores.

Groups of systems that give the same durability, or the nearest that a peer has, are up together and take turns in
random order; see `bench.measure` for the classes, `bench.peers.servers` for the settings. The generator is
redis-benchmark with the same options for everything that speaks RESP, kvtcp included. The exceptions: etcd brings its
own benchmark (1,000 clients, values of 1 KiB), so kvtcp gets 1,000 outstanding requests with values of 1 KiB from
redis-benchmark; pysyncobj has no server, its leader makes the load itself, which spares it a network hop; memcached
gets plain sockets, and redis once more with the same.

The floor is a uvloop server that answers redis-benchmark with constants, at the same depth.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench.load.raw import MEMCACHED, REDIS, RawWorkload
from bench.load.resp import KEYS, RespWorkload
from bench.measure import Options, Result, Sample, Workload, interleave, usage_s
from bench.peers.servers import (
    BENCHMARK,
    Etcd,
    KvtcpResp,
    Memcached,
    PeerMissing,
    PySyncObj,
    Redis,
    RedisAlways,
    RedisReplicated,
    Twemproxy,
    program,
    wait_until,
)
from bench.suites.floors import EchoWorkload, beside, echo_for

TITLE = "Peers: the same generator on the same cores"
REQUESTS = {1: (60_000, 3_000), 16: (300_000, 30_000), 64: (500_000, 50_000)}  # full, quick
ETCD_DEPTH = 20  # times 50 connections: 1,000 outstanding
ETCD_VALUE_BYTES = 1024
ETCD_REQUESTS = (150_000, 10_000)
ETCD_SECONDS = 60.0
PYSYNCOBJ_OPERATIONS = (15_000, 2_000)
OUTSTANDING = 800  # as 50 connections with depth 16


class EtcdWorkload:
    """etcd's own benchmark; it takes a minute."""

    target, workload, unit = Etcd.name, "put 1 KiB, 1,000 outstanding", "ops/s"

    def __init__(self, etcd: Etcd, load: str = "xl") -> None:
        self.more: dict[str, Any] = {"durability": Etcd.durability, "generator": f"etcdctl check perf --load {load}"}
        self._etcd, self._load = etcd, load
        self._rate = 0.0

    def prepare(self) -> None:
        """Nothing: it makes and deletes its keys."""

    def generate(self, run: int) -> int:
        """The number of changes before."""
        return self._etcd.revision()

    def execute(self, plan: int) -> Sample:
        """One run."""
        before = usage_s(self._etcd.roles())
        self._rate = self._etcd.check_perf(self._load)
        after = usage_s(self._etcd.roles())
        count = self._rate * ETCD_SECONDS
        return Sample(self._rate, {role: (after[role] - before[role]) / count * 1e6 for role in before})

    def verify(self, plan: int) -> None:
        """It really wrote that much."""
        changes = self._etcd.revision() - plan
        if changes < self._rate * ETCD_SECONDS * 0.9:
            raise AssertionError(f"etcd says {self._rate:.0f} writes a second, but made {changes} changes in a minute")


class PySyncObjWorkload:
    """A closed loop from within the leader."""

    target, workload, unit = PySyncObj.name, "SET depth 16", "ops/s"

    def __init__(self, peer: PySyncObj, operations: int, value_bytes: int = 64) -> None:
        self.more: dict[str, Any] = {"durability": PySyncObj.durability, "generator": "the leader itself", "depth": 16}
        self._peer, self._operations, self._value_bytes = peer, operations, value_bytes

    def prepare(self) -> None:
        """Nothing."""

    def generate(self, run: int) -> int:
        """The seed, from which the leader draws its keys before its clock starts."""
        return run + 1_000

    def execute(self, plan: int) -> Sample:
        """One run."""
        before = usage_s(self._peer.roles())
        found = self._peer.load(self._operations, OUTSTANDING, KEYS, self._value_bytes, plan)
        after = usage_s(self._peer.roles())
        cpu_us = {role: (after[role] - before[role]) / self._operations * 1e6 for role in before}
        return Sample(found.pop("rate"), cpu_us, found)

    def verify(self, plan: int) -> None:
        """The last key that was set has its value in all three processes, soon."""
        rng = random.Random(plan)
        number = [rng.randrange(KEYS) for _ in range(self._operations)][-1]
        value = f"{number:012d}".ljust(self._value_bytes, "v")
        wait_until(lambda: self._peer.get(number) == [value] * 3, f"pysyncobj has key {number} everywhere")


class Group:
    """Systems that are up together; those that are missing are passed over loudly."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stack = ExitStack()
        self.workloads: list[Workload] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str, make: Callable[[], Any]) -> Any:
        """A running system, or None."""
        try:
            system = make()
        except PeerMissing as error:
            self._options.skip(name, str(error))
            return None
        self._stack.callback(system.stop)
        return system

    def resp(
        self, name: str, make: Callable[[], Any], depths: tuple[int, ...] = (1, 16, 64),
        tests: tuple[str, ...] = ("set", "get"),
    ) -> Any:  # fmt: skip
        """A system that speaks RESP, with its tests; None if it is missing."""
        system = self.start(name, make)
        if system is not None:
            for depth in depths:
                requests = self._options.size(*REQUESTS[depth])
                self.workloads += [
                    RespWorkload(system.name, system.port, system.roles, test, depth, requests, system.durability)
                    for test in tests
                ]
        return system

    def echo(self, depths: tuple[int, ...] = (1, 16, 64), tests: tuple[str, ...] = ("set", "get")) -> None:
        """The floor of these tests."""
        for test in tests:
            server = echo_for(test, 64)
            self._stack.callback(server.stop)
            self.workloads += [
                EchoWorkload("uvloop echo", server.port, server.roles, test, depth,
                             self._options.size(*REQUESTS[depth]), "none")
                for depth in depths
            ]  # fmt: skip

    def run(self, runs: int, warmups: int = 1) -> list[Result]:
        """The rows, with their floors beside them."""
        return beside(interleave(self.workloads, runs, self._options.seed, warmups))


def measure_memory(options: Options) -> list[Result]:
    """Nothing is kept: kvtcp with one copy, twemproxy, redis, memcached."""
    with Group(options) as group:
        group.resp("kvtcp RF 1 memory", lambda: KvtcpResp(1, "memory"))
        group.resp(Twemproxy.name, Twemproxy)
        redis = group.resp(Redis.name, Redis)
        memcached = group.start(Memcached.name, Memcached)
        for system, dialect in ((redis, REDIS), (memcached, MEMCACHED)):
            if system is not None:
                group.workloads += [
                    RawWorkload(system.name, system.port, system.roles, dialect, test, 16,
                                options.size(*REQUESTS[16]), system.durability)
                    for test in ("set", "get")
                ]  # fmt: skip
        group.echo()
        return group.run(options.runs_or(5))


def measure_replicated(options: Options) -> list[Result]:
    """Three copies in memory: kvtcp answers after all three, redis before its replicas have it."""
    with Group(options) as group:
        group.resp("kvtcp RF 3 memory", lambda: KvtcpResp(3, "memory"))
        group.resp(RedisReplicated.name, RedisReplicated)
        group.echo(tests=("set",))
        return group.run(options.runs_or(5))


def measure_sync(options: Options) -> list[Result]:
    """On one disk before it is answered."""
    with Group(options) as group:
        group.resp("kvtcp RF 1 sync", lambda: KvtcpResp(1, "sync"), tests=("set",))
        group.resp(RedisAlways.name, RedisAlways, tests=("set",))
        group.echo(tests=("set",))
        return group.run(options.runs_or(5))


def measure_pysyncobj(options: Options) -> list[Result]:
    """Three copies: pysyncobj with a journal that nobody syncs, kvtcp with and without sync."""
    with Group(options) as group:
        for mode in ("sync", "os"):
            group.resp(f"kvtcp RF 3 {mode}", lambda mode=mode: KvtcpResp(3, mode), (16,), ("set",))
        peer = group.start(PySyncObj.name, PySyncObj)
        if peer is not None:
            group.workloads.append(PySyncObjWorkload(peer, options.size(*PYSYNCOBJ_OPERATIONS)))
        return group.run(options.runs_or(5))


def measure_etcd(options: Options) -> list[Result]:
    """On three disks before it is answered, values of 1 KiB."""
    with Group(options) as group:
        kvtcp = group.start("kvtcp RF 3 sync", lambda: KvtcpResp(3, "sync"))
        if kvtcp is not None:
            group.workloads.append(
                RespWorkload(kvtcp.name, kvtcp.port, kvtcp.roles, "set", ETCD_DEPTH, options.size(*ETCD_REQUESTS),
                             kvtcp.durability, ETCD_VALUE_BYTES, name=EtcdWorkload.workload)
            )  # fmt: skip
        etcd = None if options.quick else group.start(Etcd.name, Etcd)
        if options.quick:
            options.skip(Etcd.name, "its benchmark takes a minute for each run; not in --quick")
        if etcd is not None:
            group.workloads.append(EtcdWorkload(etcd))
        return group.run(options.runs_or(5), warmups=0)


def measure(options: Options) -> list[Result]:
    """All groups. One that fails is told, and the others go on."""
    try:
        program(BENCHMARK)
    except PeerMissing as error:
        options.skip("all peers", str(error))
        return []
    results = []
    for group in (measure_memory, measure_replicated, measure_sync, measure_pysyncobj, measure_etcd):
        try:
            results += group(options)
        except Exception:
            traceback.print_exc()
            options.failed.append(f"peers, {group.__name__}")
    return results
