"""The command table: every command of the shell by its name, and how the words of a call find theirs.

The table stands above the modules of commands and below the programs that run them (`run`, `interactive`, `main`).
`help` is defined here, since it shows the table. Forms (`-o`) may stand anywhere in a call and are taken out
first. A name that is not in the table raises UsageError with the one that is spelt alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from kvtcp.constants import MAIN_PORT_DEFAULT
from kvtcp.shell.command import Arguments, Command
from kvtcp.shell.commands import backup, cluster, data
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, UsageError
from kvtcp.shell.output import FORMATS, Output
from kvtcp.shell.parser import ParseError, Word

# host:port, or a URL of another scheme. A port has two digits at least, so that it is not a key like user:1.
_ADDRESS: Final = re.compile(r"([a-z]+://)?([A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])(:[0-9]{2,5})?/?")


def take_form(words: Sequence[Word]) -> tuple[list[Word], str | None]:
    """Take `-o FORM` out of the words, at any place before the first `--`."""
    kept: list[Word] = []
    form: str | None = None
    rest = iter(words)
    for word in rest:
        if word.raw == "--":
            kept.extend(rest)
        elif word.raw == "-o":
            value = next(rest, None)
            if value is None:
                raise UsageError(f"-o needs one of {', '.join(FORMATS)}")
            form = check_form(value.raw)
        elif word.raw.startswith("-o") and word.raw[2:] in FORMATS:
            form = word.raw[2:]
        else:
            kept.append(word)
    return kept, form


def check_form(name: str) -> str:
    """The form of that name. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"-o needs one of {', '.join(FORMATS)}, not {name!r}")
    return name


async def _leave(context: Context, arguments: Arguments, output: Output) -> Exit:
    return Exit.OK  # the interactive session knows these words; for one command there is nothing to leave


async def _help(context: Context, arguments: Arguments, output: Output) -> Exit:
    if "COMMAND" not in arguments.words:
        output.texts(("usage", "what it does"), [(command.usage, command.summary) for command in TABLE.values()])
        return Exit.OK
    output.line(help_of([arguments.words[name] for name in ("COMMAND", "WORD") if name in arguments.words]))
    return Exit.OK


def help_of(words: Sequence[Word]) -> str:
    """Help for the command that the words begin with, or for all whose first word is theirs. Raises UsageError."""
    members = group(words[0].raw)
    if members and (len(words) == 1 or words[1].raw == "--help"):
        return "\n\n".join(command.help() for command in members)
    return take_command(words)[0].help()


_SESSION: Final = (
    Command("help [COMMAND] [WORD]", "the commands, or one of them with an example", "help scan", _help,
            "`?` is the same. `help node add` shows one command of two words, `help node` all that begin so."),
    Command("exit", "leave the interactive session", "exit", _leave, "Ctrl-D and `quit` are the same."),
    Command("quit", "leave the interactive session", "quit", _leave, "Ctrl-D and `exit` are the same."),
)
# all commands by name, in the order of the help
TABLE: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (*data.COMMANDS, *cluster.COMMANDS, *backup.COMMANDS, *_SESSION)
}


def group(word: str) -> list[Command]:
    """Return the commands of two words whose first one is this."""
    return [command for name, command in TABLE.items() if name.startswith(word + " ")]


def take_command(words: Sequence[Word]) -> tuple[Command, Sequence[Word]]:
    """Return the command that the words begin with, and the words behind its name. Raises UsageError."""
    first = words[0].raw
    if len(words) > 1 and group(first):
        name = f"{first} {words[1].raw}"
        return TABLE.get(name) or find(name), words[2:]
    return find(first), words[1:]


def find(name: str) -> Command:
    """Return the command of that name. Raises UsageError, which suggests a similar name."""
    command = TABLE.get("help" if name == "?" else name)
    if command is not None:
        return command
    first = name.split(" ")[0]
    members = [command.name.removeprefix(first + " ") for command in group(first)]
    if members:
        plural = f"; or did you mean {first}s?" if first + "s" in TABLE and first == name else ""
        raise UsageError(f"there is no command {name!r}; {first} is followed by {' or '.join(members)}{plural}")
    address = _ADDRESS.fullmatch(name)
    if address is not None and (address[1] or address[3]):
        url = f"kvtcp://{address[2]}{address[3] or f':{MAIN_PORT_DEFAULT}'}"
        raise UsageError(f"there is no command {name!r}; an address is written {url}")
    import difflib

    near = difflib.get_close_matches(name, TABLE, 1)
    hint = f"did you mean {near[0]}?" if near else "`help` lists the commands"
    raise UsageError(f"there is no command {name!r}; {hint}")


def parse_error_text(error: ParseError, line: str | None) -> str:
    """The sentence of a ParseError, with a caret below the line if there is one."""
    if line is None or "\n" in line:
        return str(error)
    shown = line.expandtabs(1)
    return f"{error}\n  {shown}\n  {' ' * error.position}^"
