"""Waiting until data has moved: what is polled, what is shown, and how it ends."""

import asyncio
import io

import pytest

from kvtcp.errors import Code, DataError, OutcomeUnknown, Unavailable
from kvtcp.shell.context import Context, Streams
from kvtcp.shell.wait import SILENCE_S, Left, moving_left, node_left, until_moved
from tests.support.shell_fakes import Moving


class Clock:
    """A clock that goes on by a step whenever it is read."""

    def __init__(self, step_s: float) -> None:
        self.now = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def context_of(client: Moving) -> Context:
    """A context whose stderr is a terminal in memory."""
    streams = Streams(io.BytesIO(), io.BytesIO(), io.StringIO(), stderr_is_terminal=True)
    return Context(streams, lambda: client.connect("", 0))


async def waited(client: Moving, left: Left, clock: Clock | None = None) -> str:
    """Wait without pauses; what was written on stderr."""
    context = context_of(client)
    context.write_sent = True
    await until_moved(context, "rebalance", left, clock=clock or Clock(0), poll_s=0)
    assert not context.write_sent, "an interruption leaves nothing open"
    assert isinstance(context.streams.stderr, io.StringIO)
    return context.streams.stderr.getvalue()


async def test_until_nothing_is_left() -> None:
    """The whole cluster is told by `status`, one node by `nodes`; the bar shows what is left."""
    client = Moving(12, 5, 0, 7)
    assert "rebalance   0% [" + "." * 30 + "] 12 shards left" in await waited(client, moving_left(client))
    assert client.polls == [7], "it stopped when nothing was left"
    client = Moving(3, 0, 9)
    await waited(client, node_left(client, "n1"))
    assert client.polls == [9]


async def test_a_node_that_is_gone_holds_nothing() -> None:
    """A node that was removed meanwhile is not waited for."""
    client = Moving(3)
    assert await node_left(client, "n9")() == 0


@pytest.mark.parametrize("key", ["moving", "member_of"])
async def test_an_older_server(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not tell what is left is not taken for one where nothing is."""
    client = Moving(3)

    async def answer() -> object:
        return {"state": "ok"} if key == "moving" else [{"node": "n1"}]

    monkeypatch.setattr(client, "status" if key == "moving" else "nodes", answer)
    with pytest.raises(DataError, match=f"does not tell {key}"):
        await waited(client, moving_left(client) if key == "moving" else node_left(client, "n1"))


async def test_a_short_silence_is_waited_out() -> None:
    """A coordinator that is started again goes on; each answer ends the silence."""
    lost = Unavailable("no connection", Code.UNREACHABLE)
    client = Moving(5, lost, lost, 4, lost, lost, 0)
    await waited(client, moving_left(client), Clock(SILENCE_S / 4))


async def test_a_long_silence_ends_it() -> None:
    """Then nobody knows how far it is, and the sentence says so."""
    client = Moving(5, Unavailable("no connection", Code.UNREACHABLE))
    text = r"the change was accepted; its progress has not been known for 60 s \(no connection\)"
    with pytest.raises(OutcomeUnknown, match=text):
        await waited(client, moving_left(client), Clock(SILENCE_S / 4))


async def test_ctrl_c_ends_the_waiting_only() -> None:
    """The bar goes, and a sentence says that the shards go on."""
    client = Moving(5)
    context = context_of(client)
    task = asyncio.create_task(until_moved(context, "rebalance", moving_left(client)))
    assert isinstance(context.streams.stderr, io.StringIO)
    deadline = asyncio.get_running_loop().time() + 5
    while "5 shards left" not in context.streams.stderr.getvalue():
        assert asyncio.get_running_loop().time() < deadline, "the bar is drawn"
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert context.streams.stderr.getvalue().endswith("\r\x1b[Kkvtcp-shell: no longer waiting; the moves continue\n")
