"""Table: the state machine of one shard.

Pure. The node gives it the writes of a link in order (`apply`), the entries of a log or of another member
(`apply_entry`), and reads with a stamp. It produces the packed entry that is logged, and the chain.

    entry = msgpack [epoch, seq, stamp_ms, effects]        effects as in `kvtcp.protocol.operations`
    chain(n) = crc32(entry n exactly as logged, chain(n - 1))

Every operation is one entry, even one without effect. An operation is first *evaluated*, without a change, to its
result and to effects that hold final values; then the effects are applied. `apply_entry` does only the second step, so
a log replays to the same table by construction. Both steps depend on nothing but the content of the table, the item and
the stamp: not on a clock, the shape of the tree, or the hash seed of the process. Whatever an operation can meet is a
result, never an exception.

A key whose deadline is not after the stamp is invisible to every operation. Physically it stays until it is
overwritten, purged or cleared; `len` and `digest` count it until then.

`put` is the hot path: one flat method, no call in Python for a put without deadline. It takes 0.9 us for a present key
and 1.3 us for a new one, entry and chain included; through evaluation and effects it would be 0.7 us more.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Final

import msgpack

from kvtcp.constants import INTEGER_MAX, INTEGER_MIN, LEAF_KEYS_MAX, TTL_MS_MAX
from kvtcp.errors import Code, DataError, ProtocolError, show_bytes
from kvtcp.protocol import operations as op
from kvtcp.protocol.numbers import integer_of
from kvtcp.storage.shard import strings, transaction
from kvtcp.storage.shard.deadlines import Deadlines
from kvtcp.storage.shard.freeze import Frozen
from kvtcp.storage.shard.index import Cell, Index, OrderError
from kvtcp.storage.shard.strings import CellView, Effect, Evaluated, WriteItem

# A list of three is an error [code, message, details], a list of one holds the results of a transaction.
Result = int | bool | bytes | list[Any] | None
LiveRow = tuple[bytes, bytes, int, int | None]  # key, value, rev, ttl_ms or None
Logged = tuple[int, int, int, int, bytes]  # an entry in the log: shard, generation, seq, chain, packed entry
Pieces = Iterable[tuple[Sequence[bytes], Sequence[Cell]]]  # keys and their cells, in ascending order

DIGEST_ROWS: Final = 256
ROW_BYTES: Final = 16  # counted for revision, deadline and framing of a row

# One packer for all tables of the process, because it keeps a buffer as large as the largest entry it has packed. That
# is safe: only one thread changes tables.
_pack: Final[Callable[[object], bytes]] = msgpack.Packer(autoreset=True).pack


class SequenceError(DataError):
    """An entry that does not follow the last one. Applying it would make replicas diverge; nothing was changed."""


class ChainError(DataError):
    """An entry whose chain is not the one that its sender computed: the two logs differ. Nothing was changed."""


class Table:
    """One shard. `leaf_keys_max` bounds the leaves of its trees, `fresh_keys_max` the new keys waiting for a merge."""

    def __init__(
        self, shard: int = 0, *, leaf_keys_max: int = LEAF_KEYS_MAX, fresh_keys_max: int | None = None
    ) -> None:
        self.shard = shard
        self.generation = 1  # of the copy: grows when it is reset; logged with every entry, set by the owner
        self.epoch = 0  # epoch of the entries that `apply` makes; set by the owner
        self.seq = 0  # number of the last entry
        self.chain = 0  # chain of the last entry
        self.last_entry = b""  # the last entry as logged; empty at the start and after `load`
        self._leaf_keys_max = leaf_keys_max
        self._fresh_keys_max = fresh_keys_max
        self._loaded_epoch = 0  # epoch of the position while `last_entry` is empty
        self._index = self._new_index()
        self._deadlines = Deadlines((), leaf_keys_max)  # a pair for every cell with a deadline
        self._frozen: list[Frozen] = []  # open scans of `_index`
        self._watched = False  # there are deadlines or open scans, which every change must be reported to

    def __len__(self) -> int:
        return len(self._index)

    @property
    def keys_count(self) -> int:
        """Number of keys, expired ones included."""
        return len(self._index)

    @property
    def position(self) -> tuple[int, int, int]:
        """(epoch, seq, chain) of the last entry."""
        epoch = msgpack.unpackb(self.last_entry)[0] if self.last_entry else self._loaded_epoch
        return epoch, self.seq, self.chain

    # --- writes ------------------------------------------------------------------------------------

    def apply(self, item: WriteItem, stamp_ms: int) -> Result:
        """Apply a write item [op, shard, seq, answer, key, *args]; its result, a list [code, message, details] if the
        operation failed. Raises SequenceError if `seq` is not the next number, ProtocolError for an unknown operation.
        """
        seq: int = item[2]
        if seq != self.seq + 1:
            raise self._out_of_order(seq)
        # The fast path: a put with neither TTL nor KEEPTTL, while neither deadlines nor scans need to know of it. It is
        # `_put`, `_change` and `Index.set` in one body. Tuples pack to the same bytes as the lists of the slow path.
        if item[0] == op.PUT and len(item) == 6 and not self._watched:
            key: bytes = item[4]
            value: bytes = item[5]
            entry = _pack((self.epoch, seq, stamp_ms, ((op.SET, key, value, None),)))
            index = self._index
            cells = index.cells
            before = len(cells)
            cells[key] = (value, seq, None)
            if len(cells) != before:
                index.fresh.append(key)
                if len(index.fresh) >= index.fresh_keys_max:
                    index.merge()
            result: Result = seq
        else:
            evaluate = _EVALUATE.get(item[0])
            if evaluate is None:
                raise ProtocolError(f"shard {self.shard}: write operation {item[0]!r} is not known")
            result, effects = evaluate(self, item, stamp_ms)
            entry = _pack((self.epoch, seq, stamp_ms, effects))
            self._apply_effects(effects, seq)
        self.seq = seq
        self.last_entry = entry
        self.chain = zlib.crc32(entry, self.chain)
        return result

    def apply_entry(self, packed: bytes, chain: int | None = None) -> None:
        """Apply a packed entry by its effects. Raises SequenceError if it does not follow the last one, ChainError if
        `chain` is given and differs from the chain computed here, DataError if the bytes are no entry. After an error
        nothing is changed.
        """
        try:
            _, seq, _, effects = msgpack.unpackb(packed, use_list=False)
            known = all(_EFFECT_FIELDS[effect[0]] == len(effect) for effect in effects)
        except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
            raise DataError(f"shard {self.shard}: what should be entry {self.seq + 1} is damaged: {error!r}") from error
        if not known:
            raise DataError(f"shard {self.shard}: an effect of entry {self.seq + 1} has the wrong number of fields")
        if seq != self.seq + 1:
            raise self._out_of_order(seq)
        if len(effects) > 1 and self._lacks_one(effects):  # a single effect raises before it changes anything
            raise self._absent(seq)
        here = zlib.crc32(packed, self.chain)
        if chain is not None and chain != here:
            raise ChainError(
                f"shard {self.shard}: the chain of entry {seq} is {here:08x} here and {chain:08x} at its sender",
                details={"shard": self.shard, "seq": seq},
            )
        self._apply_effects(effects, seq)
        self.seq = seq
        self.last_entry = packed
        self.chain = here

    def load(self, pieces: Pieces, epoch: int, seq: int, chain: int) -> None:
        """Replace the whole content by pieces (keys, their cells), ascending over all, as they were at a position.
        Raises DataError if they are not in order, and whatever iterating over `pieces` raises; after that nothing is
        changed.
        """
        index = self._new_index()
        pairs: list[tuple[int, bytes]] = []
        try:
            index.load(_noting_deadlines(pieces, pairs))
        except OrderError as error:
            raise DataError(f"shard {self.shard}: {error}") from error
        self._replace_index(index, Deadlines(pairs, self._leaf_keys_max))
        self.epoch = self._loaded_epoch = epoch
        self.seq = seq
        self.chain = chain
        self.last_entry = b""

    def _out_of_order(self, seq: int) -> SequenceError:
        return SequenceError(
            f"shard {self.shard}: entry {seq} does not follow entry {self.seq}",
            details={"shard": self.shard, "seq": seq, "last": self.seq},
        )

    def _new_index(self) -> Index:
        if self._fresh_keys_max is None:
            return Index(self._leaf_keys_max)
        return Index(self._leaf_keys_max, self._fresh_keys_max)

    def _replace_index(self, index: Index, deadlines: Deadlines) -> None:
        """Exchange the index. Open scans keep the old one, which is never changed again."""
        self._index = index
        self._deadlines = deadlines
        self._frozen = []
        self._watched = len(deadlines) > 0

    # --- effects: the only place besides the path for `put` where the index changes ------------------

    def _apply_effects(self, effects: Sequence[Effect], rev: int) -> None:
        if len(effects) > 1 and all(effect[0] == op.REMOVE for effect in effects):
            self._remove_all([key for _, key in effects])
            return
        for effect in effects:
            kind = effect[0]
            if kind == op.SET:
                self._change(effect[1], (effect[2], rev, effect[3]))
            elif kind == op.REMOVE:
                self._change(effect[1], None)
            elif kind in _NEEDED_KEY:
                cell = self._index.get(effect[_NEEDED_KEY[kind]])
                if cell is None:
                    raise self._absent(rev)
                if kind == op.DEADLINE:
                    self._change(effect[1], (cell[0], rev, effect[2]))
                elif kind == op.PATCH:
                    self._change(effect[1], (strings.patched(cell[0], effect[2], effect[3]), rev, cell[2]))
                else:
                    self._change(effect[1], (cell[0], rev, cell[2]))
            else:
                self._replace_index(self._new_index(), Deadlines((), self._leaf_keys_max))

    def _lacks_one(self, effects: Sequence[Effect]) -> bool:
        """Whether one of several effects needs a key that is absent when its turn comes."""
        there: dict[bytes, bool] = {}
        for effect in effects:
            kind = effect[0]
            if kind in _NEEDED_KEY:
                key = effect[_NEEDED_KEY[kind]]
                if not there.get(key, self._index.get(key) is not None):
                    return True
            if kind != op.WIPE:  # a wipe is always the only effect of its entry
                there[effect[1]] = kind != op.REMOVE
        return False

    def _absent(self, seq: int) -> DataError:
        return DataError(f"shard {self.shard}: entry {seq} changes a key that is absent")

    def _change(self, key: bytes, cell: Cell | None) -> None:
        """Set or (None) remove a cell, and keep the open scans and the deadlines up to date."""
        index = self._index
        deadline_ms = None if cell is None else cell[2]
        if self._watched or deadline_ms is not None:
            old = index.get(key)
            for frozen in self._frozen:
                frozen.save(key, old)
            old_deadline_ms = None if old is None else old[2]
            if old_deadline_ms != deadline_ms:
                if old_deadline_ms is not None:
                    self._deadlines.remove(old_deadline_ms, key)
                if deadline_ms is not None:
                    self._deadlines.add(deadline_ms, key)
                self._watch()
        if cell is None:
            index.delete(key)
        else:
            index.set(key, cell)

    def _remove_all(self, keys: list[bytes]) -> None:
        """`_change` to None for many distinct keys, 3 times faster: purge and clear remove hundreds in one entry."""
        index = self._index
        for frozen in self._frozen:
            for key in keys:
                frozen.save(key, index.get(key))
        if self._deadlines:
            cells = [(key, index.get(key)) for key in keys]
            pairs = [(cell[2], key) for key, cell in cells if cell is not None and cell[2] is not None]
            self._deadlines.remove_all(pairs)
        index.delete_all(keys)
        self._watch()

    def _watch(self) -> None:
        self._watched = len(self._deadlines) > 0 or len(self._frozen) > 0

    # --- evaluation: result and effects of an operation, without a change ----------------------------

    def visible(self, key: bytes, stamp_ms: int) -> Cell | None:
        """The cell of a key; None if the key is absent, or its deadline is not after the stamp."""
        cell = self._index.get(key)
        if cell is not None and cell[2] is not None and cell[2] <= stamp_ms:
            return None
        return cell

    def _purge(self, item: WriteItem, stamp_ms: int) -> Evaluated:
        _, limit = _arguments(item, 2)
        keys = self._deadlines.expired(stamp_ms, limit)
        return len(keys), [(op.REMOVE, key) for key in keys]

    def _clear(self, item: WriteItem, stamp_ms: int) -> Evaluated:
        lower, upper, limit = _arguments(item, 3)
        keys = self._index.slice(lower, upper, limit)
        if keys and len(keys) == len(self._index):
            return len(keys), [(op.WIPE,)]
        return len(keys), [(op.REMOVE, key) for key in keys]

    def _transaction(self, item: WriteItem, stamp_ms: int) -> Evaluated:
        return transaction.evaluate(self, item, stamp_ms, _EVALUATE_KEYS)

    # --- reads -------------------------------------------------------------------------------------

    def get(self, key: bytes, stamp_ms: int) -> tuple[bytes, int, int | None] | None:
        """(value, rev, ttl_ms or None), or None if the key is absent or expired."""
        cell = self._index.cells.get(key)
        # Without a deadline the cell is the answer. The flag is tested first, because reading the cell of a random key
        # is a cache miss: 1340 instead of 1140 k/s at 1 M keys.
        if not self._watched or cell is None or cell[2] is None:
            return cell
        ttl_ms = cell[2] - stamp_ms
        return (cell[0], cell[1], ttl_ms) if ttl_ms > 0 else None

    def exists(self, key: bytes, stamp_ms: int) -> int | None:
        """The revision of a key, or None if it is absent or expired."""
        cell = self.visible(key, stamp_ms)
        return None if cell is None else cell[1]

    def ttl(self, key: bytes, stamp_ms: int) -> tuple[int, int | None] | None:
        """(rev, ttl_ms or None), or None if the key is absent or expired."""
        answer = self.get(key, stamp_ms)
        return None if answer is None else (answer[1], answer[2])

    def deadline_of(self, key: bytes, stamp_ms: int) -> tuple[int, int | None] | None:
        """(rev, deadline_ms or None), or None if the key is absent or expired."""
        cell = self.visible(key, stamp_ms)
        return None if cell is None else cell[1:]

    def any_key(self, number: int, stamp_ms: int) -> bytes | None:
        """The visible key at place `number` (modulo their count) in the order of keys, or the next one; None if no key
        is visible."""
        if not len(self._index):
            return None
        lower = self._index.key_at(number % len(self._index))
        found = self.keys(lower, None, 1, False, stamp_ms) or self.keys(b"", None, 1, False, stamp_ms)
        return found[0] if found else None

    def count(self, lower: bytes, upper: bytes | None, stamp_ms: int) -> int:
        """Number of visible keys in [lower, upper); `upper` None is no bound. O(log n). While expired keys wait for
        their purge, a count of a part of the shard takes O(expired keys) or O(keys of the range), whichever is less."""
        count = self._index.count(lower, upper)
        expired = self._deadlines.count_expired(stamp_ms)
        if expired and (lower or upper is not None):
            if expired <= count:
                keys = self._deadlines.expired(stamp_ms)
                return count - sum(lower <= key and (upper is None or key < upper) for key in keys)
            cells = self._index.cells_of(self._index.slice(lower, upper))
            return sum(deadline_ms is None or deadline_ms > stamp_ms for _, _, deadline_ms in cells)
        return count - expired

    def keys(self, lower: bytes, upper: bytes | None, limit: int | None, reverse: bool, stamp_ms: int) -> list[bytes]:
        """The first `limit` visible keys of [lower, upper), the last ones in descending order with `reverse`."""
        index = self._index
        if not self._deadlines.any_expired(stamp_ms):
            return index.slice(lower, upper, limit, reverse)
        visible: list[bytes] = []
        while limit is None or len(visible) < limit:  # a slice may lose keys that are expired: take another one
            wanted = None if limit is None else limit - len(visible)
            keys = index.slice(lower, upper, wanted, reverse)
            for key, (_, _, deadline_ms) in zip(keys, index.cells_of(keys), strict=True):
                if deadline_ms is None or deadline_ms > stamp_ms:
                    visible.append(key)
            if wanted is None or len(keys) < wanted:
                break
            if reverse:
                upper = keys[-1]
            else:
                lower = keys[-1] + b"\0"
        return visible

    def rows(self, lower: bytes, upper: bytes | None, limit: int | None, reverse: bool, stamp_ms: int) -> list[LiveRow]:
        """The rows (key, value, rev, ttl_ms or None) of `keys` with the same arguments."""
        keys = self.keys(lower, upper, limit, reverse, stamp_ms)
        return [
            (key, value, rev, None if deadline_ms is None else deadline_ms - stamp_ms)
            for key, (value, rev, deadline_ms) in zip(keys, self.cells_of(keys), strict=True)
        ]

    def cells_of(self, keys: Iterable[bytes]) -> list[Cell]:
        """The cells of present keys, in the same order."""
        return self._index.cells_of(keys)

    def has_expired(self, stamp_ms: int) -> bool:
        """Whether a key waits for a purge. Usually one comparison."""
        return self._deadlines.any_expired(stamp_ms)

    def freeze(self) -> Frozen:
        """A scan of the present state, whatever is applied while it is read. Several may be open."""
        epoch, seq, chain = self.position
        frozen = Frozen(self._index, self.shard, epoch, seq, chain, self._thaw)
        if frozen.rows_left:  # a scan without rows needs no cell saved
            self._frozen.append(frozen)
            self._watched = True
        return frozen

    def _thaw(self, frozen: Frozen) -> None:
        if frozen in self._frozen:
            self._frozen.remove(frozen)
            self._watch()

    @property
    def is_scanned(self) -> bool:
        """Whether a frozen scan is open."""
        return bool(self._frozen)

    def release(self) -> None:
        """Free all rows of a table that is not used any more, and has no open scan. May run in another thread, which
        never holds the interpreter for long."""
        assert not self._frozen, "an open scan reads the rows"
        self._index.release()
        self._deadlines.release()

    def bytes_estimate(self) -> int:
        """About the bytes of all rows, by the mean of a hundred of them. For the planning of disk space."""
        sample = list(islice(self._index.items(), 100))
        if not sample:
            return 0
        sample_bytes = sum(len(key) + len(value) + ROW_BYTES for key, (value, _, _) in sample)
        return len(self._index) * sample_bytes // len(sample)

    # --- invariants --------------------------------------------------------------------------------

    def digest(self) -> int:
        """crc32 of all rows with revision and deadline, in key order: equal content, equal digest. O(n)."""
        digest = 0
        lower = b""
        while keys := self._index.slice(lower, None, DIGEST_ROWS):
            digest = zlib.crc32(_pack((keys, self._index.cells_of(keys))), digest)
            lower = keys[-1] + b"\0"
        return digest

    def check(self) -> None:
        """Verify every invariant; AssertionError names the one that is broken."""
        self._index.check()
        self._deadlines.check()
        pairs: list[tuple[int, bytes]] = []
        for key, (_, rev, deadline_ms) in self._index.items():
            assert rev <= self.seq, "no revision is above the last entry"
            if deadline_ms is not None:
                pairs.append((deadline_ms, key))
        assert self._deadlines.pairs() == sorted(pairs), "the deadlines are those of the cells"
        assert self._watched == (bool(pairs) or bool(self._frozen)), "changes are watched for deadlines and scans"


def _arguments(item: WriteItem, count: int) -> Sequence[Any]:
    """The first `count` fields of an item after `answer`; omitted ones are None."""
    arguments = item[4 : 4 + count]
    if len(arguments) < count:
        arguments = [*arguments, *[None] * (count - len(arguments))]
    return arguments


def _deadline(ttl_ms: int | None, stamp_ms: int) -> int | None:
    return None if ttl_ms is None else stamp_ms + max(0, min(ttl_ms, TTL_MS_MAX))


def _holds(cell: Cell, if_value: bytes | None, if_rev: int | None) -> bool:
    value, rev, _ = cell
    return (if_value is None or value == if_value) and (if_rev is None or rev == if_rev)


def _noting_deadlines(pieces: Pieces, pairs: list[tuple[int, bytes]]) -> Pieces:
    """The same pieces; the deadlines of what was read so far are appended to `pairs`."""
    for keys, cells in pieces:
        pairs += [(cell[2], key) for key, cell in zip(keys, cells, strict=True) if cell[2] is not None]
        yield keys, cells


# --- operations on one key: result and effects, without a change ---------------------------------------


def _put(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, value, ttl_ms, keep_ttl = _arguments(item, 4)
    deadline_ms = _deadline(ttl_ms, stamp_ms)
    if keep_ttl and ttl_ms is None:
        cell = view.visible(key, stamp_ms)
        deadline_ms = None if cell is None else cell[2]
    return item[2], [(op.SET, key, value, deadline_ms)]


def _add(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, value, ttl_ms = _arguments(item, 3)
    cell = view.visible(key, stamp_ms)
    if cell is not None:
        text = f"the key {show_bytes(key)} exists with revision {cell[1]}"
        return [int(Code.EXISTS), text, {"rev": cell[1]}], []
    return item[2], [(op.SET, key, value, _deadline(ttl_ms, stamp_ms))]


def _delete(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, if_value, if_rev = _arguments(item, 3)
    cell = view.visible(key, stamp_ms)
    if cell is None or not _holds(cell, if_value, if_rev):
        return False, []
    return True, [(op.REMOVE, key)]


def _cas(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, value, if_value, if_rev = _arguments(item, 4)
    if if_value is None and if_rev is None:
        return [int(Code.BAD_REQUEST), f"cas of the key {show_bytes(key)} has no condition", {}], []
    cell = view.visible(key, stamp_ms)
    if cell is None:
        if if_value is None and if_rev == 0:
            return item[2], [(op.SET, key, value, None)]
        return [int(Code.MISMATCH), f"the key {show_bytes(key)} is absent", {"rev": 0}], []
    if not _holds(cell, if_value, if_rev):
        text = f"the key {show_bytes(key)} has revision {cell[1]}"
        text += f", not {if_rev}" if if_rev is not None else " and another value than the expected one"
        return [int(Code.MISMATCH), text, {"rev": cell[1]}], []
    return item[2], [(op.SET, key, value, cell[2])]


def _incr(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, by = _arguments(item, 2)
    cell = view.visible(key, stamp_ms)
    number = 0 if cell is None else integer_of(cell[0])
    if number is None:
        text = f"the value of the key {show_bytes(key)} is not a signed 64-bit decimal integer"
        return [int(Code.NOT_A_NUMBER), text, {}], []
    number += by
    if not INTEGER_MIN <= number <= INTEGER_MAX:
        return [int(Code.RANGE), f"{number - by} + {by} at the key {show_bytes(key)} exceeds 64 bits", {}], []
    return number, [(op.SET, key, b"%d" % number, None if cell is None else cell[2])]


def _expire(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, ttl_ms = _arguments(item, 2)
    if view.visible(key, stamp_ms) is None:
        return False, []
    if ttl_ms <= 0:
        return True, [(op.REMOVE, key)]
    return True, [(op.DEADLINE, key, _deadline(ttl_ms, stamp_ms))]


def _persist(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key = item[4]
    cell = view.visible(key, stamp_ms)
    if cell is None or cell[2] is None:
        return False, []
    return True, [(op.DEADLINE, key, None)]


# The writes that a transaction may have.
_EVALUATE_KEYS: Final[dict[int, Callable[[CellView, WriteItem, int], Evaluated]]] = {
    op.PUT: _put,
    op.ADD: _add,
    op.DELETE: _delete,
    op.CAS: _cas,
    op.INCR: _incr,
    op.EXPIRE: _expire,
    op.PERSIST: _persist,
    **strings.EVALUATE,
}
_EVALUATE: Final[dict[int, Callable[[Table, WriteItem, int], Evaluated]]] = {
    **_EVALUATE_KEYS,
    op.PURGE: Table._purge,
    op.CLEAR: Table._clear,
    op.TRANSACTION: Table._transaction,
}
assert set(_EVALUATE) == set(op.WRITE_NAMES), "every write operation is evaluated"

_EFFECT_FIELDS: Final = {op.SET: 4, op.REMOVE: 2, op.DEADLINE: 3, op.WIPE: 1, op.PATCH: 4, op.CLONE: 3}
_NEEDED_KEY: Final = {op.DEADLINE: 1, op.PATCH: 1, op.CLONE: 2}  # the field with the key that must be present
