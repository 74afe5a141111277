"""The wire, written down: `tests/support/wire.txt` has every request, reply, code and number as text and hex.

`test_messages.py` compares the file with what this module makes of the code. A difference is a change of the protocol:
if it is meant, run `python -m tests.support.wire_golden`, look at the diff, and say in docs/protocol.md and the
changelog what older clients will meet. Additions are harmless; a changed or vanished line breaks somebody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtcp.constants import PROTOCOL_VERSION
from kvtcp.errors import CLASS_OF, Code
from kvtcp.protocol import link, operations
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.messages import REQUESTS, make_cursor

GOLDEN = Path(__file__).with_name("wire.txt")

# (operation and arguments, results). Every form of every argument appears once.
REQUEST_FORMS: list[tuple[list[Any], list[Any]]] = [
    (["hello", PROTOCOL_VERSION, "golden"],
     [{"server": "kvtcp 0.1.0", "version": 1, "cluster": "c1", "shards": 64, "limits": {"key_bytes_max": 4096}}]),
    (["get", b"k"], [[b"v", 7, None], [b"v", 7, 1500], None]),
    (["put", b"k", b"v"], [7]),
    (["put", "text key", "text value"], [7]),
    (["put", b"k", b"v", {"ttl_ms": 1500}], [7]),
    (["put", b"k", b"v", {"keep_ttl": True}], [7]),
    (["put", b"k", b"v", {}], [7]),
    (["add", b"k", b"v"], [7]),
    (["add", b"k", b"v", {"ttl_ms": 1500}], [7]),
    (["delete", b"k"], [True, False]),
    (["delete", b"k", {"value": b"v"}], [True]),
    (["delete", b"k", {"rev": 7}], [True]),
    (["cas", b"k", b"w", {"value": b"v"}], [8]),
    (["cas", b"k", b"w", {"rev": 7}], [8]),
    (["cas", b"k", b"w", {"rev": 0}], [8]),
    (["incr", b"k", 1], [1]),
    (["incr", b"k", -(2**63)], [-(2**63)]),
    (["exists", b"k"], [True, False]),
    (["mget", [b"a", b"b", b"c"]], [[[b"v", 7, None], None, [30, "busy", {}]]]),
    (["mput", [[b"a", b"v"], [b"b", b"v", 1500], [b"c", b"v", None]]], [[7, 3, [31, "too few", {}]]]),
    (["mdelete", [b"a", b"b"]], [[True, False]]),
    (["expire", b"k", 1500], [True, False]),
    (["expire", b"k", 0], [True]),
    (["persist", b"k"], [True, False]),
    (["ttl", b"k"], [1500, -1, None]),
    (["scan", None, None, 2], [[[[b"a", b"v", 7, None], [b"b", b"v", 3, 1500]], make_cursor(b"b", False)], [[], None]]),
    (["scan", b"a", b"c", 2, {"reverse": True}], [[[[b"b", b"v", 3, None]], make_cursor(b"b", True)]]),
    (["scan", None, None, 1000, {"prefix": b"user:", "keys_only": True}], [[[[b"user:1", None, 7, None]], None]]),
    (["scan", None, None, 2, {"cursor": make_cursor(b"b", False)}], [[[], None]]),
    (["count", None, None], [2]),
    (["count", b"a", b"c"], [2]),
    (["count", None, None, {"prefix": b"user:"}], [1]),
    (["status"], [{}]),
    (["nodes"], [{}]),
    (["shards"], [{}]),
    (["backup"], [{}]),
    (["backup", "monday"], [{}]),
    (["restore", "monday"], [{}]),
    (["restore", "monday", {"mode": "replace", "dry_run": True}], [{}]),
    (["restore", "monday", {"mode": "merge", "prefix": b"user:"}], [{}]),
    (["node_add", "10.0.0.4", 5000], [{"node": "n4"}]),
    (["node_drain", "n1"], [{"node": "n1", "shards": 21}]),
    (["node_undrain", "n1"], [{"node": "n1"}]),
    (["node_remove", "n1"], [{"node": "n1"}]),
    (["node_forget", "n1"], [{"node": "n1"}]),
    (["rebalance"], [{"moves": [[5, "n1", "n4"]], "left": 1}]),
    (["rebalance", {"dry_run": True}], [{"moves": [[5, "n1", "n4"]], "left": 1}]),
    (["shard_accept_loss", 5], [{"shard": 5}]),
]

LINK_FRAMES: list[list[Any]] = [
    [link.HELLO, {
        "version": link.LINK_VERSION, "cluster": "c1", "secret": "s", "epoch": 3, "coordinator": "c", "link": 1,
        "node": "n1", "durability": "sync", "map_version": 9, "heard_version": 7, "map": b"{}", "shards": [0, 5],
    }],
    [link.REPORT, {
        "node": "n1", "pid": 42, "version": "0.1.0", "durability": "sync", "stamp_ms": 1_700_000_000_000, "promised": 3,
        "map_version": 8, "space": 0, "shards": [[0, "d0", 1, True, 3, 7, 12345, 6], [5, "d5", 2, False, 0, 0, 0, 0]],
        "damage": [[5, "segment 3 is damaged"]],
    }],
    [link.BATCH, 1_700_000_000_000, -1, [[operations.PUT, 5, 7, True, b"k", b"v"], [operations.GET, 5, b"k"]]],
    [link.BATCH, 1_700_000_000_000, 2, [
        [operations.LEARN, 5, 1, 7, 3], [operations.UNLEARN, 5], [operations.DROP, 5],
        [operations.DONATE, 5, b"token", 0], [operations.RESULTS_OF, 5, [7, 8]], [operations.AUDIT, [0, 5]],
    ]],
    [link.RESULTS, 8, 2, [
        ["d6", 3, False, 0, 0, 0], None, None, [3, 8, 23456, 500], [[True], None], [[8, 23456], None],
    ], []],
    [link.RESULTS, 2, 1, [7, [b"v", 7, None]], [5]],
    [link.BACKUP, "monday", "n1.jsonl.gz", None],
    [link.REFUSED, "FENCED", "epoch 2 is over", 3, 8],
    [link.STOP],
    [link.FETCH, 5, 7],
    [link.ENTRIES, 5, 7, 12345, [[23456, b"packed entry"]]],
    [link.ENTRIES, 5, 7, None, None],
    [link.SHIP, 5, [[23456, b"packed entry"]]],
    [link.SHIPPED, 5, 3, 8, 23456, None],
    [link.SPACE, 1],
    [link.PULL, 5, "127.0.0.1", 5001, b"token"],
    [link.GIVE, {
        "version": link.LINK_VERSION, "cluster": "c1", "secret": "s", "token": b"token", "directory": b"12345678",
        "generation": 3,
    }],
    [link.LEARNED, 5, "d6", 3, 3, 9, 34567],
    [link.LEARN_FAILED, 5, "the donor is gone"],
    [link.STATS, {
        "operations": 1000, "keys": 500, "log_bytes": 65536, "syncs": 40, "sync_p99_ms": 1.5, "lag_ms": 0.2,
        "memory_bytes": 50_000_000,
    }],
    [link.CHUNK, b"bytes of a snapshot"],
    [link.CHUNK, b""],
    [link.LEAVE],
    [link.ASK, {"version": link.LINK_VERSION, "cluster": "c1", "secret": "s", "node": "n1"}],
    [link.TOLD, {
        "node": "n1", "pid": 42, "version": "0.1.0", "durability": "sync", "stamp_ms": 1_700_000_000_000,
        "promised": 3, "map_version": 8, "space": 0, "shards": [[0, "d0", 1, True, 3, 7, 12345, 6]], "damage": [],
        "map": b"{}", "linked": False,
    }],
]  # fmt: skip


def numbers(module: Any) -> dict[str, int]:
    """The wire numbers of a module: its constants that are integers."""
    return {name: value for name, value in vars(module).items() if name.isupper() and type(value) is int}


def wire_text() -> str:
    """The whole file."""
    encoder, decoder = FrameEncoder(), FrameDecoder()
    lines = ["# The wire of kvtcp. Made by tests/support/wire_golden.py, which says when and how to make it again."]
    lines += ["", "## requests: > request, = checked arguments, < reply"]
    for form, results in REQUEST_FORMS:
        frame = encoder.encode([1, *form])
        (message,) = decoder.feed(frame)
        lines += ["", f"{form!r}", f"> {frame.hex()}", f"= {REQUESTS[message[1]].check(message)!r}"]
        lines += [f"< {encoder.encode([1, int(Code.OK), result]).hex()}  {result!r}" for result in results]
    lines += ["", "## other replies"]
    for reply in ([1, int(Code.PROGRESS), {"done": 1}], [1, int(Code.MISMATCH), "sentence", {"rev": 7}]):
        lines += [f"< {encoder.encode(reply).hex()}  {reply!r}"]
    lines += ["", "## codes"]
    for code in Code:
        lines += [f"{int(code)} {code.name} {CLASS_OF[code].__name__ if code in CLASS_OF else '-'}"]
    lines += ["", "## link frames"]
    lines += [f"{value} {name}" for name, value in numbers(link).items()]
    lines += [f"{encoder.encode(frame).hex()}  {frame!r}" for frame in LINK_FRAMES]
    lines += ["", "## operations and effects"]
    lines += [f"{value} {name}" for name, value in numbers(operations).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(wire_text())
    print(f"wrote {GOLDEN}")
