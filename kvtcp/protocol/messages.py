"""The message table: every request a client may send, checked and normalized before anything acts on it.

Pure. A request is `[id, op, ...args]`. `REQUESTS` is the one table of operations: the coordinator, clients and tests
read there how an operation is checked, its effect and the keys it touches. `REQUESTS[op].check(message)` returns
the arguments as one tuple, in the order and with the types the comment of its checker gives, or raises RequestError
with a sentence that names the argument and the limit. `id` is checked by `request_id`: a request without it cannot be
answered, so its error closes the connection.

Replies: `[id, 0, result]`, `[id, 1, progress]` (any number of them before the last), `[id, code, message, details]`.
`docs/protocol.md` shows the whole table with results and errors for people who write a client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, NamedTuple

from kvtcp.constants import (
    INTEGER_MAX,
    INTEGER_MIN,
    KEY_BYTES_MAX,
    MULTI_BYTES_MAX,
    MULTI_KEYS_MAX,
    NAME_BYTES_MAX,
    PAGE_ITEMS_MAX,
    PROTOCOL_VERSION,
    REQUEST_ID_MAX,
    SHARDS_MAX,
    TTL_MS_MAX,
    VALUE_BYTES_MAX,
)
from kvtcp.errors import Code, ProtocolError, RequestError, show_bytes

Message = list[Any]
Checker = Callable[[Message], tuple[Any, ...]]

BACKUP_MODES: Final = ("merge", "replace")
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]+")  # a name, an IPv4 or an IPv6 address


def request_id(message: object) -> int:
    """The id of a request. Raises ProtocolError if there is none: such a peer cannot be answered."""
    if type(message) is not list or len(message) < 2:
        raise ProtocolError("a request is an array [id, op, ...args]")
    if type(message[0]) is not int or not 0 <= message[0] <= REQUEST_ID_MAX:
        raise ProtocolError(f"the id of a request is an integer from 0 to {REQUEST_ID_MAX}")
    return message[0]


def prefix_bounds(prefix: bytes) -> tuple[bytes, bytes | None]:
    """Lower (inclusive) and upper (exclusive, None = no bound) bounds of the keys that start with `prefix`."""
    stripped = prefix.rstrip(b"\xff")
    return prefix, stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


# --- single arguments -------------------------------------------------------------------------------


_KINDS: Final[dict[type, str]] = {
    type(None): "nil", bool: "a boolean", int: "an integer", float: "a float", bytes: "bytes", list: "an array",
    dict: "a map",
}  # fmt: skip


def _kind(value: object) -> str:
    """The type of a decoded value in the words of the wire, for people who write clients in other languages."""
    return _KINDS.get(type(value), type(value).__name__)


def _refuse(text: str, **details: Any) -> RequestError:
    return RequestError(text, Code.BAD_REQUEST, details)


def _too_large(text: str, **details: int) -> RequestError:
    return RequestError(text, Code.TOO_LARGE, details)


def check_key(key: object) -> bytes:
    """A key: 1..KEY_BYTES_MAX bytes."""
    if type(key) is not bytes:
        raise _refuse(f"a key must be bytes or text, not {_kind(key)}")
    if 1 <= len(key) <= KEY_BYTES_MAX:
        return key
    if not key:
        raise _refuse("a key must not be empty", key_bytes=0, key_bytes_min=1)
    text = f"the key {show_bytes(key)} is over the limit of {KEY_BYTES_MAX} bytes"
    raise _too_large(text, key_bytes=len(key), key_bytes_max=KEY_BYTES_MAX)


def check_value(value: object, key: bytes) -> bytes:
    """A value: 0..VALUE_BYTES_MAX bytes."""
    if type(value) is not bytes:
        raise _refuse(f"the value of {show_bytes(key)} must be bytes or text, not {_kind(value)}")
    if len(value) > VALUE_BYTES_MAX:
        text = f"the value of {show_bytes(key)} has {len(value)} bytes, the limit is {VALUE_BYTES_MAX}"
        raise _too_large(text, value_bytes=len(value), value_bytes_max=VALUE_BYTES_MAX)
    return value


def _arity(message: Message, low: int, high: int, usage: str) -> None:
    if not low <= len(message) - 2 <= high:
        raise _refuse(f"wrong number of arguments: {len(message) - 2}; it is {usage}")


def _options(message: Message, index: int, *names: bytes) -> Mapping[bytes, Any]:
    if len(message) <= index:
        return {}
    options = message[index]
    if type(options) is not dict:
        raise _refuse(f"the options must be a map, not {_kind(options)}")
    for name in options:
        if name not in names:
            known = ", ".join(sorted(n.decode() for n in names))
            raise _refuse(f"unknown option {show_bytes(name)}; known are {known}")
    return options


def _integer(number: object, name: str, low: int, high: int) -> int:
    if type(number) is not int:
        raise _refuse(f"{name} must be an integer, not {_kind(number)}")
    if not low <= number <= high:
        raise _refuse(f"{name} must be from {low} to {high}, not {number}", **{name: number})
    return number


def _boolean(options: Mapping[bytes, Any], name: bytes) -> bool:
    value = options.get(name, False)
    if type(value) is not bool:
        raise _refuse(f"{name.decode()} must be true or false")
    return value


def _ttl_ms(options: Mapping[bytes, Any]) -> int | None:
    ttl_ms = options.get(b"ttl_ms")
    return None if ttl_ms is None else _integer(ttl_ms, "ttl_ms", 1, TTL_MS_MAX)


def _bound(bound: object, name: str) -> bytes | None:
    if bound is None:
        return None
    if type(bound) is not bytes:
        raise _refuse(f"{name} must be bytes, text or nil, not {_kind(bound)}")
    if len(bound) > KEY_BYTES_MAX + 1:  # one more: the smallest key above a longest key
        raise _too_large(f"{name} is over the limit of {KEY_BYTES_MAX + 1} bytes")
    return bound


def _condition(message: Message, index: int, key: bytes) -> tuple[bytes | None, int | None]:
    options = _options(message, index, b"value", b"rev")
    value, rev = options.get(b"value"), options.get(b"rev")
    if value is not None and rev is not None:
        raise _refuse("give one condition, value or rev, not both")
    if value is not None:
        check_value(value, key)
    if rev is not None:
        _integer(rev, "rev", 0, INTEGER_MAX)
    return value, rev


def _name(name: object, what: str) -> str:
    if type(name) is not bytes or not 1 <= len(name) <= NAME_BYTES_MAX:
        raise _refuse(f"{what} must be a text of 1 to {NAME_BYTES_MAX} bytes")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise _refuse(f"{what} must be UTF-8 text") from None


# --- requests ---------------------------------------------------------------------------------------


def _hello(m: Message) -> tuple[int, str]:  # version, client name
    _arity(m, 2, 2, "hello version name")
    version = _integer(m[2], "version", 1, 2**31)
    if version != PROTOCOL_VERSION:
        text = f"protocol version {version} is not supported, this server speaks {PROTOCOL_VERSION}"
        raise RequestError(text, Code.VERSION, {"version": PROTOCOL_VERSION})
    return version, _name(m[3], "the client's name")


def _key_only(usage: str) -> Checker:
    def check(m: Message) -> tuple[bytes]:  # key
        _arity(m, 1, 1, usage)
        return (check_key(m[2]),)

    return check


def _put(m: Message) -> tuple[bytes, bytes, int | None, bool]:  # key, value, ttl_ms, keep_ttl
    _arity(m, 2, 3, "put key value {ttl_ms, keep_ttl}")
    key = check_key(m[2])
    value = check_value(m[3], key)
    if len(m) == 4:
        return key, value, None, False
    options = _options(m, 4, b"ttl_ms", b"keep_ttl")
    ttl_ms, keep_ttl = _ttl_ms(options), _boolean(options, b"keep_ttl")
    if keep_ttl and ttl_ms is not None:
        raise _refuse("give ttl_ms or keep_ttl, not both")
    return key, value, ttl_ms, keep_ttl


def _add(m: Message) -> tuple[bytes, bytes, int | None]:  # key, value, ttl_ms
    _arity(m, 2, 3, "add key value {ttl_ms}")
    key = check_key(m[2])
    return key, check_value(m[3], key), _ttl_ms(_options(m, 4, b"ttl_ms"))


def _delete(m: Message) -> tuple[bytes, bytes | None, int | None]:  # key, if_value, if_rev
    _arity(m, 1, 2, "delete key {value or rev}")
    key = check_key(m[2])
    return key, *_condition(m, 3, key)


def _cas(m: Message) -> tuple[bytes, bytes, bytes | None, int | None]:  # key, value, if_value, if_rev
    _arity(m, 3, 3, "cas key value {value or rev}")
    key = check_key(m[2])
    value = check_value(m[3], key)
    if_value, if_rev = _condition(m, 4, key)
    if if_value is None and if_rev is None:
        raise _refuse("cas needs exactly one condition, value or rev")
    return key, value, if_value, if_rev


def _incr(m: Message) -> tuple[bytes, int]:  # key, by
    _arity(m, 2, 2, "incr key by")
    key = check_key(m[2])
    if type(m[3]) is int and not INTEGER_MIN <= m[3] <= INTEGER_MAX:
        raise RequestError(f"by must be a signed 64-bit integer, not {m[3]}", Code.RANGE)
    return key, _integer(m[3], "by", INTEGER_MIN, INTEGER_MAX)


def _expire(m: Message) -> tuple[bytes, int]:  # key, ttl_ms
    _arity(m, 2, 2, "expire key ttl_ms")
    return check_key(m[2]), _integer(m[3], "ttl_ms", -TTL_MS_MAX, TTL_MS_MAX)


def _multi_list(m: Message, usage: str) -> list[Any]:
    _arity(m, 1, 1, usage)
    items = m[2]
    if type(items) is not list:
        raise _refuse(f"the first argument must be an array; it is {usage}")
    if len(items) > MULTI_KEYS_MAX:
        text = f"{len(items)} keys in one request are over the limit of {MULTI_KEYS_MAX}"
        raise _too_large(text, keys=len(items), keys_max=MULTI_KEYS_MAX)
    return items


def _multi_keys(usage: str) -> Checker:
    def check(m: Message) -> tuple[list[bytes]]:  # keys
        return ([check_key(key) for key in _multi_list(m, usage)],)

    return check


def _mput(m: Message) -> tuple[list[list[Any]]]:  # [[key, value] or [key, value, ttl_ms], ...]
    items = _multi_list(m, "mput [[key, value, ttl_ms or nil], ...]")
    total_bytes = 0
    for item in items:
        if type(item) is not list or not 2 <= len(item) <= 3:
            raise _refuse("an item of mput is an array [key, value] or [key, value, ttl_ms]")
        key = check_key(item[0])
        total_bytes += len(key) + len(check_value(item[1], key))
        if len(item) == 3 and item[2] is not None:
            _integer(item[2], "ttl_ms", 1, TTL_MS_MAX)
    if total_bytes > MULTI_BYTES_MAX:
        raise _too_large(f"{total_bytes} bytes in one mput are over the limit of {MULTI_BYTES_MAX}")
    return (items,)


def make_cursor(last_key: bytes, reverse: bool) -> bytes:
    """The cursor after a page that ended with `last_key`. Opaque to clients.

    It is `>` and the lower bound of the rest, or `<` and the upper bound.
    """
    return b"<" + last_key if reverse else b">" + last_key + b"\0"


def _narrow(lower: bytes, upper: bytes | None, low: bytes, high: bytes | None) -> tuple[bytes, bytes | None]:
    if high is not None and (upper is None or high < upper):
        upper = high
    return max(lower, low), upper


# lower, upper (None = none), limit, reverse, keys_only; prefix and cursor have become bounds
def _scan(m: Message) -> tuple[bytes, bytes | None, int, bool, bool]:
    _arity(m, 3, 4, "scan lower upper limit {reverse, keys_only, prefix, cursor}")
    lower, upper = _bound(m[2], "lower") or b"", _bound(m[3], "upper")
    limit = _integer(m[4], "limit", 1, PAGE_ITEMS_MAX)
    options = _options(m, 5, b"reverse", b"keys_only", b"prefix", b"cursor")
    reverse, keys_only = _boolean(options, b"reverse"), _boolean(options, b"keys_only")
    prefix = _bound(options.get(b"prefix"), "prefix")
    if prefix:
        lower, upper = _narrow(lower, upper, *prefix_bounds(prefix))
    cursor = options.get(b"cursor")
    if cursor is not None:
        if type(cursor) is not bytes or not 1 < len(cursor) <= KEY_BYTES_MAX + 2 or cursor[0] not in b"<>":
            raise _refuse("the cursor is not one that a scan returned")
        if not cursor.startswith(b"<" if reverse else b">"):
            raise _refuse("the cursor belongs to a scan in the other direction")
        low, high = (b"", cursor[1:]) if reverse else (cursor[1:], None)
        lower, upper = _narrow(lower, upper, low, high)
    return lower, upper, limit, reverse, keys_only


def _count(m: Message) -> tuple[bytes, bytes | None]:  # lower, upper
    _arity(m, 2, 3, "count lower upper {prefix}")
    lower, upper = _bound(m[2], "lower") or b"", _bound(m[3], "upper")
    prefix = _bound(_options(m, 4, b"prefix").get(b"prefix"), "prefix")
    return _narrow(lower, upper, *prefix_bounds(prefix)) if prefix else (lower, upper)


def _nothing(usage: str) -> Checker:
    def check(m: Message) -> tuple[()]:
        _arity(m, 0, 0, usage)
        return ()

    return check


def _backup(m: Message) -> tuple[str | None]:  # name, None = made from the time
    _arity(m, 0, 1, "backup {name}")
    return (_name(m[2], "the backup's name") if len(m) == 3 and m[2] is not None else None,)


def _restore(m: Message) -> tuple[str, str, bytes, bool]:  # name, mode, prefix (b"" = all), dry_run
    _arity(m, 1, 2, "restore name {mode, prefix, dry_run}")
    options = _options(m, 3, b"mode", b"prefix", b"dry_run")
    mode = _name(options.get(b"mode", b"merge"), "mode")
    if mode not in BACKUP_MODES:
        raise _refuse(f"mode must be merge or replace, not {mode!r}")
    name = _name(m[2], "the backup's name")
    return name, mode, _bound(options.get(b"prefix"), "prefix") or b"", _boolean(options, b"dry_run")


def _node_add(m: Message) -> tuple[str, int]:  # host, port
    _arity(m, 2, 2, "node_add host port")
    host = _name(m[2], "host")
    if not _HOST.fullmatch(host):
        raise _refuse(f"host must be a name or an address, not {show_bytes(m[2])}")
    return host, _integer(m[3], "port", 1, 65535)


def _node_only(usage: str) -> Checker:
    def check(m: Message) -> tuple[str]:  # node
        _arity(m, 1, 1, usage)
        return (_name(m[2], "the node's id"),)

    return check


def _rebalance(m: Message) -> tuple[bool]:  # dry_run
    _arity(m, 0, 1, "rebalance {dry_run}")
    return (_boolean(_options(m, 2, b"dry_run"), b"dry_run"),)


def _shard_accept_loss(m: Message) -> tuple[int]:  # shard
    _arity(m, 1, 1, "shard_accept_loss shard")
    return (_integer(m[2], "shard", 0, SHARDS_MAX - 1),)


class Kind(Enum):
    """The effect of a request. Its sender knows by it how to go about a missing answer."""

    READ = "read"  # changes nothing: may always be repeated
    WRITE = "write"  # changes keys, perhaps without an answer: never repeated blindly
    ADMIN = "admin"  # changes the cluster and no key; else as a write
    LONG = "long"  # as ADMIN, with progress: its time runs out only without progress


class Touches(Enum):
    """The keys that a request touches, by its checked arguments."""

    NOTHING = "nothing"
    KEY = "key"  # the first argument
    KEYS = "keys"  # the first argument is a list of them, or of lists that each begin with one
    RANGE = "range"  # lower and upper bound are the first two


class RequestSpec(NamedTuple):
    """One operation of clients. `check` returns the arguments of a message, or raises RequestError."""

    check: Checker
    kind: Kind
    touches: Touches = Touches.NOTHING


REQUESTS: Final[dict[bytes, RequestSpec]] = {
    b"hello": RequestSpec(_hello, Kind.READ),
    b"get": RequestSpec(_key_only("get key"), Kind.READ, Touches.KEY),
    b"put": RequestSpec(_put, Kind.WRITE, Touches.KEY),
    b"add": RequestSpec(_add, Kind.WRITE, Touches.KEY),
    b"delete": RequestSpec(_delete, Kind.WRITE, Touches.KEY),
    b"cas": RequestSpec(_cas, Kind.WRITE, Touches.KEY),
    b"incr": RequestSpec(_incr, Kind.WRITE, Touches.KEY),
    b"exists": RequestSpec(_key_only("exists key"), Kind.READ, Touches.KEY),
    b"mget": RequestSpec(_multi_keys("mget [key, ...]"), Kind.READ, Touches.KEYS),
    b"mput": RequestSpec(_mput, Kind.WRITE, Touches.KEYS),
    b"mdelete": RequestSpec(_multi_keys("mdelete [key, ...]"), Kind.WRITE, Touches.KEYS),
    b"expire": RequestSpec(_expire, Kind.WRITE, Touches.KEY),
    b"persist": RequestSpec(_key_only("persist key"), Kind.WRITE, Touches.KEY),
    b"ttl": RequestSpec(_key_only("ttl key"), Kind.READ, Touches.KEY),
    b"scan": RequestSpec(_scan, Kind.READ, Touches.RANGE),
    b"count": RequestSpec(_count, Kind.READ, Touches.RANGE),
    b"status": RequestSpec(_nothing("status"), Kind.READ),
    b"nodes": RequestSpec(_nothing("nodes"), Kind.READ),
    b"shards": RequestSpec(_nothing("shards"), Kind.READ),
    b"backup": RequestSpec(_backup, Kind.LONG),
    b"restore": RequestSpec(_restore, Kind.LONG),
    b"node_add": RequestSpec(_node_add, Kind.ADMIN),
    b"node_drain": RequestSpec(_node_only("node_drain node"), Kind.ADMIN),
    b"node_undrain": RequestSpec(_node_only("node_undrain node"), Kind.ADMIN),
    b"node_remove": RequestSpec(_node_only("node_remove node"), Kind.ADMIN),
    b"node_forget": RequestSpec(_node_only("node_forget node"), Kind.ADMIN),
    b"rebalance": RequestSpec(_rebalance, Kind.ADMIN),
    b"shard_accept_loss": RequestSpec(_shard_accept_loss, Kind.ADMIN),
}
