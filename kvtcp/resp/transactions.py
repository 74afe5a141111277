"""MULTI, EXEC, DISCARD, WATCH and UNWATCH.

Pure. What is queued between MULTI and EXEC becomes one operation of one shard (TRANSACTION of operations.py): one
entry, carried out whole at one point of the shard's order, or not at all. WATCH remembers revisions; they are compared
in that same operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from kvtcp.constants import MULTI_BYTES_MAX, MULTI_KEYS_MAX, RESP_KEYS_MAX
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.messages import check_key
from kvtcp.protocol.operations import REVISION, TRANSACTION
from kvtcp.resp.plan import CROSS_SHARD_MULTI, CommandError, Failed, Operation, Plan, error_text
from kvtcp.resp.replies import DONE, Failure, NoArray, encode, error

if TYPE_CHECKING:
    from kvtcp.resp.client import RespClient, Slot

Arguments = Sequence[bytes]

QUEUED_BYTES: Final = 64  # what a queued operation counts beyond its key and values
WATCHED_BYTES: Final = 16  # what a watched key counts beyond its bytes
UNKNOWN: Final = -1  # the revision of a watched key that could not be read: no key has it


class Transaction:
    """What was queued since MULTI."""

    def __init__(self) -> None:
        self.queued: list[Plan | bytes] = []  # a reply, of what concerns only the connection
        self.shard: int | None = None  # of all its keys
        self.failed = False  # a command was refused: EXEC will be too
        self.keys = 0  # operations, each counted with its keys: so many arrays they are on a link
        self.bytes = 0

    def queue(self, queued: Plan | bytes) -> None:
        """What EXEC is to carry out, or a reply. Raises CommandError if it is too much for one entry."""
        if isinstance(queued, bytes):
            keys, size = 1, len(queued) + QUEUED_BYTES
        else:
            keys = sum(len(operation.keys) for operation in queued.operations)
            size = sum(operation.size + QUEUED_BYTES for operation in queued.operations)
        if len(self.queued) >= MULTI_KEYS_MAX:
            raise CommandError(f"ERR a transaction is over the limit of {MULTI_KEYS_MAX} commands")
        if self.keys + keys > RESP_KEYS_MAX or self.bytes + size > MULTI_BYTES_MAX:
            raise CommandError(
                f"ERR a transaction is over the limit of {RESP_KEYS_MAX} keys or {MULTI_BYTES_MAX} bytes"
            )
        self.keys += keys
        self.bytes += size
        self.queued.append(queued)


def multi(client: RespClient, arguments: Arguments) -> None:
    """MULTI"""
    if client.transaction is not None:
        client.answer(Failure("ERR MULTI calls can not be nested"))
        return
    client.transaction = Transaction()
    client.answer(DONE)


def discard(client: RespClient, arguments: Arguments) -> None:
    """DISCARD"""
    if client.transaction is None:
        raise CommandError("ERR DISCARD without MULTI")
    client.transaction = None
    client.unwatch()
    client.answer(DONE)


def exec_(client: RespClient, arguments: Arguments) -> None:
    """EXEC"""
    if client.transaction is None:
        raise CommandError("ERR EXEC without MULTI")
    transaction, client.transaction = client.transaction, None
    watched = list(client.watched.items())
    size = transaction.bytes + client.watched_bytes
    client.unwatch()
    if transaction.failed:
        raise CommandError("EXECABORT Transaction discarded because of previous errors.")
    operations = [
        operation for queued in transaction.queued if isinstance(queued, Plan) for operation in queued.operations
    ]
    keys = [key for key, _ in watched] + [key for operation in operations for key in operation.keys]
    if not keys:
        _Executed(client, client.current, transaction).reply(None, [])
        return
    numbers = {shard_of(key, client.door.keyspace.shards) for key in keys}
    if len(numbers) > 1:
        raise CommandError(CROSS_SHARD_MULTI)
    for key in keys:
        client.door.keyspace.check_open(key)
    if size > MULTI_BYTES_MAX:
        raise CommandError(f"EXECABORT the transaction and its watched keys are over {MULTI_BYTES_MAX} bytes")
    items = [[operation.op, operation.key, *operation.args] for operation in operations]
    operation = Operation(TRANSACTION, keys[0], (watched, items), size)
    client.ask(operation, numbers.pop(), _Executed(client, client.current, transaction), None)


class _Executed:
    """Sink of a transaction."""

    __slots__ = ("client", "slot", "transaction")

    def __init__(self, client: RespClient, slot: Slot, transaction: Transaction) -> None:
        self.client = client
        self.slot = slot
        self.transaction = transaction

    def reply(self, token: None, results: list[Any] | None) -> None:
        """None: a watched key was changed."""
        version = self.client.version
        if results is None:
            self.client.fill(self.slot, encode(NoArray, version))
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
        self.client.fill(self.slot, b"".join(parts))

    def fail(self, token: None, code: int, message: str, details: dict[str, Any]) -> None:
        """Nothing was executed, or it is not known."""
        self.client.fill(self.slot, error(error_text(Failed(code, message))))


def _result(result: Any) -> Any:
    """The result of one operation: an error is an array [code, message, details]; a cell is one too, but begins with
    the value."""
    if type(result) is list and len(result) == 3 and type(result[0]) is int:
        return Failed(result[0], result[1].decode("utf-8", "replace"))
    return result


def watch(client: RespClient, arguments: Arguments) -> None:
    """WATCH key ..."""
    if client.transaction is not None:
        client.answer(Failure("ERR WATCH inside MULTI is not allowed"))
        return
    keys = [check_key(key) for key in dict.fromkeys(arguments) if client.watched.get(key, UNKNOWN) == UNKNOWN]
    if not keys:
        client.answer(DONE)
        return
    size = client.watched_bytes + sum(len(key) + WATCHED_BYTES for key in keys)
    if len(client.watched) + len(keys) > MULTI_KEYS_MAX or size > MULTI_BYTES_MAX:
        raise CommandError(f"ERR the watched keys are over the limit of {MULTI_KEYS_MAX} or {MULTI_BYTES_MAX} bytes")
    client.watched_bytes = size
    client.watched |= dict.fromkeys(keys, UNKNOWN)  # if this fails, EXEC does not go on as if nothing was watched
    for key in keys:
        client.door.keyspace.check_open(key)
    client.waits = True
    watching = _Watching(client, client.current, keys)
    for key in keys:
        client.ask(Operation(REVISION, key, (), len(key)), shard_of(key, client.door.keyspace.shards), watching, key)


class _Watching:
    """Sink of the revisions that WATCH asks for."""

    __slots__ = ("client", "failed", "left", "slot")

    def __init__(self, client: RespClient, slot: Slot, keys: Sequence[bytes]) -> None:
        self.client = client
        self.slot = slot
        self.left = len(keys)
        self.failed: Failed | None = None

    def reply(self, token: bytes, rev: int | None) -> None:
        """The revision of a key, None if it is absent."""
        self.client.watched[token] = rev or 0
        self._one_less()

    def fail(self, token: bytes, code: int, message: str, details: dict[str, Any]) -> None:
        """It could not be read."""
        self.failed = Failed(code, message)
        self._one_less()

    def _one_less(self) -> None:
        self.left -= 1
        if not self.left:
            self.client.waits = False  # the session goes on with what is held
            reply = encode(DONE, 2) if self.failed is None else error(error_text(self.failed))
            self.client.fill(self.slot, reply)


def unwatch(client: RespClient, arguments: Arguments) -> None:
    """UNWATCH"""
    if client.transaction is None:  # else EXEC looks at them, and forgets them then
        client.unwatch()
    client.answer(DONE)
