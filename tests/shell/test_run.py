"""One command: errors become sentences and codes, bugs do not."""

import pytest

from kvtcp.errors import BatchError, Code, DataError, Unavailable
from kvtcp.shell.run import sentence
from tests.support.shell_fakes import Shell


@pytest.mark.parametrize(("error", "text"), [
    (DataError("file x, line 3: bad"), "file x, line 3: bad"),
    (FileNotFoundError(2, "No such file or directory", "a b"), "a b: No such file or directory"),
    (ConnectionResetError("reset"), "reset"),
    (TimeoutError(), "TimeoutError"),
    (
        BatchError("some keys failed", [1, Unavailable("no space", Code.NO_SPACE), Unavailable("down")]),
        "some keys failed (2 of 3 keys; the first: no space)",
    ),
])  # fmt: skip
def test_sentences(error: Exception, text: str) -> None:
    """Every expected error is one sentence without a class name, if it has one of its own."""
    assert sentence(error) == text


def test_a_bug_is_not_hidden(shell: Shell) -> None:
    """An error of no expected class ends with 70, never with a code that a script takes for an answer."""
    shell.client.failure = KeyError("oh")
    assert shell.run("get", "a") == 70
    assert shell.out == b""
    assert shell.err.startswith("Traceback (most recent call last):\n") and "KeyError: 'oh'\n" in shell.err
    assert shell.err.splitlines()[-1].startswith("kvtcp-shell: this is a bug of kvtcp-shell ")


def test_no_command(shell: Shell) -> None:
    """Options alone are no command."""
    assert shell.run("-o", "json", "--") == 2
    assert shell.err == "kvtcp-shell: a command is missing; `help` lists the commands\n"
