"""Transaction: several operations on keys of one shard as one entry.

Pure. Each operation is evaluated in order on what the ones before it left; that is a table of *changed* cells over the
shard's. The entry has the effects of all. Nothing is undone: an operation that fails has no effect of its own, and its
error is its result. Before all of it the revisions of the watched keys are compared; if one is another, nothing is
done and the result is None.

The whole is refused, without any effect, if its effects exceed MULTI_BYTES_MAX, the values among its results
MGET_VALUES_BYTES_MAX, or the values that it changes in places TRANSACTION_COPY_BYTES_MAX (each change copies one).
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
        """As below, or as it was changed."""
        if key not in self.changed:
            return self.below.visible(key, stamp_ms)
        cell = self.changed[key]
        return None if cell is None or (cell[2] is not None and cell[2] <= stamp_ms) else cell

    def change(self, effect: Effect, stamp_ms: int) -> None:
        """What an effect does."""
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
        assert cell is not None, "these effects are of keys that are there"
        if kind == op.DEADLINE:
            self.changed[key] = (cell[0], self.seq, effect[2])
        elif kind == op.CLONE:
            self.effect_bytes += len(effect[2])
            self.changed[key] = (cell[0], self.seq, cell[2])
        else:
            self.effect_bytes += len(effect[3])
            self.copied_bytes += max(len(cell[0]), effect[2] + len(effect[3]))
            if self.copied_bytes <= TRANSACTION_COPY_BYTES_MAX:
                self.changed[key] = (patched(cell[0], effect[2], effect[3]), self.seq, cell[2])


def evaluate(
    view: CellView, item: WriteItem, stamp_ms: int, known: Mapping[int, Callable[..., Evaluated]]
) -> Evaluated:
    """The item [TRANSACTION, shard, seq, answer, key, watched, ops]. `known` evaluates the writes."""
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
    """A read of one key, answered as the coordinator answers it outside of a transaction."""
    cell = view.visible(key, stamp_ms)
    if number == op.GET:
        return None if cell is None else (cell[0], cell[1], None if cell[2] is None else cell[2] - stamp_ms)
    if number == op.EXISTS:
        return cell is not None
    if number not in (op.TTL, op.DEADLINE_OF):
        raise ProtocolError(f"operation {number!r} cannot be part of a transaction")
    if cell is None:
        return None
    return -1 if cell[2] is None else cell[2] - (stamp_ms if number == op.TTL else 0)


def result_bytes(result: Any) -> int:
    """About the bytes of a write's result, if it has values or is that of a transaction; others are small."""
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
