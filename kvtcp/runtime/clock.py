"""The clocks of the machine: wall time for stamps, which no decision about safety depends on.

Monotonic time, for deadlines, is that of the event loop.
"""

import time


def wall_ms() -> int:
    """Milliseconds of the machine's clock."""
    return time.time_ns() // 1_000_000


def wall_us() -> int:
    """Microseconds of the machine's clock."""
    return time.time_ns() // 1_000
