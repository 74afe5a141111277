"""Tools for tests against the real servers: LocalCluster, and the fixtures of `kvtcp.testing.pytest_plugin`.

LocalCluster is imported when it is first used (PEP 562): where kvtcp is installed, pytest loads the plugin, and so this
package, at every start.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtcp.testing.local_cluster import LocalCluster

__all__ = ["LocalCluster"]


def __getattr__(name: str) -> Any:
    if name != "LocalCluster":
        raise AttributeError(f"module 'kvtcp.testing' has no attribute {name!r}")
    from kvtcp.testing.local_cluster import LocalCluster

    return LocalCluster
