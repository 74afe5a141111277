"""Index: hash index, fresh keys and tree hold the same keys, whatever waits for its merge."""

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtcp.storage.shard.index import Cell, Index, OrderError

KEYS = st.binary(min_size=1, max_size=2)
STEPS = ["set", "set", "set", "delete", "delete all", "read", "merge"]


@settings(deadline=None, max_examples=150)
@given(fresh_keys_max=st.integers(1, 9), steps=st.lists(st.tuples(st.sampled_from(STEPS), KEYS, KEYS), max_size=60))
def test_index_is_an_ordered_dict(fresh_keys_max: int, steps: list[tuple[str, bytes, bytes]]) -> None:
    """Any sequence of operations gives what a dict and `sorted` give, `check()` after every step."""
    index = Index(4, fresh_keys_max)
    model: dict[bytes, Cell] = {}
    for number, (what, key, other) in enumerate(steps):
        if what == "set":
            model[key] = (other, number, None)
            index.set(key, model[key])
        elif what == "delete":
            assert index.delete(key) == model.pop(key, None)
        elif what == "delete all":
            index.delete_all([key, other] if key != other else [key])
            model.pop(key, None)
            model.pop(other, None)
        elif what == "merge":
            index.merge()
            assert not index.fresh
        else:
            expected = sorted(k for k in model if key <= k < other)
            assert index.count(key, other) == len(expected)
            assert index.slice(key, other) == expected
            assert index.slice(key, other, 3, reverse=True) == expected[::-1][:3]
            assert index.cells_of(expected) == [model[k] for k in expected]
            assert [index.key_at(place) for place in range(len(model))] == sorted(model)
        assert index.get(key) == model.get(key)
        assert len(index) == index.count() == len(model)
        index.check()


def test_load_takes_ascending_rows_only() -> None:
    """Rows out of order, and a key twice, are refused."""
    index = Index(4)
    index.load(([b"%03d" % n], [(b"v", n, None)]) for n in range(50))
    index.check()
    assert (len(index), index.get(b"007")) == (50, (b"v", 7, None))
    for keys in ([b"b", b"a"], [b"a", b"a"]):
        with pytest.raises(OrderError, match="ascending"):
            Index(4).load([(keys, [(b"", 1, None)] * 2)])
        with pytest.raises(OrderError, match="ascending"):
            Index(4).load([([key], [(b"", 1, None)]) for key in (*keys[:1], b"", *keys[1:]) if key])


def test_a_full_collection_does_not_make_the_cells_young() -> None:
    """The cyclic collector goes on tracking the dictionary, so a later young collection does not walk its cells."""
    index = Index(4, 1)
    index.set(b"first", (b"value", 1, None))
    gc.collect()
    index.set(b"key", (b"value", 1, None))
    gc.collect()
    index.set(b"other", (b"value", 2, None))
    assert id(index.cells) not in {id(thing) for thing in gc.get_objects(generation=0)}
    assert gc.is_tracked(index.cells)
