"""The command table: every command of the shell with its words, its help and its handler.

A command is described by one usage line, from which its arguments are bound, so that help and behaviour cannot differ:

    add K V [ttl=60]               required words in capitals, options with `=`
    scan [PREFIX] [limit=N] [keys] optional words in capitals, flags in small letters
    restore NAME [merge|replace]   flags of which one may be given
    node forget ID destroyed       small letters in front belong to the name; further on they must stand as they are

Required words take what stands there, whatever it looks like (`put k ttl=60` stores the text); behind them, an
unquoted word that is a known option or flag is that, any other fills the next optional word.

Handlers are `async (context, arguments, output) -> Exit`. They raise; `kvtcp.shell.run` turns errors into messages.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from kvtcp.constants import MAIN_PORT_DEFAULT, TTL_MS_MAX
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, UsageError
from kvtcp.shell.output import FORMATS, Output
from kvtcp.shell.parser import ParseError, Word

# host:port, or a URL of another scheme. A port has two digits at least, so that it is not a key like user:1.
_ADDRESS: Final = re.compile(r"([a-z]+://)?([A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])(:[0-9]{2,5})?/?")
Handler = Callable[[Context, "Arguments", Output], Awaitable[Exit]]


@dataclass
class Arguments:
    """The words of one call, bound to the names of the usage line."""

    words: dict[str, Word] = field(default_factory=dict)
    options: dict[str, Word] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)

    def integer(self, word: Word, name: str, low: int, high: int) -> int:
        """A word as an integer. Raises UsageError."""
        text = word.text()
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise UsageError(f"{name} must be an integer from {low} to {high}, not {text!r}")
        return int(text)

    def seconds(self, word: Word, name: str) -> float:
        """A word as seconds, over 0. Raises UsageError."""
        text = word.text()
        try:
            seconds = float(text)
        except ValueError:
            raise UsageError(f"{name} must be a number of seconds, not {text!r}") from None
        if not 0 < seconds <= TTL_MS_MAX / 1000:  # nan is neither
            raise UsageError(f"{name} must be over 0 and at most {TTL_MS_MAX // 1000} seconds, not {text}")
        return seconds

    def ttl(self) -> float | None:
        """The option ttl=, in seconds."""
        return self.seconds(self.options["ttl"], "ttl") if "ttl" in self.options else None


@dataclass(frozen=True)
class Command:
    """One command. What may stand in its call is read from `usage`."""

    usage: str
    summary: str  # one line of the list of commands
    example: str  # one call with its answer
    handler: Handler
    notes: str = ""  # what else there is to know, shown by `help COMMAND`
    writes: bool = False  # an interrupted call may have changed something
    required: tuple[str, ...] = field(init=False)
    optional: tuple[str, ...] = field(init=False)
    options: frozenset[str] = field(init=False)
    choices: tuple[tuple[str, ...], ...] = field(init=False)  # flags; of each group one may be given

    def __post_init__(self) -> None:
        required: list[str] = []
        optional: list[str] = []
        options: set[str] = set()
        choices: list[tuple[str, ...]] = []
        for token in self.usage.split()[len(self.name.split()) :]:
            inner = token.strip("[]")
            if not token.startswith("["):
                required.append(inner)
            elif "=" in inner:
                options.add(inner.partition("=")[0])
            elif inner.isupper():
                optional.append(inner)
            else:
                choices.append(tuple(inner.split("|")))
        for name, value in (
            ("required", tuple(required)),
            ("optional", tuple(optional)),
            ("options", frozenset(options)),
            ("choices", tuple(choices)),
        ):
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """The words in small letters with which the usage line begins."""
        return " ".join(takewhile(_is_literal, self.usage.split()))

    @property
    def flags(self) -> frozenset[str]:
        """All flags."""
        return frozenset(name for group in self.choices for name in group)

    def bind(self, words: Sequence[Word]) -> Arguments:
        """The arguments of one call. Raises UsageError, ParseError."""
        if len(words) < len(self.required):
            missing = self.required[len(words)]
            raise UsageError(f"{missing} is missing; usage: {self.usage}")
        bound = Arguments(dict(zip(self.required, words, strict=False)))
        for name, word in bound.words.items():
            if _is_literal(name) and word.raw != name:
                raise UsageError(f"the word {name} must stand in the place of {word.raw!r}; usage: {self.usage}")
        free = list(self.optional)
        for word in words[len(self.required) :]:
            option = word.option()
            if not word.is_quoted and word.raw in self.flags:
                bound.flags.add(word.raw)
            elif option is not None and option[0] in self.options:
                if option[0] in bound.options:
                    raise UsageError(f"{option[0]}= is given twice; usage: {self.usage}")
                if not option[1].raw:
                    raise UsageError(f"nothing follows {option[0]}=; usage: {self.usage}")
                bound.options[option[0]] = option[1]
            elif free and not self._looks_like_option(word):
                bound.words[free.pop(0)] = word
            else:
                hint = "; a value with spaces needs quotes" if self._may_be_cut(word) else ""
                raise UsageError(f"what does {word.raw!r} mean here? usage: {self.usage}{hint}")
        for group in self.choices:
            given = [name for name in group if name in bound.flags]
            if len(given) > 1:
                raise UsageError(f"{' and '.join(given)} exclude each other; usage: {self.usage}")
        return bound

    def _may_be_cut(self, word: Word) -> bool:
        """A word behind a value may be the rest of that value."""
        return not self._looks_like_option(word) and (*self.required, *self.optional)[-1:] in (("V",), ("NEW",))

    def _looks_like_option(self, word: Word) -> bool:
        """A misspelt option must not become a prefix that matches nothing."""
        if word.is_quoted:
            return False
        return word.raw.startswith("--") or (bool(self.options) and word.option() is not None)


def _is_literal(token: str) -> bool:
    """A token of a usage line that stands for itself."""
    return token[0].isalpha() and token.islower()


def take_form(words: Sequence[Word]) -> tuple[list[Word], str | None]:
    """Take `-o FORM` out of the words, wherever it stands. The first `--` ends that: what follows is left as it is."""
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


def _load() -> Mapping[str, Command]:
    from kvtcp.shell import commands_admin, commands_cluster, commands_data

    commands = (*commands_data.COMMANDS, *commands_cluster.COMMANDS, *commands_admin.COMMANDS, *_SESSION)
    return {command.name: command for command in commands}


async def _leave(context: Context, arguments: Arguments, output: Output) -> Exit:
    return Exit.OK  # the interactive session knows these words; for one command there is nothing to leave


async def _help(context: Context, arguments: Arguments, output: Output) -> Exit:
    if "COMMAND" not in arguments.words:
        output.texts(("usage", "what it does"), [(command.usage, command.summary) for command in table().values()])
        return Exit.OK
    output.line(help_of([arguments.words[name] for name in ("COMMAND", "WORD") if name in arguments.words]))
    return Exit.OK


def help_of(words: Sequence[Word]) -> str:
    """Help for the command that the words begin with, or for all whose first word is theirs. Raises UsageError."""
    members = group(words[0].raw)
    if members and (len(words) == 1 or words[1].raw == "--help"):
        return "\n\n".join(map(help_text, members))
    return help_text(take_command(words)[0])


def help_text(command: Command) -> str:
    """Usage, meaning and example of one command."""
    lines = [f"usage: {command.usage}", f"  {command.summary}"]
    if command.notes:
        lines += [f"  {line}" for line in command.notes.strip().splitlines()]
    return "\n".join([*lines, "example:", *(f"  {line}" for line in command.example.splitlines())])


_SESSION: Final = (
    Command("help [COMMAND] [WORD]", "the commands, or one of them with an example", "help scan", _help,
            "`?` is the same. `help node add` shows one command of two words, `help node` all that begin so."),
    Command("exit", "leave the interactive session", "exit", _leave, "Ctrl-D and `quit` are the same."),
    Command("quit", "leave the interactive session", "quit", _leave, "Ctrl-D and `exit` are the same."),
)
_TABLE: dict[str, Command] = {}


def table() -> Mapping[str, Command]:
    """All commands by name, in the order of the help."""
    if not _TABLE:
        _TABLE.update(_load())
    return _TABLE


def group(word: str) -> list[Command]:
    """The commands of two words whose first one is this."""
    return [command for name, command in table().items() if name.startswith(word + " ")]


def take_command(words: Sequence[Word]) -> tuple[Command, Sequence[Word]]:
    """The command that the words begin with, and what follows its name. Raises UsageError."""
    first = words[0].raw
    if len(words) > 1 and group(first):
        name = f"{first} {words[1].raw}"
        return table().get(name) or find(name), words[2:]
    return find(first), words[1:]


def find(name: str) -> Command:
    """The command of that name. Raises UsageError that names one that is spelt alike."""
    command = table().get("help" if name == "?" else name)
    if command is not None:
        return command
    first = name.split(" ")[0]
    members = [command.name.removeprefix(first + " ") for command in group(first)]
    if members:
        plural = f"; or did you mean {first}s?" if first + "s" in table() and first == name else ""
        raise UsageError(f"there is no command {name!r}; {first} is followed by {' or '.join(members)}{plural}")
    address = _ADDRESS.fullmatch(name)
    if address is not None and (address[1] or address[3]):
        url = f"kvtcp://{address[2]}{address[3] or f':{MAIN_PORT_DEFAULT}'}"
        raise UsageError(f"there is no command {name!r}; an address is written {url}")
    import difflib

    near = difflib.get_close_matches(name, table(), 1)
    hint = f"did you mean {near[0]}?" if near else "`help` lists the commands"
    raise UsageError(f"there is no command {name!r}; {hint}")


def parse_error_text(error: ParseError, line: str | None) -> str:
    """The sentence of a ParseError, with a caret below the line if there is one."""
    if line is None or "\n" in line:
        return str(error)
    shown = line.expandtabs(1)
    return f"{error}\n  {shown}\n  {' ' * error.position}^"
