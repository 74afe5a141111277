"""The program kvtcp-shell: options of its own, then one command or an interactive session.

    kvtcp-shell [kvtcp://host:port] [-o FORM] [--timeout S] [--] [COMMAND WORDS...]

The address comes first if there is one. `-o` may stand before or after the command, the other options before it; `--`
ends them all. One command starts in well under 150 ms, because everything that only some commands
need is imported where it is needed: no argparse, rich, prompt_toolkit or uvloop on the way to a `get`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO, cast

from kvtcp._version import __version__
from kvtcp.client.aio import connect
from kvtcp.constants import CLIENT_TIMEOUT_MS
from kvtcp.shell.context import ADDRESS_DEFAULT, PROGRAM, Client, Context, Streams, ctrl_c_raises
from kvtcp.shell.exits import MEANINGS, Exit, UsageError
from kvtcp.shell.interactive import run_session
from kvtcp.shell.output import FORMATS
from kvtcp.shell.parser import Word, word_of_argument
from kvtcp.shell.run import run_words
from kvtcp.shell.table import TABLE, check_form

USAGE = f"usage: {PROGRAM} [kvtcp://host:port] [-o {'|'.join(FORMATS)}] [--timeout S] [--] [COMMAND ...]"
ConnectTo = Callable[[str, float], Awaitable[Client]]


@dataclass
class CommandLine:
    """The command line, taken apart."""

    address: str = ADDRESS_DEFAULT
    form: str | None = None
    timeout_s: float = CLIENT_TIMEOUT_MS / 1000
    shows: str = ""  # "help" or "version" if that is all that was asked for
    words: list[Word] = field(default_factory=list)


def parse_arguments(arguments: Sequence[str]) -> CommandLine:
    """Take the command line apart; the words of the command stay as they are. Raises UsageError."""
    call = CommandLine()
    rest = list(arguments)
    ended: list[str] = []  # the `--` that ended the options, which the command must know of too
    while rest:
        argument = rest[0]
        name, equals, inline = argument.partition("=")
        if argument.startswith("kvtcp://"):
            call.address = rest.pop(0)
        elif argument in ("-h", "--help", "--version"):
            call.shows = "version" if argument == "--version" else "help"
            return call
        elif name in ("-o", "--output", "--timeout"):
            rest.pop(0)
            if not equals and not rest:
                raise UsageError(f"{name} needs a value\n{USAGE}")
            value = inline if equals else rest.pop(0)
            if name == "--timeout":
                call.timeout_s = _timeout(value)
            else:
                call.form = check_form(value)
        elif argument.startswith("-o") and argument[2:] in FORMATS:
            call.form = rest.pop(0)[2:]
        elif argument == "--":
            ended.append(rest.pop(0))
            break
        elif argument.startswith("-"):
            raise UsageError(f"unknown option {argument}\n{USAGE}")
        else:
            break
    call.words = [word_of_argument(argument) for argument in [*ended, *rest]]
    return call


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.001 <= seconds <= 86_400:
        raise UsageError(f"--timeout must be a number of seconds from 0.001 to 86400, not {text!r}")
    return seconds


async def connect_to(address: str, timeout_s: float) -> Client:
    """The real client of an address. Raises RequestError for an address that is none, Unavailable."""
    return await connect(address, timeout=timeout_s)


def help_page() -> str:
    """Return the text of --help."""
    width = max(len(command.usage) for command in TABLE.values())
    commands = "\n".join(f"  {command.usage:<{width}}  {command.summary}" for command in TABLE.values())
    return f"""{USAGE}

Shell of kvtcp. With a command it runs once, without one it is interactive.
  kvtcp://host:port  address of the cluster, default {ADDRESS_DEFAULT}
  -o FORM            form of the answer; default is table on a terminal, plain otherwise
  --timeout S        seconds to wait for an answer, default {CLIENT_TIMEOUT_MS / 1000:g}; backup and restore take
                     the time they need
  --                 ends the options, -o behind the command too
  --version, --help

Commands (help COMMAND shows an example):
{commands}

Words: plain, "quoted \\x00 \\n \\t \\" \\\\", b64:AAEC, @file, - for standard input.
Scripts give values through standard input, where nothing is interpreted: printf %s "$v" | {PROGRAM} put KEY -
Commands from a pipe or file ({PROGRAM} < script), one a line: empty lines and lines that begin with # are ignored;
the first command that ends with more than 1 ends the script.

Exit codes:
{exit_codes()}"""


def exit_codes() -> str:
    """A line for every exit code."""
    return "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in MEANINGS.items())


def terminal_columns() -> int | None:
    """Width of the terminal that stdout is, None if it is none or does not say."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except OSError:
        return None


def standard_streams() -> Streams:
    """Return the streams of this process. One that was closed by its parent (`<&-`) is empty, or drops all output."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - open to the end of the process, as the stream it stands for
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return Streams(
        open(sys.stdin.fileno(), "rb", buffering=0, closefd=False), sys.stdout.buffer, cast(TextIO, sys.stderr),
        stdout_is_terminal=sys.stdout.isatty(), stderr_is_terminal=sys.stderr.isatty(), columns=terminal_columns,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, *, streams: Streams | None = None, connect: ConnectTo = connect_to) -> int:
    """Run the shell and return its exit code. `argv` is without the program's name."""
    streams = streams or standard_streams()
    try:
        code = _main(sys.argv[1:] if argv is None else argv, streams, connect)
        streams.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader has seen enough, as `head` does; nothing may be flushed into the closed pipe at exit either
        _discard(streams)
        return Exit.OK
    except OSError as error:
        streams.message(f"the answer cannot be written: {error.strerror}")
        _discard(streams)
        return Exit.USAGE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except ModuleNotFoundError:
        raise  # a dependency: bin/kvtcp-shell says how to install it
    except Exception:
        import traceback

        traceback.print_exc(file=streams.stderr)
        streams.message(f"this is a bug of {PROGRAM} {__version__}; please report it with the lines above")
        return Exit.BUG


def _discard(streams: Streams) -> None:
    try:
        descriptor = streams.stdout.fileno()
    except OSError:  # a buffer in memory
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _main(argv: Sequence[str], streams: Streams, connect: ConnectTo) -> int:
    try:
        call = parse_arguments(argv)
    except UsageError as error:
        streams.message(str(error))
        return Exit.USAGE
    if call.shows:
        text = f"kvtcp {__version__}" if call.shows == "version" else help_page()
        streams.stdout.write(text.encode("utf-8") + b"\n")
        return Exit.OK
    context = Context(streams, lambda: connect(call.address, call.timeout_s), call.form)
    if call.words:
        return _run_once(context, call.words)
    return run_session(context, call.address)


def _run_once(context: Context, words: list[Word]) -> int:
    if context.streams.stderr_is_terminal and sys.stdin.isatty():
        context.ask = _ask

    async def run() -> int:
        try:
            return await run_words(context, words)
        finally:
            await context.close()

    with asyncio.Runner(loop_factory=_loop_factory(words)) as runner:
        return runner.run(run())


def _loop_factory(words: Sequence[Word]) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop for the commands that move many records; for one request its import costs more than it gains."""
    if any(word.raw in ("import", "export") for word in words[:2]):  # the first may be `--`
        try:
            import uvloop
        except ImportError:
            return None
        return uvloop.new_event_loop
    return None


async def _ask(question: str) -> bool:
    """Ask on the terminal. The loop stands still meanwhile, and Ctrl-C is the terminal's again."""
    with ctrl_c_raises():
        sys.stderr.write(question)
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")
