"""The service: numbers of clients and positions of scans."""

from __future__ import annotations

import pytest

from kvtcp.constants import SCAN_CURSOR_IDLE_MS, SCAN_CURSORS_MAX
from kvtcp.frontend.resp.plan import CommandError
from tests.support.resp_tools import World


def test_clients_are_numbered() -> None:
    """No number twice."""
    service = World().service
    assert [service.next_client() for _ in range(3)] == [1, 2, 3]


def test_cursors_begin_anywhere() -> None:
    """Two coordinators give different numbers, so that one does not take the other's."""
    service = World().service
    assert service.keep_cursor(b"a", 0) > 1 << 30


def test_a_cursor_is_used() -> None:
    """It is known after it was used, and the one before it is not."""
    service = World().service
    first = service.keep_cursor(b"a", 0)
    assert service.cursor(first) == b"a" == service.cursor(first)
    second = service.keep_cursor(b"b", first)
    again = service.keep_cursor(b"b", first)
    assert service.cursor(first) == b"a", "until one that followed is used"
    assert service.cursor(second) == b"b" and service.cursor(again) == b"b"
    with pytest.raises(CommandError, match=f"the cursor {first} is not known"):
        service.cursor(first)


def test_cursors_are_forgotten() -> None:
    """By time and by number, those first that were used least lately."""
    world = World()
    service = world.service
    first, second = service.keep_cursor(b"a", 0), service.keep_cursor(b"b", 0)
    world.now_ms += SCAN_CURSOR_IDLE_MS - 1
    service.cursor(first)
    world.now_ms += 2
    with pytest.raises(CommandError, match="is not known"):
        service.cursor(second)
    for _ in range(SCAN_CURSORS_MAX - 1):
        service.keep_cursor(b"c", 0)
    assert service.cursor(first) == b"a"
    service.keep_cursor(b"c", 0)
    assert service.cursor(first) == b"a", "it was used last"
    assert len(service._cursors) == SCAN_CURSORS_MAX
