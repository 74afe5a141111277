"""Commands on the connection and the server: HELLO, PING, CLIENT, COMMAND, CONFIG, INFO and others.

Pure. They are answered at once, without the cluster, but for INFO, which counts the keys. What they tell of the server
comes from the door's host. Texts are Redis's where a client may look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvtcp._version import __version__
from kvtcp.constants import NAME_BYTES_MAX
from kvtcp.resp.patterns import matcher
from kvtcp.resp.plan import SYNTAX, CommandError, Failed, integer
from kvtcp.resp.replies import DONE, OK, Simple
from kvtcp.resp.scanning import count_keys

if TYPE_CHECKING:
    from kvtcp.resp.client import RespClient

Arguments = Sequence[bytes]

REDIS_VERSION: Final = "7.0.0"  # whose commands these are: clients decide by it what they may use
NO_PASSWORD: Final = (
    "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration "
    "is correct?"
)
WORDS_MAX: Final = 1_000  # arguments that are looked up
# what clients and tools ask for, as it is here
SETTINGS: Final = {"appendonly": "no", "databases": "1", "maxmemory": "0", "proto-max-bulk-len": "8388608", "save": ""}


def _text(argument: bytes) -> str:
    return argument.decode("utf-8", "replace")


def _arity(arguments: Arguments, low: int, high: int, what: str) -> None:
    if not low <= len(arguments) <= high:
        raise CommandError(f"ERR wrong number of arguments for '{what}' command")


def ping(client: RespClient, arguments: Arguments) -> None:
    """PING [message]"""
    _arity(arguments, 0, 1, "ping")
    client.answer(arguments[0] if arguments else Simple("PONG"))


def echo(client: RespClient, arguments: Arguments) -> None:
    """ECHO message"""
    client.answer(arguments[0])


def hello(client: RespClient, arguments: Arguments) -> None:
    """HELLO [2 | 3 [AUTH user password] [SETNAME name]]"""
    version, name = client.version, None
    if arguments:
        version = integer(arguments[0], "ERR Protocol version is not an integer or out of range")
        if version not in (2, 3):
            raise CommandError("NOPROTO unsupported protocol version")
        options = iter(arguments[1:])
        for option in options:
            if option.upper() == b"AUTH":
                next(options, None)
                if next(options, None) is None:
                    raise CommandError(f"ERR Syntax error in HELLO option '{_text(option)}'")
                raise CommandError(NO_PASSWORD)
            value = next(options, None)
            if option.upper() != b"SETNAME" or value is None:
                raise CommandError(f"ERR Syntax error in HELLO option '{_text(option)}'")
            name = _checked_name(value)
    if name is not None:
        client.name = name
    answer = client.later()

    def greet() -> None:
        client.set_version(version)
        answer({
            "server": "kvtcp", "version": __version__, "proto": version, "id": client.ident, "mode": "standalone",
            "role": "master", "modules": [],
        })  # fmt: skip

    _with_version(client, version, greet)


def select(client: RespClient, arguments: Arguments) -> None:
    """SELECT 0"""
    if integer(arguments[0]) != 0:
        raise CommandError("ERR DB index is out of range")
    client.answer(DONE)


def auth(client: RespClient, arguments: Arguments) -> None:
    """AUTH [user] password"""
    raise CommandError(NO_PASSWORD if len(arguments) < 3 else SYNTAX)


def time(client: RespClient, arguments: Arguments) -> None:
    """TIME"""
    s, us = divmod(client.door.wall_us(), 1_000_000)
    client.answer([b"%d" % s, b"%d" % us])


def quit_(client: RespClient, arguments: Arguments) -> None:
    """QUIT"""
    client.fill(client.current, OK)
    client.closing = True


def reset(client: RespClient, arguments: Arguments) -> None:
    """RESET"""
    client.transaction = None
    client.unwatch()
    client.name = ""
    answer = client.later()

    def done() -> None:
        client.set_version(2)
        answer(Simple("RESET"))

    _with_version(client, 2, done)


def _with_version(client: RespClient, version: int, step: Callable[[], None]) -> None:
    """Carry out a step that changes the version: replies of earlier commands are made before."""
    if version == client.version or client.transaction is not None or len(client.slots) < 2:
        step()
    else:
        client.when_first(step)


# --- CLIENT -------------------------------------------------------------------------------------------


def _checked_name(name: bytes) -> str:
    if len(name) > NAME_BYTES_MAX:
        raise CommandError(f"ERR a name is over the limit of {NAME_BYTES_MAX} bytes")
    if any(not 0x21 <= byte <= 0x7E for byte in name):
        raise CommandError("ERR Client names cannot contain spaces, newlines or special characters.")
    return name.decode("ascii")


def client(client: RespClient, arguments: Arguments) -> None:
    """CLIENT ID | GETNAME | SETNAME name | SETINFO LIB-NAME|LIB-VER text | INFO | LIST"""
    name, rest = arguments[0].upper(), arguments[1:]
    if name in (b"ID", b"GETNAME", b"INFO"):
        _arity(rest, 0, 0, f"client|{name.decode().lower()}")
    if name == b"ID":
        client.answer(client.ident)
    elif name == b"GETNAME":
        client.answer(client.name.encode() if client.name else None)
    elif name == b"SETNAME":
        _arity(rest, 1, 1, "client|setname")
        client.name = _checked_name(rest[0])
        client.answer(DONE)
    elif name == b"SETINFO":
        _arity(rest, 2, 2, "client|setinfo")
        kind, text = rest[0].upper(), _checked_name(rest[1])
        if kind not in (b"LIB-NAME", b"LIB-VER"):
            raise CommandError(f"ERR Unrecognized option '{_text(rest[0])}'")
        library, version = client.library
        client.library = (text, version) if kind == b"LIB-NAME" else (library, text)
        client.answer(DONE)
    elif name == b"INFO":
        client.answer(_line(client))
    elif name == b"LIST":
        client.answer("".join(map(_line, client.door.host.resp_clients())))
    else:
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try CLIENT HELP.")


def _line(client: RespClient) -> str:
    age_s = (client.door.now_ms() - client.began_ms) // 1000
    queued = -1 if client.transaction is None else len(client.transaction.queued)
    return (
        f"id={client.ident} addr={client.peer} name={client.name} age={age_s} db=0 multi={queued} "
        f"watch={len(client.watched)} cmd={client.last_command} resp={client.version} "
        f"lib-name={client.library[0]} lib-ver={client.library[1]}\n"
    )


# --- COMMAND, CONFIG, INFO ----------------------------------------------------------------------------


def command(client: RespClient, arguments: Arguments) -> None:
    """COMMAND [COUNT | INFO name ... | DOCS name ...]"""
    from kvtcp.resp.commands import COMMANDS

    kind = arguments[0].upper() if arguments else b""
    _arity(arguments, 0, WORDS_MAX, "command")
    if kind == b"COUNT":
        client.answer(len(COMMANDS))
    elif kind in (b"", b"INFO"):
        names = [name.upper() for name in arguments[1:]] or list(COMMANDS)
        client.answer([COMMANDS[name].as_reply() if name in COMMANDS else None for name in names])
    elif kind == b"DOCS":
        names = [name.upper() for name in arguments[1:]] or list(COMMANDS)
        specs = [COMMANDS[name] for name in names if name in COMMANDS]
        client.answer({spec.name: {"summary": spec.summary, "group": spec.group} for spec in specs})
    else:
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try COMMAND HELP.")


def config(client: RespClient, arguments: Arguments) -> None:
    """CONFIG GET pattern ..."""
    if arguments[0].upper() != b"GET":
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try CONFIG HELP.")
    _arity(arguments, 2, WORDS_MAX, "config|get")
    matches = [matcher(pattern.lower()) for pattern in arguments[1:]]
    client.answer({name: value for name, value in SETTINGS.items() if any(m(name.encode()) for m in matches)})


def function(client: RespClient, arguments: Arguments) -> None:
    """FUNCTION FLUSH: there are none, so none is left"""
    if arguments[0].upper() != b"FLUSH":
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try FUNCTION HELP.")
    client.answer(DONE)


def info(client: RespClient, arguments: Arguments) -> None:
    """INFO [section ...]"""
    wanted = {_text(argument).lower() for argument in arguments} - {"all", "default", "everything"}
    answer = client.later()
    sections = client.door.host.facts()
    sections["Server"] = {"redis_version": REDIS_VERSION, "kvtcp_version": __version__, **sections["Server"]}

    def then(keys: Any) -> None:
        known = type(keys) is not Failed
        sections["Keyspace"] = {"db0": f"keys={keys},expires=0,avg_ttl=0"} if known and keys else {}
        parts = []
        for name, facts in sections.items():
            if not wanted or name.lower() in wanted:
                lines = [f"# {name}", *(f"{fact}:{value}" for fact, value in facts.items())]
                parts.append("".join(line + "\r\n" for line in lines))
        answer("\r\n".join(parts))

    count_keys(client, (b"", None), then)


def status(client: RespClient, arguments: Arguments) -> None:
    """KV.STATUS"""
    client.answer(client.door.host.status())
