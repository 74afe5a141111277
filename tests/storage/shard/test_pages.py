"""Pages and backups: one sorted run out of many shards."""

import random
from binascii import crc_hqx
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtcp.protocol import operations as op
from kvtcp.storage.shard.pages import ROW_BYTES, any_key, merge_frozen, merge_page
from kvtcp.storage.shard.table import Table

STAMP = 1000


def tables_with(rows: dict[bytes, tuple[bytes, int | None]], count: int, one_shard: bool = False) -> list[Table]:
    """`count` tables that hold key -> (value, ttl_ms or None), each key where its hash says, or all in the first."""
    tables = [Table(shard, leaf_keys_max=4, fresh_keys_max=3) for shard in range(count)]
    for key, (value, ttl_ms) in rows.items():
        table = tables[0 if one_shard else crc_hqx(key, 0) % count]
        table.apply([op.PUT, table.shard, table.seq + 1, 0, key, value, ttl_ms], STAMP)
    return tables


def merged(*arguments: Any) -> tuple[list[tuple[bytes, bytes | None, int, int | None]], bool]:
    """A page of `merge_page` as rows."""
    keys, values, revs, ttls_ms, more = merge_page(*arguments)
    nothing = [None] * len(keys)
    return list(zip(keys, nothing if values is None else values, revs, ttls_ms or nothing, strict=True)), more


ROWS = st.dictionaries(
    st.binary(min_size=1, max_size=2), st.tuples(st.binary(max_size=40), st.none() | st.integers(1, 4)), max_size=60
)


@settings(deadline=None, max_examples=250)
@given(
    rows=ROWS, shards=st.integers(1, 9), one_shard=st.booleans(), lower=st.just(b"") | st.binary(max_size=2),
    upper=st.none() | st.binary(max_size=2), limit=st.integers(1, 70), bytes_max=st.integers(0, 300) | st.just(10_000),
    reverse=st.booleans(), keys_only=st.booleans(), passed_ms=st.integers(0, 4),
)  # fmt: skip
def test_page_is_the_head_of_the_sorted_rows(
    rows: dict[bytes, tuple[bytes, int | None]], shards: int, one_shard: bool, lower: bytes, upper: bytes | None,
    limit: int, bytes_max: int, reverse: bool, keys_only: bool, passed_ms: int,
) -> None:  # fmt: skip
    """Whatever the distribution, bounds and limits: the page is the head of all rows sorted, cut by rows or bytes."""
    tables = tables_with(rows, shards, one_shard)
    page, more = merged(tables, lower, upper, limit, bytes_max, reverse, keys_only, STAMP + passed_ms)
    live = sorted(
        (
            (key, value, None if ttl_ms is None else ttl_ms - passed_ms)
            for key, (value, ttl_ms) in rows.items()
            if key >= lower and (upper is None or key < upper) and (ttl_ms is None or ttl_ms > passed_ms)
        ),
        reverse=reverse,
    )
    assert [(key, ttl_ms) for key, _, _, ttl_ms in page] == [(key, ttl_ms) for key, _, ttl_ms in live[: len(page)]]
    assert [value for _, value, _, _ in page] == [None if keys_only else value for _, value, _ in live[: len(page)]]
    assert more == (len(page) < len(live))
    sizes = [len(key) + ROW_BYTES + (0 if keys_only else len(value)) for key, value, _ in live]
    assert len(page) <= limit and (len(page) <= 1 or sum(sizes[: len(page)]) <= bytes_max)
    if more:
        assert page, "a page has a row if there is one"
        assert len(page) == limit or sum(sizes[: len(page) + 1]) > bytes_max, "a page is not shorter than it must be"


def test_pages_one_after_the_other_give_every_row_once() -> None:
    """Following the last key of each page walks all rows, in both directions."""
    rng = random.Random(7)
    rows = {b"%06d" % rng.randrange(10**6): (b"v" * rng.randrange(60), None) for _ in range(3000)}
    tables = tables_with(rows, 64)
    for reverse in (False, True):
        lower: bytes = b""
        upper: bytes | None = None
        keys: list[object] = []
        more = True
        while more:
            page, more = merged(tables, lower, upper, 100, 4000, reverse, False, STAMP)
            keys += [row[0] for row in page]
            last = page[-1][0]
            if reverse:
                upper = last
            else:
                lower = last + b"\0"
        assert keys == sorted(rows, reverse=reverse)


@settings(deadline=None, max_examples=150)
@given(rows=ROWS, shards=st.integers(1, 5), one_shard=st.booleans(), passed_ms=st.integers(0, 4))
def test_any_key(rows: dict[bytes, tuple[bytes, int | None]], shards: int, one_shard: bool, passed_ms: int) -> None:
    """Every visible key is found by some number, no other one is, and without expired ones each by exactly one."""
    tables = tables_with(rows, shards, one_shard)
    live = {key for key, (_, ttl_ms) in rows.items() if ttl_ms is None or ttl_ms > passed_ms}
    found = [any_key(tables, number, STAMP + passed_ms) for number in range(7 * len(rows), 8 * len(rows))]
    assert {key for key, _ in found} == live or (not live and all(key is None for key, _ in found))
    assert {keys for _, keys in found} <= {len(rows)}
    if len(live) == len(rows):
        assert sorted(key for key, _ in found if key is not None) == sorted(rows)
    assert any_key([], 5, STAMP) == (None, 0)


def test_no_tables_is_an_empty_page() -> None:
    """A node that hosts none of the shards answers an empty run."""
    assert merge_page([], b"", None, 5, 100, False, False, STAMP) == ((), (), (), None, False)
    assert merge_page([], b"", None, 5, 100, False, True, STAMP) == ((), None, (), None, False)


def test_columns_without_content_are_none() -> None:
    """Values of a page of keys, and the deadlines of rows that have none."""
    tables = tables_with({b"a": (b"1", None), b"b": (b"2", 50), b"c": (b"3", None)}, 1)
    page = (b"", None, 5, 1_000, False)
    assert merge_page(tables, *page, False, STAMP) == (
        [b"a", b"b", b"c"], (b"1", b"2", b"3"), (1, 2, 3), [None, 50, None], False,
    )  # fmt: skip
    assert merge_page(tables, *page, True, STAMP)[1] is None
    assert merge_page(tables, b"b\0", *page[1:], False, STAMP)[3] is None


@pytest.mark.parametrize("rows_per_slice", [1, 3, 500])
def test_frozen_shards_are_merged_in_order(rows_per_slice: int) -> None:
    """Every row of every shard once, in key order, as it was at the freeze, though the shards are changed meanwhile."""
    rows = {b"%04d" % number: (b"old", 3 if number % 3 == 0 else None) for number in range(600)}
    tables = tables_with(rows, 8)
    frozens = [table.freeze() for table in tables]
    seen = []
    for shard, key, value, rev, deadline_ms in merge_frozen(frozens, rows_per_slice):
        assert crc_hqx(key, 0) % 8 == shard and rev >= 1
        seen.append((key, value, None if deadline_ms is None else deadline_ms - STAMP))
        for table in tables[:3]:
            table.apply([op.DELETE, table.shard, table.seq + 1, 0, b"%04d" % ((len(seen) * 37) % 600)], STAMP)
    assert seen == [(key, *rows[key]) for key in sorted(rows)]
    assert all(len(frozen._saved) == 0 and frozen.rows_left == 0 for frozen in frozens)
