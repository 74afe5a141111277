"""The generator of systems that speak RESP: `redis-benchmark`, with the same options for all of them.

`redis_benchmark` runs one test and returns what it printed; `RespClient` is a small blocking client for filling and
checking; `speaks_resp` asks a port. `RespWorkload` is a test on one server with its checks: before each run some keys
get a marker; afterwards a SET test must have overwritten as many of them as that many random keys do, a GET test none,
and every sampled key has a value of the right length. So a server that answers without doing cannot pass.

redis-benchmark waits for ever for a server that is not there, so each run has a limit.
"""

from __future__ import annotations

import csv
import io
import math
import random
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.measure import Sample, children_cpu_s, usage_s

CONNECTIONS = 50
KEYS = 100_000
VALUE_BYTES = 64
LIMIT_S = 120.0
MARKER = b"marker"
MARKED = 200
BENCHMARK = "redis-benchmark"
Roles = Callable[[], Mapping[str, Sequence[int]]]


class RespError(Exception):
    """The server answered with an error, or not in RESP."""


class RespClient:
    """One blocking connection."""

    def __init__(self, port: int, timeout_s: float = 60.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> RespClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._socket.close()

    def pipeline(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        """Send all, then read all answers. Raises RespError for the first that is an error."""
        self._socket.sendall(b"".join(encode_command(command) for command in commands))
        return [self._answer() for _ in commands]

    def command(self, *arguments: bytes) -> Any:
        """Send one and return its answer."""
        return self.pipeline([arguments])[0]

    def _answer(self) -> Any:
        line = self._reader.readline()
        kind, rest = line[:1], line[1:].rstrip(b"\r\n")
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else self._reader.read(length + 2)[:-2]
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]
        raise RespError(line.decode("ascii", "backslashreplace").strip() or "the connection was closed")


def encode_command(arguments: Sequence[bytes]) -> bytes:
    """A request."""
    parts = [b"*%d\r\n" % len(arguments)]
    parts += [b"$%d\r\n%s\r\n" % (len(argument), argument) for argument in arguments]
    return b"".join(parts)


def speaks_resp(port: int) -> bool:
    """Whether the server at this port answers a RESP request as RESP."""
    try:
        with RespClient(port, 5.0) as client:
            return client.command(b"GET", b"bench:probe") is None
    except (OSError, RespError, ValueError):
        return False


def benchmark_command(port: int, test: str, depth: int, requests: int, value_bytes: int, keys: int) -> list[str]:
    """The same for every system."""
    return [
        BENCHMARK, "-h", "127.0.0.1", "-p", str(port), "-c", str(CONNECTIONS), "-d", str(value_bytes), "-r", str(keys),
        "-P", str(depth), "-n", str(requests), "-t", test, "--csv",
    ]  # fmt: skip


def parse_csv(text: str) -> dict[str, float]:
    """rate (a second) and latencies in ms, of the only test. Raises RespError for anything else."""
    if "Error" in text:
        raise RespError(text.strip())
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(rows) != 1:
        raise RespError(f"redis-benchmark printed no figures: {text.strip()!r}")
    row = rows[0]
    return {
        "rate": float(row["rps"]), "p50_ms": float(row["p50_latency_ms"]), "p99_ms": float(row["p99_latency_ms"]),
        "max_ms": float(row["max_latency_ms"]),
    }  # fmt: skip


def redis_benchmark(
    port: int, test: str, depth: int, requests: int, value_bytes: int = VALUE_BYTES, keys: int = KEYS
) -> dict[str, float]:
    """Run one test (`set` or `get`). Raises RespError if an answer was an error, TimeoutExpired after LIMIT_S."""
    command = benchmark_command(port, test, depth, requests, value_bytes, keys)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode != 0:
        raise RespError(f"redis-benchmark ended with {done.returncode}: {(done.stdout + done.stderr).strip()}")
    return parse_csv(done.stdout)


def key_of(number: int) -> bytes:
    """As redis-benchmark makes them."""
    return b"key:%012d" % number


def fill(port: int, keys: int = KEYS, value_bytes: int = VALUE_BYTES) -> None:
    """Put keys 0 to `keys` - 1."""
    value = b"x" * value_bytes
    with RespClient(port) as client:
        for first in range(0, keys, 1_000):
            numbers = range(first, min(first + 1_000, keys))
            answers = client.pipeline([(b"SET", key_of(number), value) for number in numbers])
            if any(answer != b"OK" for answer in answers):
                raise AssertionError(f"keys {first} and those behind it could not be set")


class RespWorkload:
    """A test of redis-benchmark on one server; see `bench.measure.Workload`."""

    unit = "ops/s"

    def __init__(
        self, target: str, port: int, roles: Roles, test: str, depth: int, requests: int, durability: str,
        value_bytes: int = VALUE_BYTES, keys: int = KEYS, name: str | None = None,
    ) -> None:  # fmt: skip
        self.target = target
        self.workload = name or f"{test.upper()} depth {depth}"
        self.more: dict[str, Any] = {
            "durability": durability, "generator": BENCHMARK, "depth": depth, "value_bytes": value_bytes,
        }  # fmt: skip
        self._port, self._roles, self._test, self._depth, self._requests = port, roles, test, depth, requests
        self._value_bytes, self._keys = value_bytes, keys

    def prepare(self) -> None:
        """Every key is there, so that every get finds something."""
        fill(self._port, self._keys, self._value_bytes)

    def generate(self, run: int) -> list[int]:
        """Keys that get a marker."""
        marked = random.Random(f"{self.workload}/{run}").sample(range(self._keys), min(MARKED, self._keys))
        with RespClient(self._port) as client:
            client.pipeline([(b"SET", key_of(number), self._marker()) for number in marked])
        return marked

    def execute(self, plan: list[int]) -> Sample:
        """The run; CPU time by role."""
        before, client_before = usage_s(self._roles()), children_cpu_s()
        found = redis_benchmark(self._port, self._test, self._depth, self._requests, self._value_bytes, self._keys)
        after, client_after = usage_s(self._roles()), children_cpu_s()
        cpu_us = {role: (after[role] - before[role]) / self._requests * 1e6 for role in before}
        cpu_us["client"] = (client_after - client_before) / self._requests * 1e6
        return Sample(found.pop("rate"), cpu_us, found)

    def verify(self, plan: list[int]) -> None:
        """See the module's text."""
        with RespClient(self._port) as client:
            values = client.pipeline([(b"GET", key_of(number)) for number in plan])
        check_markers(self._test, values, self._marker(), self._value_bytes, self._requests, self._keys)

    def _marker(self) -> bytes:
        return MARKER.ljust(self._value_bytes, b"-")


def check_markers(
    test: str, values: Sequence[bytes | None], marker: bytes, value_bytes: int, requests: int, keys: int
) -> None:
    """Raise AssertionError unless a SET test overwrote about as many marked keys as it should, a GET test none."""
    for value in values:
        if value is None or len(value) != value_bytes:
            raise AssertionError(f"a key has {value!r} instead of {value_bytes} bytes")
    overwritten = sum(value != marker for value in values)
    expected = len(values) * -math.expm1(-requests / keys) if test == "set" else 0.0
    # five standard deviations of the number of keys that random writes meet
    allowance = 5 * math.sqrt(len(values) * 0.25) if test == "set" else 0.0
    if abs(overwritten - expected) > allowance:
        raise AssertionError(f"{test}: {overwritten} of {len(values)} marked keys were overwritten, not {expected:.0f}")
