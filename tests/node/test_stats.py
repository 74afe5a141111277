"""The figures of a node: what they say, and that they come once a second."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from kvtcp.constants import MIB
from kvtcp.node import stats
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import STATS
from tests.processes.raw_client import BOTH_LOOPS, event_loop_policy, until
from tests.support.learning_tools import Link
from tests.support.storage_tools import new_disk, open_small

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


async def test_figures_on_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations, keys, log, syncs and memory; how late the loop was is of the last interval only."""
    monkeypatch.setattr(stats, "STATS_MS", 100)
    node = NodeServer("n1", store=open_small(new_disk(), segment_bytes=10**6))
    await node.start("127.0.0.1", 0)
    link = await Link.open(node)
    link.batch(*link.puts(0, 20, keys=5))
    await link.settled()
    until_s = time.monotonic() + 0.15
    while time.monotonic() < until_s:
        pass  # the loop is late
    frames = [await link.frame(STATS) for _ in range(4)]
    lags_ms = [frame[1][b"lag_ms"] for frame in frames]
    assert max(lags_ms) >= 100 > lags_ms[-1]
    last = frames[-1][1]
    assert (last[b"operations"], last[b"keys"]) == (20, 5)
    assert last[b"log_bytes"] > 500 and sum(frame[1][b"syncs"] for frame in frames) >= 1
    assert max(frame[1][b"sync_p99_ms"] for frame in frames) > 0 and 10 * MIB < last[b"memory_bytes"] < 10**12
    assert type(last[b"sync_p99_ms"]) is type(last[b"lag_ms"]) is float
    await node.close()
    timer = node._stats._timer
    assert timer is None


async def test_without_a_disk_and_without_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is logged, and nobody has to listen."""
    monkeypatch.setattr(stats, "STATS_MS", 1)
    monkeypatch.setattr(stats, "LAG_LOOK_MS", 1)
    node = NodeServer("n1")
    await node.start("127.0.0.1", 0)
    told = node._stats._told_s
    await until(lambda: node._stats._told_s > told + 0.01, "some tellings")
    node.pulls.bytes_total += 3000
    figures = node._stats.take(2.0)
    assert figures["learn_rate_bytes_s"] == 1500.0 and node._stats.take(2.0)["learn_rate_bytes_s"] == 0
    assert figures["log_bytes"] == figures["syncs"] == figures["sync_p99_ms"] == figures["keys"] == 0
    await node.close()
    await asyncio.sleep(0)


def test_memory_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system has no such file, the largest size so far is told."""
    here = stats.memory_bytes()
    monkeypatch.setattr(stats, "STATM", tmp_path / "none")
    assert here / 2 < stats.memory_bytes() < here * 10
