"""An ordered set of keys: a B+tree with wide leaves that are sorted when they are looked at.

Pure. `Index` keeps one beside its hash table for the order of the keys; the table of deadlines is another one. Keys are
bytes, every key at most once: the caller knows which keys are present (the hash table beside it says so in one probe),
so an insert never searches for a duplicate.

Leaves are plain lists searched with bisect, and chained both ways. A leaf is a *settled* (ascending) prefix followed by
a tail in order of arrival. An insert is one append; the tail is sorted in by the next operation that needs the order of
the leaf (a range, a count, a split). For list.sort a settled prefix with a tail is a merge of two runs; done once per
split it costs 0.1 us a key, where a bisect.insort on every insert costs 0.4 us.

An inner node holds its children, the separators between them (`separators[i]` is above every key of `children[i]` and
not above any of `children[i + 1]`) and the number of keys below it, so `count` and `rank` visit one path.

Invariants (`check`): order, separators, equal depth, occupancy, counts, chain. A split leaves halves to three quarters;
a node is merged or topped up when it falls under a quarter. The gap between the two keeps a workload that inserts and
deletes around one size from splitting and merging the same node again and again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Final

from kvtcp.constants import INNER_CHILDREN_MAX, LEAF_KEYS_MAX

# A longer tail is sorted in before a key is searched in it: a linear search of 32 costs what the merge costs.
TAIL_SEARCH_MAX: Final = 32


class Leaf:
    """A run of keys between two separators."""

    __slots__ = ("following", "keys", "preceding", "settled")

    def __init__(self, keys: list[bytes], settled: int) -> None:
        self.keys = keys  # keys[:settled] ascending, then a tail in order of arrival
        self.settled = settled  # 0 <= settled <= len(keys)
        self.preceding: Leaf | None = None
        self.following: Leaf | None = None

    def settle(self) -> list[bytes]:
        """Sort the tail in; returns the keys, all ascending now."""
        keys = self.keys
        if self.settled != len(keys):
            keys.sort()
            self.settled = len(keys)
        return keys


class Inner:
    """A node above leaves or above other inner nodes; all children are of one kind and depth."""

    __slots__ = ("children", "count", "separators")

    def __init__(self, separators: list[bytes], children: list[Node]) -> None:
        self.separators = separators  # len(children) - 1 of them
        self.children = children
        self.count = _keys_below(children)  # keys in all leaves below


Node = Leaf | Inner
Siblings = list[tuple[bytes, Node]]  # new right neighbours of a node that was split, each with the separator before it


class BTree:
    """Ordered set of bytes. `leaf_keys_max` and `children_max` (both >= 4) bound the width of the nodes."""

    def __init__(self, leaf_keys_max: int = LEAF_KEYS_MAX, children_max: int = INNER_CHILDREN_MAX) -> None:
        assert leaf_keys_max >= 4 and children_max >= 4, "halves of a split node must stay above a quarter"
        self._leaf_keys_max = leaf_keys_max
        self._children_max = children_max
        self._head = Leaf([], 0)  # the leftmost leaf; it stays the same object, because splits and merges keep the left
        self._root: Node = self._head
        self._size = 0  # number of keys

    @classmethod
    def from_sorted(
        cls, keys: list[bytes], leaf_keys_max: int = LEAF_KEYS_MAX, children_max: int = INNER_CHILDREN_MAX
    ) -> BTree:
        """A tree of strictly ascending `keys`, nodes three quarters full. O(n)."""
        tree = cls(leaf_keys_max, children_max)
        tree.insert_sorted_batch(keys)
        return tree

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: bytes) -> bool:
        keys = self._leaf_for(key).settle()
        place = bisect_left(keys, key)
        return place < len(keys) and keys[place] == key

    def __iter__(self) -> Iterator[bytes]:
        return self.range()

    def release(self) -> None:
        """Free all keys, leaf by leaf, for a tree that is not used any more. May run in another thread."""
        # Leaves are chained both ways: reference counts alone never free them, and the cyclic collector would have to.
        leaf: Leaf | None = self._head
        while leaf is not None:
            following = leaf.following
            leaf.keys.clear()
            leaf.preceding = leaf.following = None
            leaf = following

    # --- changes -----------------------------------------------------------------------------------

    def insert(self, key: bytes) -> None:
        """Add a key that is not in the tree."""
        self.insert_sorted_batch([key])

    def insert_sorted_batch(self, batch: list[bytes]) -> None:
        """Add strictly ascending keys, none of which is in the tree: one descent for all keys of a subtree."""
        if not batch:
            return
        self._size += len(batch)
        root = self._root
        if isinstance(root, Leaf):
            root.keys += batch
            siblings = self._split_leaf(root) if len(root.keys) > self._leaf_keys_max else []
        else:
            siblings = self._insert_below(root, batch)
        while siblings:
            left = self._root
            top = Inner([separator for separator, _ in siblings], [left, *(node for _, node in siblings)])
            self._root = top
            siblings = self._split_inner(top) if len(top.children) > self._children_max else []

    def delete(self, key: bytes) -> None:
        """Remove a key. Raises KeyError if it is not in the tree."""
        path: list[tuple[Inner, int]] = []
        node = self._root
        while isinstance(node, Inner):
            slot = bisect_right(node.separators, key)
            path.append((node, slot))
            node = node.children[slot]
        keys = node.keys
        # A short tail is searched as it is: when inserts and deletes alternate, settling would sort the whole leaf for
        # every delete.
        if len(keys) - node.settled > TAIL_SEARCH_MAX:
            node.settle()
        place = bisect_left(keys, key, 0, node.settled)
        if place < node.settled and keys[place] == key:
            node.settled -= 1
        else:
            try:
                place = keys.index(key, node.settled)
            except ValueError:
                raise KeyError(key) from None
        del keys[place]
        self._size -= 1
        for inner, _ in path:
            inner.count -= 1
        if path and len(keys) < self._leaf_keys_max // 4:
            self._rebalance(path)

    def delete_sorted_batch(self, batch: list[bytes]) -> None:
        """Remove strictly ascending keys: one descent per leaf. Raises KeyError at the first leaf that lacks one, which
        is then as it was; the leaves before it have lost their keys."""
        start = 0
        while start < len(batch):
            path: list[tuple[Inner, int]] = []
            upper: bytes | None = None
            node = self._root
            while isinstance(node, Inner):
                slot = bisect_right(node.separators, batch[start])
                path.append((node, slot))
                if slot < len(node.separators):
                    upper = node.separators[slot]
                node = node.children[slot]
            # The separator right of the path bounds the keys of this leaf; the lowest one on the path is the nearest.
            stop = len(batch) if upper is None else bisect_left(batch, upper, start + 1)
            keys = node.settle()
            places = [bisect_left(keys, key) for key in batch[start:stop]]
            for key, place in zip(batch[start:stop], places, strict=True):
                if place == len(keys) or keys[place] != key:
                    raise KeyError(key)
            for place in reversed(places):  # from the right, so that the other places stay right
                del keys[place]
            node.settled = len(keys)
            self._size -= stop - start
            for inner, _ in path:
                inner.count -= stop - start
            if path and len(keys) < self._leaf_keys_max // 4:
                self._rebalance(path)
            start = stop

    def settle(self) -> None:
        """Sort the tails of all leaves in, as reading all of them would."""
        leaf: Leaf | None = self._head
        while leaf is not None:
            leaf.settle()
            leaf = leaf.following

    def _insert_below(self, node: Inner, batch: list[bytes]) -> Siblings:
        """Spread an ascending batch over the children of `node`; returns the right neighbours it was split into.

        The loop turns once per leaf that gets keys, about once per key when a small batch meets a large tree: 0.5 us.
        """
        separators = node.separators
        children = node.children
        leaf_keys_max = self._leaf_keys_max
        node.count += len(batch)
        grown: list[tuple[int, Siblings]] = []
        last = len(separators)
        end = len(batch)
        start = slot = 0
        while start < end:
            key = batch[start]
            slot = bisect_right(separators, key, slot)
            stop = start + 1
            if slot == last:
                stop = end
            elif stop < end and batch[stop] < separators[slot]:
                stop = bisect_left(batch, separators[slot], stop + 1, end)
            child = children[slot]
            if isinstance(child, Leaf):
                keys = child.keys
                if stop - start == 1:
                    keys.append(key)
                else:
                    keys += batch[start:stop]
                if len(keys) > leaf_keys_max:
                    grown.append((slot, self._split_leaf(child)))
            else:
                siblings = self._insert_below(child, batch[start:stop])
                if siblings:
                    grown.append((slot, siblings))
            start = stop
        # After the loop, and from the right: new children would move the slots that are still to come.
        for slot, siblings in reversed(grown):
            separators[slot:slot] = [separator for separator, _ in siblings]
            children[slot + 1 : slot + 1] = [sibling for _, sibling in siblings]
        return self._split_inner(node) if len(children) > self._children_max else []

    def _split_leaf(self, leaf: Leaf) -> Siblings:
        """Cut an overfull leaf into equal parts; the leaf keeps the first one."""
        keys = leaf.settle()
        sizes = _parts(len(keys), self._leaf_keys_max)
        place = leaf.settled = sizes[0]
        leaf.keys = keys[:place]
        siblings: Siblings = []
        left, end = leaf, leaf.following
        for size in sizes[1:]:
            right = Leaf(keys[place : place + size], size)
            left.following, right.preceding = right, left
            siblings.append((keys[place], right))
            place += size
            left = right
        left.following = end
        if end is not None:
            end.preceding = left
        return siblings

    def _split_inner(self, node: Inner) -> Siblings:
        """Cut an overfull inner node into equal parts; the node keeps the first one."""
        children, separators = node.children, node.separators
        sizes = _parts(len(children), self._children_max)
        place = sizes[0]
        node.children, node.separators = children[:place], separators[: place - 1]
        node.count = _keys_below(node.children)
        siblings: Siblings = []
        for size in sizes[1:]:
            right = Inner(separators[place : place + size - 1], children[place : place + size])
            siblings.append((separators[place - 1], right))
            place += size
        return siblings

    def _rebalance(self, path: list[tuple[Inner, int]]) -> None:
        """Merge or top up the node at the end of `path`, then each parent that a merge left too small.

        One neighbour is always enough, even if a batch emptied the node: with at most three quarters together they
        become one node, with more each gets over a quarter.
        """
        while path:
            parent, slot = path.pop()
            node = parent.children[slot]
            least = self._leaf_keys_max // 4 if isinstance(node, Leaf) else max(2, self._children_max // 4)
            if _width(node) >= least:
                break
            place = max(slot - 1, 0)  # the pair is children[place] and children[place + 1]
            left, right = parent.children[place], parent.children[place + 1]
            if isinstance(left, Leaf) and isinstance(right, Leaf):
                separator = self._even_leaves(left, right)
            else:
                assert isinstance(left, Inner) and isinstance(right, Inner), "siblings are of one kind"
                separator = self._even_inners(left, right, parent.separators[place])
            if separator is None:
                del parent.children[place + 1], parent.separators[place]
            else:
                parent.separators[place] = separator
        while isinstance(self._root, Inner) and len(self._root.children) == 1:
            self._root = self._root.children[0]

    def _even_leaves(self, left: Leaf, right: Leaf) -> bytes | None:
        """Merge both leaves into `left` and return None, or share their keys evenly and return the new separator."""
        keys = left.settle() + right.settle()
        # Three quarters, not a full leaf: the next few inserts must not split what was just merged.
        if len(keys) <= self._leaf_keys_max * 3 // 4:
            left.keys, left.settled = keys, len(keys)
            left.following = right.following
            if right.following is not None:
                right.following.preceding = left
            return None
        half = len(keys) // 2
        left.keys, left.settled = keys[:half], half
        right.keys, right.settled = keys[half:], len(keys) - half
        return keys[half]

    def _even_inners(self, left: Inner, right: Inner, separator: bytes) -> bytes | None:
        """`_even_leaves` for inner nodes; `separator` is the separator between them."""
        children = left.children + right.children
        separators = [*left.separators, separator, *right.separators]
        half = len(children)
        if half > self._children_max * 3 // 4:
            half //= 2
        left.children, left.separators = children[:half], separators[: half - 1]
        left.count = _keys_below(left.children)
        if half == len(children):
            return None
        right.children, right.separators = children[half:], separators[half:]
        right.count = _keys_below(right.children)
        return separators[half - 1]

    # --- reads -------------------------------------------------------------------------------------

    def first(self) -> bytes | None:
        """The smallest key, None of an empty tree."""
        keys = self._head.settle()
        return keys[0] if keys else None

    def slice(
        self, lower: bytes = b"", upper: bytes | None = None, limit: int | None = None, reverse: bool = False
    ) -> list[bytes]:
        """The first `limit` keys of [lower, upper), the last ones in descending order with `reverse`. A new list."""
        out: list[bytes] = []
        room = self._size if limit is None else limit
        if room <= 0 or (upper is not None and upper <= lower):
            return out
        if reverse:
            leaf: Leaf | None = self._leaf_for(upper)
            while leaf is not None and room > 0:
                keys = leaf.settle()
                stop = len(keys) if upper is None else bisect_left(keys, upper)
                start = bisect_left(keys, lower, 0, stop) if keys and keys[0] < lower else 0
                out += keys[max(start, stop - room) : stop][::-1]
                room -= stop - start  # 0 or less when the limit is reached
                leaf = None if start else leaf.preceding  # start > 0: the range begins in this leaf
            return out
        leaf = self._leaf_for(lower)
        start = bisect_left(leaf.settle(), lower)
        while leaf is not None and room > 0:
            keys = leaf.settle()
            stop = len(keys)
            last = upper is not None and stop > 0 and keys[-1] >= upper
            if last and upper is not None:
                stop = bisect_left(keys, upper)
            out += keys[start : min(stop, start + room)]
            room -= stop - start
            start = 0
            leaf = None if last else leaf.following
        return out

    def range(self, lower: bytes = b"", upper: bytes | None = None, reverse: bool = False) -> Iterator[bytes]:
        """Every key of [lower, upper), ascending or descending. The tree may change between two steps: a key that is
        present all the time appears exactly once."""
        while True:
            keys = self.slice(lower, upper, self._leaf_keys_max, reverse)
            yield from keys
            if len(keys) < self._leaf_keys_max:
                return
            if reverse:
                upper = keys[-1]
            else:
                lower = keys[-1] + b"\0"

    def rank(self, key: bytes) -> int:
        """Number of keys below `key`."""
        below = 0
        node = self._root
        while isinstance(node, Inner):
            slot = bisect_right(node.separators, key)
            below += _keys_below(node.children[:slot])
            node = node.children[slot]
        return below + bisect_left(node.settle(), key)

    def at(self, place: int) -> bytes:
        """The key at `place` in the order of keys, from 0. Raises IndexError if there are not so many."""
        if place >= self._size:
            raise IndexError(f"no key at place {place}: there are {self._size}")
        node = self._root
        while isinstance(node, Inner):
            for child in node.children:
                below = _keys_below([child])
                if place < below:
                    break
                place -= below
            node = child
        return node.settle()[place]

    def count(self, lower: bytes = b"", upper: bytes | None = None) -> int:
        """Number of keys in [lower, upper)."""
        high = self._size if upper is None else self.rank(upper)
        return max(0, high - self.rank(lower)) if lower else high

    def _leaf_for(self, key: bytes | None) -> Leaf:
        """The leaf where `key` is or would be; the last leaf for None."""
        node = self._root
        while isinstance(node, Inner):
            node = node.children[-1 if key is None else bisect_right(node.separators, key)]
        return node

    # --- invariants --------------------------------------------------------------------------------

    def check(self) -> None:
        """Verify every invariant; AssertionError names the one that is broken. Does not settle any leaf."""
        leaves: list[Leaf] = []
        depths: set[int] = set()
        assert self._check_node(self._root, None, None, 0, leaves, depths) == self._size, "size of the tree"
        assert len(depths) == 1, "all leaves have the same depth"
        assert leaves[0] is self._head and self._head.preceding is None, "the chain begins at the first leaf"
        assert leaves[-1].following is None, "the chain ends at the last leaf"
        for left, right in pairwise(leaves):
            assert left.following is right and right.preceding is left, "leaves are chained both ways"

    def _check_node(
        self, node: Node, lower: bytes | None, upper: bytes | None, depth: int, leaves: list[Leaf], depths: set[int]
    ) -> int:
        """Number of keys below `node`, which must hold keys of [lower, upper) only."""
        if isinstance(node, Leaf):
            keys = sorted(node.keys)
            assert all(a < b for a, b in pairwise(keys)), "no key twice"
            assert 0 <= node.settled <= len(keys), "the settled prefix is inside the leaf"
            assert node.keys[: node.settled] == sorted(node.keys[: node.settled]), "the settled prefix is ascending"
            assert not keys or lower is None or lower <= keys[0], "keys are not below the separator before the leaf"
            assert not keys or upper is None or keys[-1] < upper, "keys are below the separator after the leaf"
            assert len(keys) <= self._leaf_keys_max, "a leaf is not overfull"
            assert depth == 0 or len(keys) >= self._leaf_keys_max // 4, "a leaf is at least a quarter full"
            leaves.append(node)
            depths.add(depth)
            return len(keys)
        children, separators = node.children, node.separators
        assert len(separators) == len(children) - 1, "one separator between two children"
        assert len(children) <= self._children_max, "an inner node is not overfull"
        least = 2 if depth == 0 else max(2, self._children_max // 4)
        assert len(children) >= least, "an inner node is a quarter full"
        bounds = [lower, *separators, upper]
        total = sum(
            self._check_node(child, bounds[i], bounds[i + 1], depth + 1, leaves, depths)
            for i, child in enumerate(children)
        )
        assert total == node.count, "an inner node counts the keys below it"
        return total


def _width(node: Node) -> int:
    return len(node.keys) if isinstance(node, Leaf) else len(node.children)


def _keys_below(nodes: Iterable[Node]) -> int:
    return sum(len(node.keys) if isinstance(node, Leaf) else node.count for node in nodes)


def _parts(total: int, capacity: int) -> list[int]:
    """Sizes of equal parts of `total` > `capacity` items, each between a half and three quarters of `capacity`."""
    count = -(-total // (capacity * 3 // 4))
    size, more = divmod(total, count)
    return [size + 1] * more + [size] * (count - more)
