"""docs/redis.md lists every command and every test of Redis that is left out."""

import json
import re
from pathlib import Path

from kvtcp import constants
from kvtcp.frontend.resp.commands.table import COMMANDS

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "redis.md").read_text()


def test_every_command_is_listed() -> None:
    """And no other."""
    section = TEXT.split("## Commands\n")[1].split("The options are")[0]
    assert set(re.findall(r"`([A-Z.]+)`", section)) == {name.decode() for name in COMMANDS}


def test_every_test_left_out_is_listed() -> None:
    """With the reason that the suite has for it."""
    skips = json.loads((ROOT / "tests" / "redis" / "skips.json").read_text())["skips"]
    for file, tests in skips.items():
        rows = re.findall(r"^\| (.+) \| (.+) \|$", TEXT.split(f"**{file}**\n")[1].split("\n**")[0], re.MULTILINE)
        assert dict(rows[1:]) == tests if rows[0][0] == "test" else dict(rows) == tests, file


def test_the_limits() -> None:
    """They are those of the code."""
    flat = " ".join(TEXT.split())
    assert f"Keys have 1 to {constants.KEY_BYTES_MAX:,} bytes" in flat
    most = f"{constants.MULTI_KEYS_MAX:,}"
    assert f"{constants.RESP_KEYS_MAX:,} keys (`MGET` {most}), a transaction {most} commands" in flat
    assert f"the last {constants.SCAN_CURSORS_MAX:,}, for ten minutes" in flat
    assert constants.SCAN_CURSOR_IDLE_MS == 600_000
    assert f"at most {constants.PAGE_ITEMS_MAX:,} keys" in flat
