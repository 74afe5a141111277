"""What the tests of processes share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.cluster import ProcessCluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ProcessCluster]:
    """Three nodes, not started."""
    made = ProcessCluster(tmp_path)
    yield made
    made.close()
