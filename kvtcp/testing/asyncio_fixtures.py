"""The fixture of `kvtcp.testing.pytest_plugin` that needs pytest-asyncio; loaded by it only where that is active.

It is made with `pytest_asyncio.fixture`, so it works in the strict mode as in the auto mode, and it lives in the event
loop of its test (function scope), because clients of the test and servers must share one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from kvtcp.testing.pytest_plugin import marker_arguments

if TYPE_CHECKING:
    from kvtcp.testing.local_cluster import LocalCluster


@pytest_asyncio.fixture(loop_scope="function")
async def kvtcp_cluster(request: pytest.FixtureRequest) -> AsyncIterator[LocalCluster]:
    """A started LocalCluster in the test's event loop; `@pytest.mark.kvtcp(...)` configures it."""
    from kvtcp.testing.local_cluster import LocalCluster

    async with LocalCluster(**marker_arguments(request)) as cluster:
        yield cluster
