"""Runs one command: words in, answer on stdout, messages on stderr, an exit code back.

The one place where errors become sentences and codes (kvtcp.shell.exits). An error of no known class is a bug of the
program and propagates, to a traceback and exit code 70.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from itertools import takewhile

from kvtcp.errors import BatchError, KvtcpError
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, ShellRefused, UsageError, exit_of
from kvtcp.shell.parser import ParseError, Word
from kvtcp.shell.table import help_of, parse_error_text, take_command, take_form

_EXPECTED = (KvtcpError, UsageError, ShellRefused, ConnectionError, TimeoutError, OSError)


async def run_words(context: Context, words: Sequence[Word], line: str | None = None) -> Exit:
    """Run the command of `words`. `line` is the line they came from, to point at a mistake in it.

    Raises BrokenPipeError when stdout was closed, asyncio.CancelledError after a message about an open write.
    """
    context.write_sent = False
    try:
        # behind `--` everything is a word of the command
        help_asked = any(word.raw == "--help" for word in takewhile(lambda word: word.raw != "--", words))
        words, form = take_form(words)
        if not words:
            raise UsageError("a command is missing; `help` lists the commands")
        output = context.output(form)
        if help_asked:
            output.line(help_of(words))
            code = Exit.OK
        else:
            command, rest = take_command(words)
            context.command = command.name
            code = await command.handler(context, command.bind(rest), output)
        context.streams.stdout.flush()
        return code
    except ParseError as error:
        context.streams.message(parse_error_text(error, line))
        return Exit.USAGE
    except BrokenPipeError:
        raise
    except _EXPECTED as error:
        context.streams.stdout.flush()  # the answer so far comes before the message
        context.streams.message(sentence(error))
        return exit_of(error)
    except asyncio.CancelledError:
        context.streams.stdout.flush()
        if context.write_sent:
            context.streams.message(f"interrupted; whether {context.command} was carried out is not known")
        raise


def sentence(error: BaseException) -> str:
    """Return the sentence of an error for people."""
    if isinstance(error, BatchError):
        failed = [result for result in error.results if isinstance(result, KvtcpError)]
        first = failed[0].message if failed else ""
        return f"{error.message} ({len(failed)} of {len(error.results)} keys; the first: {first})"
    if isinstance(error, KvtcpError):
        return error.message
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return str(error) or type(error).__name__
