"""Every limit and default of kvtcp in one place, with the relations between them asserted.

Pure. Names end in their unit: `_ms` milliseconds, `_s` seconds, `_bytes` bytes; `_max` is an inclusive bound.
A limit that a client can meet is told to it in the reply to `hello`, and named in the error that enforces it.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- protocol ------------------------------------------------------------------------------------
PROTOCOL_VERSION: Final = 1
FRAME_PREFIX_BYTES: Final = 5
FRAME_BYTES_MAX: Final = 16 * MIB
KEY_BYTES_MAX: Final = 4096
VALUE_BYTES_MAX: Final = 8 * MIB
ARRAY_ITEMS_MAX: Final = 65_536
MULTI_KEYS_MAX: Final = 10_000
MULTI_BYTES_MAX: Final = 16 * MIB
PAGE_ITEMS_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 256 * KIB
REQUEST_ID_MAX: Final = 2**32 - 1
TTL_MS_MAX: Final = 100 * 365 * 24 * 3600 * 1000
INTEGER_MIN: Final = -(2**63)
INTEGER_MAX: Final = 2**63 - 1
# longest text a name, an address or a path may have in an administrative request
NAME_BYTES_MAX: Final = 255

# --- cluster -------------------------------------------------------------------------------------
SHARDS_DEFAULT: Final = 64
SHARDS_MAX: Final = 4096
NODES_MAX: Final = 64
NODES_DEFAULT: Final = 3
REPLICATION_FACTOR_DEFAULT: Final = 3
MAIN_PORT_DEFAULT: Final = 8000
BASE_PORT_DEFAULT: Final = 5000
HOST_DEFAULT: Final = "127.0.0.1"

# --- replication ---------------------------------------------------------------------------------
LINK_GRACE_MS: Final = 100
EVICT_AFTER_MS: Final = 1_000
RECOVER_WAIT_MS: Final = 1_000
WRITE_WAIT_MS: Final = 1_000
READ_RETRY_MS: Final = 300
WINDOW_ITEMS_MAX: Final = 4_096
WINDOW_BYTES_MAX: Final = 8 * MIB
BATCH_BYTES_MAX: Final = 256 * KIB
# operations of one shard that may wait, not yet sequenced, for a link or for room in a window
WAITING_ITEMS_MAX: Final = 65_536
# keys that one purge deletes: 1 ms in a shard of 15,000 keys, 3 ms of cache misses in one of a million
PURGE_KEYS_MAX: Final = 500
PURGE_INTERVAL_MS: Final = 1_000
TICK_MS: Final = 50

# --- server buffers ------------------------------------------------------------------------------
CLIENT_OUTPUT_BYTES_MAX: Final = 1 * MIB
CLIENT_INPUT_BYTES_MAX: Final = 16 * MIB
BUFFERED_BYTES_MAX: Final = 256 * MIB
LINK_WRITE_BUFFER_BYTES: Final = 8 * MIB
CLIENT_CONNECTIONS_MAX: Final = 10_000

# --- client and supervision ------------------------------------------------------------------------
CLIENT_TIMEOUT_MS: Final = 2_000
BACKOFF_MIN_MS: Final = 100
BACKOFF_MAX_MS: Final = 5_000
BACKOFF_RESET_MS: Final = 10_000
ORPHAN_MS: Final = 60_000
STOP_MS: Final = 10_000

# --- tree and freeze -----------------------------------------------------------------------------
LEAF_KEYS_MAX: Final = 512
INNER_CHILDREN_MAX: Final = 64
# new keys of a shard that wait, unsorted, for their merge into the tree
FRESH_KEYS_MAX: Final = 1_024
# dictionaries that share the cells of a shard, so that none grows by more than a few ms at once; prime
HASH_PARTS: Final = 31
# of the cyclic collector in a node. The second generation is what costs: it walks every leaf that was made since the
# last one, 2-3 ms for 25,000 new keys. The third one walks all leaves and is put off for good.
GC_THRESHOLDS: Final = (5_000, 5, 1_000)
FREEZE_ROWS: Final = 256
# rows that a merge of frozen shards takes from one of them at a time: all of them at once stay below a slice
MERGE_ROWS: Final = 32
BACKUP_SLICE_MS: Final = 2

# Relations. They are checked at import, so that a changed number cannot break a promise in silence.
assert KEY_BYTES_MAX + VALUE_BYTES_MAX + 64 * KIB < FRAME_BYTES_MAX, "the largest put fits in one frame"
assert MULTI_BYTES_MAX <= FRAME_BYTES_MAX, "an m-request arrives in one frame"
assert MULTI_KEYS_MAX * 2 < ARRAY_ITEMS_MAX, "keys and values of one m-request fit the decoder's array limit"
assert PAGE_ITEMS_MAX < ARRAY_ITEMS_MAX and WINDOW_ITEMS_MAX < ARRAY_ITEMS_MAX, "pages and batches fit the decoder"
assert BATCH_BYTES_MAX + VALUE_BYTES_MAX + KEY_BYTES_MAX + 64 * KIB < FRAME_BYTES_MAX, "one large item fits a batch"
assert BATCH_BYTES_MAX < WINDOW_BYTES_MAX <= BUFFERED_BYTES_MAX, "a window holds several batches"
assert VALUE_BYTES_MAX <= WINDOW_BYTES_MAX, "the largest value fits a window"
assert LINK_GRACE_MS < EVICT_AFTER_MS <= RECOVER_WAIT_MS, "a closed link is noticed before a slow one"
assert READ_RETRY_MS < WRITE_WAIT_MS < CLIENT_TIMEOUT_MS, "a client learns the cluster's answer before it gives up"
assert CLIENT_OUTPUT_BYTES_MAX < CLIENT_INPUT_BYTES_MAX < BUFFERED_BYTES_MAX, "one client cannot use up the total"
assert FRAME_BYTES_MAX <= CLIENT_INPUT_BYTES_MAX, "one whole frame may be buffered for a client"
assert BACKOFF_MIN_MS < BACKOFF_MAX_MS < BACKOFF_RESET_MS, "back-off grows, then is forgotten"
assert NODES_MAX <= SHARDS_MAX, "every node can hold a shard"
