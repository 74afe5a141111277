"""Tests of placement: balance for all small sizes, and of random keys over the nodes."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from kvtcp.protocol.hashing import shard_of
from kvtcp.replication.placement import balanced_placement


def test_small_sizes() -> None:
    """For all small sizes: different members, loads that differ by at most one, and so do the first places."""
    for shards, count in itertools.product(range(1, 14), range(1, 7)):
        nodes = [f"n{n}" for n in range(count)]
        for factor in range(1, count + 1):
            placement = balanced_placement(shards, nodes, factor)
            assert len(placement) == shards
            assert all(len(members) == len(set(members)) == factor for members in placement)
            loads = Counter(node for members in placement for node in members)
            assert max(loads.values()) - min(loads[node] for node in nodes) <= 1, (shards, count, factor)
            firsts = Counter(members[0] for members in placement)
            assert max(firsts.values()) - min(firsts[node] for node in nodes) <= 1, (shards, count, factor)


def test_default_sizes_are_balanced_in_first_places() -> None:
    """64 shards on up to 16 nodes: no node answers for more than one shard more than another."""
    for count in range(1, 17):
        nodes = [f"n{n}" for n in range(count)]
        for factor in range(1, min(count, 5) + 1):
            firsts = Counter(members[0] for members in balanced_placement(64, nodes, factor))
            assert max(firsts.values()) - min(firsts[node] for node in nodes) <= 1, (count, factor)


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("factor", [1, 2])
def test_random_keys_are_balanced(count: int, factor: int) -> None:
    """100,000 random keys in 64 shards: the fullest node has at most 1.15 times the keys of the emptiest."""
    rng = random.Random(7)
    placement = balanced_placement(64, [f"n{n}" for n in range(count)], factor)
    per_shard = Counter(shard_of(rng.randbytes(12), 64) for _ in range(100_000))
    keys: Counter[str] = Counter()
    for number, members in enumerate(placement):
        for node in members:
            keys[node] += per_shard[number]
    assert len(keys) == count
    assert max(keys.values()) <= 1.15 * min(keys.values()), keys


@pytest.mark.parametrize("factor", [0, 4])
def test_factor_that_does_not_fit(factor: int) -> None:
    """More copies than nodes, or none, is an error that names both numbers."""
    with pytest.raises(ValueError, match=f"factor of {factor} needs at least {factor} nodes, there are 3"):
        balanced_placement(8, ["a", "b", "c"], factor)
