"""Requests of both clients: from arguments of Python to messages, and from results on the wire to values.

Pure. Durations are seconds (float) towards users and milliseconds (int) on the wire. Requests are `[0, op, ...args]`;
the channel puts the id in the place of the 0. The limits are checked by the server's own checkers, so a request over a
limit fails here, at once, with the sentence the server would have sent.

Cells: `get` answers `[value, rev, ttl_ms or nil]` or nil. In the results of m-requests an error is an array
`[code, message, details]`; a cell starts with bytes and an error with an integer, so they cannot be taken for another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from kvtcp.constants import CLIENT_CHUNK_BYTES, CLIENT_CHUNK_KEYS_MAX, PAGE_ITEMS_MAX, TTL_MS_MAX
from kvtcp.errors import BatchError, Code, KvtcpError, ProtocolError, RequestError, Unavailable, error_from_wire
from kvtcp.protocol.messages import REQUESTS, Message, check_key

V = TypeVar("V")
T = TypeVar("T")
Key = bytes | str
# the argument of put_many; a mapping is invariant in its keys, hence three of them
Items = (
    Mapping[bytes, V | str]
    | Mapping[str, V | str]
    | Mapping[Key, V | str]
    | Iterable[tuple[Key, V | str] | tuple[Key, V | str, float | None]]
)

_VALUE_OR_NIL: Final = (bytes, type(None))
NEVER: Final = math.inf  # result of `ttl` for a key without a deadline


class Entry(NamedTuple, Generic[V]):
    """A key with its value, revision and remaining lifetime: `ttl` is in seconds, None without a deadline."""

    key: bytes
    value: V
    rev: int
    ttl: float | None


def key_bytes(key: Key) -> bytes:
    """A key as bytes, text in UTF-8. Raises RequestError for another type, an empty key and one that is too long."""
    return check_key(key if type(key) is bytes else _octets(key, "a key"))


def bound_bytes(bound: Key | None, name: str) -> bytes | None:
    """An end of a range as bytes; None = no bound."""
    return None if bound is None else _octets(bound, name)


def text_bytes(text: str, what: str) -> bytes:
    """A text as UTF-8. Raises RequestError for anything else."""
    if not isinstance(text, str):
        raise RequestError(f"{what} must be text, not {type(text).__name__}")
    return _octets(text, what)


def _octets(data: object, what: str) -> bytes:
    if isinstance(data, str):
        try:
            return data.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"{what} has a lone surrogate, which is not text: {data!r:.60}") from error
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise RequestError(f"{what} must be bytes or text, not {type(data).__name__}")


def duration_ms(seconds: float, name: str = "ttl") -> int:
    """Seconds as whole milliseconds, at least 1. Raises RequestError unless 0 < seconds <= 100 years."""
    if type(seconds) is bool or not isinstance(seconds, (int, float)):
        raise RequestError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if not 0 < seconds <= TTL_MS_MAX / 1000:
        raise RequestError(f"{name} must be over 0 and at most {TTL_MS_MAX // 1000} seconds, not {seconds}")
    return max(1, round(seconds * 1000))


def open_cell(cell: Any) -> tuple[bytes, int, int | None]:
    """Value, revision and milliseconds to live of a cell. Raises ProtocolError if it is not one."""
    if type(cell) is not list or len(cell) != 3 or type(cell[0]) is not bytes:
        raise ProtocolError("the server's answer is not a cell [value, rev, ttl_ms]")
    return cell[0], cell[1], cell[2]


def open_rows(rows: list[Any]) -> list[list[Any]]:
    """The rows of a page. Raises ProtocolError unless each is `[key, value or nil, rev, ttl_ms or nil]`."""
    for row in rows:
        if type(row) is not list or len(row) != 4 or type(row[0]) is not bytes or type(row[1]) not in _VALUE_OR_NIL:
            raise ProtocolError("a row of a page is not [key, value, rev, ttl_ms]")
    return rows


def seconds(ttl_ms: int | None) -> float | None:
    """Milliseconds of the wire as seconds, nil as None."""
    return None if ttl_ms is None else ttl_ms / 1000


def request(op: bytes, *args: Any) -> Message:
    """A checked request without its id. Raises RequestError."""
    message = [0, op, *args]
    REQUESTS[op].check(message)
    return message


def ttl_options(ttl: float | None, keep_ttl: bool = False) -> list[dict[bytes, Any]]:
    """The options of `put` and `add`: no argument at all when nothing was chosen."""
    options: dict[bytes, Any] = {}
    if ttl is not None:
        options[b"ttl_ms"] = duration_ms(ttl)
    if keep_ttl:
        options[b"keep_ttl"] = True
    return [options] if options else []


def conditions(value: bytes | None, rev: int | None) -> dict[bytes, Any]:
    """The condition of `delete` and `cas`."""
    options: dict[bytes, Any] = {}
    if value is not None:
        options[b"value"] = value
    if rev is not None:
        options[b"rev"] = rev
    return options


class PageRequest:
    """A scan in pages: the request of the next one, and the end. Stateful: one per scan."""

    def __init__(
        self, prefix: Key | None, start: Key | None, end: Key | None, limit: int | None, reverse: bool, keys_only: bool,
        page_items: int = PAGE_ITEMS_MAX,
    ) -> None:  # fmt: skip
        if limit is not None and (type(limit) is not int or limit < 0):
            raise RequestError(f"limit must be an integer of at least 0, or None, not {limit!r}")
        if type(page_items) is not int or not 1 <= page_items <= PAGE_ITEMS_MAX:
            raise RequestError(f"page_items must be an integer from 1 to {PAGE_ITEMS_MAX}, not {page_items!r}")
        self._lower = bound_bytes(start, "start")
        self._upper = bound_bytes(end, "end")
        self._options: dict[bytes, Any] = {}
        if prefix:
            self._options[b"prefix"] = bound_bytes(prefix, "prefix")
        if reverse:
            self._options[b"reverse"] = True
        if keys_only:
            self._options[b"keys_only"] = True
        self._page_items = page_items
        self._left = limit  # items still wanted, None = all
        self.finished = limit == 0  # nothing more to ask for
        if not self.finished:
            self.next()  # a wrong range is refused when the scan is made, not at its first page

    def next(self) -> Message:
        """The request of the next page."""
        items = self._page_items if self._left is None else min(self._left, self._page_items)
        return request(b"scan", self._lower, self._upper, items, *([self._options] if self._options else []))

    def rows(self, answer: Any) -> list[Any]:
        """The rows of an answer, for `open_rows`; afterwards `next` asks for those behind them."""
        if type(answer) is not list or len(answer) != 2 or type(answer[0]) is not list:
            raise ProtocolError("the result of scan is not [items, cursor]")
        rows: list[Any] = answer[0]
        if self._left is not None:
            self._left -= len(rows)
        self.finished = answer[1] is None or (self._left is not None and self._left <= 0)
        self._options[b"cursor"] = answer[1]
        return rows


def count_request(prefix: Key | None, start: Key | None, end: Key | None) -> Message:
    """The request of `count`."""
    options = [{b"prefix": bound_bytes(prefix, "prefix")}] if prefix else []
    return request(b"count", bound_bytes(start, "start"), bound_bytes(end, "end"), *options)


# --- operations on many keys ------------------------------------------------------------------------


def put_items(items: Items[Any]) -> Iterator[tuple[Key, Any, float | None]]:
    """Yield `(key, value, ttl or None)` for the items of put_many: a mapping, pairs, or triples with a ttl."""
    if isinstance(items, Mapping):
        for key, value in items.items():
            yield key, value, None
        return
    for item in items:
        if not isinstance(item, (tuple, list)) or not 2 <= len(item) <= 3:
            raise RequestError("an item of put_many is (key, value) or (key, value, ttl)")
        yield item[0], item[1], item[2] if len(item) == 3 else None


def chunks(sizes_bytes: Sequence[int]) -> list[range]:
    """Consecutive runs of items that each fit one m-request: by number, and by bytes unless one alone is larger."""
    runs: list[range] = []
    start = total_bytes = 0
    for i, size_bytes in enumerate(sizes_bytes):
        if i > start and (total_bytes + size_bytes > CLIENT_CHUNK_BYTES or i - start >= CLIENT_CHUNK_KEYS_MAX):
            runs.append(range(start, i))
            start, total_bytes = i, 0
        total_bytes += size_bytes
    if start < len(sizes_bytes):
        runs.append(range(start, len(sizes_bytes)))
    return runs


def item_result(answer: Any) -> Any:
    """Return a result of an m-request as it is, or the exception that it encodes."""
    if type(answer) is list and answer and type(answer[0]) is int:
        if answer[0] in (Code.OK, Code.PROGRESS):
            raise ProtocolError(f"code {answer[0]} in the results of an m-request is not an error")
        return error_from_wire(answer[0], answer[1] if len(answer) > 1 else "", answer[2] if len(answer) > 2 else None)
    return answer


class KeyBatch:
    """The items of one operation on many keys, and their results so far.

    `results[i]` belongs to `items[i]`: a result, or the KvtcpError it failed with. An item that was not executed for a
    passing reason is sent again by the same call, unless the batch names a key twice: then the order of its effects is
    part of the request, and a repetition would change it. The parts of such a batch are also sent one after another.
    """

    def __init__(self, op: bytes, items: Sequence[Any], keys: Sequence[bytes], sizes_bytes: Sequence[int]) -> None:
        self.op = op
        self.items = items
        self.results: list[Any] = [NOT_SENT] * len(items)
        self.runs = chunks(sizes_bytes)
        self.distinct = op == b"mget" or len(set(keys)) == len(keys)

    def message(self, indexes: Sequence[int]) -> Message:
        """The request for these items."""
        return [0, self.op, [self.items[i] for i in indexes]]

    def take(self, indexes: Sequence[int], answers: Any) -> list[int]:
        """Put the answers in their places; returns the indexes of items to send again."""
        if type(answers) is not list or len(answers) != len(indexes):
            raise ProtocolError(f"the result of {self.op.decode()} is not a list with one entry a key")
        again = []
        for i, answer in zip(indexes, answers, strict=True):
            result = self.results[i] = item_result(answer)
            if not isinstance(result, KvtcpError):
                continue
            if (isinstance(result, Unavailable) and self.distinct) or self.is_too_large(result, len(indexes)):
                again.append(i)
        return again

    def fail(self, indexes: Iterable[int], error: KvtcpError) -> None:
        """The request for these items ended with an error."""
        for i in indexes:
            self.results[i] = error

    def is_too_large(self, error: KvtcpError, keys: int) -> bool:
        """Whether the same keys in smaller requests may do better: the answer of an mget did not fit."""
        return self.op == b"mget" and error.code == Code.TOO_LARGE and keys > 1

    def sort(self, again: Sequence[int], keys: int) -> tuple[list[int], list[int]]:
        """Split the items to repeat into those for smaller requests, and those to send after a pause."""
        large = [i for i in again if self.is_too_large(self.results[i], keys)]
        return large, [i for i in again if isinstance(self.results[i], Unavailable)]

    def finish(self) -> list[Any]:
        """The results. Raises BatchError with all of them if some failed, or the error if all failed for one reason.

        Refusals with one code are one reason: their sentences differ only in the shard they name.
        """
        failed = [r for r in self.results if isinstance(r, KvtcpError)]
        if not failed:
            return self.results
        first = failed[0]
        alike = isinstance(first, Unavailable) and all(error.code == first.code for error in failed)
        if len(failed) == len(self.results) and (alike or all(error is first for error in failed)):
            raise first
        raise BatchError(f"{len(failed)} of {len(self.results)} keys failed, the first with: {first}", self.results)


NOT_SENT: Final = Unavailable("not sent, because an earlier part of the same call failed", Code.UNREACHABLE)
