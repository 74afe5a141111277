"""Frames on the link between the coordinator and a node; one FIFO link per node, the same framing as for clients.

Pure. `[kind, ...]`, kinds are numbers on the wire and are never used again for something else.

    coordinator -> node
    HELLO    [1, {version, cluster, secret, epoch, coordinator, link, node, durability, map_version, heard_version, map,
             shards}]   first frame of a link; map is the cluster map as JSON; heard_version the version of it that this
             node has stored, unless its directory is an older copy; shards the node's numbers
    BATCH    [3, stamp_ms, commit, items]       the items of one tick; operations.py has their layout
    STOP     [7]                                stop the process cleanly
    FETCH    [8, shard, after]                  send the entries after number `after`
    SHIP     [10, shard, entries]               apply these entries of another member, by their effects
    PULL     [13, shard, host, port, token]     fetch the copy that the node at this address offers under this token

    node -> coordinator
    REPORT   [2, {node, pid, version, durability, stamp_ms, promised, map_version, space, shards, damage}]
             shards: [[shard, disk, generation, complete, epoch, seq, chain, commit], ...]; damage: [[shard, why], ...]
    REFUSED  [6, code, message, promised, map_version]      then the node closes the link
    RESULTS  [4, applied, durable, results, flags]
    BACKUP   [5, name, file or nil, error or nil]   the node's file of a backup is finished (or failed)
    ENTRIES  [9, shard, after, chain, entries]  to FETCH: the chain at `after`, nil if the node no longer knows it, and
             [[chain, packed entry], ...] from there on, as many as fit a batch; nil if the node does not have them
    SHIPPED  [11, shard, epoch, seq, chain, error]  to SHIP, when durable: the position, and nil or the reason of a stop
    SPACE    [12, level]                        disk space: 0 enough, 1 no growing writes, 2 no writes at all
    LEARNED  [15, shard, disk, generation, epoch, seq, chain]   a copy that was being learned is complete, live, and
             durable up to this position
    LEARN_FAILED  [16, shard, reason]           it cannot be learned; items of it are passed over from here on
    LEAVE    [19]                               the node is about to stop: it leaves the in-sync sets, then gets STOP
    TOLD     [21, {as in REPORT, and map, linked}]      answer to ASK when that is durable; then the node closes
             the connection. map is the cluster map as the last HELLO brought it, nil without one; linked: whether a
             coordinator has a link to the node
    STATS    [17, {operations, keys, log_bytes, syncs, sync_p99_ms, lag_ms, memory_bytes, learn_rate_bytes_s}]
             once a second

    coordinator -> node, on a connection of its own
    ASK      [20, {version, cluster, secret, node}]     first frame; node may be empty: any node. It changes nothing.
             The answer is TOLD or REFUSED

    node -> node, on a connection of its own
    GIVE     [14, {version, cluster, secret, token, directory, generation}]     first frame, to the node that donates;
             directory and generation are those of the copy that is to be made: they stand in the snapshot's header
    CHUNK    [18, bytes]                        answer: the bytes of a snapshot file in pieces; an empty one is the end
    REFUSED  as above                           instead of chunks

The contents of a report are durable, and nothing older than the link changes them. The frames of a link are handled in
their order, batches and others alike. Every item of a link has an ordinal 1, 2, 3... since HELLO. `commit` is the
ordinal up to which every write of the link is committed; -1 while an entry from before the link is not. `applied` and
`durable` are ordinals: all items up to them are applied, and durable by the chosen mode. `results` has one result per
read and per write with the answer bit, in order, of the items since the last RESULTS. `flags` are the shards that hold
keys past their deadline. Durable ordinals fall on ends of batches.

While a shard is *learned* (LEARN in operations.py) its items are buffered and their ordinals acknowledged as if they
were applied; only LEARNED, and entries that are durable after it, count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from kvtcp.errors import ProtocolError

HELLO: Final = 1
REPORT: Final = 2
BATCH: Final = 3
RESULTS: Final = 4
BACKUP: Final = 5
REFUSED: Final = 6
STOP: Final = 7
FETCH: Final = 8
ENTRIES: Final = 9
SHIP: Final = 10
SHIPPED: Final = 11
SPACE: Final = 12
PULL: Final = 13
GIVE: Final = 14
LEARNED: Final = 15
LEARN_FAILED: Final = 16
STATS: Final = 17
CHUNK: Final = 18
LEAVE: Final = 19
ASK: Final = 20
TOLD: Final = 21

LINK_VERSION: Final = 3


class CopyReport(NamedTuple):
    """A node's report of its copy of one shard. Epoch, number and chain are the position, as far as it is durable."""

    replica_id: str
    generation: int = 1
    complete: bool = True
    epoch: int = 0
    seq: int = 0
    chain: int = 0
    commit: int = 0  # highest number that the node knows to be committed; a hint
    damage: str = ""  # the fault that the node found in it, for people


@dataclass(frozen=True)
class Report:
    """The answer of a node that accepted a HELLO."""

    node: str
    pid: int
    durability: str
    stamp_ms: int  # highest it has seen
    promised: int  # the epoch of the HELLO
    map_version: int  # highest it had seen before the HELLO; 0 = none
    space: int
    copies: dict[int, CopyReport]


_REPORT_FIELDS: Final = {
    b"node": bytes, b"pid": int, b"durability": bytes, b"stamp_ms": int, b"promised": int, b"map_version": int,
    b"space": int, b"shards": list, b"damage": list,
}  # fmt: skip
_COPY_TYPES: Final = [int, bytes, int, bool, int, int, int, int]


def is_entry(entry: Any) -> bool:
    """Whether this is [chain, packed entry], as in ENTRIES."""
    return type(entry) is list and len(entry) == 2 and type(entry[0]) is int and type(entry[1]) is bytes


def parse_report(fields: Any) -> Report:
    """The second field of a REPORT frame. Raises ProtocolError."""
    if type(fields) is not dict:
        raise ProtocolError("a report is a map")
    for name, kind in _REPORT_FIELDS.items():
        if type(fields.get(name)) is not kind:
            raise ProtocolError(f"a report has {name.decode()} of type {kind.__name__}")
    try:
        damage = {shard: sentence.decode("utf-8", "replace") for shard, sentence in fields[b"damage"]}
        copies: dict[int, CopyReport] = {}
        for row in fields[b"shards"]:
            if list(map(type, row)) != _COPY_TYPES or row[0] in copies:
                raise ProtocolError("a report has a row for each copy: shard, disk, generation, complete, "
                                    "epoch, seq, chain, commit")  # fmt: skip
            shard, replica_id, *rest = row
            copies[shard] = CopyReport._make([replica_id.decode(), *rest, damage.get(shard, "")])
        node, durability = fields[b"node"].decode(), fields[b"durability"].decode()
    except (TypeError, ValueError, AttributeError) as error:  # of other shapes, or text that is none
        raise ProtocolError(f"a report that cannot be read: {error}") from error
    return Report(
        node, fields[b"pid"], durability, fields[b"stamp_ms"], fields[b"promised"], fields[b"map_version"],
        fields[b"space"], copies,
    )  # fmt: skip


@dataclass(frozen=True)
class Told:
    """The answer of a node to ASK."""

    report: Report  # `promised` and `map_version` are those of the last HELLO; 0 = there was none
    map: bytes  # the cluster map of that HELLO as JSON; empty = it had none
    linked: bool  # a coordinator has a link to the node: its copies may change at once


def parse_told(fields: Any) -> Told:
    """The second field of a TOLD frame. Raises ProtocolError."""
    report = parse_report(fields)
    cluster_map, linked = fields.get(b"map"), fields.get(b"linked")
    if type(cluster_map) not in (bytes, type(None)) or type(linked) is not bool:
        raise ProtocolError("an answer to ASK has a map, or nil, and says whether there is a link")
    return Told(report, cluster_map or b"", linked)


_OPTIONAL_INT = (int, type(None))
_CORE_FRAMES: Final[dict[int, Callable[[Sequence[Any]], bool]]] = {
    ENTRIES: lambda m: len(m) == 5 and type(m[1]) is type(m[2]) is int and type(m[3]) in _OPTIONAL_INT,
    SHIPPED: lambda m: tuple(map(type, m[:5])) == (int,) * 5 and len(m) == 6 and type(m[5]) in (bytes, type(None)),
    LEARNED: lambda m: tuple(map(type, m)) == (int, int, bytes, int, int, int, int),
    LEARN_FAILED: lambda m: tuple(map(type, m)) == (int, int, bytes),
    LEAVE: lambda m: len(m) == 1,
}


def is_core_frame(message: Sequence[Any]) -> bool:
    """Whether a frame of a node is ENTRIES, SHIPPED, LEARNED, LEARN_FAILED or LEAVE, with fields of the right types."""
    check = _CORE_FRAMES.get(message[0])
    return check is not None and check(message)
