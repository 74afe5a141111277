"""RequestHandler: requests of native clients in, operations of the sequencer out.

Pure. It stands between the sessions, which decode and encode, and the sequencer. Each request is checked by the message
table, its keys are hashed to shards, and one request on many keys becomes one operation per key (writes) or one read at
one cut. Administrative requests are handed over, by the table `administration`, to parts that may answer much later.

A session is the sink of its requests: `reply`, `fail`, and `progress` for administration. Errors raised by the
checkers are answered here, except ProtocolError, which closes the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvtcp._version import __version__
from kvtcp.constants import (
    FRAME_BYTES_MAX,
    KEY_BYTES_MAX,
    MGET_KEYS_BYTES_MAX,
    MULTI_BYTES_MAX,
    MULTI_KEYS_MAX,
    PAGE_BYTES_MAX,
    PAGE_ITEMS_MAX,
    PROTOCOL_VERSION,
    VALUE_BYTES_MAX,
)
from kvtcp.errors import Code, RequestError, show_bytes
from kvtcp.frontend.keyspace import Keyspace
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.messages import REQUESTS, Message, Touches, check_key, check_value, request_id
from kvtcp.protocol.operations import ADD, CAS, DELETE, EXISTS, EXPIRE, GET, INCR, PERSIST, PUT, TTL
from kvtcp.replication.sequencing.multi_read import count_read, mget_read, page_read
from kvtcp.replication.sequencing.requests import Gather, Sink
from kvtcp.replication.sequencing.sequencer import Sequencer

LIMITS = {
    "frame_bytes_max": FRAME_BYTES_MAX, "key_bytes_max": KEY_BYTES_MAX, "value_bytes_max": VALUE_BYTES_MAX,
    "multi_keys_max": MULTI_KEYS_MAX, "multi_bytes_max": MULTI_BYTES_MAX, "page_items_max": PAGE_ITEMS_MAX,
    "page_bytes_max": PAGE_BYTES_MAX,
}  # fmt: skip


class Session(Sink, Protocol):
    """A client connection as the handler and administration see it. ClientSession describes the methods."""

    greeted: bool
    name: str

    def progress(self, token: int, progress: dict[str, Any]) -> None: ...
    def long_began(self) -> None: ...
    def long_ends(self) -> None: ...


# called with session, number of the request and checked arguments; answers the session. May raise RequestError
AdministrativeRequest = Callable[..., None]


class RequestHandler:
    """Check the requests of all sessions and have them carried out. One per coordinator."""

    def __init__(
        self, sequencer: Sequencer, keyspace: Keyspace, administration: Mapping[bytes, AdministrativeRequest]
    ) -> None:
        self.sequencer = sequencer
        self.keyspace = keyspace
        self.administration = administration  # operation -> function that carries it out
        self.shards = keyspace.shards
        self._by_number = sequencer.shards
        self._handlers: dict[bytes, Callable[[Session, int, Message], None]] = {
            **dict.fromkeys(REQUESTS, self._hand_over),
            b"hello": self._hello,
            b"get": self._get,
            b"put": self._put,
            b"add": self._write(ADD, has_value=True),
            b"cas": self._write(CAS, has_value=True),
            b"delete": self._write(DELETE),
            b"incr": self._write(INCR),
            b"expire": self._write(EXPIRE),
            b"persist": self._write(PERSIST),
            b"exists": self._read(EXISTS),
            b"ttl": self._read(TTL),
            b"mget": self._mget,
            b"mput": self._mput,
            b"mdelete": self._mdelete,
            b"scan": self._scan,
            b"count": self._count,
        }

    def handle(self, session: Session, messages: Sequence[Any]) -> None:
        """Start the requests of one read of a socket, in order. Raises ProtocolError if the peer cannot be answered."""
        handlers, keyspace = self._handlers, self.keyspace
        for message in messages:
            ident = request_id(message)
            op = message[1]
            try:
                handler = handlers.get(op) if type(op) is bytes else None
                if handler is None:
                    shown = show_bytes(op) if type(op) is bytes else f"of type {type(op).__name__}"
                    raise RequestError(f"unknown operation {shown}", Code.UNKNOWN_OP)
                if not session.greeted and op != b"hello":
                    raise RequestError("the first request of a connection must be hello")
                if keyspace.restoring is not None:
                    self._guard(op, message)
                handler(session, ident, message)
            except RequestError as error:
                session.fail(ident, error.code, error.message, error.details)

    # --- one key ------------------------------------------------------------------------------------

    def _get(self, session: Session, ident: int, message: Message) -> None:
        if len(message) == 3:
            key = check_key(message[2])
        else:
            (key,) = REQUESTS[b"get"].check(message)  # raises: the number of arguments is wrong
        self._by_number[shard_of(key, self.shards)].read(GET, key, session, ident)

    def _put(self, session: Session, ident: int, message: Message) -> None:
        if len(message) == 4:
            key = check_key(message[2])
            value = check_value(message[3], key)
            args: tuple[Any, ...] = (value,)
        else:
            key, *rest = REQUESTS[b"put"].check(message)
            value = rest[0]
            args = tuple(rest)
        self._by_number[shard_of(key, self.shards)].write(PUT, key, args, len(key) + len(value), session, ident)

    def _read(self, op: int) -> Callable[[Session, int, Message], None]:
        def handle(session: Session, ident: int, message: Message) -> None:
            (key,) = REQUESTS[message[1]].check(message)
            self._by_number[shard_of(key, self.shards)].read(op, key, session, ident)

        return handle

    def _write(self, op: int, has_value: bool = False) -> Callable[[Session, int, Message], None]:
        def handle(session: Session, ident: int, message: Message) -> None:
            key, *args = REQUESTS[message[1]].check(message)
            size = len(key) + len(args[0]) if has_value else len(key)
            self._by_number[shard_of(key, self.shards)].write(op, key, args, size, session, ident)

        return handle

    # --- many keys ----------------------------------------------------------------------------------

    def _mget(self, session: Session, ident: int, message: Message) -> None:
        (keys,) = REQUESTS[b"mget"].check(message)
        if not keys:
            session.reply(ident, [])
            return
        keys_bytes = sum(map(len, keys))
        if keys_bytes > MGET_KEYS_BYTES_MAX:
            text = f"the keys of this mget are {keys_bytes} bytes, the limit is {MGET_KEYS_BYTES_MAX}; ask for fewer"
            details = {"keys_bytes": keys_bytes, "keys_bytes_max": MGET_KEYS_BYTES_MAX}
            raise RequestError(text, Code.TOO_LARGE, details)
        numbers = [shard_of(key, self.shards) for key in keys]
        self.sequencer.multi_read(mget_read(keys, numbers, session, ident))

    def _mput(self, session: Session, ident: int, message: Message) -> None:
        (items,) = REQUESTS[b"mput"].check(message)
        if not items:
            session.reply(ident, [])
            return
        gather = Gather(session, ident, len(items))
        by_number, shards = self._by_number, self.shards
        for index, item in enumerate(items):
            key, value = item[0], item[1]
            args = (value,) if len(item) == 2 or item[2] is None else (value, item[2])
            by_number[shard_of(key, shards)].write(PUT, key, args, len(key) + len(value), gather, index)

    def _mdelete(self, session: Session, ident: int, message: Message) -> None:
        (keys,) = REQUESTS[b"mdelete"].check(message)
        if not keys:
            session.reply(ident, [])
            return
        gather = Gather(session, ident, len(keys))
        for index, key in enumerate(keys):
            self._by_number[shard_of(key, self.shards)].write(DELETE, key, (), len(key), gather, index)

    def _scan(self, session: Session, ident: int, message: Message) -> None:
        lower, upper, limit, reverse, keys_only = REQUESTS[b"scan"].check(message)
        if upper is not None and upper <= lower:
            session.reply(ident, [[], None])
            return
        all_shards = self.keyspace.all_shards
        self.sequencer.multi_read(page_read(all_shards, lower, upper, limit, reverse, keys_only, session, ident))

    def _count(self, session: Session, ident: int, message: Message) -> None:
        lower, upper = REQUESTS[b"count"].check(message)
        if upper is not None and upper <= lower:
            session.reply(ident, 0)
            return
        self.sequencer.multi_read(count_read(self.keyspace.all_shards, lower, upper, session, ident))

    # --- administration -----------------------------------------------------------------------------

    def _hello(self, session: Session, ident: int, message: Message) -> None:
        _, session.name = REQUESTS[b"hello"].check(message)
        session.greeted = True
        session.reply(ident, {
            "server": f"kvtcp {__version__}", "version": PROTOCOL_VERSION, "cluster": self.sequencer.map.cluster,
            "shards": self.shards, "limits": LIMITS,
        })  # fmt: skip

    def _hand_over(self, session: Session, ident: int, message: Message) -> None:
        op = message[1]
        self.administration[op](session, ident, *REQUESTS[op].check(message))

    # --- restoring ----------------------------------------------------------------------------------

    def _guard(self, op: bytes, message: Message) -> None:
        """Refuse a request that touches the prefix being restored; nothing of it is executed."""
        check, _, touches = REQUESTS[op]
        if touches is Touches.NOTHING:
            return
        arguments = check(message)
        if touches is Touches.RANGE:
            self.keyspace.check_range_open(*arguments[:2])
        else:
            for item in arguments[0] if touches is Touches.KEYS else arguments[:1]:
                self.keyspace.check_open(item if type(item) is bytes else item[0])
