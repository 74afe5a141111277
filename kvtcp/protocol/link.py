"""Frames on the link between the coordinator and a node; one FIFO link per node, the same framing as for clients.

Pure. `[kind, ...]`, kinds are numbers on the wire and are never used again for something else.

    coordinator -> node
    HELLO    [1, {version, cluster, secret, epoch, coordinator, link, node, durability, map_version, map, shards}]
             first frame of a link; map is the cluster map as JSON, nil before there is one; shards the node's numbers
    BATCH    [3, stamp_ms, commit, items]       the items of one tick; operations.py has their layout
    STOP     [7]                                stop the process cleanly
    FETCH    [8, shard, after]                  send the entries after number `after`
    SHIP     [10, shard, entries]               apply these entries of another member, by their effects

    node -> coordinator
    REPORT   [2, {node, pid, version, durability, stamp_ms, promised, map_version, space, shards, damage}]
             shards: [[shard, disk, generation, complete, epoch, seq, chain, commit], ...]; damage: [[shard, why], ...]
    REFUSED  [6, code, message, promised]       then the node closes the link
    RESULTS  [4, applied, durable, results, flags]
    BACKUP   [5, name, file or nil, error or nil]   the node's file of a backup is finished (or failed)
    ENTRIES  [9, shard, after, chain, entries]  to FETCH: the chain at `after`, nil if the node no longer knows it, and
             [[chain, packed entry], ...] from there on, as many as fit a batch; nil if the node does not have them
    SHIPPED  [11, shard, epoch, seq, chain, error]  to SHIP, when durable: the position, and nil or why not all
    SPACE    [12, level]                        disk space: 0 enough, 1 no growing writes, 2 no writes at all

What a report says is durable, and nothing older than the link changes it any more. FETCH and SHIP come only between the
report and the first BATCH.
Every item of a link has an ordinal 1, 2, 3... since HELLO. `commit` is the ordinal up to which every write of the link
is committed; -1 while anything that the node had before the link is not. `applied` and `durable` are ordinals: all
items up to them are applied, and durable by the chosen mode. `results` has one result per read and per write with the
answer bit, in order, of the items since the last RESULTS. `flags` are the shards that hold keys past their deadline.
Durable ordinals fall on ends of batches.
"""

from typing import Final

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

LINK_VERSION: Final = 2
