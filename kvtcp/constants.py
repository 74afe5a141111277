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
# between coordinator and node: the largest item a client can send or ask for, behind a batch or results of usual size
LINK_FRAME_BYTES_MAX: Final = 2 * FRAME_BYTES_MAX
KEY_BYTES_MAX: Final = 4096
VALUE_BYTES_MAX: Final = 8 * MIB
ARRAY_ITEMS_MAX: Final = 65_536
MAP_ITEMS_MAX: Final = 65_536
# containers (arrays and maps) of one message: an empty one is a byte on the wire and 80 bytes of memory; the most that
# is sent are the cells of several full m-reads in one frame of a node's results
MESSAGE_CONTAINERS_MAX: Final = 262_144
# larger reads of a socket are fed to the decoder in pieces: it bounds the buffer that a connection keeps
READ_CHUNK_BYTES_MAX: Final = 64 * KIB
# bodies up to this size are decoded straight from the stream, larger ones are first checked for completeness
STREAMED_BODY_BYTES_MAX: Final = 2 * KIB
MULTI_KEYS_MAX: Final = 10_000
MULTI_BYTES_MAX: Final = 16 * MIB
# keys of one mget together: they travel in one item of a link
MGET_KEYS_BYTES_MAX: Final = 8 * MIB
# values that one node returns for one mget
MGET_VALUES_BYTES_MAX: Final = 15 * MIB
# values that a transaction changes in places, each as often as it does: 30 ms
TRANSACTION_COPY_BYTES_MAX: Final = 256 * MIB
PAGE_ITEMS_MAX: Final = 1_000
PAGE_BYTES_MAX: Final = 256 * KIB
REQUEST_ID_MAX: Final = 2**32 - 1
# --- the Redis protocol: a line as it is typed; a command as an array
RESP_LINE_BYTES_MAX: Final = 64 * KIB
RESP_ARGUMENTS_MAX: Final = 65_536
RESP_COMMAND_BYTES_MAX: Final = 16 * MIB
# keys of one command, but for MGET, which asks for all in one item of a link
RESP_KEYS_MAX: Final = 20_000
# positions of SCAN that are remembered, and for how long nobody asks for one
SCAN_CURSORS_MAX: Final = 10_000
SCAN_CURSOR_IDLE_MS: Final = 600_000
# keys that one KEYS may answer with, with 16 bytes more for each
RESP_KEYS_BYTES_MAX: Final = 64 * MIB
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
# nothing moves on a link in either direction for so long: it is closed and dialled again. No client of the default
# timeout waits any more for what is on it.
LINK_SILENCE_MS: Final = 2_000
WINDOW_ITEMS_MAX: Final = 4_096
WINDOW_BYTES_MAX: Final = 8 * MIB
BATCH_BYTES_MAX: Final = 256 * KIB
# requests that are read before the coordinator sends what they led to, without reading on: nodes and clients have work
# meanwhile. (50 connections, depth 16: SET 12 % more, GET 4 %; depth 64: 17 % and 10 %. 64 took more CPU than it won.)
SEND_REQUESTS: Final = 256
# entries that a node keeps because they may be uncommitted; more only if so many really may be
KEPT_BYTES_MAX: Final = 64 * MIB
# of one shard then: a window, with the item that crosses its bytes, which may be any (a purge is small, its entry not)
KEPT_SHARD_BYTES_MAX: Final = WINDOW_BYTES_MAX + FRAME_BYTES_MAX
# entries looked at together for those that need not be kept: 1 ms
KEPT_PASS_ENTRIES: Final = 4_096
# committed entries that a node keeps for nodes that were away, each counted with so much for what stands around it
RECENT_BYTES_MAX: Final = 32 * MIB
RECENT_ENTRY_BYTES: Final = 32
# operations of one shard that may wait, not yet sequenced, for a link or for room in a window
WAITING_ITEMS_MAX: Final = 65_536
# keys that one purge deletes: 1 ms in a shard of 15,000 keys, 3 ms of cache misses in one of a million
PURGE_KEYS_MAX: Final = 500
# shards that are purged in one tick: those of 4,096 at once would be seconds of work, and gigabytes of entries
PURGE_SHARDS_MAX: Final = 8
# reads over several shards that may wait for a link or for room in a window
WAITING_MULTI_MAX: Final = 1_024
# requests of one shard that are sequenced in its turn when several shards waited for the same window
DRAIN_SLICE: Final = 64
# large results of writes of one shard that a node remembers because they may be uncommitted
WRITE_RESULTS_BYTES_MAX: Final = 32 * MIB
# values in one frame of results before a node sends it and goes on with the batch
RESULTS_BYTES_MAX: Final = 1 * MIB
PURGE_INTERVAL_MS: Final = 1_000
# how far ahead of the clock the bound of all stamps is stored, and how near to it the clock comes before it is moved
STAMP_AHEAD_MS: Final = 10_000
STAMP_MOVE_MS: Final = 5_000
# pause before the bound of stamps is moved again after the config store refused it
BOUND_RETRY_MS: Final = 1_000
# pause before a change of the map is sent again whose outcome is unknown
MAP_RESEND_MS: Final = 200
# a learner that acknowledged nothing for so long, and holds nobody back, is given up
LEARNER_EVICT_AFTER_MS: Final = 5_000
# a node that was let go for its slowness learns again after this time, and no other one is let go before
SLOW_INTERVAL_MS: Final = 10_000
# learners that one node gives entries to at the same time; whole copies it gives one after the other
LEARNERS_PER_DONOR_MAX: Final = 2
# entries shipped at once: 2 ms at either end. (p99 of puts meanwhile: twice that of a quiet time; with 256 KiB and four
# learners of a donor it was nine times.)
SHIP_BYTES_MAX: Final = 32 * KIB
# all links are asked in one step for the chains of their shards, to be compared
AUDIT_INTERVAL_MS: Final = 10_000
# shards that a takeover brings up to date at the same time
RECOVERY_SHARDS_MAX: Final = 8
TICK_MS: Final = 50
HEARTBEAT_MS: Final = 500

# --- learning and donating ----------------------------------------------------------------------
# items that a node buffers for all shards it is learning, each counted with so much for itself; and how many of them
# are applied at once (1 ms)
LEARN_BUFFER_BYTES_MAX: Final = 32 * MIB
LEARN_ITEM_BYTES: Final = 200
LEARN_APPLY_ITEMS: Final = 512
# what a donor sends in a second, of all its donations, and what share of its event loop that may take
BULK_BYTES_PER_S: Final = 32 * MIB
BULK_SLICE_MS: Final = 1
BULK_SHARE: Final = 0.25
BULK_CHUNK_BYTES: Final = 64 * KIB
BULK_WRITE_BUFFER_BYTES: Final = 2 * MIB
# a donation of which nothing is taken for so long is let go; a transfer of which nothing comes for so long is given up
DONATION_IDLE_MS: Final = 10_000
# a node tells its figures so often, and looks so often how late its loop is
STATS_MS: Final = 1_000
LAG_LOOK_MS: Final = 50

# --- server buffers ------------------------------------------------------------------------------
CLIENT_OUTPUT_BYTES_MAX: Final = 1 * MIB
CLIENT_INPUT_BYTES_MAX: Final = 16 * MIB
BUFFERED_BYTES_MAX: Final = 256 * MIB
LINK_WRITE_BUFFER_BYTES: Final = 8 * MIB
CLIENT_CONNECTIONS_MAX: Final = 10_000
# requests of one client that may be unanswered before its socket is not read any more
CLIENT_OUTSTANDING_MAX: Final = 16_384
# a frame that a client began must be complete after this time
FRAME_WAIT_MS: Final = 30_000

# --- client and supervision ------------------------------------------------------------------------
CLIENT_TIMEOUT_MS: Final = 2_000
# how long a backup or a restore may show no progress before its caller gives up
CLIENT_ADMIN_IDLE_MS: Final = 60_000
# their coordinator says how far it is at least this often
PROGRESS_MS: Final = 2_000
# deadlines of calls are kept in ticks of this length, so a timeout is late by at most one
CLIENT_TICK_MS: Final = 20
# nothing heard for so long while a call ran out of time: the connection is given up
CLIENT_SILENCE_MS: Final = 5_000
# pauses before a call is repeated and before a connection is tried again; each is drawn from 0 to the bound
CLIENT_BACKOFF_MIN_MS: Final = 10
CLIENT_BACKOFF_MAX_MS: Final = 500
CLIENT_CLOSE_MS: Final = 1_000
# bytes of requests of one client without an answer; one more request than fits is let through
CLIENT_OUTSTANDING_BYTES_MAX: Final = 8 * MIB
CLIENT_WRITE_BUFFER_BYTES: Final = 1 * MIB
# one request of put_many, get_many and delete_many, and how many of them are under way at once
CLIENT_CHUNK_BYTES: Final = 1 * MIB
CLIENT_CHUNK_KEYS_MAX: Final = 1_000
CLIENT_CHUNKS_MAX: Final = 8
BACKOFF_MIN_MS: Final = 100
BACKOFF_MAX_MS: Final = 5_000
BACKOFF_RESET_MS: Final = 10_000
ORPHAN_MS: Final = 60_000
STOP_MS: Final = 9_000
# a node that is about to stop gives its coordinator so long to let it go from the in-sync sets
LEAVE_MS: Final = 1_000
# a coordinator that stops gives open requests so long to be answered, and the config store so long to take its last
# stamp, before STOP_MS for its nodes begins
DRAIN_MS: Final = 500
LEAVE_TIME_MS: Final = 300

# --- import ---------------------------------------------------------------------------------------
# one read of a file, and what a decompressor may return at once
IMPORT_BLOCK_BYTES: Final = 256 * KIB
# one put_many of an import ends at whichever comes first; so many may be on their way
IMPORT_CHUNK_RECORDS: Final = 500
IMPORT_CHUNK_BYTES: Final = 256 * KIB
IMPORT_CHUNKS_MAX: Final = 8

# --- tree and freeze -----------------------------------------------------------------------------
LEAF_KEYS_MAX: Final = 768
INNER_CHILDREN_MAX: Final = 64
# new keys of a shard that wait, unsorted, for their merge into the tree
FRESH_KEYS_MAX: Final = 1_024
# of the cyclic collector in a server: small steps, 0.1 ms, and 0.7 ms for the second generation, where
# (50,000, 50, 100) took up to 8 ms at once. That has its price: put_many cost a quarter more CPU on the nodes, an
# eighth on the coordinator. The third generation walks all leaves and cells, 0.4 s for a million keys, and is put off
# for good: until thousands of millions of allocations.
GC_THRESHOLDS: Final = (1_000, 4, 1_000_000)
# cells that a node makes between two young collections of its own. The collector counts what is made less what is
# freed, so overwriting runs up hundreds of thousands of young cells, and whatever else allocates then pays 100 ms at
# once; 4,096 are 0.3 ms. A collection stops tracking cells, so they are met once. (p99 of puts while snapshots run:
# 23 to 39 ms instead of 230.)
YOUNG_CELLS_MAX: Final = 4_096
FREEZE_ROWS: Final = 256
# rows that a merge of frozen shards takes from one of them at a time: all of them at once stay below a slice
MERGE_ROWS: Final = 32
BACKUP_SLICE_MS: Final = 2

# --- durability ----------------------------------------------------------------------------------
DURABILITIES: Final = ("sync", "os", "memory")
DURABILITY_DEFAULT: Final = "sync"
LOG_FORMAT_VERSION: Final = 1
SNAPSHOT_FORMAT_VERSION: Final = 1
MANIFEST_FORMAT_VERSION: Final = 1
SEGMENT_BYTES_MAX: Final = 64 * MIB
# what one group commit may write: the windows of a link that was lost and of the next one, and what they went over by
LOG_RECORD_BYTES_MAX: Final = 128 * MIB
# without a record for so long an empty one is written, whose mark covers the last
LOG_IDLE_MS: Final = 100
# a shard is snapshotted when the log is longer than this and than all snapshots together
SNAPSHOT_LOG_BYTES: Final = 64 * MIB
SNAPSHOT_FRAME_ROWS: Final = 256
SNAPSHOT_FRAME_BYTES: Final = 256 * KIB  # a frame ends with the row that reaches it
# bytes of a snapshot that wait for the disk before its next slice does
SNAPSHOT_BUFFER_BYTES: Final = 8 * MIB
# of the event loop at once for a snapshot, and what share of it all slices together may take: little, so that clients
# hardly notice; more when the log grows faster than snapshots let go of it, or the disk is nearly full
SNAPSHOT_SLICE_MS: Final = 1
SNAPSHOT_SHARE: Final = 0.05
SNAPSHOT_SHARE_URGENT: Final = 0.25
# bytes of a snapshot that are written before they are synced, so that the log's syncs never wait for much
SNAPSHOT_SYNC_BYTES: Final = 4 * MIB
# free space below which growing writes are refused; the length of the log and of the largest snapshot are added, so
# that the log can still be snapshotted. Below half of it all writes are refused.
SPACE_RESERVE_BYTES: Final = 48 * MIB
SPACE_LOOK_MS: Final = 200
RECOVERY_PROGRESS_MS: Final = 1_000

# --- files ---------------------------------------------------------------------------------------
# longest JSON line of one pair: every byte of key and value escaped as \u00xx, and the rest of the object
JSON_LINE_BYTES_MAX: Final = 6 * (KEY_BYTES_MAX + VALUE_BYTES_MAX) + 4 * KIB
BACKUP_FORMAT_VERSION: Final = 1
# lines of a backup file that share one crc32 in the manifest, so that damage can be placed
BACKUP_BLOCK_LINES: Final = 100
BACKUP_WRITE_BYTES: Final = 64 * KIB
BACKUP_NAME_CHARS_MAX: Final = 100

# Relations. They are checked at import, so that a changed number cannot break a promise in silence.
assert KEY_BYTES_MAX + VALUE_BYTES_MAX + 64 * KIB < FRAME_BYTES_MAX, "the largest put fits in one frame"
assert MULTI_BYTES_MAX <= FRAME_BYTES_MAX, "an m-request arrives in one frame"
assert IMPORT_CHUNK_RECORDS <= MULTI_KEYS_MAX, "a chunk of an import is one request"
assert IMPORT_CHUNK_BYTES + JSON_LINE_BYTES_MAX // 6 < MULTI_BYTES_MAX, "a full chunk takes one more large pair"
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
    "a frame of results that is nearly full takes the largest result, and 2 MiB of small ones and of framing"
)
assert MGET_VALUES_BYTES_MAX < WRITE_RESULTS_BYTES_MAX // 2, "the largest result is remembered"
assert 4 * DRAIN_SLICE <= WINDOW_ITEMS_MAX, "several shards have a turn when a window opens"
assert FRAME_BYTES_MAX + BATCH_BYTES_MAX + RESULTS_BYTES_MAX + MIB < LINK_FRAME_BYTES_MAX, (
    "whatever fits a frame of a client fits one of a link, behind what is there already"
)
assert BATCH_BYTES_MAX < WINDOW_BYTES_MAX <= BUFFERED_BYTES_MAX, "a window holds several batches"
assert VALUE_BYTES_MAX <= WINDOW_BYTES_MAX, "the largest value fits a window"
assert 2 * KEPT_SHARD_BYTES_MAX < KEPT_BYTES_MAX, "what a window holds is kept without being looked for"
assert WINDOW_ITEMS_MAX < 2 * KEPT_PASS_ENTRIES, "more kept entries are forgotten with a batch than it adds"
assert WINDOW_BYTES_MAX + KEY_BYTES_MAX + VALUE_BYTES_MAX < KEPT_SHARD_BYTES_MAX, "a window with any item at its end"
assert WINDOW_BYTES_MAX + FRAME_BYTES_MAX + WINDOW_ITEMS_MAX * LEARN_ITEM_BYTES < LEARN_BUFFER_BYTES_MAX, (
    "a window of items fits the buffer of a learner"
)
assert BULK_CHUNK_BYTES < BULK_WRITE_BUFFER_BYTES < BULK_BYTES_PER_S, "a donor writes a little at a time"
assert LAG_LOOK_MS < STATS_MS < DONATION_IDLE_MS, "figures are of many looks"
assert LINK_GRACE_MS < EVICT_AFTER_MS <= RECOVER_WAIT_MS, "a closed link is noticed before a slow one"
assert EVICT_AFTER_MS < LEARNER_EVICT_AFTER_MS < SLOW_INTERVAL_MS, "a learner has more time than a member"
assert 4 * EVICT_AFTER_MS < SLOW_INTERVAL_MS, "a slow node is not let go and taken back all the time"
assert 2 * HEARTBEAT_MS <= EVICT_AFTER_MS < LINK_SILENCE_MS, "an idle link is heard of before it counts as silent"
assert READ_RETRY_MS < WRITE_WAIT_MS < CLIENT_TIMEOUT_MS, "a client learns the cluster's answer before it gives up"
assert CLIENT_OUTPUT_BYTES_MAX < CLIENT_INPUT_BYTES_MAX < BUFFERED_BYTES_MAX, "one client cannot use up the total"
assert FRAME_BYTES_MAX <= CLIENT_INPUT_BYTES_MAX, "one whole frame may be buffered for a client"
assert CLIENT_TICK_MS < CLIENT_TIMEOUT_MS < CLIENT_SILENCE_MS < CLIENT_ADMIN_IDLE_MS, "silence outlasts a slow call"
assert 10 * PROGRESS_MS < CLIENT_ADMIN_IDLE_MS, "a coordinator at work is not taken for a lost one"
assert CLIENT_BACKOFF_MIN_MS < CLIENT_BACKOFF_MAX_MS < CLIENT_TIMEOUT_MS, "a call is tried several times"
assert CLIENT_CHUNK_KEYS_MAX <= MULTI_KEYS_MAX, "a chunk is one m-request"
assert CLIENT_CHUNK_BYTES + VALUE_BYTES_MAX + KEY_BYTES_MAX < MULTI_BYTES_MAX, "a chunk with one large value fits"
assert CLIENT_CHUNKS_MAX * CLIENT_CHUNK_BYTES <= CLIENT_OUTSTANDING_BYTES_MAX, "the chunks under way fit the bound"
assert TICK_MS < MAP_RESEND_MS and 10 * MAP_RESEND_MS < STAMP_MOVE_MS < STAMP_AHEAD_MS, (
    "the bound of stamps is moved long before a stamp meets it, also at the second try"
)
assert 2 * (WINDOW_BYTES_MAX + FRAME_BYTES_MAX) <= SPACE_RESERVE_BYTES, "what is in flight fits half of the reserve"
assert 2 * (WINDOW_BYTES_MAX + LINK_FRAME_BYTES_MAX) < LOG_RECORD_BYTES_MAX, "one group commit fits a record"
assert DURABILITY_DEFAULT in DURABILITIES, "the default is a mode"
assert BACKOFF_MIN_MS < BACKOFF_MAX_MS < BACKOFF_RESET_MS, "back-off grows, then is forgotten"
assert 2 * LEAVE_MS < STOP_MS * 4 // 10, "a node that leaves first is not killed for it"
assert DRAIN_MS + LEAVE_TIME_MS + STOP_MS < 10_000, "a coordinator stops within 10 s"
assert NODES_MAX <= SHARDS_MAX, "every node can hold a shard"
assert BACKUP_NAME_CHARS_MAX + 20 < NAME_BYTES_MAX, "the temporary directory of a backup has a legal name too"
