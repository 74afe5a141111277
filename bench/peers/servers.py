"""The peers: started on free loopback ports with their data in a temporary directory, stopped after.

Each has `port` (of a server that speaks RESP, or its own protocol), `roles()` (pids by role) and `stop()`, and is a
context manager. A peer that is not installed raises PeerMissing with the way to get it; suites pass it over loudly.
All but the versions of Debian and PyPI are default settings; where a setting matters it stands here:

    redis-server        --save "" and no append-only file (memory), or --appendonly yes --appendfsync always (sync)
    redis x3            one primary, two replicas, no wait: answered before the replicas have it (async x3)
    twemproxy           nutcracker with the hash fnv1a_64 and ketama over 3 redis-servers (memory)
    memcached           one thread, since the others have one (memory)
    etcd x3             three members (sync x3)
    pysyncobj x3        three processes, journal in a file that is mapped and never synced (os x3)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.load.cluster import Cluster, StoppedAtExit, free_ports
from bench.load.resp import BENCHMARK, RespClient, RespError, speaks_resp
from bench.measure import ROOT

START_S = 20.0
PACKAGES = {
    "redis-server": "apt-get install redis-server", BENCHMARK: "apt-get install redis-tools",
    "nutcracker": "apt-get install nutcracker", "memcached": "apt-get install memcached",
    "etcd": "apt-get install etcd-server", "etcdctl": "apt-get install etcd-client",
}  # fmt: skip


class PeerMissing(Exception):
    """Something is not installed; the text says how to get it."""


def program(name: str) -> str:
    """The path of a program. Raises PeerMissing."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        raise PeerMissing(f"{name} is not installed: {PACKAGES[name]}")
    return path


def library(name: str) -> None:
    """Raises PeerMissing if the library cannot be imported."""
    if importlib.util.find_spec(name) is None:
        raise PeerMissing(f"{name} is not installed: pip install '.[peers]'")


def wait_until(condition: Callable[[], bool], what: str, wait_s: float = START_S) -> None:
    """Wait for a condition. Raises TimeoutError."""
    until = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"in {wait_s:.0f} s not reached: {what}")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def version_of(name: str) -> str:
    """The first version number that a program names, or "not installed"."""
    option = {"nutcracker": "--version", "etcdctl": "version"}.get(name, "--version")
    try:
        done = subprocess.run([program(name), option], capture_output=True, text=True, timeout=10, check=False)
    except PeerMissing:
        return "not installed"
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return found[0] if found else "unknown"


def versions() -> dict[str, str]:
    """Of all programs."""
    return {name: version_of(name) for name in PACKAGES}


class Peer(StoppedAtExit):
    """Some processes and a directory."""

    role = "server"

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kvtcp-bench-peer-")
        self.directory = Path(self._directory.name)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = 0
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Start everything and wait until it answers."""
        raise NotImplementedError

    def spawn(self, command: Sequence[str], output: Any = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """One process."""
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT if output == subprocess.DEVNULL else None,
            stdin=subprocess.DEVNULL, cwd=self.directory, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def roles(self) -> dict[str, list[int]]:
        """Pids by role."""
        return {self.role: [process.pid for process in self.processes]}

    def stop(self) -> None:
        """End all processes and remove the directory."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._directory.cleanup()

    def redis(self, *options: str) -> int:
        """Start a redis-server; its port."""
        port = free_ports(1)
        place = self.directory / str(port)
        place.mkdir()
        self.spawn([
            program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(place), "--save", "",
            "--daemonize", "no", *options,
        ])  # fmt: skip
        wait_until(lambda: speaks_resp(port), "redis-server answers")
        return port


class Redis(Peer):
    """One redis-server that keeps nothing."""

    name, durability = "redis", "memory"

    def start(self) -> None:
        self.port = self.redis()


class RedisAlways(Peer):
    """One redis-server that syncs before it answers."""

    name, durability = "redis appendfsync always", "sync"

    def start(self) -> None:
        self.port = self.redis("--appendonly", "yes", "--appendfsync", "always")


class RedisReplicated(Peer):
    """A primary with two replicas, asynchronous."""

    name, durability = "redis + 2 asynchronous replicas", "async x3"

    def start(self) -> None:
        self.port = self.redis()
        replicas = []
        for _ in range(2):
            port = free_ports(1)
            place = self.directory / str(port)
            place.mkdir()
            self.spawn([
                program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(place), "--save", "",
                "--replicaof", "127.0.0.1", str(self.port),
            ])  # fmt: skip
            replicas.append(port)
        wait_until(lambda: all(self._linked(port) for port in replicas), "both replicas are linked")

    @staticmethod
    def _linked(port: int) -> bool:
        try:
            with RespClient(port, 5.0) as client:
                return b"master_link_status:up" in client.command(b"INFO", b"replication")
        except (OSError, RespError):
            return False

    def roles(self) -> dict[str, list[int]]:
        """Pids by role."""
        primary, *replicas = self.processes
        return {"server": [primary.pid], "replicas": [process.pid for process in replicas]}


class Twemproxy(Peer):
    """nutcracker in front of three redis-servers."""

    name, durability = "twemproxy + 3 redis", "memory"

    def start(self) -> None:
        binary = program("nutcracker")
        servers = [self.redis() for _ in range(3)]
        self.port = free_ports(2)
        config = self.directory / "nutcracker.yml"
        lines = [
            "pool:", f"  listen: 127.0.0.1:{self.port}", "  hash: fnv1a_64", "  distribution: ketama", "  redis: true",
            "  auto_eject_hosts: false", "  servers:", *(f"   - 127.0.0.1:{port}:1" for port in servers),
        ]  # fmt: skip
        config.write_text("\n".join(lines) + "\n")
        self.spawn([
            binary, "-c", str(config), "-o", str(self.directory / "log"), "-v", "2", "-a", "127.0.0.1",
            "-s", str(self.port + 1), "-p", str(self.directory / "pid"),
        ])  # fmt: skip
        wait_until(lambda: speaks_resp(self.port), "twemproxy answers")

    def roles(self) -> dict[str, list[int]]:
        """Pids by role: the proxy has the part of the coordinator."""
        *servers, proxy = self.processes
        return {"coordinator": [proxy.pid], "nodes": [process.pid for process in servers]}


class Memcached(Peer):
    """One memcached with one thread."""

    name, durability = "memcached", "memory"

    def start(self) -> None:
        binary = program("memcached")
        self.port = free_ports(1)
        self.spawn([binary, "-p", str(self.port), "-l", "127.0.0.1", "-t", "1", "-m", "1024", "-u", "nobody"])
        wait_until(lambda: accepts(self.port), "memcached listens")


class Etcd(Peer):
    """Three members, and etcd's own benchmark."""

    name, durability = "etcd, 3 members", "sync x3"
    members = 3

    def start(self) -> None:
        binary, _ = program("etcd"), program("etcdctl")
        base = free_ports(2 * self.members)
        self.endpoints = [f"http://127.0.0.1:{base + 2 * n}" for n in range(self.members)]
        peers = [f"http://127.0.0.1:{base + 2 * n + 1}" for n in range(self.members)]
        cluster = ",".join(f"m{n}={peer}" for n, peer in enumerate(peers))
        for n, (client, peer) in enumerate(zip(self.endpoints, peers, strict=True)):
            self.spawn([
                binary, "--name", f"m{n}", "--data-dir", str(self.directory / f"m{n}"), "--listen-client-urls", client,
                "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", cluster, "--initial-cluster-state", "new", "--quota-backend-bytes", str(8 << 30),
            ])  # fmt: skip
        self.port = base
        wait_until(self._is_healthy, "three healthy members of etcd")

    def _control(self, *arguments: str, limit_s: float = 30.0) -> str:
        done = subprocess.run(
            [program("etcdctl"), "--endpoints", ",".join(self.endpoints), *arguments],
            capture_output=True, text=True, timeout=limit_s, check=False, env={"ETCDCTL_API": "3", "PATH": "/usr/bin"},
        )  # fmt: skip
        return done.stdout + done.stderr

    def _is_healthy(self) -> bool:
        return self._control("endpoint", "health").count("is healthy") == self.members

    def check_perf(self, load: str = "xl") -> float:
        """Writes a second of `etcdctl check perf`, which takes a minute: 1,000 clients for xl, values of 1 KiB."""
        return parse_check_perf(self._control("check", "perf", "--load", load, "--command-timeout", "30s",
                                              limit_s=180.0))  # fmt: skip

    def revision(self) -> int:
        """How many changes the store has seen."""
        status = json.loads(self._control("endpoint", "status", "-w", "json"))
        return int(status[0]["Status"]["header"]["revision"])


def parse_check_perf(text: str) -> float:
    """The rate that `etcdctl check perf` prints, whether it calls it a pass or a failure. Raises RespError."""
    found = re.search(r"Throughput (?:is|too low:) (\d+) writes/s", text)
    if found is None:
        raise RespError(f"etcdctl check perf printed no rate: {text[-500:]!r}")
    return float(found[1])


class PySyncObj(Peer):
    """Three processes that replicate a dict by Raft, each with a journal; the leader makes the load itself."""

    name, durability = "pysyncobj, 3 nodes with journal", "os x3"

    def start(self) -> None:
        library("pysyncobj")
        base = free_ports(3)
        addresses = [f"127.0.0.1:{base + n}" for n in range(3)]
        self.port = base
        for n in range(3):
            others = [address for address in addresses if address != addresses[n]]
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.peers.pysyncobj", str(self.directory / f"j{n}"), addresses[n], *others],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
        wait_until(lambda: self._leader() is not None, "a leader of pysyncobj")

    def ask(self, process: subprocess.Popen[bytes], **request: Any) -> Any:
        """One request to a process, one answer."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def _leader(self) -> subprocess.Popen[bytes] | None:
        return next((each for each in self.processes if self.ask(each, ask="leader")), None)

    def load(self, operations: int, outstanding: int, keys: int, value_bytes: int, seed: int) -> Any:
        """Sets in a closed loop from within the leader; {"rate": a second, "p50_ms", "p99_ms", "max_ms"}."""
        leader = self._leader()
        if leader is None:
            raise RuntimeError("pysyncobj has no leader any more")
        return self.ask(
            leader, ask="load", operations=operations, outstanding=outstanding, keys=keys, value_bytes=value_bytes,
            seed=seed,
        )  # fmt: skip

    def get(self, number: int) -> list[str | None]:
        """The value of a key in each process."""
        return [self.ask(process, ask="get", number=number) for process in self.processes]

    def roles(self) -> dict[str, list[int]]:
        """Pids by role; the load is in the leader."""
        return {"server": [process.pid for process in self.processes]}


class KvtcpResp:
    """A kvtcp cluster whose coordinator speaks RESP on its main port."""

    def __init__(self, factor: int, mode: str, nodes: int = 3, shards: int = 64) -> None:
        self.cluster = Cluster(nodes, factor, mode, shards=shards)
        self.name = f"kvtcp RF {factor} {mode}"
        self.durability = mode if factor == 1 else f"{mode} x{factor}"
        self.port = self.cluster.port
        if not speaks_resp(self.port):
            self.stop()
            raise PeerMissing("this version of the coordinator does not speak RESP")

    def roles(self) -> dict[str, list[int]]:
        """Pids by role."""
        return self.cluster.roles()

    def stop(self) -> None:
        """End it."""
        self.cluster.stop()
