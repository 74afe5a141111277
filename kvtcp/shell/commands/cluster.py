"""Commands for the cluster itself: its state, the nodes of a key, and changes of its nodes and shards.

Tables of status, nodes and shards are made by kvtcp.shell.cluster_view; every other form shows the server's answer as
it is. A change is answered when it is accepted; `wait` (kvtcp.shell.wait) stays until the data has moved. A change that
cannot be taken back needs a word: `destroyed`, and `yes` where no question can be asked.
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

# --- state ------------------------------------------------------------------------------------------


async def _status(context: Context, arguments: Arguments, output: Output) -> Exit:
    fields = await (await context.client()).status()
    if output.form == "table":
        output.table(("", ""), status_rows(fields, output.columns), header_shown=False)
    else:
        output.record(fields)
    return Exit.OK


async def _nodes(context: Context, arguments: Arguments, output: Output) -> Exit:
    return _show(output, await (await context.client()).nodes(), nodes_view)


async def _shards(context: Context, arguments: Arguments, output: Output) -> Exit:
    return _show(output, await (await context.client()).shards(), shards_view)


def _show(output: Output, rows: Rows, view_of: Callable[[Rows, int | None], View]) -> Exit:
    """Show the view of the rows as a table, the rows themselves in every other form."""
    if output.form != "table":
        output.rows(rows)
        return Exit.OK
    view = view_of(rows, output.columns)
    output.table(view.header, view.rows)
    for note in view.notes:
        output.line(note)
    return Exit.OK


async def _where(context: Context, arguments: Arguments, output: Output) -> Exit:
    key = context.content(arguments.words["K"])
    client = await context.client()
    shard = shard_of(key, client.info.shards)
    for row in await client.shards():
        if row.get("shard") == shard:
            return _show(output, [row], shards_view)
    raise DataError(f"the server's list of shards has no shard {shard}")


# --- changes ----------------------------------------------------------------------------------------


def _address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 address stands in brackets. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UsageError(f"the address of a node is HOST:PORT, not {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _changed(output: Output, change: NodeChange, **more: int) -> Exit:
    """Show a change of a node."""
    shards = {} if change.shards is None else {"shards": change.shards}
    output.record({"node": change.node, **shards, **change.details, **more})
    return Exit.OK


async def _node_add(context: Context, arguments: Arguments, output: Output) -> Exit:
    host, port = _address(arguments.words["HOST:PORT"].text())
    return _changed(output, await (await context.writer()).node_add(host, port))


async def _node_drain(context: Context, arguments: Arguments, output: Output) -> Exit:
    client = await context.writer()
    change = await client.node_drain(arguments.words["ID"].text())
    if "wait" not in arguments.flags:
        return _changed(output, change)
    await until_moved(context, "node drain", node_left(client, change.node))
    return _changed(output, change, left=0)


async def _node_undrain(context: Context, arguments: Arguments, output: Output) -> Exit:
    return _changed(output, await (await context.writer()).node_undrain(arguments.words["ID"].text()))


async def _node_remove(context: Context, arguments: Arguments, output: Output) -> Exit:
    return _changed(output, await (await context.writer()).node_remove(arguments.words["ID"].text()))


async def _node_forget(context: Context, arguments: Arguments, output: Output) -> Exit:
    node = arguments.words["ID"].text()
    # in a script the word `destroyed` is enough
    if "yes" not in arguments.flags and context.ask is not None:
        await _confirm(context, f"{cell(node)} must never come back, and what it alone holds is lost.")
    return _changed(output, await (await context.writer()).node_forget(node))


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
            raise UsageError("no question can be asked here; add `yes` to accept the loss")
        rows = await (await context.client()).shards()
        state = next((row for row in rows if row.get("shard") == shard), {})
        why = f" ({cell(state['reason'])})" if state.get("reason") else ""
        known = f"shard {shard} is {cell(state.get('state'))}{why}. " if state.get("state") else ""
        loss = "The copies that are left will serve the shard, and acknowledged writes may be lost."
        await _confirm(context, known + loss)
    result = await (await context.writer()).shard_accept_loss(shard)
    output.record({"shard": result.shard, **result.details})
    return Exit.OK


async def _confirm(context: Context, sentence: str) -> None:
    """Ask. Raises ShellRefused for an answer that is not yes."""
    assert context.ask is not None, "the callers checked it"
    if not await context.ask(f"{sentence} Continue? [y/N] "):
        raise ShellRefused("nothing was changed", Exit.NOT_FOUND)


COMMANDS: Final = (
    Command("status", "the state of the cluster", "status -o json", _status,
            "Faults stand at the end, a sentence a line."),
    Command("nodes", "the nodes and their state", "nodes", _nodes,
            "A narrow terminal shows fewer columns and names the others; -o json has everything."),
    Command("shards", "the shards and the nodes that hold them", "shards", _shards,
            "`=` in the column wanted: the nodes that hold the shard are those that are to hold it."),
    Command("where K", "the shard of a key and the nodes that hold it", "where user:1", _where,
            "If the key contains a {tag}, only the tag decides: {user:1}:name and {user:1}:mail are in one shard."),
    Command("node add HOST:PORT", "add a running node to the cluster", "node add 10.0.0.4:5000\nnode\tn4", _node_add,
            "The node holds nothing until a `rebalance`."),
    Command("node drain ID [wait]", "move all shards of a node to others",
            "node drain n1 wait\nnode\tn1\nshards\t21\nleft\t0", _node_drain,
            "`wait` shows the number of shards that the node still holds, until there are none; Ctrl-C ends the\n"
            "waiting, not the moves. Afterwards `node remove`."),
    Command("node undrain ID", "let a drained node hold shards again", "node undrain n1\nnode\tn1", _node_undrain,
            "Shards that have moved come back with a `rebalance`."),
    Command("node remove ID", "take a node that holds nothing out of the cluster", "node remove n1\nnode\tn1",
            _node_remove, "Refused while the node holds something: `node drain` comes first."),
    Command("node forget ID destroyed [yes]", "declare that a node will never come back",
            "node forget n1 destroyed yes\nnode\tn1", _node_forget,
            "The cluster stops waiting for its copies. Data that it alone held is lost: look at `shards` first. Asks\n"
            "on a terminal; `yes` answers. If the node still runs, stop it and remove its data directory."),
    Command("rebalance [dry-run] [wait]", "spread the shards evenly over the nodes",
            "rebalance wait\nshard\tfrom\tto\n5\tn1\tn4", _rebalance,
            "By the fewest moves. dry-run only shows them. `wait` stays until no shard of the cluster is left to\n"
            "move; Ctrl-C ends the waiting, not the moves."),
    Command("shard accept-loss N [yes]", "serve a shard that is down from the copies that are left",
            "shard accept-loss 5 yes\nshard\t5", _shard_accept_loss,
            "The last resort, when no node with all its data will come back: acknowledged writes may be lost. Asks;\n"
            "`yes` answers."),
)  # fmt: skip
