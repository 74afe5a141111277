"""Commands for the cluster as a whole, in every form."""

import json
from pathlib import Path

import pytest

from kvtcp.errors import DataError, Unavailable
from kvtcp.protocol.hashing import shard_of
from kvtcp.storage.backup import archive
from tests.support.shell_fakes import Shell

GOLDEN: list[tuple[list[str], str]] = [
    (["status"], "version\t0.1.0\nkeys\t0\nready\tyes\nmemory.rss_bytes\t7\nmemory.peak\t-\n"),
    (["status", "-o", "raw"], "version\t0.1.0\nkeys\t0\nready\tyes\nmemory.rss_bytes\t7\nmemory.peak\t-"),
    (["status", "-o", "jsonl"],
     '{"version": "0.1.0", "keys": 0, "ready": true, "memory": {"rss_bytes": 7, "peak": null}}\n'),
    (["status", "-o", "table"],
     "version           0.1.0\nkeys              0\nready             yes\n"
     "memory.rss_bytes  7 B\nmemory.peak       -\n"),
    (["nodes"], "node\taddress\tup\tlag_ms\nn1\t127.0.0.1:5000\tyes\t0.5\nn2\t127.0.0.1:5001\tno\t-\n"),
    (["nodes", "-o", "table"],
     "node  address         up   lag_ms\n----  --------------  ---  ------\n"
     "n1    127.0.0.1:5000  yes  0.5 ms\nn2    127.0.0.1:5001  no   -\n"),
    (["nodes", "-o", "jsonl"],
     '{"node": "n1", "address": "127.0.0.1:5000", "up": true, "lag_ms": 0.5}\n'
     '{"node": "n2", "address": "127.0.0.1:5001", "up": false, "lag_ms": null}\n'),
    (["where", "{a}b"], f"shard\tin_sync\tkeys\n{shard_of(b'a', 64)}\tn1; n2\t{shard_of(b'a', 64) * 10}\n"),
    (["backup", "b1"], "name\tb1\nkeys\t0\n"),
    (["backup", "b1", "-o", "jsonl"], '{"name": "b1", "keys": 0}\n'),
    (["backup"], "name\t2026-01-01T00-00-00\nkeys\t0\n"),
    (["restore", "b1"], "name\tb1\nmode\tmerge\nprefix\t-\ndry_run\tno\n"),
    (["restore", "backups/b1/", "replace"], "name\tb1\nmode\treplace\nprefix\t-\ndry_run\tno\n"),
    (["restore", "b1", "merge", "prefix=u:", "dry-run"], "name\tb1\nmode\tmerge\nprefix\tu:\ndry_run\tyes\n"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "out"), GOLDEN, ids=[" ".join(row[0]) for row in GOLDEN])
def test_output(shell: Shell, arguments: list[str], out: str) -> None:
    """Every command prints exactly this and ends with 0."""
    assert (shell.run(*arguments), shell.out.decode(), shell.err) == (0, out, "")


def test_shards_in_all_forms(shell: Shell) -> None:
    """`shards` has a line for each shard, and its JSON form is one array."""
    shell.run("shards")
    assert shell.out.startswith(b"shard\tin_sync\tkeys\n0\tn1; n2\t0\n1\tn1; n2\t10\n")
    assert shell.out.count(b"\n") == 65
    shell.run("shards", "-o", "json")
    assert json.loads(shell.out)[63] == {"shard": 63, "in_sync": ["n1", "n2"], "keys": 630}


def test_restore_modes_exclude_each_other(shell: Shell) -> None:
    """merge and replace together are a mistake."""
    assert shell.run("restore", "b1", "merge", "replace") == 2
    assert "merge and replace exclude each other" in shell.err


@pytest.mark.parametrize("path", ["/", "/elsewhere/b1", "./b1", "b1/", "backups/../b1", "other/backups/b1", "~/b1"])
def test_restore_refuses_paths(shell: Shell, path: str) -> None:
    """A path could name another backup than the servers' one of that name; no server is asked."""
    assert shell.run("restore", path) == 2
    assert shell.err == (
        "kvtcp-shell: restore takes the name of a backup in the servers' backup directory, not a path; "
        "copy it there first\n"
    )
    assert shell.client.opened == []


@pytest.mark.parametrize("word", ["", "backups/"])
def test_restore_needs_a_name(shell: Shell, word: str) -> None:
    """No name is no backup."""
    assert shell.run("restore", word) == 2
    assert "does not name a backup" in shell.err


def test_unreachable_cluster(shell: Shell) -> None:
    """Administration meets the same codes as everything else."""
    shell.client.failure = Unavailable("no connection to kvtcp://127.0.0.1:8000 within 2 s, nothing was sent")
    assert shell.run("status") == 3
    assert shell.err == "kvtcp-shell: no connection to kvtcp://127.0.0.1:8000 within 2 s, nothing was sent\n"


REPORT = archive.VerifyReport(pairs=10, bytes=200, files=3, shards=64, cluster="c-1", created="2026-01-01T00:00:00Z")


def test_verify_needs_no_server(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` reads the directory from here and shows its report."""
    seen: list[Path] = []
    monkeypatch.setattr(archive, "verify", lambda path: seen.append(path) or REPORT)
    assert shell.run("verify", str(tmp_path)) == 0
    assert (seen, shell.client.opened) == ([tmp_path], [])
    assert shell.out == b"pairs\t10\nbytes\t200\nfiles\t3\nshards\t64\ncluster\tc-1\ncreated\t2026-01-01T00:00:00Z\n"


def test_verify_finds_a_name_among_the_backups(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no directory here is looked for in backups/; a directory here goes first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backups" / "monday").mkdir(parents=True)
    seen: list[Path] = []
    monkeypatch.setattr(archive, "verify", lambda path: seen.append(path) or REPORT)
    assert shell.run("verify", "monday") == 0
    (tmp_path / "monday").mkdir()
    assert shell.run("verify", "monday") == 0
    assert seen == [Path("backups/monday"), Path("monday")]


def test_verify_suggests_the_backup_of_that_name(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path to nothing is an error, which names the backup of that name in backups/ only if there is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "backups" / "monday").mkdir(parents=True)
    assert shell.run("verify", "old/monday") == 7
    assert shell.err.endswith("old/monday/manifest.json: no such backup; did you mean backups/monday?\n")
    assert shell.run("verify", "old/tuesday") == 7
    assert shell.err.endswith("old/tuesday/manifest.json: no such backup\n")


def test_verify_of_a_damaged_backup(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage ends with 7, and the sentence names file and line."""

    def verify(path: Path) -> None:
        raise DataError("node-n1.jsonl, line 3: not JSON")

    monkeypatch.setattr(archive, "verify", verify)
    assert shell.run("verify", "b") == 7
    assert (shell.out, shell.err) == (b"", "kvtcp-shell: node-n1.jsonl, line 3: not JSON\n")
