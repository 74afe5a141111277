"""The command line of kvtcp-node; tests/processes/test_processes.py runs it."""

from __future__ import annotations

import os
from pathlib import Path
from zlib import crc32

import pytest

from kvtcp.node import main as node_main
from kvtcp.runtime.data_directory import DataDirectory, write_identity
from kvtcp.storage.disk.store import NodeStore
from tests.crash.fake_disk import QuickDisk
from tests.support.storage_tools import add_copies, fill, open_small, take_snapshot


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
    """With an unknown flag or mode argparse ends the command with 2; without an id it says what is needed."""
    assert "--id and --data-dir are needed" in refusal(capsys)
    at = ["--id", "n1", "--data-dir", "x"]
    for arguments in ([*at, "--nonsense"], [*at, "--durability", "perhaps"]):
        with pytest.raises(SystemExit) as ended:
            node_main.main(arguments)
        assert ended.value.code == 2
    assert "--spawned" not in node_main.make_parser().format_help()
    capsys.readouterr()


# --- check ------------------------------------------------------------------------------------------


def stored(directory: Path) -> NodeStore:
    """A directory as a node that was stopped in order leaves it, with segments and a snapshot."""
    store = open_small(QuickDisk(), directory=directory, boot=node_main.boot_id())
    add_copies(store)
    fill(store, 12)
    take_snapshot(store, 0)
    fill(store, 4, first=12)
    store.close_clean()
    return store


def check(capsys: pytest.CaptureFixture[str], directory: Path) -> tuple[int, list[str]]:
    """Exit code and lines of `--check`; nothing is changed."""
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    code = node_main.main(["--check", str(directory)])
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out.splitlines()


def test_check_of_a_whole_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is described, and the last line is ok."""
    store = stored(tmp_path)
    code, lines = check(capsys, tmp_path)
    keys = sum(len(copy.table) for copy in store.copies.values())
    assert code == 0 and lines[-1] == "ok" and f"3 shards, 3 of them whole, {keys} keys" in lines
    assert "stopped in order" in lines[0]


def test_check_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 7, and a line that names file and place."""
    store = stored(tmp_path)
    path = store.log.segments[-2].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, lines = check(capsys, tmp_path)
    assert code == node_main.EXIT_DAMAGED == 7 and lines[-1] == "damaged"
    assert any(line.startswith(f"damaged: {path} at byte ") for line in lines)
    assert any("would be incomplete" in line and str(path) in line for line in lines)


def test_check_of_a_damaged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 7 too, with what to do."""
    stored(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert node_main.main(["--check", str(tmp_path)]) == 7
    assert f"{path} is damaged" in capsys.readouterr().err


def test_check_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A place without a directory, without a manifest, or with data of another version: one sentence, exit code 2."""
    assert "is not a directory" in refusal(capsys, "--check", tmp_path / "none")
    assert "has no manifest.json" in refusal(capsys, "--check", tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = stored(tmp_path)
    path = store.snapshot_directory / store.snapshots[0].name.file
    data = path.read_bytes()
    head = data[:8] + b"\x00\x09" + data[10:12]
    path.write_bytes(head + crc32(data[16:56], crc32(head)).to_bytes(4, "big") + data[16:])
    assert "has format 9, this version of kvtcp knows format 1" in refusal(capsys, "--check", tmp_path)


def test_check_of_a_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A running node's directory is not looked at: the process that has it is named."""
    directory = DataDirectory(tmp_path, "node")
    try:
        sentence = refusal(capsys, "--check", tmp_path)
    finally:
        directory.unlock()
    assert f"is in use by process {os.getpid()}: stop the node first" in sentence


def test_durable_data_is_not_left_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A node in mode memory does not start beside data of a mode that keeps some; damage stops every mode."""
    stored(tmp_path)
    at = ["--id", "n1", "--port", 0, "--data-dir", tmp_path]
    assert "holds durable data" in refusal(capsys, *at, "--durability", "memory")
    (tmp_path / "manifest.json").unlink()
    assert "has data and no manifest.json" in refusal(capsys, *at, "--durability", "sync")
