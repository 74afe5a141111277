"""The contract of config stores, run on each of them, and what sending a change again means."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvtcp.cluster.file_store import FileConfigStore
from kvtcp.cluster.memory_store import MemoryConfigStore
from kvtcp.cluster.store import ConfigStore, Outcome, Stored
from tests.crash.fake_disk import QuickDisk


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ConfigStore:
    """An empty store."""
    made: dict[str, Callable[[], ConfigStore]] = {
        "memory": MemoryConfigStore,
        "file": lambda: FileConfigStore(tmp_path / "map.json", QuickDisk()),
    }
    return made[request.param]()


async def test_compare_and_set(store: ConfigStore) -> None:
    """The value changes only from the version that is expected; versions count from 1."""
    assert await store.read() is None
    assert await store.compare_and_set(1, b"0") is Outcome.CONFLICT
    assert await store.compare_and_set(None, b'{"a": 1}') is Outcome.DONE
    assert await store.read() == Stored(1, b'{"a": 1}')
    for expected in (None, 0, 2):
        assert await store.compare_and_set(expected, b"2") is Outcome.CONFLICT
    assert await store.compare_and_set(1, b"[\n2]") is Outcome.DONE
    assert await store.read() == Stored(2, b"[\n2]")
    assert await store.compare_and_set(1, b"[\n2]") is Outcome.CONFLICT, "made once it is not made again"
