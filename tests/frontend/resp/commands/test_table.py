"""The table of commands: arities, and what COMMAND tells of them."""

from __future__ import annotations

import pytest

from kvtcp.frontend.resp.commands.table import COMMANDS, IMMEDIATE
from tests.support.resp_tools import Error, World


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_arity(name: bytes) -> None:
    """Every command refuses a number of arguments that it does not take, in the words of Redis."""
    spec = COMMANDS[name]
    wrong = [count for count in range(1, abs(spec.arity) + 2) if not spec.takes(count)]
    assert bool(wrong) or spec.arity == -1
    for count in wrong:
        for spelled in (name, name.lower()):
            reply = World().connect().ask([spelled, *[b"1"] * (count - 1)])
            assert type(reply) is Error and reply == f"ERR wrong number of arguments for '{spec.name}' command"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_specs(name: bytes) -> None:
    """A command is compiled or run, is described, and says where its keys are if it has any."""
    spec = COMMANDS[name]
    assert (spec.compile is None) != (spec.run is None)
    assert name == spec.name.upper().encode() and spec.summary.endswith(".") and spec.group
    assert (spec.compile is not None) == (spec.first_key == 1) == (spec.key_step > 0)
    assert not spec.is_write or spec.compile is not None
    if spec.name in IMMEDIATE:
        assert spec.is_local
    reply = spec.as_reply()
    assert len(reply) == 10 and reply[:2] == [spec.name, spec.arity]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_random_arguments(name: bytes) -> None:
    """Whatever the arguments are, there is an answer or something is asked; nothing else happens."""
    words = [b"", b"a", b"0", b"-1", b"1", b"GET", b"nx", b"EX", b"\r\n", b"\xff", b"*", b"9" * 20, b"count"]
    for first in words:
        for second in words:
            client = World([b"a"]).connect()
            client.send([name, first], [name, first, second], [name, first, second, b"1"], [name, b"a", first, second])
            asked = client.sequencer.asked or client.sequencer.multi or client.resp.waits
            assert client.output() or asked, (name, first, second)
