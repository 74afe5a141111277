"""Transaction: several operations on keys of one shard as one entry.

Pure. The operations are evaluated in order, each on the state that the operations before it left: an `Overlay` of
changed cells over those of the shard. The entry has the effects of all. Nothing is undone: an operation that fails has
no effect, and its error is its result. First the revisions of the watched keys are compared; if one differs, nothing is
executed and the result is None.

A transaction is refused, without any effect, if its effects exceed MULTI_BYTES_MAX, the values among its results
MGET_VALUES_BYTES_MAX, or the values that it copies to change a part TRANSACTION_COPY_BYTES_MAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from kvtcp.constants import MGET_VALUES_BYTES_MAX, MULTI_BYTES_MAX, TRANSACTION_COPY_BYTES_MAX
from kvtcp.errors import Code, ProtocolError
from kvtcp.protocol import operations as op
from kvtcp.storage.shard.index import Cell
from kvtcp.storage.shard.strings import CellView, Effect, Evaluated, WriteItem, patched

EFFECT_BYTES: Final = 32  # counted for an effect beyond its key and value
ALLOWED: Final = frozenset(op.WRITE_NAMES) - {op.PURGE, op.CLEAR, op.TRANSACTION}


class Overlay:
    """The cells of a shard with the changes of a transaction."""

    def __init__(self, below: CellView, seq: int) -> None:
        self.below = below
        self.seq = seq
        self.changed: dict[bytes, Cell | None] = {}
        self.effect_bytes = 0
        self.copied_bytes = 0

    def visible(self, key: bytes, stamp_ms: int) -> Cell | None:
        """The cell of a key as the transaction left it; see `CellView`."""
        if key not in self.changed:
            return self.below.visible(key, stamp_ms)
        cell = self.changed[key]
        if cell is not None:
            _, _, deadline_ms = cell
            if deadline_ms is not None and deadline_ms <= stamp_ms:
                return None
        return cell

    def change(self, effect: Effect, stamp_ms: int) -> None:
        """Apply an effect to the overlay, and count its bytes."""
        kind, key = effect[0], effect[1]
        self.effect_bytes += EFFECT_BYTES + len(key)
        if kind == op.SET:
            self.effect_bytes += len(effect[2])
            self.changed[key] = (effect[2], self.seq, effect[3])
            return
        if kind == op.REMOVE:
            self.changed[key] = None
            return
        cell = self.visible(effect[2] if kind == op.CLONE else key, stamp_ms)
        assert cell is not None, "these effects are of keys that are present"
        value, _, deadline_ms = cell
        if kind == op.DEADLINE:
            self.changed[key] = (value, self.seq, effect[2])
        elif kind == op.CLONE:
            self.effect_bytes += len(effect[2])
            self.changed[key] = (value, self.seq, deadline_ms)
        else:
            _, _, offset, data = effect
            self.effect_bytes += len(data)
            self.copied_bytes += max(len(value), offset + len(data))
            # over the limit the transaction is refused anyway: not even one value more is copied
            if self.copied_bytes <= TRANSACTION_COPY_BYTES_MAX:
                self.changed[key] = (patched(value, offset, data), self.seq, deadline_ms)


def evaluate(
    view: CellView, item: WriteItem, stamp_ms: int, known: Mapping[int, Callable[..., Evaluated]]
) -> Evaluated:
    """Evaluate an item [TRANSACTION, shard, seq, answer, key, watched, ops]. `known` evaluates the writes in it."""
    _, shard, seq, _, _, watched, ops = item
    for key, rev in watched:
        cell = view.visible(key, stamp_ms)
        if (0 if cell is None else cell[1]) != rev:
            return None, []
    overlay = Overlay(view, seq)
    effects: list[Effect] = []
    results: list[Any] = []
    result_bytes = 0
    for number, *arguments in ops:
        if number in ALLOWED:
            result, made = known[number](overlay, (number, shard, seq, 0, *arguments), stamp_ms)
            for effect in made:
                overlay.change(effect, stamp_ms)
            effects += made
        else:
            result = _read(overlay, number, arguments[0], stamp_ms)
        if type(result) is bytes:
            result_bytes += len(result)
        elif type(result) is tuple:
            result_bytes += len(result[0])
        results.append(result)
        for what, size, size_max in (
            ("changes", overlay.effect_bytes, MULTI_BYTES_MAX),
            ("results", result_bytes, MGET_VALUES_BYTES_MAX),
            ("changed values", overlay.copied_bytes, TRANSACTION_COPY_BYTES_MAX),
        ):
            if size > size_max:
                text = f"the {what} of this transaction are over {size_max} bytes; nothing was executed"
                return [int(Code.TOO_LARGE), text, {"bytes_max": size_max}], []
    return [results], effects


def _read(view: CellView, number: int, key: bytes, stamp_ms: int) -> Any:
    """The result of a read of one key, as the coordinator gives it outside of a transaction."""
    cell = view.visible(key, stamp_ms)
    if number == op.EXISTS:
        return cell is not None
    if number not in (op.GET, op.TTL, op.DEADLINE_OF):
        raise ProtocolError(f"operation {number!r} cannot be part of a transaction")
    if cell is None:
        return None
    value, rev, deadline_ms = cell
    ttl_ms = None if deadline_ms is None else deadline_ms - stamp_ms
    if number == op.GET:
        return value, rev, ttl_ms
    found_ms = ttl_ms if number == op.TTL else deadline_ms
    return -1 if found_ms is None else found_ms


def result_bytes(result: Any) -> int:
    """About the bytes of the result of a write. Only results with values and of transactions count; others are
    small."""
    if type(result) is bytes:
        return len(result)
    if type(result) is not list or len(result) != 1:
        return 0
    results: Sequence[Any] = result[0]
    size = 16 * len(results)
    for each in results:
        if type(each) is bytes:
            size += len(each)
        elif type(each) is tuple:  # a cell
            size += len(each[0])
        elif type(each) is list:  # an error
            size += 64 + len(each[1])
    return size
