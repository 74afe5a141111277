"""docs/operations.md against the code: every event that is logged stands in its table."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_event_is_documented() -> None:
    """Who reads a log finds each event word, and no word that nothing logs."""
    text = "\n".join(path.read_text() for path in (ROOT / "kvtcp").rglob("*.py"))
    logged = set(re.findall(r"event=([a-z-]+)", text))
    logged |= set(re.findall(r'\.event\(\s*(?:"(?:info|warning|error)"|level), "([a-z-]+)"', text))
    logged |= set(re.findall(r'_refuse\(\w+(?:\.\w+)*, "([a-z-]+)"', text))
    table = (ROOT / "docs" / "operations.md").read_text().partition("| event | level | meaning |")[2]
    documented = {word for row in table.splitlines() if row.startswith("| `") for word in words_of(row)}
    assert len(logged) > 30
    assert logged == documented


def words_of(row: str) -> list[str]:
    """The words in the first cell of a row."""
    return re.findall(r"`([a-z-]+)`", row.split("|")[1])
