"""Real processes for tests: start bin/kvtcp-coordinator or bin/kvtcp-node, wait for the ready line, stop by id.

Output goes to files, not pipes: a node that outlives its coordinator keeps the descriptor, and a pipe would never end.
`ProcessCluster.close` ends everything that was ever started in its data directory and fails if that takes long.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import kvtcp
from kvtcp.runtime.data_directory import lock_holder

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 20.0
T = TypeVar("T")
# tests that run side by side have ranges of their own
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2
_ports = itertools.count(10_000 + _WORKER * 8_000 + os.getpid() * 37 % 6_500)


def wait_for(look: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true value of `look`; AssertionError naming `what` after the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        value = look()
        if value:
            return value
        assert time.monotonic() < until, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.01)


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody uses now, outside the range of automatic ports.

    No port is given twice, so that none still has connections of an earlier test in TIME_WAIT.
    """
    for _ in range(2_000):
        base = next(_ports)
        for _ in range(count - 1):
            next(_ports)
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
    raise AssertionError("no free ports")


def fill(url: str, count: int = 200, prefix: str = "k") -> dict[bytes, bytes]:
    """Put pairs and return them."""
    pairs = {f"{prefix}{number:05d}".encode(): b"v%d" % number for number in range(count)}
    with kvtcp.sync.connect(url) as kv:
        kv.put_many(pairs)
    return pairs


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_waiting(pid: int) -> bool:
    """Whether the main thread of a process sleeps, so that a signal wakes it; true where the system does not say."""
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "S"


class Command:
    """One running command of bin/, or module of the tests if there is a dot in its name, with its output in files."""

    def __init__(self, directory: Path, name: str, *arguments: object, new_group: bool = False) -> None:
        program = ["-m", name] if "." in name else [str(ROOT / "bin" / name)]
        number = len(list(directory.glob(f"{name}.*.out")))
        self.out = directory / f"{name}.{number}.out"
        self.err = directory / f"{name}.{number}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)} if "." in name else os.environ,
                process_group=0 if new_group else None,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def ready(self) -> str:
        """The ready line, waited for; AssertionError with what it said if it ended instead."""

        def look() -> str:
            assert self.process.poll() is None, f"exit {self.process.returncode}: {self.err.read_text()}"
            text = self.out.read_text()
            return text if text.endswith("\n") else ""

        return wait_for(look, f"the ready line of {self.out.name}")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def ended(self, within_s: float = DEADLINE_S) -> int:
        """Its exit code, waited for."""
        return self.process.wait(within_s)

    def stop(self) -> None:
        """A clean stop."""
        self.signal(signal.SIGTERM)
        assert self.ended(15) == 0, self.err.read_text()

    def refused(self) -> str:
        """The one sentence of a start that was refused, after exit code 2; AssertionError for anything else."""
        code = self.ended()
        text = self.err.read_text()
        assert code == 2, f"exit {code}: {text}"
        assert self.out.read_text() == "", "a command that refuses prints nothing on stdout"
        assert text.count("\n") == 1 and text.endswith("\n"), f"one sentence, not: {text}"
        return text.rstrip("\n")


class ProcessCluster:
    """A cluster of real processes in `directory`: data in `data`, output in files beside it."""

    def __init__(self, directory: Path, nodes: int = 3, orphan_ms: int = 10_000) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.base_port = free_ports(nodes)
        self.orphan_ms = orphan_ms
        self.url = ""
        self.commands: list[Command] = []
        self.seen: set[int] = set()  # process ids of nodes that this cluster ever had, as far as a test looked

    def run(self, name: str, *arguments: object, new_group: bool = False) -> Command:
        """Start a command of bin/; `close` ends it."""
        command = Command(self.directory, name, *arguments, new_group=new_group)
        self.commands.append(command)
        return command

    def launch(self, *arguments: object, new_group: bool = False) -> Command:
        """Start a coordinator on this data directory without waiting for anything. Later flags win."""
        return self.run(
            "kvtcp-coordinator", "--num-nodes", len(self.nodes), "--main-port", 0, "--base-port", self.base_port,
            "--data-dir", self.data, "--backup-dir", self.directory / "backups", "--orphan-ms", self.orphan_ms,
            *arguments, new_group=new_group,
        )  # fmt: skip

    def start(self, *arguments: object, new_group: bool = False) -> Command:
        """Start a coordinator and wait until it is ready; `url` is its address."""
        command = self.launch(*arguments, new_group=new_group)
        found = re.search(r"kvtcp://\S+", command.ready())
        assert found is not None
        self.url = found.group()
        self.pids()
        return command

    def pid(self, node: str) -> int:
        """Process id of a node, 0 if it does not run."""
        holder = lock_holder(self.data / node) if (self.data / node).exists() else None
        text = (holder or "").split()[-1:]  # a process that just took the lock has not written its id yet
        pid = int(text[0]) if text and text[0].isdigit() else 0
        self.seen |= {pid} - {0}
        return pid

    def pids(self) -> dict[str, int]:
        """Process ids of all nodes."""
        return {node: self.pid(node) for node in self.nodes}

    def running(self) -> set[int]:
        """Which of the nodes seen so far, and of the commands, still run."""
        self.pids()
        return {pid for pid in self.seen | {command.pid for command in self.commands} if is_running(pid)}

    def close(self) -> None:
        """End everything that was started."""
        for command in self.commands:
            if command.process.poll() is None:
                command.signal(signal.SIGTERM)
        for command in self.commands:
            try:
                command.ended(12)
            except subprocess.TimeoutExpired:
                command.signal(signal.SIGKILL)
                command.ended()
        for pid in self.pids().values():
            if pid:
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.running(), "the end of all processes of a test")
