"""Commands for the cluster itself: how it is, where keys lie, and changes of its nodes and shards.

Tables of status, nodes and shards are made by kvtcp.shell.cluster_view; every other form passes on what the server
said. A change is answered when it is accepted; `wait` (kvtcp.shell.wait) stays until the data has moved. What cannot be
taken back needs a word: `destroyed`, and `yes` where nobody can be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from kvtcp.client.administration import NodeChange
from kvtcp.constants import SHARDS_MAX
from kvtcp.errors import DataError
from kvtcp.protocol.hashing import shard_of
from kvtcp.shell.cluster_view import View, nodes_view, shards_view, status_rows
from kvtcp.shell.command import Arguments, Command
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, ShellRefused, UsageError
from kvtcp.shell.output import Output
from kvtcp.shell.text import cell
from kvtcp.shell.wait import moving_left, node_left, until_moved

Rows = Sequence[Mapping[str, Any]]

# --- how it is --------------------------------------------------------------------------------------


async def _status(context: Context, arguments: Arguments, output: Output) -> Exit:
    fields = await (await context.client()).status()
    if output.form == "table":
        output.table(("", ""), status_rows(fields, output.columns), header_shown=False)
    else:
        output.record(fields)
    return Exit.OK


async def _nodes(context: Context, arguments: Arguments, output: Output) -> Exit:
    rows = await (await context.client()).nodes()
    _show(output, rows, nodes_view)
    return Exit.OK


async def _shards(context: Context, arguments: Arguments, output: Output) -> Exit:
    rows = await (await context.client()).shards()
    _show(output, rows, shards_view)
    return Exit.OK


def _show(output: Output, rows: Rows, view_of: Callable[[Rows, int | None], View]) -> None:
    """The view of the rows as a table, the rows themselves in every other form."""
    if output.form != "table":
        output.rows(rows)
        return
    view = view_of(rows, output.columns)
    output.table(view.header, view.rows)
    for note in view.notes:
        output.line(note)


async def _where(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    client = await context.client()
    shard = shard_of(key, client.info.shards)
    for row in await client.shards():
        if row.get("shard") == shard:
            _show(output, [row], shards_view)
            return Exit.OK
    raise DataError(f"the server's list of shards has no shard {shard}")


# --- changes ----------------------------------------------------------------------------------------


def _address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 address stands in brackets. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UsageError(f"the address of a node is HOST:PORT, not {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _node_fields(change: NodeChange) -> dict[str, Any]:
    """What is shown of a change of a node."""
    shards = {} if change.shards is None else {"shards": change.shards}
    return {"node": change.node, **shards, **change.details}


async def _node_add(context: Context, arguments: Arguments, output: Output) -> Exit:
    host, port = _address(arguments.words["HOST:PORT"].text())
    output.record(_node_fields(await (await context.writer()).node_add(host, port)))
    return Exit.OK


async def _node_drain(context: Context, arguments: Arguments, output: Output) -> Exit:
    client = await context.writer()
    change = await client.node_drain(arguments.words["ID"].text())
    fields = _node_fields(change)
    if "wait" in arguments.flags:
        await until_moved(context, "node drain", node_left(client, change.node))
        fields["left"] = 0
    output.record(fields)
    return Exit.OK


async def _node_undrain(context: Context, arguments: Arguments, output: Output) -> Exit:
    output.record(_node_fields(await (await context.writer()).node_undrain(arguments.words["ID"].text())))
    return Exit.OK


async def _node_remove(context: Context, arguments: Arguments, output: Output) -> Exit:
    output.record(_node_fields(await (await context.writer()).node_remove(arguments.words["ID"].text())))
    return Exit.OK


async def _node_forget(context: Context, arguments: Arguments, output: Output) -> Exit:
    node = arguments.words["ID"].text()
    # in a script the word `destroyed` says enough
    if "yes" not in arguments.flags and context.ask is not None:
        await _confirm(context, f"{cell(node)} must never come back, and what it alone holds is lost.")
    output.record(_node_fields(await (await context.writer()).node_forget(node)))
    return Exit.OK


async def _rebalance(context: Context, arguments: Arguments, output: Output) -> Exit:
    dry_run = "dry-run" in arguments.flags
    if dry_run and "wait" in arguments.flags:
        raise UsageError("dry-run moves nothing that could be waited for")
    client = await (context.client() if dry_run else context.writer())
    result = await client.rebalance(dry_run)
    left = result.left
    if "wait" in arguments.flags:
        await until_moved(context, "rebalance", moving_left(client))
        left = 0
    moves = [{"shard": move.shard, "from": move.source, "to": move.target} for move in result.moves]
    if output.form in ("json", "jsonl"):
        output.record({"moves": moves, "left": left, **result.details})
        return Exit.OK
    output.rows(moves)
    if output.form == "table":
        count = f"{len(moves)} move{'' if len(moves) == 1 else 's'}"
        output.line(f"{count}, not made: a dry run" if dry_run else f"{count}, {left} left to move")
    return Exit.OK


async def _shard_accept_loss(context: Context, arguments: Arguments, output: Output) -> Exit:
    shard = arguments.integer(arguments.words["N"], "N", 0, SHARDS_MAX - 1)
    if "yes" not in arguments.flags:
        if context.ask is None:
            raise UsageError("nobody can be asked here; add `yes` to accept the loss")
        rows = await (await context.client()).shards()
        state = next((row for row in rows if row.get("shard") == shard), {})
        why = f" ({cell(state['reason'])})" if state.get("reason") else ""
        told = f"shard {shard} is {cell(state.get('state'))}{why}. " if state.get("state") else ""
        await _confirm(context, f"{told}It goes on with what is left, and acknowledged writes may be lost for ever.")
    result = await (await context.writer()).shard_accept_loss(shard)
    output.record({"shard": result.shard, **result.details})
    return Exit.OK


async def _confirm(context: Context, sentence: str) -> None:
    """Ask. Raises ShellRefused for an answer that is not yes."""
    assert context.ask is not None, "there is somebody to ask"
    if not await context.ask(f"{sentence} Go on? [y/N] "):
        raise ShellRefused("nothing was changed", Exit.NOT_FOUND)


COMMANDS: Final = (
    Command("status", "the state of the cluster", "status -o json", _status,
            "What is not as it should be stands at the end, a sentence a line."),
    Command("nodes", "the nodes and how they are", "nodes", _nodes,
            "A narrow terminal shows fewer columns and names the others; -o json has everything."),
    Command("shards", "the shards and which nodes hold them", "shards", _shards,
            "`=` in the column wanted: the nodes that hold the shard are those that shall."),
    Command("where K", "the shard of a key and the nodes that hold it", "where user:1", _where,
            "If the key contains a {tag}, only the tag decides: {user:1}:name and {user:1}:mail are in one shard."),
    Command("node add HOST:PORT", "make a running node one of the cluster", "node add 10.0.0.4:5000\nnode\tn4",
            _node_add, "It holds nothing until a `rebalance`."),
    Command("node drain ID [wait]", "move everything that a node holds to others",
            "node drain n1 wait\nnode\tn1\nshards\t21\nleft\t0", _node_drain,
            "`wait` shows how many shards it still holds, until there are none; Ctrl-C ends the waiting, not the\n"
            "moves. Afterwards `node remove`."),
    Command("node undrain ID", "let a node that was to be emptied hold shards again", "node undrain n1\nnode\tn1",
            _node_undrain, "What has moved comes back with a `rebalance`."),
    Command("node remove ID", "take a node that holds nothing out of the cluster", "node remove n1\nnode\tn1",
            _node_remove, "ShellRefused while it holds something: `node drain` comes first."),
    Command("node forget ID destroyed [yes]", "declare that a node will never come back",
            "node forget n1 destroyed yes\nnode\tn1", _node_forget,
            "Nobody waits for what it held any more. What it alone held is lost: look at `shards` first. Asks on a\n"
            "terminal; `yes` answers. If the node runs still, stop it and remove its data directory."),
    Command("rebalance [dry-run] [wait]", "spread the shards evenly over the nodes",
            "rebalance wait\nshard\tfrom\tto\n5\tn1\tn4", _rebalance,
            "By the fewest moves. dry-run only shows them. `wait` stays until no shard of the cluster is left to\n"
            "move; Ctrl-C ends the waiting, not the moves."),
    Command("shard accept-loss N [yes]", "let a shard that is down go on with what is left of it",
            "shard accept-loss 5 yes\nshard\t5", _shard_accept_loss,
            "The last resort, when no node with all its data will come back: acknowledged writes may be lost for\n"
            "ever. Asks; `yes` answers."),
)  # fmt: skip
