"""The synchronous client: `with kvtcp.sync.connect("kvtcp://127.0.0.1:8000") as kv`.

The asynchronous client (`kvtcp.client.aio`) on the loop thread of the process, with the same methods, arguments and
errors; see there. Methods that only wait for its results are made from its own by `_method`, with their types and
docstrings. A client may be used by any number of threads at once, whose calls share one connection. Ctrl-C cancels the
call that it interrupts.

A client is also a `MutableMapping`: `kv["a"] = b"1"`, `kv["a"]`, `del kv["a"]`, `"a" in kv`, `for k in kv`, `len(kv)`.
Steps that a dict does under its lock take conditions here: `pop`, `popitem` and `setdefault` give each value to one
caller only. Two clients are equal only when they are the same object. `len` and truth ask the cluster.

Fork: a child process gets connections of its own at its first call; the parent's socket is not touched.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, ItemsView, Iterator, MutableMapping, ValuesView
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, Literal, ParamSpec, TypeVar, cast, overload

from kvtcp.client import codecs, loop_thread
from kvtcp.client.aio import ADMIN_IDLE_S, AsyncClient, ProgressCallback
from kvtcp.client.aio import connect as connect_async
from kvtcp.client.channel import NAME_DEFAULT, TIMEOUT_S, ServerInfo
from kvtcp.client.codecs import Codec
from kvtcp.client.loop_thread import LoopThread
from kvtcp.client.requests import Entry, Key, PageRequest, open_rows
from kvtcp.client.url import URL_DEFAULT, parse_url
from kvtcp.constants import PAGE_ITEMS_MAX
from kvtcp.errors import KeyExists

V = TypeVar("V")
D = TypeVar("D")
T = TypeVar("T")
P = ParamSpec("P")
_MISSING: Final = object()
_clients: weakref.WeakSet[SyncClient[Any]] = weakref.WeakSet()


def _method(
    method: Callable[Concatenate[AsyncClient[V], P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncClient[V], P], T]:
    """Make a method that waits for the result of one of the asynchronous client; arguments and docstring stay."""

    @wraps(method)
    def run(self: SyncClient[V], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._live(), *args, **kwargs))

    return run


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

    get_entry = _method(AsyncClient.get_entry)
    put = _method(AsyncClient.put)
    add = _method(AsyncClient.add)
    delete = _method(AsyncClient.delete)
    cas = _method(AsyncClient.cas)
    incr = _method(AsyncClient.incr)
    exists = _method(AsyncClient.exists)
    expire = _method(AsyncClient.expire)
    persist = _method(AsyncClient.persist)
    ttl = _method(AsyncClient.ttl)

    # --- ranges ---------------------------------------------------------------------------------

    @overload
    def scan(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, keys_only: Literal[False] = False, timeout: float | None = None,
    ) -> Iterator[tuple[bytes, V]]: ...  # fmt: skip
    @overload
    def scan(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, keys_only: Literal[True], timeout: float | None = None,
    ) -> Iterator[tuple[bytes, None]]: ...  # fmt: skip
    def scan(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, keys_only: bool = False, timeout: float | None = None,
    ) -> Iterator[tuple[bytes, Any]]:  # fmt: skip
        """Pairs in key order, read in pages on the way. See AsyncClient.scan."""
        pages = PageRequest(prefix, start, end, limit, reverse, keys_only)
        return (self._live()._pair(row) for row in self._rows(pages, timeout))

    def scan_keys(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, timeout: float | None = None,
    ) -> Iterator[bytes]:  # fmt: skip
        """`scan` with keys alone."""
        return (row[0] for row in self._rows(PageRequest(prefix, start, end, limit, reverse, True), timeout))

    def scan_entries(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, timeout: float | None = None,
    ) -> Iterator[Entry[V]]:  # fmt: skip
        """`scan` with revisions and remaining lifetimes."""
        pages = PageRequest(prefix, start, end, limit, reverse, False)
        return (self._live()._entry(row) for row in self._rows(pages, timeout))

    def scan_pages(
        self, *, prefix: Key | None = None, start: Key | None = None, end: Key | None = None, limit: int | None = None,
        reverse: bool = False, page_items: int = PAGE_ITEMS_MAX, timeout: float | None = None,
    ) -> Iterator[list[tuple[bytes, V]]]:  # fmt: skip
        """`scan` by pages: lists of at most `page_items` pairs. A page may be shorter, even empty."""
        pages = PageRequest(prefix, start, end, limit, reverse, False, page_items)
        return ([self._live()._pair(row) for row in rows] for rows in self._pages(pages, timeout))

    count = _method(AsyncClient.count)

    # --- many keys ------------------------------------------------------------------------------

    put_many = _method(AsyncClient.put_many)
    get_many = _method(AsyncClient.get_many)
    get_many_entries = _method(AsyncClient.get_many_entries)
    delete_many = _method(AsyncClient.delete_many)

    # --- administration -------------------------------------------------------------------------

    status = _method(AsyncClient.status)
    nodes = _method(AsyncClient.nodes)
    shards = _method(AsyncClient.shards)

    def backup(
        self, name: str | None = None, *, progress: ProgressCallback | None = None, timeout: float = ADMIN_IDLE_S
    ) -> dict[str, Any]:
        """Make a backup on the nodes. `progress` is called in this thread. See AsyncClient.backup."""
        return self._run_with_progress(partial(self._live().backup, name, timeout=timeout), progress)

    def restore(
        self, name: str, mode: Literal["merge", "replace"] = "merge", *, prefix: Key | None = None,
        dry_run: bool = False, progress: ProgressCallback | None = None, timeout: float = ADMIN_IDLE_S,
    ) -> dict[str, Any]:  # fmt: skip
        """Bring a backup back. `progress` is called in this thread. See AsyncClient.restore."""
        call = partial(self._live().restore, name, mode, prefix=prefix, dry_run=dry_run, timeout=timeout)
        return self._run_with_progress(call, progress)

    node_add = _method(AsyncClient.node_add)
    node_drain = _method(AsyncClient.node_drain)
    node_undrain = _method(AsyncClient.node_undrain)
    node_remove = _method(AsyncClient.node_remove)
    node_forget = _method(AsyncClient.node_forget)
    rebalance = _method(AsyncClient.rebalance)
    shard_accept_loss = _method(AsyncClient.shard_accept_loss)

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
        """Delete a key and return its value, which no other caller gets. Raises KeyError without `default`."""
        while (entry := self.get_entry(key)) is not None:
            if self.delete(key, if_rev=entry.rev):
                return entry.value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[Key, V]:
        """Delete the first key in order and return its pair, which no other caller gets. Raises KeyError if empty."""
        while True:
            entry = next(self.scan_entries(limit=1), None)
            if entry is None:
                raise KeyError("the store is empty")
            if self.delete(entry.key, if_rev=entry.rev):
                return entry.key, entry.value

    def setdefault(self, key: Key, default: Any = None) -> Any:
        """Return the value of a key; if the key is missing, store `default` and return it."""
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

    def _run_with_progress(self, call: Callable[..., Coroutine[Any, Any, T]], progress: ProgressCallback | None) -> T:
        if progress is None:
            return self._run(call())
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

        async def work() -> T:
            try:
                return await call(progress=events.put)
            finally:
                events.put(None)

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
