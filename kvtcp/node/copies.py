"""The copies of a node: how they come and go, and what of them is kept for others.

Pure; the base of the Replicas, which applies batches to them. Here is what the coordinator does with copies as a whole:
it completes one by entries of another member (`ship`) or replaces it by a pulled one (`loaded`, `published`), has it
donated or dropped. What is written to a shard while its copy is being learned waits in a buffer (learning.py).

Invariants:
- a shard that is being learned is not in `tables`: no read, freeze or audit sees it; its items are taken out of the
  batches by `_divert`;
- the copy that was there before is in `copies`, and on the disk, until the one that replaces it is `published`;
- no two copies of a shard ever have the same generation on a node, whatever became of them: entries of all of them may
  be in its log;
- every entry that may be uncommitted is kept: of each shard at least as many as a link's window may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from kvtcp.constants import LEARN_APPLY_ITEMS, LEARN_BUFFER_BYTES_MAX, SHIP_BYTES_MAX, WINDOW_ITEMS_MAX
from kvtcp.errors import DataError
from kvtcp.node.learning import Donation, Learning
from kvtcp.node.write_results import WriteResults
from kvtcp.protocol.operations import PUT, WRITE_OP_END
from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged, Table


class CopySet:
    """All copies of one node. `new_disk` makes the uuid of a copy that did not exist before; `generations` has the
    highest generation that was given on this node for each shard. `retire` is called with copies that are replaced or
    removed, which may take a while to be let go."""

    def __init__(
        self, new_disk: Callable[[], str], copies: Iterable[Copy], backlog: Backlog | None, promised: int,
        generations: dict[int, int] | None, retire: Callable[[Copy], None],
    ) -> None:  # fmt: skip
        self.copies: dict[int, Copy] = {}
        self.tables: dict[int, Table] = {}  # those of the complete copies, for the path of every operation
        self.promised = promised  # highest epoch accepted
        self.backlog = Backlog() if backlog is None else backlog  # entries that may be uncommitted, and recent ones
        self.learning: dict[int, Learning] = {}
        self.donations: dict[bytes, Donation] = {}  # by token; the server pops those that were taken, or are too old
        self.generations = {} if generations is None else generations
        self.news = False  # the server has to look: something to take, or a donation; it sets this to false
        self._new_disk = new_disk
        self._retire = retire
        self._items: Iterator[Sequence[Any]] = iter(())  # the rest of the batch being run
        self._stamp_ms = 0  # of that batch
        self._batch_ordinal = 0  # ordinal that will be applied when it is finished
        self._is_diverted = False  # its items pass `_divert`
        self._made: list[Logged] = []  # its entries so far
        self._made_results: list[tuple[int, int, Any]] = []  # of its writes other than puts
        self._logged: list[Logged] = []  # entries made and not yet taken by `take_logged`
        self._results = WriteResults()
        self._ignored: set[int] = set()  # shards whose items are passed over: they could not be learned
        self._buffered_bytes = 0  # of all that are being learned
        self._learned: list[int] = []
        self._failed: list[tuple[int, str]] = []
        self._dropped: list[int] = []
        for copy in copies:
            self._add(copy)

    def _add(self, copy: Copy) -> None:
        self.copies[copy.shard] = copy
        if copy.complete:
            self.tables[copy.shard] = copy.table

    def link_lost(self) -> None:
        """The link is gone, and with it everything that it began: what was learned and not finished, and what was to be
        donated. The copies that were there before are there."""
        for shard in list(self.learning):
            self._unlearn(shard)
        self._ignored.clear()
        self._learned.clear()
        self._failed.clear()
        for donation in self.donations.values():
            donation.close()
        self.donations.clear()

    def _next_generation(self, shard: int) -> int:
        """One that no copy of the shard ever had here, whatever became of it: entries of old copies are in the log."""
        copy = self.copies.get(shard)
        generation = 1 + max(self.generations.get(shard, 0), 0 if copy is None else copy.generation)
        self.generations[shard] = generation
        return generation

    def _audit(self, shard: int) -> tuple[int, int] | None:
        table = self.tables.get(shard)
        return None if table is None else (table.seq, table.chain)

    # --- entries that may be uncommitted --------------------------------------------------------------

    def take_logged(self) -> list[Logged]:
        """The entries made since the last call, in order: they belong into the log before anything is acknowledged."""
        logged, self._logged = self._logged, []
        return logged

    def entries_after(self, shard: int, after: int) -> tuple[int | None, list[list[Any]] | None]:
        """What ENTRIES says: the chain at number `after`, None if it is not known here any more, and the packed entries
        that follow as [chain, entry], None if they are not all here. About SHIP_BYTES_MAX at once, at least one."""
        table = self.tables.get(shard)
        if table is None or not self.copies[shard].complete or after > table.seq:
            return None, None
        known = self.backlog.look_up(shard)
        chain = 0 if after == 0 else table.chain if after == table.seq else None
        if after in known:
            chain = known[after][3]
        entries: list[list[Any]] = []
        size = 0
        while (found := known.get(after + len(entries) + 1)) is not None:
            size += len(found[4])
            if entries and size > SHIP_BYTES_MAX:
                break
            entries.append([found[3], found[4]])
        return chain, entries if entries or after == table.seq else None

    def ship(self, shard: int, entries: Sequence[Sequence[Any]]) -> str | None:
        """Apply packed entries of another member by their effects. Returns why not all of them could be, or None."""
        copy = self.copies.get(shard)
        learning = self.learning.get(shard)
        if copy is None or not copy.complete or (learning is not None and learning.fresh):
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
            self.backlog.add_shipped(shard, applied)
        if learning is not None:
            if error is not None:
                self._fail(shard, error)
            elif table.seq >= learning.last_seq:
                learning.is_ready = True
                self.catch_up()
        return error

    def _take_made(self) -> None:
        """The entries of the batch so far are logged and kept."""
        if self._made:
            made, self._made = self._made, []
            self._logged += made
            self.backlog.add(self._batch_ordinal, made)
        if self._made_results:
            self._results.add(self._made_results)
            self._made_results = []

    # --- learning and donating ------------------------------------------------------------------------

    def _learn(self, shard: int, fresh: int, last_seq: int) -> list[Any] | None:
        """LEARN. Begins anew if the shard is being learned. If it cannot be, its items are passed over: they are on
        their way before the coordinator hears of it."""
        self._unlearn(shard)
        copy = self.copies.get(shard)
        if fresh:
            learning = Learning(shard, last_seq, self._new_disk(), self._next_generation(shard), None)
            answer = [learning.disk, learning.generation, False, 0, 0, 0]
        elif copy is None or not copy.complete or copy.table.seq > last_seq:
            self._ignored.add(shard)
            self._divert_rest()
            return None
        else:
            learning = Learning(shard, last_seq, copy.disk, copy.generation, copy)
            learning.is_ready = copy.table.seq == last_seq
            # As long as it was no member it may have been told that more is committed than is.
            copy.commit = 0
            self.backlog.set_aside(shard)
            answer = [copy.disk, copy.generation, True, *copy.table.position]
        self.tables.pop(shard, None)
        self.learning[shard] = learning
        self._divert_rest()
        self._apply_buffer(learning, 0)
        return answer

    def _unlearn(self, shard: int) -> None:
        """The copy is where it was, and takes items again."""
        self._ignored.discard(shard)
        if shard in self._learned:
            self._learned.remove(shard)
        learning = self.learning.pop(shard, None)
        if learning is not None:
            self._buffered_bytes -= learning.bytes
            self._restore(shard)

    def _restore(self, shard: int) -> None:
        copy = self.copies.get(shard)
        if copy is not None and copy.complete:
            self.tables[shard] = copy.table

    def _fail(self, shard: int, reason: str) -> None:
        """The shard cannot be learned. Its items are passed over until the coordinator has heard of it."""
        self._unlearn(shard)
        self._ignored.add(shard)
        self._failed.append((shard, reason))
        self.news = True

    def learn_failed(self, shard: int, reason: str) -> None:
        """The server could not fetch or store the copy of a shard that is being learned."""
        if shard in self.learning:
            self._fail(shard, reason)

    def loaded(self, shard: int, table: Table, kept: Sequence[Logged] = ()) -> Copy | None:
        """A copy was pulled: its table, and the entries up to its position that may be uncommitted. Returns the copy to
        persist, before `published`; None if nobody wants it any more."""
        learning = self.learning.get(shard)
        if learning is None or not learning.fresh or learning.is_ready:
            return None
        if table.seq < learning.last_seq:
            self._fail(shard, f"the copy that was pulled ends at {table.seq}, before {learning.last_seq}")
            return None
        learning.copy = Copy(shard, learning.disk, generation=learning.generation, table=table)
        learning.kept = [(shard, learning.generation, *entry[2:]) for entry in kept]
        return learning.copy

    def published(self, shard: int) -> bool:
        """The copy that `loaded` returned will be found at the next start: it takes the old one's place. False if it
        does not, because nobody wants it any more."""
        learning = self.learning.get(shard)
        if learning is None or not learning.fresh or learning.copy is None or learning.is_ready:
            return False
        self._replace(shard, learning.copy)
        if learning.kept:
            self.backlog.add_shipped(shard, learning.kept)
        learning.copy.table.epoch = self.promised
        learning.is_ready = True
        self.catch_up()
        return True

    def _replace(self, shard: int, copy: Copy | None) -> None:
        """Nothing of the old copy is used any more."""
        old = self.copies.get(shard)
        if copy is None:
            self.copies.pop(shard, None)
        else:
            self.copies[shard] = copy
        self._take_made()
        self.backlog.forget(shard)
        self._results.forget(shard)
        if old is not None:
            self.generations[shard] = max(self.generations.get(shard, 0), old.generation)
            self._retire(old)

    def _drop(self, shard: int) -> None:
        """DROP."""
        self._unlearn(shard)
        self.tables.pop(shard, None)
        for token in [token for token, donation in self.donations.items() if donation.shard == shard]:
            self.donations.pop(token).close()
        if shard in self.copies:
            self._replace(shard, None)
            self._dropped.append(shard)
        self.news = True

    def _donate(self, shard: int, token: bytes, seq_min: int) -> list[Any] | None:
        """DONATE."""
        table = self.tables.get(shard)
        if seq_min and table is None:
            table = self.copies[shard].table if shard in self.copies else Table(shard)
        if table is None:
            return None
        frozen = table.freeze()
        position = (frozen.epoch, frozen.seq, frozen.chain)
        if seq_min:
            position = (self.promised, max(seq_min, frozen.seq), 0)
        older = self.donations.pop(token, None)
        if older is not None:
            older.close()
        donation = self.donations[token] = Donation(frozen, position)
        self.news = True
        return [*position, donation.keys]

    def take_donation(self, token: bytes) -> tuple[Donation, list[Logged]] | None:
        """What is donated under a token, and the entries to give along, which may be uncommitted. None if there is
        nothing, or not any more. The caller closes the donation."""
        donation = self.donations.pop(token, None)
        if donation is None:
            return None
        last_seq = donation.frozen.seq
        if donation.position[1:] != (last_seq, donation.frozen.chain):
            return donation, []  # after an accepted loss history begins anew: the entries before it are nobody's
        kept = [entry for entry in self.backlog.of_shard(donation.shard) if entry[2] <= last_seq]
        return donation, kept[-WINDOW_ITEMS_MAX:]  # what is older than a window is committed

    def catch_up(self, items_max: int = LEARN_APPLY_ITEMS) -> bool:
        """Apply about so many buffered items, of shards that are ready; whether some are left. `begin` does it too, so
        a node that gets batches comes to an end by itself."""
        for learning in list(self.learning.values()):
            if learning.is_ready:
                items_max -= self._apply_buffer(learning, items_max)
        return any(learning.is_ready and learning.buffer for learning in self.learning.values())

    def _apply_buffer(self, learning: Learning, items_max: int) -> int:
        """The next items of the buffer, at most so many; how many. With the last of them the copy is live."""
        shard, buffer = learning.shard, learning.buffer
        if not learning.is_ready:
            return 0
        assert learning.copy is not None, "it is ready"
        table = learning.copy.table
        made: list[Logged] = []
        results: list[tuple[int, int, Any]] = []
        count = size = 0
        gap = ""
        while buffer and count < items_max:
            stamp_ms, item, item_bytes = buffer.popleft()
            count += 1
            size += item_bytes
            if item[2] <= table.seq:
                continue  # the copy has it
            if item[2] != table.seq + 1:
                gap = f"the items of the link go on at {item[2]}, the copy ends at {table.seq}"
                break
            result = table.apply(item, stamp_ms)
            made.append((shard, table.generation, table.seq, table.chain, table.last_entry))
            if item[0] != PUT:
                results.append((shard, table.seq, result))
        learning.bytes -= size
        self._buffered_bytes -= size
        if made:
            self._logged += made
            self.backlog.add(self._batch_ordinal, made)
            self._results.add(results)
        if gap:
            self._fail(shard, gap)
        elif learning.is_live:
            self._unlearn(shard)
            self._learned.append(shard)
            self.news = True
        return count

    def take_learned(self) -> list[int]:
        """The shards whose copies are live since the last call: LEARNED is sent when what was logged is durable."""
        learned, self._learned = self._learned, []
        return learned

    def take_failed(self) -> list[tuple[int, str]]:
        """The shards that could not be learned, and why, since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def take_dropped(self) -> list[int]:
        """The shards whose copies were removed since the last call. Batches later than that must not be acknowledged
        as durable before the removal is."""
        dropped, self._dropped = self._dropped, []
        return dropped

    # --- items of shards that are being learned ---------------------------------------------------------

    def _divert_rest(self) -> None:
        """Items of shards that are being learned are taken out of the rest of the batch."""
        if not self._is_diverted:
            self._is_diverted = True
            self._items = self._divert(self._items)

    def _divert(self, items: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        learning, ignored = self.learning, self._ignored
        for item in items:
            if item[0] < WRITE_OP_END and (item[1] in learning or item[1] in ignored):
                if item[3]:
                    raise ValueError(f"a write of shard {item[1]} is to be answered by a node that learns it")
                if item[1] in learning:
                    self._put_off(learning[item[1]], item)
            else:
                yield item

    def _put_off(self, learning: Learning, item: Sequence[Any]) -> None:
        self._buffered_bytes += learning.put_off(self._stamp_ms, item)
        if self._buffered_bytes > LEARN_BUFFER_BYTES_MAX:
            largest = max(self.learning.values(), key=lambda each: each.bytes)
            self._fail(largest.shard, f"more than {LEARN_BUFFER_BYTES_MAX} bytes were written while it was learned")
