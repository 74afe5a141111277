"""Load with requests and replies of fixed length, over plain sockets: for servers that speak no RESP.

Each of the connections sends a batch of `depth` requests that were made beforehand, waits until as many bytes as their
replies have came back, and sends the next one. Nothing is parsed, so one Python process is enough for any server here;
the bytes of the first batch on each connection are compared with what they must be, those of the others only counted.
For memcached, and for redis beside it, since figures of different generators must not be compared.
"""

from __future__ import annotations

import random
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.load.resp import encode_command
from bench.measure import Sample, quantile, usage_s

CONNECTIONS = 50
BATCHES = 64  # different ones, sent in turn
LIMIT_S = 60.0


@dataclass(frozen=True)
class Dialect:
    """How a server is asked."""

    put: Callable[[bytes, bytes], bytes]
    stored: bytes
    get: Callable[[Sequence[bytes]], bytes]
    found: Callable[[Sequence[bytes], bytes], bytes]


def _values(keys: Sequence[bytes], value: bytes) -> bytes:
    return b"".join(b"VALUE %s 0 %d\r\n%s\r\n" % (key, len(value), value) for key in keys) + b"END\r\n"


MEMCACHED = Dialect(
    lambda key, value: b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value), b"STORED\r\n",
    # one request for all keys of a batch, which is what it is good at: it answers single ones one by one
    lambda keys: b"get %s\r\n" % b" ".join(keys), _values,
)  # fmt: skip
REDIS = Dialect(
    lambda key, value: encode_command((b"SET", key, value)), b"+OK\r\n",
    lambda keys: b"".join(encode_command((b"GET", key)) for key in keys),
    lambda keys, value: b"$%d\r\n%s\r\n" % (len(value), value) * len(keys),
)  # fmt: skip


class _Connection:
    """One socket with a batch under way."""

    def __init__(self, port: int, batches: Sequence[tuple[bytes, bytes]], first: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._batches = batches
        self._next = first
        self._expected = b""
        self._left = 0
        self._received = bytearray()
        self._is_first = True
        self.sent_at = 0.0

    def send(self) -> None:
        """The next batch."""
        request, self._expected = self._batches[self._next % len(self._batches)]
        self._next += 1
        self._left = len(self._expected)
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Read once; whether the batch is answered."""
        data = self.socket.recv(262_144)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._left -= len(data)
        if self._is_first:
            self._received += data
        if self._left > 0:
            return False
        if self._left < 0:
            raise AssertionError("the server answered more than was asked")
        if self._is_first and bytes(self._received) != self._expected:
            raise AssertionError(f"the server answered {bytes(self._received[:200])!r} instead of what was asked")
        self._is_first = False
        return True


def run_batches(
    port: int, batches: Sequence[tuple[bytes, bytes]], rounds: int, connections: int = CONNECTIONS
) -> tuple[float, list[float]]:
    """Send `rounds` batches in all; seconds, and the milliseconds of each."""
    selector = selectors.DefaultSelector()
    all_connections = [_Connection(port, batches, number) for number in range(min(connections, rounds))]
    latencies: list[float] = []
    try:
        for each in all_connections:
            selector.register(each.socket, selectors.EVENT_READ, each)
        began = time.perf_counter()
        for each in all_connections:
            each.send()
        sent = len(all_connections)
        while len(latencies) < rounds:
            events = selector.select(LIMIT_S)
            if not events:
                raise TimeoutError(f"nothing was answered for {LIMIT_S:.0f} s")
            for key, _ in events:
                each = key.data
                if each.receive():
                    latencies.append((time.perf_counter() - each.sent_at) * 1000)
                    if sent < rounds:
                        each.send()
                        sent += 1
        return time.perf_counter() - began, latencies
    finally:
        for each in all_connections:
            each.socket.close()
        selector.close()


class RawWorkload:
    """A test with this generator on one server; see `bench.measure.Workload`."""

    unit = "ops/s"

    def __init__(
        self, target: str, port: int, roles: Callable[[], Mapping[str, Sequence[int]]], dialect: Dialect, test: str,
        depth: int, requests: int, durability: str, value_bytes: int = 64, keys: int = 100_000,
    ) -> None:  # fmt: skip
        self.target, self.workload = target, f"{test.upper()} depth {depth}, raw generator"
        self.more: dict[str, Any] = {"durability": durability, "generator": "raw", "depth": depth}
        self._port, self._roles, self._dialect, self._test = port, roles, dialect, test
        self._depth, self._rounds, self._keys = depth, requests // depth, keys
        self._value = b"v" * value_bytes

    def _batch(self, numbers: Sequence[int], test: str) -> tuple[bytes, bytes]:
        dialect, value = self._dialect, self._value
        keys = [b"raw:%012d" % number for number in numbers]  # its own: others write other values
        if test == "set":
            return b"".join(dialect.put(key, value) for key in keys), dialect.stored * len(keys)
        return dialect.get(keys), dialect.found(keys, value)

    def prepare(self) -> None:
        """Every key is there."""
        batches = [
            self._batch(range(first, min(first + 100, self._keys)), "set") for first in range(0, self._keys, 100)
        ]
        run_batches(self._port, batches, len(batches), 1)

    def generate(self, run: int) -> list[tuple[bytes, bytes]]:
        """Batches of random keys with their replies."""
        rng = random.Random(f"{self.workload}/{run}")
        batches = [[rng.randrange(self._keys) for _ in range(self._depth)] for _ in range(BATCHES)]
        return [self._batch(numbers, self._test) for numbers in batches]

    def execute(self, plan: list[tuple[bytes, bytes]]) -> Sample:
        """The run."""
        before = usage_s(self._roles())
        took_s, latencies = run_batches(self._port, plan, self._rounds)
        after = usage_s(self._roles())
        count = self._rounds * self._depth
        latencies.sort()
        figures = {"p50_ms": quantile(latencies, 0.5), "p99_ms": quantile(latencies, 0.99), "max_ms": latencies[-1]}
        return Sample(count / took_s, {role: (after[role] - before[role]) / count * 1e6 for role in before}, figures)

    def verify(self, plan: list[tuple[bytes, bytes]]) -> None:
        """The keys of the first batch are there."""
        numbers = list(range(min(100, self._keys)))
        run_batches(self._port, [self._batch(numbers, "get")], 1, 1)
