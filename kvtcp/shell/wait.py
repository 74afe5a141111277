"""Waiting until data has moved: the word `wait` behind a command that changes the cluster.

The server answers such a command when it has accepted the change; copies are made afterwards. Here the answers to
`status` (and for a drain `nodes`) are polled until nothing is left, without a limit, with a bar on a terminal. A
coordinator that is started again meanwhile continues the move: the waiting ends only after a long silence, with an
outcome that is not known. Ctrl-C ends the waiting and not the move.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from kvtcp.errors import DataError, OutcomeUnknown, Unavailable
from kvtcp.shell.context import Client, Context

POLL_S: Final = 0.5
SILENCE_S: Final = 60.0  # a coordinator that is started again answers sooner

Left = Callable[[], Awaitable[int]]  # the number of shards that are still to be moved


def moving_left(client: Client) -> Left:
    """Count the shards of the whole cluster that are not yet on their wanted nodes."""

    async def left() -> int:
        return _count((await client.status()).get("moving"), "moving", "status")

    return left


def node_left(client: Client, node: str) -> Left:
    """Count the shards that a node still holds as a member; none if it is not in the cluster any more."""

    async def left() -> int:
        for row in await client.nodes():
            if row.get("node") == node:
                return _count(row.get("member_of"), "member_of", "nodes")
        return 0

    return left


def _count(value: Any, name: str, answer: str) -> int:
    if type(value) is not int:
        raise DataError(f"the server's {answer} does not tell {name}: is it an older version?")
    return value


async def until_moved(
    context: Context, label: str, left: Left, *, clock: Callable[[], float] = time.monotonic, poll_s: float = POLL_S
) -> None:
    """Return when nothing is left. Raises OutcomeUnknown after a long silence, and other errors of `left`."""
    context.write_sent = False  # the change is accepted: an interruption leaves nothing open
    silent_since: float | None = None
    try:
        with context.progress_bar(label) as bar:
            while True:
                try:
                    count = await left()
                except Unavailable as error:
                    silent_since = clock() if silent_since is None else silent_since
                    if clock() - silent_since >= SILENCE_S:
                        text = f"the change was accepted; its progress has not been known for {SILENCE_S:.0f} s"
                        raise OutcomeUnknown(f"{text} ({error.message}). Look at `status`") from error
                else:
                    silent_since = None
                    bar.left(count)
                    if not count:
                        return
                await asyncio.sleep(poll_s)
    except asyncio.CancelledError:
        context.streams.message("no longer waiting; the moves continue")
        raise
