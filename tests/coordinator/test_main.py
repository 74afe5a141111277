"""The command line of kvtcp-coordinator; tests/processes/test_processes.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtcp.coordinator import main as coordinator_main
from kvtcp.coordinator.settings import Settings


def test_the_command_line_and_the_settings_agree() -> None:
    """Every flag is a setting, with one default; what is given is taken."""
    parser = coordinator_main.make_parser()
    assert Settings(**vars(parser.parse_args([]))) == Settings()
    given = ["--num-nodes", "2", "--data-dir", "d", "--nodes", "a:1", "--recover-map", "--no-resp", "--host", "::1"]
    assert Settings(**vars(parser.parse_args(given))) == Settings(
        num_nodes=2, data_dir=Path("d"), nodes="a:1", recover_map="all", no_resp=True, host="::1"
    )


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`main` answers 2 and one sentence, and removes the directory it made."""
    for arguments in (["--shards", "0"], ["--main-port", "70000"], ["--nodes", "x"]):
        assert coordinator_main.main([*arguments, "--data-dir", str(tmp_path / "d")]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("kvtcp-coordinator: ")
    assert list(tmp_path.iterdir()) == []
