"""Tests of placement: balance for all small sizes, and of random keys over the nodes; changes with the fewest moves."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtcp.cluster.placement import Rows, balanced_placement, plan
from kvtcp.protocol.hashing import shard_of


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


Choice = tuple[str, ...]


def cheapest(
    choices: Sequence[Sequence[Choice]], cost: Callable[[int, Choice], int], nodes: Sequence[str]
) -> tuple[int, int]:
    """The least (copies too many or too few, cost) of all tables with one of the choices in each row, found by going
    through all loads that the first rows can give."""
    best: dict[tuple[int, ...], int] = {(0,) * len(nodes): 0}
    for n, row in enumerate(choices):
        following: dict[tuple[int, ...], int] = {}
        for loads, spent in best.items():
            for choice in row:
                new = tuple(load + (node in choice) for node, load in zip(nodes, loads, strict=True))
                total = spent + cost(n, choice)
                if total < following.get(new, total + 1):
                    following[new] = total
        best = following
    return min((excess(loads), spent) for loads, spent in best.items())


def excess(loads: Sequence[int]) -> int:
    """How many copies are too many or too few."""
    low, rest = divmod(sum(loads), len(loads))
    return sum(max(0, low - load, load - low - bool(rest)) for load in loads)


def check_plan(wanted: Rows, nodes: Sequence[str], factor: int) -> tuple[Rows, int]:
    """A plan, and how many copies it makes; that it is right in all, and that no table is better."""
    new = plan(wanted, nodes, factor)
    width = min(factor, len(nodes))
    assert len(new) == len(wanted)
    assert all(len(row) == len(set(row)) == width and set(row) <= set(nodes) for row in new)
    loads = Counter(node for row in new for node in row)
    assert excess([loads[node] for node in nodes]) == 0
    moves = sum(len(set(row) - set(old)) for row, old in zip(new, wanted, strict=True))
    subsets = list(itertools.combinations(nodes, width))
    assert (0, moves) == cheapest([subsets] * len(new), lambda n, row: len(set(row) - set(wanted[n])), nodes)
    firsts = Counter(row[0] for row in new)
    changed = sum(row[:1] != old[:1] for row, old in zip(new, wanted, strict=True))
    found = (excess([firsts[node] for node in nodes]), changed)
    singles = [[(node,) for node in row] for row in new]
    assert found == cheapest(singles, lambda n, row: row[0] != (wanted[n] or [""])[0], nodes)
    for row, old in zip(new, wanted, strict=True):
        stayed = [node for node in old if node in row]
        assert set(row) != set(old) or row[0] != old[0] or row == old, "what need not change is as it was"
        assert [node for node in row[1:] if node in stayed] == [node for node in stayed if node != row[0]]
    assert plan(wanted, nodes, factor) == new, "the same again"
    assert plan(new, nodes, factor) == new, "there is nothing more to do"
    return new, moves


def test_plans_for_small_sizes() -> None:
    """For all small sizes, from the placement of a new cluster: a node more, two more, each one less, another one
    instead, fewer nodes than the factor; balance with the fewest moves, and first places as well."""
    for shards, count in itertools.product(range(1, 9), range(1, 5)):
        nodes = [f"n{n}" for n in range(count)]
        for factor in range(1, count + 1):
            old = balanced_placement(shards, nodes, factor)
            assert plan(old, nodes, factor) == old
            others = [[*nodes, "x"], ["x", *nodes]]
            others += [[node for node in nodes if node != gone] for gone in nodes if count > 1]
            others += [["x" if node == gone else node for node in nodes] for gone in nodes]
            others += [[*nodes, "x", "y"]] if count < 4 else []
            for changed in others:
                new, _ = check_plan(old, changed, factor)
                check_plan(new, nodes, factor)


SMALL_ROWS = st.lists(st.lists(st.sampled_from("abcde"), unique=True, max_size=5), min_size=1, max_size=7)


@settings(max_examples=400, deadline=None)
@given(SMALL_ROWS, st.lists(st.sampled_from("abcdx"), unique=True, min_size=1), st.integers(1, 4))
def test_plans_from_any_rows(wanted: Rows, nodes: list[str], factor: int) -> None:
    """From any rows, of any lengths, with nodes that are gone: the same."""
    check_plan(wanted, nodes, factor)


def can_be_bettered(new: Rows, wanted: Rows, nodes: Sequence[str]) -> bool:
    """Whether copies can go around some nodes, or from one that has one more than others, so that fewer are moved.

    Floyd and Warshall, over every single copy and every node it could go to.
    """
    loads = Counter(node for row in new for node in row)
    low = min(loads[node] for node in nodes)
    never = len(nodes) + 1
    costs = {(a, b): never for a in (*nodes, "") for b in (*nodes, "")}
    for node in nodes:
        if loads[node] > low:
            costs["", node] = 0  # it may have one less
        if loads[node] == low and max(loads.values()) > low:
            costs[node, ""] = 0  # it may have one more
    for row, old in zip(new, wanted, strict=True):
        for a, b in itertools.product(row, set(nodes) - set(row)):
            costs[a, b] = min(costs[a, b], (b not in old) - (a not in old))
    for middle, a, b in itertools.product((*nodes, ""), repeat=3):
        if costs[a, middle] < never and costs[middle, b] < never:
            costs[a, b] = min(costs[a, b], costs[a, middle] + costs[middle, b])
    return any(costs[node, node] < 0 for node in (*nodes, ""))


@pytest.mark.parametrize("seed", range(60))
def test_larger_plans(seed: int) -> None:
    """Random rows of up to 60 shards on up to 9 nodes, with nodes that come and go: nothing betters a plan."""
    rng = random.Random(seed)
    known = [f"n{n}" for n in range(rng.randint(2, 9))]
    rows = [rng.sample(known, rng.randint(0, min(4, len(known)))) for _ in range(rng.randint(10, 60))]
    assert can_be_bettered([["a"], ["b"]], [["b"], ["a"]], ["a", "b"]) and not can_be_bettered(rows, rows, known)
    for _ in range(3):
        nodes = rng.sample(known, rng.randint(1, len(known)))
        new = plan(rows, nodes, rng.randint(1, 4))
        loads = Counter(node for row in new for node in row)
        assert excess([loads[node] for node in nodes]) == 0
        assert not can_be_bettered(new, rows, nodes)
        rows = new


def test_a_node_more_and_a_node_less() -> None:
    """64 shards on 10 nodes: a new node takes its share, nobody else anything; one that leaves gives its own only."""
    nodes = [f"n{n}" for n in range(1, 11)]
    old = balanced_placement(64, nodes, 3)
    more = plan(old, [*nodes, "n11"], 3)
    given_rows = [set(row) - set(was) for row, was in zip(more, old, strict=True)]
    assert given_rows.count({"n11"}) == 64 * 3 // 11 and given_rows.count(set()) == 64 - 64 * 3 // 11
    less = plan(old, nodes[1:], 3)
    for row, was in zip(less, old, strict=True):
        assert len(set(row) - set(was)) == ("n1" in was)
    for rows in (more, less):
        firsts = Counter(row[0] for row in rows)
        assert max(firsts.values()) - min(firsts.values()) <= 1


def test_plans_one_after_the_other() -> None:
    """A cluster that grows from 3 nodes to 9 and back, 64 shards: balanced after every step."""
    nodes = [f"n{n}" for n in range(1, 10)]
    rows = balanced_placement(64, nodes[:3], 3)
    for count in (*range(4, 10), *range(8, 1, -1)):
        rows = plan(rows, nodes[:count], 3)
        for width in (1, 3):
            loads = Counter(node for row in rows for node in row[:width])
            assert len(loads) == count and max(loads.values()) - min(loads.values()) <= 1, (count, width)


@pytest.mark.parametrize(("nodes", "factor"), [([], 1), (["a"], 0), (["a", "a"], 1)])
def test_plans_that_cannot_be(nodes: list[str], factor: int) -> None:
    """Without a node or a copy, or with a node named twice, there is none."""
    with pytest.raises(ValueError, match=f"{factor} copies cannot be placed on the nodes"):
        plan([["a"]], nodes, factor)
