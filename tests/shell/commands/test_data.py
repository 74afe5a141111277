"""Commands on keys: what they print in every form, what they end with, and what they refuse."""

import json
from pathlib import Path

import pytest

from kvtcp.errors import Code, OutcomeUnknown, RequestError, Unavailable
from tests.support.shell_fakes import FakeClient, Shell


@pytest.fixture
def shell() -> Shell:
    """A shell over a cluster with a few keys."""
    shell = Shell()
    for key, value, ttl in (
        (b"a", b"1", None), (b"hits", b"41", None), (b"user:1", b"Ada", None),
        (b"user:2", "Zoë\tTab".encode(), 59.998), (b"user:\xff", b"\x00\xfe\\\n", None),
    ):  # fmt: skip
        shell.client._set(key, value, ttl)
    return shell


GOLDEN: list[tuple[list[str], int, str]] = [
    (["get", "user:1"], 0, "Ada\n"),
    (["get", "user:1", "-o", "raw"], 0, "Ada"),
    (["-o", "raw", "get", "user:1"], 0, "Ada"),
    (["-oraw", "get", "user:1"], 0, "Ada"),
    (["get", "user:1", "-o", "json"], 0, '{"key": "user:1", "value": "Ada", "rev": 3}\n'),
    (["get", "user:2", "-o", "jsonl"], 0, '{"key": "user:2", "value": "Zoë\\tTab", "rev": 4, "ttl_ms": 59998}\n'),
    (["get", "user:2", "-o", "table"], 0, "Zoë\tTab\n"),
    (["get", '"user:\\xff"', "-o", "table"], 0, "\\x00\\xfe\\\n\n"),
    (["get", "user:1", "-o", "plain"], 0, "Ada\n"),
    (["put", "k", "v"], 0, "OK 6\n"),
    (["put", "k", "v", "ttl=60"], 0, "OK 6\n"),
    (["put", "k", "v", "-o", "json"], 0, '{"key": "k", "rev": 6}\n'),
    (["put", "k", "v", "-o", "raw"], 0, "OK 6"),
    (["add", "k", "v", "ttl=0.5"], 0, "OK 6\n"),
    (["add", "k", "v", "-o", "jsonl"], 0, '{"key": "k", "rev": 6}\n'),
    (["cas", "a", "1", "2"], 0, "OK 6\n"),
    (["cas", "a", "1", "2", "-o", "json"], 0, '{"key": "a", "rev": 6}\n'),
    (["cas", "a", "9", "2"], 1, ""),
    (["delete", "a"], 0, "1\n"),
    (["delete", "a", "1"], 0, "1\n"),
    (["delete", "a", "2"], 1, "0\n"),
    (["delete", "nothing"], 1, "0\n"),
    (["delete", "a", "-o", "json"], 0, '{"key": "a", "deleted": true}\n'),
    (["exists", "a"], 0, "1\n"),
    (["exists", "nothing"], 1, "0\n"),
    (["exists", "nothing", "-o", "json"], 1, '{"key": "nothing", "exists": false}\n'),
    (["incr", "hits"], 0, "42\n"),
    (["incr", "hits", "-2"], 0, "39\n"),
    (["incr", "new", "-o", "json"], 0, '{"key": "new", "value": 1}\n'),
    (["expire", "a", "60"], 0, "1\n"),
    (["expire", "nothing", "60"], 1, "0\n"),
    (["expire", "a", "1.5", "-o", "json"], 0, '{"key": "a", "expires": true}\n'),
    (["persist", "user:2"], 0, "1\n"),
    (["persist", "a"], 1, "0\n"),
    (["ttl", "user:2"], 0, "59.998\n"),
    (["ttl", "a"], 0, "-1\n"),
    (["ttl", "nothing"], 1, ""),
    (["ttl", "user:2", "-o", "json"], 0, '{"key": "user:2", "ttl_ms": 59998}\n'),
    (["ttl", "a", "-o", "jsonl"], 0, '{"key": "a", "ttl_ms": null}\n'),
    (["count"], 0, "5\n"),
    (["count", "user:"], 0, "3\n"),
    (["count", "none"], 0, "0\n"),
    (["count", "-o", "json"], 0, '{"count": 5}\n'),
    (["all_values"], 0, "a\t1\nhits\t41\nuser:1\tAda\nuser:2\tZoë\\tTab\nuser:\\xff\t\\x00\\xfe\\\\\\n\n"),
    (["scan", "user:", "limit=2"], 0, "user:1\tAda\nuser:2\tZoë\\tTab\n"),
    (["scan", "user:", "limit=2", "keys"], 0, "user:1\nuser:2\n"),
    (["scan", "reverse", "keys"], 0, "user:\\xff\nuser:2\nuser:1\nhits\na\n"),
    (["scan", '"reverse"'], 0, ""),
    (["scan", "from=hits", "to=user:2"], 0, "hits\t41\nuser:1\tAda\n"),
    (["scan", 'from="hits"', "to=b64:dXNlcjoy", "reverse"], 0, "user:1\tAda\nhits\t41\n"),
    (["scan", "user:", "limit=2", "-o", "raw"], 0, "AdaZoë\tTab"),
    (["scan", "user:", "limit=2", "keys", "-o", "raw"], 0, "user:1user:2"),
    (["scan", "a", "-o", "jsonl"], 0, '{"key": "a", "value": "1", "rev": 1}\n'),
    (["scan", "user:", "keys", "limit=1", "-o", "jsonl"], 0, '{"key": "user:1"}\n'),
    (["scan", "none", "-o", "json"], 0, "[]\n"),
    (["scan", "none", "-o", "table"], 0, "0 pairs\n"),
    (["scan", "a", "keys", "-o", "table"], 0, "key\n---\na\n1 key\n"),
    (["scan", "user:", "-o", "json"], 0,
        '[\n{"key": "user:1", "value": "Ada", "rev": 3},\n'
        '{"key": "user:2", "value": "Zoë\\tTab", "rev": 4, "ttl_ms": 59998},\n'
        '{"key_b64": "dXNlcjr/", "value_b64": "AP5cCg==", "rev": 5}\n]\n'),
    (["scan", "user:", "limit=2", "-o", "table"], 0,
        "key     rev  ttl     value\n------  ---  ------  --------\nuser:1  3    -       Ada\n"
        "user:2  4    59.998  Zoë\\tTab\n2 pairs\n"),
    (["delete-prefix", "user:", "dry-run"], 0, "3\n"),
    (["delete-prefix", "user:", "yes"], 0, "3\n"),
    (["delete-prefix", "user:", "yes", "max=3", "-o", "json"], 0, '{"matched": 3, "deleted": 3}\n'),
    (["delete-prefix", "none", "yes"], 0, "0\n"),
    (["delete-prefix", '""', "all", "yes"], 0, "5\n"),
    (["delete-prefix", "user:", "dry-run", "-o", "json"], 0, '{"matched": 3, "deleted": 0}\n'),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "out"), GOLDEN, ids=[" ".join(row[0]) for row in GOLDEN])
def test_output(shell: Shell, arguments: list[str], code: int, out: str) -> None:
    """Every command prints exactly this and ends with exactly that code."""
    assert (shell.run(*arguments), shell.out.decode("utf-8", "replace")) == (code, out)


def test_value_bytes_are_not_changed(shell: Shell) -> None:
    """`get` in plain form is the value and a newline, in raw form the value, whatever bytes these are."""
    shell.run("get", '"user:\\xff"')
    assert shell.out == b"\x00\xfe\\\n\n"
    shell.run("get", '"user:\\xff"', "-o", "raw")
    assert shell.out == b"\x00\xfe\\\n"


def test_json_array_is_json(shell: Shell) -> None:
    """-o json of a scan is one JSON document also over several pages."""
    for n in range(1201):
        shell.client._set(b"many:%05d" % n, b"x", None)
    shell.run("scan", "many:", "-o", "json")
    pairs = json.loads(shell.out)
    assert [pair["key"] for pair in pairs] == [f"many:{n:05d}" for n in range(1201)]
    shell.run("scan", "many:", "-o", "table")
    assert shell.out.endswith(b"1201 pairs\n") and shell.out.count(b"\n") == 1201 + 3


@pytest.mark.parametrize(("line", "code", "text"), [
    ("get nothing", 1, 'there is no key "nothing"'),
    ("add user:1 Eve", 6, 'the key "user:1" exists'),
    ("cas user:1 Bob Eve", 1, 'the key "user:1" has revision 3'),
    ("incr user:1", 6, 'the value of "user:1" is not a number'),
    ("delete-prefix user: max=2 yes", 6, '3 keys that start with "user:" are more than max=2; nothing was deleted'),
])  # fmt: skip
def test_what_cannot_be_done(shell: Shell, line: str, code: int, text: str) -> None:
    """Nothing on stdout, one message on stderr that names the key or both numbers, and no key is changed."""
    before = dict(shell.client.cells)
    assert (shell.line(line), shell.out, shell.err) == (code, b"", f"kvtcp-shell: {text}\n")
    assert shell.client.cells == before


def test_ttl_is_passed_on(shell: Shell) -> None:
    """ttl= and `expire` reach the client as seconds; `cas` and `incr` keep them."""
    shell.run("put", "k", "7", "ttl=60")
    assert shell.client.cells[b"k"].ttl == 60.0
    shell.run("expire", "k", "1.5")
    assert shell.client.cells[b"k"].ttl == 1.5


def test_content_from_files_and_stdin(shell: Shell, tmp_path: Path) -> None:
    """@file and - are read as they are, binary and with their newline; b64: and quotes give any bytes."""
    file = tmp_path / "a value"
    file.write_bytes(b"\x00\n")
    assert shell.run("put", "k", f"@{file}") == 0
    assert shell.client.cells[b"k"].value == b"\x00\n"
    assert shell.run("put", "k", "-", stdin=b"in\n\xff") == 0
    assert shell.client.cells[b"k"].value == b"in\n\xff"
    assert shell.run("put", "b64:AP8=", '"\\x00ä"') == 0
    assert shell.client.cells[b"\x00\xff"].value == b"\x00\xc3\xa4"
    assert shell.run("put", "k", "ttl=60") == 0
    assert shell.client.cells[b"k"].value == b"ttl=60"


@pytest.mark.parametrize("arguments", ["-- put k {}", "put -- k {}", "put k -- {}"])
@pytest.mark.parametrize("value", ["-o", "-ojson", "--help", "--", "--timeout"])
def test_two_dashes_end_the_options(shell: Shell, arguments: str, value: str) -> None:
    """Behind `--`, wherever it stands, everything is a word of the command."""
    assert shell.line(arguments.format(value)) == 0
    assert shell.client.cells[b"k"].value == value.encode()


USAGE_ERRORS = [
    (["put", "k"], "V is missing; usage: put K V [ttl=60]"),
    (["put", "k", "v", "x"], "what does 'x' mean here? usage: put K V [ttl=60]; a value with spaces needs quotes\n"),
    (["cas", "k", "v", "a", "b"], "usage: cas K OLD NEW; a value with spaces needs quotes\n"),
    (["put", "k", "v", "tll=6"], "what does 'tll=6' mean here? usage: put K V [ttl=60]\n"),
    (["get", "k", "v"], "what does 'v' mean here? usage: get K\n"),
    (["put", "k", "v", "ttl=x"], "ttl must be a number of seconds, not 'x'"),
    (["put", "k", "v", "ttl=0"], "ttl must be over 0 and at most 3153600000 seconds, not "),
    (["put", "k", "v", "ttl=nan"], "ttl must be over 0 and at most 3153600000 seconds, not "),
    (["put", "k", "v", "ttl="], "nothing follows ttl="),
    (["put", "k", "v", "ttl=1", "ttl=2"], "ttl= is given twice"),
    (["put", "-", "-"], "- (standard input) can be used once"),
    (["put", "k", '"a'], "the closing quote is missing (at character 1)"),
    (["put", "k", '"a\\q"'], "unknown escape \\q"),
    (["put", "k", "b64:?"], "what follows b64: is not standard base64"),
    (["put", "k", "@/does/not/exist"], "/does/not/exist: No such file or directory"),
    (["put", '""', "v"], "a key must not be empty"),
    (["incr", "k", "1.5"], "N must be an integer from"),
    (["incr", "k", "9223372036854775808"], "N must be an integer from"),
    (["expire", "k", "soon"], "S must be a number of seconds"),
    (["expire", "k", "0"], "S must be over 0 and at most 3153600000 seconds, not 0\n"),
    (["expire", "k", "-1"], "S must be over 0 and at most 3153600000 seconds, not -1\n"),
    (["scan", "limit=0"], "limit must be an integer from 1"),
    (["scan", "limt=5"], "what does 'limt=5' mean here?"),
    (["scan", "--limit=5"], "what does '--limit=5' mean here?"),
    (["scan", "a", "b"], "what does 'b' mean here?"),
    (["delete-prefix", ""], "an empty prefix is every key of the cluster"),
    (["delete-prefix", '""', "yes"], "an empty prefix is every key of the cluster"),
    (["delete-prefix", "user:"], "no question can be asked here"),
    (["gett", "k"], "there is no command 'gett'; did you mean get?"),
    (["frobnicate"], "there is no command 'frobnicate'; `help` lists the commands"),
    (["get", "k", "-o"], "-o needs one of"),
    (["get", "k", "-o", "xml"], "-o needs one of table, plain, json, jsonl, raw, not 'xml'"),
]


@pytest.mark.parametrize(("arguments", "text"), USAGE_ERRORS, ids=[" ".join(row[0]) for row in USAGE_ERRORS])
def test_usage_errors(shell: Shell, arguments: list[str], text: str) -> None:
    """A wrong call ends with 2, says what was expected, prints nothing on stdout and changes nothing."""
    before = dict(shell.client.cells)
    assert shell.run(*arguments) == 2
    assert shell.err.startswith("kvtcp-shell: ") and text in shell.err
    assert shell.out == b"" and shell.client.cells == before


@pytest.mark.parametrize(("error", "code"), [
    (Unavailable("no connection within 2 s, nothing was sent", Code.OVERLOADED), 3),
    (Unavailable("shard 3 recovers", Code.RECOVERING), 3),
    (Unavailable("shard 3 has 1 of 2 replicas", Code.NOT_ENOUGH_REPLICAS), 6),
    (Unavailable("node n1 has no space", Code.NO_SPACE), 6),
    (OutcomeUnknown("the connection was lost after the put was sent"), 5),
    (RequestError("the value has 9 bytes, the limit is 8", Code.TOO_LARGE), 6),
    (RequestError("wrong number of arguments", Code.BAD_REQUEST), 2),
    (ConnectionResetError("connection reset"), 3),
    (TimeoutError("timed out"), 3),
])  # fmt: skip
def test_exit_codes_of_errors(shell: Shell, error: Exception, code: int) -> None:
    """What went wrong in the cluster decides the exit code, and its sentence goes to stderr."""
    shell.client.failure = error
    assert shell.run("put", "k", "v") == code
    assert (shell.out, shell.err) == (b"", f"kvtcp-shell: {error}\n")


def test_too_large_value_is_refused(shell: Shell, tmp_path: Path) -> None:
    """A file over the limit of values is refused with 6 and the limit."""
    file = tmp_path / "big"
    with file.open("wb") as stream:
        stream.truncate(9 * 1024 * 1024)
    assert shell.run("put", "k", f"@{file}") == 6
    assert "the limit is 8388608" in shell.err


def test_delete_prefix_stops_at_max_when_keys_came_meanwhile(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys written between the count and the deletion cannot make it delete more than max."""

    async def count(**_: object) -> int:
        return 2

    monkeypatch.setattr(shell.client, "count", count)
    assert shell.run("delete-prefix", "user:", "max=2", "yes") == 6
    assert "0 keys were deleted before the error" in shell.err
    assert len(shell.client.cells) == 5


def test_wrong_call_needs_no_server() -> None:
    """Words are checked before a connection is made."""
    shell = Shell(FakeClient())
    assert shell.run("put", "k") == 2
    assert shell.client.opened == []
    shell.run("get", "k")
    assert shell.client.opened == [("kvtcp://127.0.0.1:8000", 2.0)] and shell.client.closed == 1
