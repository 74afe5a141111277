"""The state of one client of the Redis protocol between two commands: its name, its transaction, its watched keys.

Pure. CLIENT LIST shows it, and EXEC makes one operation of the queued commands (transactions.py). All of it is gone
with the connection.
"""

from __future__ import annotations

from typing import Final

from kvtcp.constants import MULTI_BYTES_MAX, MULTI_KEYS_MAX, RESP_KEYS_MAX
from kvtcp.frontend.resp.plan import CommandError, Plan

QUEUED_BYTES: Final = 64  # size of a queued operation beyond its key and values


class Transaction:
    """The commands queued since MULTI."""

    def __init__(self) -> None:
        self.queued: list[Plan | bytes] = []  # bytes: the reply of a command that concerns only the connection
        self.shard: int | None = None  # of all its keys
        self.failed = False  # a command was refused: EXEC will be too
        self.keys = 0  # of all operations: each key is an array on a link
        self.bytes = 0

    def queue(self, queued: Plan | bytes) -> None:
        """Add a plan for EXEC to carry out, or a reply. Raises CommandError if they are too much for one entry."""
        if isinstance(queued, bytes):
            keys, size = 1, len(queued) + QUEUED_BYTES
        else:
            keys = sum(len(operation.keys) for operation in queued.operations)
            size = sum(operation.size + QUEUED_BYTES for operation in queued.operations)
        if len(self.queued) >= MULTI_KEYS_MAX:
            raise CommandError(f"ERR a transaction is over the limit of {MULTI_KEYS_MAX} commands")
        if self.keys + keys > RESP_KEYS_MAX or self.bytes + size > MULTI_BYTES_MAX:
            limits = f"{RESP_KEYS_MAX} keys or {MULTI_BYTES_MAX} bytes"
            raise CommandError(f"ERR a transaction is over the limit of {limits}")
        self.keys += keys
        self.bytes += size
        self.queued.append(queued)


class ClientState:
    """One client."""

    def __init__(self, ident: int, peer: str, began_ms: int) -> None:
        self.ident = ident
        self.peer = peer
        self.began_ms = began_ms
        self.name = ""
        self.library = ("", "")  # name and version, given by CLIENT SETINFO
        self.version = 2  # of the protocol
        self.last_command = "NULL"
        self.transaction: Transaction | None = None  # between MULTI and EXEC
        self.watched: dict[bytes, int] = {}  # key -> revision
        self.watched_bytes = 0

    def unwatch(self) -> None:
        """Forget the watched keys."""
        self.watched = {}
        self.watched_bytes = 0
