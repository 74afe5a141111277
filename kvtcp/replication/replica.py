"""The replica: the core of a node. Batches in, results and log entries out.

Pure: the node's server feeds it frames and writes what it returns. It owns one Copy (a Table and its identity) per
shard and applies the items of a batch strictly in order, writes and reads alike, which is what makes a read see exactly
the writes queued before it. What a batch wrote is handed over as log entries (`take_logged`): the server makes them
durable before it acknowledges the batch. Entries are also kept here until the coordinator says that they are committed:
a takeover ships them from the member that has them to those that lack them (`entries_after`, `ship`).

Invariants:
- the numbers of a shard have no gap: an item whose number is not the table's next one stops the node (SequenceError);
- an epoch below the promised one, or another coordinator in the same epoch, is refused;
- the items of one batch all carry its stamp; a node never looks at a clock to decide what a table contains;
- every entry that may be uncommitted is kept: of each shard at least as many as a link's window may hold.

Results of one batch may be large (values of many reads), so they are handed over in pieces: `run` returns when about
`results_bytes_max` bytes of values are ready and goes on where it stopped at the next call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from kvtcp._version import __version__
from kvtcp.constants import (
    BATCH_BYTES_MAX,
    MGET_VALUES_BYTES_MAX,
    PAGE_BYTES_MAX,
    RESULTS_BYTES_MAX,
)
from kvtcp.errors import Code, DataError
from kvtcp.protocol.link import LINK_VERSION
from kvtcp.protocol.operations import CHAIN_AT, COUNT, EXISTS, FREEZE, GET, MGET, PAGE, TTL, WRITE_OP_END
from kvtcp.storage.copy import Copy, Logged
from kvtcp.storage.freeze import Frozen
from kvtcp.storage.kept import KeptEntries
from kvtcp.storage.pages import merge_page
from kvtcp.storage.table import Table

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


class Replica:
    """All copies of one node. `new_disk` makes the uuid of a copy that did not exist before; `copies`, `promised` and
    `coordinator` are what the node remembers from before."""

    def __init__(
        self,
        node: str,
        pid: int,
        new_disk: Callable[[], str],
        durability: str = "memory",
        copies: Iterable[Copy] = (),
        kept: KeptEntries | None = None,
        promised: int = 0,
        coordinator: str = "",
        map_version: int = 0,
        stamp_ms: int = 0,
    ) -> None:
        self.node = node
        self.pid = pid
        self.durability = durability
        self.copies: dict[int, Copy] = {}
        self.tables: dict[int, Table] = {}  # those of the complete copies, for the path of every operation
        self.promised = promised  # highest epoch accepted
        self.coordinator = coordinator  # uuid of the coordinator of that epoch
        self.map_version = map_version  # highest seen
        self.map = b""  # the cluster map of the last HELLO as its coordinator sent it; empty = it had none
        self.stamp_ms = stamp_ms  # highest stamp seen
        self.space = 0  # how short of disk space the node is, as in the SPACE frame; set by the server
        self.applied = 0  # ordinal of the last finished batch of the present link
        self.freezes: deque[FreezeRequest] = deque()  # for the server to work off
        self.results_bytes = 0  # of values in the list of results that `run` was given last
        self.operations = 0  # items applied since the start, for status
        self._new_disk = new_disk
        self._items: Iterator[Sequence[Any]] = iter(())  # the rest of the batch being run
        self._stamp_ms = 0  # of that batch
        self._batch_ordinal = 0  # ordinal that will be applied when it is finished
        self._flag_after_ms = 0  # stamp of the next look for expired keys
        self.flags: list[int] = []  # shards that hold expired keys, as of the last look
        self._logged: list[Logged] = []  # entries made and not yet taken by `take_logged`
        self.kept = KeptEntries() if kept is None else kept  # entries that may be uncommitted
        for copy in copies:
            self._add(copy)

    def _add(self, copy: Copy) -> None:
        self.copies[copy.shard] = copy
        if copy.complete:
            self.tables[copy.shard] = copy.table

    # --- link ---------------------------------------------------------------------------------------

    def hello(self, fields: Mapping[bytes, Any]) -> dict[str, Any]:
        """Accept a coordinator and report, or raise Refused. The server has checked cluster and secret, and sends the
        report when promise, map, new copies and everything logged are durable.
        """
        if fields.get(b"version") != LINK_VERSION:
            raise Refused("VERSION", f"this node speaks link version {LINK_VERSION}")
        epoch, coordinator = fields[b"epoch"], fields[b"coordinator"].decode()
        if fields[b"node"].decode() != self.node:
            raise Refused("NODE", f"this is node {self.node}")
        if epoch < self.promised:
            raise Refused("FENCED", f"epoch {epoch} is over: this node promised {self.promised}")
        if epoch == self.promised and coordinator != self.coordinator:
            raise Refused("FENCED", f"epoch {epoch} belongs to another coordinator")
        self.promised, self.coordinator = epoch, coordinator
        for shard in fields[b"shards"]:
            if shard not in self.copies:
                self._add(Copy(shard, self._new_disk()))
        if 0 < self.map_version < fields[b"heard_version"]:  # one that stored none has no copies from before
            self._forget_identity()
        for table in self.tables.values():
            table.epoch = epoch
        self.applied = self._batch_ordinal = self.results_bytes = 0
        self._items = iter(())
        self.kept.new_link()
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

    # --- entries that may be uncommitted --------------------------------------------------------------

    def take_logged(self) -> list[Logged]:
        """The entries made since the last call, in order: they belong into the log before anything is acknowledged."""
        logged, self._logged = self._logged, []
        return logged

    def entries_after(self, shard: int, after: int) -> tuple[int | None, list[list[Any]] | None]:
        """What ENTRIES says: the chain at number `after`, None if it is not known here any more, and the packed entries
        that follow as [chain, entry], None if they are not all here. About BATCH_BYTES_MAX at once, at least one."""
        table = self.tables.get(shard)
        if table is None or not self.copies[shard].complete or after > table.seq:
            return None, None
        kept = self.kept.look_up(shard)
        chain = 0 if after == 0 else table.chain if after == table.seq else None
        entries: list[list[Any]] = []
        size = 0
        for _, _, seq, entry_chain, entry in kept:
            if seq == after:
                chain = entry_chain
            elif seq == after + len(entries) + 1:
                size += len(entry)
                if entries and size > BATCH_BYTES_MAX:
                    break
                entries.append([entry_chain, entry])
        return chain, entries if entries or after == table.seq else None

    def ship(self, shard: int, entries: Sequence[Sequence[Any]]) -> str | None:
        """Apply packed entries of another member by their effects. Returns why not all of them could be, or None."""
        copy = self.copies.get(shard)
        if copy is None or not copy.complete:
            return f"this node has no complete copy of shard {shard}"
        table = copy.table
        applied: list[Logged] = []
        error: str | None = None
        for chain, entry in entries:
            try:
                table.apply_entry(entry, chain)
            except DataError as refused:
                error = refused.message
                break
            applied.append((shard, table.generation, table.seq, chain, entry))
        if applied:
            self._logged += applied
            self.kept.add(0, applied)
        return error

    # --- batches ------------------------------------------------------------------------------------

    def begin(self, stamp_ms: int, commit: int, items: Sequence[Sequence[Any]]) -> None:
        """A batch: it is applied by `run`. `commit` as in the BATCH frame."""
        assert self.applied == self._batch_ordinal, "a batch is finished before the next one begins"
        for shard, seq in self.kept.commit(commit).items():
            self.copies[shard].commit = seq
        if stamp_ms > self.stamp_ms:
            self.stamp_ms = stamp_ms
        self._stamp_ms = stamp_ms
        self._items = iter(items)
        self._batch_ordinal = self.applied + len(items)
        self.operations += len(items)

    def run(self, results: list[Any], results_bytes_max: int = RESULTS_BYTES_MAX) -> bool:
        """Apply the batch, appending results; false if it stopped because enough bytes of results are ready."""
        made: list[Logged] = []
        finished = self._run(results, results_bytes_max, made)
        if made:
            self._logged += made
            self.kept.add(self._batch_ordinal, made)
        return finished

    def _run(self, results: list[Any], results_bytes_max: int, made: list[Logged]) -> bool:
        tables = self.tables
        stamp_ms = self._stamp_ms
        if not results:
            self.results_bytes = 0
        for item in self._items:
            op = item[0]
            if op < WRITE_OP_END:
                table = tables[item[1]]
                result = table.apply(item, stamp_ms)
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
            else:
                result = self._read(op, item, stamp_ms)
                results.append(result)
                if op in (PAGE, MGET):
                    self.results_bytes += _result_bytes(op, result)
                    if self.results_bytes > results_bytes_max:
                        return False
        self.applied = self._batch_ordinal
        if stamp_ms >= self._flag_after_ms:
            self._flag_after_ms = stamp_ms + FLAG_INTERVAL_MS
            self.flags = [number for number, table in tables.items() if table.has_expired(stamp_ms)]
        return True

    def take_flags(self) -> list[int]:
        """The shards with expired keys found since the last call."""
        flags, self.flags = self.flags, []
        return flags

    def _read(self, op: int, item: Sequence[Any], stamp_ms: int) -> Any:
        tables = self.tables
        if op == EXISTS:
            rev = tables[item[1]].exists(item[2], stamp_ms)
            return None if rev is None else [rev]
        if op == TTL:
            return tables[item[1]].ttl(item[2], stamp_ms)
        if op == PAGE:
            _, shards, lower, upper, limit, reverse, keys_only = item
            chosen = [tables[shard] for shard in shards]
            return merge_page(chosen, lower, upper, limit, PAGE_BYTES_MAX, reverse, keys_only, stamp_ms)
        if op == COUNT:
            return sum(tables[shard].count(item[2], item[3], stamp_ms) for shard in item[1])
        if op == MGET:
            return self._mget(item[1], stamp_ms)
        if op == CHAIN_AT:
            table = tables[item[1]]
            return (table.seq, table.chain)
        if op == FREEZE:
            _, shards, name, directory = item
            frozen = [tables[shard].freeze() for shard in shards]
            self.freezes.append(FreezeRequest(name.decode(), directory.decode(), stamp_ms, frozen))
            return [[f.shard, f.epoch, f.seq, f.chain] for f in frozen]
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
        return sum(32 + len(row[0]) + len(row[1] or b"") for row in result[0])
    return sum(32 + len(cell[0]) if type(cell) in (list, tuple) else 32 for cell in result)
