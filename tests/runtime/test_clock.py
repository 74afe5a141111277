"""The clocks."""

import time

from kvtcp.runtime.clock import wall_ms, wall_us


def test_units() -> None:
    """Both show the machine's time, each in its unit."""
    before_ns = time.time_ns()
    ms, us = wall_ms(), wall_us()
    assert before_ns // 10**6 <= ms <= us // 1_000 + 1 and before_ns // 10**3 <= us <= time.time_ns() // 10**3
