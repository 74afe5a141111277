"""Fuzzer of running servers: `python -m tests.fuzz.resp_sockets [inputs] [seed]`, 20,000 connections by default.

Each connection sends random streams of the Redis protocol (resp.py) in pieces; some are half-closed and read to
the end, some are cut off, some are just closed. Meanwhile a healthy client writes and reads, and at the end the
coordinator is up, holds nothing, and held little all the time.
"""

import asyncio
import contextlib
import logging
import random
import sys
import time

from kvtcp.constants import MIB
from kvtcp.testing.local_cluster import LocalCluster
from tests.fuzz.resp import random_input
from tests.processes.raw_client import Wire, healthy, until

HELD_BYTES_MAX = 64 * MIB
AT_ONCE = 50


async def _connection(cluster: LocalCluster, number: int, rng: random.Random) -> int:
    """One connection; returns what the coordinator held meanwhile."""
    data = b"".join(random_input(rng) for _ in range(rng.randrange(1, 20)))
    piece_bytes = rng.randrange(1, len(data) + 1) if data else 1
    most = 0
    async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
        for low in range(0, len(data), max(piece_bytes, len(data) // 20)):
            if wire.writer.is_closing():  # it was refused
                break
            wire.write(data[low : low + max(piece_bytes, len(data) // 20)])
            most = max(most, cluster.coordinator.clients.held_bytes)
            await asyncio.sleep(0)
        if number % 3 == 0 and not wire.writer.is_closing():
            with contextlib.suppress(OSError):  # the server was faster
                wire.writer.write_eof()
            await wire.closed()
        elif number % 3 == 1:
            wire.writer.transport.abort()
    return most


async def attack(cluster: LocalCluster, inputs: int, seed: int) -> int:
    """So many connections; returns the most that the coordinator held. Raises AssertionError naming the seed."""
    rng = random.Random(seed)
    most = 0
    async with healthy(cluster):
        for start in range(0, inputs, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, inputs))
            most = max(most, *await asyncio.gather(*(_connection(cluster, number, rng) for number in numbers)))
    coordinator = cluster.coordinator
    await until(lambda: not coordinator.clients.sessions, f"seed {seed}: the end of all sessions")
    assert most < HELD_BYTES_MAX, f"seed {seed}: {most} bytes were held"
    assert coordinator.clients.held_bytes == 0 and not coordinator.failed.done(), f"seed {seed}"
    coordinator.sequencer.check()
    assert coordinator.clients.protocol_errors > inputs // 20, f"seed {seed}: some streams are none"
    return most


async def run(inputs: int, seed: int) -> int:
    """A cluster, and all the inputs."""
    async with LocalCluster(2, shards=8) as cluster:
        return await attack(cluster, inputs, seed)


def main() -> None:
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    print(f"{inputs} connections, seed {seed}")
    logging.disable(logging.WARNING)  # each stream that is none is one
    began = time.monotonic()
    most = asyncio.run(run(inputs, seed))
    print(f"the server is up and held at most {most} bytes, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
