"""The replica: the core of a node. Batches in, results and log entries out.

Pure: the node's server feeds it frames and writes what it returns. On top of the copies of the node (copies.py) it
applies the items of a batch strictly in order, writes and reads alike, which is what makes a read see exactly the
writes queued before it. What a batch wrote is handed over as log entries (`take_logged`): the server makes them durable
before it acknowledges the batch. Entries are also kept here until the coordinator says that they are committed, and for
a while after that: they are shipped to nodes that lack them.

Invariants:
- the numbers of a shard have no gap: an item whose number is not the table's next one stops the node (SequenceError);
- an epoch below the promised one, or another coordinator in the same epoch, is refused;
- the items of one batch all carry its stamp; a node never looks at a clock to decide what a table contains;
- a node that learns nothing pays one look at each batch for the possibility.

Results of one batch may be large (values of many reads), so they are handed over in pieces: `run` returns when about
`results_bytes_max` bytes of values are ready and goes on where it stopped at the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from kvtcp._version import __version__
from kvtcp.constants import (
    LEARN_APPLY_ITEMS,
    MGET_VALUES_BYTES_MAX,
    PAGE_BYTES_MAX,
    RESULTS_BYTES_MAX,
)
from kvtcp.errors import Code
from kvtcp.node.copies import CopySet
from kvtcp.protocol.operations import (
    ANY_KEY,
    AUDIT,
    COUNT,
    DEADLINE_OF,
    DONATE,
    DROP,
    EXISTS,
    FREEZE,
    GET,
    LEARN,
    MGET,
    PAGE,
    PUT,
    RESULTS_OF,
    REVISION,
    STORE,
    TTL,
    UNLEARN,
    WRITE_OP_END,
)
from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.pages import any_key, merge_page, page_bytes
from kvtcp.storage.shard.transaction import result_bytes

OLDER_COPY: Final = "its node was started on an older copy of its data directory, what was written since is missing"
FLAG_INTERVAL_MS: Final = 250  # between two looks for expired keys, by stamps


class Refused(Exception):
    """A HELLO that this node does not accept: `code` and a sentence for the coordinator."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FreezeRequest:
    """A backup that a batch asked for: what was frozen, and what its file is called."""

    __slots__ = ("directory", "frozen", "name", "stamp_ms")

    def __init__(self, name: str, directory: str, stamp_ms: int, frozen: list[Frozen]) -> None:
        self.name = name
        self.directory = directory
        self.stamp_ms = stamp_ms  # deadlines become times to live at this stamp
        self.frozen = frozen


class Replicas(CopySet):
    """All copies of one node. `new_disk` makes the uuid of a copy that did not exist before; `copies`, `promised`,
    `coordinator`, `cluster_map` and `generations` are what the node remembers from before. `retire` is called with
    copies that are replaced or removed, which may take a while to be let go."""

    def __init__(
        self, node: str, pid: int, new_disk: Callable[[], str], durability: str = "memory",
        copies: Iterable[Copy] = (), backlog: Backlog | None = None, promised: int = 0, coordinator: str = "",
        map_version: int = 0, stamp_ms: int = 0, cluster_map: bytes = b"", generations: dict[int, int] | None = None,
        retire: Callable[[Copy], None] = lambda _: None,
    ) -> None:  # fmt: skip
        super().__init__(new_disk, copies, backlog, promised, generations, retire)
        self.node = node
        self.pid = pid
        self.durability = durability
        self.coordinator = coordinator  # uuid of the coordinator of the promised epoch
        self.map_version = map_version  # highest seen
        self.map = cluster_map  # the cluster map of the last HELLO as its coordinator sent it; empty = it had none
        self.stamp_ms = stamp_ms  # highest stamp seen
        self.space = 0  # how short of disk space the node is, as in the SPACE frame; set by the server
        self.applied = 0  # ordinal of the last finished batch of the present link
        self.freezes: deque[FreezeRequest] = deque()  # for the server to work off
        self.results_bytes = 0  # of values in the list of results that `run` was given last
        self.operations = 0  # items applied since the start, for status
        self._flag_after_ms = 0  # stamp of the next look for expired keys
        self.flags: list[int] = []  # shards that hold expired keys, as of the last look

    # --- link ---------------------------------------------------------------------------------------

    def hello(self, fields: Mapping[bytes, Any]) -> dict[str, Any]:
        """Accept a coordinator and report, or raise Refused. Version, cluster and secret were checked; the report is
        sent when promise, map, new copies and everything logged are durable.
        """
        epoch, coordinator = fields[b"epoch"], fields[b"coordinator"].decode()
        if fields[b"node"].decode() != self.node:
            raise Refused("NODE", f"this is node {self.node}")
        if epoch < self.promised:
            raise Refused("FENCED", f"epoch {epoch} is over: this node promised {self.promised}")
        if epoch == self.promised and coordinator != self.coordinator:
            raise Refused("FENCED", f"epoch {epoch} belongs to another coordinator")
        self.link_lost()
        self.promised, self.coordinator = epoch, coordinator
        for shard in fields[b"shards"]:
            if shard not in self.copies:
                self._add(Copy(shard, self._new_disk(), generation=self._next_generation(shard)))
        if 0 < self.map_version < fields[b"heard_version"]:  # one that stored none has no copies from before
            self._forget_identity()
        for table in self.tables.values():
            table.epoch = epoch
        self.applied = self._batch_ordinal = self.results_bytes = 0
        self._items = iter(())
        self._made, self._made_results = [], []
        self.backlog.new_link()
        report = self.report()
        self.map_version = max(self.map_version, fields[b"map_version"])
        self.map = fields.get(b"map") or b""
        return report

    def _forget_identity(self) -> None:
        """This node once stored a newer map than it knows: it goes on from an older copy of its directory, and nobody
        knows what is missing. Its copies are other ones from now on."""
        for copy in self.copies.values():
            copy.disk = self._new_disk()
            copy.reason = copy.reason or OLDER_COPY

    def report(self) -> dict[str, Any]:
        """What this node has."""
        return {
            "node": self.node,
            "pid": self.pid,
            "version": __version__,
            "durability": self.durability,
            "stamp_ms": self.stamp_ms,
            "promised": self.promised,
            "map_version": self.map_version,
            "space": self.space,
            "shards": [copy.report() for copy in self.copies.values()],
            "damage": [[copy.shard, copy.reason] for copy in self.copies.values() if copy.reason],
        }

    # --- batches ------------------------------------------------------------------------------------

    def begin(self, stamp_ms: int, commit: int, items: Sequence[Sequence[Any]]) -> None:
        """A batch: it is applied by `run`. `commit` as in the BATCH frame."""
        assert self.applied == self._batch_ordinal, "a batch is finished before the next one begins"
        committed = self.backlog.commit(commit)
        for shard, seq in committed.items():
            self.copies[shard].commit = seq
        if self._results:
            self._results.commit(committed)
        if stamp_ms > self.stamp_ms:
            self.stamp_ms = stamp_ms
        self._stamp_ms = stamp_ms
        self._items = iter(items)
        self._batch_ordinal = self.applied + len(items)
        self._is_diverted = False
        if self.learning or self._ignored:
            self.catch_up(LEARN_APPLY_ITEMS + 2 * len(items))  # more than the batch may add
            self._divert_rest()
        self.operations += len(items)

    def run(self, results: list[Any], results_bytes_max: int = RESULTS_BYTES_MAX) -> bool:
        """Apply the batch, appending results; false if it stopped because enough bytes of results are ready."""
        if not results:
            self.results_bytes = 0
        while not self._run(results, results_bytes_max):
            if self.results_bytes > results_bytes_max:
                self._take_made()
                return False
        self._take_made()
        self.applied = self._batch_ordinal
        stamp_ms = self._stamp_ms
        if stamp_ms >= self._flag_after_ms:
            self._flag_after_ms = stamp_ms + FLAG_INTERVAL_MS
            self.flags = [number for number, table in self.tables.items() if table.has_expired(stamp_ms)]
        return True

    def _run(self, results: list[Any], results_bytes_max: int) -> bool:
        """Apply items up to the end of the batch, or to a control item, which may have put something in the place of
        the rest; true at the end. It ends too when enough bytes of results are ready."""
        tables = self.tables
        stamp_ms = self._stamp_ms
        made, made_bytes = self._made, 0
        for item in self._items:
            op = item[0]
            if op == PUT:
                table = tables[item[1]]
                result: Any = table.apply(item, stamp_ms)
                made.append((item[1], table.generation, table.seq, table.chain, table.last_entry))
                if item[3]:
                    results.append(result)
            elif op == GET:
                cell = tables[item[1]].get(item[2], stamp_ms)
                results.append(cell)
                if cell is not None:
                    self.results_bytes += len(cell[0])
                    if self.results_bytes > results_bytes_max:
                        return False
            elif op < WRITE_OP_END:
                table = tables[item[1]]
                result = table.apply(item, stamp_ms)
                made.append((item[1], table.generation, table.seq, table.chain, table.last_entry))
                self._made_results.append((item[1], table.seq, result))
                size = result_bytes(result) if op >= STORE else 0
                if size:
                    made_bytes += size
                    if made_bytes > results_bytes_max:  # what is kept of them is bounded when it is taken
                        self._take_made()
                        made, made_bytes = self._made, 0
                if item[3]:
                    results.append(result)
                    self.results_bytes += size
                    if self.results_bytes > results_bytes_max:
                        return False
            elif op >= LEARN:
                results.append(self._control(op, item))
                return False
            else:
                result = self._read(op, item, stamp_ms)
                results.append(result)
                if op in (PAGE, MGET):
                    self.results_bytes += _result_bytes(op, result)
                    if self.results_bytes > results_bytes_max:
                        return False
        return True

    def take_flags(self) -> list[int]:
        """The shards with expired keys found since the last call."""
        flags, self.flags = self.flags, []
        return flags

    def _read(self, op: int, item: Sequence[Any], stamp_ms: int) -> Any:
        tables = self.tables
        if op in (EXISTS, REVISION):
            rev = tables[item[1]].exists(item[2], stamp_ms)
            return None if rev is None else [rev]
        if op == TTL:
            return tables[item[1]].ttl(item[2], stamp_ms)
        if op == DEADLINE_OF:
            return tables[item[1]].deadline_of(item[2], stamp_ms)
        if op == ANY_KEY:
            return any_key([tables[shard] for shard in item[1]], item[2], stamp_ms)
        if op == PAGE:
            _, shards, lower, upper, limit, reverse, keys_only = item
            chosen = [tables[shard] for shard in shards]
            return merge_page(chosen, lower, upper, limit, PAGE_BYTES_MAX, reverse, keys_only, stamp_ms)
        if op == COUNT:
            return sum(tables[shard].count(item[2], item[3], stamp_ms) for shard in item[1])
        if op == MGET:
            return self._mget(item[1], stamp_ms)
        if op == FREEZE:
            _, shards, name, directory = item
            frozen = [tables[shard].freeze() for shard in shards]
            self.freezes.append(FreezeRequest(name.decode(), directory.decode(), stamp_ms, frozen))
            return [[f.shard, f.epoch, f.seq, f.chain] for f in frozen]
        raise ValueError(f"unknown operation {op} on the link")

    def _control(self, op: int, item: Sequence[Any]) -> Any:
        """What is about copies rather than their content."""
        if op == LEARN:
            return self._learn(*item[1:4])
        if op == UNLEARN:
            return self._unlearn(item[1])
        if op == DROP:
            return self._drop(item[1])
        if op == DONATE:
            return self._donate(*item[1:4])
        if op == RESULTS_OF:
            self._take_made()
            found, size = self._results.of(item[1], item[2])
            self.results_bytes += size
            return found
        if op == AUDIT:
            return [self._audit(shard) for shard in item[1]]
        raise ValueError(f"unknown operation {op} on the link")

    def _mget(self, wanted: Sequence[tuple[int, bytes]], stamp_ms: int) -> Any:
        cells = []
        total_bytes = 0
        for shard, key in wanted:
            cell = self.tables[shard].get(key, stamp_ms)
            if cell is not None:
                total_bytes += len(cell[0])
                if total_bytes > MGET_VALUES_BYTES_MAX:
                    text = f"the values of this mget are over {MGET_VALUES_BYTES_MAX} bytes; ask for fewer keys at once"
                    return [int(Code.TOO_LARGE), text, {"bytes_max": MGET_VALUES_BYTES_MAX}]
            cells.append(cell)
        return cells

    def check(self) -> None:
        """Check every table. Raises AssertionError."""
        for table in self.tables.values():
            table.check()


def _result_bytes(op: int, result: Any) -> int:
    """About the bytes of a page's rows, or of an mget's cells."""
    if op == PAGE:
        return page_bytes(result[0], result[1])
    return sum(32 + len(cell[0]) if type(cell) in (list, tuple) else 32 for cell in result)
