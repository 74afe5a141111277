"""Clusters that tests of the cores begin with, where no other shape is asked for: three nodes and one shard."""

from __future__ import annotations

import pytest

from tests.support.controller_world import World
from tests.support.replication_fakes import Cluster


@pytest.fixture
def cluster() -> Cluster:
    """A sequencer over replicas."""
    return Cluster(shards=1)


@pytest.fixture
def world() -> World:
    """A controller over nodes."""
    return World()
