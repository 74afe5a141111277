"""Pipeline: the commands of one client of the Redis protocol, and their replies in order.

Pure; between a session's parser and the sequencer. The cluster answers out of order, a client of Redis is answered in
order. So each command gets a *slot*, a list of one, in a queue. A reply fills its slot, and `take_output` takes the
filled slots from the front.

GET and SET without options are carried out here, in as few steps as possible; everything else goes through the table of
commands. Between MULTI and EXEC plans are collected. A command whose result the next one depends on (WATCH) makes the
client *wait*: later commands are held until `resume`. So are those behind TURN_BYTES_MAX of replies that were made at
once (COMMAND, INFO): other clients have a turn between, and a client that does not read is not served any further.

The shards answer in the order in which they were asked, but for two cases: a read over several shards passes writes
that wait for room in a window, and a read of one key passes those that wait for a missing node. Such a read is carried
out when all commands before it are answered (`when_first`), so a client sees its own earlier writes.

Invariants: every command has exactly one slot, filled exactly once, and commands are carried out in their order; after
QUIT or an error of the protocol no further command is carried out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from kvtcp.constants import CLIENT_OUTPUT_BYTES_MAX, KEY_BYTES_MAX, KIB
from kvtcp.errors import RequestError
from kvtcp.frontend.resp.caller import CommandSpec, Slot
from kvtcp.frontend.resp.client_state import ClientState, Transaction
from kvtcp.frontend.resp.commands.table import COMMANDS, IMMEDIATE
from kvtcp.frontend.resp.plan import (
    CROSS_SHARD,
    CROSS_SHARD_MULTI,
    CommandError,
    Failed,
    Operation,
    Plan,
    error_text,
)
from kvtcp.frontend.resp.replies import HEADS, OK, Simple, bulk, encode, error, nil
from kvtcp.frontend.resp.service import RespService
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.operations import GET, PUT
from kvtcp.replication.sequencing.multi_read import MultiRead, mget_read

LARGE_REPLY_BYTES: Final = 1_024
TURN_BYTES_MAX: Final = 256 * KIB  # of replies made in one turn, a command on the whole server counted with RUN_BYTES
RUN_BYTES: Final = 16 * KIB
QUEUED: Final = Simple("QUEUED")
_SECURITY: Final = frozenset({b"POST", b"HOST:"})


class Pipeline:
    """One client. `wake` is called when there is output, once until it is taken."""

    def __init__(self, service: RespService, peer: str, wake: Callable[[], None]) -> None:
        self.state = ClientState(service.next_client(), peer, service.now_ms())
        self.service = service
        self.keyspace = service.keyspace
        self.table: Mapping[bytes, CommandSpec] = COMMANDS
        self.closing = False  # nothing more is read; the connection ends when all is answered
        self.suspicious = ""  # the sign of an attack through a browser
        self.slots: deque[Slot] = deque()
        self.large_bytes = 0  # of filled slots with large replies
        self.gathered_bytes = 0  # of replies that are being put together
        self.waits = False
        self.held: list[list[bytes]] = []  # commands that came while it waits, or behind a turn
        self.may_begin = True  # the client reads its replies
        self.is_gone = False  # the connection is lost
        self.current: Slot = [None]  # of the command that is run
        self._deferred: list[Callable[[], None]] = []
        self._when_first: tuple[Slot, Callable[[], None]] | None = None
        self._turn_bytes = 0
        self._last_error = ""  # of the protocol, behind the commands that are held
        self._wake = wake
        self._woken = False
        self._nil = nil(2)
        self._shards = service.keyspace.shards
        self._states = service.sequencer.shards
        self._stored = _Stored(self)
        self._quick = {b"GET": self._get, b"get": self._get, b"SET": self._set, b"set": self._set}

    # --- commands -----------------------------------------------------------------------------------

    def handle(self, commands: Sequence[list[bytes]]) -> None:
        """Start commands, in order."""
        if self.closing:
            return
        if self.waits or self.held:
            self.held += commands
            return
        self._turn_bytes = 0
        quick = self._quick if self.state.transaction is None and self.keyspace.is_open else _NOTHING
        for n, arguments in enumerate(commands):
            begin = quick.get(arguments[0])
            if begin is not None and begin(arguments):
                continue
            self._handle_one(arguments)
            if self.closing:
                return
            if self.waits or self._turn_bytes > TURN_BYTES_MAX:
                self.held = list(commands[n + 1 :])
                self._call_wake()
                return
            quick = self._quick if self.state.transaction is None and self.keyspace.is_open else _NOTHING

    def defer(self, step: Callable[[], None]) -> None:
        """Carry out `step` with the next `resume`: a sink must not ask the cluster for more."""
        self._deferred.append(step)
        self._call_wake()

    def _call_wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._wake()

    @property
    def outstanding(self) -> int:
        """Commands without a reply, or whose reply was not taken yet."""
        return len(self.slots) + len(self.held) + bool(self._last_error)

    @property
    def held_bytes(self) -> int:
        """Bytes that the server holds for the client: large replies that wait for an earlier one or are being made,
        commands queued since MULTI, and watched keys."""
        transaction = self.state.transaction
        queued_bytes = 0 if transaction is None else transaction.bytes
        return self.large_bytes + self.gathered_bytes + queued_bytes + self.state.watched_bytes

    @property
    def _may_resume(self) -> bool:
        """Whether the commands that are held may be carried out."""
        return not self.waits and self.may_begin and self.large_bytes <= CLIENT_OUTPUT_BYTES_MAX

    @property
    def has_work(self) -> bool:
        """Whether `resume` is to be called."""
        return bool(self._deferred) or (bool(self.held or self._last_error) and self._may_resume)

    def resume(self) -> None:
        """Carry out the deferred steps, and the held commands if they may be carried out."""
        deferred, self._deferred = self._deferred, []
        for step in deferred:
            step()
        if self._may_resume:
            held, self.held = self.held, []
            self.handle(held)
            if self._last_error and not self.waits and not self.held:
                text, self._last_error = self._last_error, ""
                if not self.closing:
                    self.protocol_error(text)

    def _get(self, arguments: list[bytes]) -> bool:
        """Carry out GET key; false if the command is anything else."""
        if len(arguments) != 2 or not 0 < len(arguments[1]) <= KEY_BYTES_MAX:
            return False
        key = arguments[1]
        number = shard_of(key, self._shards)
        state = self._states[number]
        if state.waiting and not state.is_whole():
            return False
        slot: Slot = [None]
        self.slots.append(slot)
        state.read(GET, key, self, slot)
        return True

    def _set(self, arguments: list[bytes]) -> bool:
        """Carry out SET key value; false if the command is anything else."""
        if len(arguments) != 3 or not 0 < len(arguments[1]) <= KEY_BYTES_MAX:
            return False
        _, key, value = arguments
        slot: Slot = [None]
        self.slots.append(slot)
        self._states[shard_of(key, self._shards)].write(PUT, key, (value,), len(key) + len(value), self._stored, slot)
        return True

    def _handle_one(self, arguments: list[bytes]) -> None:
        slot: Slot = [None]
        self.slots.append(slot)
        name = arguments[0].upper()
        try:
            spec = COMMANDS.get(name)
            if spec is None:
                if name in _SECURITY:
                    self.suspicious = f"{name.decode()} is no command, but what a browser sends"
                    self.closing = True
                raise CommandError(_unknown(arguments))
            if not spec.takes(len(arguments)):
                raise CommandError(f"ERR wrong number of arguments for '{spec.name}' command")
            self.state.last_command = spec.name
            self.current = slot
            if self.state.transaction is not None and spec.name not in IMMEDIATE:
                self._queue(self.state.transaction, spec, arguments[1:], slot)
            elif spec.compile is not None:
                self.carry_out(spec.compile(arguments[1:]), slot)
            else:
                assert spec.run is not None, "a command is compiled or run"
                if not spec.is_local:
                    self._turn_bytes += RUN_BYTES
                spec.run(self, arguments[1:])
        except CommandError as refused:
            self._refuse(slot, refused.text)
        except RequestError as refused:
            self._refuse(slot, error_text(Failed(refused.code, refused.message)))

    def _refuse(self, slot: Slot, text: str) -> None:
        if self.state.transaction is not None:
            self.state.transaction.failed = True
        self.fill(slot, error(text))

    def _queue(self, transaction: Transaction, spec: CommandSpec, arguments: list[bytes], slot: Slot) -> None:
        if spec.compile is None:
            if not spec.is_local:
                raise CommandError(f"ERR '{spec.name}' concerns all shards and cannot be part of a transaction")
            assert spec.run is not None, "a command is compiled or run"
            inner: Slot = [None]
            self.current = inner
            spec.run(self, arguments)
            assert inner[0] is not None, "what concerns only the connection is answered at once"
            if len(inner[0]) > LARGE_REPLY_BYTES:
                self.large_bytes -= len(inner[0])  # this reply is counted as a part of EXEC's
            transaction.queue(inner[0])
        else:
            plan = spec.compile(arguments)
            for operation in plan.operations:
                for key in operation.keys:
                    self.keyspace.check_open(key)
                    number = shard_of(key, self._shards)
                    if transaction.shard not in (None, number):
                        raise CommandError(CROSS_SHARD_MULTI)
                    transaction.shard = number
            transaction.queue(plan)
        self.fill(slot, encode(QUEUED, self.state.version))

    def carry_out(self, plan: Plan, slot: Slot) -> None:
        """Ask the shards; the reply comes when all have answered."""
        operations = plan.operations
        numbers: list[int] = []
        for operation in operations:
            keys = operation.keys
            found = [shard_of(key, self._shards) for key in keys]
            if len(found) > 1 and len(set(found)) > 1:
                raise CommandError(CROSS_SHARD)
            numbers.append(found[0])
            for key in keys:
                self.keyspace.check_open(key)
        if plan.one_shard is not None and len(operations) > 1 and len(set(numbers)) == 1:
            operations = [plan.one_shard]
        answer = _Answer(self, slot, plan, len(operations))
        if len(operations) > 1 and all(operation.op == GET for operation in operations):
            keys = [operation.key for operation in operations]
            self.multi_read(mget_read(keys, numbers, answer, None))
        elif not operations[0].is_write and self._may_pass(numbers, is_multi=False):
            self.when_first(lambda: self._ask_all(operations, numbers, answer))
        else:
            self._ask_all(operations, numbers, answer)

    def _ask_all(self, operations: Sequence[Operation], numbers: Sequence[int], answer: _Answer) -> None:
        for n, operation in enumerate(operations):
            self.ask(operation, numbers[n], answer, n)

    def multi_read(self, multi: MultiRead) -> None:
        """Ask for a read over shards, of the command that runs."""
        if self._may_pass(multi.shards, is_multi=True):
            self.when_first(lambda: self.service.sequencer.multi_read(multi))
        else:
            self.service.sequencer.multi_read(multi)

    @property
    def is_first(self) -> bool:
        """Whether all commands before the one that runs are answered."""
        return len(self.slots) < 2

    def _may_pass(self, numbers: Sequence[int], is_multi: bool) -> bool:
        """Whether a read of these shards could be answered before earlier commands of this client."""
        if self.is_first or not self.service.sequencer.waiting_items:
            return False
        states = [self._states[number] for number in numbers]
        return any(state.waiting and (is_multi or not state.is_whole()) for state in states)

    def when_first(self, step: Callable[[], None]) -> None:
        """Carry out `step` when all commands before the one that runs are answered; those behind it are held."""
        self.waits = True
        self._when_first = (self.current, step)

    def ask(self, operation: Operation, number: int, sink: Any, token: Any) -> None:
        """Ask the shard of this number for one operation."""
        if operation.is_write:
            self._states[number].write(operation.op, operation.key, operation.args, operation.size, sink, token)
        else:
            self._states[number].read(operation.op, operation.key, sink, token)

    # --- replies ------------------------------------------------------------------------------------

    def fill(self, slot: Slot, reply: bytes) -> None:
        """Answer the command of this slot with these bytes."""
        slot[0] = reply
        if len(reply) > LARGE_REPLY_BYTES:
            self.large_bytes += len(reply)
            self._turn_bytes += len(reply)
        self._call_wake()

    def answer(self, value: Any) -> None:
        """Answer the command that runs; replies.py has the types of values."""
        self.fill(self.current, encode(value, self.state.version))

    def later(self) -> Callable[[Any], None]:
        """Return a function that answers the command that runs, whenever it is called."""
        slot = self.current
        return lambda value: self.fill(slot, encode(value, self.state.version))

    def reply(self, slot: Slot, cell: Any) -> None:
        """Take a result as the sink of GET. The most frequent reply: everything inline."""
        if cell is None:
            slot[0] = self._nil
        else:
            value = cell[0]
            if len(value) < LARGE_REPLY_BYTES - 16:
                slot[0] = HEADS[len(value)] + value + b"\r\n"
            else:
                self.fill(slot, bulk(value))
        if not self._woken:
            self._woken = True
            self._wake()

    def fail(self, slot: Slot, code: int, message: str, details: dict[str, Any]) -> None:
        """Take an error as the sink of GET and SET."""
        self.fill(slot, error(error_text(Failed(code, message))))

    def take_output(self) -> list[bytes]:
        """Return the replies that are next, as far as they are here."""
        self._woken = False
        slots = self.slots
        out: list[bytes] = []
        while slots:
            reply = slots[0][0]
            if reply is None:
                break
            out.append(reply)
            slots.popleft()
        if self._when_first is not None and slots[0] is self._when_first[0]:
            self._deferred.append(self._when_first[1])
            self._when_first = None
            self.waits = False
        if self.large_bytes:
            self.large_bytes -= sum(len(reply) for reply in out if len(reply) > LARGE_REPLY_BYTES)
        return out

    def protocol_error(self, text: str) -> None:
        """End the stream with this as its last reply, behind the commands that are held."""
        if self.waits or self.held:
            self._last_error = text
            return
        slot: Slot = [None]
        self.slots.append(slot)
        self.fill(slot, error(f"ERR {text}"))
        self.closing = True

    def set_version(self, version: int) -> None:
        """Use RESP2 or RESP3 for replies made from now on."""
        self.state.version = version
        self._nil = nil(version)


_NOTHING: Final[dict[bytes, Callable[[list[bytes]], bool]]] = {}


class _Stored:
    """Sink of SET without options."""

    __slots__ = ("pipeline",)

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def reply(self, slot: Slot, rev: int) -> None:
        pipeline = self.pipeline
        slot[0] = OK
        if not pipeline._woken:
            pipeline._woken = True
            pipeline._wake()

    def fail(self, slot: Slot, code: int, message: str, details: dict[str, Any]) -> None:
        self.pipeline.fail(slot, code, message, details)


class _Answer:
    """Sink of a plan's operations. A token is the place of one; None for an MGET, whose results all come at once."""

    __slots__ = ("left", "pipeline", "plan", "results", "slot")

    def __init__(self, pipeline: Pipeline, slot: Slot, plan: Plan, count: int) -> None:
        self.pipeline = pipeline
        self.slot = slot
        self.plan = plan
        self.results: list[Any] = [None] * count
        self.left = count

    def reply(self, token: int | None, result: Any) -> None:
        if token is None:
            self._finish(result)
            return
        self.results[token] = result
        self.left -= 1
        if not self.left:
            self._finish(self.results)

    def fail(self, token: int | None, code: int, message: str, details: dict[str, Any]) -> None:
        failed = Failed(code, message)
        if token is None:
            self._finish([failed])
        else:
            self.reply(token, failed)

    def _finish(self, results: list[Any]) -> None:
        self.pipeline.fill(self.slot, encode(self.plan.reply(results), self.pipeline.state.version))


def _unknown(arguments: Sequence[bytes]) -> str:
    name = arguments[0][:128].decode("utf-8", "replace")
    shown = ""
    for argument in arguments[1:]:
        if len(shown) >= 128:
            break
        shown += f"'{argument[: 128 - len(shown)].decode('utf-8', 'replace')}' "
    return f"ERR unknown command '{name}', with args beginning with: {shown}"
