"""docs/promises.md names tests; they are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PROMISES = TESTS.parent / "docs" / "promises.md"


def test_every_named_test_exists() -> None:
    """A promise whose test was renamed or removed is a promise without a test."""
    named = re.findall(r"`((?:\w+/)*test_\w+)::(test_\w+)`", PROMISES.read_text())
    assert len(named) > 25
    missing = [
        f"{module}::{function}"
        for module, function in named
        if not (TESTS / f"{module}.py").exists()
        or not re.search(rf"^(async )?def {function}\(", (TESTS / f"{module}.py").read_text(), re.M)
    ]
    assert not missing
