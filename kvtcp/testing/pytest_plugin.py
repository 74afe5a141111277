"""Fixtures for users' tests: the real servers inside pytest. Active as soon as kvtcp is installed.

    async def test_mine(kvtcp_cluster):                     # needs pytest-asyncio (auto or strict mode)
        async with kvtcp.connect(kvtcp_cluster.url) as kv:
            await kv.put("a", "1")

    @pytest.mark.kvtcp(nodes=1, replication_factor=1)       # any argument of LocalCluster, for both fixtures
    def test_plain(kvtcp_url):                              # no event loop: the cluster runs in a thread
        with kvtcp.sync.connect(kvtcp_url) as kv:
            kv["a"] = b"1"

Each test has a cluster of its own, empty and in memory, gone when the test ends. Only pytest itself is imported before
a test uses a fixture; pytest-asyncio is needed for `kvtcp_cluster` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """The marker, for `--strict-markers` and `pytest --markers`; the asynchronous fixture where it can be used."""
    config.addinivalue_line(
        "markers",
        "kvtcp(nodes=3, replication_factor=None, shards=64, min_insync=None): how kvtcp_cluster and kvtcp_url are "
        "started; the arguments of kvtcp.testing.LocalCluster",
    )
    if config.pluginmanager.hasplugin("asyncio"):
        config.pluginmanager.import_plugin("kvtcp.testing.asyncio_fixtures")


def marker_arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of the nearest marker. Raises pytest.UsageError for positional arguments."""
    marker = request.node.get_closest_marker("kvtcp")
    if marker is None:
        return {}
    if marker.args:
        raise pytest.UsageError("@pytest.mark.kvtcp takes arguments by name only, such as nodes=1")
    return dict(marker.kwargs)


@pytest.fixture
def kvtcp_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a cluster that runs in a thread, for kvtcp.sync; `@pytest.mark.kvtcp(...)` configures it."""
    from kvtcp.testing.local_cluster import LocalCluster

    with LocalCluster.run_in_thread(**marker_arguments(request)) as cluster:
        yield cluster.url
