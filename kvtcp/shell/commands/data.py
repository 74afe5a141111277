"""Commands on keys: put, get, scan and their kin.

Every handler reads its words first and opens the client after, so a wrong call never reaches a server. A key that is
not there is an answer, not an error: nothing on stdout for `get` and `ttl`, `0` for the others, exit code 1.
"""

from __future__ import annotations

import math
from typing import Final

from kvtcp.constants import INTEGER_MAX, INTEGER_MIN
from kvtcp.errors import show_bytes
from kvtcp.shell.command import Arguments, Command
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, ShellRefused, UsageError
from kvtcp.shell.output import Output, in_pages
from kvtcp.shell.text import number


def _answer(output: Output, key: bytes, name: str, done: bool) -> Exit:
    output.scalar("1" if done else "0", {"key": key, name: done})
    return Exit.OK if done else Exit.NOT_FOUND


def _stored(output: Output, key: bytes, rev: int) -> Exit:
    output.scalar(f"OK {rev}", {"key": key, "rev": rev})
    return Exit.OK


async def _put(context: Context, arguments: Arguments, output: Output) -> Exit:
    key, value = context.content(arguments.words["K"]), context.content(arguments.words["V"])
    ttl = arguments.ttl()
    return _stored(output, key, await (await context.writer()).put(key, value, ttl=ttl))


async def _add(context: Context, arguments: Arguments, output: Output) -> Exit:
    key, value = context.content(arguments.words["K"]), context.content(arguments.words["V"])
    ttl = arguments.ttl()
    return _stored(output, key, await (await context.writer()).add(key, value, ttl=ttl))


async def _get(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    entry = await (await context.client()).get_entry(key)
    if entry is None:
        return _no_such_key(context, key)
    output.entry(entry)
    return Exit.OK


def _no_such_key(context: Context, key: bytes) -> Exit:
    context.streams.message(f"there is no key {show_bytes(key)}")
    return Exit.NOT_FOUND


async def _delete(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    if_value = context.content(arguments.words["V"]) if "V" in arguments.words else None
    return _answer(output, key, "deleted", await (await context.writer()).delete(key, if_value=if_value))


async def _exists(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    return _answer(output, key, "exists", await (await context.client()).exists(key))


async def _cas(context: Context, arguments: Arguments, output: Output) -> Exit:
    key, old, new = (context.content(arguments.words[name]) for name in ("K", "OLD", "NEW"))
    return _stored(output, key, await (await context.writer()).cas(key, new, if_value=old))


async def _incr(context: Context, arguments: Arguments, output: Output) -> Exit:
    key, by = context.content(arguments.words["K"]), 1
    if "N" in arguments.words:
        by = arguments.integer(arguments.words["N"], "N", INTEGER_MIN, INTEGER_MAX)
    result = await (await context.writer()).incr(key, by)
    output.scalar(str(result), {"key": key, "value": result})
    return Exit.OK


async def _expire(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    seconds = arguments.seconds(arguments.words["S"], "S")
    return _answer(output, key, "expires", await (await context.writer()).expire(key, seconds))


async def _persist(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    return _answer(output, key, "persists", await (await context.writer()).persist(key))


async def _ttl(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    seconds = await (await context.client()).ttl(key)
    if seconds is None:
        return _no_such_key(context, key)
    if math.isinf(seconds):
        output.scalar("-1", {"key": key, "ttl_ms": None})
    else:
        output.scalar(number(seconds), {"key": key, "ttl_ms": round(seconds * 1000)})
    return Exit.OK


async def _scan(context: Context, arguments: Arguments, output: Output) -> Exit:
    prefix = context.content(arguments.words["PREFIX"]) if "PREFIX" in arguments.words else None
    start, end = (context.content(arguments.options[n]) if n in arguments.options else None for n in ("from", "to"))
    limit = None
    if "limit" in arguments.options:
        limit = arguments.integer(arguments.options["limit"], "limit", 1, INTEGER_MAX)
    reverse = "reverse" in arguments.flags
    client = await context.client()
    if "keys" in arguments.flags:
        keys = output.keys()
        found = client.scan_keys(prefix=prefix, start=start, end=end, limit=limit, reverse=reverse)
        async for some in in_pages(found):
            keys.page(some)
        keys.finish()
    else:
        pairs = output.pairs()
        entries = client.scan_entries(prefix=prefix, start=start, end=end, limit=limit, reverse=reverse)
        async for page in in_pages(entries):
            pairs.page(page)
        pairs.finish()
    return Exit.OK


async def _count(context: Context, arguments: Arguments, output: Output) -> Exit:
    prefix = context.content(arguments.words["PREFIX"]) if "PREFIX" in arguments.words else None
    count = await (await context.client()).count(prefix=prefix)
    output.scalar(str(count), {"count": count})
    return Exit.OK


async def _delete_prefix(context: Context, arguments: Arguments, output: Output) -> Exit:
    prefix = context.content(arguments.words["P"])
    if not prefix and "all" not in arguments.flags:
        raise UsageError("an empty prefix is every key of the cluster; add `all` if that is meant")
    keys_max = None
    if "max" in arguments.options:
        keys_max = arguments.integer(arguments.options["max"], "max", 0, INTEGER_MAX)
    dry_run = "dry-run" in arguments.flags
    if not dry_run and "yes" not in arguments.flags and context.ask is None:
        raise UsageError("no question can be asked here; add `yes` to delete, or `dry-run` to count the keys")
    count = await (await context.client()).count(prefix=prefix)
    if dry_run:
        output.scalar(str(count), {"matched": count, "deleted": 0})
        return Exit.OK
    which = f"that start with {show_bytes(prefix)}" if prefix else "of the cluster"
    if keys_max is not None and count > keys_max:
        raise ShellRefused(f"{count} keys {which} are more than max={keys_max}; nothing was deleted")
    if count and "yes" not in arguments.flags:
        assert context.ask is not None, "checked above"
        if not await context.ask(f"delete {count} keys {which}? [y/N] "):
            raise ShellRefused("nothing was deleted", Exit.NOT_FOUND)
    deleted = await _delete_all(context, prefix, which, keys_max) if count else 0
    output.scalar(str(deleted), {"matched": count, "deleted": deleted})
    return Exit.OK


async def _delete_all(context: Context, prefix: bytes, which: str, keys_max: int | None) -> int:
    """Delete page by page, at most `keys_max` keys: more may have been written since the count."""
    client = await context.writer()
    deleted = 0
    try:
        async for keys in in_pages(client.scan_keys(prefix=prefix)):
            if keys_max is not None and deleted + len(keys) > keys_max:
                raise ShellRefused(f"more than max={keys_max} keys {which} are there by now")
            deleted += sum(map(bool, await client.delete_many(keys)))
    except Exception:
        context.streams.message(f"{deleted} keys were deleted before the error")
        raise
    return deleted


_QUOTING: Final = """Words: plain, "quoted \\x00 \\n", b64:AAEC, @file, - for standard input.
In scripts: printf %s "$v" | kvtcp-shell put KEY -    nothing in the value is interpreted
`--` ends the options: kvtcp-shell put -- KEY -o stores the text -o."""

COMMANDS: Final = (
    Command("add K V [ttl=60]", "store a new key; refuse one that exists", "add user:1 Ada\nOK 7", _add,
            _QUOTING),
    Command("put K V [ttl=60]", "store a key, replacing its value", "put user:1 @ada.json ttl=3600\nOK 8", _put,
            _QUOTING + "\nWithout ttl= the key has no deadline, also if it had one."),
    Command("get K", "the value of a key", "get user:1\nAda", _get,
            "A newline is added to the value; -o raw gives its bytes only, -o json also revision and deadline.\n"
            "Exit code 1 if there is no such key."),
    Command("delete K [V]", "delete a key; with V only if that is its value", "delete user:1\n1", _delete,
            "Prints 1, or 0 (exit code 1) if there was no such key or its value is another."),
    Command("exists K", "whether there is a key", "exists user:1\n1", _exists, "Prints 1, or 0 (exit code 1)."),
    Command("cas K OLD NEW", "replace a value only if it is OLD", "cas user:1 Ada Eve\nOK 9", _cas,
            "Exit code 1 if the value is another. The deadline stays."),
    Command("incr K [N]", "add N (1) to a number and show it", "incr hits 5\n5", _incr,
            "A missing key counts from 0. A negative N subtracts. Signed 64 bits."),
    Command("expire K S", "let a key expire in S seconds", "expire user:1 60\n1", _expire,
            "Prints 1, or 0 (exit code 1) if there is no such key."),
    Command("persist K", "remove the deadline of a key", "persist user:1\n1", _persist,
            "Prints 1, or 0 (exit code 1) if there was no key with a deadline."),
    Command("ttl K", "seconds until a key expires", "ttl user:1\n59.998", _ttl,
            "Prints -1 for a key without deadline. Exit code 1 if there is no such key."),
    Command("all_values", "every pair of the cluster, in key order", "all_values\nuser:1\tAda", _scan,
            "Control bytes are shown with \\-escapes. Pages are read one after the other; each is a consistent cut."),
    Command("scan [PREFIX] [from=K] [to=K] [limit=N] [reverse] [keys]", "pairs in key order",
            "scan user: limit=2\nuser:1\tAda\nuser:2\tEve", _scan,
            "from= is inclusive, to= exclusive, also with reverse. keys: without values."),
    Command("count [PREFIX]", "the number of keys", "count user:\n2", _count),
    Command("delete-prefix P [dry-run] [max=N] [all] [yes]", "delete all keys that start with P",
            "delete-prefix session: max=1000 yes\n37", _delete_prefix,
            "Shows the number and asks; `yes` answers. dry-run only shows it. max=N refuses if there are more than N.\n"
            'An empty prefix ("") needs `all`. Not atomic: keys written meanwhile may stay.'),
)
