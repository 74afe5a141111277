"""docs/architecture.md against the code: its layers name every module, and its times are the constants."""

from __future__ import annotations

import re
from pathlib import Path

from kvtcp import constants

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_every_module_of_the_servers_is_told() -> None:
    """Who looks for a module of the cores or of the servers finds it in its layer."""
    (layers,) = re.findall(r"^```\n(constants.*?)```", TEXT, re.M | re.S)
    for name in ("protocol", "replication", "server"):
        (told,) = re.findall(rf"^{name}/\S*(.*?)(?=^\w|\Z)", layers, re.M | re.S)
        modules = {path.stem for path in (ROOT / "kvtcp" / name).glob("*.py")} - {"__init__"}
        missing = modules - set(re.findall(r"\w+", told)) - {"coordinator_main", "node_main"}
        assert not missing, f"{name}: {sorted(missing)}"


def test_the_times_are_those_of_the_code() -> None:
    """Each row of the table is a constant and its value."""
    rows = re.findall(r"^\| `(\w+_MS)` \| ([\d,]+) \|", TEXT, re.M)
    assert len(rows) >= 10
    assert [(name, int(value.replace(",", ""))) for name, value in rows] == [
        (name, getattr(constants, name)) for name, _ in rows
    ]
