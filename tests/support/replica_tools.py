"""Replicas for tests: the fields of a HELLO, disks d1, d2, ..., and batches that are applied whole."""

from __future__ import annotations

from itertools import count
from typing import Any

from kvtcp.node.replica import Replicas
from kvtcp.protocol.link import LINK_VERSION
from kvtcp.protocol.operations import PUT


def hello(epoch: int = 1, coordinator: bytes = b"c", **changes: Any) -> dict[bytes, Any]:
    """The fields of a HELLO."""
    fields = {
        b"version": LINK_VERSION, b"epoch": epoch, b"coordinator": coordinator, b"node": b"n1", b"shards": [0, 1],
        b"map_version": 3, b"heard_version": 0,
    }  # fmt: skip
    return fields | {name.encode(): value for name, value in changes.items()}


def make(**options: Any) -> Replicas:
    """A replica that makes the disks d1, d2, ..."""
    numbers = count(1)
    return Replicas("n1", 42, lambda: f"d{next(numbers)}", **options)


def batch(node: Replicas, stamp_ms: int, *items: Any, commit: int = -1) -> list[Any]:
    """Apply a batch whole; its results."""
    results: list[Any] = []
    node.begin(stamp_ms, commit, items)
    assert node.run(results)
    node.check()
    return results


def put(shard: int, seq: int, value: bytes = b"v") -> tuple[Any, ...]:
    """An item."""
    return (PUT, shard, seq, 0, b"k%d" % seq, value)
