"""What the shell needs of a client, as types: the client is kvtcp.client.aio.AsyncClient, tests have a fake.

The shell talks to a cluster only through `Client`. Durations are seconds as floats, keys and values bytes. `in_pages`
makes lists of a stream, so that output and requests are written for hundreds of items at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

T = TypeVar("T")
PAGE_ITEMS: Final = 500  # items handled at once: enough to pay for a system call, little enough to be smooth
Progress = Callable[[dict[str, Any]], None]
Mode = Literal["merge", "replace"]
Item = tuple[bytes, bytes, float | None]


class Entry(Protocol):
    """A key with its value. `rev` is its revision, `ttl` the seconds until its deadline, None for a key without."""

    @property
    def key(self) -> bytes: ...
    @property
    def value(self) -> bytes: ...
    @property
    def rev(self) -> int: ...
    @property
    def ttl(self) -> float | None: ...


class Info(Protocol):
    """What the server said when the connection was made."""

    @property
    def shards(self) -> int: ...


class Client(Protocol):
    """The calls of the asynchronous client that the shell makes. Errors are those of kvtcp.errors."""

    @property
    def info(self) -> Info: ...
    async def put(self, key: bytes, value: bytes, *, ttl: float | None = None) -> int: ...
    async def add(self, key: bytes, value: bytes, *, ttl: float | None = None) -> int: ...
    async def get_entry(self, key: bytes) -> Entry | None: ...
    async def delete(self, key: bytes, *, if_value: bytes | None = None) -> bool: ...
    async def exists(self, key: bytes) -> bool: ...
    async def cas(self, key: bytes, value: bytes, *, if_value: bytes | None = None) -> int: ...
    async def incr(self, key: bytes, by: int = 1) -> int: ...
    async def expire(self, key: bytes, seconds: float) -> bool: ...
    async def persist(self, key: bytes) -> bool: ...
    async def ttl(self, key: bytes) -> float | None: ...
    def scan_entries(
        self,
        *,
        prefix: bytes | None = None,
        start: bytes | None = None,
        end: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> AsyncIterator[Entry]: ...
    def scan_keys(
        self,
        *,
        prefix: bytes | None = None,
        start: bytes | None = None,
        end: bytes | None = None,
        limit: int | None = None,
        reverse: bool = False,
    ) -> AsyncIterator[bytes]: ...
    async def count(self, *, prefix: bytes | None = None) -> int: ...
    async def put_many(self, items: Sequence[Item]) -> Any: ...
    async def delete_many(self, keys: Sequence[bytes]) -> Any: ...
    async def status(self) -> Any: ...
    async def nodes(self) -> Any: ...
    async def shards(self) -> Any: ...
    async def backup(self, name: str | None = None, *, progress: Progress | None = None) -> Any: ...
    async def restore(
        self,
        name: str,
        mode: Mode = "merge",
        *,
        prefix: bytes | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Any: ...
    async def close(self) -> None: ...


async def in_pages(items: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    """The items of a stream in lists of PAGE_ITEMS, the last one shorter; no empty list."""
    page: list[T] = []
    async for item in items:
        page.append(item)
        if len(page) == PAGE_ITEMS:
            yield page
            page = []
    if page:
        yield page
