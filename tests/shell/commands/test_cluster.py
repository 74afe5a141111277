"""Changes of the cluster and its views, in every form; questions, and what scripts must say instead."""

import json
from typing import Any

import pytest

from kvtcp.errors import AdminError
from kvtcp.shell import wait
from kvtcp.shell.context import Context
from kvtcp.shell.exits import Exit, ShellRefused
from kvtcp.shell.parser import split_line
from kvtcp.shell.table import take_command
from tests.support.shell_fakes import FakeClient, Moving, Shell

GOLDEN: list[tuple[str, list[tuple[Any, ...]], str]] = [
    ("node add 10.0.0.4:5000", [("node_add", "10.0.0.4", 5000)], "node\tn4\n"),
    ("node add [::1]:5000 -o jsonl", [("node_add", "::1", 5000)], '{"node": "n4"}\n'),
    ("node undrain n1", [("node_undrain", "n1")], "node\tn1\n"),
    ("node drain n1", [("node_drain", "n1")], "node\tn1\nshards\t21\n"),
    ("node drain n1 -o table", [("node_drain", "n1")], "node    n1\nshards  21\n"),
    ("node remove n1", [("node_remove", "n1")], "node\tn1\n"),
    ("node forget n1 destroyed", [("node_forget", "n1")], "node\tn1\nunder_replicated\t3\n"),
    ("node forget n1 destroyed yes -o jsonl", [("node_forget", "n1")], '{"node": "n1", "under_replicated": 3}\n'),
    ("rebalance", [("rebalance", False)], "shard\tfrom\tto\n5\tn1\tn4\n6\tn2\tn4\n"),
    ("rebalance -o table", [("rebalance", False)],
     "shard  from  to\n-----  ----  --\n5      n1    n4\n6      n2    n4\n2 moves, 2 left to move\n"),
    ("rebalance dry-run -o table", [("rebalance", True)],
     "shard  from  to\n-----  ----  --\n5      n1    n4\n6      n2    n4\n2 moves, not made: a dry run\n"),
    ("rebalance dry-run -o jsonl", [("rebalance", True)],
     '{"moves": [{"shard": 5, "from": "n1", "to": "n4"}, {"shard": 6, "from": "n2", "to": "n4"}], "left": 0}\n'),
    ("shard accept-loss 5 yes", [("shard_accept_loss", 5)], "shard\t5\nfrom\tn2\n"),
    ("shard accept-loss 5 yes -o json", [("shard_accept_loss", 5)], '{\n  "shard": 5,\n  "from": "n2"\n}\n'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "calls", "out"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_changes(shell: Shell, line: str, calls: list[tuple[Any, ...]], out: str) -> None:
    """Every change asks the server once, prints exactly this and ends with 0."""
    assert (shell.line(line), shell.out.decode(), shell.err) == (0, out, "")
    assert shell.client.calls == calls


@pytest.mark.parametrize(("line", "text"), [
    ("node add", "HOST:PORT is missing"),
    ("node add 10.0.0.4", "the address of a node is HOST:PORT, not '10.0.0.4'"),
    ("node add :5000", "the address of a node is HOST:PORT"),
    ("node add h:0", "the address of a node is HOST:PORT"),
    ("node add h:65536", "the address of a node is HOST:PORT"),
    ("node forget n1", "destroyed is missing"),
    ("node forget n1 yes", "the word destroyed must stand in the place of 'yes'"),
    ("node forge n1", "node is followed by add or drain or undrain or remove or forget"),
    ("rebalance dry-run wait", "dry-run moves nothing that could be waited for"),
    ("shard accept-loss x yes", "N must be an integer from 0 to 4095, not 'x'"),
    ("shard accept-loss 5", "no question can be asked here; add `yes` to accept the loss"),
])  # fmt: skip
def test_mistakes(shell: Shell, line: str, text: str) -> None:
    """A wrong command line ends with 2, and no server is asked."""
    assert (shell.line(line), shell.out) == (2, b"")
    assert text in shell.err
    assert shell.client.opened == []


def test_refusals(shell: Shell) -> None:
    """What the cluster cannot do now ends with 6, and the server's sentence says what to do."""
    shell.client.failure = AdminError("n1 holds 21 shards: drain it first")
    # the first call is the connection
    assert shell.line("node remove n1") == 6
    assert shell.err == "kvtcp-shell: n1 holds 21 shards: drain it first\n"


class Asked:
    """Somebody who answers every question, and remembers them."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.questions: list[str] = []

    async def __call__(self, question: str) -> bool:
        self.questions.append(question)
        return self.answer


async def run(shell: Shell, line: str, ask: Asked) -> Exit:
    """A command with somebody to ask."""
    context = Context(shell.streams(), lambda: shell.client.connect("", 0), "plain", ask)
    command, rest = take_command(split_line(line))
    return await command.handler(context, command.bind(rest), context.output())


QUESTIONS = {
    "node forget n1 destroyed": "n1 must never come back, and what it alone holds is lost. Continue? [y/N] ",
    "shard accept-loss 5": (
        "shard 5 is down (no copy answers). The copies that are left will serve the shard, and acknowledged writes "
        "may be lost. Continue? [y/N] "
    ),
}


@pytest.mark.parametrize("line", QUESTIONS)
async def test_questions(shell: Shell, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be taken back is asked; no changes nothing and ends with 1, `yes` answers beforehand."""

    async def shards() -> list[dict[str, Any]]:
        return [{"shard": 4}, {"shard": 5, "state": "down", "reason": "no copy answers"}]

    monkeypatch.setattr(shell.client, "shards", shards)
    no = Asked(False)
    with pytest.raises(ShellRefused, match="nothing was changed") as caught:
        await run(shell, line, no)
    assert (caught.value.code, no.questions, shell.client.calls) == (Exit.NOT_FOUND, [QUESTIONS[line]], [])
    yes = Asked(True)
    assert await run(shell, line, yes) == Exit.OK
    assert (yes.questions, len(shell.client.calls)) == ([QUESTIONS[line]], 1)
    nobody = Asked(False)
    assert await run(shell, line + " yes", nobody) == Exit.OK
    assert nobody.questions == []


async def test_a_question_about_a_shard_of_which_nothing_is_known(shell: Shell) -> None:
    """An older server, or a number that no shard has: the question has no reason, the server will refuse."""
    ask = Asked(True)
    assert await run(shell, "shard accept-loss 99", ask) == Exit.OK
    assert ask.questions == [
        "The copies that are left will serve the shard, and acknowledged writes may be lost. Continue? [y/N] "
    ]


def test_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wait` returns when nothing is left to move, and the answer says so."""
    monkeypatch.setattr(wait.until_moved, "__kwdefaults__", {**wait.until_moved.__kwdefaults__, "poll_s": 0})
    shell = Shell(Moving(12, 3, 0, 9))
    assert (shell.line("node drain n1 wait"), shell.out) == (0, b"node\tn1\nshards\t21\nleft\t0\n")
    assert shell.client.polls == [9]  # type: ignore[attr-defined]
    shell = Shell(Moving(12, 3, 0, 9))
    assert shell.line("rebalance wait -o json") == 0
    answer = json.loads(shell.out)
    assert (answer["left"], len(answer["moves"])) == (0, 2)
    assert shell.client.polls == [9]  # type: ignore[attr-defined]


class Described(FakeClient):
    """A cluster that tells more of itself."""

    async def status(self) -> dict[str, Any]:
        return {"state": "degraded", "degraded": ["n2 is not linked: " + "very " * 20 + "slow"], "moving": 2}

    async def nodes(self) -> list[dict[str, Any]]:
        return [{"node": "n2", "state": "down", "reason": "connection refused", "lag_entries": 5, "lag_bytes": 2048}]

    async def shards(self) -> list[dict[str, Any]]:
        learner = {"node": "n4", "phase": "pulling", "entries_left": 7, "keys": 1234}
        return [{"shard": n, "state": "ok", "insync": ["n1"], "learners": [learner]} for n in range(64)]


def test_views_are_for_tables_only() -> None:
    """A table is for people, every other form has the server's keys as they are."""
    shell = Shell(Described())
    assert shell.run("status", terminal=True) == 0
    assert "…" not in shell.out.decode() and max(map(len, shell.out.decode().splitlines())) <= 80
    assert shell.run("status") == 0
    assert shell.out.decode().splitlines()[1].startswith("degraded\tn2 is not linked: very")
    assert shell.run("nodes", "-o", "table") == 0
    assert shell.out == (
        b"node  state  lag\n----  -----  ----------\nn2    down   5, 2.0 KiB\n"
        b"n2: connection refused\n1 node: 1 down\n"
    )
    assert shell.run("nodes") == 0
    assert shell.out == b"node\tstate\treason\tlag_entries\tlag_bytes\nn2\tdown\tconnection refused\t5\t2048\n"
    assert shell.run("where", "{a}", "-o", "table") == 0
    assert shell.out.decode().splitlines()[2].endswith("n4 pulling 7 left (1,234 keys)")
    assert shell.run("shards") == 0
    assert shell.out.splitlines()[1] == b"0\tok\tn1\tnode=n4,phase=pulling,entries_left=7,keys=1234"
    assert shell.run("shards", "-o", "json") == 0
    assert json.loads(shell.out)[63]["learners"][0]["entries_left"] == 7
