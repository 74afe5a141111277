"""The message table: accepted forms, every limit at its edge, the sentences of refusals, and the golden file."""

from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtcp import constants
from kvtcp.errors import Code, ProtocolError, RequestError
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.messages import REQUESTS, Kind, Touches, make_cursor, prefix_bounds, request_id
from tests.support import wire_golden

KEY = b"k" * constants.KEY_BYTES_MAX
VALUE = bytes(constants.VALUE_BYTES_MAX)
BOUND = b"b" * (constants.KEY_BYTES_MAX + 1)
NAME = "é" * (constants.NAME_BYTES_MAX // 2) + "n"


def parse(*request: Any) -> tuple[Any, ...]:
    """The checked arguments of a request that came over the wire."""
    (message,) = FrameDecoder().feed(FrameEncoder().encode([1, *request]))
    assert message[1] == request[0].encode()
    return REQUESTS[message[1]].check(message)


@pytest.mark.parametrize(("request_", "arguments"), [
    (["hello", 1, "me"], (1, "me")),
    (["hello", 1, NAME], (1, NAME)),
    (["get", KEY], (KEY,)),
    (["get", b"\0"], (b"\0",)),
    (["put", "é", ""], ("é".encode(), b"", None, False)),
    (["put", KEY, VALUE], (KEY, VALUE, None, False)),
    (["put", b"k", b"v", {"ttl_ms": 1}], (b"k", b"v", 1, False)),
    (["put", b"k", b"v", {"ttl_ms": constants.TTL_MS_MAX}], (b"k", b"v", constants.TTL_MS_MAX, False)),
    (["put", b"k", b"v", {"ttl_ms": None, "keep_ttl": True}], (b"k", b"v", None, True)),
    (["put", b"k", b"v", {"ttl_ms": 5, "keep_ttl": False}], (b"k", b"v", 5, False)),
    (["add", b"k", b"v"], (b"k", b"v", None)),
    (["add", b"k", VALUE, {b"ttl_ms": 9}], (b"k", VALUE, 9)),
    (["delete", b"k"], (b"k", None, None)),
    (["delete", b"k", {"value": b""}], (b"k", b"", None)),
    (["delete", b"k", {"rev": constants.INTEGER_MAX}], (b"k", None, constants.INTEGER_MAX)),
    (["delete", b"k", {"value": None, "rev": 3}], (b"k", None, 3)),
    (["cas", b"k", b"w", {"value": b"v"}], (b"k", b"w", b"v", None)),
    (["cas", b"k", b"w", {"rev": 0}], (b"k", b"w", None, 0)),
    (["incr", b"k", constants.INTEGER_MIN], (b"k", constants.INTEGER_MIN)),
    (["incr", b"k", constants.INTEGER_MAX], (b"k", constants.INTEGER_MAX)),
    (["exists", b"k"], (b"k",)),
    (["mget", []], ([],)),
    (["mget", [b"a", "b", b"a"]], ([b"a", b"b", b"a"],)),
    (["mdelete", [KEY]], ([KEY],)),
    (["mput", [[b"a", b"1"], [b"b", b"2", None], [b"c", b"3", constants.TTL_MS_MAX]]],
     ([[b"a", b"1"], [b"b", b"2", None], [b"c", b"3", constants.TTL_MS_MAX]],)),
    (["expire", b"k", constants.TTL_MS_MAX], (b"k", constants.TTL_MS_MAX)),
    (["expire", b"k", -constants.TTL_MS_MAX], (b"k", -constants.TTL_MS_MAX)),
    (["persist", b"k"], (b"k",)),
    (["ttl", b"k"], (b"k",)),
    (["scan", None, None, 1], (b"", None, 1, False, False)),
    (["scan", b"", b"", constants.PAGE_ITEMS_MAX], (b"", b"", constants.PAGE_ITEMS_MAX, False, False)),
    (["scan", BOUND, BOUND, 1, {"reverse": True, "keys_only": True}], (BOUND, BOUND, 1, True, True)),
    (["scan", None, None, 1, {"prefix": b"a"}], (b"a", b"b", 1, False, False)),
    (["scan", b"ab", None, 1, {"prefix": b"a"}], (b"ab", b"b", 1, False, False)),
    (["scan", b"", b"ac", 1, {"prefix": b"a"}], (b"a", b"ac", 1, False, False)),
    (["scan", b"b", b"z", 1, {"prefix": b"a"}], (b"b", b"b", 1, False, False)),
    (["scan", b"b", None, 1, {"prefix": b""}], (b"b", None, 1, False, False)),
    (["scan", None, None, 1, {"prefix": b"\xff"}], (b"\xff", None, 1, False, False)),
    (["scan", b"a", b"z", 5, {"cursor": b">c\0"}], (b"c\0", b"z", 5, False, False)),
    (["scan", b"a", b"z", 5, {"cursor": b"<c", "reverse": True}], (b"a", b"c", 5, True, False)),
    (["scan", None, None, 5, {"cursor": b">ab\0", "prefix": b"a"}], (b"ab\0", b"b", 5, False, False)),
    (["scan", b"d", b"z", 5, {"cursor": b">c\0"}], (b"d", b"z", 5, False, False)),
    (["scan", None, None, 5, {"cursor": make_cursor(KEY, False)}], (KEY + b"\0", None, 5, False, False)),
    (["scan", None, None, 5, {"cursor": None, "prefix": None}], (b"", None, 5, False, False)),
    (["count", None, None], (b"", None)),
    (["count", b"a", b"b"], (b"a", b"b")),
    (["count", b"b", None, {"prefix": b"a\xff"}], (b"b", b"b")),
    (["status"], ()),
    (["nodes"], ()),
    (["shards"], ()),
    (["backup"], (None,)),
    (["backup", None], (None,)),
    (["backup", "x" * constants.NAME_BYTES_MAX], ("x" * constants.NAME_BYTES_MAX,)),
    (["restore", "monday"], ("monday", "merge", b"", False)),
    (["restore", "m", {"mode": "replace", "prefix": b"p", "dry_run": True}], ("m", "replace", b"p", True)),
    (["restore", "m", {"prefix": None}], ("m", "merge", b"", False)),
    (["node_add", "db-4.example", 1], ("db-4.example", 1)),
    (["node_add", "fe80::1%eth0", 65535], ("fe80::1%eth0", 65535)),
    (["node_add", "h" * constants.NAME_BYTES_MAX, 5000], ("h" * constants.NAME_BYTES_MAX, 5000)),
    (["node_drain", "n1"], ("n1",)),
    (["node_undrain", "n1"], ("n1",)),
    (["node_remove", NAME], (NAME,)),
    (["node_forget", "n1"], ("n1",)),
    (["rebalance"], (False,)),
    (["rebalance", {}], (False,)),
    (["rebalance", {"dry_run": True}], (True,)),
    (["shard_accept_loss", 0], (0,)),
    (["shard_accept_loss", constants.SHARDS_MAX - 1], (constants.SHARDS_MAX - 1,)),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_accepted_forms(request_: list[Any], arguments: tuple[Any, ...]) -> None:
    """Every form becomes one tuple with defaults filled in, at the edge of every limit."""
    assert parse(*request_) == arguments


KEY_OPS = {
    "get": [], "put": [b"v"], "add": [b"v"], "delete": [], "cas": [b"v", {"rev": 1}], "incr": [1], "exists": [],
    "expire": [1], "persist": [], "ttl": [],
}  # fmt: skip


@pytest.mark.parametrize("op", KEY_OPS)
def test_keys_are_checked_everywhere(op: str) -> None:
    """Each operation with a key refuses the empty, the long and what is not bytes, with the same sentences."""
    rest = KEY_OPS[op]
    with pytest.raises(RequestError, match="a key must not be empty") as caught:
        parse(op, b"", *rest)
    assert (caught.value.code, caught.value.details) == (Code.BAD_REQUEST, {"key_bytes": 0, "key_bytes_min": 1})
    with pytest.raises(RequestError, match=r'the key "k{40}"\.\.\. \(4097 bytes\) is over the limit of 4096') as caught:
        parse(op, KEY + b"k", *rest)
    assert (caught.value.code, caught.value.details) == (
        Code.TOO_LARGE, {"key_bytes": constants.KEY_BYTES_MAX + 1, "key_bytes_max": constants.KEY_BYTES_MAX}
    )  # fmt: skip
    for odd, kind in [(None, "nil"), (7, "an integer"), (True, "a boolean"), (1.5, "a float"), ([], "an array")]:
        with pytest.raises(RequestError, match=f"a key must be bytes or text, not {kind}"):
            parse(op, odd, *rest)


BAD = Code.BAD_REQUEST
LARGE = Code.TOO_LARGE


@pytest.mark.parametrize(("request_", "code", "sentence"), [
    (["hello", 2, "me"], Code.VERSION, "protocol version 2 is not supported, this server speaks 1"),
    (["hello", 0, "me"], BAD, "version must be from 1 to"),
    (["hello", "1", "me"], BAD, "version must be an integer, not bytes"),
    (["hello", True, "me"], BAD, "version must be an integer, not a boolean"),
    (["hello", 1, ""], BAD, "the client's name must be a text of 1 to 255 bytes"),
    (["hello", 1, NAME + "n"], BAD, "the client's name must be a text of 1 to 255 bytes"),
    (["hello", 1, b"\xff"], BAD, "the client's name must be UTF-8 text"),
    (["hello", 1, None], BAD, "the client's name must be a text"),
    (["put", b"k", None], BAD, 'the value of "k" must be bytes or text, not nil'),
    (["put", b"k", 7], BAD, 'the value of "k" must be bytes or text, not an integer'),
    (["put", b"k", VALUE + b"x"], LARGE, 'the value of "k" has 8388609 bytes, the limit is 8388608'),
    (["put", b"k", b"v", {"ttl_ms": 0}], BAD, "ttl_ms must be from 1 to 3153600000000, not 0"),
    (["put", b"k", b"v", {"ttl_ms": constants.TTL_MS_MAX + 1}], BAD, "ttl_ms must be from 1 to 3153600000000"),
    (["put", b"k", b"v", {"ttl_ms": 1.0}], BAD, "ttl_ms must be an integer, not a float"),
    (["put", b"k", b"v", {"ttl_ms": True}], BAD, "ttl_ms must be an integer, not a boolean"),
    (["put", b"k", b"v", {"keep_ttl": 1}], BAD, "keep_ttl must be true or false"),
    (["put", b"k", b"v", {"keep_ttl": True, "ttl_ms": 5}], BAD, "give ttl_ms or keep_ttl, not both"),
    (["put", b"k", b"v", {"ttl": 5}], BAD, 'unknown option "ttl"; known are keep_ttl, ttl_ms'),
    (["put", b"k", b"v", {b"\xff": 5}], BAD, r'unknown option "\xff"; known are keep_ttl, ttl_ms'),
    (["put", b"k", b"v", None], BAD, "the options must be a map, not nil"),
    (["put", b"k", b"v", [1]], BAD, "the options must be a map, not an array"),
    (["add", b"k", VALUE + b"x"], LARGE, "has 8388609 bytes"),
    (["add", b"k", b"v", {"keep_ttl": True}], BAD, 'unknown option "keep_ttl"; known are ttl_ms'),
    (["delete", b"k", {"value": b"v", "rev": 1}], BAD, "give one condition, value or rev, not both"),
    (["delete", b"k", {"rev": -1}], BAD, "rev must be from 0 to"),
    (["delete", b"k", {"rev": 2**63}], BAD, "rev must be from 0 to"),
    (["delete", b"k", {"value": 1}], BAD, 'the value of "k" must be bytes or text, not an integer'),
    (["delete", b"k", {"value": VALUE + b"x"}], LARGE, "has 8388609 bytes"),
    (["cas", b"k", b"w", {}], BAD, "cas needs exactly one condition, value or rev"),
    (["cas", b"k", b"w", {"value": None}], BAD, "cas needs exactly one condition, value or rev"),
    (["cas", b"k", b"w", {"value": b"v", "rev": 1}], BAD, "give one condition, value or rev, not both"),
    (["cas", b"k", 1, {"rev": 1}], BAD, 'the value of "k" must be bytes or text'),
    (["incr", b"k", 2**63], Code.RANGE, "by must be a signed 64-bit integer, not 9223372036854775808"),
    (["incr", b"k", 1.0], BAD, "by must be an integer, not a float"),
    (["incr", b"k", b"1"], BAD, "by must be an integer, not bytes"),
    (["expire", b"k", constants.TTL_MS_MAX + 1], BAD, "ttl_ms must be from -3153600000000 to 3153600000000"),
    (["expire", b"k", -constants.TTL_MS_MAX - 1], BAD, "ttl_ms must be from -3153600000000 to 3153600000000"),
    (["expire", b"k", None], BAD, "ttl_ms must be an integer, not nil"),
    (["mget", b"k"], BAD, "the first argument must be an array; it is mget [key, ...]"),
    (["mget", [b"k"] * (constants.MULTI_KEYS_MAX + 1)], LARGE, "10001 keys in one request are over the limit of 10000"),
    (["mget", [b"k", b""]], BAD, "a key must not be empty"),
    (["mdelete", [[]]], BAD, "a key must be bytes or text, not an array"),
    (["mdelete", {}], BAD, "the first argument must be an array; it is mdelete [key, ...]"),
    (["mput", {b"k": b"v"}], BAD, "the first argument must be an array; it is mput [[key, value, ttl_ms or nil]"),
    (["mput", [[b"k", b"v"]] * (constants.MULTI_KEYS_MAX + 1)], LARGE, "10001 keys in one request"),
    (["mput", [b"k"]], BAD, "an item of mput is an array [key, value] or [key, value, ttl_ms]"),
    (["mput", [[b"k"]]], BAD, "an item of mput is an array"),
    (["mput", [[b"k", b"v", 1, 2]]], BAD, "an item of mput is an array"),
    (["mput", [[b"k", b"v", 0]]], BAD, "ttl_ms must be from 1 to"),
    (["mput", [[b"k", 1]]], BAD, 'the value of "k" must be bytes or text'),
    (["mput", [[b"k", VALUE + b"x"]]], LARGE, "has 8388609 bytes"),
    (["scan", 1, None, 1], BAD, "lower must be bytes, text or nil, not an integer"),
    (["scan", None, [], 1], BAD, "upper must be bytes, text or nil, not an array"),
    (["scan", BOUND + b"b", None, 1], LARGE, "lower is over the limit of 4097 bytes"),
    (["scan", None, BOUND + b"b", 1], LARGE, "upper is over the limit of 4097 bytes"),
    (["scan", None, None, 0], BAD, "limit must be from 1 to 1000, not 0"),
    (["scan", None, None, constants.PAGE_ITEMS_MAX + 1], BAD, "limit must be from 1 to 1000, not 1001"),
    (["scan", None, None, None], BAD, "limit must be an integer, not nil"),
    (["scan", None, None, 1, {"reverse": None}], BAD, "reverse must be true or false"),
    (["scan", None, None, 1, {"keys_only": 0}], BAD, "keys_only must be true or false"),
    (["scan", None, None, 1, {"prefix": 1}], BAD, "prefix must be bytes, text or nil, not an integer"),
    (["scan", None, None, 1, {"prefix": BOUND + b"b"}], LARGE, "prefix is over the limit of 4097 bytes"),
    (["scan", None, None, 1, {"limit": 1}], BAD, "known are cursor, keys_only, prefix, reverse"),
    (["scan", None, None, 1, {"cursor": 1}], BAD, "the cursor is not one that a scan returned"),
    (["scan", None, None, 1, {"cursor": b">"}], BAD, "the cursor is not one that a scan returned"),
    (["scan", None, None, 1, {"cursor": b">" + BOUND + b"b"}], BAD, "the cursor is not one that a scan returned"),
    (["scan", None, None, 1, {"cursor": b"<k"}], BAD, "the cursor belongs to a scan in the other direction"),
    (["scan", None, None, 1, {"cursor": b">k\0", "reverse": True}], BAD, "in the other direction"),
    (["count", 1, None], BAD, "lower must be bytes, text or nil, not an integer"),
    (["count", None, None, {"cursor": b""}], BAD, 'unknown option "cursor"; known are prefix'),
    (["backup", ""], BAD, "the backup's name must be a text of 1 to 255 bytes"),
    (["backup", "x" * (constants.NAME_BYTES_MAX + 1)], BAD, "the backup's name must be a text of 1 to 255 bytes"),
    (["backup", b"\xff"], BAD, "the backup's name must be UTF-8 text"),
    (["restore", None], BAD, "the backup's name must be a text"),
    (["restore", "m", {"mode": "both"}], BAD, "mode must be merge or replace, not 'both'"),
    (["restore", "m", {"mode": 1}], BAD, "mode must be a text"),
    (["restore", "m", {"dry_run": 1}], BAD, "dry_run must be true or false"),
    (["restore", "m", {"prefix": 1}], BAD, "prefix must be bytes, text or nil"),
    (["restore", "m", {"force": True}], BAD, 'unknown option "force"; known are dry_run, mode, prefix'),
    (["node_add", "", 5000], BAD, "host must be a text of 1 to 255 bytes"),
    (["node_add", "h" * (constants.NAME_BYTES_MAX + 1), 5000], BAD, "host must be a text of 1 to 255 bytes"),
    (["node_add", "kvtcp://h", 5000], BAD, 'host must be a name or an address, not "kvtcp://h"'),
    (["node_add", "h\n", 5000], BAD, r'host must be a name or an address, not "h\x0a"'),
    (["node_add", "h", 0], BAD, "port must be from 1 to 65535, not 0"),
    (["node_add", "h", 65536], BAD, "port must be from 1 to 65535, not 65536"),
    (["node_add", "h", "5000"], BAD, "port must be an integer, not bytes"),
    (["node_drain", 1], BAD, "the node's id must be a text of 1 to 255 bytes"),
    (["node_remove", NAME + "n"], BAD, "the node's id must be a text of 1 to 255 bytes"),
    (["node_forget", b"\xff"], BAD, "the node's id must be UTF-8 text"),
    (["rebalance", {"dry_run": 1}], BAD, "dry_run must be true or false"),
    (["rebalance", {"wait": True}], BAD, 'unknown option "wait"; known are dry_run'),
    (["rebalance", None], BAD, "the options must be a map, not nil"),
    (["shard_accept_loss", -1], BAD, "shard must be from 0 to 4095, not -1"),
    (["shard_accept_loss", constants.SHARDS_MAX], BAD, "shard must be from 0 to 4095, not 4096"),
    (["shard_accept_loss", True], BAD, "shard must be an integer, not a boolean"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_refusals(request_: list[Any], code: Code, sentence: str) -> None:
    """Every refusal has its code and names the argument, the limit or the form; keys are shortened."""
    with pytest.raises(RequestError) as caught:
        parse(*request_)
    assert caught.value.code == code
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 250


ARITIES = {
    "hello": (2, 2), "get": (1, 1), "put": (2, 3), "add": (2, 3), "delete": (1, 2), "cas": (3, 3), "incr": (2, 2),
    "exists": (1, 1), "mget": (1, 1), "mput": (1, 1), "mdelete": (1, 1), "expire": (2, 2), "persist": (1, 1),
    "ttl": (1, 1), "scan": (3, 4), "count": (2, 3), "status": (0, 0), "nodes": (0, 0), "shards": (0, 0),
    "backup": (0, 1), "restore": (1, 2), "node_add": (2, 2), "node_drain": (1, 1), "node_undrain": (1, 1),
    "node_remove": (1, 1), "node_forget": (1, 1), "rebalance": (0, 1), "shard_accept_loss": (1, 1),
}  # fmt: skip


KINDS = {
    Kind.WRITE: {"put", "add", "delete", "cas", "incr", "mput", "mdelete", "expire", "persist"},
    Kind.ADMIN: {
        "node_add", "node_drain", "node_undrain", "node_remove", "node_forget", "rebalance", "shard_accept_loss",
    },
    Kind.LONG: {"backup", "restore"},
}  # fmt: skip


def test_kinds() -> None:
    """What changes keys, what changes the cluster, what takes long; everything else is a read."""
    for kind, ops in KINDS.items():
        assert {op.decode() for op, spec in REQUESTS.items() if spec.kind is kind} == ops


def test_touched_keys() -> None:
    """Operations on keys, and no others, say where their keys are."""
    found = {touches: {op.decode() for op, spec in REQUESTS.items() if spec.touches is touches} for touches in Touches}
    assert found[Touches.KEYS] == {"mget", "mput", "mdelete"} and found[Touches.RANGE] == {"scan", "count"}
    assert found[Touches.NOTHING] == {"hello", "status", "nodes", "shards"} | KINDS[Kind.ADMIN] | KINDS[Kind.LONG]
    for op in found[Touches.KEY]:
        form = next(form for form, _ in wire_golden.REQUEST_FORMS if form[0] == op)
        assert parse(*form)[0] == form[1]


def test_the_table_is_complete() -> None:
    """Each operation is in the tests' table and in the golden file's."""
    assert {op.decode() for op in REQUESTS} == set(ARITIES)
    assert {form[0] for form, _ in wire_golden.REQUEST_FORMS} == set(ARITIES)


@pytest.mark.parametrize("op", ARITIES)
def test_wrong_number_of_arguments(op: str) -> None:
    """One too few and one too many are refused with the usage of the operation, before anything else."""
    low, high = ARITIES[op]
    for count in {low - 1, high + 1} - {-1}:
        with pytest.raises(RequestError, match=f"wrong number of arguments: {count}; it is {op}") as caught:
            parse(op, *[None] * count)
        assert caught.value.code == Code.BAD_REQUEST
    for count in range(low, high + 1):
        try:
            parse(op, *[None] * count)
        except RequestError as error:
            assert "wrong number" not in str(error)


def test_request_ids() -> None:
    """Ids are uint32; a message without one cannot be answered."""
    assert request_id([0, b"get"]) == 0
    assert request_id([constants.REQUEST_ID_MAX, b"get", b"k"]) == constants.REQUEST_ID_MAX
    for message in (None, 7, b"get", {}, [], [1], ([1, b"get"],)):
        with pytest.raises(ProtocolError, match=r"a request is an array \[id, op, ...args\]"):
            request_id(message)
    for odd in (-1, constants.REQUEST_ID_MAX + 1, True, 1.0, None, b"1", [1]):
        with pytest.raises(ProtocolError, match="the id of a request is an integer from 0 to 4294967295"):
            request_id([odd, b"get"])


def test_the_bytes_of_one_mput() -> None:
    """Keys and values of an mput are counted together; exactly the limit passes."""
    half = bytes(constants.VALUE_BYTES_MAX - 1)
    items = [[b"a", half], [b"b", half]]
    assert sum(len(key) + len(value) for key, value in items) == constants.MULTI_BYTES_MAX
    assert REQUESTS[b"mput"].check([1, b"mput", items]) == (items,)
    with pytest.raises(RequestError, match="16777217 bytes in one mput are over the limit of 16777216") as caught:
        REQUESTS[b"mput"].check([1, b"mput", [[b"aa", half], [b"b", half]]])
    assert caught.value.code == Code.TOO_LARGE


def test_the_most_keys_of_one_request() -> None:
    """Exactly the limit of keys fits all m-operations, over the wire."""
    keys = [b"%d" % i for i in range(constants.MULTI_KEYS_MAX)]
    assert parse("mget", keys) == (keys,)
    assert parse("mdelete", keys) == (keys,)
    items = [[key, b"v", 1] for key in keys]
    assert parse("mput", items) == (items,)


@given(prefix=st.binary(max_size=5), key=st.binary(max_size=6))
@example(prefix=b"\xff\xff", key=b"\xff\xff\xff")
@example(prefix=b"a\xff", key=b"b")
def test_prefix_bounds(prefix: bytes, key: bytes) -> None:
    """A key is within the bounds exactly if it starts with the prefix."""
    lower, upper = prefix_bounds(prefix)
    assert (lower <= key and (upper is None or key < upper)) == key.startswith(prefix)


@settings(max_examples=300, deadline=None)
@given(
    keys=st.sets(st.binary(min_size=1, max_size=3), max_size=12), lower=st.none() | st.binary(max_size=2),
    upper=st.none() | st.binary(max_size=2), prefix=st.none() | st.binary(max_size=2), limit=st.integers(1, 4),
    reverse=st.booleans(),
)  # fmt: skip
def test_pages_of_a_scan_cover_it_once(
    keys: set[bytes], lower: bytes | None, upper: bytes | None, prefix: bytes | None, limit: int, reverse: bool
) -> None:
    """Following cursors visits each key of the range once, in order; every range is narrowed to what was asked."""
    wanted = sorted(
        (k for k in keys if (lower or b"") <= k and (upper is None or k < upper) and k.startswith(prefix or b"")),
        reverse=reverse,
    )
    seen: list[bytes] = []
    cursor: bytes | None = None
    for _ in range(len(keys) + 2):
        options = {"prefix": prefix, "reverse": reverse, "cursor": cursor}
        low, high, limit, is_reverse, _ = parse("scan", lower, upper, limit, options)
        page = sorted((k for k in keys if low <= k and (high is None or k < high)), reverse=is_reverse)[:limit]
        seen += page
        if not page:
            break
        cursor = make_cursor(page[-1], reverse)
    assert seen == wanted
    assert not page, "the scan ended"


WORDS = [b"ttl_ms", b"keep_ttl", b"value", b"rev", b"reverse", b"prefix", b"cursor", b"mode", b"\xff"]
WIRE_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=8)
    | st.sampled_from([b"ttl_ms", b"prefix", b">k", b"<k", b"merge"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(message=WIRE_VALUES | st.builds(
    lambda number, op, args: [number, op, *args],
    st.integers(0, 9) | WIRE_VALUES, st.sampled_from(sorted(REQUESTS)) | WIRE_VALUES, st.lists(WIRE_VALUES, max_size=5),
))  # fmt: skip
def test_any_message_is_accepted_or_refused(message: Any) -> None:
    """Whatever msgpack can say of an operation gives arguments, or an error; a refusal can be sent."""
    (decoded,) = FrameDecoder().feed(FrameEncoder().encode(message))
    try:
        number = request_id(decoded)
        spec = REQUESTS.get(decoded[1]) if type(decoded[1]) is bytes else None
        if spec is None:
            return
        arguments = spec.check(decoded)
    except ProtocolError as error:
        assert str(error)
    except RequestError as error:
        reply = [number, int(error.code), error.message, error.details]
        assert msgpack.unpackb(FrameEncoder().encode(reply)[5:])[2] == str(error)
    else:
        assert type(arguments) is tuple


def test_the_wire_is_as_written_down() -> None:
    """A change of the wire is a visible difference; `python tests/support/wire_golden.py` writes the file anew."""
    assert wire_golden.wire_text() == wire_golden.GOLDEN.read_text()
