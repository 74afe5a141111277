"""`kvtcp-node`: start one node and serve until stopped.

A node has no cluster of its own: the first coordinator whose HELLO it accepts founds its identity, which is kept in the
data directory; from then on it serves that cluster only. A coordinator that spawns nodes writes the identity for them,
so that nobody can be faster. Port, directory and id are checked first; what is wrong is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kvtcp.constants import BASE_PORT_DEFAULT, ORPHAN_MS
from kvtcp.server import runtime
from kvtcp.server.identity import DataDirectory, IdentityError
from kvtcp.server.node import NodeServer


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvtcp-node",
        description="One node of a kvtcp cluster. A coordinator started with --nodes HOST:PORT,... links to it.",
    )
    parser.add_argument(
        "--id", required=True, help="id of the node, such as n1; the coordinator numbers them n1, n2, ..."
    )
    parser.add_argument(
        "--port", type=int, default=BASE_PORT_DEFAULT, help="port for the coordinator's link (default: %(default)s)"
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of this node; created if missing")
    parser.add_argument("--spawned", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--orphan-ms", type=int, default=ORPHAN_MS, help=argparse.SUPPRESS)
    runtime.add_common_arguments(parser)
    return parser


async def serve(options: argparse.Namespace, directory: DataDirectory) -> int:
    """Serve until a signal or the coordinator says stop."""
    fields = directory.read() or {}
    if fields and fields["node"] != options.id:
        raise IdentityError(f"{options.data_dir} is the data directory of node {fields['node']}, not of {options.id}")
    server = NodeServer(
        options.id,
        cluster=fields.get("cluster"),
        secret=fields.get("secret"),
        on_identity=lambda cluster, secret: directory.write({"cluster": cluster, "secret": secret, "node": options.id}),
        spawned=options.spawned,
        orphan_ms=options.orphan_ms,
    )
    runtime.on_stop_signals(server.stopped.set)
    runtime.on_unexpected_errors(server.failed)
    try:
        await server.start(options.host, options.port)
    except OSError as error:
        raise runtime.StartError(f"port {options.port} of {options.host} cannot be used: {error.strerror}") from error
    runtime.announce(f"kvtcp-node {options.id} ready on {runtime.join_address(*server.address)}")
    await server.stopped.wait()
    await server.close()
    return runtime.EXIT_OK if server.failure is None else runtime.EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = make_parser().parse_args(argv)
    runtime.set_up_logging(options.log_level)
    try:
        runtime.check_common_arguments(options)
        runtime.check_port(options.port, "--port")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", options.id):
            raise runtime.StartError(f"--id {options.id!r} must be 1 to 32 letters, digits, _ or -")
        directory = DataDirectory(options.data_dir, "node")
        try:
            return runtime.run(lambda: serve(options, directory), options.loop)
        finally:
            directory.unlock()
    except (runtime.StartError, IdentityError) as error:
        print(f"kvtcp-node: {error}", file=sys.stderr)  # noqa: T201
        return runtime.EXIT_USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return runtime.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
