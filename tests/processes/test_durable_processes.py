"""Durable clusters as real processes: stopped, killed, on failing and full disks, in foreign directories."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtcp
from kvtcp.errors import Code
from kvtcp.storage.disk.store import ASIDE
from tests.crash import kill_run
from tests.processes.cluster import ROOT, ProcessCluster, fill, free_ports, wait_for

MIB = 1 << 20


def content(url: str) -> dict[bytes, bytes]:
    """Every pair."""
    with kvtcp.sync.connect(url, timeout=5.0) as kv:
        assert kv.status()["state"] == "ok", kv.status()["degraded"]
        return dict(kv.scan())


def check(directory: Path) -> tuple[int, str]:
    """Exit code and output of `kvtcp-node --check`."""
    command = [sys.executable, str(ROOT / "bin" / "kvtcp-node"), "--check", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


# --- restarts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["sync", pytest.param("os", marks=pytest.mark.slow)])
def test_a_stopped_cluster_has_its_data(cluster: ProcessCluster, durability: str) -> None:
    """Stop and start, twice: everything is there, also time to live, revisions go on, and the epoch went up."""
    command = cluster.start("--durability", durability)
    pairs = fill(cluster.url, 500)
    with kvtcp.sync.connect(cluster.url) as kv:
        kv.put("mortal", "1", ttl=3600)
        rev = kv.put("counted", "1")
        assert kv.status()["durability"] == durability
    for epoch in (2, 3):
        command.stop()
        command = cluster.start("--durability", durability)
        with kvtcp.sync.connect(cluster.url) as kv:
            assert kv.status()["epoch"] == epoch
            assert {key: kv[key] for key in pairs} == pairs
            ttl = kv.ttl("mortal")
            assert ttl is not None and 3000 < ttl <= 3600
            rev, before = kv.put("counted", "2"), rev
            assert rev > before
    command.stop()
    for node in cluster.nodes:
        code, text = check(cluster.data / node)
        assert (code, text.splitlines()[-1]) == (0, "ok"), text
        assert "stopped in order" in text and "64 shards, 64 of them whole" in text


def test_a_killed_node_comes_back_with_its_data(cluster: ProcessCluster) -> None:
    """kill -9 of a node: writes go on without it; after its restart it is sent what it lacks, nothing more, and is in
    sync again by itself."""
    cluster.start("--log-level", "info")
    pairs = fill(cluster.url, 500)
    old = cluster.pid("n2")
    os.kill(old, signal.SIGKILL)
    pairs |= fill(cluster.url, 100, "after")
    with kvtcp.sync.connect(cluster.url, timeout=10.0) as kv:
        wait_for(lambda: kv.status()["state"] == "ok", "a whole cluster")
        assert cluster.pid("n2") not in (0, old)
    assert content(cluster.url) == pairs
    # the state is ok when the last copies count, which is before the map with them is stored
    log = cluster.commands[0].err
    wait_for(lambda: log.read_text().count("event=joined-in-sync node=n2") == 64, "64 copies to join")
    said = log.read_text()
    assert "event=left-in-sync node=n2 shards=64" in said
    assert "event=pulling" not in said, "no copy is made anew"


@pytest.mark.parametrize(("durability", "factor"), [("sync", 3), pytest.param("os", 1, marks=pytest.mark.slow)])
def test_kills_during_an_import(tmp_path: Path, durability: str, factor: int) -> None:
    """kill -9 of a node, of the coordinator and of all at once under load: every acknowledged record is there."""
    report = kill_run.run(tmp_path, 4, factor, durability, seed=11)
    assert sum(report.kills.values()) == 4 and set(report.kills) == {"node", "coordinator", "all"}
    assert report.acknowledged > 500, report


def test_snapshots_on_demand(cluster: ProcessCluster) -> None:
    """SIGUSR1 snapshots every shard and lets go of the log; a restart reads the snapshots."""
    command = cluster.start("--shards", 8)
    pairs = fill(cluster.url, 2_000)
    first = {node: sorted(os.listdir(cluster.data / node / "log"))[0] for node in cluster.nodes}
    command.signal(signal.SIGUSR1)  # which passes it on
    for node in cluster.nodes:
        snapshots = cluster.data / node / "snapshots"
        wait_for(lambda s=snapshots: len(list(s.glob("*.snapshot"))) == 8, f"the snapshots of {node}")
    more = fill(cluster.url, 50, "more")
    for node in cluster.nodes:
        log = cluster.data / node / "log"
        wait_for(lambda log=log, node=node: first[node] not in os.listdir(log), f"the end of the old log of {node}")
    cluster.commands[0].signal(signal.SIGKILL)
    for pid in cluster.pids().values():
        os.kill(pid, signal.SIGKILL)
    command.ended()
    wait_for(lambda: not cluster.running(), "the end of all processes")
    cluster.start()
    assert content(cluster.url) == pairs | more


# --- failing disks --------------------------------------------------------------------------------------


def needs(tool: str) -> None:
    """Skip where a tool is missing; continuous integration has all of them."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


def test_a_failed_sync_ends_the_node(cluster: ProcessCluster) -> None:
    """The n-th fdatasync fails: the node ends with 1 and says why; no acknowledgement after it, nothing is lost."""
    needs("strace")
    port = cluster.base_port
    arguments = ["--id", "n1", "--port", port, "--data-dir", cluster.data / "n1", "--log-level", "error"]
    trace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=fdatasync",
             "-e", "inject=fdatasync:error=EIO:when=40+"]  # fmt: skip
    err = cluster.directory / "traced.err"
    with err.open("wb") as stream:
        traced = subprocess.Popen(
            [*trace, sys.executable, str(ROOT / "bin" / "kvtcp-node"), *map(str, arguments)],
            stdout=subprocess.DEVNULL, stderr=stream,
        )  # fmt: skip
    try:
        coordinator = cluster.run(
            "kvtcp-coordinator", "--nodes", f"127.0.0.1:{port}", "--main-port", 0, "--data-dir", cluster.data,
            "--backup-dir", cluster.directory / "backups",
        )  # fmt: skip
        url = coordinator.ready().split()[3]
        acknowledged = {}
        with kvtcp.sync.connect(url, timeout=2.0) as kv:
            try:
                for number in range(1_000):
                    kv.put(f"k{number}", str(number))
                    acknowledged[f"k{number}".encode()] = str(number).encode()
            except (kvtcp.OutcomeUnknown, kvtcp.Unavailable):
                pass
            assert 10 < len(acknowledged) < 100
            assert traced.wait(20) == 1
            text = err.read_text()
            assert "the disk failed: " in text and "Input/output error" in text and "Traceback" not in text
            again = cluster.run("kvtcp-node", *arguments)
            again.ready()
            wait_for(lambda: kv.status()["state"] == "ok", "the node")
            found = dict(kv.scan())
        assert {key: found.get(key) for key in acknowledged} == acknowledged
        assert len(found) <= len(acknowledged) + 1
    finally:
        if traced.poll() is None:
            traced.kill()
            traced.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 MiB."""
    needs("mount")
    directory = tmp_path / "small"
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "kvtcp-test", str(directory)], check=False)
    if done.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """Growing writes are refused before anything fails; reads and deletes go on; with space writes come back."""
    cluster = ProcessCluster(tmp_path, nodes=1)
    cluster.data = small_disk / "data"
    value = b"x" * 64_000
    try:
        command = cluster.start("--replication-factor", 1, "--shards", 8)
        written = []
        with kvtcp.sync.connect(cluster.url, timeout=5.0) as kv:
            with pytest.raises(kvtcp.Unavailable) as refused:
                for number in range(5_000):
                    kv.put(f"k{number:04d}", value, timeout=4.0)
                    written.append(f"k{number:04d}")
            assert refused.value.code == Code.NO_SPACE, refused.value
            assert "n1" in str(refused.value)
            assert 700 < len(written) < 2_500
            assert any("space" in sentence for sentence in kv.status()["degraded"])
            assert kv.get(written[0]) == value, "reads go on"
            assert kv.count() == len(written)
            for key in written[:-10]:
                assert kv.delete(key), "deletes go on"

            def grows() -> bool:
                try:
                    return bool(kv.put("new", value, timeout=0.2))
                except kvtcp.Unavailable as error:
                    assert error.code == Code.NO_SPACE, error
                    return False

            wait_for(grows, "space for a write")
            wait_for(lambda: kv.status()["state"] == "ok", "a cluster with space")
        command.stop()
        cluster.start("--replication-factor", 1)
        assert content(cluster.url) == {**{key.encode(): value for key in written[-10:]}, b"new": value}
    finally:
        cluster.close()


# --- damage ---------------------------------------------------------------------------------------------


def test_damage_is_named_and_kept(cluster: ProcessCluster) -> None:
    """A flipped bit in the log of one node: --check and the node name file and place, the others are read, the file is
    kept aside, and nothing of it is served."""
    command = cluster.start("--shards", 4)
    pairs = fill(cluster.url, 2_000)
    command.stop()
    segment = max((cluster.data / "n1" / "log").glob("*.log"), key=lambda path: path.stat().st_size)
    damaged = bytearray(segment.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    segment.write_bytes(damaged)
    code, text = check(cluster.data / "n1")
    assert code == 7 and f"damaged: {segment} at byte" in text, text
    assert text.splitlines()[-1] == "damaged"
    command = cluster.start()
    assert f"event=damage node=n1 what={segment} at byte" in command.err.read_text()
    kept = cluster.data / "n1" / ASIDE / "1" / segment.name
    assert kept.read_bytes() == damaged
    with kvtcp.sync.connect(cluster.url, timeout=5.0) as kv:
        assert dict(kv.scan()) == pairs, "the other members have everything"
        wait_for(lambda: kv.status()["state"] == "ok", "new copies on n1")
        assert dict(kv.scan()) == pairs
    said = re.search(r"event=left-in-sync node=n1 shards=(\d+) .* reason=it has .*damage.*", command.err.read_text())
    assert said is not None and segment.name in said.group()
    command.stop()
    for node in cluster.nodes:
        code, text = check(cluster.data / node)
        assert code == 0 and "4 shards, 4 of them whole" in text, text
    assert kept.read_bytes() == damaged, "what was damaged stays for people to look at"


@pytest.mark.slow
def test_an_older_copy_of_a_node(cluster: ProcessCluster) -> None:
    """The directory of a node is put back as it was before: it is no member, and alone it serves nothing rather than
    something old; when those with the data are back they serve, and it learns from them."""
    cluster.start("--shards", 4).stop()
    old, whole = cluster.directory / "old", cluster.directory / "whole"
    shutil.copytree(cluster.data / "n1", old)
    command = cluster.start()
    pairs = fill(cluster.url, 500)
    command.stop()
    shutil.rmtree(cluster.data / "n1")
    shutil.copytree(old, cluster.data / "n1")
    whole.mkdir()
    for node in ("n2", "n3"):
        (cluster.data / node).rename(whole / node)
    command = cluster.start("--log-level", "error")
    with kvtcp.sync.connect(cluster.url, timeout=1.0) as kv:
        with pytest.raises(kvtcp.Unavailable, match="n1 .*older copy.*n2 came back without its data") as refused:
            kv.get("k00001")
        assert refused.value.code == Code.SHARD_DOWN and kv.status()["down"] == 4
    command.stop()
    for node in ("n2", "n3"):
        shutil.rmtree(cluster.data / node)
        (whole / node).rename(cluster.data / node)
    for _ in range(2):
        command = cluster.start()
        with kvtcp.sync.connect(cluster.url, timeout=5.0) as kv:
            assert dict(kv.scan()) == pairs
            wait_for(lambda: kv.status()["state"] == "ok", "new copies on n1")
            assert dict(kv.scan()) == pairs
        command.stop()
    first, second = (each.err.read_text() for each in cluster.commands[-2:])
    assert re.search(r"event=left-in-sync node=n1 shards=4 first=0 reason=it has .*older copy", first), first
    assert second == "", "the second start finds everything as it shall be"


# --- refusals -------------------------------------------------------------------------------------------


def node_refuses(cluster: ProcessCluster, *arguments: object) -> str:
    """The sentence of a node that does not start."""
    node = cluster.run("kvtcp-node", "--port", free_ports(1), *arguments)
    return node.refused().removeprefix("kvtcp-node: ")


def test_directories_that_a_node_refuses(cluster: ProcessCluster) -> None:
    """In use, of another node, of another mode, of another version, damaged: one sentence, exit 2, nothing changed."""
    command = cluster.start()
    directory = cluster.data / "n1"
    assert f"is in use by process {cluster.pid('n1')}" in node_refuses(cluster, "--id", "n1", "--data-dir", directory)
    code, text = check(directory)
    assert code == 2 and "is in use by process" in text
    command.stop()
    assert "is the data directory of node n1" in node_refuses(cluster, "--id", "n2", "--data-dir", directory)
    sentence = node_refuses(cluster, "--id", "n1", "--data-dir", directory, "--durability", "memory")
    assert "holds durable data" in sentence
    manifest = directory / "manifest.json"
    whole = manifest.read_text()
    for format_version in (0, 2):
        manifest.write_text(json.dumps({**json.loads(whole), "format": format_version}))
        sentence = node_refuses(cluster, "--id", "n1", "--data-dir", directory)
        assert f"has format {format_version}, this version of kvtcp knows format 1" in sentence
    manifest.write_text(whole.replace('"promised": 1', '"promised": 7'))
    assert "manifest.json is damaged" in node_refuses(cluster, "--id", "n1", "--data-dir", directory)
    manifest.unlink()
    assert "has data and no manifest.json" in node_refuses(cluster, "--id", "n1", "--data-dir", directory)
    code, text = check(directory)
    assert code == 7 and "has data and no manifest.json" in text
    manifest.write_text(whole)
    assert len(content_after_start(cluster)) == 0


def content_after_start(cluster: ProcessCluster) -> dict[bytes, bytes]:
    """Everything is as it was."""
    cluster.start()
    return content(cluster.url)


def test_directories_that_a_coordinator_refuses(cluster: ProcessCluster) -> None:
    """The directory of one node; a cluster whose nodes are elsewhere: one sentence, and nothing is made."""
    cluster.start().stop()
    text = cluster.launch("--data-dir", cluster.data / "n1").refused()
    assert "is the data directory of a node" in text and not (cluster.data / "n1" / "coordinator").exists()
    for node in cluster.nodes:
        (cluster.data / node).rename(cluster.directory / node)
    assert "list them with --nodes" in cluster.launch().refused()
    assert not any((cluster.data / node).exists() for node in cluster.nodes)
    for node in cluster.nodes:
        (cluster.directory / node).rename(cluster.data / node)
    assert content_after_start(cluster) == {}


def test_a_coordinator_and_nodes_of_different_modes(cluster: ProcessCluster) -> None:
    """A node that keeps its data otherwise than the coordinator promises is refused with one sentence."""
    node = cluster.run("kvtcp-node", "--id", "n1", "--port", cluster.base_port, "--data-dir", cluster.data / "n1",
                       "--durability", "os")  # fmt: skip
    node.ready()
    coordinator = cluster.run("kvtcp-coordinator", "--nodes", f"127.0.0.1:{cluster.base_port}", "--main-port", 0,
                              "--data-dir", cluster.data, "--durability", "sync")  # fmt: skip
    sentence = coordinator.refused()
    assert "n1" in sentence and "os" in sentence and "sync" in sentence, sentence
