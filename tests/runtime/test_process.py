"""What the two server commands share."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtcp.runtime import process as runtime
from kvtcp.runtime.process import StartError
from tests.processes.cluster import ROOT


def parse(*arguments: str) -> argparse.Namespace:
    """The common flags."""
    parser = argparse.ArgumentParser()
    runtime.add_common_arguments(parser)
    return parser.parse_args(arguments)


def run(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python that runs this code to its end."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, timeout=20, **streams)


async def test_unexpected_errors_are_told() -> None:
    """An exception in a callback is passed on, since what it left behind may be damaged; one of the system is not."""
    loop = asyncio.get_running_loop()
    seen: list[BaseException] = []
    runtime.on_unexpected_errors(seen.append)

    def fail(error: Exception) -> None:
        raise error

    loop.call_soon(fail, OSError("no descriptors"))
    loop.call_soon(fail, KeyError("damaged"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert [type(error) for error in seen] == [KeyError]


def test_defaults_are_accepted() -> None:
    """The defaults are loopback, sync, warnings, and pass the check."""
    options = parse()
    runtime.check_common_arguments(options)
    assert (options.host, options.durability, options.log_level) == ("127.0.0.1", "sync", "warning")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "::", "example.org", ""])
def test_hosts_that_others_reach(host: str) -> None:
    """A host that is not loopback needs --allow-insecure."""
    with pytest.raises(StartError, match="--allow-insecure"):
        runtime.check_common_arguments(parse("--host", host))
    runtime.check_common_arguments(parse("--host", host, "--allow-insecure"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_hosts(host: str) -> None:
    """Loopback addresses and their usual name need nothing."""
    runtime.check_common_arguments(parse("--host", host))


def test_durability(capsys: pytest.CaptureFixture[str]) -> None:
    """There are three modes; another one is refused, never silently weaker."""
    for mode in ("sync", "os", "memory"):
        assert parse("--durability", mode).durability == mode
    with pytest.raises(SystemExit):
        parse("--durability", "fsync")
    assert "invalid choice: 'fsync' (choose from 'sync', 'os', 'memory')" in capsys.readouterr().err


def test_ports() -> None:
    """Ports are from 0 to 65535."""
    assert [runtime.check_port(port, "--port") for port in (0, 65535)] == [0, 65535]
    for port in (-1, 65536):
        with pytest.raises(StartError, match=f"--port must be a port from 0 to 65535, not {port}"):
            runtime.check_port(port, "--port")


def test_addresses() -> None:
    """IPv6 addresses are printed as a URL needs them."""
    assert runtime.join_address("127.0.0.1", 80) == "127.0.0.1:80"
    assert runtime.join_address("::1", 80) == "[::1]:80"


@pytest.mark.parametrize(("name", "module"), [("asyncio", "asyncio"), ("uvloop", "uvloop"), ("auto", "uvloop")])
def test_the_loop_is_the_one_asked_for(name: str, module: str) -> None:
    """`--loop` chooses the event loop, `auto` takes uvloop where it is installed; the exit code comes back."""
    code = (
        "import asyncio, sys; from kvtcp.runtime import process as runtime\n"
        "async def main(): print(type(asyncio.get_running_loop()).__module__); return 7\n"
        "sys.exit(runtime.run(main, sys.argv[1]))"
    )
    done = run(code, name)
    assert (done.returncode, done.stdout.split(".")[0].strip(), done.stderr) == (7, module, "")


@pytest.mark.usefixtures("hangup")
async def test_stop_signals() -> None:
    """SIGTERM, SIGINT and SIGHUP call back; if they were ignored, SIGINT does so all the same and SIGHUP not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop = asyncio.get_running_loop()
    came = asyncio.Queue[str]()
    runtime.on_stop_signals(lambda: came.put_nowait("stop"))
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
            async with asyncio.timeout(5):
                assert await came.get() == "stop"
        loop.remove_signal_handler(signal.SIGHUP)
        old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        runtime.on_stop_signals(lambda: came.put_nowait("stop"))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, old)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def test_a_stdout_that_nobody_reads() -> None:
    """The ready line on a broken pipe is logged instead, and the process ends with its own exit code."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from kvtcp.runtime import process; process.set_up_logging('warning'); process.announce('ready'); exit(3)"
    done = run(code, stdout=write_end)
    os.close(write_end)
    assert done.returncode == 3
    assert "event=stdout-closed" in done.stderr and done.stderr.count("\n") == 1


def test_logging_level() -> None:
    """The level of --log-level is the one of the log."""
    code = (
        "import logging; from kvtcp.runtime import process as runtime; runtime.set_up_logging('info'); "
        "log = logging.getLogger('kvtcp.x'); log.debug('event=a'); log.info('event=b')"
    )
    assert run(code).stderr.split()[2:] == ["INFO", "kvtcp.x", "event=b"]


def test_broken_output_does_not_change_the_exit_code() -> None:
    """What is buffered for a reader that is gone, on stdout or stderr, is given up at the end."""
    program = (
        "import logging, sys; from kvtcp.runtime import process as runtime; runtime.set_up_logging('warning')\n"
        "async def main(): sys.stdout.write('out'); logging.warning('err'); return 3\n"
        "sys.exit(runtime.run(main, 'auto'))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run(program, stdout=write_end, stderr=write_end, env={**os.environ, "PYTHONUNBUFFERED": ""})
    os.close(write_end)
    assert done.returncode == 3


def test_bind() -> None:
    """A port is taken before anybody listens on it; a taken or impossible one is a sentence."""
    first = runtime.bind("127.0.0.1", 0)
    with first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} of 127.0.0.1 cannot be used: Address already in use"):
            runtime.bind("127.0.0.1", port)
    with pytest.raises(StartError, match="cannot be used"):
        runtime.bind("203.0.113.1", 0)


def test_the_socket_of_a_node() -> None:
    """In its directory, unless the path is too long for a socket."""
    assert runtime.link_socket(Path("data/n1")) == Path("data/n1/link.sock")
    assert runtime.link_socket(Path("d" * 90)) == Path("d" * 90) / "link.sock"
    assert runtime.link_socket(Path("d" * 91)) is None
