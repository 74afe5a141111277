"""SCAN, KEYS, DBSIZE, RANDOMKEY, FLUSHALL, KV.RANGE and KV.COUNT: pages, positions, and what a restore closes."""

from __future__ import annotations

import random

import pytest

from kvtcp.constants import KEY_BYTES_MAX, PAGE_ITEMS_MAX, RESP_KEYS_BYTES_MAX, SCAN_CURSOR_IDLE_MS, SCAN_CURSORS_MAX
from kvtcp.errors import Code
from kvtcp.frontend.resp.patterns import PATTERN_BYTES_MAX
from kvtcp.protocol import operations as op
from tests.support.resp_tools import SHARDS, Client, Error, World, one, parse


def scan(client: Client, cursor: int, *options: str) -> tuple[int, list[bytes]]:
    """One call of SCAN."""
    following, keys = client.ask_range(" ".join(["scan", str(cursor), *options]))
    return int(following), keys


def test_scan_to_the_end() -> None:
    """Every key once, in order, in pages of COUNT; 0 begins and ends."""
    world = World(b"%04d" % n for n in range(95))
    client = world.connect()
    found, cursor, calls = [], 0, 0
    while calls == 0 or cursor:
        cursor, keys = scan(client, cursor)
        assert len(keys) == 10 or not cursor
        found += keys
        calls += 1
    assert found == world.sequencer.keys and calls == 10
    assert scan(client, 0, "count", "95") == (0, found), "the last page says that it is one"
    assert scan(World().connect(), 0) == (0, [])


def test_what_stays_is_seen_exactly_once() -> None:
    """Keys come and go between the calls; those that stay are found once each, whatever the page."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for _ in range(30):
        stay = {b"s%03d" % n for n in range(0, 300, 3)}
        world = World(stay)
        client = world.connect()
        found: list[bytes] = []
        cursor, begun = 0, False
        while not begun or cursor:
            begun = True
            cursor, keys = scan(client, cursor, "count", str(rng.randrange(1, 20)))
            found += keys
            others = {b"s%03d" % rng.randrange(300) for _ in range(40)} | {keys[-1] + b"\0" if keys else b"x"}
            world.sequencer.keys = sorted(stay | others)
        seen = [key for key in found if key in stay]
        assert sorted(seen) == sorted(stay), f"seed {seed}"


def test_match_and_type() -> None:
    """MATCH filters a page, and its prefix bounds the walk; TYPE knows strings only."""
    world = World([b"a:%d" % n for n in range(50)] + [b"b:%d" % n for n in range(50)])
    client = world.connect()
    cursor, keys = scan(client, 0, "match", "*9", "count", "60")
    assert cursor and keys == [b"a:19", b"a:29", b"a:39", b"a:49", b"a:9"]
    tens = [b"b:1", *(b"b:1%d" % n for n in range(10))]
    assert scan(client, 0, "match", "b:1*", "count", "1000") == (0, tens)
    assert scan(client, 0, "match", "b:5", "count", "1") == (0, [b"b:5"])
    assert scan(client, 0, "TYPE", "String", "count", "3")[1] == world.sequencer.keys[:3]
    cursor, keys = scan(client, 0, "type", "list", "count", "3")
    assert cursor and keys == []
    assert scan(client, cursor, "match", "a:0") == (0, []), "behind the bound of the pattern nothing is asked"


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("scan", "ERR wrong number of arguments for 'scan' command"), ("scan x", "ERR invalid cursor"),
        ("scan -1", "ERR invalid cursor"), ("scan 0 count", "ERR syntax error"), ("scan 0 count 0", "ERR syntax error"),
        ("scan 0 count x", "ERR value is not an integer or out of range"), ("scan 0 nosuch 1", "ERR syntax error"),
        ("keys", "ERR wrong number of arguments for 'keys' command"),
        ("dbsize x", "ERR wrong number of arguments for 'dbsize' command"),
        ("randomkey x", "ERR wrong number of arguments for 'randomkey' command"),
        ("flushall later", "ERR syntax error"), ("flushdb sync async", "ERR syntax error"),
        ("kv.range -", "ERR wrong number of arguments for 'kv.range' command"),
        ("kv.range - + limit", "ERR value is not an integer or out of range"),
        ("kv.range - + limit 0", "ERR LIMIT must be from 1 to 1000"),
        ("kv.range - + limit 1001", "ERR LIMIT must be from 1 to 1000"), ("kv.range - + nosuch", "ERR syntax error"),
        ("kv.count -", "ERR wrong number of arguments for 'kv.count' command"),
        (f"kv.count {'x' * 4098} +", "ERR a bound is over the limit of 4097 bytes"),
        (f"keys *{'x' * PATTERN_BYTES_MAX}", f"ERR a pattern is over the limit of {PATTERN_BYTES_MAX} bytes"),
        (f"scan 0 match *{'x' * PATTERN_BYTES_MAX}", f"ERR a pattern is over the limit of {PATTERN_BYTES_MAX} bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(command: str, reply: str, client: Client) -> None:
    """Nothing is asked of the cluster."""
    found = client.ask(command)
    assert type(found) is Error and found == reply and not client.sequencer.multi


# --- positions --------------------------------------------------------------------------------------------


def test_unknown_cursors() -> None:
    """A cursor that is none, or from before a restart, is an error and never a new beginning."""
    world = World(b"%04d" % n for n in range(50))
    client = world.connect()
    cursor, _ = scan(client, 0)
    for number in (cursor + 1, 1, 2**63 - 1):
        assert client.ask(f"scan {number}").startswith(f"ERR the cursor {number} is not known")


def test_idle_cursors() -> None:
    """A position is forgotten after ten minutes in which nobody asked for it; asking keeps it."""
    world = World(b"%04d" % n for n in range(50))
    client = world.connect()
    cursor, _ = scan(client, 0)
    world.now_ms += SCAN_CURSOR_IDLE_MS
    first = scan(client, cursor)
    world.now_ms += SCAN_CURSOR_IDLE_MS
    assert scan(client, cursor)[1] == first[1], "a client may ask again"
    world.now_ms += SCAN_CURSOR_IDLE_MS + 1
    assert "was not used for 10 minutes" in client.ask(f"scan {cursor}")


def test_only_so_many_cursors() -> None:
    """10,000 positions are kept, the oldest goes first."""
    world = World(b"%04d" % n for n in range(50))
    client = world.connect()
    oldest, _ = scan(client, 0)
    second, _ = scan(client, 0)
    for _ in range(SCAN_CURSORS_MAX - 1):
        scan(client, 0)
    assert "is not known" in client.ask(f"scan {oldest}")
    assert scan(client, second)[1] == [b"%04d" % n for n in range(10, 20)]
    assert len(world.service._cursors) <= SCAN_CURSORS_MAX


def test_a_long_scan_crowds_out_nobody() -> None:
    """A scan of more pages than there are positions keeps two of them: others stay."""
    world = World(b"%06d" % n for n in range(SCAN_CURSORS_MAX + 500))
    client = world.connect()
    slow, _ = scan(client, 0)
    cursor, before = scan(client, 0, "count", "1")[0], 0
    for _ in range(SCAN_CURSORS_MAX + 100):
        before, (cursor, keys) = cursor, scan(client, cursor, "count", "1")
    assert keys == [b"%06d" % (SCAN_CURSORS_MAX + 100)]
    assert scan(client, before, "count", "1")[1] == keys, "the last call may be repeated"
    assert scan(client, slow)[1][0] == b"000010"
    assert len(world.service._cursors) < 10


# --- KEYS and the others ----------------------------------------------------------------------------------


def test_keys_over_several_pages() -> None:
    """KEYS walks page by page, one step of the session for each, and answers once."""
    world = World(b"k%05d" % n for n in range(3 * PAGE_ITEMS_MAX + 5))
    client = world.connect()
    client.send("keys *7", "ping")
    pages = 0
    out = client.output()
    while world.sequencer.answer_reads():
        assert not world.sequencer.multi, "the next page is not asked for from within an answer"
        pages += 1
        out += client.output()
    found, pong = parse(out)
    assert found == [key for key in world.sequencer.keys if key.endswith(b"7")] and pong == "PONG" and pages == 4
    assert client.resp.held_bytes == 0


def test_keys_that_are_gathered_count() -> None:
    """What a KEYS has found so far counts as held, and ends it when it is too much."""
    world = World(b"%06d" % n + b"x" * (KEY_BYTES_MAX - 6) for n in range(2500))
    client = world.connect()
    client.send("keys *")
    world.sequencer.answer_reads()
    assert client.resp.held_bytes > PAGE_ITEMS_MAX * KEY_BYTES_MAX
    client.output()
    client.resp.gathered_bytes += 5
    world.sequencer.keys = [b"%06d" % n + b"y" * (KEY_BYTES_MAX - 6) for n in range(1000, 100_000)][:17_000]
    while world.sequencer.answer_reads():
        out = client.output()
    assert one(out) == f"ERR the keys that match are over the limit of {RESP_KEYS_BYTES_MAX} bytes; use SCAN"
    assert client.resp.gathered_bytes == 5, "all of it is off the account"


def test_keys_with_a_long_pattern_takes_small_steps() -> None:
    """The time of a step is that of pattern times keys: a long pattern gets fewer keys at once, and all of them."""
    world = World(b"%04d" % n for n in range(100))
    client = world.connect()
    client.send("keys *" + "*[0-9]" * 150 + "*")
    assert world.sequencer.multi.pop().build([0])[0][4] < 20
    client = world.connect()
    assert client.ask_range("keys " + "*" * 900) == world.sequencer.keys
    assert scan(client, 0, "count", "1000", "match", "*" * 900)[1] == world.sequencer.keys[:17]


def test_keys_of_a_client_that_is_gone() -> None:
    """Nobody walks on for it."""
    world = World(b"k%05d" % n for n in range(3 * PAGE_ITEMS_MAX))
    client = world.connect()
    client.send("keys *")
    client.resp.is_gone = True
    world.sequencer.answer_reads()
    assert not client.resp._deferred and not world.sequencer.multi and client.resp.gathered_bytes == 0


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("dbsize", 5), ("randomkey", b"c"), ("kv.count - +", 5), ("kv.count b d", 2), ("kv.count d b", 0),
        ("kv.count b b", 0), ("kv.range - +", [[key, b"of " + key] for key in (b"a", b"b", b"c", b"d", b"e")]),
        ("kv.range b d", [[b"b", b"of b"], [b"c", b"of c"]]), ("kv.range b + keys limit 2", [b"b", b"c"]),
        ("kv.range - d rev keys limit 2", [b"c", b"b"]), ("kv.range d b", []),
        ("keys *", [b"a", b"b", b"c", b"d", b"e"]), ("keys [b-d]", [b"b", b"c", b"d"]), ("keys b", [b"b"]),
        ("keys x*", []),
    ],
)  # fmt: skip
def test_ranges(command: str, reply: object) -> None:
    """What each answers, of five keys."""
    assert World([b"a", b"b", b"c", b"d", b"e"]).connect().ask_range(command) == reply


def test_randomkey_of_none() -> None:
    """Nothing is nil."""
    assert World().connect().ask_range("randomkey") is None


@pytest.mark.parametrize("command", ["scan 0", "keys *", "dbsize", "randomkey", "kv.count - +", "kv.range - +"])
def test_errors_of_the_cluster(command: str, client: Client) -> None:
    """They are told with the word that says what to do, whether they come at once or later."""
    client.send(command)
    (multi,) = client.sequencer.multi
    multi.sink.fail(multi.token, int(Code.RECOVERING), "wait", {})
    assert parse(client.output()) == ["TRYAGAIN wait"]
    client.sequencer.refuses = (int(Code.SHARD_DOWN), "it is down")
    client.send(command)
    assert parse(client.output()) == ["TRYAGAIN it is down"]


def test_flush() -> None:
    """Each shard is cleared in one step; when only some were, that is said."""
    for command in ("flushall", "flushdb async", "flushall SYNC"):
        client = World().connect()
        client.send(command)
        asked = client.sequencer.asked
        assert [(a.op, a.number, a.args) for a in asked] == [(op.CLEAR, n, (None, None)) for n in range(SHARDS)]
        for each in asked[:-1]:
            each.answer(3)
        assert client.output() == b""
        asked[-1].answer(0)
        assert parse(client.output()) == ["OK"]
    client.send("flushall", "flushall")
    for n, each in enumerate(client.sequencer.asked[SHARDS:]):
        if n in (2, *range(SHARDS, 2 * SHARDS)):
            each.fail(Code.NOT_ENOUGH_REPLICAS)
        else:
            each.answer(1)
    assert parse(client.output()) == [
        f"UNKNOWN {SHARDS - 1} of {SHARDS} shards are empty, of the others the first says: TRYAGAIN it said no",
        "TRYAGAIN it said no",
    ]


@pytest.mark.parametrize(
    ("command", "is_closed"),
    [
        ("keys *", True), ("keys m*", True), ("keys mm", True), ("keys n*", False), ("scan 0", True),
        ("scan 0 match a*", False), ("dbsize", True), ("randomkey", True), ("flushall", True), ("kv.count - +", True),
        ("kv.count a m", False), ("kv.count n +", False), ("kv.range m n", True), ("kv.range n +", False),
        ("get m", True), ("get a", False), ("set ma x", True), ("mget a m", True), ("mset a 1 m 2", True),
        ("rename {m}a m{m}", True), ("msetnx {m}a 1 m{m} 2", True), ("del a m", True), ("watch a m", True),
    ],
)  # fmt: skip
def test_closed_by_a_restore(command: str, is_closed: bool) -> None:
    """What touches the prefix that is restored is refused, and nothing of it is asked; the rest goes on."""
    client = World([b"a"]).connect()
    client.world.keyspace.restoring = b"m"
    client.send(command)
    assert bool(client.sequencer.asked or client.sequencer.multi) != is_closed
    if is_closed:
        assert one(client.output()).startswith("TRYAGAIN keys that begin with")


def test_a_restore_that_begins_during_keys() -> None:
    """The next page is refused, as it would be of a client that asks page by page."""
    world = World(b"k%05d" % n for n in range(2 * PAGE_ITEMS_MAX))
    client = world.connect()
    client.send("keys *")
    world.sequencer.answer_reads()
    world.keyspace.restoring = b""
    assert one(client.output()).startswith("TRYAGAIN all keys are closed")
    assert client.resp.gathered_bytes == 0
