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
CHAIN_AT: Final = 81  # [op, shard] -> [seq, chain]: the position here in the link's order

# effects of an entry: [kind, key, ...]
SET: Final = 1  # [SET, key, value, deadline_ms or nil]; the revision is the entry's number
REMOVE: Final = 2  # [REMOVE, key]
DEADLINE: Final = 3  # [DEADLINE, key, deadline_ms or nil]; the value stays, the revision is the entry's number
WIPE: Final = 4  # [WIPE]: every key of the shard is removed

WRITE_NAMES: Final = {
    PUT: "put", ADD: "add", DELETE: "delete", CAS: "cas", INCR: "incr",
    EXPIRE: "expire", PERSIST: "persist", PURGE: "purge", CLEAR: "clear",
}  # fmt: skip
