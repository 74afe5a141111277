"""Clusters and peers for the benchmarks: started from bin/, on free loopback ports, stopped after.

`Cluster` runs the real processes.
`EchoPeer` is a server in its own process that speaks just enough of the protocol to answer `hello` and `get` with
constants: what the same client reaches against it is the most it could reach against any server on this machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 30.0


class StoppedAtExit:
    """Something that runs until `stop`, or to the end of its `with`."""

    def stop(self) -> None:
        """End it, and leave nothing behind."""
        raise AssertionError("what is started says how it is stopped")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports nobody uses now, below the range that the kernel gives out by itself."""
    for _ in range(1_000):
        base = random.randrange(20_000, 32_000 - count)
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise RuntimeError("no free ports between 20000 and 32000")


def children_of(pid: int) -> list[int]:
    """Pids of the children of a process, ascending."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


class Process:
    """A child that prints a line when it is ready."""

    def __init__(self, command: list[str], quiet: bool = False, environment: Mapping[str, str] | None = None) -> None:
        """`quiet`: what it says on stderr is dropped. `environment`: added to ours."""
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True,
            stderr=subprocess.DEVNULL if quiet else None, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        self.line = self.process.stdout.readline() if ready else ""
        if not self.line:
            self.stop()
            raise RuntimeError(f"{command[1]} did not become ready")

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        """End it and wait."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Cluster(StoppedAtExit):
    """A coordinator with its nodes: those that it spawns, or `own_nodes`, which are started and ended here."""

    def __init__(
        self, nodes: int, replication_factor: int, durability: str = "memory", own_nodes: bool = False,
        shards: int = 64, profile_into: Path | None = None,
    ) -> None:  # fmt: skip
        """`profile_into`: own nodes and coordinator sample where they spend their time, and write that into this
        directory when they stop (see `bench/profiling.py`)."""
        self.replication_factor = replication_factor
        self._profile_into = profile_into
        self._directory = tempfile.TemporaryDirectory(prefix="kvtcp-bench-")
        self.data = Path(self._directory.name) / "data"
        self._durability = durability
        main_port = free_ports(nodes + 1)
        ports = range(main_port + 1, main_port + 1 + nodes)
        self.port = main_port
        self.url = f"kvtcp://127.0.0.1:{main_port}"
        self._ports = {f"n{number}": port for number, port in enumerate(ports, 1)} if own_nodes else {}
        self.nodes = {node: self._start_node(node) for node in self._ports}
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        place = ["--nodes", addresses] if own_nodes else ["--num-nodes", str(nodes), "--base-port", str(ports[0])]
        self._command = [
            *self._program("coordinator", "coordinator"), *place,
            "--replication-factor", str(replication_factor), "--shards", str(shards), "--main-port", str(main_port),
            "--durability", durability, "--data-dir", str(self.data),
            "--backup-dir", self._directory.name + "/backups", "--log-level", "error",
        ]  # fmt: skip
        self._process = Process(self._command)

    def _program(self, program: str, role: str) -> list[str]:
        """The start of a command."""
        if self._profile_into is not None:
            return [sys.executable, "-m", "bench.profiling", program, str(self._profile_into / f"{role}.json")]
        return [sys.executable, str(ROOT / "bin" / f"kvtcp-{program}")]

    @property
    def coordinator_pid(self) -> int:
        return self._process.pid

    def node_pids(self) -> list[int]:
        """Of all nodes that run now."""
        return [node.pid for node in self.nodes.values()] or children_of(self._process.pid)

    def roles(self) -> dict[str, list[int]]:
        """Pids by role."""
        return {"coordinator": [self.coordinator_pid], "nodes": self.node_pids()}

    def _start_node(self, node: str) -> Process:
        return Process([
            *self._program("node", node), "--id", node, "--port", str(self._ports[node]),
            "--data-dir", str(self.data / node), "--durability", self._durability, "--log-level", "error",
        ])  # fmt: skip

    def kill_node(self, node: str) -> None:
        """SIGKILL of one of the own nodes."""
        self.nodes[node].kill()

    def start_node(self, node: str, empty: bool = False) -> None:
        """Start one of the own nodes again, on what it had or with nothing."""
        if empty:
            shutil.rmtree(self.data / node)
        self.nodes[node] = self._start_node(node)

    def kill_coordinator(self) -> None:
        """SIGKILL; its nodes run on."""
        self._process.kill()

    def start_coordinator(self) -> None:
        """Start it again."""
        self._process = Process(self._command)

    def stop(self) -> None:
        """End it and remove its data."""
        self._process.stop()
        for node in self.nodes.values():
            node.stop()
        self._directory.cleanup()


class EchoPeer:
    """The cheapest server that a client can talk to."""

    def __init__(self) -> None:
        port = free_ports(1)
        self.url = f"kvtcp://127.0.0.1:{port}"
        self._process = Process([sys.executable, "-m", "bench.load.cluster", str(port)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()


def serve_echo(port: int) -> None:
    """Answer hello and get with constants until SIGTERM."""
    import asyncio

    import uvloop

    from kvtcp.protocol.framing import FrameDecoder, FrameEncoder

    hello = {"server": "echo", "version": 1, "cluster": "echo", "shards": 1, "limits": {}}

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert hasattr(transport, "write")
            self.write = transport.write
            self.decoder, self.encoder = FrameDecoder(), FrameEncoder()

        def data_received(self, data: bytes) -> None:
            encode = self.encoder.encode
            answers = [
                encode((message[0], 0, hello if message[1] == b"hello" else (b"v" * 128, 1, None)))
                for message in self.decoder.feed(data)
            ]
            if answers:
                self.write(b"".join(answers))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(Echo, "127.0.0.1", port)
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        print(f"echo ready on {port} at {time.time():.0f}", flush=True)
        await stop.wait()

    uvloop.run(main())


if __name__ == "__main__":
    serve_echo(int(sys.argv[1]))
