"""Caller: the client that sent a command, as the command sees it; and what describes a command.

Pure. A command imports the Caller and never the pipeline behind it: the table imports the commands, the pipeline the
table. All commands of a client run in their order, and each is answered once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.resp.client_state import ClientState
from kvtcp.frontend.resp.plan import Arguments, Operation, Plan
from kvtcp.frontend.resp.service import RespService
from kvtcp.replication.sequencing.multi_read import MultiRead

Slot = list[bytes | None]  # the reply of one command, None until it is there


class Caller(Protocol):
    """A client whose command runs."""

    closing: bool  # no further command is looked at; the connection ends when all is answered
    waits: bool  # later commands are held
    gathered_bytes: int  # of replies that are being put together

    @property
    def state(self) -> ClientState:
        """Who it is, what it queued, what it watches."""

    @property
    def service(self) -> RespService:
        """What all clients share."""

    @property
    def keyspace(self) -> Keyspace:
        """The shards of the keys, and which keys are open."""

    @property
    def table(self) -> Mapping[bytes, CommandSpec]:
        """All commands, by their names in capitals."""

    @property
    def current(self) -> Slot:
        """The slot of the command that runs."""

    @property
    def is_first(self) -> bool:
        """Whether all commands before the one that runs are answered."""

    @property
    def is_gone(self) -> bool:
        """Whether the connection is lost."""

    def answer(self, value: Any) -> None:
        """Answer the command that runs; replies.py says with what."""

    def later(self) -> Callable[[Any], None]:
        """A function that answers the command that runs, whenever it is called."""

    def fill(self, slot: Slot, reply: bytes) -> None:
        """Answer the command of this slot with these bytes."""

    def when_first(self, step: Callable[[], None]) -> None:
        """Carry out `step` when all commands before the one that runs are answered; those behind it are held."""

    def defer(self, step: Callable[[], None]) -> None:
        """Carry out `step` soon: a sink must not ask the cluster for more."""

    def ask(self, operation: Operation, number: int, sink: Any, token: Any) -> None:
        """Ask the shard of this number for one operation."""

    def multi_read(self, multi: MultiRead) -> None:
        """Ask for a read over shards."""

    def set_version(self, version: int) -> None:
        """Use RESP2 or RESP3 for replies made from now on."""


Compile = Callable[[Arguments], Plan]
Run = Callable[[Caller, Arguments], None]


class CommandSpec(NamedTuple):
    """One command. `arity` as Redis counts it: with the name, negative = at least."""

    name: str
    arity: int
    group: str
    summary: str
    compile: Compile | None = None
    run: Run | None = None
    is_local: bool = False
    is_write: bool = False
    first_key: int = 0
    last_key: int = 0
    key_step: int = 0

    def takes(self, count: int) -> bool:
        """Whether so many arguments, the name included, are right."""
        return count == self.arity if self.arity >= 0 else count >= -self.arity

    def as_reply(self) -> list[Any]:
        """What COMMAND INFO says of it."""
        flags = ["write" if self.is_write else "readonly"] if self.compile else ["fast"]
        return [self.name, self.arity, flags, self.first_key, self.last_key, self.key_step, [], [], [], []]
