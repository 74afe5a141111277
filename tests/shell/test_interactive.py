"""The interactive session: lines, completion, history, questions, and that nothing ends it but its user."""

import asyncio
import io
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtcp.errors import OutcomeUnknown, Unavailable
from kvtcp.shell import interactive
from kvtcp.shell.context import Context
from kvtcp.shell.interactive import PlainFront, PromptFront, completions, history_file, path_before, run_session
from tests.processes.cluster import is_waiting
from tests.support.shell_fakes import FakeClient, Shell

ADDRESS = "kvtcp://127.0.0.1:8000"


class Session:
    """Runs a session over a fake cluster; `out` and `err` have what it wrote."""

    def __init__(self) -> None:
        self.client = FakeClient()
        self.streams = Shell().streams()
        self.context = Context(self.streams, lambda: self.client.connect(ADDRESS, 2.0))

    def run(self, front: interactive.Front) -> int:
        return run_session(self.context, ADDRESS, front)

    def lines(self, *lines: str | BaseException | Callable[[], str], for_people: bool = True) -> int:
        """Run these lines with the plain front; an exception is raised in place of a line, a callable is called."""
        rest: Iterator[str | BaseException | Callable[[], str]] = iter(lines)

        def read(prompt: str) -> str:
            line = next(rest, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line() if callable(line) else line

        return self.run(PlainFront(read, is_for_people=for_people))

    @property
    def out(self) -> str:
        assert isinstance(self.streams.stdout, io.BytesIO), "a buffer in memory"
        return self.streams.stdout.getvalue().decode()

    @property
    def err(self) -> str:
        assert isinstance(self.streams.stderr, io.StringIO), "a buffer in memory"
        return self.streams.stderr.getvalue()


@pytest.fixture
def session() -> Session:
    """A session over an empty cluster."""
    return Session()


def test_a_session(session: Session) -> None:
    """Commands run one after the other over one client, which is closed at the end; leaving is no failure."""
    assert session.lines('put "a b" 1', "", "get b64:YSBi -o json", "get none", "exit", "put c 1") == 0
    assert session.out == 'OK 1\n{"key": "a b", "value": "1", "rev": 1}\n'
    assert session.err.startswith("kvtcp shell, kvtcp://127.0.0.1:8000. ")
    assert len(session.client.opened) == 1 and session.client.closed == 1
    assert b"c" not in session.client.cells


def test_mistakes_do_not_end_it(session: Session) -> None:
    """A wrong line is pointed at, a lost server is told, Ctrl-C clears the line; the session goes on."""

    def fail_next() -> str:
        session.client.failure = OutcomeUnknown("the connection was lost after the put was sent")
        return "put a 1"

    session.client.failure = Unavailable("no connection to kvtcp://127.0.0.1:8000 within 2 s")
    mistakes = ("get a", 'put a "x', KeyboardInterrupt(), "frob", "count", fail_next, "put a 2", "put k -")
    assert session.lines(*mistakes) == 0
    assert session.out == "0\nOK 1\n"
    assert "kvtcp-shell: no connection to kvtcp://127.0.0.1:8000 within 2 s\n" in session.err
    assert 'closing quote is missing (at character 7)\n  put a "x\n        ^\n' in session.err
    assert "there is no command 'frob'" in session.err
    assert "the connection was lost after the put was sent" in session.err
    assert "- (standard input) can be used once" in session.err
    assert len(session.client.opened) == 2, "the first attempt to connect failed, the next command made another"


def test_ctrl_c_ends_the_command_only(session: Session) -> None:
    """Ctrl-C during a command ends it, says that a write is open, and the next command runs."""

    def interrupt() -> None:
        if session.client.is_hanging.wait(10):
            os.kill(os.getpid(), signal.SIGINT)

    def hang() -> str:
        session.client.hangs = True
        threading.Thread(target=interrupt, daemon=True).start()
        return "put a 1"

    def go_on() -> str:
        session.client.hangs = False
        return "count"

    assert session.lines("count", hang, go_on) == 0
    assert session.out == "0\n0\n"
    assert "interrupted; whether put was carried out is not known" in session.err


def test_questions(session: Session) -> None:
    """delete-prefix asks with the number of keys; only yes deletes, Ctrl-C and the end are a no."""
    for key in (b"u1", b"u2", b"v"):
        session.client._set(key, b"", None)
    asked: list[str] = []
    answers: Iterator[str | BaseException] = iter(
        ["delete-prefix u", "n", "delete-prefix u", KeyboardInterrupt(), "delete-prefix u", "yes", EOFError()]
    )

    def read(prompt: str) -> str:
        asked.append(prompt)
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    assert session.run(PlainFront(read, is_for_people=True)) == 0
    assert asked[:2] == ["127.0.0.1:8000> ", 'delete 2 keys that start with "u"? [y/N] ']
    assert session.out == "2\n" and session.err.count("nothing was deleted") == 2
    assert list(session.client.cells) == [b"v"]


@pytest.mark.parametrize(("lines", "code", "out"), [
    (["put a 1", "get a"], 0, "OK 1\n1\n"),
    (["put a 1", "get b", "get a"], 0, "OK 1\n1\n"),
    (["put a 1", "get b"], 1, "OK 1\n"),
    (["put a 1", "add a 2", "get a"], 6, "OK 1\n"),
    (['put a "', "get a"], 2, ""),
    (["# put b 1", "", "  ", "put a 1", "  # get b"], 0, "OK 1\n"),
    ([], 0, ""),
])  # fmt: skip
def test_commands_from_a_pipe(session: Session, lines: list[str], code: int, out: str) -> None:
    """A script ends at its first failure and with its code; a key that is not there is no failure. No greeting."""
    assert session.lines(*(f"{line}\n" for line in lines), for_people=False) == code
    assert session.out == out and "kvtcp shell," not in session.err


def test_ctrl_c_ends_a_script(session: Session) -> None:
    """Ctrl-C while the next line of a pipe is awaited ends the session; no later line runs."""
    with pytest.raises(KeyboardInterrupt):
        session.lines("put a 1\n", KeyboardInterrupt(), "put b 2\n", for_people=False)
    assert list(session.client.cells) == [b"a"] and session.client.closed == 1


def test_front_of_a_pipe_reads_stdin(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stdin is no terminal its lines are the commands, up to its end."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("put a 1\nget a\n"))
    assert run_session(session.context, ADDRESS) == 0
    assert session.out == "OK 1\n1\n"


@pytest.mark.parametrize(("before", "words"), [
    ("ge", ["get"]),
    ("delete", ["delete", "delete-prefix"]),
    ("qu", ["quit"]),
    ("put k v ", ["ttl=", "-o"]),
    ("put k v t", ["ttl="]),
    ("put k t", []),
    ("scan re", ["reverse"]),
    ("scan reverse ", ["from=", "limit=", "to=", "keys", "-o"]),
    ("restore b1 r", ["replace"]),
    ("get k -o j", ["json", "jsonl"]),
    ("help sc", ["scan"]),
    ("nod", ["nodes", "node"]),
    ("node ", ["add", "drain", "undrain", "remove", "forget"]),
    ("node dr", ["drain"]),
    ("help node f", ["forget"]),
    ("node add ", []),
    ("node drain n1 ", ["wait", "-o"]),
    ("node forget n1 ", ["destroyed"]),
    ("node forget n1 destroyed ", ["yes", "-o"]),
    ("node drain n1 -o j", ["json", "jsonl"]),
    ("frob ", []),
])  # fmt: skip
def test_completions(before: str, words: list[str]) -> None:
    """Commands, then their options and flags where these may stand, then forms."""
    assert completions(before) == words


def test_completion_of_paths() -> None:
    """Paths are completed for the commands that take a file, and after @."""
    assert [path_before(b) for b in ("import da", "put k @da", "get da", "import a b", "@x")] == [
        "da", "da", None, None, None,
    ]


def test_history_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history is in the state directory: XDG_STATE_HOME if it is absolute, ~/.local/state otherwise."""
    monkeypatch.setenv("HOME", "/root-of/x")
    for value, expected in (("/s", "/s"), ("", "/root-of/x/.local/state"), ("rel", "/root-of/x/.local/state")):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert history_file() == Path(expected) / "kvtcp" / "history"


WITHOUT_PROMPT_TOOLKIT = """
import fcntl, sys, termios
sys.modules["prompt_toolkit"] = None
sys.path[:0] = ["."]
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tests.support.shell_fakes import FakeClient
from kvtcp.shell.main import main
sys.exit(main([], connect=FakeClient().connect))
"""


class Terminal:
    """A process on a terminal of its own, without prompt_toolkit. `shown` is all that the terminal got so far."""

    def __init__(self) -> None:
        self.master, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_PROMPT_TOOLKIT], stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""
        self._seen = 0  # characters of `shown` that were waited for

    def type(self, keys: str) -> None:
        """Send keys, once the process waits for them: readline misses a Ctrl-C that comes just before."""
        while not is_waiting(self.process.pid):
            time.sleep(0.01)
        os.write(self.master, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` is there, behind what was waited for before."""
        deadline = time.monotonic() + 60
        while (found := self.shown.find(text, self._seen)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not in {self.shown[self._seen:]!r}"
            self.shown += os.read(self.master, 4096).decode().replace("\r\n", "\n")
        self._seen = found + len(text)

    def close(self) -> None:
        """End the process if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_ctrl_c_at_a_plain_prompt() -> None:
    """Without prompt_toolkit Ctrl-C drops the line, gives a new prompt on a new line, and the next command runs."""
    terminal, prompt = Terminal(), "127.0.0.1:8000> "
    try:
        terminal.wait_for(prompt)
        terminal.type("put a 1\n")
        terminal.wait_for("OK 1\n" + prompt)
        for _ in range(2):
            terminal.type("delete a")
            terminal.wait_for("delete a")
            terminal.type("\x03")
            terminal.wait_for("\n" + prompt)
            terminal.type("get a\n")
            terminal.wait_for("get a\n1\n" + prompt)
        terminal.type("\x04")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()


def test_prompt_toolkit(session: Session, tmp_path: Path) -> None:
    """With prompt_toolkit: editing, completion by Tab, history with Ctrl-R, Ctrl-C clears, Ctrl-D leaves."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    # for each prompt: keys, and what the line must be before the next keys are sent
    prompts: list[list[tuple[str, str | None]]] = [
        [("put a 1\r", None)],
        [("garbage", "garbage"), ("\x03", None)],  # Ctrl-C
        [("\x12put", None), ("\r", "put a 1"), ("\r", None)],  # Ctrl-R finds it, Enter takes it, Enter runs it
        [("exi\x7f\x7f\x7fcou\t", "count "), ("\r", None)],  # Tab
        [("delete-prefix a\r", None), ("y\r", None)],
        [("\x04", None)],  # Ctrl-D
    ]
    with create_pipe_input() as keys:
        front = PromptFront(tmp_path / "history", input=keys, output=DummyOutput())
        line = front.line

        async def type_keys(steps: list[tuple[str, str | None]]) -> None:
            for text, expected in steps:
                keys.send_text(text)
                async with asyncio.timeout(10):
                    while expected is not None and front._session.default_buffer.text != expected:
                        await asyncio.sleep(0.001)  # sleeps: the prompt has no event to wait for

        async def typed_line(prompt: str) -> str:
            typing = asyncio.create_task(type_keys(prompts.pop(0)))
            try:
                return await line(prompt)
            finally:
                await typing

        front.line = typed_line  # type: ignore[method-assign]
        assert session.run(front) == 0
    assert session.out == "OK 1\nOK 2\n1\n1\n"
    history = (tmp_path / "history").read_text()
    assert "+delete-prefix a\n" in history and "garbage" not in history and "+y\n" not in history


def test_prompt_toolkit_notices_a_lost_server_at_the_prompt(session: Session) -> None:
    """The loop of the client runs while the prompt waits for keys."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    ticks: list[int] = []
    with create_pipe_input() as keys:

        async def connect() -> FakeClient:
            def tick() -> None:
                ticks.append(1)
                if len(ticks) == 3:
                    keys.send_text("\x04")
                else:
                    asyncio.get_running_loop().call_later(0.001, tick)

            asyncio.get_running_loop().call_soon(tick)
            return session.client

        session.context.connect = connect
        front = PromptFront(None, input=keys, output=DummyOutput())
        keys.send_text("count\r")
        assert session.run(front) == 0
    assert len(ticks) == 3
