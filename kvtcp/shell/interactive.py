"""The interactive session: read a line, run it, again.

With prompt_toolkit a line has history (kept in the state directory, searched with Ctrl-R) and completion; without it,
or where stdin is no terminal, lines are read plainly. Ctrl-C clears the line or ends the command that runs, Ctrl-D,
`exit` and `quit` leave. An error of a command, a lost server included, is shown and does not end the session; the
client connects again by itself.

One event loop lives as long as the session, and each prompt and each command is one run of it: so the client notices
at the prompt that its server went away, and Ctrl-C during a command cancels only that command. While a plain prompt
waits the loop stands still; it gets two turns before the next command, to notice a lost connection.

Commands from a pipe (`kvtcp-shell < script`) run one after the other up to the first that fails with a code above 1;
the exit code is that of the last one that ran. Empty lines and lines that begin with `#` are ignored.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from kvtcp.shell.context import Context, ctrl_c_raises
from kvtcp.shell.exits import Exit
from kvtcp.shell.output import FORMATS
from kvtcp.shell.parser import ParseError, Word, split_line
from kvtcp.shell.run import run_words
from kvtcp.shell.table import TABLE, group, parse_error_text

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

LEAVING: Final = ("exit", "quit")
_YES: Final = ("y", "yes")


class LineCleared(Exception):
    """Ctrl-C at the prompt."""


class Front(Protocol):
    """A source of lines."""

    is_for_people: bool  # False for a pipe: no prompt, no greeting, and a failed command ends the session

    async def line(self, prompt: str) -> str:
        """The next line. Raises EOFError at the end, LineCleared."""

    async def answer(self, question: str) -> str:
        """An answer to a question, outside the history. Raises as `line`."""


class PlainFront:
    """Lines by input(), or by readline() where stdin is no terminal."""

    def __init__(self, read: Callable[[str], str], *, is_for_people: bool) -> None:
        self._read = read
        self.is_for_people = is_for_people

    async def line(self, prompt: str) -> str:
        try:
            with ctrl_c_raises():
                line = self._read(prompt)
        except KeyboardInterrupt:
            if not self.is_for_people:
                raise
            raise LineCleared from None
        # the loop stood still: let it read from the server, the end of the connection above all
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return line

    async def answer(self, question: str) -> str:
        return await self.line(question)


class PromptFront:
    """Lines by prompt_toolkit. `options` go to PromptSession: tests pass their own input and output."""

    is_for_people = True

    def __init__(self, history_path: Path | None, **options: Any) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPressEvent

        keys = KeyBindings()

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            event.app.exit(exception=LineCleared(), style="class:aborting")

        history = InMemoryHistory() if history_path is None else FileHistory(str(history_path))
        self._session: PromptSession[str] = PromptSession(
            history=history, completer=make_completer(), complete_while_typing=False, key_bindings=keys, **options
        )
        self._questions: PromptSession[str] = PromptSession(key_bindings=keys, **options)

    async def line(self, prompt: str) -> str:
        return await self._session.prompt_async(prompt)

    async def answer(self, question: str) -> str:
        return await self._questions.prompt_async(question)


def completions(before: str) -> list[str]:
    """Return the words that can stand at the end of `before`, the line up to the cursor."""
    words = before.split()
    current = "" if not before or before[-1].isspace() else words.pop()
    if words and words[-1] == "-o":
        return [form for form in FORMATS if form.startswith(current)]
    if words[:1] == ["help"]:
        del words[0]
        command = None
    else:
        command = TABLE.get(" ".join(words[:2])) or TABLE.get(" ".join(words[:1]))
    candidates: Iterable[str] = ()
    if command is not None:
        given = len(words) - len(command.name.split())
        if given >= len(command.required):
            candidates = [*(f"{name}=" for name in sorted(command.options)), *sorted(command.flags), "-o"]
        elif command.required[given].islower():
            candidates = [command.required[given]]
    elif not words:
        candidates = dict.fromkeys(name.split()[0] for name in TABLE)
    elif len(words) == 1:
        candidates = [member.name.split()[1] for member in group(words[0])]
    return [word for word in candidates if word.startswith(current) and word not in words]


def make_completer() -> Completer:
    """Completion of commands, options and flags for prompt_toolkit; of paths where a file is named."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class ShellCompleter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            before = document.text_before_cursor
            current = document.get_word_before_cursor(WORD=True)
            for word in completions(before):
                ending = "" if word.endswith("=") else " "
                yield Completion(word + ending, start_position=-len(current), display=word)
            path = path_before(before)
            if path is not None:
                yield from paths.get_completions(Document(path), complete_event)

    return ShellCompleter()


def path_before(before: str) -> str | None:
    """The unfinished path at the end of `before`, None where no path is expected."""
    words = before.split(" ")
    if len(words) == 2 and words[0] in ("import", "export", "verify"):
        return words[1]
    return words[-1][1:] if len(words) > 1 and words[-1].startswith("@") else None


def history_file() -> Path:
    """Return the path of the history, by the XDG rules."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "kvtcp" / "history"


def make_front(context: Context) -> Front:
    """Make the best front for this process's stdin and stdout."""
    if not sys.stdin.isatty():
        return PlainFront(_readline, is_for_people=False)
    if context.streams.stdout_is_terminal:
        try:
            path = history_file()
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.open("ab").close()
            except OSError as error:
                context.streams.message(f"the history is not kept: {error}")
                return PromptFront(None)
            return PromptFront(path)
        except ImportError:
            pass  # prompt_toolkit is an extra
    try:
        import readline  # noqa: F401 - imported, it gives input() line editing and the history of this session
    except ImportError:
        pass  # not on every platform
    return PlainFront(_input, is_for_people=True)


def _input(prompt: str) -> str:
    """Call input() and leave the cursor at the beginning of a line, also after Ctrl-C and Ctrl-D."""
    try:
        return input(prompt)
    except (KeyboardInterrupt, EOFError):
        sys.stderr.write("\n")
        sys.stderr.flush()
        raise


def _readline(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def run_session(context: Context, address: str, front: Front | None = None) -> int:
    """Run lines until the end. Returns the exit code of the last command, 0 on a terminal."""
    front = front or make_front(context)
    context.stdin_is_data = False
    if front.is_for_people:
        context.ask = _asker(front)
    code = Exit.OK
    with asyncio.Runner() as runner:
        if front.is_for_people:
            context.streams.stderr.write(f"kvtcp shell, {address}. `help` lists the commands, Ctrl-D leaves.\n")
        try:
            while True:
                try:
                    line = runner.run(front.line(f"{address.removeprefix('kvtcp://')}> "))
                except LineCleared:
                    continue
                except KeyboardInterrupt:
                    if not front.is_for_people:
                        raise
                    continue
                except EOFError:
                    break
                if line.strip() in LEAVING:
                    break
                ran = _run_line(runner, context, line)
                code = code if ran is None else ran
                if code > Exit.NOT_FOUND and not front.is_for_people:
                    break
        finally:
            runner.run(context.close())
    return Exit.OK if front.is_for_people else code


def _run_line(runner: asyncio.Runner, context: Context, line: str) -> Exit | None:
    """Run one line; None for an empty one or a comment."""
    if line.lstrip().startswith("#"):
        return None
    try:
        words: list[Word] = split_line(line)
    except ParseError as error:
        context.streams.message(parse_error_text(error, line.rstrip("\n")))
        return Exit.USAGE
    if not words:
        return None
    try:
        return runner.run(run_words(context, words, line.rstrip("\n")))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _asker(front: Front) -> Callable[[str], Any]:
    async def ask(question: str) -> bool:
        try:
            return (await front.answer(question)).strip().lower() in _YES
        except (LineCleared, EOFError):
            return False

    return ask
