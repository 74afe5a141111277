"""The door: numbers of clients and positions of scans."""

from __future__ import annotations

import pytest

from kvtcp.constants import SCAN_CURSOR_IDLE_MS, SCAN_CURSORS_MAX
from kvtcp.resp.plan import CommandError
from tests.resp_tools import SHARDS, World


def test_clients_are_numbered() -> None:
    """No number twice."""
    door = World().door
    assert [door.next_client() for _ in range(3)] == [1, 2, 3]
    assert door.all_shards == list(range(SHARDS)) and door.is_open


def test_is_open() -> None:
    """Not while anything is restored, be it everything."""
    world = World()
    for prefix in (b"", b"a"):
        world.gateway.restoring = prefix
        assert not world.door.is_open
    world.gateway.restoring = None
    assert world.door.is_open


def test_cursors_begin_anywhere() -> None:
    """Two coordinators give different numbers, so that one does not take the other's."""
    door = World().door
    assert door.keep_cursor(b"a", 0) > 1 << 30


def test_a_cursor_is_used() -> None:
    """It is known after it was used, and the one before it is not."""
    door = World().door
    first = door.keep_cursor(b"a", 0)
    assert door.cursor(first) == b"a" == door.cursor(first)
    second = door.keep_cursor(b"b", first)
    again = door.keep_cursor(b"b", first)
    assert door.cursor(first) == b"a", "until one that followed is used"
    assert door.cursor(second) == b"b" and door.cursor(again) == b"b"
    with pytest.raises(CommandError, match=f"the cursor {first} is not known"):
        door.cursor(first)


def test_cursors_are_forgotten() -> None:
    """By time and by number, those first that were used least lately."""
    world = World()
    door = world.door
    first, second = door.keep_cursor(b"a", 0), door.keep_cursor(b"b", 0)
    world.now_ms += SCAN_CURSOR_IDLE_MS - 1
    door.cursor(first)
    world.now_ms += 2
    with pytest.raises(CommandError, match="is not known"):
        door.cursor(second)
    for _ in range(SCAN_CURSORS_MAX - 1):
        door.keep_cursor(b"c", 0)
    assert door.cursor(first) == b"a"
    door.keep_cursor(b"c", 0)
    assert door.cursor(first) == b"a", "it was used last"
    assert len(door._cursors) == SCAN_CURSORS_MAX
