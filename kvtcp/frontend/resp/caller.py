"""Caller: the client that sent a command, as the command sees it; and CommandSpec, the description of a command.

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
    """A client whose command runs. Pipeline describes the methods."""

    state: ClientState  # its name, version, transaction and watched keys
    service: RespService
    keyspace: Keyspace  # the shards of the keys, and which keys are open
    table: Mapping[bytes, CommandSpec]  # all commands, by their names in capitals
    current: Slot  # of the command that runs
    closing: bool  # no further command is carried out; the connection ends when all are answered
    waits: bool  # later commands are held
    gathered_bytes: int  # of replies that are being put together
    is_gone: bool  # the connection is lost

    @property
    def is_first(self) -> bool: ...

    def answer(self, value: Any) -> None: ...
    def later(self) -> Callable[[Any], None]: ...
    def fill(self, slot: Slot, reply: bytes) -> None: ...
    def when_first(self, step: Callable[[], None]) -> None: ...
    def defer(self, step: Callable[[], None]) -> None: ...
    def ask(self, operation: Operation, number: int, sink: Any, token: Any) -> None: ...
    def multi_read(self, multi: MultiRead) -> None: ...
    def set_version(self, version: int) -> None: ...


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
        """Whether this number of arguments, the name included, is right."""
        return count == self.arity if self.arity >= 0 else count >= -self.arity

    def as_reply(self) -> list[Any]:
        """The reply of COMMAND INFO."""
        flags = ["write" if self.is_write else "readonly"] if self.compile else ["fast"]
        return [self.name, self.arity, flags, self.first_key, self.last_key, self.key_step, [], [], [], []]
