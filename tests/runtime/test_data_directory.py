"""Data directories: identity, lock, and what a refused start leaves."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtcp.runtime import data_directory as identity
from kvtcp.runtime.data_directory import DataDirectory, IdentityError, lock_holder, read_identity, write_identity

NODE: dict[str, Any] = {"cluster": "c", "secret": "s", "node": "n1"}


def test_write_and_read(tmp_path: Path) -> None:
    """What was written is read, and only its owner may read the file."""
    directory = DataDirectory(tmp_path / "a" / "n1", "node")
    assert directory.read() is None
    directory.write(NODE)
    directory.write({**NODE, "secret": "t"})
    assert directory.read() == {"format": 1, "role": "node", **NODE, "secret": "t"}
    assert stat.S_IMODE((directory.path / "identity.json").stat().st_mode) == 0o600
    assert {path.name for path in directory.path.iterdir()} == {"identity.json", "lock"}
    directory.unlock()
    directory.unlock()
    assert read_identity(directory.path, "node") is not None


def test_spawned_nodes(tmp_path: Path) -> None:
    """The coordinator's has the nodes that it spawned, but not after --recover-map; anything else is damage."""
    fields: dict[str, Any] = {"cluster": "c", "secret": "s"}
    for spawned in ({}, {"local": []}, {"local": ["n1", "n3"]}):
        write_identity(tmp_path, "coordinator", fields | spawned)
        assert read_identity(tmp_path, "coordinator") == {"format": 1, "role": "coordinator", **fields, **spawned}
    for damaged in ("n1", [1], {"n1": 5}):
        write_identity(tmp_path, "coordinator", {**fields, "local": damaged})
        with pytest.raises(IdentityError, match="is not an identity of kvtcp"):
            read_identity(tmp_path, "coordinator")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not an identity of kvtcp"), ("[1]", "is not an identity of kvtcp"),
        ('{"format": 1, "role": "node"}', "is not an identity of kvtcp"),
        ('{"format": 1, "role": "node", "cluster": 1, "secret": "s", "node": "n1"}', "is not an identity of kvtcp"),
        ('{"format": 2, "role": "node"}', "has format 2, this version knows format 1"),
        ('{"format": 1, "role": "coordinator"}', "is the data directory of a coordinator, not of a node"),
    ],
)  # fmt: skip
def test_foreign_files(tmp_path: Path, text: str, words: str) -> None:
    """A damaged file, a later format and another role are refused by name."""
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(IdentityError, match=words):
        read_identity(tmp_path, "node")


def test_one_user_at_a_time(tmp_path: Path) -> None:
    """A locked directory is refused with the process that has it; the lock ends with the process."""
    code = (
        "import sys; from pathlib import Path; from kvtcp.runtime.data_directory import DataDirectory; "
        "DataDirectory(Path(sys.argv[1]), 'node'); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        assert lock_holder(tmp_path) == f"process {other.pid}"
        with pytest.raises(IdentityError, match=f"is in use by process {other.pid}"):
            DataDirectory(tmp_path, "node")
        other.kill()
    assert lock_holder(tmp_path) is None
    directory = DataDirectory(tmp_path, "node")
    assert lock_holder(tmp_path) == f"process {os.getpid()}"
    directory.unlock()


def test_nothing_is_left_without_an_identity(tmp_path: Path) -> None:
    """Directories made for a start that was refused go away; those that were there stay, with what is in them."""
    DataDirectory(tmp_path / "a" / "b", "node").unlock()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    DataDirectory(tmp_path / "a", "node").unlock()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    assert lock_holder(tmp_path / "a") is None


def test_unusable_directories(tmp_path: Path) -> None:
    """A file in the way and a file system that takes nothing: a sentence with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match="file cannot be used: File exists"):
        DataDirectory(tmp_path / "file", "node")
    with pytest.raises(IdentityError, match="file/n1 cannot be used: Not a directory"):
        DataDirectory(tmp_path / "file" / "n1", "node")
    with pytest.raises(IdentityError, match="/proc/x/y cannot be used"):
        DataDirectory(Path("/proc/x/y"), "node")


def test_a_failed_write_keeps_the_old_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is a sentence, and the identity on disk is the one before."""
    directory = DataDirectory(tmp_path, "node")
    directory.write(NODE)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(identity.os, "fsync", fail)
    with pytest.raises(IdentityError, match=r"identity\.json cannot be written: No space left on device"):
        directory.write({**NODE, "secret": "other"})
    assert json.loads((tmp_path / "identity.json").read_text())["secret"] == "s"
    directory.unlock()


def test_a_lock_file_removed_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that its last user has removed meanwhile counts for nothing: the new file is locked."""
    flock = identity.fcntl.flock
    removals = [tmp_path / "lock"]

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if removals:
            removals.pop().unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(identity.fcntl, "flock", flock_after_removal)
    directory = DataDirectory(tmp_path, "node")
    assert lock_holder(tmp_path) == f"process {os.getpid()}"
    directory.unlock()


def test_a_temporary_file_of_a_crash(tmp_path: Path) -> None:
    """What a crash left beside the identity is overwritten."""
    (tmp_path / "identity.json.tmp").write_text("half")
    write_identity(tmp_path, "node", NODE)
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]
