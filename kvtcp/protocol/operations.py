"""Operations on the link between coordinator and node, and the effects that entries consist of.

Pure. These numbers are on the wire and (effects) in the log: a number is assigned once and never used again.

An item of a batch is an array that starts with its operation:

    write:  [op, shard, seq, answer, key, ...args]      op < WRITE_OP_END; numbered, one entry each
    read:   [op, shard, ...args]                        seen exactly after the items before it

Arguments of the writes (trailing ones may be left out; nil = not given):

    PUT      key, value, ttl_ms, keep_ttl      result: the entry's number (known without an answer)
    ADD      key, value, ttl_ms                result: rev, or error EXISTS
    DELETE   key, if_value, if_rev             result: bool
    CAS      key, value, if_value, if_rev      result: rev, or error MISMATCH; keeps the deadline; if_rev 0 = absent
    INCR     key, by                           result: the new integer, or NOT_A_NUMBER / RANGE; keeps the deadline
    EXPIRE   key, ttl_ms                       result: bool
    PERSIST  key                               result: bool (true if a deadline was removed)
    PURGE    b"", limit                        result: expired keys deleted
    CLEAR    lower, upper, limit               result: keys deleted in [lower, upper); upper nil = no bound

Arguments of the writes of strings.py, which keep the deadline unless they say otherwise. A deadline is given as two
arguments `mode, ms`: KEEP_DEADLINE, NO_DEADLINE, IN_MS (from the stamp) or AT_MS (since 1970).

    STORE        key, value, mode, ms, condition, if_value, get     result: bool, or with `get` the old value or nil;
                 condition: ALWAYS, IF_ABSENT, IF_PRESENT, IF_EQUAL (to if_value)
    TAKE         key                           deleted; result: the old value or nil
    TOUCH        key, mode, ms                 the deadline is changed; result: the value or nil
    EXPIRE_IF    key, mode, ms, condition      result: bool; ALWAYS, IF_ABSENT, IF_PRESENT (a deadline), IF_LATER or
                 IF_EARLIER than it (none is later than all), IF_PRESENT_EARLIER
    APPEND       key, value                    result: the new length, or TOO_LARGE
    SETRANGE     key, offset, value            result: the new length, or TOO_LARGE; the gap is filled with zero bytes
    SETBIT       key, offset, bit              result: the old bit, or TOO_LARGE; bit 0 is the highest of byte 0
    INCR_DECIMAL key, by                       by and result: decimal texts; NOT_A_NUMBER, RANGE
    RENAME       key, new_key, if_absent       the deadline goes with it; result: RENAMED, NEW_KEY_EXISTS or NO_KEY
    COPY         key, new_key, replace         a copy has the same one; result: bool
    PUT_ALL      key, pairs, if_absent         [[key, value], ...] of one shard, without deadline; result: bool, false
                 if `if_absent` and one of the keys was there
    TRANSACTION  key, watched, ops             [[key, rev], ...], rev 0 = absent; [[op, key, ...args], ...], writes and
                 reads of one key, of one shard, each sees those before it; result: [results], or nil if the revision of
                 a watched key is another one, or TOO_LARGE. An error is a result like others and undoes nothing.

The result of a write is an integer, a boolean, bytes or nil; an error is the array [code, message, details]. A result
that is a list is the only element of an array.

Control items stand in the link's order too and have one result each:

    LEARN        the node's copy is to become one of the members'. From this item on, items of the shard are buffered.
                 fresh 0: the node's own copy is completed by SHIP up to number `last_seq`; then the buffer is applied
                 and the copy is live (LEARNED). nil: there is no complete copy, or it ends above `last_seq`.
                 fresh 1: the copy is replaced by one that is pulled (PULL), of a new replica id and generation, which
                 the result has; the old one stays on the disk until then and is neither read nor written.
                 `last_seq` is the last number before the items that follow here. A second LEARN starts over.
    UNLEARN      learning is given up: the buffer is dropped, the copy is where it was
    DROP         the copy is removed for good
    DONATE       the shard is frozen here, to be pulled under `token`. With `seq_min`, after an accepted loss, any copy
                 counts (none: as an empty one), its position is (epoch of the promise, seq_min, chain 0)
    RESULTS_OF   results of writes that may be uncommitted, PUT excepted; nil = not known here. If they are large, only
                 those of the first writes, at least one: the coordinator asks again for the others
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
STORE: Final = 10
TAKE: Final = 11
TOUCH: Final = 12
EXPIRE_IF: Final = 13
APPEND: Final = 14
SETRANGE: Final = 15
SETBIT: Final = 16
INCR_DECIMAL: Final = 17
RENAME: Final = 18
COPY: Final = 19
PUT_ALL: Final = 20
TRANSACTION: Final = 21
WRITE_OP_END: Final = 64

# reads of one key: [op, shard, key]
GET: Final = 64  # [value, rev, ttl_ms or nil] or nil
EXISTS: Final = 65  # [rev] or nil
TTL: Final = 66  # [rev, ttl_ms or nil] or nil
DEADLINE_OF: Final = 70  # [rev, deadline_ms or nil] or nil
REVISION: Final = 72  # [rev] or nil
# reads over shards of one node
COUNT: Final = 67  # [op, shards, lower, upper] -> integer
# [op, shards, lower, upper, limit, reverse, keys_only] -> [keys, values or nil, revs, ttls_ms or nil, more], of one
# length each; no values with keys_only, no ttls_ms if no row has one
PAGE: Final = 68
MGET: Final = 69  # [op, [[shard, key], ...]] -> [cell or nil, ...] as GET
ANY_KEY: Final = 71  # [op, shards, number] -> [key or nil, keys]: one of all keys, each equally likely if the number is
# control items, also in the link's order
FREEZE: Final = 80  # [op, shards, backup name, directory] -> nil; the file is reported by a BACKUP frame later
LEARN: Final = 82  # [op, shard, fresh, last_seq] -> [disk, generation, complete, epoch, seq, chain] or nil
UNLEARN: Final = 83  # [op, shard] -> nil
DROP: Final = 84  # [op, shard] -> nil
DONATE: Final = 85  # [op, shard, token, seq_min] -> [epoch, seq, chain, keys]; nil = no live copy
RESULTS_OF: Final = 86  # [op, shard, [seq, ...]] -> [[result] or nil, ...]
# [op, [shard, ...]] -> [[seq, chain] or nil, ...]: the positions here in the link's order; nil = no live copy
AUDIT: Final = 87

# effects of an entry: [kind, key, ...]
SET: Final = 1  # [SET, key, value, deadline_ms or nil]; the revision is the entry's number
REMOVE: Final = 2  # [REMOVE, key]
DEADLINE: Final = 3  # [DEADLINE, key, deadline_ms or nil]; the value stays, the revision is the entry's number
WIPE: Final = 4  # [WIPE]: every key of the shard is removed
# [PATCH, key, offset, bytes]: the bytes replace those of the value, which grows if they go beyond its end (with zero
# bytes before them, if they begin there); the deadline stays
PATCH: Final = 5
CLONE: Final = 6  # [CLONE, key, source]: value and deadline become those of the source

# modes of deadlines
KEEP_DEADLINE: Final = 0
NO_DEADLINE: Final = 1
IN_MS: Final = 2
AT_MS: Final = 3
# conditions
ALWAYS: Final = 0
IF_ABSENT: Final = 1
IF_PRESENT: Final = 2
IF_EQUAL: Final = 3
IF_LATER: Final = 4
IF_EARLIER: Final = 5
IF_PRESENT_EARLIER: Final = 6
# results of RENAME
RENAMED: Final = 1
NEW_KEY_EXISTS: Final = 0
NO_KEY: Final = -1

WRITE_NAMES: Final = {
    PUT: "put", ADD: "add", DELETE: "delete", CAS: "cas", INCR: "incr",
    EXPIRE: "expire", PERSIST: "persist", PURGE: "purge", CLEAR: "clear",
    STORE: "store", TAKE: "take", TOUCH: "touch", EXPIRE_IF: "expire if", APPEND: "append", SETRANGE: "set range",
    SETBIT: "set bit", INCR_DECIMAL: "incr decimal", RENAME: "rename", COPY: "copy", PUT_ALL: "put all",
    TRANSACTION: "transaction",
}  # fmt: skip
