"""One command: its words are bound by its usage line."""

import pytest

from kvtcp.shell.command import Command
from kvtcp.shell.exits import UsageError
from kvtcp.shell.parser import split_line
from kvtcp.shell.table import TABLE


async def nothing(*_: object) -> None:  # type: ignore[misc]
    """A handler that is not called."""


COMMAND = Command("go A B [C] [x=N] [y=N] [flag] [red|blue]", "s", "go 1 2", nothing)  # type: ignore[arg-type]


def test_usage_is_read() -> None:
    """The usage line alone says what a call may have."""
    assert (COMMAND.name, COMMAND.required, COMMAND.optional) == ("go", ("A", "B"), ("C",))
    assert COMMAND.options == {"x", "y"} and COMMAND.flags == {"flag", "red", "blue"}


@pytest.mark.parametrize(("line", "words", "options", "flags"), [
    ("1 2", ["1", "2"], {}, set()),
    ("flag x=1 3", ["flag", "x=1", "3"], {}, set()),
    ("1 2 3 x=4 flag blue", ["1", "2", "3"], {"x": "4"}, {"flag", "blue"}),
    ("1 2 blue y=5 3", ["1", "2", "3"], {"y": "5"}, {"blue"}),
    ('1 2 "flag"', ["1", "2", '"flag"'], {}, set()),
    ('1 2 "x=1" x=2', ["1", "2", '"x=1"'], {"x": "2"}, set()),
    ("1 2 b64:AA==", ["1", "2", "b64:AA=="], {}, set()),
])  # fmt: skip
def test_bind(line: str, words: list[str], options: dict[str, str], flags: set[str]) -> None:
    """Required words take what stands there; behind them options and flags are known by name, in any order."""
    bound = COMMAND.bind(split_line(line))
    assert [bound.words[name].raw for name in ("A", "B", "C") if name in bound.words] == words
    assert ({name: word.raw for name, word in bound.options.items()}, bound.flags) == (options, flags)


@pytest.mark.parametrize(("line", "text"), [
    ("1", "B is missing"),
    ("1 2 3 4", "what does '4' mean here"),
    ("1 2 z=1", "what does 'z=1' mean here"),
    ("1 2 --flag", "what does '--flag' mean here"),
    ("1 2 x=1 x=2", "x= is given twice"),
    ("1 2 x=", "nothing follows x="),
    ("1 2 red blue", "red and blue exclude each other"),
])  # fmt: skip
def test_bind_refuses(line: str, text: str) -> None:
    """What does not fit is named, and the usage is shown."""
    with pytest.raises(UsageError, match=text) as caught:
        COMMAND.bind(split_line(line))
    assert "usage: go A B" in str(caught.value)


@pytest.mark.parametrize(("line", "text"), [
    ("n1", "destroyed is missing; usage: node forget ID destroyed [yes]"),
    ("n1 yes", "the word destroyed must stand in the place of 'yes'; usage: node forget ID destroyed [yes]"),
    ('n1 "destroyed"', "the word destroyed must stand in the place of '\"destroyed\"'; usage: node forget"),
])  # fmt: skip
def test_words_that_must_stand(line: str, text: str) -> None:
    """A word in small letters stands for itself and nothing else."""
    with pytest.raises(UsageError) as caught:
        TABLE["node forget"].bind(split_line(line))
    assert text in str(caught.value)
