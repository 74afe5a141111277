"""Tests of the times of writes: one write is followed at a time, from its tick to the one in which it is committed."""

from __future__ import annotations

from kvtcp.coordinator.latency import SAMPLES, WriteTimes
from tests.support.replication_fakes import Cluster


class Followed:
    """Times of a cluster whose clock is set by hand."""

    def __init__(self, shards: int = 1) -> None:
        self.cluster = Cluster(shards=shards)
        self.now_s = 100.0
        self.times = WriteTimes(self.cluster.sequencer.shards, lambda: self.now_s)

    def tick(self, ms: float = 0) -> None:
        """So much later a tick ends."""
        self.now_s += ms / 1000
        self.times.look(self.cluster.sequencer.close_batches())


def test_one_write() -> None:
    """From the end of the tick in which it was queued to the end of that in which it is committed."""
    followed = Followed()
    assert followed.times.p99_ms() is None
    followed.tick()
    followed.cluster.put("w")
    followed.tick()
    followed.tick(3)
    assert followed.times.p99_ms() is None
    followed.cluster.pump()
    followed.tick(4.5)
    assert followed.times.p99_ms() == 7.5


def test_one_at_a_time() -> None:
    """Those that come meanwhile are not followed; then the newest one is."""
    followed = Followed(shards=2)
    followed.cluster.put("first")
    followed.tick()
    followed.cluster.put("second", 1)
    followed.cluster.pump("n1", "n2")
    followed.tick(10)
    followed.cluster.put("third", 1)
    followed.cluster.pump("n3")
    followed.tick(10)
    assert followed.times.p99_ms() == 20
    followed.cluster.pump()
    followed.tick(1)
    assert followed.times.p99_ms() == 20
    followed.cluster.put("fourth", 1)
    followed.tick()
    followed.cluster.pump()
    followed.tick(30)
    assert followed.times.p99_ms() == 30


def test_a_write_of_a_shard_that_is_stopped_is_no_sample() -> None:
    """It was not committed; another one is followed."""
    followed = Followed(shards=2)
    followed.cluster.put("first")
    followed.tick()
    followed.cluster.sequencer.stop_serving(0, "a test")
    followed.cluster.put("second", 1)
    followed.tick(5)
    followed.cluster.pump()
    followed.tick(2)
    assert followed.times.p99_ms() == 2


def test_ticks_without_writes() -> None:
    """Reads have no number; a batch that is written already is not looked at."""
    followed = Followed()
    followed.cluster.get("read")
    followed.tick()
    followed.cluster.pump()
    followed.times.look(list(followed.cluster.sequencer.links.values()))
    assert followed.times.p99_ms() is None


def test_the_last_samples_count() -> None:
    """The 99th percentile of the last SAMPLES of them."""
    followed = Followed()
    for n in range(SAMPLES + 50):
        followed.cluster.put(n)
        followed.tick()
        followed.cluster.pump()
        followed.tick(100 if n < 40 else 7 if n % 50 == 0 else 1)
    assert followed.times.p99_ms() == 7
