"""Clusters and peers for the benchmarks: started from bin/, on free loopback ports, stopped after.

`Cluster` runs the real processes; `cpu_s` reads what each has used from the process accounts, in seconds of CPU.
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
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
START_S = 30.0


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


def cpu_s(pid: int) -> float:
    """CPU time a process has used, user and system, seconds."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Process:
    """A child that prints a line when it is ready."""

    def __init__(self, command: list[str], quiet: bool = False) -> None:
        """`quiet`: what it says on stderr is dropped."""
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True,
            stderr=subprocess.DEVNULL if quiet else None,
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


class Cluster:
    """A coordinator with its nodes: those that it spawns, or `own_nodes`, which are started and ended here."""

    def __init__(
        self, nodes: int, replication_factor: int, durability: str = "memory", own_nodes: bool = False, shards: int = 64
    ) -> None:
        self.replication_factor = replication_factor
        self._directory = tempfile.TemporaryDirectory(prefix="kvtcp-bench-")
        self.data = Path(self._directory.name) / "data"
        self._durability = durability
        main_port = free_ports(nodes + 1)
        ports = range(main_port + 1, main_port + 1 + nodes)
        self.url = f"kvtcp://127.0.0.1:{main_port}"
        self._ports = {f"n{number}": port for number, port in enumerate(ports, 1)} if own_nodes else {}
        self.nodes = {node: self._start_node(node) for node in self._ports}
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        place = ["--nodes", addresses] if own_nodes else ["--num-nodes", str(nodes), "--base-port", str(ports[0])]
        self._command = [
            sys.executable, str(ROOT / "bin" / "kvtcp-coordinator"), *place,
            "--replication-factor", str(replication_factor), "--shards", str(shards), "--main-port", str(main_port),
            "--durability", durability, "--data-dir", str(self.data),
            "--backup-dir", self._directory.name + "/backups", "--log-level", "error",
        ]  # fmt: skip
        self._process = Process(self._command)
        self.node_pids: list[int] = []  # filled by the suite from `nodes`

    @property
    def coordinator_pid(self) -> int:
        return self._process.pid

    def _start_node(self, node: str) -> Process:
        return Process([
            sys.executable, str(ROOT / "bin" / "kvtcp-node"), "--id", node, "--port", str(self._ports[node]),
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

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
        self._process = Process([sys.executable, "-m", "bench.cluster", str(port)])

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
