"""The state of one client of the Redis protocol between two commands: who it is, what it queued, what it watches.

Pure. CLIENT LIST shows it, and EXEC makes one operation of what is queued (transactions.py). All of it is gone with the
connection.
"""

from __future__ import annotations

from typing import Final

from kvtcp.constants import MULTI_BYTES_MAX, MULTI_KEYS_MAX, RESP_KEYS_MAX
from kvtcp.frontend.resp.plan import CommandError, Plan

QUEUED_BYTES: Final = 64  # what a queued operation counts beyond its key and values


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


class ClientState:
    """One client."""

    def __init__(self, ident: int, peer: str, began_ms: int) -> None:
        self.ident = ident
        self.peer = peer
        self.began_ms = began_ms
        self.name = ""
        self.library = ("", "")  # name and version, as CLIENT SETINFO says
        self.version = 2  # of the protocol
        self.last_command = "NULL"
        self.transaction: Transaction | None = None  # between MULTI and EXEC
        self.watched: dict[bytes, int] = {}  # key -> revision
        self.watched_bytes = 0

    def unwatch(self) -> None:
        """Forget the watched keys."""
        self.watched = {}
        self.watched_bytes = 0
