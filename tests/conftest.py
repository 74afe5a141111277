"""What every test of the project needs: the plugin that users get, and signals that work wherever it was started.

The plugin comes from its entry point if kvtcp is installed, else by name. A shell ignores SIGINT for what it starts in
the background, nohup SIGHUP, and children inherit both. SIGINT is given back to the tests and every process they start;
SIGHUP only to the tests that ask for it, so that nohup keeps its meaning for the rest.
"""

import signal
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

if not any(entry.value == "kvtcp.testing.pytest_plugin" for entry in entry_points(group="pytest11")):
    pytest_plugins = ["kvtcp.testing.pytest_plugin"]

pytest_plugins = [*globals().get("pytest_plugins", []), "pytester"]

signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP is not ignored by the processes that this test starts; this one does nothing about it."""
    before = signal.signal(signal.SIGHUP, lambda number, frame: None)
    yield
    signal.signal(signal.SIGHUP, before)
