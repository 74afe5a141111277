"""status, nodes and shards as tables: units, columns that fit, sentences that are whole, keys that are missing."""

import io
import itertools
from typing import Any

import pytest

from kvtcp.shell import cluster_view
from kvtcp.shell.output import Output
from kvtcp.shell.text import display_width

NODES: list[dict[str, Any]] = [
    {
        "node": "n1", "address": "10.0.0.1:5000", "state": "up", "reason": "", "shards": 64, "first_of": 22,
        "outstanding": 3, "outstanding_bytes": 4096, "pid": 4711, "member_of": 64, "wanted": 64, "lag_entries": 0,
        "lag_bytes": 0, "learning": 0, "learn_rate_bytes_s": 0, "sync_p99_ms": 1.25, "operations": 1234567,
        "loop_lag_ms": 0.1, "memory_bytes": 734003200, "restarts": 0,
    },
    {
        "node": "n2", "address": "10.0.0.2:5000", "state": "learning", "reason": "", "shards": 64, "first_of": 21,
        "outstanding": 0, "outstanding_bytes": 0, "pid": 4712, "member_of": 60, "wanted": 64, "lag_entries": 120034,
        "lag_bytes": 7340032, "learning": 4, "learn_rate_bytes_s": 4404019.2, "sync_p99_ms": 22.0, "operations": 9,
        "loop_lag_ms": 12.5, "memory_bytes": 1024, "restarts": 2,
    },
    {
        "node": "n3", "address": "10.0.0.3:5000", "state": "down", "member_of": 0, "wanted": 64,
        "reason": "no connection to 10.0.0.3:5000: connection refused, tried again every second",
    },
]  # fmt: skip

SHARDS: list[dict[str, Any]] = [
    {
        "shard": 0, "state": "ok", "nodes": ["n1", "n2"], "epoch": 3, "insync": ["n1", "n2"], "wanted": ["n2", "n1"],
        "learners": [], "lag_entries": 0, "lag_bytes": 0, "commit": 17, "seq": 17, "waiting": 0, "reason": "",
    },
    {
        "shard": 1, "state": "under-replicated", "nodes": ["n1"], "epoch": 3, "insync": ["n1"], "wanted": ["n1", "n4"],
        "learners": [
            {"node": "n4", "donor": "n1", "phase": "pulling", "entries_left": 1204, "entries_shipped": 0, "keys": 9000},
        ],
        "lag_entries": 1204, "lag_bytes": 3355443, "commit": 90, "seq": 91, "waiting": 2, "reason": "n3 was lost",
    },
    {"shard": 2, "state": "down", "insync": ["n3"], "wanted": ["n3"], "reason": "no copy with all its data answers"},
    {"shard": 3, "state": "down", "insync": ["n3"], "wanted": ["n3"], "reason": "no copy with all its data answers"},
    {"shard": 5, "state": "down", "insync": ["n3"], "wanted": ["n3"], "reason": "no copy with all its data answers"},
]  # fmt: skip


def drawn(view: cluster_view.View, columns: int | None) -> list[str]:
    """The lines that a terminal shows of a view."""
    output = Output(io.BytesIO(), "table", is_terminal=False, columns=columns)
    output.table(view.header, view.rows)
    for note in view.notes:
        output.line(note)
    assert isinstance(output.stdout, io.BytesIO)
    return output.stdout.getvalue().decode().splitlines()


def test_nodes() -> None:
    """All columns, with units; the reason and the states stand below."""
    assert drawn(cluster_view.nodes_view(NODES, None), None) == [
        "node  state     address        member_of  wanted  lag               learning  learn_rate  sync_p99  loop_lag  "
        "operations  memory   restarts  shards  first_of  outstanding  pid",
        "----  --------  -------------  ---------  ------  ----------------  --------  ----------  --------  --------  "
        "----------  -------  --------  ------  --------  -----------  ----",
        "n1    up        10.0.0.1:5000  64         64      0                 0         0 B/s       1.25 ms   0.1 ms    "
        "1,234,567   700 MiB  0         64      22        3, 4.0 KiB   4711",
        "n2    learning  10.0.0.2:5000  60         64      120,034, 7.0 MiB  4         4.2 MiB/s   22 ms     12.5 ms   "
        "9           1.0 KiB  2         64      21        0            4712",
        "n3    down      10.0.0.3:5000  0          64      -                 -         -           -         -         "
        "-           -        -         -       -         -            -",
        "n3: no connection to 10.0.0.3:5000: connection refused, tried again every second",
        "3 nodes: 1 up, 1 learning, 1 down",
    ]


def test_nodes_on_a_narrow_terminal() -> None:
    """The less needed columns go first and are named, sentences are wrapped; no line is wider than the terminal."""
    lines = drawn(cluster_view.nodes_view(NODES, 60), 60)
    assert lines == [
        "node  state     member_of  wanted  lag",
        "----  --------  ---------  ------  ----------------",
        "n1    up        64         64      0",
        "n2    learning  60         64      120,034, 7.0 MiB",
        "n3    down      0          64      -",
        "n3: no connection to 10.0.0.3:5000: connection refused,",
        "  tried again every second",
        "3 nodes: 1 up, 1 learning, 1 down",
        "not shown here: address, learning, learn_rate, sync_p99,",
        "  loop_lag, operations, memory, restarts, shards, first_of,",
        "  outstanding, pid (-o json has everything)",
    ]


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 132, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Whatever the width, down to one where only the fixed columns are left; and no sentence loses a word."""
    for view, reasons in (
        (cluster_view.nodes_view(NODES, width), [NODES[2]["reason"]]),
        (cluster_view.shards_view(SHARDS, width), ["n3 was lost", "no copy with all its data answers"]),
    ):
        lines = drawn(view, width)
        assert max(map(display_width, lines)) <= width or width < 30, lines
        together = " ".join(" ".join(lines).split())
        assert all(reason in together for reason in reasons)
    status = {"cluster": "c" * 40, "degraded": ["a sentence of many words that is longer than the terminal is wide"]}
    told = " ".join(text for _, text in cluster_view.status_rows(status, width))
    assert status["degraded"][0] in " ".join(told.split())


def test_shards() -> None:
    """What is wanted shows only where it differs, learners with how far they are, and each reason once."""
    assert drawn(cluster_view.shards_view(SHARDS, None), None) == [
        "shard  state             insync  wanted  lag             commit  seq  epoch  waiting  learners",
        "-----  ----------------  ------  ------  --------------  ------  ---  -----  -------  "
        "----------------------------------",
        "0      ok                n1 n2   =       0               17      17   3      0        -",
        "1      under-replicated  n1      n1 n4   1,204, 3.2 MiB  90      91   3      2        "
        "n4 pulling 1,204 left (9,000 keys)",
        "2      down              n3      =       -               -       -    -      -        -",
        "3      down              n3      =       -               -       -    -      -        -",
        "5      down              n3      =       -               -       -    -      -        -",
        "shard 1: n3 was lost",
        "shards 2-3, 5: no copy with all its data answers",
        "5 shards: 3 down, 1 ok, 1 under-replicated",
    ]


def test_older_and_newer_servers() -> None:
    """Without the new keys the old ones are shown; unknown ones follow under their own names, and go first."""
    old = [{"shard": 0, "state": "ok", "nodes": ["n1", "n2"], "seq": 5, "commit": 5, "waiting": 0, "reason": ""}]
    assert drawn(cluster_view.shards_view(old, None), None) == [
        "shard  state  nodes  commit  seq  waiting",
        "-----  -----  -----  ------  ---  -------",
        "0      ok     n1 n2  5       5    0",
    ]
    new = [{"node": b"n1", "state": b"up", "heat_bytes": 2048, "mood": {"a": 1}}]
    assert drawn(cluster_view.nodes_view(new, None), None) == [
        "node  state  heat_bytes  mood", "----  -----  ----------  ----", "n1    up     2.0 KiB     a=1",
        "1 node: 1 up",
    ]  # fmt: skip
    assert drawn(cluster_view.nodes_view(new, 20), 20)[:3] == ["node  state", "----  -----", "n1    up"]
    assert cluster_view.nodes_view([], 80) == cluster_view.View((), [], [])


VALUES = [None, "", "x", b"\xff", 7, -1, 1.5, float("nan"), True, [], [1, "n1"], {}, {"a": None}, [{"node": None}]]


@pytest.mark.parametrize("width", [None, 30])
def test_any_value_of_any_key_is_shown(width: int | None) -> None:
    """No answer makes it fail: every key may be missing, and hold anything."""
    nodes = cluster_view.NODE_COLUMNS, cluster_view.nodes_view
    for columns, view in (nodes, (cluster_view.SHARD_COLUMNS, cluster_view.shards_view)):
        for key in [*itertools.chain(*(column.keys for column in columns)), "reason"]:
            for value in VALUES:
                assert len(view([{key: value}, {}], width).rows) == 2
    for key in ("degraded", "counters", "state", "moving", "uptime_s", "buffered_bytes"):
        for value in VALUES:
            for name, text in cluster_view.status_rows({key: value}, width):
                assert isinstance(name, str) and isinstance(text, str)


def test_status() -> None:
    """Units by the end of the name, counters with their group, and what is wrong at the end, a sentence a line."""
    status = {
        "state": "degraded",
        "degraded": ["n3 is not linked: connection refused", "3 shards are down, the first is shard 2"],
        "moving": 4, "operations": 10, "buffered_bytes": 2048, "uptime_s": 93784, "loop_lag_ms": 0.5,
        "counters": {"operations": 10, "p99_ms": 2.25, "loop_lag_ms": 0.7},
    }  # fmt: skip
    assert cluster_view.status_rows(status, 40) == [
        ("state", "degraded"), ("moving", "4"), ("buffered_bytes", "2.0 KiB"), ("uptime_s", "1 d 2 h"),
        ("loop_lag_ms", "0.5 ms"), ("counters.operations", "10"), ("counters.p99_ms", "2.25 ms"),
        ("counters.loop_lag_ms", "0.7 ms"), ("degraded", "n3 is not linked:"), ("", "  connection"), ("", "  refused"),
        ("", "3 shards are down,"), ("", "  the first is"), ("", "  shard 2"),
    ]  # fmt: skip
    assert cluster_view.status_rows({"state": "ok", "degraded": []}, 40) == [("state", "ok"), ("degraded", "-")]
    assert cluster_view.status_rows({"state": "ok"}, None) == [("state", "ok")]


def test_units() -> None:
    """Numbers as people say them; what is no number stays as it is."""
    assert [cluster_view.bytes_text(n) for n in (0, 1023, 1024, 102400, 5 * 2**40, 2**60, -2048, "x", None)] == [
        "0 B", "1023 B", "1.0 KiB", "100 KiB", "5.0 TiB", "1048576 TiB", "-2.0 KiB", "x", "-",
    ]  # fmt: skip
    assert [cluster_view.duration_text(s) for s in (0, 0.5, 59, 60, 3_600, 90_061, "x")] == [
        "0 s", "0.5 s", "59 s", "1 min", "1 h", "1 d 1 h", "x",
    ]  # fmt: skip
    assert [cluster_view.count_text(n) for n in (0, 1204, True, 1.5)] == ["0", "1,204", "yes", "1.5"]
    values = ("a_ms", 1.5), ("a_bytes_s", 1024), ("bytes", 7), ("a_s", 61), ("a", 1)
    assert [cluster_view.with_unit(key, value) for key, value in values] == [
        "1.5 ms", "1.0 KiB/s", "7 B", "1 min 1 s", "1",
    ]  # fmt: skip
    assert cluster_view.with_unit("a_ms", None) == "-" and cluster_view.with_unit("a_bytes", True) == "yes"


def test_wrapped() -> None:
    """At spaces only, so that an address or a path can be copied."""
    assert cluster_view.wrapped("a 127.0.0.1:5000 b", 8) == ["a", "  127.0.0.1:5000", "  b"]
    assert cluster_view.wrapped("a b", None) == ["a b"]
