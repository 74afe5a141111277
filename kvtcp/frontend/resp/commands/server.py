"""Commands on the connection and the server: HELLO, PING, CLIENT, COMMAND, CONFIG, INFO and others.

Pure. They are answered at once, without the cluster, but for INFO, which counts the keys. Facts about the server come
from the host of the service. Texts are those of Redis where a client may depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvtcp._version import __version__
from kvtcp.constants import NAME_BYTES_MAX
from kvtcp.frontend.resp.caller import Caller
from kvtcp.frontend.resp.client_state import ClientState
from kvtcp.frontend.resp.commands.ranges import count_keys
from kvtcp.frontend.resp.patterns import matcher
from kvtcp.frontend.resp.plan import SYNTAX, Arguments, CommandError, Failed, integer
from kvtcp.frontend.resp.replies import DONE, Simple

REDIS_VERSION: Final = "7.0.0"  # of these commands: clients decide by it which ones they may use
NO_PASSWORD: Final = (
    "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration "
    "is correct?"
)
WORDS_MAX: Final = 1_000  # arguments that are looked up
# settings that clients and tools ask for, with their values here
SETTINGS: Final = {"appendonly": "no", "databases": "1", "maxmemory": "0", "proto-max-bulk-len": "8388608", "save": ""}


def _text(argument: bytes) -> str:
    return argument.decode("utf-8", "replace")


def _arity(arguments: Arguments, low: int, high: int, what: str) -> None:
    if not low <= len(arguments) <= high:
        raise CommandError(f"ERR wrong number of arguments for '{what}' command")


def ping(caller: Caller, arguments: Arguments) -> None:
    """PING [message]"""
    _arity(arguments, 0, 1, "ping")
    caller.answer(arguments[0] if arguments else Simple("PONG"))


def echo(caller: Caller, arguments: Arguments) -> None:
    """ECHO message"""
    caller.answer(arguments[0])


def hello(caller: Caller, arguments: Arguments) -> None:
    """HELLO [2 | 3 [AUTH user password] [SETNAME name]]"""
    version, name = caller.state.version, None
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
        caller.state.name = name
    answer = caller.later()

    def greet() -> None:
        caller.set_version(version)
        answer({
            "server": "kvtcp", "version": __version__, "proto": version, "id": caller.state.ident, "mode": "standalone",
            "role": "master", "modules": [],
        })  # fmt: skip

    _with_version(caller, version, greet)


def select(caller: Caller, arguments: Arguments) -> None:
    """SELECT 0"""
    if integer(arguments[0]) != 0:
        raise CommandError("ERR DB index is out of range")
    caller.answer(DONE)


def auth(caller: Caller, arguments: Arguments) -> None:
    """AUTH [user] password"""
    raise CommandError(NO_PASSWORD if len(arguments) < 3 else SYNTAX)


def time(caller: Caller, arguments: Arguments) -> None:
    """TIME"""
    s, us = divmod(caller.service.wall_us(), 1_000_000)
    caller.answer([b"%d" % s, b"%d" % us])


def quit_(caller: Caller, arguments: Arguments) -> None:
    """QUIT"""
    caller.answer(DONE)
    caller.closing = True


def reset(caller: Caller, arguments: Arguments) -> None:
    """RESET"""
    state = caller.state
    state.transaction = None
    state.unwatch()
    state.name = ""
    answer = caller.later()

    def done() -> None:
        caller.set_version(2)
        answer(Simple("RESET"))

    _with_version(caller, 2, done)


def _with_version(caller: Caller, version: int, step: Callable[[], None]) -> None:
    """Carry out a step that changes the version, after the replies of earlier commands are made."""
    if version == caller.state.version or caller.state.transaction is not None or caller.is_first:
        step()
    else:
        caller.when_first(step)


# --- CLIENT -------------------------------------------------------------------------------------------


def _checked_name(name: bytes) -> str:
    if len(name) > NAME_BYTES_MAX:
        raise CommandError(f"ERR a name is over the limit of {NAME_BYTES_MAX} bytes")
    if any(not 0x21 <= byte <= 0x7E for byte in name):
        raise CommandError("ERR Client names cannot contain spaces, newlines or special characters.")
    return name.decode("ascii")


def client(caller: Caller, arguments: Arguments) -> None:
    """CLIENT ID | GETNAME | SETNAME name | SETINFO LIB-NAME|LIB-VER text | INFO | LIST"""
    state = caller.state
    name, rest = arguments[0].upper(), arguments[1:]
    if name in (b"ID", b"GETNAME", b"INFO"):
        _arity(rest, 0, 0, f"client|{name.decode().lower()}")
    if name == b"ID":
        caller.answer(state.ident)
    elif name == b"GETNAME":
        caller.answer(state.name.encode() if state.name else None)
    elif name == b"SETNAME":
        _arity(rest, 1, 1, "client|setname")
        state.name = _checked_name(rest[0])
        caller.answer(DONE)
    elif name == b"SETINFO":
        _arity(rest, 2, 2, "client|setinfo")
        kind, text = rest[0].upper(), _checked_name(rest[1])
        if kind not in (b"LIB-NAME", b"LIB-VER"):
            raise CommandError(f"ERR Unrecognized option '{_text(rest[0])}'")
        library, version = state.library
        state.library = (text, version) if kind == b"LIB-NAME" else (library, text)
        caller.answer(DONE)
    elif name == b"INFO":
        caller.answer(_line(state, caller.service.now_ms()))
    elif name == b"LIST":
        now_ms = caller.service.now_ms()
        caller.answer("".join(_line(each, now_ms) for each in caller.service.host.resp_clients()))
    else:
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try CLIENT HELP.")


def _line(state: ClientState, now_ms: int) -> str:
    age_s = (now_ms - state.began_ms) // 1000
    queued = -1 if state.transaction is None else len(state.transaction.queued)
    return (
        f"id={state.ident} addr={state.peer} name={state.name} age={age_s} db=0 multi={queued} "
        f"watch={len(state.watched)} cmd={state.last_command} resp={state.version} "
        f"lib-name={state.library[0]} lib-ver={state.library[1]}\n"
    )


# --- COMMAND, CONFIG, INFO ----------------------------------------------------------------------------


def command(caller: Caller, arguments: Arguments) -> None:
    """COMMAND [COUNT | INFO name ... | DOCS name ...]"""
    table = caller.table
    kind = arguments[0].upper() if arguments else b""
    _arity(arguments, 0, WORDS_MAX, "command")
    if kind == b"COUNT":
        caller.answer(len(table))
    elif kind in (b"", b"INFO"):
        names = [name.upper() for name in arguments[1:]] or list(table)
        caller.answer([table[name].as_reply() if name in table else None for name in names])
    elif kind == b"DOCS":
        names = [name.upper() for name in arguments[1:]] or list(table)
        specs = [table[name] for name in names if name in table]
        caller.answer({spec.name: {"summary": spec.summary, "group": spec.group} for spec in specs})
    else:
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try COMMAND HELP.")


def config(caller: Caller, arguments: Arguments) -> None:
    """CONFIG GET pattern ..."""
    if arguments[0].upper() != b"GET":
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try CONFIG HELP.")
    _arity(arguments, 2, WORDS_MAX, "config|get")
    matches = [matcher(pattern.lower()) for pattern in arguments[1:]]
    caller.answer({name: value for name, value in SETTINGS.items() if any(m(name.encode()) for m in matches)})


def function(caller: Caller, arguments: Arguments) -> None:
    """FUNCTION FLUSH: there are none, so none is left"""
    if arguments[0].upper() != b"FLUSH":
        raise CommandError(f"ERR unknown subcommand '{_text(arguments[0])}'. Try FUNCTION HELP.")
    caller.answer(DONE)


def info(caller: Caller, arguments: Arguments) -> None:
    """INFO [section ...]"""
    wanted = {_text(argument).lower() for argument in arguments} - {"all", "default", "everything"}
    answer = caller.later()
    sections = caller.service.host.facts()
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

    count_keys(caller, (b"", None), then)


def status(caller: Caller, arguments: Arguments) -> None:
    """KV.STATUS"""
    caller.answer(caller.service.host.status())
