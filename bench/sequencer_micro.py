"""What the sequencer costs per operation, alone: fake links that answer at once, no sockets, no tables.

Run: python -m bench.sequencer_micro [seconds per cell]. Prints microseconds per put and per get for replication factors
1 and 3 and batches of 64 and 1000: the best of several rounds, because the rest is the machine's noise.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.protocol.link import CopyReport
from kvtcp.protocol.operations import GET, PUT, WRITE_OP_END
from kvtcp.replication.sequencing.sequencer import Sequencer

SHARDS = 64
NODES = 3


class CountingSink:
    """Counts answers."""

    def __init__(self) -> None:
        self.answers = 0

    def reply(self, token: Any, result: Any) -> None:
        self.answers += 1

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        raise AssertionError(message)


def make_sequencer(factor: int) -> Sequencer:
    """A sequencer with all links up and every shard at 0."""
    nodes = {f"n{n + 1}": ("127.0.0.1", 0) for n in range(NODES)}
    cluster_map = ClusterMap.found(
        cluster="c", owner="o", shards=SHARDS, factor=factor, min_insync=factor, durability="memory", nodes=nodes,
        stamp_bound_ms=10**15,
    )  # fmt: skip
    sequencer = Sequencer(cluster_map)
    sequencer.begin(1_000, 1_000)
    for number in range(SHARDS):
        sequencer.shards[number].serve(0, 0)
    for node in nodes:
        copies = {number: CopyReport("") for number in cluster_map.shards_of(node)}
        assert sequencer.link_up(node, copies) == {}
    return sequencer


def pump(sequencer: Sequencer) -> float:
    """Write every batch and answer it; returns the seconds spent in making the fake answers."""
    frames = []
    for link in sequencer.close_batches():
        while (batch := link.next_outgoing(sequencer.now_ms)) is not None:
            frames.append((link, batch))
    began = time.perf_counter()
    replies = []
    for link, batch in frames:
        results = [[b"v", 1, None] if item[0] >= WRITE_OP_END else 1 for item in batch.items
                   if item[0] >= WRITE_OP_END or item[3]]
        replies.append((link.node, batch.last_ordinal, results))
    faked = time.perf_counter() - began
    for node, ordinal, results in replies:
        sequencer.on_results(node, ordinal, ordinal, results, ())
    return faked


def measure(factor: int, batch: int, kind: str, seconds: float) -> float:
    """Microseconds per operation, best round."""
    sequencer = make_sequencer(factor)
    shards = sequencer.shards
    sink = CountingSink()
    keys = [b"key-%06d" % n for n in range(batch)]
    numbers = [n % SHARDS for n in range(batch)]
    value = (b"v" * 128,)
    for number in range(SHARDS):  # so that a read of revision 1 shows committed state
        sequencer.shards[number].write(PUT, b"k", value, 129, sink, 0)
    pump(sequencer)
    best = float("inf")
    clock = 1_000
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        clock += 1
        sink.answers = 0
        began = time.perf_counter()
        sequencer.begin(clock, clock)
        if kind == "put":
            for key, number in zip(keys, numbers, strict=True):
                shards[number].write(PUT, key, value, 138, sink, 7)
        else:
            for key, number in zip(keys, numbers, strict=True):
                shards[number].read(GET, key, sink, 7)
        faked = pump(sequencer)
        best = min(best, (time.perf_counter() - began - faked) / batch * 1e6)
        assert sink.answers == batch
    return best


def main() -> None:
    """Print the table."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.7
    for factor in (1, 3):
        for batch in (64, 1000):
            put, get = (measure(factor, batch, kind, seconds) for kind in ("put", "get"))
            print(f"RF {factor}  batch {batch:5}  put {put:6.3f} us  get {get:6.3f} us")


if __name__ == "__main__":
    main()
