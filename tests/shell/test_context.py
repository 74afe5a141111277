"""The context of commands: when the client is opened, which form an answer has, where content comes from."""

import io
from pathlib import Path

import pytest

from kvtcp.constants import VALUE_BYTES_MAX
from kvtcp.errors import Unavailable
from kvtcp.shell.context import Context
from kvtcp.shell.exits import UsageError
from kvtcp.shell.parser import word_of_argument
from tests.support.shell_fakes import FakeClient, Shell


def make(client: FakeClient, *, stdin: bytes = b"", terminal: bool = False) -> Context:
    """A context over a fake client."""
    streams = Shell().streams(stdin, terminal=terminal)
    return Context(streams, lambda: client.connect("kvtcp://h:1", 1.0))


async def test_client_is_opened_once_and_again_after_a_failure() -> None:
    """The client is opened at first use and kept; an attempt that failed is not."""
    client = FakeClient()
    context = make(client)
    await context.close()
    assert client.opened == [] and client.closed == 0
    client.failure = Unavailable("down")
    with pytest.raises(Unavailable):
        await context.client()
    assert await context.client() is client and await context.client() is client
    assert len(client.opened) == 2 and not context.write_sent
    assert await context.writer() is client and context.write_sent
    await context.close()
    await context.close()
    assert client.closed == 1


def test_form_of_answers() -> None:
    """A table on a terminal, plain elsewhere; what the session asked for goes before, the command's own before all."""
    for terminal, default in ((True, "table"), (False, "plain")):
        context = make(FakeClient(), terminal=terminal)
        assert context.output().form == default
        context.form = "json"
        assert context.output().form == "json" and context.output("raw").form == "raw"


def test_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes from the word, from a file (~ is the home), from stdin once; never much more than a value may have."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_bytes(b"\x00" * (VALUE_BYTES_MAX + 1000))
    context = make(FakeClient(), stdin=b"in" * VALUE_BYTES_MAX)
    assert context.content(word_of_argument("a")) == b"a"
    assert len(context.content(word_of_argument("@~/file"))) == VALUE_BYTES_MAX + 1
    assert len(context.content(word_of_argument("-"))) == VALUE_BYTES_MAX + 1
    with pytest.raises(UsageError, match="can be used once"):
        context.content(word_of_argument("-"))


def test_messages_name_the_program() -> None:
    """Messages go to stderr with the program's name."""
    streams = Shell().streams()
    streams.message("text")
    assert isinstance(streams.stderr, io.StringIO) and streams.stderr.getvalue() == "kvtcp-shell: text\n"
