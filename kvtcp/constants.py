"""Every limit and default of kvtcp in one place, with the relations between them asserted.

Pure. Names end in their unit: `_ms` milliseconds, `_s` seconds, `_bytes` bytes; `_max` is an inclusive bound.
A limit that a client can meet stands in the reply to `hello`, and in the text of the error that enforces it.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- protocol ------------------------------------------------------------------------------------
PROTOCOL_VERSION: Final = 1
FRAME_PREFIX_BYTES: Final = 5
FRAME_BYTES_MAX: Final = 16 * MIB
# Frames between coordinator and node. The largest item of a client fits behind a batch or results of usual size.
LINK_FRAME_BYTES_MAX: Final = 2 * FRAME_BYTES_MAX
KEY_BYTES_MAX: Final = 4096
VALUE_BYTES_MAX: Final = 8 * MIB
ARRAY_ITEMS_MAX: Final = 65_536
MAP_ITEMS_MAX: Final = 65_536
# Containers (arrays and maps) of one message: an empty one is a byte on the wire and 80 bytes of memory. The largest
# legal number is the cells of several full m-reads in one frame of a node's results.
MESSAGE_CONTAINERS_MAX: Final = 262_144
# Larger reads of a socket are fed to the decoder in pieces, which bounds the buffer that a connection keeps.
READ_CHUNK_BYTES_MAX: Final = 64 * KIB
# Bodies up to this size are decoded straight from the stream; larger ones must be complete first.
STREAMED_BODY_BYTES_MAX: Final = 2 * KIB
MULTI_KEYS_MAX: Final = 10_000
MULTI_BYTES_MAX: Final = 16 * MIB
# All keys of one mget together, because they travel in one link item.
MGET_KEYS_BYTES_MAX: Final = 8 * MIB
# All values that one node returns for one mget.
MGET_VALUES_BYTES_MAX: Final = 15 * MIB
# Bytes that a transaction may copy by changing parts of values: every change copies its whole value. Takes 30 ms.
TRANSACTION_COPY_BYTES_MAX: Final = 256 * MIB
PAGE_ITEMS_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 256 * KIB
REQUEST_ID_MAX: Final = 2**32 - 1
# --- the Redis protocol: an inline command is one line, any other command is an array
RESP_LINE_BYTES_MAX: Final = 64 * KIB
RESP_ARGUMENTS_MAX: Final = 65_536
RESP_COMMAND_BYTES_MAX: Final = 16 * MIB
# Most keys one command may name. MGET is exempt: it sends all keys in one link item.
RESP_KEYS_MAX: Final = 20_000
# Cursors of SCAN that are remembered, and how long an unused one is.
SCAN_CURSORS_MAX: Final = 10_000
SCAN_CURSOR_IDLE_MS: Final = 600_000
# Bytes of keys in one answer to KEYS, with 16 bytes added for each key.
RESP_KEYS_BYTES_MAX: Final = 64 * MIB
TTL_MS_MAX: Final = 100 * 365 * 24 * 3600 * 1000
INTEGER_MIN: Final = -(2**63)
INTEGER_MAX: Final = 2**63 - 1
# Longest name, address or path in an administrative request.
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
# A member leaves its shards this long after its link closed, unless the link is back.
LINK_GRACE_MS: Final = 100
# A member leaves its shards when its oldest unacknowledged item is this old and its peers acknowledged theirs.
EVICT_AFTER_MS: Final = 1_000
# Time a node has to accept a connection, and again to answer its first frame. Also the time after which a shard is down
# when all its members have lost their data.
RECOVER_WAIT_MS: Final = 1_000
# How long a request may wait for a link or for room in a window before it is refused.
WRITE_WAIT_MS: Final = 1_000
# A read is repeated on another member after this long without a word from the node that has it.
READ_RETRY_MS: Final = 300
# A link on which nothing moved in either direction for this long is closed and dialled again. By then no client with
# the default timeout waits for anything on it.
LINK_SILENCE_MS: Final = 2_000
WINDOW_ITEMS_MAX: Final = 4_096
WINDOW_BYTES_MAX: Final = 8 * MIB
BATCH_BYTES_MAX: Final = 256 * KIB
# Requests that the coordinator reads before it sends batches and answers, so that nodes and clients have work while it
# reads on. (50 connections, depth 16: SET 12 % more, GET 4 %; depth 64: 17 % and 10 %. A value of 64 costs more CPU
# than it wins.)
SEND_REQUESTS: Final = 256
# Entries that a node keeps because they may be uncommitted. It keeps more only if more may really be uncommitted.
KEPT_BYTES_MAX: Final = 64 * MIB
# Bound for one shard when that is exceeded: a window with the item that crosses its bytes. That item may have an entry
# of any size: a purge is small, its entry is not.
KEPT_SHARD_BYTES_MAX: Final = WINDOW_BYTES_MAX + FRAME_BYTES_MAX
# Entries that one slice of a pass over the backlog checks. Takes 1 ms.
KEPT_PASS_ENTRIES: Final = 4_096
# Committed entries that a node keeps for nodes that were away, and the overhead counted for each of them.
RECENT_BYTES_MAX: Final = 32 * MIB
RECENT_ENTRY_BYTES: Final = 32
# Operations of one shard that may wait for a link or for room in a window, not yet sequenced.
WAITING_ITEMS_MAX: Final = 65_536
# Keys that one purge deletes: 1 ms in a shard of 15,000 keys, 3 ms of cache misses in a shard of a million.
PURGE_KEYS_MAX: Final = 500
# Shards that are purged in one tick. All of 4,096 at once would be seconds of work and gigabytes of entries.
PURGE_SHARDS_MAX: Final = 8
# Reads over several shards that may wait for a link or for room in a window.
WAITING_MULTI_MAX: Final = 1_024
# Requests of one shard that are sequenced in its turn, when several shards wait for the same window.
DRAIN_SLICE: Final = 64
# Large results of uncommitted writes that a node remembers for one shard.
WRITE_RESULTS_BYTES_MAX: Final = 32 * MIB
# A node interrupts a batch to send its results when their values reach this size.
RESULTS_BYTES_MAX: Final = 1 * MIB
PURGE_INTERVAL_MS: Final = 1_000
# How far ahead of the clock the bound of all stamps is stored. It is moved when the clock is closer to it than
# STAMP_MOVE_MS.
STAMP_AHEAD_MS: Final = 10_000
STAMP_MOVE_MS: Final = 5_000
# Pause before the bound of stamps is moved again after the config store refused it.
BOUND_RETRY_MS: Final = 1_000
# Pause before a change of the map with an unknown outcome is sent again.
MAP_RESEND_MS: Final = 200
# A learner that holds no write back is given up after this time without an acknowledgement.
LEARNER_EVICT_AFTER_MS: Final = 5_000
# A node that was evicted for being slow may learn again after this time; no other node is evicted before.
SLOW_INTERVAL_MS: Final = 10_000
# Learners to which one node ships entries at the same time. Whole copies are sent one after another.
LEARNERS_PER_DONOR_MAX: Final = 2
# Entries shipped in one piece: 2 ms at either end. (The p99 of puts meanwhile is twice that of a quiet time; with
# 256 KiB and four learners a donor it was nine times.)
SHIP_BYTES_MAX: Final = 32 * KIB
# Interval at which all members are asked for the chains of their shards, to be compared.
AUDIT_INTERVAL_MS: Final = 10_000
# Shards that a takeover brings up to date at the same time.
RECOVERY_SHARDS_MAX: Final = 8
TICK_MS: Final = 50
HEARTBEAT_MS: Final = 500

# --- learning and donating ----------------------------------------------------------------------
# Items that a node buffers for all shards it is learning, the overhead counted for each, and how many are applied in
# one step (1 ms).
LEARN_BUFFER_BYTES_MAX: Final = 32 * MIB
LEARN_ITEM_BYTES: Final = 200
LEARN_APPLY_ITEMS: Final = 512
# Bytes that a donor sends in a second over all its transfers, and the share of its event loop that may take.
BULK_BYTES_PER_S: Final = 32 * MIB
BULK_SLICE_MS: Final = 1
BULK_SHARE: Final = 0.25
BULK_CHUNK_BYTES: Final = 64 * KIB
BULK_WRITE_BUFFER_BYTES: Final = 2 * MIB
# Both ends give a transfer up after this long without progress: the donor if nothing is read, the receiver if nothing
# arrives.
DONATION_IDLE_MS: Final = 10_000
# Interval of STATS frames, and of loop-lag samples.
STATS_MS: Final = 1_000
LAG_LOOK_MS: Final = 50

# --- server buffers ------------------------------------------------------------------------------
CLIENT_OUTPUT_BYTES_MAX: Final = 1 * MIB
CLIENT_INPUT_BYTES_MAX: Final = 16 * MIB
BUFFERED_BYTES_MAX: Final = 256 * MIB
LINK_WRITE_BUFFER_BYTES: Final = 8 * MIB
CLIENT_CONNECTIONS_MAX: Final = 10_000
# A client's socket is not read while this many of its requests are unanswered.
CLIENT_OUTSTANDING_MAX: Final = 16_384
# A client must complete a frame within this time.
FRAME_WAIT_MS: Final = 30_000

# --- client and supervision ------------------------------------------------------------------------
CLIENT_TIMEOUT_MS: Final = 2_000
# A client gives a backup or a restore up after this long without a report of progress.
CLIENT_ADMIN_IDLE_MS: Final = 60_000
# Longest interval between two such reports of the coordinator.
PROGRESS_MS: Final = 2_000
# Deadlines of calls are rounded up to ticks of this length, so a timeout is late by one tick at most.
CLIENT_TICK_MS: Final = 20
# A connection is given up when a call timed out and nothing was received for this long.
CLIENT_SILENCE_MS: Final = 5_000
# Pause before a call is repeated or a connection is tried again: a random time from 0 to a bound that grows from MIN
# to MAX.
CLIENT_BACKOFF_MIN_MS: Final = 10
CLIENT_BACKOFF_MAX_MS: Final = 500
CLIENT_CLOSE_MS: Final = 1_000
# Unanswered requests of one client; the request that crosses the bound is still sent.
CLIENT_OUTSTANDING_BYTES_MAX: Final = 8 * MIB
CLIENT_WRITE_BUFFER_BYTES: Final = 1 * MIB
# One request of put_many, get_many and delete_many, and how many are in flight at once.
CLIENT_CHUNK_BYTES: Final = 1 * MIB
CLIENT_CHUNK_KEYS_MAX: Final = 1_000
CLIENT_CHUNKS_MAX: Final = 8
BACKOFF_MIN_MS: Final = 100
BACKOFF_MAX_MS: Final = 5_000
BACKOFF_RESET_MS: Final = 10_000
ORPHAN_MS: Final = 60_000
STOP_MS: Final = 9_000
# A stopping node waits this long for the coordinator to take it out of the in-sync sets.
LEAVE_MS: Final = 1_000
# A stopping coordinator waits this long for open requests, then this long for the config store to take its last stamp.
# After that it stops its nodes, within STOP_MS.
DRAIN_MS: Final = 500
LEAVE_TIME_MS: Final = 300

# --- import ---------------------------------------------------------------------------------------
# Bytes read from a file, or returned by a decompressor, in one step.
IMPORT_BLOCK_BYTES: Final = 256 * KIB
# One put_many of an import ends at the first of both limits; and how many are in flight at once.
IMPORT_CHUNK_RECORDS: Final = 500
IMPORT_CHUNK_BYTES: Final = 256 * KIB
IMPORT_CHUNKS_MAX: Final = 8

# --- tree and freeze -----------------------------------------------------------------------------
LEAF_KEYS_MAX: Final = 768
INNER_CHILDREN_MAX: Final = 64
# New keys of a shard that wait, unsorted, to be merged into the tree.
FRESH_KEYS_MAX: Final = 1_024
# Thresholds of the cyclic collector in a server. A young collection takes 0.1 ms, one of the second generation 0.7 ms;
# with (50,000, 50, 100) a collection took up to 8 ms. The price: put_many takes a quarter more CPU on the nodes, an
# eighth more on the coordinator. The third generation would visit all leaves and cells, 0.4 s for a million keys; its
# threshold is billions of allocations away.
GC_THRESHOLDS: Final = (1_000, 4, 1_000_000)
# Cells that a node makes between two young collections that it starts itself. The collector counts allocations less
# deallocations, so overwriting collects hundreds of thousands of young cells uncounted, until some other allocation
# pays 100 ms for all of them; 4,096 take 0.3 ms. A collection stops tracking a cell, so each is visited once. (The p99
# of puts while snapshots run is 23 to 39 ms instead of 230.)
YOUNG_CELLS_MAX: Final = 4_096
FREEZE_ROWS: Final = 256
# Rows that a merge of frozen shards reads from one shard at a time: one read of every shard fits a slice.
MERGE_ROWS: Final = 32
BACKUP_SLICE_MS: Final = 2

# --- durability ----------------------------------------------------------------------------------
DURABILITIES: Final = ("sync", "os", "memory")
DURABILITY_DEFAULT: Final = "sync"
LOG_FORMAT_VERSION: Final = 1
SNAPSHOT_FORMAT_VERSION: Final = 1
MANIFEST_FORMAT_VERSION: Final = 1
SEGMENT_BYTES_MAX: Final = 64 * MIB
# One group commit writes at most the windows of a lost link and of the next one, with the items that crossed them.
LOG_RECORD_BYTES_MAX: Final = 128 * MIB
# An idle log gets an empty record after this time: its durable mark covers the record before it.
LOG_IDLE_MS: Final = 100
# Snapshots are taken when the log is longer than this and longer than all snapshots together.
SNAPSHOT_LOG_BYTES: Final = 64 * MIB
SNAPSHOT_FRAME_ROWS: Final = 256
SNAPSHOT_FRAME_BYTES: Final = 256 * KIB  # a frame ends with the row that reaches it
# A snapshot pauses while this many of its bytes wait for the disk.
SNAPSHOT_BUFFER_BYTES: Final = 8 * MIB
# A snapshot takes the event loop for one slice at a time, and for this share of the time over all slices. The share is
# small, so that clients hardly notice; it is larger when the log grows faster than snapshots free it, or when the disk
# is nearly full.
SNAPSHOT_SLICE_MS: Final = 1
SNAPSHOT_SHARE: Final = 0.05
SNAPSHOT_SHARE_URGENT: Final = 0.25
# A snapshot is synced every so many bytes, so that a sync of the log never waits for much.
SNAPSHOT_SYNC_BYTES: Final = 4 * MIB
# Growing writes are refused below this much free space plus the length of the log and of the largest snapshot: so much
# is needed to snapshot what is in the log. Below half of the reserve alone, all writes are refused.
SPACE_RESERVE_BYTES: Final = 48 * MIB
SPACE_LOOK_MS: Final = 200
RECOVERY_PROGRESS_MS: Final = 1_000

# --- files ---------------------------------------------------------------------------------------
# Longest JSON line of one pair: every byte of key and value escaped as \u00xx, and the rest of the object.
JSON_LINE_BYTES_MAX: Final = 6 * (KEY_BYTES_MAX + VALUE_BYTES_MAX) + 4 * KIB
BACKUP_FORMAT_VERSION: Final = 1
# Lines of a backup file that share one crc32 in the manifest, which locates damage.
BACKUP_BLOCK_LINES: Final = 100
BACKUP_WRITE_BYTES: Final = 64 * KIB
BACKUP_NAME_CHARS_MAX: Final = 100

# Relations, checked at import: a changed number cannot break a promise silently.
assert KEY_BYTES_MAX + VALUE_BYTES_MAX + 64 * KIB < FRAME_BYTES_MAX, "the largest put fits in one frame"
assert MULTI_BYTES_MAX <= FRAME_BYTES_MAX, "an m-request arrives in one frame"
assert IMPORT_CHUNK_RECORDS <= MULTI_KEYS_MAX, "a chunk of an import is one request"
assert IMPORT_CHUNK_BYTES + JSON_LINE_BYTES_MAX // 6 < MULTI_BYTES_MAX, "a full chunk has room for one more large pair"
assert MULTI_KEYS_MAX * 2 < ARRAY_ITEMS_MAX, "keys and values of one m-request fit the decoder's array limit"
assert MULTI_KEYS_MAX * 10 < MESSAGE_CONTAINERS_MAX, "an m-request has one array for every key"
assert STREAMED_BODY_BYTES_MAX < ARRAY_ITEMS_MAX and STREAMED_BODY_BYTES_MAX < READ_CHUNK_BYTES_MAX < FRAME_BYTES_MAX, (
    "a body decoded from the stream is small in every respect"
)
assert PAGE_ITEMS_MAX < ARRAY_ITEMS_MAX and WINDOW_ITEMS_MAX < ARRAY_ITEMS_MAX, "pages and batches fit the decoder"
assert BATCH_BYTES_MAX + VALUE_BYTES_MAX + KEY_BYTES_MAX + 64 * KIB < FRAME_BYTES_MAX, "one large item fits a batch"
assert BATCH_BYTES_MAX + MGET_KEYS_BYTES_MAX + 8 * MULTI_KEYS_MAX + 64 * KIB < FRAME_BYTES_MAX, (
    "the keys of an mget fit a batch"
)
assert RESULTS_BYTES_MAX + max(MGET_VALUES_BYTES_MAX, VALUE_BYTES_MAX) + 2 * MIB < LINK_FRAME_BYTES_MAX, (
    "a nearly full frame of results has room for the largest result, small results and framing"
)
assert MGET_VALUES_BYTES_MAX < WRITE_RESULTS_BYTES_MAX // 2, "the largest result is remembered"
assert 4 * DRAIN_SLICE <= WINDOW_ITEMS_MAX, "several shards get a turn when a window opens"
assert FRAME_BYTES_MAX + BATCH_BYTES_MAX + RESULTS_BYTES_MAX + MIB < LINK_FRAME_BYTES_MAX, (
    "whatever fits a frame of a client fits a frame of a link, behind its other content"
)
assert BATCH_BYTES_MAX < WINDOW_BYTES_MAX <= BUFFERED_BYTES_MAX, "a window holds several batches"
assert VALUE_BYTES_MAX <= WINDOW_BYTES_MAX, "the largest value fits a window"
assert 2 * KEPT_SHARD_BYTES_MAX < KEPT_BYTES_MAX, "one full window alone starts no pass over the backlog"
assert WINDOW_ITEMS_MAX < 2 * KEPT_PASS_ENTRIES, "a batch commits more entries of a backlog than it adds"
assert WINDOW_BYTES_MAX + KEY_BYTES_MAX + VALUE_BYTES_MAX < KEPT_SHARD_BYTES_MAX, "a window fits, with any last item"
assert WINDOW_BYTES_MAX + FRAME_BYTES_MAX + WINDOW_ITEMS_MAX * LEARN_ITEM_BYTES < LEARN_BUFFER_BYTES_MAX, (
    "a window of items fits the buffer of a learner"
)
assert BULK_CHUNK_BYTES < BULK_WRITE_BUFFER_BYTES < BULK_BYTES_PER_S, "a donor writes a little at a time"
assert LAG_LOOK_MS < STATS_MS < DONATION_IDLE_MS, "STATS covers many samples"
assert LINK_GRACE_MS < EVICT_AFTER_MS <= RECOVER_WAIT_MS, "a closed link is noticed before a slow one"
assert EVICT_AFTER_MS < LEARNER_EVICT_AFTER_MS < SLOW_INTERVAL_MS, "a learner has more time than a member"
assert 4 * EVICT_AFTER_MS < SLOW_INTERVAL_MS, "a slow node does not leave and come back all the time"
assert 2 * HEARTBEAT_MS <= EVICT_AFTER_MS < LINK_SILENCE_MS, "a heartbeat arrives before a link counts as silent"
assert READ_RETRY_MS < WRITE_WAIT_MS < CLIENT_TIMEOUT_MS, "the cluster answers before a client gives up"
assert CLIENT_OUTPUT_BYTES_MAX < CLIENT_INPUT_BYTES_MAX < BUFFERED_BYTES_MAX, "one client cannot use up the total"
assert FRAME_BYTES_MAX <= CLIENT_INPUT_BYTES_MAX, "one whole frame may be buffered for a client"
assert CLIENT_TICK_MS < CLIENT_TIMEOUT_MS < CLIENT_SILENCE_MS < CLIENT_ADMIN_IDLE_MS, "silence outlasts a slow call"
assert 10 * PROGRESS_MS < CLIENT_ADMIN_IDLE_MS, "a working coordinator is not taken for a lost one"
assert CLIENT_BACKOFF_MIN_MS < CLIENT_BACKOFF_MAX_MS < CLIENT_TIMEOUT_MS, "a call is tried several times"
assert CLIENT_CHUNK_KEYS_MAX <= MULTI_KEYS_MAX, "a chunk is one m-request"
assert CLIENT_CHUNK_BYTES + VALUE_BYTES_MAX + KEY_BYTES_MAX < MULTI_BYTES_MAX, "a chunk with the largest value fits"
assert CLIENT_CHUNKS_MAX * CLIENT_CHUNK_BYTES <= CLIENT_OUTSTANDING_BYTES_MAX, "all chunks in flight fit the bound"
assert TICK_MS < MAP_RESEND_MS and 10 * MAP_RESEND_MS < STAMP_MOVE_MS < STAMP_AHEAD_MS, (
    "the bound of stamps is moved long before a stamp reaches it, even by a second attempt"
)
assert 2 * (WINDOW_BYTES_MAX + FRAME_BYTES_MAX) <= SPACE_RESERVE_BYTES, "what is in flight fits half of the reserve"
assert 2 * (WINDOW_BYTES_MAX + LINK_FRAME_BYTES_MAX) < LOG_RECORD_BYTES_MAX, "one group commit fits a record"
assert DURABILITY_DEFAULT in DURABILITIES, "the default is one of the modes"
assert BACKOFF_MIN_MS < BACKOFF_MAX_MS < BACKOFF_RESET_MS, "back-off grows, then is reset"
assert 2 * LEAVE_MS < STOP_MS * 4 // 10, "a node has time to leave before it is killed"
assert DRAIN_MS + LEAVE_TIME_MS + STOP_MS < 10_000, "a coordinator stops within 10 s"
assert NODES_MAX <= SHARDS_MAX, "every node can hold a shard"
assert BACKUP_NAME_CHARS_MAX + 20 < NAME_BYTES_MAX, "the name of its temporary directory is legal too"
