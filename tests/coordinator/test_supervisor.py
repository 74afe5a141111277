"""The supervisor: survey, spawn, restart, stop; with real processes that are not nodes where that says more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import kvtcp
from kvtcp.coordinator import supervisor as module
from kvtcp.coordinator.supervisor import ChildProcess, Found, Supervisor, who_is_there
from kvtcp.node.server import NodeServer
from kvtcp.runtime.data_directory import DataDirectory, write_identity
from kvtcp.runtime.process import StartError, bind
from kvtcp.testing import LocalCluster
from tests.processes.cluster import free_ports, is_running
from tests.processes.raw_client import link_number


@contextlib.asynccontextmanager
async def listener(answer: bytes | None) -> AsyncIterator[int]:
    """The port of a server that answers anything with these bytes and closes; None: it never answers."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.read(1)
        if answer is not None:
            writer.write(answer)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def ask(port: int, node: str = "n1", cluster: str = "c", secret: str = "s") -> Found:
    """Who is at the port."""
    return await who_is_there("127.0.0.1", port, node, cluster, secret)


# --- survey -------------------------------------------------------------------------------------------


async def test_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody, a server that says nothing, one that closes, one with another protocol: told apart in bounded time."""
    assert await ask(free_ports(1)) == Found("free")
    monkeypatch.setattr(module, "RECOVER_WAIT_MS", 100)
    async with listener(None) as port:
        assert (await ask(port)).kind == "silent", "it may be a node that is stopped, or a stranger: nobody knows"
    async with listener(b"") as port:
        assert (await ask(port)).kind == "silent", "or one that was killed just now"
    for host in ("a..b", "h" * 100):
        assert (await who_is_there(host, 1, "n1", "c", "s")).kind == "silent", "no name of a host"
    for answer in (b"HTTP/1.1 400 Bad Request\r\n", b"\xce\x00\x00\x00\x01\x01", b"\xce\xff\xff\xff\xff"):
        async with listener(answer) as port:
            assert (await ask(port)).kind == "foreign"


async def test_a_running_cluster_does_not_notice() -> None:
    """A survey finds a running node of the cluster, with its promise, and neither link nor promise change."""
    async with LocalCluster(nodes=1, shards=2) as cluster, kvtcp.connect(cluster.url) as kv:
        coordinator = cluster.coordinator
        replica = cluster.nodes["n1"].replica
        port, name, secret = cluster.nodes["n1"].address[1], coordinator.map.cluster, coordinator.secret
        await kv.put("a", "1")
        before = (replica.promised, replica.coordinator, link_number(coordinator, "n1"))
        assert await ask(port, "n1", name, secret) == Found("ours", promised=1, map_version=1)
        assert (await ask(port, "n2", name, secret)).what == "another node of this cluster"
        assert (await ask(port, "n1", name, "wrong")).what == "a node of another cluster"
        assert (await ask(port, "n1", "wrong", secret)).what == "a node of another cluster"
        await kv.put("a", "2")
        assert (replica.promised, replica.coordinator, link_number(coordinator, "n1")) == before


async def test_a_fresh_node_founds_no_cluster() -> None:
    """A node without an identity does not take the one of a coordinator that only asks."""
    written: list[str] = []
    server = NodeServer("n1", on_identity=lambda cluster, secret: written.append(cluster))
    await server.start("127.0.0.1", 0)
    try:
        assert await ask(server.address[1]) == Found("ours", promised=0)
        assert (server.cluster, server.secret, written) == (None, None, [])
    finally:
        await server.close()


async def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    """A directory of another cluster, a file, one in use: refused, and nothing is made or changed."""
    supervisor = Supervisor("127.0.0.1", {"n1": free_ports(1)}, tmp_path, [], lambda: None)
    (tmp_path / "n1").write_text("")
    with pytest.raises(StartError, match="n1 cannot be used: it is not a directory"):
        await supervisor.survey("c", "s")
    (tmp_path / "n1").unlink()
    (tmp_path / "n1").mkdir()
    directory = DataDirectory(tmp_path / "n1", "node")
    with pytest.raises(StartError, match=r"is in use by process \d+, which does not listen on port \d+"):
        await supervisor.survey("c", "s")
    directory.unlock()
    write_identity(tmp_path / "n1", "node", {"cluster": "other", "secret": "s", "node": "n1"})
    with pytest.raises(StartError, match=r"n1 belongs to another cluster \(other, this one is c\)"):
        await supervisor.survey("c", "s")
    assert [path.name for path in (tmp_path / "n1").iterdir()] == ["identity.json"]
    assert supervisor.processes == {}


async def test_a_node_with_another_directory(tmp_path: Path) -> None:
    """A node of this cluster that runs on another data directory is not adopted."""
    server = NodeServer("n1", cluster="c", secret="s")
    await server.start("127.0.0.1", 0)
    try:
        supervisor = Supervisor("127.0.0.1", {"n1": server.address[1]}, tmp_path, [], lambda: None)
        with pytest.raises(StartError, match="with a data directory other than"):
            await supervisor.survey("c", "s")
    finally:
        await server.close()


async def test_a_node_that_ends_during_the_survey(tmp_path: Path) -> None:
    """It has no port any more and still its directory: a moment later it can be spawned."""
    (tmp_path / "n1").mkdir()
    directory = DataDirectory(tmp_path / "n1", "node")
    supervisor = Supervisor("127.0.0.1", {"n1": free_ports(1)}, tmp_path, [], lambda: None)
    asyncio.get_running_loop().call_later(0.3, directory.unlock)
    assert await supervisor.survey("c", "s") == {"n1": Found("free")}
    assert supervisor._adopt == set()


async def test_a_node_that_is_killed_during_the_survey(tmp_path: Path) -> None:
    """It takes a connection and never answers: a moment later it can be spawned."""
    (tmp_path / "n1").mkdir()
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(listener(b""))
        supervisor = Supervisor("127.0.0.1", {"n1": port}, tmp_path, [], lambda: None)
        survey = asyncio.create_task(supervisor.survey("c", "s"))
        await asyncio.sleep(0)
        assert (await ask(port)).kind == "silent"
        await stack.aclose()
        assert await survey == {"n1": Found("free")}


async def test_a_node_that_reads_its_data_back(tmp_path: Path) -> None:
    """It has its directory and its port, and does not listen yet, for as long as that takes: it is adopted."""
    (tmp_path / "n1").mkdir()
    directory = DataDirectory(tmp_path / "n1", "node")
    with bind("127.0.0.1", 0) as bound:
        supervisor = Supervisor("127.0.0.1", {"n1": bound.getsockname()[1]}, tmp_path, [], lambda: None)
        assert await supervisor.survey("c", "s") == {"n1": Found("free")}
        assert supervisor._adopt == {"n1"}
    directory.unlock()


async def test_a_node_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections, never answers and has its directory: it is adopted, the others need not wait for it."""
    monkeypatch.setattr(module, "RECOVER_WAIT_MS", 100)
    (tmp_path / "n1").mkdir()
    directory = DataDirectory(tmp_path / "n1", "node")
    async with listener(None) as port:
        supervisor = Supervisor("127.0.0.1", {"n1": port}, tmp_path, [], lambda: None)
        assert (await supervisor.survey("c", "s"))["n1"].kind == "silent"
        assert supervisor._adopt == {"n1"}
    directory.unlock()


# --- life of a process ----------------------------------------------------------------------------------


def node_process(tmp_path: Path, code: str) -> ChildProcess:
    """A process that runs this code instead of a node."""
    return ChildProcess("n1", [sys.executable, "-c", code], tmp_path)


async def test_back_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A process that dies at once is started again after pauses that double up to the maximum; stop ends the pause."""
    monkeypatch.setattr(module, "BACKOFF_MIN_MS", 10)
    monkeypatch.setattr(module, "BACKOFF_MAX_MS", 40)
    process = node_process(tmp_path, "exit(3)")
    with caplog.at_level(logging.WARNING, "kvtcp.supervisor"):
        await process.start()
        watcher = asyncio.create_task(process.watch())
        async with asyncio.timeout(20):
            while process.restarts < 4:
                await asyncio.sleep(0.005)
        monkeypatch.setattr(module, "BACKOFF_MAX_MS", 60_000)
        await process.stop(asked=False)
        async with asyncio.timeout(5):
            await watcher
    pauses = [int(number) for number in re.findall(r"restart_in_ms=(\d+)", caplog.text)]
    assert pauses[:4] == [10, 20, 40, 40]
    assert process.first_exit == 3
    assert process.process is not None and not is_running(process.process.pid)


async def test_a_spawn_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no process can be made the supervisor keeps trying."""
    monkeypatch.setattr(module, "BACKOFF_MIN_MS", 5)
    process = node_process(tmp_path, "exit(0)")
    await process.start()
    real, failures = process.start, [OSError(11, "Resource temporarily unavailable")] * 2

    async def start() -> None:
        if failures:
            raise failures.pop()
        await real()

    monkeypatch.setattr(process, "start", start)
    watcher = asyncio.create_task(process.watch())
    async with asyncio.timeout(20):
        while not process.restarts:
            await asyncio.sleep(0.005)
    assert failures == []
    await process.stop(asked=False)
    await watcher


@pytest.mark.parametrize(
    ("code", "asked", "expected"),
    [
        ("import sys; print(flush=True); sys.stdin.read()", False, -signal.SIGTERM),
        ("import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)", True, -9),
    ],
)
async def test_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, asked: bool, expected: int) -> None:
    """SIGTERM at once for a process that was not asked; one that ignores STOP and SIGTERM is killed. No restart."""
    monkeypatch.setattr(module, "STOP_MS", 500)
    process = node_process(tmp_path, code)
    process.process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.process.stdout is not None
    await process.process.stdout.readline()
    watcher = asyncio.create_task(process.watch())
    await process.stop(asked)
    async with asyncio.timeout(5):
        await watcher
    assert process.process.returncode == expected
    assert process.restarts == 0


async def test_no_start_after_stop(tmp_path: Path) -> None:
    """Once stopped, nothing is spawned any more, whoever asks."""
    process = node_process(tmp_path, "exit(0)")
    await process.stop(asked=False)
    await process.start()
    assert process.process is None


async def test_a_start_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second node cannot be spawned the start is refused, and `stop` ends the first."""
    base = free_ports(2)
    supervisor = Supervisor("127.0.0.1", {"n1": base, "n2": base + 1}, tmp_path, [], lambda: None)
    assert await supervisor.survey("c", "s") == {"n1": Found("free"), "n2": Found("free")}
    real, calls = asyncio.create_subprocess_exec, []

    async def spawn(*command: str, **options: object) -> asyncio.subprocess.Process:
        calls.append(command)
        if len(calls) == 2:
            raise OSError(11, "Resource temporarily unavailable")
        return await real(*command, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
    with pytest.raises(StartError, match="node n2 cannot be spawned: Resource temporarily unavailable"):
        await supervisor.start("c", "s")
    first = supervisor.processes["n1"].process
    assert first is not None and is_running(first.pid)
    await supervisor.stop(set())
    assert not is_running(first.pid)


async def test_a_watcher_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in a watcher ends the coordinator instead of leaving a node unsupervised in silence."""
    failed = asyncio.Event()
    supervisor = Supervisor("127.0.0.1", {"n1": free_ports(1)}, tmp_path, [], failed.set)
    await supervisor.survey("c", "s")

    async def fail(self: ChildProcess) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(ChildProcess, "watch", fail)
    await supervisor.start("c", "s")
    async with asyncio.timeout(5):
        await failed.wait()
    assert str(supervisor.failure) == "a defect"
    await supervisor.stop(set())


async def test_nodes_that_are_left(tmp_path: Path) -> None:
    """A coordinator that was deposed lets its nodes run on, and restarts none of them any more."""
    supervisor = Supervisor("127.0.0.1", {"n1": free_ports(1)}, tmp_path, ["--durability", "memory"], lambda: None)
    await supervisor.survey("c", "s")
    await supervisor.start("c", "s")
    process = supervisor.processes["n1"].process
    assert process is not None
    await supervisor.leave()
    assert is_running(process.pid)
    process.kill()
    await process.wait()
    assert supervisor.processes["n1"].restarts == 0 and supervisor.failure is None


async def test_a_node_that_leaves_the_cluster(tmp_path: Path) -> None:
    """A node that was removed is not started again when it ends; restarts are told of local nodes only."""
    supervisor = Supervisor("127.0.0.1", {"n1": free_ports(1)}, tmp_path, ["--durability", "memory"], lambda: None)
    await supervisor.survey("c", "s")
    await supervisor.start("c", "s")
    process = supervisor.processes["n1"].process
    assert process is not None and supervisor.restarts_of("n1") == 0 and supervisor.restarts_of("n2") is None
    supervisor.release("n1")
    supervisor.release("n2")
    process.kill()
    async with asyncio.timeout(5):
        await asyncio.gather(*supervisor._watchers)
    assert supervisor.restarts_of("n1") == 0 and supervisor.early_exits() == {}
    await supervisor.stop(set())


async def test_a_port_bound_by_nobody_listening() -> None:
    """A socket that is bound and does not listen refuses connections: the survey finds the port free."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert await ask(bound.getsockname()[1]) == Found("free")
