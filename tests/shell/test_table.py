"""The command table: binding of words by the usage line, forms anywhere, suggestions."""

import re
from pathlib import Path

import pytest

from kvtcp.shell.exits import MEANINGS, UsageError
from kvtcp.shell.output import FORMATS
from kvtcp.shell.parser import ParseError, split_line
from kvtcp.shell.table import TABLE, find, group, parse_error_text, take_command, take_form


@pytest.mark.parametrize(("line", "rest", "form"), [
    ("get k", ["get", "k"], None),
    ("-o json get k", ["get", "k"], "json"),
    ("get -o raw k", ["get", "k"], "raw"),
    ("get k -ojsonl", ["get", "k"], "jsonl"),
    ("put k -- -o", ["put", "k", "-o"], None),
    ("-- put k -o", ["put", "k", "-o"], None),
    ("put k -- --", ["put", "k", "--"], None),
    ('put k "-o"', ["put", "k", '"-o"'], None),
])  # fmt: skip
def test_form_is_taken_from_anywhere(line: str, rest: list[str], form: str | None) -> None:
    """-o stands before or after the command; `--` and quotes make it a value."""
    words, found = take_form(split_line(line))
    assert ([word.raw for word in words], found) == (rest, form)


def test_find() -> None:
    """A command is found by its exact name; others are suggested."""
    assert find("get").name == "get"
    assert find("?") is find("help")
    with pytest.raises(UsageError, match="did you mean put"):
        find("putt")


def test_commands_of_two_words() -> None:
    """Small letters in front are the name; what follows it is bound; half a name says what may follow."""
    command, rest = take_command(split_line("node forget n1 destroyed yes"))
    assert (command.name, [word.raw for word in rest]) == ("node forget", ["n1", "destroyed", "yes"])
    assert command.required == ("ID", "destroyed") and command.bind(rest).flags == {"yes"}
    command, rest = take_command(split_line("get node"))
    assert (command.name, [word.raw for word in rest]) == ("get", ["node"])
    assert [member.name for member in group("shard")] == ["shard accept-loss"] and group("get") == []
    for line, sentence in (
        ("node", "there is no command 'node'; node is followed by add or drain or undrain or remove or forget; "
                 "or did you mean nodes?"),
        (
            "node ad h:1",
            "there is no command 'node ad'; node is followed by add or drain or undrain or remove or forget",
        ),
        (
            'node "add"',
            "there is no command 'node \"add\"'; node is followed by add or drain or undrain or remove or forget",
        ),
        ("shard", "there is no command 'shard'; shard is followed by accept-loss; or did you mean shards?"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            take_command(split_line(line))
        assert str(caught.value) == sentence


@pytest.mark.parametrize(("word", "url"), [
    ("127.0.0.1:8000", "kvtcp://127.0.0.1:8000"),
    ("http://db.example:81/", "kvtcp://db.example:81"),
    ("https://[::1]", "kvtcp://[::1]:8000"),
    ("localhost:9000", "kvtcp://localhost:9000"),
])  # fmt: skip
def test_an_address_in_another_form_is_recognized(word: str, url: str) -> None:
    """Where a command should stand, an address without our scheme is shown as it is written."""
    with pytest.raises(UsageError) as caught:
        find(word)
    assert str(caught.value) == f"there is no command {word!r}; an address is written {url}"


@pytest.mark.parametrize("word", ["user:1", "frob", "a.b"])
def test_other_words_are_no_addresses(word: str) -> None:
    """A key or a word with a dot is not taken for an address."""
    with pytest.raises(UsageError, match="`help` lists the commands"):
        find(word)

def test_table_names_every_command_of_the_contract() -> None:
    """No command is missing, and each is under its own name."""
    names = (
        "add put get delete exists cas incr expire persist ttl all_values scan count delete-prefix status nodes shards "
        "where node-add node-drain node-undrain node-remove node-forget rebalance shard-accept-loss "
        "backup verify restore import export help exit quit"
    )
    of_two_words = {"node-add", "node-drain", "node-undrain", "node-remove", "node-forget", "shard-accept-loss"}
    assert list(TABLE) == [name.replace("-", " ", 1) if name in of_two_words else name for name in names.split()]
    assert all(command.name == name for name, command in TABLE.items())


def document_tables() -> dict[str, list[list[str]]]:
    """The tables of docs/shell.md by the header of their first column; cells without backquotes."""
    tables: dict[str, list[list[str]]] = {}
    rows: list[list[str]] | None = None
    for line in (Path(__file__).parent.parent.parent / "docs" / "shell.md").read_text().splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if rows is None:
            rows = tables[cells[0]] = []
        elif set(cells[0]) != {"-"}:
            rows.append(cells)
    return tables


def test_the_document_has_every_command_form_and_exit_code() -> None:
    """docs/shell.md lists the commands as the table has them, in its order, and so for forms and exit codes."""
    tables = document_tables()
    assert tables["command"] == [[command.usage, command.summary] for command in TABLE.values()]
    assert tables["code"] == [[str(code.value), meaning] for code, meaning in MEANINGS.items()]
    assert {row[0] for row in tables["form"]} == set(FORMATS)


def test_caret_points_at_the_mistake() -> None:
    """The sentence of a mistake is followed by the line and a caret below its place."""
    assert parse_error_text(ParseError("bad", 2), "a\tbc") == "bad (at character 3)\n  a bc\n    ^"
    assert parse_error_text(ParseError("bad", 2), None) == "bad (at character 3)"
