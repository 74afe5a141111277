"""The commands of bin/ as real processes: start, serve, stop, kill, refuse."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kvtcp
from kvtcp.errors import Code
from kvtcp.protocol.framing import FrameEncoder
from kvtcp.protocol.link import HELLO, LINK_VERSION
from tests.processes.cluster import ROOT, ProcessCluster, fill, free_ports, is_running, wait_for


def content(directory: Path) -> dict[str, bytes]:
    """Every file under `directory` and its bytes; of a lock file only that it is there: it names its last user."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() and path.name != "lock" else b""
        for path in sorted(directory.rglob("*"))
    }


# --- stop ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything(cluster: ProcessCluster, number: int) -> None:
    """The coordinator serves three nodes; after a signal it exits with 0 within 10 s and nothing is left."""
    command = cluster.start()
    pairs = fill(cluster.url)
    with kvtcp.sync.connect(cluster.url) as kv:
        assert dict(kv.scan()) == pairs
        status = kv.status()
        assert (status["state"], status["nodes"], status["replication_factor"]) == ("ok", 3, 3)
    assert all(cluster.pids().values())
    command.signal(number)
    assert command.ended(10) == 0
    assert cluster.running() == set()
    assert command.err.read_text() == "", "a clean life says nothing at the default log level"


def test_ctrl_c_on_the_process_group(cluster: ProcessCluster) -> None:
    """Ctrl-C reaches the whole group of the terminal; the coordinator stops its nodes in order."""
    command = cluster.start("--loop", "asyncio", new_group=True)
    os.killpg(command.pid, signal.SIGINT)
    os.killpg(command.pid, signal.SIGINT)  # an impatient user changes nothing
    assert command.ended(10) == 0
    assert cluster.running() == set()
    assert command.err.read_text() == ""


def test_a_signal_during_the_start(cluster: ProcessCluster) -> None:
    """SIGTERM when the nodes were just spawned and are not linked yet: exit 0, nothing left."""
    command = cluster.launch()
    wait_for(lambda: any(cluster.pids().values()), "a node")
    command.signal(signal.SIGTERM)
    assert command.ended(10) == 0
    wait_for(lambda: not cluster.running(), "the end of the nodes", 1)


def test_a_stopped_node_process_is_killed(cluster: ProcessCluster) -> None:
    """A node that does not react to STOP and SIGTERM (here: frozen by SIGSTOP) is killed within the 10 s."""
    command = cluster.start()
    os.kill(cluster.pid("n2"), signal.SIGSTOP)
    command.signal(signal.SIGTERM)
    assert command.ended(10.5) == 0
    assert cluster.running() == set()


def test_writes_during_a_stop(cluster: ProcessCluster) -> None:
    """A client that goes on writing while the coordinator stops is told the truth: at most the one write that was
    under way when the connection closed has an unknown outcome, later ones were not executed."""
    command = cluster.start()
    outcomes = []
    with kvtcp.sync.connect(cluster.url, timeout=0.5) as kv:
        kv.put("a", "1")
        command.signal(signal.SIGTERM)
        while command.process.poll() is None:
            try:
                kv.put("a", "2")
                outcomes.append("ok")
            except kvtcp.OutcomeUnknown:
                outcomes.append("unknown")
            except kvtcp.Unavailable:
                outcomes.append("refused")
    assert outcomes.count("unknown") <= 1
    assert outcomes == sorted(outcomes, key=["ok", "unknown", "refused"].index), "in this order only"
    assert command.ended(10) == 0


# --- kill ---------------------------------------------------------------------------------------------


def test_a_killed_node_comes_back_and_learns(cluster: ProcessCluster) -> None:
    """kill -9 of a node that keeps its data in memory: reads and writes go on without it, it is started again, learns
    everything and is in sync again by itself; and so it does a second time."""
    cluster.start("--durability", "memory", "--log-level", "info")
    pairs = fill(cluster.url, 1_000)
    with kvtcp.sync.connect(cluster.url) as kv:
        for number in range(2):
            old = cluster.pid("n2")
            os.kill(old, signal.SIGKILL)
            began = time.monotonic()
            for n in range(64):
                key = f"during{n}-{number}".encode()
                kv.put(key, "1")  # one after the other: each acknowledged by those that are left
                pairs[key] = b"1"
            assert time.monotonic() - began < 5
            wait_for(lambda old=old: cluster.pid("n2") not in (0, old), "the restart of n2")
            wait_for(lambda: kv.status()["state"] == "ok", "n2 in sync")
            assert dict(kv.scan()) == pairs
        wait_for(lambda: all(len(shard["insync"]) == 3 for shard in kv.shards()), "the map that says so")
        wait_for(lambda: {node["keys"] for node in kv.nodes()} == {len(pairs)}, "the figures of all nodes")
        assert [node["restarts"] for node in kv.nodes()] == [0, 2, 0]
    said = cluster.commands[0].err.read_text()
    assert said.count("event=left-in-sync node=n2 shards=64 first=0 reason=connection") == 2
    assert said.count("event=joined-in-sync node=n2") == 2 * 64


def test_a_killed_coordinator_is_replaced(cluster: ProcessCluster) -> None:
    """kill -9 of the coordinator: a new one adopts the running nodes with all data, supervises and stops them."""
    first = cluster.start("--durability", "memory")
    pairs = fill(cluster.url)
    with kvtcp.sync.connect(cluster.url) as kv:
        positions = [(shard["seq"], shard["commit"]) for shard in kv.shards()]
    pids = cluster.pids()
    first.signal(signal.SIGKILL)
    first.ended()
    second = cluster.start("--log-level", "info", "--durability", "memory")
    assert cluster.pids() == pids, "adopted, not started anew"
    assert second.err.read_text().count("event=adopted") == 3
    with kvtcp.sync.connect(cluster.url) as kv:
        assert [(shard["seq"], shard["commit"]) for shard in kv.shards()] == positions
        assert dict(kv.scan()) == pairs
        kv.put("after", "1")
        os.kill(pids["n3"], signal.SIGKILL)
        wait_for(lambda: cluster.pid("n3") not in (0, pids["n3"]), "the restart of an adopted node")
        wait_for(lambda: kv.status()["state"] == "ok", "n3 in sync")
        assert dict(kv.scan()) == {**pairs, b"after": b"1"}
    second.signal(signal.SIGTERM)
    assert second.ended(10) == 0
    assert cluster.running() == set()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_deposed_coordinator(cluster: ProcessCluster, loop: str) -> None:
    """A node that promised a higher epoch: the coordinator says that it is not the owner any more and exits with 1. Its
    nodes run on, they are the other one's now."""
    command = cluster.start("--loop", loop)
    fill(cluster.url, 10)
    identity = json.loads((cluster.data / "coordinator" / "identity.json").read_text())
    hello = {
        "version": LINK_VERSION, "cluster": identity["cluster"], "secret": identity["secret"], "epoch": 7,
        "coordinator": "another", "link": 1, "node": "n2", "durability": "sync", "map_version": 0,
        "heard_version": 0, "map": None,
        "shards": list(range(64)),
    }  # fmt: skip
    with socket.create_connection(("127.0.0.1", cluster.base_port + 1)) as link:
        link.sendall(FrameEncoder().encode((HELLO, hello)))
        assert command.ended(10) == 1
    last = command.err.read_text().splitlines()[-1]
    assert last.startswith("kvtcp-coordinator: this coordinator does not own the cluster any more: n2 says: epoch 1 is")
    assert "Traceback" not in command.err.read_text()
    assert all(cluster.pids().values()), "the nodes run on"


def test_orphans_stop_by_themselves(tmp_path: Path) -> None:
    """Spawned nodes whose coordinator was killed end after the orphan time."""
    cluster = ProcessCluster(tmp_path, orphan_ms=2_000)  # longer than a start takes on a loaded machine
    try:
        command = cluster.start()
        pids = cluster.pids()
        command.signal(signal.SIGKILL)
        command.ended()
        wait_for(lambda: not any(is_running(pid) for pid in pids.values()), "the end of the orphans", 15)
    finally:
        cluster.close()


@pytest.mark.slow
def test_an_old_copy_of_the_map_is_refused(cluster: ProcessCluster) -> None:
    """Nodes that know more than the map, running or not: an older copy of the map, or none, is refused, and nothing is
    changed; with the newest one everything goes on."""
    path = cluster.data / "coordinator" / "map.json"
    first = cluster.start()
    pairs = fill(cluster.url)
    old = path.read_bytes()
    for _ in range(2):
        first.signal(signal.SIGKILL)
        first.ended()
        first = cluster.start()
    assert json.loads(path.read_bytes())["value"]["epoch"] == 3
    for is_running_on in (True, False):
        first.signal(signal.SIGKILL if is_running_on else signal.SIGTERM)
        first.ended()
        newest = path.read_bytes()
        for _ in range(2):
            path.write_bytes(old)
            command = cluster.launch()
            sentence = command.refused()
            assert re.search(r"node n\d promised epoch \d, the cluster map has 1: map.json .* an older copy", sentence)
            assert path.read_bytes() == old, "it cannot catch up"
        path.unlink()
        missing = cluster.launch().refused()
        assert re.search(r"node n\d promised epoch \d .* there is no cluster map: map.json is missing", missing)
        path.write_bytes(newest)
        first = cluster.start()
        with kvtcp.sync.connect(cluster.url) as kv:
            assert dict(kv.scan()) == pairs


# --- refusals -----------------------------------------------------------------------------------------


def refuse(cluster: ProcessCluster, *arguments: object) -> str:
    """Start with these flags; the sentence of the refusal, after checking that nothing changed and nothing runs."""
    before = content(cluster.directory / "data") if cluster.data.is_dir() else None
    running = cluster.running()
    command = cluster.launch(*arguments)
    sentence = command.refused()
    after = content(cluster.data) if cluster.data.is_dir() else None
    assert before == after, "a refused start changes nothing"
    assert cluster.running() == running, "a refused start leaves nothing running"
    return sentence.removeprefix("kvtcp-coordinator: ")


def test_values_that_do_not_fit(cluster: ProcessCluster, tmp_path: Path) -> None:
    """Bad flags on a fresh directory: one sentence, exit 2, and no directory is made."""
    assert "needs at least 3 nodes, there are 2" in refuse(cluster, "--num-nodes", 2, "--replication-factor", 3)
    assert "has no credentials or encryption yet" in refuse(cluster, "--host", "0.0.0.0")
    a_file = tmp_path / "file"
    a_file.write_text("")
    assert f"{a_file}/coordinator cannot be used: Not a directory" in refuse(cluster, "--data-dir", a_file)
    assert "/proc/kvtcp/coordinator cannot be used" in refuse(cluster, "--data-dir", "/proc/kvtcp")
    assert f"backup directory {a_file} cannot be used" in refuse(cluster, "--backup-dir", a_file)


def test_a_foreign_process_on_a_port(cluster: ProcessCluster) -> None:
    """Somebody else on the main port or on the port of a node."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in refuse(
            cluster, "--main-port", port
        )
    with socket.create_server(("127.0.0.1", cluster.base_port + 1)):
        sentence = refuse(cluster)
        assert f"port {cluster.base_port + 1} of 127.0.0.1, meant for node n2, is in use" in sentence


def test_a_directory_of_other_values_or_in_use(cluster: ProcessCluster, tmp_path: Path) -> None:
    """The cluster's fixed values cannot be changed by a restart, and one directory has one coordinator."""
    first = cluster.start()
    assert f"is in use by process {first.pid}" in refuse(cluster)
    other = ProcessCluster(tmp_path / "other")
    other.directory.mkdir()
    other.base_port = cluster.base_port
    sentence = refuse(other)
    assert "meant for node n1, is in use by a node of another cluster" in sentence
    first.signal(signal.SIGKILL)
    first.ended()
    assert f"in use by process {cluster.pid('n1')}" in refuse(cluster, "--base-port", free_ports(3))
    last = cluster.start()
    last.signal(signal.SIGTERM)
    assert last.ended(10) == 0
    assert "created with --shards 64, not 8" in refuse(cluster, "--shards", 8)
    assert "created with --replication-factor 3, not 2" in refuse(cluster, "--replication-factor", 2)
    assert "--min-insync must be from 1 to the replication factor 3, not 4" in refuse(cluster, "--min-insync", 4)
    assert "has 3 local nodes, not 2: to have fewer, start it as it is" in refuse(cluster, "--num-nodes", 2)
    directory = cluster.data / "coordinator"
    identity = (directory / "identity.json").read_bytes()
    (directory / "identity.json").unlink()
    assert f"identity.json is missing in {directory}, and map.json is there" in refuse(cluster)
    (directory / "identity.json").write_bytes(identity.replace(b'"cluster": "', b'"cluster": "x'))
    assert "map.json and identity.json in" in refuse(cluster)
    (directory / "identity.json").write_bytes(identity)
    cluster_map = (directory / "map.json").read_bytes()
    (directory / "map.json").write_bytes(cluster_map[:-1])
    assert "map.json is damaged" in refuse(cluster)
    (directory / "map.json").write_bytes(cluster_map.replace(b'"format": 1', b'"format": 9'))
    assert "map.json has format 9" in refuse(cluster)
    (directory / "map.json").unlink()
    (directory / "identity.json").unlink()
    assert "n1 belongs to another cluster" in refuse(cluster)


def test_a_node_that_dies_while_starting(cluster: ProcessCluster) -> None:
    """A node that cannot start ends the whole start; what was spawned beside it is stopped."""
    # bound, not listening: the survey finds the port free, the node finds it taken
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", cluster.base_port + 2))
        command = cluster.launch()
        assert command.ended(15) == 2
    text = command.err.read_text()
    assert "node n3 ended with code 2 while starting; its message is above" in text
    assert f"kvtcp-node: port {cluster.base_port + 2} of 127.0.0.1 cannot be used" in text
    assert "Traceback" not in text
    assert cluster.running() == set()


# --- nodes started elsewhere ----------------------------------------------------------------------------


def test_adopted_nodes_survive_a_start_that_fails(cluster: ProcessCluster) -> None:
    """A coordinator started with another durability than the running nodes is refused; they run on with all data."""
    first = cluster.start("--durability", "memory")
    pairs = fill(cluster.url)
    pids = cluster.pids()
    first.signal(signal.SIGKILL)
    first.ended()
    sentence = cluster.launch().refused()
    assert "it was started with --durability memory, the coordinator with --durability sync" in sentence
    assert cluster.pids() == pids
    cluster.start("--durability", "memory")
    with kvtcp.sync.connect(cluster.url) as kv:
        assert dict(kv.scan()) == pairs


def test_nodes_started_by_hand(cluster: ProcessCluster) -> None:
    """`--nodes host:port,...` uses nodes of bin/kvtcp-node, and leaves them running when it stops."""
    nodes = [
        cluster.run("kvtcp-node", "--id", node, "--port", cluster.base_port + n, "--data-dir", cluster.data / node)
        for n, node in enumerate(cluster.nodes)
    ]
    for node in nodes:
        assert node.ready().startswith("kvtcp-node n")
    addresses = ",".join(f"127.0.0.1:{cluster.base_port + n}" for n in range(3))
    swapped = ",".join(reversed(addresses.split(",")))
    flags = ["--main-port", 0, "--data-dir", cluster.data, "--backup-dir", cluster.directory / "backups"]
    refused = cluster.run("kvtcp-coordinator", "--nodes", swapped, *flags)
    assert "meant for n1, is another node of this cluster" in refused.refused()
    assert not (cluster.data / "n1" / "identity.json").exists(), "a refused coordinator founds no cluster"
    coordinator = cluster.run("kvtcp-coordinator", "--nodes", addresses, *flags)
    url = coordinator.ready().split()[3]
    pairs = fill(url)
    secret = cluster.data / "n1" / "identity.json"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    coordinator.signal(signal.SIGTERM)
    assert coordinator.ended(10) == 0
    assert all(node.process.poll() is None for node in nodes)
    again = cluster.run("kvtcp-coordinator", "--nodes", addresses, *flags)
    with kvtcp.sync.connect(again.ready().split()[3]) as kv:
        assert dict(kv.scan()) == pairs
    for node in nodes:
        node.signal(signal.SIGTERM)
    assert [node.ended(5) for node in nodes] == [0, 0, 0]


def test_a_coordinator_that_ends_in_a_restore(cluster: ProcessCluster) -> None:
    """What a `replace` left in pieces stays closed for the next coordinators, until a restore completes."""
    nodes = [
        cluster.run("kvtcp-node", "--id", node, "--port", cluster.base_port + n, "--data-dir", cluster.data / node)
        for n, node in enumerate(cluster.nodes)
    ]
    addresses = ",".join(f"127.0.0.1:{cluster.base_port + n}" for n in range(3))
    flags = ["--nodes", addresses, "--main-port", 0, "--data-dir", cluster.data]
    flags += ["--backup-dir", cluster.directory / "backups"]

    def start() -> tuple[Any, str]:
        coordinator = cluster.run("kvtcp-coordinator", *flags)
        return coordinator, coordinator.ready().split()[3]

    coordinator, url = start()
    pairs = fill(url, 5_000)
    with kvtcp.sync.connect(url) as kv:
        kv.backup("base")
        with pytest.raises(kvtcp.KvtcpError):
            # the first progress of the restore itself tells of the first chunk that was put
            kv.restore("base", "replace", progress=lambda p: "pairs_done" in p and coordinator.signal(signal.SIGTERM))
    assert coordinator.ended(10) == 0
    for _ in range(2):
        coordinator, url = start()
        with kvtcp.sync.connect(url, timeout=0.5) as kv:
            assert kv.status()["degraded"] == ["all keys are closed until a restore completes"]
            with pytest.raises(kvtcp.Unavailable) as closed:
                kv.get("k00001")
            assert closed.value.code == Code.RESTORING
        coordinator.signal(signal.SIGTERM)
        assert coordinator.ended(10) == 0
    coordinator, url = start()
    with kvtcp.sync.connect(url) as kv:
        kv.restore("base", "replace")
        assert dict(kv.scan()) == pairs
    coordinator.signal(signal.SIGKILL)
    coordinator.ended()
    coordinator, url = start()
    with kvtcp.sync.connect(url) as kv:
        assert kv.status()["state"] == "ok" and dict(kv.scan()) == pairs
    coordinator.signal(signal.SIGTERM)
    assert coordinator.ended(10) == 0
    for node in nodes:
        node.signal(signal.SIGTERM)
        assert node.ended(5) == 0


def test_what_a_node_refuses(cluster: ProcessCluster) -> None:
    """A node with a taken port, a wrong id or another node's directory says so and exits with 2."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        taken = cluster.run("kvtcp-node", "--id", "n1", "--port", port, "--data-dir", cluster.data / "n1")
        assert f"port {port} of 127.0.0.1 cannot be used" in taken.refused()
    assert not cluster.data.exists(), "a refused start leaves no directory"
    wrong = cluster.run("kvtcp-node", "--id", "n 1", "--data-dir", cluster.data / "n1")
    assert "must be 1 to 32 letters" in wrong.refused()


# --- the rest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kvtcp-coordinator", "kvtcp-node"])
def test_version_and_help(name: str) -> None:
    """`--version` names the version; `--help` has a text for every flag and shows the defaults."""

    def output(flag: str) -> str:
        command = [sys.executable, str(ROOT / "bin" / name), flag]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    assert output("--version") == f"kvtcp {kvtcp.__version__}\n"
    text = " ".join(output("--help").split())
    for words in ("--host", "(default: 127.0.0.1)", "--data-dir", "--log-level", "(default: warning)", "--durability"):
        assert words in text
    assert "--orphan-ms" not in text


def test_secrets_are_private(cluster: ProcessCluster) -> None:
    """The files that hold the cluster's secret are readable by their owner only."""
    cluster.start()
    for directory in ("coordinator", *cluster.nodes):
        assert stat.S_IMODE((cluster.data / directory / "identity.json").stat().st_mode) == 0o600


def test_closed_output(cluster: ProcessCluster) -> None:
    """With stdout closed at the reading end, and stderr too, the cluster starts, serves and stops with 0."""
    flags: list[Any] = [
        "--main-port", free_ports(1), "--base-port", free_ports(4) + 1, "--data-dir", cluster.data,
        "--backup-dir", cluster.directory / "b",
    ]  # fmt: skip
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(ROOT / "bin" / "kvtcp-coordinator"), *map(str, flags)]
    process = subprocess.Popen(command, stdout=write_end, stderr=write_end, stdin=subprocess.DEVNULL)
    os.close(write_end)

    def answers() -> bool:
        assert process.poll() is None
        try:
            with kvtcp.sync.connect(f"kvtcp://127.0.0.1:{flags[1]}", timeout=0.2) as kv:
                return bool(kv.put("a", "1"))
        except kvtcp.Unavailable:
            return False

    try:
        wait_for(answers, "a cluster without output")
        cluster.pids()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    assert cluster.running() == set()


def test_start_is_quick(cluster: ProcessCluster) -> None:
    """Three nodes are ready within seconds even on a loaded machine."""
    began = time.monotonic()
    cluster.start()
    assert time.monotonic() - began < 15
