"""Operations on the link between coordinator and node, and the effects that entries consist of.

Pure. These numbers are on the wire and (effects) in the log: a number is assigned once and never used again.

An item of a batch is an array that starts with its operation:

    write:  [op, shard, seq, answer, key, ...args]      op < WRITE_OP_END; numbered, one entry each
    read:   [op, shard, ...args]                        seen exactly after the items before it

Arguments of the writes (trailing ones may be left out; nil = not given):

    PUT      key, value, ttl_ms, keep_ttl      result: the entry's number (nobody needs to answer it)
    ADD      key, value, ttl_ms                result: rev, or error EXISTS
    DELETE   key, if_value, if_rev             result: bool
    CAS      key, value, if_value, if_rev      result: rev, or error MISMATCH; keeps the deadline; if_rev 0 = absent
    INCR     key, by                           result: the new integer, or NOT_A_NUMBER / RANGE; keeps the deadline
    EXPIRE   key, ttl_ms                       result: bool
    PERSIST  key                               result: bool (true if a deadline was removed)
    PURGE    b"", limit                        result: expired keys deleted
    CLEAR    lower, upper, limit               result: keys deleted in [lower, upper); upper nil = no bound

The result of a write is an int or a bool; an error is the array [code, message, details].

Control items stand in the link's order too and have one result each:

    LEARN        the node's copy is to become one of the members'. From this item on, items of the shard are buffered.
                 fresh 0: the node's own copy is completed by SHIP up to number `last_seq`; then the buffer is applied
                 and the copy is live (LEARNED). nil: there is no complete copy, or it ends above `last_seq`.
                 fresh 1: the copy is replaced by one that is pulled (PULL), of a new disk and generation, which the
                 result tells; the old one stays on the disk until then and is neither read nor written.
                 `last_seq` is the last number before the items that follow here. A second LEARN begins anew.
    UNLEARN      given up: the buffer is dropped, the copy is where it was
    DROP         the copy is removed for good
    DONATE       the shard is frozen here, to be pulled under `token`. With `seq_min`, after an accepted loss, whatever
                 copy there is counts (none: as an empty one), its position is (epoch of the promise, seq_min, chain 0)
    RESULTS_OF   results of writes that may be uncommitted, PUT excepted; nil = not known here
    AUDIT        positions at this place in the link's order; nil = no live copy
"""

from typing import Final

# writes
PUT: Final = 1
ADD: Final = 2
DELETE: Final = 3
CAS: Final = 4
INCR: Final = 5
EXPIRE: Final = 6
PERSIST: Final = 7
PURGE: Final = 8
CLEAR: Final = 9
WRITE_OP_END: Final = 64

# reads of one key: [op, shard, key]
GET: Final = 64  # [value, rev, ttl_ms or nil] or nil
EXISTS: Final = 65  # [rev] or nil
TTL: Final = 66  # [rev, ttl_ms or nil] or nil
# reads over shards of one node
COUNT: Final = 67  # [op, shards, lower, upper] -> integer
# [op, shards, lower, upper, limit, reverse, keys_only] -> [rows, more]; row = [key, value or nil, rev, ttl_ms or nil]
PAGE: Final = 68
MGET: Final = 69  # [op, [[shard, key], ...]] -> [cell or nil, ...] as GET
# control items, also in the link's order
FREEZE: Final = 80  # [op, shards, backup name, directory] -> nil; the file is reported by a BACKUP frame later
CHAIN_AT: Final = 81  # [op, shard] -> [seq, chain]: the position here in the link's order; nil = no live copy
LEARN: Final = 82  # [op, shard, fresh, last_seq] -> [disk, generation, complete, epoch, seq, chain] or nil
UNLEARN: Final = 83  # [op, shard] -> nil
DROP: Final = 84  # [op, shard] -> nil
DONATE: Final = 85  # [op, shard, token, seq_min] -> [epoch, seq, chain, keys]; nil = no live copy
RESULTS_OF: Final = 86  # [op, shard, [seq, ...]] -> [[result] or nil, ...]
AUDIT: Final = 87  # [op, [shard, ...]] -> [[seq, chain] or nil, ...]

# effects of an entry: [kind, key, ...]
SET: Final = 1  # [SET, key, value, deadline_ms or nil]; the revision is the entry's number
REMOVE: Final = 2  # [REMOVE, key]
DEADLINE: Final = 3  # [DEADLINE, key, deadline_ms or nil]; the value stays, the revision is the entry's number
WIPE: Final = 4  # [WIPE]: every key of the shard is removed

WRITE_NAMES: Final = {
    PUT: "put", ADD: "add", DELETE: "delete", CAS: "cas", INCR: "incr",
    EXPIRE: "expire", PERSIST: "persist", PURGE: "purge", CLEAR: "clear",
}  # fmt: skip
