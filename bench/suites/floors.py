"""Floors: what the machine, the kernel and CPython need by themselves for the least that a store must do.

    raw ping-pong       two processes, blocking sockets over TCP loopback, one message each way: us per round trip
    uvloop echo         a server that answers every request of redis-benchmark with a constant, counting bytes instead
                        of parsing: the same generator at the same batch size, ops/s
    dict                get and set of bytes keys, us per operation
    list                append and index, us per operation
    fdatasync           appending a block and syncing it, ms

A figure without its floor says little: at 9 us for a loopback message no store does 200,000 requests a second one by
one on a core. `efficiency` in a row is floor / actual, both as times. Servers run in processes of their own
(`python -m bench.suites.floors echo|raw ...`).
"""

from __future__ import annotations

import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.load.cluster import Process, StoppedAtExit, free_ports
from bench.load.resp import RespWorkload, encode_command, key_of
from bench.measure import Options, Result, make_row, quantile, with_floor

TITLE = "Floors: what the machine and CPython need by themselves"
MESSAGE_BYTES = 100
SYNC_BYTES = 4096


class FloorEcho(StoppedAtExit):
    """A uvloop server that answers every request of a fixed length with a constant."""

    def __init__(self, request_bytes: int, reply: bytes) -> None:
        self.port = free_ports(1)
        self._process = Process(
            [sys.executable, "-m", "bench.suites.floors", "echo", str(self.port), str(request_bytes), reply.hex()]
        )

    def roles(self) -> dict[str, list[int]]:
        """Pids by role."""
        return {"server": [self._process.pid]}

    def stop(self) -> None:
        """End it."""
        self._process.stop()


class EchoWorkload(RespWorkload):
    """redis-benchmark against the echo: nothing is stored, so there is nothing to prepare or to check."""

    def prepare(self) -> None:
        """Nothing."""

    def generate(self, run: int) -> list[int]:
        """Nothing."""
        return []

    def verify(self, plan: list[int]) -> None:
        """redis-benchmark itself has counted the answers."""


def echo_for(test: str, value_bytes: int) -> FloorEcho:
    """An echo for one test of redis-benchmark."""
    value = b"v" * value_bytes
    if test == "set":
        return FloorEcho(len(encode_command((b"SET", key_of(0), value))), b"+OK\r\n")
    return FloorEcho(len(encode_command((b"GET", key_of(0)))), b"$%d\r\n%s\r\n" % (value_bytes, value))


def serve_echo(port: int, request_bytes: int, reply: bytes) -> None:
    """Answer until SIGTERM. What redis-benchmark asks first, CONFIG, is refused."""
    import asyncio
    import signal

    import uvloop

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
            self.write = transport.write
            self.left = 0

        def data_received(self, data: bytes) -> None:
            if b"CONFIG" in data:
                self.write(b"-ERR no such command\r\n" * data.count(b"CONFIG"))
                return
            count, self.left = divmod(self.left + len(data), request_bytes)
            if count:
                self.write(reply * count)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(Echo, "127.0.0.1", port)
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        print("ready", flush=True)
        await stop.wait()

    uvloop.run(main())


def serve_raw(port: int) -> None:
    """Send back what comes on one connection, until it ends."""
    with socket.create_server(("127.0.0.1", port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(65_536):
                connection.sendall(data)


def ping_pong_us(rounds: int = 20_000) -> float:
    """Microseconds of one round trip between two processes with blocking sockets."""
    port = free_ports(1)
    process = Process([sys.executable, "-m", "bench.suites.floors", "raw", str(port)])
    message = b"m" * MESSAGE_BYTES
    try:
        with socket.create_connection(("127.0.0.1", port), 10.0) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began = time.perf_counter()
            for _ in range(rounds):
                client.sendall(message)
                client.recv(65_536)
            return (time.perf_counter() - began) / rounds * 1e6
    finally:
        process.stop()


def dict_us(keys: int = 200_000, seed: int = 1) -> dict[str, float]:
    """Microseconds of a set, a get, an append and an index, keys in random order and as objects of their own."""
    rng = random.Random(seed)
    numbers = rng.sample(range(keys), keys)
    first = [key_of(number) for number in numbers]
    second = [key_of(number) for number in rng.sample(numbers, keys)]
    table: dict[bytes, bytes] = {}
    found: list[Any] = []
    append = found.append

    def timed(step: Any) -> float:
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) / keys * 1e6

    def set_all() -> None:
        for key in first:
            table[key] = key

    def get_all() -> None:
        for key in second:
            table[key]

    def append_all() -> None:
        for key in second:
            append(key)

    def index_all() -> None:
        for number in numbers:
            found[number]

    steps = {"dict set": set_all, "dict get": get_all, "list append": append_all, "list index": index_all}
    return {name: timed(step) for name, step in steps.items()}


def fdatasync_ms(rounds: int = 300, directory: Path | None = None) -> tuple[float, float]:
    """p50 and p99 of appending a block and syncing it."""
    times = []
    with tempfile.NamedTemporaryFile(dir=directory, prefix="kvtcp-bench-") as file:
        block = os.urandom(SYNC_BYTES)
        for _ in range(rounds):
            began = time.perf_counter()
            os.write(file.fileno(), block)
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    times.sort()
    return quantile(times, 0.5), quantile(times, 0.99)


def beside(results: list[Result], target: str = "uvloop echo") -> list[Result]:
    """The rows, each with the median of the floor's row of the same workload and unit beside it, if there is one."""
    floors = {(row["workload"], row["unit"]): row["median"] for row in results if row["target"] == target}
    return [
        with_floor(row, target, floors[row["workload"], row["unit"]])
        if row["target"] != target and (row["workload"], row["unit"]) in floors
        else row
        for row in results
    ]


def measure(options: Options) -> list[Result]:
    """All floors but the echo, which is measured beside what it is the floor of."""
    runs = options.runs_or(5)
    rounds = options.size(20_000, 3_000)
    rows = [make_row("raw sockets", "ping-pong", "us", [ping_pong_us(rounds) for _ in range(runs)])]
    figures = [dict_us(options.size(1_000_000, 100_000), options.seed + run) for run in range(runs)]
    rows += [make_row("CPython", name, "us", [each[name] for each in figures]) for name in figures[0]]
    syncs = [fdatasync_ms(options.size(1_000, 200)) for _ in range(runs)]
    rows.append(make_row("disk", "fdatasync p50", "ms", [p50 for p50, _ in syncs]))
    rows.append(make_row("disk", "fdatasync p99", "ms", [p99 for _, p99 in syncs]))
    return rows


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        serve_echo(int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4]))
    else:
        serve_raw(int(sys.argv[2]))
