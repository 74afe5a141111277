"""What the tests of the shell share."""

import pytest

from tests.support.shell_fakes import Shell


@pytest.fixture
def shell() -> Shell:
    """A shell over an empty cluster."""
    return Shell()
