"""The synchronous client: `with kvtcp.sync.connect("kvtcp://127.0.0.1:8000") as kv`.

The asynchronous client (`kvtcp.client.aio`) on the loop thread of the process, with the same methods, arguments and
errors; see there. It may be used by any number of threads at once, whose calls share one connection. Ctrl-C cancels
the call it meets.

A client is also a `MutableMapping`: `kv["a"] = b"1"`, `kv["a"]`, `del kv["a"]`, `"a" in kv`, `for k in kv`, `len(kv)`.
What a dict does in one step under its lock takes conditions here: `pop`, `popitem` and `setdefault` give each value to
one caller only. Two clients are equal only when they are the same object. `len` and truth ask the cluster.

Fork: a child process gets connections of its own at its first call; the parent's socket is not touched.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, ItemsView, Iterable, Iterator, MutableMapping, ValuesView
from types import TracebackType
from typing import Any, Final, Generic, Literal, TypeVar, cast, overload

from kvtcp.client import codecs, loop_thread
from kvtcp.client.administration import LossAccepted, NodeChange, Rebalance
from kvtcp.client.aio import ADMIN_IDLE_S, AsyncClient, ProgressCallback
from kvtcp.client.aio import connect as connect_async
from kvtcp.client.channel import NAME_DEFAULT, TIMEOUT_S, ServerInfo
from kvtcp.client.codecs import Codec
from kvtcp.client.loop_thread import LoopThread
from kvtcp.client.requests import Entry, Items, Key, PageRequest, open_rows
from kvtcp.client.url import URL_DEFAULT, parse_url
from kvtcp.constants import PAGE_ITEMS_MAX
from kvtcp.errors import KeyExists

V = TypeVar("V")
D = TypeVar("D")
T = TypeVar("T")
_MISSING: Final = object()
_clients: weakref.WeakSet[SyncClient[Any]] = weakref.WeakSet()


class SyncClient(MutableMapping[Key, V], Generic[V]):
    """A connection to a cluster for code without an event loop. Made by `connect`; safe for many threads."""

    def __init__(self, connector: Callable[[], Coroutine[Any, Any, AsyncClient[V]]]) -> None:
        self._connector = connector
        self._lock = threading.Lock()  # guards opening and closing
        self._thread: LoopThread | None = None  # None before the first connection, after a fork and when closed
        self._client: AsyncClient[V] | None = None  # None exactly when _thread is
        self._closed = False
        self._live()
        _clients.add(self)

    def __enter__(self) -> SyncClient[V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Calls of other threads end with an error, later ones raise RuntimeError."""
        with self._lock:
            self._closed = True
            thread, client = self._thread, self._client
            self._thread = self._client = None
        if thread is not None and client is not None:
            try:
                thread.run(client.close())
            finally:
                loop_thread.release(thread)

    @property
    def info(self) -> ServerInfo:
        """The answer of the server to `hello`: version, cluster id, shards, limits."""
        return self._live().info

    @property
    def url(self) -> str:
        """The address in full."""
        return self._live().url

    # --- one key --------------------------------------------------------------------------------

    @overload
    def get(self, key: Key, default: None = None, *, timeout: float | None = None) -> V | None: ...
    @overload
    def get(self, key: Key, default: D, *, timeout: float | None = None) -> V | D: ...
    def get(self, key: Key, default: Any = None, *, timeout: float | None = None) -> Any:
        """The value of a key, or `default` when there is none."""
        return self._run(self._live().get(key, default, timeout=timeout))

    def get_entry(self, key: Key, *, timeout: float | None = None) -> Entry[V] | None:
        """Value, revision and remaining life of a key, or None."""
        return self._run(self._live().get_entry(key, timeout=timeout))

    def put(
        self,
        key: Key,
        value: V | str,
        *,
        ttl: float | None = None,
        keep_ttl: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Store a value; returns the revision. See AsyncClient.put."""
        return self._run(self._live().put(key, value, ttl=ttl, keep_ttl=keep_ttl, timeout=timeout))

    def add(self, key: Key, value: V | str, *, ttl: float | None = None, timeout: float | None = None) -> int:
        """Store a value under a key that is not there yet; returns the revision. Raises KeyExists."""
        return self._run(self._live().add(key, value, ttl=ttl, timeout=timeout))

    def delete(
        self, key: Key, *, if_value: V | str | None = None, if_rev: int | None = None, timeout: float | None = None
    ) -> bool:
        """Delete a key, with a condition only if it holds; returns whether it was deleted."""
        return self._run(self._live().delete(key, if_value=if_value, if_rev=if_rev, timeout=timeout))

    def cas(
        self,
        key: Key,
        value: V | str,
        *,
        if_value: V | str | None = None,
        if_rev: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Replace a value only if the present one, or its revision, is this. Raises Mismatch. See AsyncClient.cas."""
        return self._run(self._live().cas(key, value, if_value=if_value, if_rev=if_rev, timeout=timeout))

    def incr(self, key: Key, by: int = 1, *, timeout: float | None = None) -> int:
        """Add to a counter and return its new value; a missing key counts as 0."""
        return self._run(self._live().incr(key, by, timeout=timeout))

    def exists(self, key: Key, *, timeout: float | None = None) -> bool:
        """Whether a key is present."""
        return self._run(self._live().exists(key, timeout=timeout))

    def expire(self, key: Key, ttl: float, *, timeout: float | None = None) -> bool:
        """Give a key `ttl` more seconds to live; returns whether it is there."""
        return self._run(self._live().expire(key, ttl, timeout=timeout))

    def persist(self, key: Key, *, timeout: float | None = None) -> bool:
        """Remove a key's deadline; returns whether it had one."""
        return self._run(self._live().persist(key, timeout=timeout))

    def ttl(self, key: Key, *, timeout: float | None = None) -> float | None:
        """Seconds a key has left: `math.inf` without a deadline, None when there is no such key."""
        return self._run(self._live().ttl(key, timeout=timeout))

    # --- ranges ---------------------------------------------------------------------------------

    @overload
    def scan(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: Literal[False] = False,
        timeout: float | None = None,
    ) -> Iterator[tuple[bytes, V]]: ...
    @overload
    def scan(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: Literal[True],
        timeout: float | None = None,
    ) -> Iterator[tuple[bytes, None]]: ...
    def scan(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        limit: int | None = None,
        reverse: bool = False,
        keys_only: bool = False,
        timeout: float | None = None,
    ) -> Iterator[tuple[bytes, Any]]:
        """Pairs in key order, read in pages as it goes along. See AsyncClient.scan."""
        pages = PageRequest(prefix, start, end, limit, reverse, keys_only)
        return (self._live()._pair(row) for row in self._rows(pages, timeout))

    def scan_keys(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        limit: int | None = None,
        reverse: bool = False,
        timeout: float | None = None,
    ) -> Iterator[bytes]:
        """`scan` with keys alone."""
        return (row[0] for row in self._rows(PageRequest(prefix, start, end, limit, reverse, True), timeout))

    def scan_entries(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        limit: int | None = None,
        reverse: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Entry[V]]:
        """`scan` with revisions and remaining lifetimes."""
        pages = PageRequest(prefix, start, end, limit, reverse, False)
        return (self._live()._entry(row) for row in self._rows(pages, timeout))

    def scan_pages(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        limit: int | None = None,
        reverse: bool = False,
        page_items: int = PAGE_ITEMS_MAX,
        timeout: float | None = None,
    ) -> Iterator[list[tuple[bytes, V]]]:
        """`scan` by pages: lists of at most `page_items` pairs. A page may be shorter, even empty."""
        pages = PageRequest(prefix, start, end, limit, reverse, False, page_items)
        return ([self._live()._pair(row) for row in rows] for rows in self._pages(pages, timeout))

    def count(
        self,
        *,
        prefix: Key | None = None,
        start: Key | None = None,
        end: Key | None = None,
        timeout: float | None = None,
    ) -> int:
        """The number of keys, in a range or with a prefix."""
        return self._run(self._live().count(prefix=prefix, start=start, end=end, timeout=timeout))

    # --- many keys ------------------------------------------------------------------------------

    def put_many(self, items: Items[V], *, ttl: float | None = None, timeout: float | None = None) -> list[int]:
        """Store many values; returns their revisions. Not atomic. Raises BatchError. See AsyncClient.put_many."""
        return self._run(self._live().put_many(items, ttl=ttl, timeout=timeout))

    def get_many(self, keys: Iterable[Key], *, timeout: float | None = None) -> list[V | None]:
        """The values of many keys in their order, None for those that are missing."""
        return self._run(self._live().get_many(keys, timeout=timeout))

    def get_many_entries(self, keys: Iterable[Key], *, timeout: float | None = None) -> list[Entry[V] | None]:
        """`get_many` with revisions and remaining lifetimes."""
        return self._run(self._live().get_many_entries(keys, timeout=timeout))

    def delete_many(self, keys: Iterable[Key], *, timeout: float | None = None) -> list[bool]:
        """Delete many keys; returns whether each was there. Not atomic."""
        return self._run(self._live().delete_many(keys, timeout=timeout))

    # --- administration -------------------------------------------------------------------------

    def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """The state of the cluster, names as text."""
        return self._run(self._live().status(timeout=timeout))

    def nodes(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The nodes of the cluster, names as text."""
        return self._run(self._live().nodes(timeout=timeout))

    def shards(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The shards of the cluster and who holds them, names as text."""
        return self._run(self._live().shards(timeout=timeout))

    def backup(
        self, name: str | None = None, *, progress: ProgressCallback | None = None, timeout: float = ADMIN_IDLE_S
    ) -> dict[str, Any]:
        """Make a backup on the nodes. `progress` is called in this thread. See AsyncClient.backup."""
        return self._run_with_progress(
            lambda callback: self._live().backup(name, progress=callback, timeout=timeout), progress
        )

    def restore(
        self,
        name: str,
        mode: Literal["merge", "replace"] = "merge",
        *,
        prefix: Key | None = None,
        dry_run: bool = False,
        progress: ProgressCallback | None = None,
        timeout: float = ADMIN_IDLE_S,
    ) -> dict[str, Any]:
        """Bring a backup back. `progress` is called in this thread. See AsyncClient.restore."""
        return self._run_with_progress(
            lambda callback: self._live().restore(
                name, mode, prefix=prefix, dry_run=dry_run, progress=callback, timeout=timeout
            ),
            progress,
        )

    def node_add(self, host: str, port: int, *, timeout: float | None = None) -> NodeChange:
        """Make the node that listens at `host`:`port` one of the cluster. See AsyncClient.node_add."""
        return self._run(self._live().node_add(host, port, timeout=timeout))

    def node_drain(self, node: str, *, timeout: float | None = None) -> NodeChange:
        """Have everything that a node holds moved to others."""
        return self._run(self._live().node_drain(node, timeout=timeout))

    def node_undrain(self, node: str, *, timeout: float | None = None) -> NodeChange:
        """Let a drained node hold shards again."""
        return self._run(self._live().node_undrain(node, timeout=timeout))

    def node_remove(self, node: str, *, timeout: float | None = None) -> NodeChange:
        """Remove a node that holds nothing from the cluster."""
        return self._run(self._live().node_remove(node, timeout=timeout))

    def node_forget(self, node: str, *, timeout: float | None = None) -> NodeChange:
        """Declare a node destroyed: the cluster stops waiting for its copies, and it must never come back."""
        return self._run(self._live().node_forget(node, timeout=timeout))

    def rebalance(self, dry_run: bool = False, *, timeout: float | None = None) -> Rebalance:
        """Spread the shards evenly over the nodes by the fewest moves; `dry_run` only returns them."""
        return self._run(self._live().rebalance(dry_run, timeout=timeout))

    def shard_accept_loss(self, shard: int, *, timeout: float | None = None) -> LossAccepted:
        """Serve a shard that is down with the copies that are left. Acknowledged writes may be lost."""
        return self._run(self._live().shard_accept_loss(shard, timeout=timeout))

    # --- the mapping ----------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> V:
        found = self.get(key, _MISSING)
        if found is _MISSING:
            raise KeyError(key)
        return cast("V", found)

    def __setitem__(self, key: Key, value: V | str) -> None:
        self.put(key, value)

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (bytes, str)) and key not in (b"", "") and self.exists(key)

    def __iter__(self) -> Iterator[bytes]:
        return self.scan_keys()

    def __len__(self) -> int:
        return self.count()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def items(self) -> ItemsView[Key, V]:
        """A view of all pairs; iterating is a `scan`."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """A view of all values; iterating is a `scan`."""
        return _Values(self)

    @overload
    def pop(self, key: Key) -> V: ...
    @overload
    def pop(self, key: Key, default: V) -> V: ...
    @overload
    def pop(self, key: Key, default: D) -> V | D: ...
    def pop(self, key: Key, default: Any = _MISSING) -> Any:
        """Delete a key and return the value it had, which no other caller got. Raises KeyError without `default`."""
        while (entry := self.get_entry(key)) is not None:
            if self.delete(key, if_rev=entry.rev):
                return entry.value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[Key, V]:
        """Delete the first key in order and return its pair, which no other caller got. Raises KeyError if empty."""
        while True:
            entry = next(self.scan_entries(limit=1), None)
            if entry is None:
                raise KeyError("the store is empty")
            if self.delete(entry.key, if_rev=entry.rev):
                return entry.key, entry.value

    def setdefault(self, key: Key, default: Any = None) -> Any:
        """The value of a key; if it is missing, `default` is stored and returned."""
        while True:
            found = self.get(key, _MISSING)
            if found is not _MISSING:
                return found
            try:
                self.add(key, default)
            except KeyExists:
                continue
            return default

    def clear(self) -> None:
        """Delete every key of the cluster, page by page."""
        for rows in self._pages(PageRequest(None, None, None, None, False, True), None):
            self.delete_many([row[0] for row in rows])

    # --- inside ---------------------------------------------------------------------------------

    def _live(self) -> AsyncClient[V]:
        client = self._client
        return client if client is not None else self._open()

    def _open(self) -> AsyncClient[V]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._client is None:
                thread = loop_thread.acquire()
                try:
                    self._client = thread.run(self._connector())
                except BaseException:
                    loop_thread.release(thread)
                    raise
                self._thread = thread
            return self._client

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        thread = self._thread
        if thread is None:
            coroutine.close()
            raise RuntimeError("the client is closed")
        return thread.run(coroutine)

    def _run_with_progress(
        self,
        call: Callable[[ProgressCallback | None], Coroutine[Any, Any, T]],
        progress: ProgressCallback | None,
    ) -> T:
        if progress is None:
            return self._run(call(None))
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

        async def work() -> T:
            try:
                return await call(events.put)
            finally:
                events.put(None)

        self._live()
        assert self._thread is not None, "a live client has a thread"
        job = self._thread.start(work())
        try:
            while (event := events.get()) is not None:
                progress(event)
        except BaseException:
            self._thread.cancel(job)
            raise
        result: T = self._thread.wait(job)
        return result

    def _pages(self, pages: PageRequest, timeout: float | None) -> Iterator[list[list[Any]]]:
        while not pages.finished:
            yield open_rows(self._run(self._live()._page(pages, timeout)))

    def _rows(self, pages: PageRequest, timeout: float | None) -> Iterator[list[Any]]:
        for rows in self._pages(pages, timeout):
            yield from rows

    def _forked(self) -> None:
        """Forget the connection of the parent in a child process, without a word to the server."""
        self._lock = threading.Lock()
        if self._client is not None:
            self._client._disown()
            loop_thread.keep(self._client)
        self._thread = self._client = None


class _Items(ItemsView[Key, V]):
    """Pairs of a client. One scan, where the view of a plain mapping would ask for each key."""

    def __init__(self, client: SyncClient[V]) -> None:
        super().__init__(client)
        self._client = client

    def __iter__(self) -> Iterator[tuple[Key, V]]:
        return self._client.scan()


class _Values(ValuesView[V]):
    """Values of a client, by one scan."""

    def __init__(self, client: SyncClient[V]) -> None:
        super().__init__(client)
        self._client = client

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._client.scan())


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


@overload
def connect(url: str = ..., *, timeout: float = ..., name: str = ...) -> SyncClient[bytes]: ...
@overload
def connect(url: str = ..., *, codec: Codec[V], timeout: float = ..., name: str = ...) -> SyncClient[V]: ...
def connect(
    url: str = URL_DEFAULT, *, codec: Codec[Any] = codecs.raw, timeout: float = TIMEOUT_S, name: str = NAME_DEFAULT
) -> SyncClient[Any]:
    """Connect to a cluster. Arguments and errors as for `kvtcp.connect`; close it, or use it in a `with`."""
    parse_url(url)

    async def connector() -> AsyncClient[Any]:
        return await connect_async(url, codec=codec, timeout=timeout, name=name)

    return SyncClient(connector)
