"""What the tests of storage share: empty ones of everything."""

import pytest

from kvtcp.storage.shard.backlog import Backlog
from kvtcp.storage.shard.table import Table
from tests.crash.disk import CrashDisk


@pytest.fixture
def disk() -> CrashDisk:
    """An empty disk in memory."""
    return CrashDisk()


@pytest.fixture
def backlog() -> Backlog:
    """No entries, and the bound of the product."""
    return Backlog()


@pytest.fixture
def table() -> Table:
    """Shard 0, without keys."""
    return Table()
