"""BTree against a sorted list, with nodes so small that every split, merge and share happens in a few steps."""

import random
from bisect import bisect_left

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtcp.storage.shard.btree import TAIL_SEARCH_MAX, BTree, Inner, Leaf

KEYS = st.binary(min_size=1, max_size=2)
BOUNDS = st.none() | KEYS


class BTreeMachine(RuleBasedStateMachine):
    """Random operations on a tree and on a set, `check()` after each."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = BTree(4, 4)
        self.model: set[bytes] = set()

    @initialize(leaf=st.integers(4, 6), children=st.integers(4, 6), keys=st.sets(KEYS, max_size=60))
    def start(self, leaf: int, children: int, keys: set[bytes]) -> None:
        self.tree = BTree.from_sorted(sorted(keys), leaf, children)
        self.model = set(keys)

    @rule(key=KEYS)
    def insert_or_delete(self, key: bytes) -> None:
        if key in self.model:
            self.tree.delete(key)
        else:
            self.tree.insert(key)
        self.model ^= {key}

    @rule(keys=st.sets(KEYS, max_size=30))
    def insert_batch(self, keys: set[bytes]) -> None:
        self.tree.insert_sorted_batch(sorted(keys - self.model))
        self.model |= keys

    @rule(data=st.data(), share=st.integers(1, 4))
    def delete_many(self, data: st.DataObject, share: int) -> None:
        """Delete a share of the keys, from one end, the other, or spread."""
        keys = sorted(self.model)
        keys = data.draw(st.sampled_from([keys, keys[::-1], keys[::2] + keys[1::2]]))
        for key in keys[: len(keys) // share]:
            self.tree.delete(key)
            self.model.discard(key)

    @rule(data=st.data(), share=st.integers(1, 4), run=st.integers(1, 9))
    def delete_batch(self, data: st.DataObject, share: int, run: int) -> None:
        """Delete runs of neighbours in one batch; one absent key among them is an error."""
        keys = sorted(self.model)
        gone = [key for place, key in enumerate(keys) if place // run % share == 0]
        self.tree.delete_sorted_batch(gone)
        self.model.difference_update(gone)
        for absent in gone[:1]:
            with pytest.raises(KeyError):
                self.tree.delete_sorted_batch([absent])

    @rule(key=KEYS)
    def delete_absent(self, key: bytes) -> None:
        if key not in self.model:
            with pytest.raises(KeyError):
                self.tree.delete(key)

    @rule(lower=st.just(b"") | KEYS, upper=BOUNDS, limit=st.none() | st.integers(-1, 12), reverse=st.booleans())
    def read(self, lower: bytes, upper: bytes | None, limit: int | None, reverse: bool) -> None:
        expected = sorted(k for k in self.model if k >= lower and (upper is None or k < upper))
        assert self.tree.count(lower, upper) == len(expected)
        assert self.tree.rank(lower) == bisect_left(sorted(self.model), lower)
        if reverse:
            expected.reverse()
        assert list(self.tree.range(lower, upper, reverse)) == expected
        assert self.tree.slice(lower, upper, limit, reverse) == expected[: limit if limit is None else max(0, limit)]

    @rule(place=st.integers(0, 60))
    def at(self, place: int) -> None:
        if place < len(self.model):
            assert self.tree.at(place) == sorted(self.model)[place]
            return
        for beyond in (place, len(self.model)):
            with pytest.raises(IndexError):
                self.tree.at(beyond)

    @rule()
    def settle(self) -> None:
        self.tree.settle()
        for leaf in [self.tree._leaf_for(key) for key in self.model]:
            assert leaf.settled == len(leaf.keys)

    @rule(key=KEYS)
    def look_up(self, key: bytes) -> None:
        assert (key in self.tree) == (key in self.model)
        assert self.tree.first() == min(self.model, default=None)

    @invariant()
    def holds(self) -> None:
        self.tree.check()
        assert len(self.tree) == len(self.model)


TestBTreeMachine = BTreeMachine.TestCase
TestBTreeMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_tail_of_a_leaf_is_searched_or_sorted_in_before_a_delete() -> None:
    """A delete finds a key in the settled prefix, in a short tail and behind a long tail."""
    tree = BTree(512)
    keys = [b"%04d" % n for n in range(400)]
    tree.insert_sorted_batch(keys[:10])
    assert tree.slice(limit=1) == [keys[0]]
    tree.insert(keys[300])
    tree.insert(keys[200])
    tree.delete(keys[300])
    tree.delete(keys[5])
    tree.check()
    for key in reversed(keys[250 : 250 + TAIL_SEARCH_MAX + 5]):
        tree.insert(key)
    tree.delete(keys[255])
    tree.check()
    assert list(tree) == [*keys[:5], *keys[6:10], keys[200], *keys[250:255], *keys[256 : 250 + TAIL_SEARCH_MAX + 5]]


def test_default_sizes_hold_many_keys_in_order() -> None:
    """With the product's node sizes: 40,000 random keys, half of them deleted, stay in order and are counted right."""
    rng = random.Random(5)
    keys = [b"%08x" % rng.getrandbits(32) for _ in range(40_000)]
    keys = list(dict.fromkeys(keys))
    tree = BTree()
    for start in range(0, len(keys), 1000):
        tree.insert_sorted_batch(sorted(keys[start : start + 1000]))
    tree.check()
    for key in keys[::2]:
        tree.delete(key)
    tree.check()
    left = sorted(keys[1::2])
    assert list(tree.range(reverse=True)) == left[::-1]
    assert tree.count(left[100], left[15_000]) == 14_900


def test_iteration_goes_on_while_the_tree_changes() -> None:
    """A key that is there all the time appears once in a range during which others come and go."""
    tree = BTree.from_sorted([b"%03d" % n for n in range(0, 200, 2)], 4, 4)
    seen = []
    for key in tree.range():
        seen.append(key)
        tree.insert(b"%03d" % (int(key) + 1))
        if int(key) % 10 == 0:
            tree.delete(key)
    assert [key for key in seen if int(key) % 2 == 0] == [b"%03d" % n for n in range(0, 200, 2)]
    assert seen == sorted(set(seen))


def test_check_finds_damage() -> None:
    """`check` is not blind: each kind of damage is reported by its own sentence."""

    def fresh() -> tuple[BTree, Inner, Leaf]:
        tree = BTree.from_sorted([b"%03d" % n for n in range(100)], 4, 4)
        node = tree._root
        assert isinstance(node, Inner)
        inner = node
        leaf = tree._leaf_for(b"050")
        return tree, inner, leaf

    tree, inner, leaf = fresh()
    tree.check()
    inner.count += 1
    with pytest.raises(AssertionError, match="counts the keys"):
        tree.check()
    tree, inner, leaf = fresh()
    leaf.keys[0] = b"999"
    with pytest.raises(AssertionError, match=r"ascending|separator"):
        tree.check()
    tree, inner, leaf = fresh()
    leaf.following = None
    with pytest.raises(AssertionError, match="chained"):
        tree.check()
    tree, inner, leaf = fresh()
    inner.separators[0] = b"000"
    with pytest.raises(AssertionError, match="separator"):
        tree.check()
    tree, inner, leaf = fresh()
    tree._size -= 1
    with pytest.raises(AssertionError, match="size"):
        tree.check()
