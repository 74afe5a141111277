"""Strings: the operations of a shard that read, change and write a value in one step, beside those of table.py.

Pure. They carry out the string commands of Redis (append, set range, conditional set, rename, ...). Each function
*evaluates* one item [op, shard, seq, answer, key, *args] to its result and its effects (see table.py). The outcome
depends on nothing but what `visible` shows, the item and the stamp, so it is the same on all replicas.

Effects hold final values, with two exceptions: PATCH has only the changed part of a value, CLONE names the key whose
value is copied. So an entry is about as large as its item, which the bounds of windows, of the backlog and of log
records rely on. If a value would exceed its limit the result is an error, and there is no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from kvtcp.constants import INTEGER_MAX, VALUE_BYTES_MAX
from kvtcp.errors import Code, show_bytes
from kvtcp.protocol import operations as op
from kvtcp.protocol.numbers import decimal_of, decimal_sum
from kvtcp.storage.shard.index import Cell

WriteItem = Sequence[Any]
Effect = Sequence[Any]
Evaluated = tuple[Any, list[Effect]]


class CellView(Protocol):
    """The cells that an operation sees: a table, or a table with the changes of a transaction so far."""

    def visible(self, key: bytes, stamp_ms: int) -> Cell | None:
        """The cell of a key; None if the key is absent, or its deadline is not after the stamp."""


def patched(value: bytes, offset: int, data: bytes) -> bytes:
    """`value` with `data` written over it at `offset`; zeros fill a gap behind its end."""
    if offset >= len(value):
        return value.ljust(offset, b"\0") + data
    return value[:offset] + data + value[offset + len(data) :]


def put_range(key: bytes, cell: Cell | None, offset: int, data: bytes, result: int | None = None) -> Evaluated:
    """Write `data` at `offset` of the value of `cell`. The result is the new length if none is given."""
    old_bytes = 0 if cell is None else len(cell[0])
    new_bytes = max(old_bytes, offset + len(data))
    if new_bytes > VALUE_BYTES_MAX:
        text = f"the value of {show_bytes(key)} would have {new_bytes} bytes, the limit is {VALUE_BYTES_MAX}"
        return [int(Code.TOO_LARGE), text, {"value_bytes": new_bytes, "value_bytes_max": VALUE_BYTES_MAX}], []
    effects: list[Effect] = []
    if cell is None:
        effects.append((op.SET, key, b"" if offset else data, None))
    if cell is not None or offset:
        effects.append((op.PATCH, key, offset, data))
    return new_bytes if result is None else result, effects


def deadline(mode: int, ms: int, stamp_ms: int, old_ms: int | None) -> int | None:
    """The deadline that `mode` and `ms` name; `old_ms` is the present one."""
    if mode == op.IN_MS:
        return min(stamp_ms + ms, INTEGER_MAX)
    if mode == op.AT_MS:
        return ms
    return old_ms if mode == op.KEEP_DEADLINE else None


def _store(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, value, mode, ms, condition, if_value, get = item[4:11]
    cell = view.visible(key, stamp_ms)
    holds = (
        condition == op.ALWAYS
        or (condition == op.IF_ABSENT and cell is None)
        or (condition == op.IF_PRESENT and cell is not None)
        or (condition == op.IF_EQUAL and cell is not None and cell[0] == if_value)
    )
    result = (None if cell is None else cell[0]) if get else holds
    if not holds:
        return result, []
    return result, [(op.SET, key, value, deadline(mode, ms, stamp_ms, None if cell is None else cell[2]))]


def _take(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key = item[4]
    cell = view.visible(key, stamp_ms)
    return (None, []) if cell is None else (cell[0], [(op.REMOVE, key)])


def _touch(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, mode, ms = item[4:7]
    cell = view.visible(key, stamp_ms)
    if cell is None:
        return None, []
    return cell[0], _new_deadline(key, cell, deadline(mode, ms, stamp_ms, cell[2]), stamp_ms)


def _expire_if(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, mode, ms, condition = item[4:8]
    cell = view.visible(key, stamp_ms)
    if cell is None:
        return False, []
    old_ms = cell[2]
    new_ms = deadline(mode, ms, stamp_ms, old_ms)
    assert new_ms is not None, "a time is given"
    holds = (
        condition == op.ALWAYS
        or (condition == op.IF_ABSENT and old_ms is None)
        or (condition == op.IF_PRESENT and old_ms is not None)
        or (condition == op.IF_LATER and old_ms is not None and new_ms > old_ms)
        or (condition == op.IF_EARLIER and (old_ms is None or new_ms < old_ms))
        or (condition == op.IF_PRESENT_EARLIER and old_ms is not None and new_ms < old_ms)
    )
    return holds, _new_deadline(key, cell, new_ms, stamp_ms) if holds else []


def _new_deadline(key: bytes, cell: Cell, deadline_ms: int | None, stamp_ms: int) -> list[Effect]:
    """The effect of giving a key this deadline. A deadline that has passed removes the key at once."""
    if deadline_ms is not None and deadline_ms <= stamp_ms:
        return [(op.REMOVE, key)]
    return [] if deadline_ms == cell[2] else [(op.DEADLINE, key, deadline_ms)]


def _append(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, data = item[4:6]
    cell = view.visible(key, stamp_ms)
    if cell is not None and not data:
        return len(cell[0]), []
    return put_range(key, cell, 0 if cell is None else len(cell[0]), data)


def _set_range(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, offset, data = item[4:7]
    cell = view.visible(key, stamp_ms)
    if not data:
        return 0 if cell is None else len(cell[0]), []
    return put_range(key, cell, offset, data)


def _set_bit(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, offset, bit = item[4:7]
    cell = view.visible(key, stamp_ms)
    place, mask = offset // 8, 0x80 >> offset % 8
    old_byte = 0 if cell is None or place >= len(cell[0]) else cell[0][place]
    byte = old_byte | mask if bit else old_byte & ~mask
    return put_range(key, cell, place, bytes([byte]), int(old_byte & mask != 0))


def _incr_decimal(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, by_text = item[4:6]
    cell = view.visible(key, stamp_ms)
    number = decimal_of(b"0" if cell is None else cell[0])
    by = decimal_of(by_text)
    if number is None or by is None:
        return [int(Code.NOT_A_NUMBER), f"the value of the key {show_bytes(key)} is not a decimal number", {}], []
    text = decimal_sum(number, by)
    if text is None:
        return [int(Code.RANGE), f"the sum at the key {show_bytes(key)} is too large", {}], []
    return text, [(op.SET, key, text, None if cell is None else cell[2])]


def _rename(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, new_key, if_absent = item[4:7]
    cell = view.visible(key, stamp_ms)
    if cell is None:
        return op.NO_KEY, []
    if if_absent and view.visible(new_key, stamp_ms) is not None:
        return op.NEW_KEY_EXISTS, []
    if key == new_key:
        return op.RENAMED, []
    return op.RENAMED, [(op.CLONE, new_key, key), (op.REMOVE, key)]


def _copy(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    key, new_key, replace = item[4:7]
    cell = view.visible(key, stamp_ms)
    if cell is None or (not replace and view.visible(new_key, stamp_ms) is not None):
        return False, []
    return True, [(op.CLONE, new_key, key)]


def _put_all(view: CellView, item: WriteItem, stamp_ms: int) -> Evaluated:
    _, pairs, if_absent = item[4:7]
    if if_absent and any(view.visible(key, stamp_ms) is not None for key, _ in pairs):
        return False, []
    return True, [(op.SET, key, value, None) for key, value in pairs]


EVALUATE: Final[dict[int, Callable[[CellView, WriteItem, int], Evaluated]]] = {
    op.STORE: _store,
    op.TAKE: _take,
    op.TOUCH: _touch,
    op.EXPIRE_IF: _expire_if,
    op.APPEND: _append,
    op.SETRANGE: _set_range,
    op.SETBIT: _set_bit,
    op.INCR_DECIMAL: _incr_decimal,
    op.RENAME: _rename,
    op.COPY: _copy,
    op.PUT_ALL: _put_all,
}
