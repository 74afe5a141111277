"""A command of the shell: its usage line, the arguments of a call, its help.

A command is described by one usage line. Its arguments are bound by that line, so help and behaviour cannot differ:

    add K V [ttl=60]               required words in capitals, options with `=`
    scan [PREFIX] [limit=N] [keys] optional words in capitals, flags in small letters
    restore NAME [merge|replace]   flags of which one may be given
    node forget ID destroyed       small letters in front belong to the name; further on they must stand as they are

Required words are taken literally (`put k ttl=60` stores the text). Behind them, an unquoted word that is a known
option or flag is that; any other fills the next optional word.

Handlers are `async (context, arguments, output) -> Exit`. They raise; `kvtcp.shell.run` turns errors into messages.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from kvtcp.constants import TTL_MS_MAX
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, UsageError
from kvtcp.shell.output import Output
from kvtcp.shell.parser import Word

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
    """One command. The words of its calls are read from `usage`."""

    usage: str
    summary: str  # one line of the list of commands
    example: str  # one call with its answer
    handler: Handler
    notes: str = ""  # shown by `help COMMAND`
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
        found = {"required": tuple(required), "optional": tuple(optional), "choices": tuple(choices)}
        for name, value in {**found, "options": frozenset(options)}.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """The words in small letters at the beginning of the usage line."""
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

    def help(self) -> str:
        """Usage, meaning and example."""
        lines = [f"usage: {self.usage}", f"  {self.summary}"]
        if self.notes:
            lines += [f"  {line}" for line in self.notes.strip().splitlines()]
        return "\n".join([*lines, "example:", *(f"  {line}" for line in self.example.splitlines())])

    def _may_be_cut(self, word: Word) -> bool:
        """Whether a word may be the rest of the value before it."""
        return not self._looks_like_option(word) and (*self.required, *self.optional)[-1:] in (("V",), ("NEW",))

    def _looks_like_option(self, word: Word) -> bool:
        """Whether a word may be a misspelt option, which must not become a prefix that matches nothing."""
        if word.is_quoted:
            return False
        return word.raw.startswith("--") or (bool(self.options) and word.option() is not None)


def _is_literal(token: str) -> bool:
    """Whether a token of a usage line stands for itself."""
    return token[0].isalpha() and token.islower()
