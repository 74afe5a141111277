"""Commands over ranges of keys: KEYS, SCAN, RANDOMKEY, DBSIZE, FLUSHALL, KV.RANGE, KV.COUNT.

Pure. Keys are in order, so a scan is a walk along them in pages, each of one point in time. A position is the first key
of the next page: a key that is there for the whole scan is found exactly once, even if other keys come and go. The
client gets a number for the position (service.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtcp.constants import KEY_BYTES_MAX, PAGE_ITEMS_MAX, RESP_KEYS_BYTES_MAX
from kvtcp.errors import RequestError
from kvtcp.frontend.resp.caller import Caller
from kvtcp.frontend.resp.patterns import literal_prefix, matcher
from kvtcp.frontend.resp.plan import NOT_AN_INTEGER, SYNTAX, Arguments, CommandError, Failed, error_text, integer
from kvtcp.frontend.resp.replies import DONE, Failure
from kvtcp.protocol.messages import prefix_bounds
from kvtcp.protocol.operations import CLEAR
from kvtcp.replication.sequencing.multi_read import MultiRead, any_key_read, count_read, page_read

Bounds = tuple[bytes, bytes | None]

KEY_OVERHEAD_BYTES = 16


class _Then:
    """Sink of one request: `then` gets its result or Failed."""

    __slots__ = ("then",)

    def __init__(self, then: Callable[[Any], None]) -> None:
        self.then = then

    def reply(self, token: None, result: Any) -> None:
        self.then(result)

    def fail(self, token: None, code: int, message: str, details: dict[str, Any]) -> None:
        self.then(Failed(code, message))


def _page(
    caller: Caller, bounds: Bounds, limit: int, then: Callable[[Any], None], reverse: bool = False,
    keys_only: bool = True,
) -> MultiRead:
    """Make a read of the first `limit` rows of the range; `then` gets [rows, cursor or None], or Failed."""
    return page_read(caller.keyspace.all_shards, *bounds, limit, reverse, keys_only, _Then(then), None)


def _or_failure(result: Any) -> Any:
    """Return a result as a reply, which Failed is not."""
    return Failure(error_text(result)) if type(result) is Failed else result


def _items_max(pattern: bytes) -> int:
    """The limit of keys in one step: lower with a long pattern, as the time is that of pattern times key."""
    return min(PAGE_ITEMS_MAX, max(1, 16 * PAGE_ITEMS_MAX // max(1, len(pattern))))


# --- SCAN, KEYS ---------------------------------------------------------------------------------------


def scan(caller: Caller, arguments: Arguments) -> None:
    """SCAN cursor [MATCH pattern] [COUNT n] [TYPE name]"""
    number = integer(arguments[0], "ERR invalid cursor")
    pattern, limit, is_string = b"*", 10, True
    options = iter(arguments[1:])
    for option in options:
        value = next(options, None)
        if value is None:
            raise CommandError(SYNTAX)
        name = option.upper()
        if name == b"MATCH":
            pattern = value
        elif name == b"COUNT":
            limit = integer(value)
            if limit < 1:
                raise CommandError(SYNTAX)
        elif name == b"TYPE":
            is_string = value.lower() == b"string"
        else:
            raise CommandError(SYNTAX)
    if number < 0:
        raise CommandError("ERR invalid cursor")
    lower, upper = prefix_bounds(literal_prefix(pattern))
    if number:
        lower = max(lower, caller.service.cursor(number))
    caller.keyspace.check_range_open(lower, upper)
    if upper is not None and lower >= upper:
        caller.answer([b"0", []])
        return
    answer = caller.later()
    matches = matcher(pattern)

    def then(page: Any) -> None:
        if type(page) is Failed:
            answer(_or_failure(page))
            return
        rows, cursor = page
        following = caller.service.keep_cursor(rows[-1][0] + b"\0", number) if cursor is not None else 0
        keys = [row[0] for row in rows if is_string and matches(row[0])]
        answer([b"%d" % following, keys])

    caller.multi_read(_page(caller, (lower, upper), min(limit, _items_max(pattern)), then))


def keys(caller: Caller, arguments: Arguments) -> None:
    """KEYS pattern"""
    pattern = arguments[0]
    lower, upper = prefix_bounds(literal_prefix(pattern))
    caller.keyspace.check_range_open(lower, upper)
    send = caller.later()
    matches = matcher(pattern)
    found: list[bytes] = []
    found_bytes = 0

    def answer(value: Any) -> None:
        caller.gathered_bytes -= found_bytes
        send(value)

    def next_page(lower: bytes) -> None:
        try:
            caller.keyspace.check_range_open(lower, upper)  # a restore may have begun since the last page
        except RequestError as closed:
            answer(_or_failure(Failed(closed.code, closed.message)))
        else:
            caller.service.sequencer.multi_read(_page(caller, (lower, upper), _items_max(pattern), then))

    def then(page: Any) -> None:
        nonlocal found_bytes
        if type(page) is Failed:
            answer(_or_failure(page))
            return
        rows, cursor = page
        new = [row[0] for row in rows if matches(row[0])]
        found.extend(new)
        new_bytes = sum(map(len, new)) + KEY_OVERHEAD_BYTES * len(new)
        found_bytes += new_bytes
        caller.gathered_bytes += new_bytes
        if found_bytes > RESP_KEYS_BYTES_MAX:
            answer(Failure(f"ERR the keys that match are over the limit of {RESP_KEYS_BYTES_MAX} bytes; use SCAN"))
        elif cursor is None or caller.is_gone:
            answer(found)
        else:
            caller.defer(lambda: next_page(rows[-1][0] + b"\0"))

    caller.multi_read(_page(caller, (lower, upper), _items_max(pattern), then))


# --- all keys -----------------------------------------------------------------------------------------


def random_key(caller: Caller, arguments: Arguments) -> None:
    """RANDOMKEY"""
    caller.keyspace.check_range_open(b"", None)
    answer = caller.later()
    sink = _Then(lambda key: answer(_or_failure(key)))
    caller.multi_read(any_key_read(caller.keyspace.all_shards, caller.service.random(1 << 62), sink, None))


def count_keys(caller: Caller, bounds: Bounds, then: Callable[[Any], None]) -> None:
    """Count the keys of the range; `then` gets their number, or Failed."""
    caller.multi_read(count_read(caller.keyspace.all_shards, *bounds, _Then(then), None))


def db_size(caller: Caller, arguments: Arguments) -> None:
    """DBSIZE"""
    caller.keyspace.check_range_open(b"", None)
    answer = caller.later()
    count_keys(caller, (b"", None), lambda found: answer(_or_failure(found)))


def flush(caller: Caller, arguments: Arguments) -> None:
    """FLUSHDB, FLUSHALL [ASYNC | SYNC]: each shard in one step, not all of them in the same"""
    if len(arguments) > 1 or (arguments and arguments[0].upper() not in (b"ASYNC", b"SYNC")):
        raise CommandError(SYNTAX)
    caller.keyspace.check_range_open(b"", None)
    answer = caller.later()
    sequencer, shards = caller.service.sequencer, caller.keyspace.shards
    failed: list[Failed] = []
    left = shards

    def then(result: Any) -> None:
        nonlocal left
        left -= 1
        if type(result) is Failed:
            failed.append(result)
        if left:
            return
        if not failed:
            answer(DONE)
            return
        text = error_text(failed[0])
        if len(failed) < shards:
            empty = shards - len(failed)
            text = f"UNKNOWN {empty} of {shards} shards are empty, of the others the first says: {text}"
        answer(Failure(text))

    sink = _Then(then)
    for number in range(shards):
        sequencer.shards[number].write(CLEAR, b"", (None, None), 0, sink, None)


# --- ranges -------------------------------------------------------------------------------------------


def _bounds(lower: bytes, upper: bytes) -> Bounds:
    """Check bounds: `-` is before all keys, `+` is behind them; the lower one is in the range, the upper one is not."""
    if max(len(lower), len(upper)) > KEY_BYTES_MAX + 1:
        raise CommandError(f"ERR a bound is over the limit of {KEY_BYTES_MAX + 1} bytes")
    return b"" if lower == b"-" else lower, None if upper == b"+" else upper


def count(caller: Caller, arguments: Arguments) -> None:
    """KV.COUNT lower upper"""
    bounds = _bounds(arguments[0], arguments[1])
    caller.keyspace.check_range_open(*bounds)
    if bounds[1] is not None and bounds[1] <= bounds[0]:
        caller.answer(0)
        return
    answer = caller.later()
    count_keys(caller, bounds, lambda found: answer(_or_failure(found)))


def range_(caller: Caller, arguments: Arguments) -> None:
    """KV.RANGE lower upper [LIMIT n] [REV] [KEYS]: [[key, value], ...], with KEYS [key, ...]. At most PAGE_ITEMS_MAX
    rows and PAGE_BYTES_MAX bytes, of one point in time; the next page begins behind the last key."""
    bounds = _bounds(arguments[0], arguments[1])
    limit, reverse, keys_only = PAGE_ITEMS_MAX, False, False
    options = iter(arguments[2:])
    for option in options:
        name = option.upper()
        if name == b"LIMIT":
            limit = integer(next(options, b""), NOT_AN_INTEGER)
            if not 1 <= limit <= PAGE_ITEMS_MAX:
                raise CommandError(f"ERR LIMIT must be from 1 to {PAGE_ITEMS_MAX}")
        elif name == b"REV":
            reverse = True
        elif name == b"KEYS":
            keys_only = True
        else:
            raise CommandError(SYNTAX)
    caller.keyspace.check_range_open(*bounds)
    if bounds[1] is not None and bounds[1] <= bounds[0]:
        caller.answer([])
        return
    answer = caller.later()

    def then(page: Any) -> None:
        if type(page) is Failed:
            answer(_or_failure(page))
        else:
            answer([row[0] if keys_only else [row[0], row[1]] for row in page[0]])

    caller.multi_read(_page(caller, bounds, limit, then, reverse, keys_only))
