"""Import and export: streams of JSON lines between files and the cluster.

Neither holds more than a few megabytes, for files of any size. An import reads blocks, cuts them into lines, decodes
these into chunks and keeps IMPORT_CHUNKS_MAX chunks in flight; a chunk that has a key in common with one in flight
waits for it, so that of two lines with the same key the later one wins. A file that can be read twice is checked to its
end before the first chunk is sent. The parsing is the cost (json.loads is two thirds of it), so the loop over the lines
of a chunk is kept bare.

An export is written to a temporary file beside its target and renamed when it is complete. Its pages are read one
after the other: a key that is not touched meanwhile appears exactly once.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Final

from kvtcp.constants import (
    IMPORT_BLOCK_BYTES,
    IMPORT_CHUNK_BYTES,
    IMPORT_CHUNK_RECORDS,
    IMPORT_CHUNKS_MAX,
    JSON_LINE_BYTES_MAX,
)
from kvtcp.errors import BatchError, DataError, KvtcpError
from kvtcp.jsonl import decode_pair
from kvtcp.shell.context import Client, Context
from kvtcp.shell.output import in_pages, pair_line
from kvtcp.shell.progress import ProgressBar

STDIN_NAME: Final = "standard input"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # of UTF-8: some editors write it; it is no part of the first line
_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_WBITS: Final = 31  # zlib: 15 bits of window, plus 16 for the gzip container
_GZIP_LEVEL: Final = 6

Stream = BinaryIO | IO[bytes]
Item = tuple[bytes, bytes, float | None]  # key, value, seconds to live


class LineReader:
    """Turn blocks of a plain or gzip file into lists of lines (without newline, or byte order mark). Pure.

    The first two bytes of gzip tell it from plain text. Decompression goes in pieces, so a block cannot become
    unbounded memory. Raises DataError for damaged gzip data and for lines over JSON_LINE_BYTES_MAX.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._head = b""  # the first bytes, until there are two of them
        self._is_known = False  # plain or gzip has been decided
        self._inflater: Any = None  # zlib decompressor of the current gzip member
        self._partial: list[bytes] = []  # pieces of the line that is not complete
        self._partial_bytes = 0  # their total
        self._lines = 0  # complete lines so far

    def feed(self, block: bytes) -> Iterator[list[bytes]]:
        """Lists of the lines that `block` completes."""
        if not self._is_known:
            self._head += block
            if len(self._head) < len(_GZIP_MAGIC):
                return
            block, self._head, self._is_known = self._head, b"", True
            if block.startswith(_GZIP_MAGIC):
                self._inflater = zlib.decompressobj(_GZIP_WBITS)
        if self._inflater is None:
            yield self._split(block)
            return
        for piece in self._inflate(block):
            yield self._split(piece)

    def finish(self) -> list[bytes]:
        """The last line, if the file does not end with a newline. Raises DataError for gzip data that ends early."""
        if self._inflater is not None and not self._inflater.eof:
            raise DataError(f"{self._source}: the gzip data ends early, after {self._lines} lines")
        lines = self._split(self._head)  # a file of a single byte
        last = b"".join(self._partial)
        if not self._lines:
            last = last.removeprefix(_BYTE_ORDER_MARK)
        return [*lines, last] if last else lines

    def _inflate(self, block: bytes) -> Iterator[bytes]:
        while block:
            if self._inflater.eof:  # another member, or padding of zeros, may follow
                block = block.lstrip(b"\0")
                if not block:
                    return
                self._inflater = zlib.decompressobj(_GZIP_WBITS)
            try:
                piece = self._inflater.decompress(block, IMPORT_BLOCK_BYTES)
            except zlib.error as error:
                raise DataError(f"{self._source}: damaged gzip data after line {self._lines}: {error}") from error
            yield piece
            block = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail

    def _split(self, piece: bytes) -> list[bytes]:
        lines = piece.split(b"\n")
        if len(lines) > 1 and self._partial:
            lines[0] = b"".join([*self._partial, lines[0]])
            self._partial, self._partial_bytes = [], 0
        rest = lines.pop()
        if lines and not self._lines:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        self._lines += len(lines)
        if rest:
            self._partial.append(rest)
            self._partial_bytes += len(rest)
            if self._partial_bytes > JSON_LINE_BYTES_MAX:
                place = f"{self._source}, line {self._lines + 1}"
                raise DataError(f"{place}: longer than {JSON_LINE_BYTES_MAX} bytes, no pair is")
        return lines


class ChunkBuilder:
    """Decode lines into chunks for put_many. Of a key that comes twice in a chunk the later line wins. Pure."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._items: dict[bytes, Item] = {}  # the chunk that is being filled
        self._bytes = 0  # length of its lines
        self._first = 0  # lines before its first one
        self.lines = 0  # lines decoded so far, over all chunks

    def add(self, lines: Sequence[bytes]) -> Iterator[Chunk]:
        """The chunks that `lines` complete. Raises DataError that names the line; `rest` then has the pairs before."""
        source, items, number, size = self._source, self._items, self.lines, self._bytes
        try:
            # one iteration is one record: names are local, and nothing but the decoder is called
            for line in lines:
                key, value, _, ttl_ms = decode_pair(line, source, number + 1)
                items[key] = (key, value, None if ttl_ms is None else ttl_ms / 1000)
                number += 1
                size += len(line)
                if len(items) >= IMPORT_CHUNK_RECORDS or size >= IMPORT_CHUNK_BYTES:
                    self.lines = number
                    yield self.rest()
                    items, size = self._items, 0
        finally:
            self.lines, self._bytes = number, size

    def rest(self) -> Chunk:
        """Return the chunk as far as it is filled, and begin the next one."""
        chunk = Chunk(self._items, self.lines - self._first)
        self._items, self._bytes, self._first = {}, 0, self.lines
        return chunk


class Chunk:
    """Pairs of one put_many, and the number of lines they came from."""

    __slots__ = ("items", "lines")

    def __init__(self, items: dict[bytes, Item], lines: int) -> None:
        self.items = items
        self.lines = lines


class Sender:
    """Keep several put_many in flight. `written` lines are stored; after an error nothing more is sent."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._flying: dict[asyncio.Task[None], Chunk] = {}
        self._error: BaseException | None = None  # the first that a chunk met
        self.written = 0

    async def send(self, chunk: Chunk) -> None:
        """Send a chunk, after waiting for room and for its keys. Raises the error of an earlier chunk."""
        while len(self._flying) >= IMPORT_CHUNKS_MAX or any(
            not chunk.items.keys().isdisjoint(other.items) for other in self._flying.values()
        ):
            await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED)
        if self._error is not None:
            await self.drain()
        task = asyncio.create_task(self._put(chunk))
        self._flying[task] = chunk
        task.add_done_callback(self._flying.pop)
        await asyncio.sleep(0)  # let it be sent, and answers be read, between two stretches of parsing

    async def drain(self) -> None:
        """Wait for all chunks. Raises the first error that one of them met."""
        while self._flying:
            await asyncio.wait(self._flying)
        if self._error is not None:
            raise self._error

    async def _put(self, chunk: Chunk) -> None:
        try:
            await self._client.put_many(list(chunk.items.values()))
        except BatchError as error:
            self.written += sum(not isinstance(result, KvtcpError) for result in error.results)
            self._error = self._error or error
        except Exception as error:  # kept for `send` and `drain`, which raise it
            self._error = self._error or error
        else:
            self.written += chunk.lines


class _Source:
    """An opened file to import: its name for messages, its size if it can be read twice."""

    def __init__(self, stream: Stream, name: str) -> None:
        self.stream = stream
        self.name = name
        mode = _mode_of(stream)
        self.bytes_total = os.fstat(stream.fileno()).st_size if mode is not None and stat.S_ISREG(mode) else None
        # a pipe, a terminal or a socket may let a read wait for ever; a regular file or a buffer does not
        self._may_block = mode is not None and not stat.S_ISREG(mode)
        self.bytes_read = 0

    async def blocks(self) -> Any:
        """Blocks of the file to its end, asynchronously. A pipe that waits does not block the loop."""
        self.bytes_read = 0
        while True:
            if self._may_block:
                block = await _read_in_thread(self.stream, IMPORT_BLOCK_BYTES)
            else:
                block = self.stream.read(IMPORT_BLOCK_BYTES)
                await asyncio.sleep(0)
            if not block:
                return
            self.bytes_read += len(block)
            yield block

    def show(self, bar: ProgressBar, lines: int) -> None:
        bar.update(lines, self.bytes_read / self.bytes_total if self.bytes_total else None)


def _mode_of(stream: Stream) -> int | None:
    try:
        return os.fstat(stream.fileno()).st_mode
    except (OSError, AttributeError):  # a buffer in memory has no descriptor
        return None


async def _read_in_thread(stream: Stream, bytes_max: int) -> bytes:
    """One read in a thread of its own. A daemon: an interrupted shell must not wait for a pipe to end.

    `stream` is unbuffered, so the abandoned thread holds no lock that the interpreter needs at its end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def work() -> None:
        try:
            data = stream.read(bytes_max)
        except (OSError, ValueError) as error:
            _call_soon(loop, deliver, future.set_exception, error)
        else:
            _call_soon(loop, deliver, future.set_result, data)

    threading.Thread(target=work, daemon=True, name="kvtcp-read").start()
    return await future


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        # the loop was closed while the read waited: the import was interrupted, and the data is not needed
        if not loop.is_closed():
            raise


async def import_file(context: Context, path: str) -> int:
    """Store the pairs of a file, or of stdin for `-`. Returns the number of its records.

    Raises DataError for a bad line, with the number of records before it; OSError; the client's errors.
    """
    if path == "-":
        context.claim_stdin()
        return await _import(context, _Source(context.streams.stdin, STDIN_NAME))
    with _expanded(path).open("rb", buffering=0) as stream:
        return await _import(context, _Source(stream, path))


async def _import(context: Context, source: _Source) -> int:
    if source.bytes_total is not None:
        start = source.stream.seek(0, os.SEEK_CUR)
        await _check(context, source)
        source.stream.seek(start)
    sender = Sender(await context.writer())
    try:
        with context.progress_bar("import") as bar:
            return await _send_all(source, sender, bar)
    except DataError as error:
        raise DataError(f"{error.message}; the {sender.written} records before it were written") from error
    except KvtcpError:
        context.streams.message(f"{sender.written} records were written before the error")
        raise
    except asyncio.CancelledError:
        context.streams.message(f"interrupted; {sender.written} records were written, and perhaps a few more")
        context.write_sent = False  # no second message is needed
        raise


async def _check(context: Context, source: _Source) -> None:
    """Read the whole file once. Raises DataError before anything has been changed."""
    reader, builder = LineReader(source.name), ChunkBuilder(source.name)
    try:
        with context.progress_bar("check") as bar:
            async for block in source.blocks():
                for lines in reader.feed(block):
                    for _ in builder.add(lines):
                        pass
                source.show(bar, builder.lines)
            for _ in builder.add(reader.finish()):
                pass
    except DataError as error:
        raise DataError(f"{error.message}; nothing was written") from error


async def _send_all(source: _Source, sender: Sender, bar: ProgressBar) -> int:
    reader, builder = LineReader(source.name), ChunkBuilder(source.name)
    try:
        async for block in source.blocks():
            for lines in reader.feed(block):
                for chunk in builder.add(lines):
                    await sender.send(chunk)
            source.show(bar, sender.written)
        for chunk in builder.add(reader.finish()):
            await sender.send(chunk)
    except DataError:
        # the records before the bad line are written, so an import can continue at that line
        await _send_last(builder, sender)
        raise
    await _send_last(builder, sender)
    return builder.lines


async def _send_last(builder: ChunkBuilder, sender: Sender) -> None:
    chunk = builder.rest()
    if chunk.items:
        await sender.send(chunk)
    await sender.drain()


async def export_file(context: Context, path: str) -> int:
    """Write every pair to a file, or to stdout for `-`. Returns their number. Raises OSError, the client's errors."""
    client = await context.client()
    total = await client.count() if context.streams.stderr_is_terminal else None
    if path == "-":
        return await _export(context, client, context.streams.stdout, None, total)
    with _WholeFile(_expanded(path)) as file:
        packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WBITS) if path.endswith(".gz") else None
        return await _export(context, client, file, packer, total)


async def _export(context: Context, client: Client, file: Stream, packer: Any, total: int | None) -> int:
    count = 0
    with context.progress_bar("export") as bar:
        async for page in in_pages(client.scan_entries()):
            count += len(page)
            data = ("\n".join(map(pair_line, page)) + "\n").encode("utf-8")
            file.write(data if packer is None else packer.compress(data))
            bar.update(count, count / total if total else None)
    if packer is not None:
        file.write(packer.flush())
    return count


def _expanded(path: str) -> Path:
    return Path(path).expanduser()


class _WholeFile:
    """A file that appears under its name when it is complete, or not at all. Devices and pipes are written directly."""

    def __init__(self, target: Path) -> None:
        self._target = target.resolve()
        if self._target.exists() and not self._target.is_file():
            self._partial = self._target  # /dev/stdout, a named pipe; a directory is refused by open()
        else:
            self._partial = self._target.with_name(f".kvtcp-export-{os.getpid()}.partial")

    def __enter__(self) -> BinaryIO:
        self._file = self._partial.open("wb")
        return self._file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_renamed = self._partial != self._target
        try:
            if error is None:
                self._file.flush()
                if is_renamed:
                    os.fsync(self._file.fileno())
            self._file.close()
            if error is None and is_renamed:
                os.replace(self._partial, self._target)
                _sync_directory(self._target.parent)
        finally:
            self._file.close()
            if is_renamed:
                self._partial.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
