"""The commands of the RESP face: their names, arguments and functions.

Pure. A command on keys has `compile`, which makes a plan (plan.py). All others have `run`, which gets the client and
answers it: at once, or when the cluster has answered. A command with `run` is not part of a transaction unless it is
local, that is, concerns nothing but the connection.
"""

from __future__ import annotations

from typing import Final

from kvtcp.frontend.resp.caller import CommandSpec, Compile, Run
from kvtcp.frontend.resp.commands import keys, ranges, server, strings, transactions
from kvtcp.protocol import operations as op


def _reads(name: str, arity: int, group: str, summary: str, compile_: Compile, last: int = 1) -> CommandSpec:
    return CommandSpec(name, arity, group, summary, compile_, first_key=1, last_key=last, key_step=1)


def _writes(
    name: str, arity: int, group: str, summary: str, compile_: Compile, last: int = 1, step: int = 1
) -> CommandSpec:
    return CommandSpec(name, arity, group, summary, compile_, is_write=True, first_key=1, last_key=last, key_step=step)


def _runs(name: str, arity: int, group: str, summary: str, run: Run) -> CommandSpec:
    return CommandSpec(name, arity, group, summary, run=run)


def _local(name: str, arity: int, summary: str, run: Run) -> CommandSpec:
    return CommandSpec(name, arity, "connection", summary, run=run, is_local=True)


_STRINGS: Final = (
    _reads("get", 2, "string", "Returns the value of a key.", strings.get),
    _writes("set", -3, "string", "Sets the value of a key, if a condition holds.", strings.set_),
    _writes("setnx", 3, "string", "Sets the value of a key that is absent.", strings.set_if_absent),
    _writes("setex", 4, "string", "Sets value and time to live in s.", strings.set_with_time(b"EX", "setex")),
    _writes("psetex", 4, "string", "Sets value and time to live in ms.", strings.set_with_time(b"PX", "psetex")),
    _writes("getset", 3, "string", "Sets a value and returns the old one.", strings.get_set),
    _writes("getdel", 2, "string", "Deletes a key and returns its value.", strings.get_delete),
    _writes("getex", -2, "string", "Returns a value and changes its deadline.", strings.get_touch),
    _reads("mget", -2, "string", "Returns many values, of one point in time.", strings.get_many, -1),
    _writes("mset", -3, "string", "Sets many values.", strings.set_many, -1, 2),
    _writes("msetnx", -3, "string", "Sets many values if no key is there.", strings.set_many_if_absent, -1, 2),
    _writes("append", 3, "string", "Appends to a value.", strings.append),
    _reads("strlen", 2, "string", "Returns the length of a value.", strings.length),
    _reads("getrange", 4, "string", "Returns a part of a value.", strings.get_range),
    _reads("substr", 4, "string", "Returns a part of a value.", strings.get_range),
    _writes("setrange", 4, "string", "Overwrites a part of a value.", strings.set_range),
    _writes("setbit", 4, "bitmap", "Sets a bit of a value and returns the old one.", strings.set_bit),
    _reads("getbit", 3, "bitmap", "Returns a bit of a value.", strings.get_bit),
    _writes("incr", 2, "string", "Adds 1 to an integer.", strings.incr(1)),
    _writes("decr", 2, "string", "Subtracts 1 from an integer.", strings.incr(-1)),
    _writes("incrby", 3, "string", "Adds to an integer.", strings.incr_by(1)),
    _writes("decrby", 3, "string", "Subtracts from an integer.", strings.incr_by(-1)),
    _writes("incrbyfloat", 3, "string", "Adds to a decimal number.", strings.incr_by_float),
    _writes("delifeq", 3, "string", "Deletes a key if it has this value.", strings.delete_if_equal),
    _writes("kv.cas", -4, "kvtcp", "Sets a value if value or revision are as given.", strings.compare_and_set),
)
_KEYS: Final = (
    _writes("del", -2, "generic", "Deletes keys.", keys.of_each(op.DELETE), -1),
    _writes("unlink", -2, "generic", "Deletes keys.", keys.of_each(op.DELETE), -1),
    _reads("exists", -2, "generic", "Counts which of the keys are there.", keys.of_each(op.EXISTS), -1),
    _reads("touch", -2, "generic", "Counts which of the keys are there.", keys.of_each(op.EXISTS), -1),
    _reads("type", 2, "generic", "Returns string or none.", keys.type_),
    _writes("expire", -3, "generic", "Sets a time to live in s.", keys.expire(1000, op.IN_MS, "expire")),
    _writes("pexpire", -3, "generic", "Sets a time to live in ms.", keys.expire(1, op.IN_MS, "pexpire")),
    _writes("expireat", -3, "generic", "Sets a deadline in Unix s.", keys.expire(1000, op.AT_MS, "expireat")),
    _writes("pexpireat", -3, "generic", "Sets a deadline in Unix ms.", keys.expire(1, op.AT_MS, "pexpireat")),
    _reads("ttl", 2, "generic", "Returns the time to live in s.", keys.time_left(1000, op.TTL)),
    _reads("pttl", 2, "generic", "Returns the time to live in ms.", keys.time_left(1, op.TTL)),
    _reads("expiretime", 2, "generic", "Returns the deadline in Unix s.", keys.time_left(1000, op.DEADLINE_OF)),
    _reads("pexpiretime", 2, "generic", "Returns the deadline in Unix ms.", keys.time_left(1, op.DEADLINE_OF)),
    _writes("persist", 2, "generic", "Removes a deadline.", keys.persist),
    _writes("rename", 3, "generic", "Renames a key within its shard.", keys.rename(False), 2),
    _writes("renamenx", 3, "generic", "Renames a key if the new name is free.", keys.rename(True), 2),
    _writes("copy", -3, "generic", "Copies a key within its shard.", keys.copy, 2),
)
_RANGES: Final = (
    _runs("keys", 2, "generic", "Returns all keys that match, in order.", ranges.keys),
    _runs("scan", -2, "generic", "Returns the keys in order, some at a time.", ranges.scan),
    _runs("randomkey", 1, "generic", "Returns one of all keys.", ranges.random_key),
    _runs("dbsize", 1, "server", "Returns the number of keys.", ranges.db_size),
    _runs("flushdb", -1, "server", "Deletes all keys.", ranges.flush),
    _runs("flushall", -1, "server", "Deletes all keys.", ranges.flush),
    _runs("kv.range", -3, "kvtcp", "Returns keys and values of a range, in order.", ranges.range_),
    _runs("kv.count", 3, "kvtcp", "Counts the keys of a range.", ranges.count),
)
_SERVER: Final = (
    _runs("info", -1, "server", "Returns facts about the server.", server.info),
    _runs("kv.status", 1, "kvtcp", "Returns the state of the cluster.", server.status),
)
_CONNECTION: Final = (
    _local("ping", -1, "Answers PONG, or its argument.", server.ping),
    _local("echo", 2, "Answers its argument.", server.echo),
    _local("hello", -1, "Chooses the version of the protocol.", server.hello),
    _local("select", 2, "Chooses database 0, the only one.", server.select),
    _local("auth", -2, "There is no password.", server.auth),
    _local("client", -2, "Names and lists connections.", server.client),
    _local("command", -1, "Describes the commands.", server.command),
    _local("config", -2, "Tells a few settings.", server.config),
    _local("function", -2, "FLUSH, as there are no functions.", server.function),
    _local("time", 1, "Returns s and us since 1970.", server.time),
    _local("quit", -1, "Closes the connection.", server.quit_),
    _local("reset", 1, "Makes the connection as new.", server.reset),
    _local("multi", 1, "Begins a transaction.", transactions.multi),
    _local("exec", 1, "Executes a transaction.", transactions.exec_),
    _local("discard", 1, "Drops a transaction.", transactions.discard),
    _local("watch", -2, "Makes EXEC depend on keys not being changed.", transactions.watch),
    _local("unwatch", 1, "Forgets the watched keys.", transactions.unwatch),
)

COMMANDS: Final[dict[bytes, CommandSpec]] = {
    spec.name.upper().encode(): spec for spec in (*_STRINGS, *_KEYS, *_RANGES, *_SERVER, *_CONNECTION)
}
# carried out at once even between MULTI and EXEC
IMMEDIATE: Final = frozenset({"multi", "exec", "discard", "watch", "quit", "reset"})
