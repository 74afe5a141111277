"""What the two server commands share: arguments, logging, the event loop, garbage collection, signals.

The loop is uvloop where it is installed, else asyncio's own; `--loop` forces one, and the tests run both.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from kvtcp._version import __version__
from kvtcp.constants import DURABILITIES, DURABILITY_DEFAULT, GC_THRESHOLDS, HOST_DEFAULT

SOCKET_PATH_BYTES_MAX: Final = 100  # 104 on some systems, with the zero at its end
EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

# starts a task under a name; an exception of it ends the process
StartTask = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class StartError(Exception):
    """The server cannot start as asked: one sentence for the user, exit code 2."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of both servers."""
    parser.add_argument("--host", default=HOST_DEFAULT, help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--allow-insecure",
        action="store_true",
        help="permit a --host that other machines can reach, although there are no credentials and no encryption yet",
    )
    parser.add_argument(
        "--durability",
        default=DURABILITY_DEFAULT,
        choices=DURABILITIES,
        help="what an acknowledged write survives: sync a power cut, os the end of all processes, memory "
        "only the end of some nodes (default: %(default)s)",
    )
    parser.add_argument(
        "--log-level", default="warning", choices=["debug", "info", "warning", "error"],
        help="least severe events to log, one line each on stderr (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--loop", default="auto", choices=["auto", "uvloop", "asyncio"], help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"kvtcp {__version__}")


def check_common_arguments(options: argparse.Namespace) -> None:
    """Raise StartError for values that fit the grammar but not the server."""
    if not is_loopback(options.host) and not options.allow_insecure:
        raise StartError(
            f"--host {options.host} can be reached by other machines, and kvtcp has no credentials or encryption yet; "
            "use a loopback address, or --allow-insecure if the network is yours alone"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(port: int, name: str) -> int:
    """A TCP port to listen on. Raises StartError."""
    if not 0 <= port <= 65535:
        raise StartError(f"{name} must be a port from 0 to 65535, not {port}")
    return port


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port and does not listen yet, so that nobody is let in before all is ready. Raises
    StartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise StartError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error
    return bound


def set_up_logging(level: str) -> None:
    """One line per event on stderr."""
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )  # fmt: skip


def run(main: Callable[[], Coroutine[Any, Any, int]], loop: str) -> int:
    """Run `main` on the chosen event loop and return its exit code."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if loop != "asyncio":
        try:
            import uvloop

            factory = uvloop.new_event_loop
        except ImportError:
            if loop == "uvloop":
                print("kvtcp: uvloop is not installed (pip install uvloop), or use --loop asyncio", file=sys.stderr)  # noqa: T201
                return EXIT_USAGE
    # What lives long (cells, index) is not cyclic: collect in small steps, and never walk what start-up made.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main())
    finally:
        give_up_broken_output()


def on_unexpected_errors(callback: Callable[[BaseException], None]) -> None:
    """Call `callback` with an exception that a callback of the loop let out: the state behind it may be damaged.

    Errors of the operating system (no descriptors left, a socket that died in an unusual way) are only logged.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        if error is not None and not isinstance(error, OSError):
            callback(error)

    asyncio.get_running_loop().set_exception_handler(handle)


def on_stop_signals(callback: Callable[[], None]) -> None:
    """Call `callback` on SIGTERM, SIGINT and, unless it is ignored (nohup), SIGHUP.

    SIGINT counts even if it was ignored, as in nginx, PostgreSQL and Redis: scripts start servers with `&`, for which
    a shell ignores it, and stop them with `kill -INT`.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, callback)


def announce(line: str) -> None:
    """Print the ready line. A stdout that nobody reads is no reason to stop serving."""
    try:
        print(line, flush=True)  # noqa: T201
    except (OSError, ValueError) as error:
        logging.getLogger("kvtcp").warning("event=stdout-closed reason=%s line=%s", error, line)
        give_up_broken_output()


def give_up_broken_output() -> None:
    """Point stdout and stderr that nobody reads to nowhere: what is left in their buffers would fail again at exit,
    and change the exit code."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def link_socket(data_dir: Path) -> Path | None:
    """The Unix socket of a node with this data directory, for a coordinator on the same machine. None where the path is
    too long for one. Its directory is the owner's, as is everything else in it."""
    path = data_dir / "link.sock"
    return path if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else None


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
