"""The asynchronous client: `async with kvtcp.connect("kvtcp://127.0.0.1:8000") as kv`.

One object, one connection, any number of concurrent calls: they are pipelined, and those of one tick of the loop
leave in one write. A client belongs to the loop it was made in. Keys are bytes or text (UTF-8) and always come back as
bytes; values go through the client's codec (`kvtcp.client.codecs`). Durations are seconds.

Every method that sends a request takes `timeout`, in seconds; None is the client's own. Besides the errors in its
docstring it raises:

    RequestError     the request is wrong or over a limit; most are found before anything is sent
    Unavailable      not executed: refused for a passing reason, or unreachable, until the timeout
    OutcomeUnknown   a write was sent and its answer did not come; it is never repeated by the client
    ProtocolError    the other side does not speak this protocol
    DataError        a stored value is not of the codec's form

Cancelling a call is safe for all others. A cancelled write may or may not have happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable
from contextlib import aclosing
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, Literal, TypeVar, overload

from kvtcp.client import administration as admin
from kvtcp.client import codecs
from kvtcp.client.channel import NAME_DEFAULT, TIMEOUT_S, Channel, ServerInfo, decode_tree, may_repeat
from kvtcp.client.codecs import Codec
from kvtcp.client.requests import (
    NEVER,
    Entry,
    Items,
    Key,
    KeyBatch,
    PageRequest,
    conditions,
    count_request,
    duration_ms,
    key_bytes,
    open_cell,
    open_rows,
    put_items,
    request,
    seconds,
    text_bytes,
    ttl_options,
)
from kvtcp.client.url import URL_DEFAULT, parse_url
from kvtcp.constants import CLIENT_ADMIN_IDLE_MS, CLIENT_CHUNKS_MAX, PAGE_ITEMS_MAX
from kvtcp.errors import DataError, KvtcpError, RequestError, show_bytes
from kvtcp.protocol.messages import check_value

V = TypeVar("V")
D = TypeVar("D")
ADMIN_IDLE_S: Final = CLIENT_ADMIN_IDLE_MS / 1000
ProgressCallback = Callable[[dict[str, Any]], None]


class AsyncClient(Generic[V]):
    """A connection to a cluster. Made by `connect`; V is the type of values its codec gives."""

    def __init__(self, channel: Channel, codec: Codec[V]) -> None:
        self._channel = channel
        self._codec = codec
        self._call = channel.call

    async def __aenter__(self) -> AsyncClient[V]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls that still wait end with an error, later ones raise RuntimeError."""
        await self._channel.close()

    @property
    def info(self) -> ServerInfo:
        """The answer of the server to `hello`: version, cluster id, shards, limits."""
        info = self._channel.info
        assert info is not None, "a client exists only after its first hello"
        return info

    @property
    def url(self) -> str:
        """The address in full."""
        return self._channel.address.url

    # --- one key --------------------------------------------------------------------------------

    @overload
    async def get(self, key: Key, default: None = None, *, timeout: float | None = None) -> V | None: ...
    @overload
    async def get(self, key: Key, default: D, *, timeout: float | None = None) -> V | D: ...
    async def get(self, key: Key, default: Any = None, *, timeout: float | None = None) -> Any:
        """The value of a key, or `default` when there is none."""
        name = key_bytes(key)
        cell = await self._call([0, b"get", name], timeout)
        return default if cell is None else self._decode(name, open_cell(cell)[0])

    async def get_entry(self, key: Key, *, timeout: float | None = None) -> Entry[V] | None:
        """Value, revision and remaining life of a key, or None."""
        name = key_bytes(key)
        cell = await self._call([0, b"get", name], timeout)
        return self._cell(name, cell)

    async def put(
        self, key: Key, value: V | str, *, ttl: float | None = None, keep_ttl: bool = False,
        timeout: float | None = None,
    ) -> int:  # fmt: skip
        """Store a value, new or in place of another; returns the revision.

        The key lives for `ttl` seconds, without one for ever; `keep_ttl` leaves the deadline it has.
        """
        name = key_bytes(key)
        data = self._encode(name, value)
        message = [0, b"put", name, data]
        if ttl is not None or keep_ttl:
            message = request(b"put", name, data, *ttl_options(ttl, keep_ttl))
        rev: int = await self._call(message, timeout)
        return rev

    async def add(self, key: Key, value: V | str, *, ttl: float | None = None, timeout: float | None = None) -> int:
        """Store a value under a key that is not there yet; returns the revision. Raises KeyExists."""
        name = key_bytes(key)
        rev: int = await self._call(request(b"add", name, self._encode(name, value), *ttl_options(ttl)), timeout)
        return rev

    async def delete(
        self, key: Key, *, if_value: V | str | None = None, if_rev: int | None = None, timeout: float | None = None
    ) -> bool:
        """Delete a key, with a condition only if its value or revision is this; returns whether it was deleted."""
        name = key_bytes(key)
        options = self._condition(name, if_value, if_rev)
        deleted: bool = await self._call(request(b"delete", name, *([options] if options else [])), timeout)
        return deleted

    async def cas(
        self, key: Key, value: V | str, *, if_value: V | str | None = None, if_rev: int | None = None,
        timeout: float | None = None,
    ) -> int:  # fmt: skip
        """Replace a value only if the present one, or its revision, is this; returns the new revision.

        Exactly one condition is needed; `if_rev=0` means that the key must be absent. Keeps the deadline. Raises
        Mismatch, whose `rev` is the present revision.
        """
        name = key_bytes(key)
        message = request(b"cas", name, self._encode(name, value), self._condition(name, if_value, if_rev))
        rev: int = await self._call(message, timeout)
        return rev

    async def incr(self, key: Key, by: int = 1, *, timeout: float | None = None) -> int:
        """Add to a counter and return its new value; a missing key counts as 0.

        The value is a signed 64-bit integer in decimal text; RequestError (NOT_A_NUMBER, RANGE) changes nothing.
        """
        total: int = await self._call(request(b"incr", key_bytes(key), by), timeout)
        return total

    async def exists(self, key: Key, *, timeout: float | None = None) -> bool:
        """Whether a key is present."""
        there: bool = await self._call([0, b"exists", key_bytes(key)], timeout)
        return there

    async def expire(self, key: Key, ttl: float, *, timeout: float | None = None) -> bool:
        """Give a key `ttl` more seconds to live; returns whether it is there."""
        there: bool = await self._call([0, b"expire", key_bytes(key), duration_ms(ttl)], timeout)
        return there

    async def persist(self, key: Key, *, timeout: float | None = None) -> bool:
        """Remove a key's deadline; returns whether it had one."""
        had_one: bool = await self._call([0, b"persist", key_bytes(key)], timeout)
        return had_one

    async def ttl(self, key: Key, *, timeout: float | None = None) -> float | None:
        """Seconds a key has left: `math.inf` without a deadline, None when there is no such key."""
        ttl_ms: int | None = await self._call([0, b"ttl", key_bytes(key)], timeout)
        if ttl_ms is None:
            return None
        return NEVER if ttl_ms < 0 else ttl_ms / 1000

    # --- ranges ---------------------------------------------------------------------------------

    @overload
    def scan(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, keys_only: Literal[False] = False, timeout: float | None = None,
    ) -> AsyncIterator[tuple[bytes, V]]: ...  # fmt: skip
    @overload
    def scan(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, keys_only: Literal[True], timeout: float | None = None,
    ) -> AsyncIterator[tuple[bytes, None]]: ...  # fmt: skip
    def scan(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, keys_only: bool = False, timeout: float | None = None,
    ) -> AsyncIterator[tuple[bytes, Any]]:  # fmt: skip
        """Pairs in key order (or reversed): `start` inclusive to `end` exclusive, of those only with `prefix`.

        At most `limit` pairs; with `keys_only` each value is None and is not sent. Read in pages as it goes along, the
        next one while you have this one: a page is one consistent cut, and a key untouched meanwhile appears exactly
        once. `timeout` is for each page.
        """
        return self._items(PageRequest(prefix, start, end, limit, reverse, keys_only), timeout, self._pair)

    def scan_keys(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, timeout: float | None = None,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        """`scan` with keys alone."""
        return self._items(PageRequest(prefix, start, end, limit, reverse, True), timeout, self._key)

    def scan_entries(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, timeout: float | None = None,
    ) -> AsyncIterator[Entry[V]]:  # fmt: skip
        """`scan` with revisions and remaining lifetimes."""
        return self._items(PageRequest(prefix, start, end, limit, reverse, False), timeout, self._entry)

    def scan_pages(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, page_items: int = PAGE_ITEMS_MAX, timeout: float | None = None,
    ) -> AsyncIterator[list[tuple[bytes, V]]]:  # fmt: skip
        """`scan` by pages: lists of at most `page_items` pairs. A page may be shorter, even empty."""
        return self._pages(PageRequest(prefix, start, end, limit, reverse, False, page_items), timeout)

    async def count(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None,
        timeout: float | None = None,
    ) -> int:  # fmt: skip
        """The number of keys, in a range or with a prefix."""
        keys: int = await self._call(count_request(prefix, start, end), timeout)
        return keys

    # --- many keys ------------------------------------------------------------------------------

    async def put_many(self, items: Items[V], *, ttl: float | None = None, timeout: float | None = None) -> list[int]:
        """Store many values: a mapping, pairs, or triples `(key, value, ttl)`; returns their revisions in order.

        Not atomic. Sent in requests of about 1 MiB, several under way at once; `timeout` is for each of them. `ttl` is
        for items without their own. Keys that were refused for a passing reason are sent again, they alone. Raises
        BatchError when some keys failed (see `BatchError.results`); when all failed for one reason, that error itself.
        """
        ttl_ms = None if ttl is None else duration_ms(ttl)
        rows: list[list[Any]] = []
        for key, value, own_ttl in put_items(items):
            name = key_bytes(key)
            life_ms = ttl_ms if own_ttl is None else duration_ms(own_ttl)
            row: list[Any] = [name, self._encode(name, value)]
            rows.append(row if life_ms is None else [*row, life_ms])
        keys = [row[0] for row in rows]
        batch = KeyBatch(b"mput", rows, keys, [len(row[0]) + len(row[1]) for row in rows])
        return await self._run(batch, timeout)

    async def get_many(self, keys: Iterable[Key], *, timeout: float | None = None) -> list[V | None]:
        """The values of many keys in their order, None for those that are missing. Raises as `put_many`."""
        return [None if e is None else e.value for e in await self.get_many_entries(keys, timeout=timeout)]

    async def get_many_entries(self, keys: Iterable[Key], *, timeout: float | None = None) -> list[Entry[V] | None]:
        """`get_many` with revisions and remaining lifetimes."""
        names = [key_bytes(key) for key in keys]
        cells = await self._run(KeyBatch(b"mget", names, names, [len(name) for name in names]), timeout)
        return [self._cell(name, cell) for name, cell in zip(names, cells, strict=True)]

    async def delete_many(self, keys: Iterable[Key], *, timeout: float | None = None) -> list[bool]:
        """Delete many keys; returns in their order whether each was there. Not atomic. Raises as `put_many`."""
        names = [key_bytes(key) for key in keys]
        return await self._run(KeyBatch(b"mdelete", names, names, [len(name) for name in names]), timeout)

    # --- administration -------------------------------------------------------------------------

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The state of the cluster, names as text."""
        return await self._administer(b"status", dict, timeout)

    async def nodes(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The nodes of the cluster, names as text."""
        return await self._administer(b"nodes", list, timeout)

    async def shards(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The shards of the cluster and the nodes that hold them, names as text."""
        return await self._administer(b"shards", list, timeout)

    async def backup(
        self, name: str | None = None, *, progress: ProgressCallback | None = None, timeout: float = ADMIN_IDLE_S
    ) -> dict[str, Any]:
        """Make a backup on the nodes; returns its name and counts. `name` None is made from the time.

        `progress` is called with a dict now and then; `timeout` is the longest time without progress.
        """
        message = request(b"backup", *([] if name is None else [text_bytes(name, "the backup's name")]))
        return await self._administer_long(message, progress, timeout)

    async def restore(
        self, name: str, mode: Literal["merge", "replace"] = "merge", *, prefix: Key | None = None,
        dry_run: bool = False, progress: ProgressCallback | None = None, timeout: float = ADMIN_IDLE_S,
    ) -> dict[str, Any]:  # fmt: skip
        """Restore a backup and return counts: `merge` it into the present content, or `replace` that.

        Of the keys only those with `prefix`; `dry_run` only counts. `progress` and `timeout` as for `backup`.
        """
        options: dict[bytes, Any] = {b"mode": text_bytes(mode, "mode"), b"dry_run": dry_run}
        if prefix:
            options[b"prefix"] = key_bytes(prefix)
        message = request(b"restore", text_bytes(name, "the backup's name"), options)
        return await self._administer_long(message, progress, timeout)

    async def node_add(self, host: str, port: int, *, timeout: float | None = None) -> admin.NodeChange:
        """Add the node that listens at `host`:`port` to the cluster; it holds nothing until a `rebalance`.

        This and the other changes of the cluster raise AdminError if the present state of the cluster does not allow
        them. They return when the change is accepted; the data is moved afterwards (`moving` of `status`).
        """
        return admin.node_change(await self._change(admin.node_add_request(host, port), timeout))

    async def node_drain(self, node: str, *, timeout: float | None = None) -> admin.NodeChange:
        """Have all shards of a node moved to others; `shards` of the result is their number."""
        return admin.node_change(await self._change(admin.node_request(b"node_drain", node), timeout))

    async def node_undrain(self, node: str, *, timeout: float | None = None) -> admin.NodeChange:
        """Let a drained node hold shards again; moved shards come back with a rebalance."""
        return admin.node_change(await self._change(admin.node_request(b"node_undrain", node), timeout))

    async def node_remove(self, node: str, *, timeout: float | None = None) -> admin.NodeChange:
        """Remove a node that holds nothing from the cluster."""
        return admin.node_change(await self._change(admin.node_request(b"node_remove", node), timeout))

    async def node_forget(self, node: str, *, timeout: float | None = None) -> admin.NodeChange:
        """Declare a node destroyed: the cluster stops waiting for its copies, and it must never come back."""
        return admin.node_change(await self._change(admin.node_request(b"node_forget", node), timeout))

    async def rebalance(self, dry_run: bool = False, *, timeout: float | None = None) -> admin.Rebalance:
        """Spread the shards evenly over the nodes by the fewest moves; `dry_run` only returns them."""
        return admin.rebalance_result(await self._change(admin.rebalance_request(dry_run), timeout))

    async def shard_accept_loss(self, shard: int, *, timeout: float | None = None) -> admin.LossAccepted:
        """Serve a shard that is down with the copies that are left. Acknowledged writes may be lost."""
        return admin.loss_accepted(await self._change(request(b"shard_accept_loss", shard), timeout))

    # --- for the synchronous client ---------------------------------------------------------------

    def _disown(self) -> None:
        """Release the parent's socket in a forked child, without touching its loop. The client is unusable then."""
        self._channel.disown()

    def _pair(self, row: list[Any]) -> tuple[bytes, Any]:
        """Key and value of a row of a page."""
        return row[0], None if row[1] is None else self._decode(row[0], row[1])

    def _entry(self, row: list[Any]) -> Entry[V]:
        """The entry of a row of a page."""
        return Entry(row[0], self._decode(row[0], row[1]), row[2], seconds(row[3]))

    async def _page(self, pages: PageRequest, timeout: float | None) -> list[Any]:
        """The rows of the next page of a scan, for `open_rows`."""
        return pages.rows(await self._call(pages.next(), timeout))

    # --- inside ---------------------------------------------------------------------------------

    def _encode(self, key: bytes, value: V | str) -> bytes:
        try:
            data = self._codec.encode(value)
        except (TypeError, ValueError) as error:
            form = self._codec.name
            raise RequestError(f"the value of {show_bytes(key)} cannot be stored as {form}: {error}") from error
        return check_value(data, key)

    def _decode(self, key: bytes, data: bytes) -> V:
        try:
            return self._codec.decode(data)
        except ValueError as error:
            raise DataError(f"the value of {show_bytes(key)} is not {self._codec.name}: {error}") from error

    def _cell(self, key: bytes, cell: Any) -> Entry[V] | None:
        if cell is None:
            return None
        data, rev, ttl_ms = open_cell(cell)
        return Entry(key, self._decode(key, data), rev, seconds(ttl_ms))

    def _condition(self, key: bytes, value: V | str | None, rev: int | None) -> dict[bytes, Any]:
        return conditions(None if value is None else self._encode(key, value), rev)

    @staticmethod
    def _key(row: list[Any]) -> bytes:
        key: bytes = row[0]
        return key

    async def _items(self, pages: PageRequest, timeout: float | None, of: Callable[[list[Any]], D]) -> AsyncIterator[D]:
        async with aclosing(self._read_ahead(pages, timeout)) as lists:
            async for rows in lists:
                for row in rows:
                    yield of(row)

    async def _pages(self, pages: PageRequest, timeout: float | None) -> AsyncIterator[list[tuple[bytes, V]]]:
        async with aclosing(self._read_ahead(pages, timeout)) as lists:
            async for rows in lists:
                yield [self._pair(row) for row in rows]

    async def _read_ahead(self, pages: PageRequest, timeout: float | None) -> AsyncGenerator[list[list[Any]], None]:
        """The rows of each page. The next page is on its way while the caller and `open_rows` work on this one."""
        if pages.finished:
            return
        rows = await self._page(pages, timeout)
        asked: asyncio.Task[list[Any]] | None = None
        try:
            while not pages.finished:
                asked = asyncio.create_task(self._page(pages, timeout))
                for _ in range(2):  # the task begins, its request leaves; a caller that never waits would delay it
                    await asyncio.sleep(0)
                yield open_rows(rows)
                rows = await asked  # the page may have been there for long, and `finished` be true
            yield open_rows(rows)
        finally:
            if asked is not None:
                asked.cancel()  # also keeps asyncio from reporting an error that was never awaited

    async def _run(self, batch: KeyBatch, timeout: float | None) -> list[Any]:
        """Send the parts of a batch, several at once, until all are done or one failed as a whole."""
        runs = iter(batch.runs)
        failed = False

        async def work() -> None:
            nonlocal failed
            for run in runs:
                if failed:
                    return
                failed = not await self._run_part(batch, list(run), timeout) or failed

        workers = min(len(batch.runs), CLIENT_CHUNKS_MAX) if batch.distinct else 1
        if workers > 1:
            tasks = [asyncio.create_task(work()) for _ in range(workers)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()  # all done already, unless the caller was cancelled
        else:
            await work()
        return batch.finish()

    async def _run_part(self, batch: KeyBatch, indexes: list[int], timeout: float | None) -> bool:
        """Send one part, and repeat its refused items within the timeout. Returns whether to send other parts."""
        timeout = self._channel.timeout_s if timeout is None else timeout
        began = monotonic()
        parts, tries = [indexes], 0
        while parts:
            part = parts.pop()
            try:
                answers = await self._call(batch.message(part), timeout, began)
                again = batch.take(part, answers)
            except KvtcpError as error:
                batch.fail(part, error)
                if not batch.is_too_large(error, len(part)):
                    batch.fail((i for other in parts for i in other), error)
                    return False
                again = part
            large, refused = batch.sort(again, len(part))
            parts += [large[i : i + (len(part) + 1) // 2] for i in range(0, len(large), (len(part) + 1) // 2)]
            if refused:
                tries += 1
                pause_s = self._channel.pause_s(tries)
                remaining_s = began + timeout - monotonic() - pause_s
                refused = [i for i in refused if may_repeat(batch.results[i], batch.op, remaining_s)]
                if refused:
                    parts.insert(0, refused)
                    await asyncio.sleep(pause_s)
            if monotonic() >= began + timeout:
                break  # items that were to be repeated keep their errors in the results
        return True

    async def _administer(self, op: bytes, shape: type[D], timeout: float | None) -> D:
        return _shaped(await self._call([0, op], timeout), op, shape)

    async def _change(self, message: list[Any], timeout: float | None) -> Any:
        return decode_tree(await self._call(message, timeout))

    async def _administer_long(
        self, message: list[Any], progress: ProgressCallback | None, idle_s: float
    ) -> dict[str, Any]:
        callback = None if progress is None else lambda fields: progress(decode_tree(fields))
        return _shaped(await self._channel.call_long(message, idle_s, callback), message[1], dict)


def _shaped(answer: Any, op: bytes, shape: type[D]) -> D:
    """Return an answer of the administration, names as text: a map or a list of maps. Raises DataError otherwise."""
    tree = decode_tree(answer)
    if not isinstance(tree, shape) or (isinstance(tree, list) and any(type(row) is not dict for row in tree)):
        raise DataError(f"the answer to {op.decode()} is not a {'list of maps' if shape is list else 'map'}")
    return tree


class Connecting(Generic[V]):
    """The result of `connect`: await it for a client, or enter it with `async with`, which closes the client."""

    def __init__(self, url: str, codec: Codec[V], timeout_s: float, name: str) -> None:
        self._address = parse_url(url)
        self._codec = codec
        self._timeout_s = timeout_s
        self._name = name
        self._client: AsyncClient[V] | None = None  # the one `async with` made

    def __await__(self) -> Generator[Any, None, AsyncClient[V]]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncClient[V]:
        self._client = await self._open()
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def _open(self) -> AsyncClient[V]:
        channel = Channel(self._address, timeout_s=self._timeout_s, name=self._name)
        try:
            await channel.open()
        except BaseException:
            await channel.close()
            raise
        return AsyncClient(channel, self._codec)


@overload
def connect(url: str = ..., *, timeout: float = ..., name: str = ...) -> Connecting[bytes]: ...
@overload
def connect(url: str = ..., *, codec: Codec[V], timeout: float = ..., name: str = ...) -> Connecting[V]: ...
def connect(
    url: str = URL_DEFAULT, *, codec: Codec[Any] = codecs.raw, timeout: float = TIMEOUT_S, name: str = NAME_DEFAULT
) -> Connecting[Any]:
    """Connect to a cluster: `async with connect(url) as kv` or `kv = await connect(url)`.

    `timeout`: seconds for connecting and for every call that names none. `name`: of this client, in the server's log
    and status. Raises RequestError (the URL), Unavailable (no answer), ProtocolError (not a kvtcp server).
    """
    return Connecting(url, codec, timeout, name)
