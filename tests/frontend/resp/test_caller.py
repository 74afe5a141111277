"""What describes a command."""

from __future__ import annotations

from kvtcp.frontend.resp.caller import CommandSpec
from kvtcp.frontend.resp.plan import Plan


def test_takes() -> None:
    """Exactly so many, or at least."""
    exact, least = (CommandSpec("x", arity, "g", "s") for arity in (2, -2))
    assert [n for n in range(5) if exact.takes(n)] == [2] and [n for n in range(5) if least.takes(n)] == [2, 3, 4]


def test_as_reply() -> None:
    """What COMMAND INFO tells: name, arity, flags and the places of the keys."""
    write = CommandSpec("w", -3, "g", "s", lambda arguments: Plan([], len), is_write=True, first_key=1, key_step=2)
    assert write.as_reply() == ["w", -3, ["write"], 1, 0, 2, [], [], [], []]
    assert write._replace(is_write=False).as_reply()[2] == ["readonly"]
    assert CommandSpec("r", 1, "g", "s", run=lambda caller, arguments: None).as_reply()[2] == ["fast"]
