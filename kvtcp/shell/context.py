"""Context of a command: the client, its arguments, the streams, the form of the answer.

The client is opened at first use, so that a wrong command line or `help` needs no server, and stays open for the next
command of an interactive session; an attempt that failed is made again by the next command.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from kvtcp.client.aio import AsyncClient
from kvtcp.constants import MAIN_PORT_DEFAULT, VALUE_BYTES_MAX
from kvtcp.shell.exits import UsageError
from kvtcp.shell.output import Output
from kvtcp.shell.parser import File, Stdin, Word
from kvtcp.shell.progress import ProgressBar

ADDRESS_DEFAULT = f"kvtcp://127.0.0.1:{MAIN_PORT_DEFAULT}"
PROGRAM = "kvtcp-shell"

Client = AsyncClient[bytes]
Connect = Callable[[], Awaitable[Client]]
Ask = Callable[[str], Awaitable[bool]]


@dataclass
class Streams:
    """Standard streams and their properties. stdin is unbuffered, so that nothing of it is read ahead."""

    stdin: BinaryIO | IO[bytes]
    stdout: BinaryIO | IO[bytes]
    stderr: TextIO
    stdout_is_terminal: bool = False
    stderr_is_terminal: bool = False
    columns: Callable[[], int | None] = lambda: None  # width of the terminal now, None when stdout is none

    def message(self, text: str) -> None:
        """One message for people, on stderr."""
        self.stderr.write(f"{PROGRAM}: {text}\n")
        self.stderr.flush()


@dataclass
class Context:
    """Everything a handler may use besides its arguments."""

    streams: Streams
    connect: Connect
    form: str | None = None  # the form that was asked for, None = table on a terminal, else plain
    ask: Ask | None = None  # asks a person a question, None without a terminal
    stdin_is_data: bool = True  # False when stdin holds the commands: `-` is refused then
    command: str = ""  # the command that runs, for messages
    write_sent: bool = False  # a write of this command may have reached the cluster
    _client: Client | None = field(default=None, repr=False)

    async def client(self) -> Client:
        """The client, opened if it is not yet. Raises the errors of connecting."""
        if self._client is None:
            self._client = await self.connect()
        return self._client

    async def writer(self) -> Client:
        """The client for a command that changes something: from here on an interruption leaves the outcome open."""
        client = await self.client()
        self.write_sent = True
        return client

    def progress_bar(self, label: str) -> ProgressBar:
        """A progress bar, shown where stderr is a terminal."""
        return ProgressBar(self.streams.stderr, label, shown=self.streams.stderr_is_terminal)

    async def close(self) -> None:
        """Close the client if there is one."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def output(self, form: str | None = None) -> Output:
        """The writer for answers. `form` is that of the command's own `-o`."""
        chosen = form or self.form or ("table" if self.streams.stdout_is_terminal else "plain")
        is_terminal = self.streams.stdout_is_terminal
        return Output(self.streams.stdout, chosen, is_terminal=is_terminal, columns=self.streams.columns())

    def content(self, word: Word) -> bytes:
        """The bytes a word stands for; files and stdin are read. Raises ParseError, UsageError, OSError."""
        content = word.content()
        if isinstance(content, bytes):
            return content
        if isinstance(content, File):
            with Path(os.path.expanduser(content.path)).open("rb") as file:
                return file.read(VALUE_BYTES_MAX + 1)  # one byte too many is enough to be refused
        assert isinstance(content, Stdin), "a third kind of content"
        self.claim_stdin()
        return _read_up_to(self.streams.stdin, VALUE_BYTES_MAX + 1)

    def claim_stdin(self) -> None:
        """Take stdin for data. Raises UsageError where it is taken already or holds the commands."""
        if not self.stdin_is_data:
            raise UsageError("- (standard input) can be used once, and only with a command on the command line")
        self.stdin_is_data = False


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt at once, for a read from the terminal with which the event loop stands still.

    While asyncio.Runner runs, Ctrl-C only cancels its task, at the next turn of the loop: the read would continue, and
    the next line would be cancelled in its place.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _read_up_to(stream: BinaryIO | IO[bytes], bytes_max: int) -> bytes:
    parts: list[bytes] = []
    left = bytes_max
    while left:
        part = stream.read(min(left, 1 << 20))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
