"""The command line of kvtcp-node; tests/test_processes.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtcp.server import node_main
from kvtcp.server.identity import write_identity


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a start that is refused with exit code 2."""
    assert node_main.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err.strip()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong values are one sentence each, and no directory is made for them."""
    at = ["--id", "n1", "--data-dir", tmp_path / "n1"]
    assert "--port must be a port" in refusal(capsys, *at, "--port", 70000)
    assert "--id 'a/b' must be 1 to 32 letters" in refusal(capsys, *at, "--id", "a/b")
    assert "--durability os is not available" in refusal(capsys, *at, "--durability", "os")
    assert "--allow-insecure" in refusal(capsys, *at, "--host", "0.0.0.0")
    assert "cannot be used" in refusal(capsys, *at, "--host", "203.0.113.1", "--allow-insecure")
    assert list(tmp_path.iterdir()) == []


def test_directories_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory of another node or of a coordinator is refused and not changed."""
    write_identity(tmp_path, "node", {"cluster": "c", "secret": "s", "node": "n2"})
    before = (tmp_path / "identity.json").read_bytes()
    at = ["--id", "n1", "--port", 0, "--data-dir", tmp_path]
    assert "is the data directory of node n2, not of n1" in refusal(capsys, *at)
    assert (tmp_path / "identity.json").read_bytes() == before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Without an id or with an unknown flag argparse ends the command with 2."""
    for arguments in ([], ["--id", "n1", "--data-dir", "x", "--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            node_main.main(arguments)
        assert ended.value.code == 2
    assert "--spawned" not in node_main.make_parser().format_help()
    capsys.readouterr()
