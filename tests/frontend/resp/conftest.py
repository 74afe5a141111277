"""A client of the Redis face in a world of its own."""

from __future__ import annotations

import pytest

from tests.support.resp_tools import Client, World


@pytest.fixture
def client() -> Client:
    """It has asked for nothing yet."""
    return World().connect()
