"""The `recovery` suite: how long a restart takes, with a million keys of 16 bytes and values of 128.

One node with 64 shards, written through the storage itself: the time from the start of the process to its ready line,
from the log alone and from snapshots, in turn. The page cache is warm. Every put is there afterwards: `--check` counts
the keys. Peers: redis-server from its append-only file without and with a snapshot at its start, until it answers.

The floor is a Python process that unpacks the same pairs and puts them into a dict.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from bench.load.clients import key_of
from bench.load.cluster import ROOT, Process, free_ports
from bench.load.resp import RespClient, RespError
from bench.measure import Options, Result, Sample, Workload, interleave, make_row, with_floor
from bench.peers.servers import Peer, PeerMissing, program, wait_until
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.operations import PUT
from kvtcp.storage.disk.store import open_store
from kvtcp.storage.files import OS_DISK
from kvtcp.storage.shard.copy import Copy

TITLE = "Recovery: a restart, 16-byte keys, 128-byte values"
SHARDS = 64
VALUE = b"v" * 128
SNAPSHOTS_S = 120.0
FLOOR = "unpacking into a dict"


def make_node(directory: Path, keys: int) -> float:
    """A data directory with `keys` keys in random order, all in the log; log bytes per byte of key and value."""
    store = open_store(OS_DISK, directory, "os", os.urandom, "")
    copies = [Copy(shard, f"{shard:016x}") for shard in range(SHARDS)]
    store.write_manifest(store.encode_manifest(copies))
    tables = [copy.table for copy in copies]
    numbers = list(range(keys))
    random.Random(keys).shuffle(numbers)
    entries = []
    for count, number in enumerate(numbers, 1):
        key = key_of(number)
        shard = shard_of(key, SHARDS)
        table = tables[shard]
        table.epoch = 1
        table.apply((PUT, shard, table.seq + 1, 0, key, VALUE), 1_700_000_000_000 + count)
        entries.append((shard, 1, table.seq, table.chain, table.last_entry))
        if len(entries) == 500 or count == keys:
            prepared = store.log.prepare(entries)
            store.log.write(prepared)
            store.log.written(prepared)
            entries = []
    ratio = store.log.total_bytes / (keys * (16 + len(VALUE)))
    store.close_clean()
    return ratio


@contextmanager
def node(directory: Path) -> Iterator[tuple[Process, float]]:
    """A running node, and the seconds until it was ready."""
    began = time.perf_counter()
    process = Process([
        sys.executable, str(ROOT / "bin" / "kvtcp-node"), "--id", "n1", "--port", str(free_ports(1)),
        "--data-dir", str(directory),
    ], quiet=True)  # fmt: skip
    took_s = time.perf_counter() - began
    try:
        yield process, took_s
    finally:
        process.stop()


def check_keys(directory: Path, keys: int) -> None:
    """Raise AssertionError unless the stopped node holds so many keys."""
    command = [sys.executable, str(ROOT / "bin" / "kvtcp-node"), "--check", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if f" {keys} keys" not in done.stdout:
        raise AssertionError(f"the node should hold {keys} keys: {done.stdout}")


def snapshot_all(directory: Path) -> None:
    """Start the node, have it write snapshots of everything, stop it."""
    with node(directory) as (process, _):
        os.kill(process.pid, signal.SIGUSR1)
        wait_until(
            lambda: len(list(directory.rglob("*.snapshot"))) >= SHARDS
            and sum(1 for _ in (directory / "log").iterdir()) == 1,
            "snapshots of all shards", SNAPSHOTS_S,
        )  # fmt: skip


class RestartWorkload:
    """Starts what stands in a directory, a fresh copy of it each time."""

    unit = "s"

    def __init__(
        self, target: str, workload: str, directory: Path, start: Callable[[Path], float],
        check: Callable[[Path], None],
    ) -> None:  # fmt: skip
        self.target, self.workload, self.more = target, workload, dict[str, Any]()
        self._directory, self._start, self._check = directory, start, check
        self._is_checked = False

    def prepare(self) -> None:
        """The directory was made before."""

    def generate(self, run: int) -> Path:
        """A copy, so that every start finds the same."""
        copy = self._directory.with_name(f"{self._directory.name}-copy")
        shutil.copytree(self._directory, copy)
        return copy

    def execute(self, plan: Path) -> Sample:
        """Seconds until it is ready."""
        return Sample(self._start(plan))

    def verify(self, plan: Path) -> None:
        """All keys are there; counted once, because that takes longer than the start."""
        if not self._is_checked:
            self._check(plan)
            self._is_checked = True
        shutil.rmtree(plan)


def start_node(directory: Path) -> float:
    """Seconds until a node is ready."""
    with node(directory) as (_, took_s):
        return took_s


class RedisFiles(Peer):
    """A redis-server with an append-only file; `make` fills its directory, `start_s` starts it there."""

    name = "redis"

    def start(self) -> None:
        program("redis-server")

    def run(self, directory: Path, preamble: bool) -> tuple[int, float]:
        """Start in a directory; port and seconds until it answers."""
        port = free_ports(1)
        began = time.perf_counter()
        self.spawn([
            program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", "",
            "--appendonly", "yes", "--appendfsync", "no", "--aof-use-rdb-preamble", "yes" if preamble else "no",
            "--auto-aof-rewrite-percentage", "0",
        ])  # fmt: skip
        wait_until(lambda: self._is_loaded(port), "redis has loaded its file", 60.0)
        return port, time.perf_counter() - began

    @staticmethod
    def _is_loaded(port: int) -> bool:
        try:
            with RespClient(port, 5.0) as client:
                return client.command(b"GET", b"none") is None
        except (OSError, RespError):
            return False

    def end(self) -> None:
        """Stop what runs, keep the files."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        self.processes = []

    def make(self, directory: Path, keys: int, rewrite: bool) -> None:
        """Fill a directory; with `rewrite` the file begins with a snapshot of everything."""
        directory.mkdir()
        port, _ = self.run(directory, True)
        with RespClient(port) as client:
            for first in range(0, keys, 1_000):
                numbers = range(first, min(first + 1_000, keys))
                client.pipeline([(b"SET", key_of(number), VALUE) for number in numbers])
            if rewrite:
                client.command(b"BGREWRITEAOF")
                wait_until(lambda: b"aof_rewrite_in_progress:0\r\naof_rewrite_scheduled:0"
                           in client.command(b"INFO", b"persistence"), "the rewritten file", SNAPSHOTS_S)  # fmt: skip
        self.end()

    def start_s(self, directory: Path) -> float:
        """Seconds until it answers."""
        _, took_s = self.run(directory, True)
        self.end()
        return took_s

    def check(self, directory: Path, keys: int) -> None:
        """Raise AssertionError unless it has so many keys."""
        port, _ = self.run(directory, True)
        with RespClient(port) as client:
            found = client.command(b"DBSIZE")
        self.end()
        if found != keys:
            raise AssertionError(f"redis has {found} keys, not {keys}")


def floor_s(file: Path) -> float:
    """A process that unpacks pairs from a file into a dict."""
    program_text = (
        "import msgpack, sys\n"
        "pairs = msgpack.unpackb(open(sys.argv[1], 'rb').read(), raw=True, use_list=False)\n"
        "table = dict(pairs)\nassert len(table) == len(pairs)\n"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program_text, str(file)], check=True)
    return time.perf_counter() - began


def measure(options: Options) -> list[Result]:
    """All restarts."""
    keys = options.keys_or(1_000_000, 50_000)
    runs = options.runs_or(5)
    with tempfile.TemporaryDirectory(prefix="kvtcp-bench-") as name:
        place = Path(name)
        pairs = place / "pairs"
        pairs.write_bytes(msgpack.packb([(key_of(number), VALUE) for number in range(keys)]))
        log_ratio = make_node(place / "log", keys)
        shutil.copytree(place / "log", place / "snapshots")
        snapshot_all(place / "snapshots")

        def check(path: Path) -> None:
            check_keys(path, keys)

        workloads: list[Workload] = [
            RestartWorkload("kvtcp", "restart from log", place / "log", start_node, check),
            RestartWorkload("kvtcp", "restart from snapshots", place / "snapshots", start_node, check),
        ]
        redis: RedisFiles | None = None
        try:
            redis = RedisFiles()
            for kind, rewrite in (("log", False), ("snapshots", True)):
                redis.make(place / f"redis-{kind}", keys, rewrite)
                workloads.append(
                    RestartWorkload("redis", f"restart from {kind}", place / f"redis-{kind}", redis.start_s,
                                    lambda path, redis=redis: redis.check(path, keys))
                )  # fmt: skip
        except PeerMissing as error:
            options.skip("redis", str(error))
        try:
            rows = interleave(workloads, runs, options.seed, warmups=0)
        finally:
            if redis is not None:
                redis.stop()
        floors = [floor_s(pairs) for _ in range(runs)]
    rows = [with_floor(row, FLOOR, statistics.median(floors)) for row in rows]
    rows.append(make_row("Python", FLOOR, "s", floors))
    return [*rows, make_row("kvtcp", "log bytes / key and value", "ratio", [log_ratio])]
