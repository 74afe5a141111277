"""Fixtures for users' tests: the real servers inside pytest. Active as soon as kvtcp is installed.

    async def test_mine(kvtcp_cluster):                     # needs pytest-asyncio (auto or strict mode)
        async with kvtcp.connect(kvtcp_cluster.url) as kv:
            await kv.put("a", "1")

    @pytest.mark.kvtcp(nodes=1, replication_factor=1)       # any argument of LocalCluster, for both fixtures
    def test_plain(kvtcp_url):                              # no event loop: the cluster runs in a thread
        with kvtcp.sync.connect(kvtcp_url) as kv:
            kv["a"] = b"1"

Each test has a cluster of its own, empty and in memory, gone when the test ends. Nothing but pytest itself is imported
before a test asks for a fixture; pytest-asyncio is needed for `kvtcp_cluster` only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvtcp.testing.local_cluster import LocalCluster


def pytest_configure(config: pytest.Config) -> None:
    """The marker, for `--strict-markers` and `pytest --markers`."""
    config.addinivalue_line(
        "markers",
        "kvtcp(nodes=3, replication_factor=None, shards=64, min_insync=None): how kvtcp_cluster and kvtcp_url are "
        "started; the arguments of kvtcp.testing.LocalCluster",
    )


def _arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the nearest marker asks for. Raises pytest.UsageError for positional arguments."""
    marker = request.node.get_closest_marker("kvtcp")
    if marker is None:
        return {}
    if marker.args:
        raise pytest.UsageError("@pytest.mark.kvtcp takes arguments by name only, such as nodes=1")
    return dict(marker.kwargs)


async def _kvtcp_cluster(request: pytest.FixtureRequest) -> AsyncIterator[LocalCluster]:
    """A started LocalCluster in the test's event loop; `@pytest.mark.kvtcp(...)` configures it."""
    from kvtcp.testing.local_cluster import LocalCluster

    async with LocalCluster(**_arguments(request)) as cluster:
        yield cluster


@pytest.fixture
def kvtcp_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a cluster that runs in a thread, for kvtcp.sync; `@pytest.mark.kvtcp(...)` configures it."""
    from kvtcp.testing.local_cluster import LocalCluster

    with LocalCluster.run_in_thread(**_arguments(request)) as cluster:
        yield cluster.url


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Make `kvtcp_cluster` a fixture of pytest-asyncio, once that is there; it is not imported for anybody else."""
    if manager.hasplugin("asyncio") and not manager.hasplugin("kvtcp-asyncio"):
        manager.register(_AsyncFixtures(), "kvtcp-asyncio")


class _AsyncFixtures:
    """The fixtures that need pytest-asyncio: a plugin of its own, registered when that one is there."""

    def __init__(self) -> None:
        import pytest_asyncio

        self.kvtcp_cluster = pytest_asyncio.fixture(loop_scope="function", name="kvtcp_cluster")(_kvtcp_cluster)
