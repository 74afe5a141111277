"""MULTI, EXEC, DISCARD, WATCH and UNWATCH.

Pure. The commands queued between MULTI and EXEC become one operation of one shard (TRANSACTION of operations.py): one
entry, carried out whole at one point of the shard's order, or not at all. WATCH remembers revisions; they are compared
in that same operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvtcp.constants import MULTI_BYTES_MAX, MULTI_KEYS_MAX
from kvtcp.frontend.resp.caller import Caller, Slot
from kvtcp.frontend.resp.client_state import Transaction
from kvtcp.frontend.resp.plan import CROSS_SHARD_MULTI, Arguments, CommandError, Failed, Operation, Plan, error_text
from kvtcp.frontend.resp.replies import DONE, Failure, NoArray, encode, error
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.messages import check_key
from kvtcp.protocol.operations import REVISION, TRANSACTION

WATCHED_BYTES: Final = 16  # size of a watched key beyond its bytes
UNKNOWN: Final = -1  # the revision of a watched key that could not be read: no key has it


def multi(caller: Caller, arguments: Arguments) -> None:
    """MULTI"""
    state = caller.state
    if state.transaction is not None:
        caller.answer(Failure("ERR MULTI calls can not be nested"))
        return
    state.transaction = Transaction()
    caller.answer(DONE)


def discard(caller: Caller, arguments: Arguments) -> None:
    """DISCARD"""
    state = caller.state
    if state.transaction is None:
        raise CommandError("ERR DISCARD without MULTI")
    state.transaction = None
    state.unwatch()
    caller.answer(DONE)


def exec_(caller: Caller, arguments: Arguments) -> None:
    """EXEC"""
    state = caller.state
    if state.transaction is None:
        raise CommandError("ERR EXEC without MULTI")
    transaction, state.transaction = state.transaction, None
    watched = list(state.watched.items())
    size = transaction.bytes + state.watched_bytes
    state.unwatch()
    if transaction.failed:
        raise CommandError("EXECABORT Transaction discarded because of previous errors.")
    operations = [
        operation for queued in transaction.queued if isinstance(queued, Plan) for operation in queued.operations
    ]
    keys = [key for key, _ in watched] + [key for operation in operations for key in operation.keys]
    if not keys:
        _Executed(caller, caller.current, transaction).reply(None, [])
        return
    numbers = {shard_of(key, caller.keyspace.shards) for key in keys}
    if len(numbers) > 1:
        raise CommandError(CROSS_SHARD_MULTI)
    for key in keys:
        caller.keyspace.check_open(key)
    if size > MULTI_BYTES_MAX:
        raise CommandError(f"EXECABORT the transaction and its watched keys are over {MULTI_BYTES_MAX} bytes")
    items = [[operation.op, operation.key, *operation.args] for operation in operations]
    operation = Operation(TRANSACTION, keys[0], (watched, items), size)
    caller.ask(operation, numbers.pop(), _Executed(caller, caller.current, transaction), None)


class _Executed:
    """Sink of a transaction."""

    __slots__ = ("caller", "slot", "transaction")

    def __init__(self, caller: Caller, slot: Slot, transaction: Transaction) -> None:
        self.caller = caller
        self.slot = slot
        self.transaction = transaction

    def reply(self, token: None, results: list[Any] | None) -> None:
        """Answer EXEC with the results; None: a watched key was changed."""
        version = self.caller.state.version
        if results is None:
            self.caller.fill(self.slot, encode(NoArray, version))
            return
        parts = [b"*%d\r\n" % len(self.transaction.queued)]
        place = 0
        for queued in self.transaction.queued:
            if isinstance(queued, Plan):
                end = place + len(queued.operations)
                parts.append(encode(queued.reply(list(map(_result, results[place:end]))), version))
                place = end
            else:
                parts.append(queued)
        self.caller.fill(self.slot, b"".join(parts))

    def fail(self, token: None, code: int, message: str, details: dict[str, Any]) -> None:
        """Answer EXEC with an error: nothing was executed, or the outcome is not known."""
        self.caller.fill(self.slot, error(error_text(Failed(code, message))))


def _result(result: Any) -> Any:
    """Return the result of one operation, or Failed for an array [code, message, details]. A cell is an array of three
    too, but begins with the value."""
    if type(result) is list and len(result) == 3 and type(result[0]) is int:
        return Failed(result[0], result[1].decode("utf-8", "replace"))
    return result


def watch(caller: Caller, arguments: Arguments) -> None:
    """WATCH key ..."""
    state = caller.state
    if state.transaction is not None:
        caller.answer(Failure("ERR WATCH inside MULTI is not allowed"))
        return
    keys = [check_key(key) for key in dict.fromkeys(arguments) if state.watched.get(key, UNKNOWN) == UNKNOWN]
    if not keys:
        caller.answer(DONE)
        return
    size = state.watched_bytes + sum(len(key) + WATCHED_BYTES for key in keys)
    if len(state.watched) + len(keys) > MULTI_KEYS_MAX or size > MULTI_BYTES_MAX:
        raise CommandError(f"ERR the watched keys are over the limit of {MULTI_KEYS_MAX} or {MULTI_BYTES_MAX} bytes")
    state.watched_bytes = size
    state.watched |= dict.fromkeys(keys, UNKNOWN)  # if a key cannot be read, EXEC must not ignore it
    for key in keys:
        caller.keyspace.check_open(key)
    caller.waits = True
    watching = _Watching(caller, caller.current, keys)
    for key in keys:
        caller.ask(Operation(REVISION, key, (), len(key)), shard_of(key, caller.keyspace.shards), watching, key)


class _Watching:
    """Sink of the revisions that WATCH asks for."""

    __slots__ = ("caller", "failed", "left", "slot")

    def __init__(self, caller: Caller, slot: Slot, keys: Sequence[bytes]) -> None:
        self.caller = caller
        self.slot = slot
        self.left = len(keys)
        self.failed: Failed | None = None

    def reply(self, token: bytes, rev: int | None) -> None:
        """Remember the revision of a key, None if it is absent."""
        self.caller.state.watched[token] = rev or 0
        self._one_less()

    def fail(self, token: bytes, code: int, message: str, details: dict[str, Any]) -> None:
        """Remember that a key could not be read."""
        self.failed = Failed(code, message)
        self._one_less()

    def _one_less(self) -> None:
        self.left -= 1
        if not self.left:
            self.caller.waits = False  # the session resumes the commands that are held
            reply = encode(DONE, 2) if self.failed is None else error(error_text(self.failed))
            self.caller.fill(self.slot, reply)


def unwatch(caller: Caller, arguments: Arguments) -> None:
    """UNWATCH"""
    if caller.state.transaction is None:  # else EXEC compares them, and forgets them then
        caller.state.unwatch()
    caller.answer(DONE)
