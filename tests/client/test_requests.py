"""Requests and results as both clients share them: sizes of parts, pages, items."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.client.requests import KeyBatch, PageRequest, chunks, duration_ms, item_result, open_rows, put_items
from kvtcp.constants import CLIENT_CHUNK_BYTES, CLIENT_CHUNK_KEYS_MAX, TTL_MS_MAX, VALUE_BYTES_MAX
from kvtcp.errors import Code, OutcomeUnknown, ProtocolError, RequestError, Unavailable


@given(st.lists(st.integers(0, VALUE_BYTES_MAX), max_size=40) | st.builds(lambda n: [3] * n, st.integers(0, 3000)))
def test_chunks(sizes: list[int]) -> None:
    """Parts are consecutive, hold every item once, stay within both bounds, and are as long as these allow."""
    runs = chunks(sizes)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in run) for run in runs]
    for run, total in zip(runs, totals, strict=True):
        assert 1 <= len(run) <= CLIENT_CHUNK_KEYS_MAX
        assert total <= CLIENT_CHUNK_BYTES or len(run) == 1
    for run, total, after in zip(runs, totals, runs[1:], strict=False):
        assert len(run) == CLIENT_CHUNK_KEYS_MAX or total + sizes[after[0]] > CLIENT_CHUNK_BYTES


@pytest.mark.parametrize(("seconds", "ms"), [(1, 1000), (0.0001, 1), (1.2345, 1234), (TTL_MS_MAX / 1000, TTL_MS_MAX)])
def test_durations(seconds: float, ms: int) -> None:
    """Seconds become whole milliseconds, at least one."""
    assert duration_ms(seconds) == ms


@pytest.mark.parametrize("seconds", [0, -1, True, None, "1", float("nan"), float("inf"), TTL_MS_MAX / 1000 + 1])
def test_durations_refused(seconds: Any) -> None:
    """What is no duration is a RequestError."""
    with pytest.raises(RequestError, match="ttl must be"):
        duration_ms(seconds)


def test_put_items() -> None:
    """Mappings, pairs and triples; anything else is refused, text as an item too."""
    assert list(put_items({"a": 1})) == [("a", 1, None)]
    assert list(put_items([("a", 1), ["b", 2, 3.0]])) == [("a", 1, None), ("b", 2, 3.0)]
    for wrong in (["ab"], [("a",)], [("a", 1, 2, 3)], [5]):
        with pytest.raises(RequestError, match="an item of put_many"):
            list(put_items(wrong))


def test_item_results() -> None:
    """Cells, numbers and nil are results; an array that starts with a code is its error."""
    for result in (None, True, 7, [b"value", 3, None], []):
        assert item_result(result) == result
    assert isinstance(item_result([40, b"lost", {}]), OutcomeUnknown)
    error = item_result([34, b"shard 2 is down"])
    assert isinstance(error, Unavailable) and str(error) == "shard 2 is down"
    for code in (0, 1):
        with pytest.raises(ProtocolError):
            item_result([code, b"", {}])


def test_pages_follow_the_cursor_and_the_limit() -> None:
    """Each page asks for what is still wanted, with the cursor of the page before, and ends with cursor or limit."""
    pages = PageRequest("p", None, None, 5, True, True, page_items=3)
    assert pages.next() == [0, b"scan", None, None, 3, {b"prefix": b"p", b"reverse": True, b"keys_only": True}]
    rows = [[b"p%d" % i, None, i, None] for i in range(5)]
    assert pages.rows([rows[:3], b"<p2"]) == rows[:3]
    assert pages.next()[4:] == [2, {b"prefix": b"p", b"reverse": True, b"keys_only": True, b"cursor": b"<p2"}]
    assert not pages.finished
    pages.rows([rows[3:], b"<p4"])
    assert pages.finished
    unlimited = PageRequest(None, "a", "b", None, False, False)
    unlimited.rows([[], b">a"])
    assert not unlimited.finished
    unlimited.rows([[], None])
    assert unlimited.finished


@pytest.mark.parametrize("answer", [None, [], [[]], [[], None, 1], [5, None], [[5], None], [[[b"k", 1, 2, 3]], None]])
def test_pages_of_another_form(answer: Any) -> None:
    """What is not a page is a ProtocolError."""
    with pytest.raises(ProtocolError):
        open_rows(PageRequest(None, None, None, None, False, False).rows(answer))


def test_batch_sorts_what_is_asked_for_again() -> None:
    """Passing refusals and answers that were too large are told apart; other errors stay."""
    keys = [b"a", b"b", b"c", b"d"]
    batch = KeyBatch(b"mget", keys, keys, [1] * 4)
    down, large, bad = [34, b"down", {}], [11, b"large", {}], [10, b"bad", {}]
    again = batch.take(range(4), [down, [b"v", 1, None], large, bad])
    assert again == [0, 2]
    assert batch.sort(again, 4) == ([2], [0])
    assert batch.results[1] == [b"v", 1, None]
    assert batch.results[3].code == Code.BAD_REQUEST
    assert batch.take([2], [large]) == []


@pytest.mark.parametrize("answers", [None, [], [1], [1, 2, 3], {}])
def test_batch_answers_of_another_length(answers: Any) -> None:
    """An m-request answered with another number of results is a ProtocolError."""
    batch = KeyBatch(b"mput", [[b"a", b""], [b"b", b""]], [b"a", b"b"], [1, 1])
    with pytest.raises(ProtocolError, match="one entry a key"):
        batch.take([0, 1], answers)
