"""Frames on the link between the coordinator and a node; one FIFO link per node, the same framing as for clients.

Pure. `[kind, ...]`, kinds are numbers on the wire and are never used again for something else.

    coordinator -> node
    HELLO    [1, {version, cluster, secret, epoch, coordinator, link, node, map_version}]   first frame of a link
    BATCH    [3, stamp_ms, commit, items]       the items of one tick; operations.py has their layout
    STOP     [7]                                stop the process cleanly

    node -> coordinator
    REPORT   [2, {node, process, pid, version, durability, shards: [[shard, disk, epoch, seq, chain], ...]}]
    REFUSED  [6, code, message]                 then the node closes the link
    RESULTS  [4, applied, durable, results, flags]
    BACKUP   [5, name, file or nil, error or nil]   the node's file of a backup is finished (or failed)

Every item of a link has an ordinal 1, 2, 3... since HELLO. `commit` is the ordinal up to which every write of the link
is committed. `applied` and `durable` are ordinals: all items up to them are applied, and durable by the chosen mode.
`results` has one result per read and per write with the answer bit, in order, of the items since the last RESULTS.
`flags` are the shards that hold keys past their deadline. Durable ordinals fall on ends of batches.
"""

from typing import Final

HELLO: Final = 1
REPORT: Final = 2
BATCH: Final = 3
RESULTS: Final = 4
BACKUP: Final = 5
REFUSED: Final = 6
STOP: Final = 7

LINK_VERSION: Final = 1
