"""Commands on the connection and the server, in both versions of the protocol."""

from __future__ import annotations

import pytest

from kvtcp import __version__
from kvtcp.constants import NAME_BYTES_MAX
from kvtcp.errors import Code
from kvtcp.frontend.resp.commands.server import REDIS_VERSION, WORDS_MAX
from kvtcp.frontend.resp.commands.table import COMMANDS
from tests.support.resp_tools import Client, Error, Status, World, one, parse


def flat(pairs: dict[bytes, object]) -> list[object]:
    """A map as RESP2 has it."""
    return [item for pair in pairs.items() for item in pair]


def test_ping_and_echo(client: Client) -> None:
    """With a message they answer that."""
    assert type(client.ask("ping")) is Status and client.ask("ping") == "PONG"
    assert client.ask([b"PING", b"a\r\n"]) == b"a\r\n" and client.ask("echo x") == b"x"
    assert client.ask("ping a b") == "ERR wrong number of arguments for 'ping' command"


def test_hello(client: Client) -> None:
    """HELLO tells of the server as a map, which RESP2 has not; the version holds from this reply on."""
    facts: dict[bytes, object] = {
        b"server": b"kvtcp", b"version": __version__.encode(), b"proto": 2, b"id": 1, b"mode": b"standalone",
        b"role": b"master", b"modules": [],
    }  # fmt: skip
    assert client.ask("hello") == flat(facts) == client.ask("hello 2")
    client.send("hello 3 setname me", "get a", "client getname", "multi", "exec", "hello")
    client.sequencer.take().answer(None)
    out = client.output()
    facts[b"proto"] = 3
    assert parse(out) == [facts, None, b"me", "OK", [], facts]
    assert out.startswith(b"%7\r\n") and b"\r\n_\r\n" in out
    client.send("hello 2", "get a")
    client.sequencer.take().answer(None)
    facts[b"proto"] = 2
    out = client.output()
    assert parse(out) == [flat(facts), None] and out.endswith(b"$-1\r\n")


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("hello x", "ERR Protocol version is not an integer or out of range"),
        ("hello 4", "NOPROTO unsupported protocol version"),
        ("hello 3 nosuch", "ERR Syntax error in HELLO option 'nosuch'"),
        ("hello 3 setname", "ERR Syntax error in HELLO option 'setname'"),
        ("hello 3 auth me", "ERR Syntax error in HELLO option 'auth'"),
        ("hello 3 auth me secret", "ERR AUTH <password> called without any password configured for the default user"),
        ("hello 3 setname \xff", "ERR Client names cannot contain spaces, newlines or special characters."),
        ("select 1", "ERR DB index is out of range"), ("select x", "ERR value is not an integer or out of range"),
        ("auth secret", "ERR AUTH <password> called without any password configured for the default user"),
        ("auth me secret", "ERR AUTH <password> called without any password configured for the default user"),
        ("auth a b c", "ERR syntax error"), ("client nosuch", "ERR unknown subcommand 'nosuch'. Try CLIENT HELP."),
        ("client id x", "ERR wrong number of arguments for 'client|id' command"),
        ("client setname", "ERR wrong number of arguments for 'client|setname' command"),
        ("client setinfo lib-name", "ERR wrong number of arguments for 'client|setinfo' command"),
        ("client setinfo nosuch x", "ERR Unrecognized option 'nosuch'"),
        (f"client setname {'x' * (NAME_BYTES_MAX + 1)}", f"ERR a name is over the limit of {NAME_BYTES_MAX} bytes"),
        ("command nosuch", "ERR unknown subcommand 'nosuch'. Try COMMAND HELP."),
        ("config nosuch", "ERR unknown subcommand 'nosuch'. Try CONFIG HELP."),
        ("config get", "ERR wrong number of arguments for 'config|get' command"),
        ("function list", "ERR unknown subcommand 'list'. Try FUNCTION HELP."),
    ],
)  # fmt: skip
def test_what_is_refused(command: str, reply: str, client: Client) -> None:
    """The text is Redis's, and nothing was changed."""
    found = client.ask(command)
    assert type(found) is Error and found.startswith(reply)
    assert client.resp.state.version == 2 and client.resp.state.name == ""


def test_too_many_words(client: Client) -> None:
    """What is looked up word by word takes a bounded number of them."""
    for command in ([b"COMMAND", b"INFO"], [b"COMMAND", b"DOCS"], [b"CONFIG", b"GET"]):
        assert type(client.ask([*command, *[b"get"] * WORDS_MAX])) is Error


def test_names_and_the_list() -> None:
    """CLIENT LIST has a line for everybody, with what they say of themselves and what they do."""
    world = World()
    first, second = world.connect(), world.connect()
    assert first.ask("client id") == 1 and second.ask("client id") == 2
    assert first.ask("client getname") is None
    assert first.ask("client setname me") == "OK" and first.ask("client getname") == b"me"
    assert first.ask("client setinfo LIB-NAME lib") == "OK" and first.ask("client setinfo lib-ver 1.2") == "OK"
    second.send("watch a")
    second.sequencer.take().answer(1)
    second.send("hello 3", "multi", "ping")
    second.output()
    world.now_ms += 5_999
    one_line, two_line = first.ask("client list").decode().splitlines()
    assert one_line == (
        "id=1 addr=127.0.0.1:9 name=me age=5 db=0 multi=-1 watch=0 cmd=client resp=2 lib-name=lib lib-ver=1.2"
    )
    assert two_line.startswith("id=2 ") and " multi=1 watch=1 cmd=ping resp=3 " in two_line
    assert first.ask("client info").decode() == one_line + "\n"
    assert first.ask("client setname") and first.ask([b"CLIENT", b"SETNAME", b""]) == "OK"
    assert first.ask("client getname") is None


def test_reset(client: Client) -> None:
    """The connection is as new."""
    client.send("hello 3 setname me", "multi", "reset")
    client.output()
    assert client.ask("client getname") is None
    assert client.resp.state.version == 2 and client.resp.state.transaction is None


def test_time_and_function(client: Client) -> None:
    """Seconds and microseconds; there are no functions."""
    assert client.ask("time") == [b"1700000000", b"123456"] and client.ask("function flush") == "OK"
    assert client.ask("select 0") == "OK"


def test_command(client: Client) -> None:
    """All commands, some, and those that are none."""
    assert client.ask("command count") == len(COMMANDS) == len(client.ask("command"))
    assert client.ask("command info get nosuch") == [[b"get", 2, [b"readonly"], 1, 1, 1, [], [], [], []], None]
    assert client.ask("command docs get nosuch") == [
        b"get", [b"summary", b"Returns the value of a key.", b"group", b"string"],
    ]  # fmt: skip
    client.send("hello 3")
    client.output()
    docs = client.ask("command docs")
    assert set(docs) == {name.lower() for name in COMMANDS} and docs[b"set"][b"group"] == b"string"


def test_config(client: Client) -> None:
    """A few settings, by pattern."""
    assert client.ask("config get SAVE") == [b"save", b""]
    assert client.ask("config get max* app*") == [b"appendonly", b"no", b"maxmemory", b"0"]
    assert client.ask("config get nosuch") == []
    client.send("hello 3")
    client.output()
    assert client.ask("config get databases") == {b"databases": b"1"}


def info(client: Client, *sections: str) -> str:
    """The text of INFO."""
    text = client.ask_range(" ".join(["info", *sections]))
    assert isinstance(text, bytes)
    return text.decode()


def test_info() -> None:
    """Sections as Redis writes them, with the number of keys; some of them on demand."""
    client = World([b"a", b"b"]).connect()
    everything = info(client)
    assert everything.startswith("# Server\r\nredis_version:" + REDIS_VERSION + "\r\n")
    assert everything.endswith("\r\n\r\n# Keyspace\r\ndb0:keys=2,expires=0,avg_ttl=0\r\n")
    assert everything == info(client, "all") == info(client, "DEFAULT")
    assert info(client, "clients") == "# Clients\r\nconnected_clients:1\r\n"
    assert info(client, "Keyspace", "clients").count("#") == 2 and info(client, "nosuch") == ""
    assert "# Keyspace\r\n" in info(World().connect()) and "db0" not in info(World().connect())


def test_info_of_a_cluster_that_is_down(client: Client) -> None:
    """Facts are told without the number of keys."""
    client.sequencer.refuses = (int(Code.SHARD_DOWN), "it is down")
    client.send("info")
    assert b"# Keyspace\r\n" in one(client.output())


def test_status(client: Client) -> None:
    """The map of `status`, whatever kinds of values it has."""
    assert client.ask("kv.status") == [b"state", b"ok", b"nodes", [1, b"2.5", None, 1]]
    client.send("hello 3")
    client.output()
    assert client.ask("kv.status") == {b"state": b"ok", b"nodes": [1, 2.5, None, True]}
