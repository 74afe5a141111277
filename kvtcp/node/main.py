"""`kvtcp-node`: start one node and serve until stopped, or check the directory of a stopped one.

A node has no cluster of its own: the first coordinator whose HELLO it accepts founds its identity, which is kept in the
data directory; from then on it serves that cluster only. A coordinator that spawns nodes writes the identity for them,
so that nobody can be faster. Port, directory and id are checked first; what is wrong is one sentence and exit code 2.

Recovery comes before the event loop and before the port: whoever connects finds a node that has all it will have. A
signal meanwhile ends the process as it stands, which is what recovery is made for.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvtcp.constants import BASE_PORT_DEFAULT, MIB, ORPHAN_MS, RECOVERY_PROGRESS_MS, SNAPSHOT_LOG_BYTES
from kvtcp.node.huge_pages import HugePages
from kvtcp.node.server import NodeServer
from kvtcp.runtime import process
from kvtcp.runtime.data_directory import DataDirectory, IdentityError, lock_holder
from kvtcp.storage.disk.check import by_reason, check_directory
from kvtcp.storage.disk.log_format import VersionError
from kvtcp.storage.disk.replay import ReplayProgress
from kvtcp.storage.disk.store import NO_MANIFEST, NodeStore, StoreError, has_data, open_store, read_store_manifest
from kvtcp.storage.files import OS_DISK

log = logging.getLogger("kvtcp.node")

EXIT_DAMAGED: Final = 7
SWITCH_INTERVAL_S: Final = 5e-4
BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvtcp-node",
        description="One node of a kvtcp cluster. A coordinator links to it that was started with --nodes HOST:PORT, "
        "or was told of it by the shell's `node add HOST:PORT`. At SIGTERM it leaves the in-sync sets of its shards, "
        "then it stops.",
    )
    parser.add_argument("--id", help="id of the node: n1, n2, ... in a new cluster, the next number for one more")
    parser.add_argument(
        "--port",
        type=int,
        default=BASE_PORT_DEFAULT,
        help="port for the coordinator, and for nodes that fetch copies (default: %(default)s)",
    )
    parser.add_argument("--data-dir", type=Path, help="directory of this node; created if missing")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        help="verify the data directory of a stopped node (log, snapshots, tables), change nothing, and exit: 0 if all "
        "is well, 7 if something is damaged",
    )
    parser.add_argument("--snapshot-log-mib", type=float, default=SNAPSHOT_LOG_BYTES / MIB, help=argparse.SUPPRESS)
    parser.add_argument("--spawned", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--orphan-ms", type=int, default=ORPHAN_MS, help=argparse.SUPPRESS)
    process.add_common_arguments(parser)
    return parser


def progress_printer(what: str) -> ReplayProgress:
    """Says how far a long recovery is: nothing within the first second, then a line every second."""
    next_s = time.monotonic() + RECOVERY_PROGRESS_MS / 1000

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + RECOVERY_PROGRESS_MS / 1000
            print(f"{what}: reading {phase}, {done / MIB:.1f} of {total / MIB:.1f} MiB", file=sys.stderr, flush=True)  # noqa: T201

    return progress


def boot_id() -> str:
    """Names the boot of this machine; empty where the system does not tell: then all starts count as in one boot."""
    try:
        return BOOT_ID_FILE.read_text().strip()
    except OSError:
        return ""


def recover(options: argparse.Namespace) -> NodeStore | None:
    """What the data directory holds; None in mode memory. Raises StartError."""
    directory: Path = options.data_dir
    try:
        if options.durability == "memory":
            if read_store_manifest(OS_DISK, directory) is not None:
                raise process.StartError(
                    f"{directory} holds durable data, which --durability memory would leave unread: start with "
                    "--durability sync or os, or use another directory"
                )
            return None
        # what is loaded lives long and is not cyclic: the collector would only walk it again and again
        gc.disable()
        try:
            began_s = time.monotonic()
            progress = progress_printer(f"kvtcp-node {options.id}")
            store = open_store(OS_DISK, directory, options.durability, os.urandom, boot_id(), progress)
        finally:
            gc.enable()
    except StoreError as error:
        raise process.StartError(str(error)) from error
    except OSError as error:
        raise process.StartError(f"the data directory {directory} cannot be used: {error}") from error
    for damage in store.damages:
        log.error("event=damage node=%s what=%s", options.id, damage)
    reasons = {copy.shard: copy.reason for copy in store.copies.values() if copy.reason}
    for shards, reason in by_reason(reasons):
        log.error("event=shards-doubtful node=%s shards=%s reason=%s", options.id, shards, reason)
    if store.aside is not None:
        log.error("event=kept-aside node=%s directory=%s", options.id, store.aside)
    log.info("event=recovered node=%s shards=%s keys=%s entries=%s ms=%.0f", options.id, len(store.copies),
             sum(len(copy.table) for copy in store.copies.values()), store.replayed_entries,
             (time.monotonic() - began_s) * 1000)  # fmt: skip
    return store


async def serve(
    options: argparse.Namespace, directory: DataDirectory, fields: dict[str, Any], store: NodeStore | None,
    bound: socket.socket,
) -> int:  # fmt: skip
    """Serve until a signal or the coordinator says stop."""
    server = NodeServer(
        options.id, cluster=fields.get("cluster"), secret=fields.get("secret"),
        on_identity=lambda cluster, secret: directory.write({"cluster": cluster, "secret": secret, "node": options.id}),
        spawned=options.spawned, orphan_ms=options.orphan_ms, store=store,
        snapshot_log_bytes=int(options.snapshot_log_mib * MIB),
    )  # fmt: skip
    # the loop waits for the interpreter no longer than this while a worker has it: p99 of puts is a quarter less
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    process.on_stop_signals(server.leave)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, server.snapshot_all)
    process.on_unexpected_errors(server.failed)
    try:
        await server.start(options.host, options.port, bound, process.link_socket(options.data_dir))
    except OSError as error:
        raise process.StartError(f"port {options.port} of {options.host} cannot be used: {error.strerror}") from error
    process.announce(f"kvtcp-node {options.id} ready on {process.join_address(*server.address)}")
    await server.stopped.wait()
    try:
        await server.close()
    except OSError as error:
        server.failure = server.failure or error
    if isinstance(server.failure, OSError):
        print(  # noqa: T201
            f"kvtcp-node {options.id}: the disk failed: {server.failure}; what is on it is not known any more, so the "
            "node ends. Nothing was acknowledged after the error; a restart goes on from what can be verified",
            file=sys.stderr,
        )
    return process.EXIT_OK if server.failure is None else process.EXIT_FAILED


def check(directory: Path) -> int:
    """`--check`: print what is there and what is wrong; the exit code. Raises StartError."""
    if not directory.is_dir():
        raise process.StartError(f"{directory} is not a directory")
    holder = lock_holder(directory)
    if holder is not None:
        raise process.StartError(f"{directory} is in use by {holder}: stop the node first")
    try:
        manifest = read_store_manifest(OS_DISK, directory)
        if manifest is None and has_data(OS_DISK, directory):
            raise StoreError(NO_MANIFEST.format(directory=directory))
        if manifest is None:
            raise process.StartError(f"{directory} has no manifest.json: no node that keeps data has used it")
        report = check_directory(OS_DISK, directory, manifest, progress_printer("kvtcp-node"), boot_id())
    except StoreError as error:
        print(f"kvtcp-node: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_DAMAGED
    except VersionError as error:
        raise process.StartError(f"{directory}: {error}") from error
    except OSError as error:
        raise process.StartError(f"{directory} cannot be read: {error}") from error
    for line in report.lines:
        print(line)  # noqa: T201
    for finding in report.findings:
        print(f"damaged: {finding}")  # noqa: T201
    print("damaged" if report.findings else "ok")  # noqa: T201
    return EXIT_DAMAGED if report.findings else process.EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = make_parser().parse_args(argv)
    process.set_up_logging(options.log_level)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # there is nothing to snapshot before the recovery is done
    try:
        if options.check is not None:
            return check(options.check)
        if options.id is None or options.data_dir is None:
            raise process.StartError("--id and --data-dir are needed to start a node (or --check DIR)")
        process.check_common_arguments(options)
        process.check_port(options.port, "--port")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", options.id):
            raise process.StartError(f"--id {options.id!r} must be 1 to 32 letters, digits, _ or -")
        directory = DataDirectory(options.data_dir, "node")
        try:
            fields = directory.read() or {}
            if fields and fields["node"] != options.id:
                raise IdentityError(
                    f"{options.data_dir} is the data directory of node {fields['node']}, not of {options.id}"
                )
            with process.bind(options.host, options.port) as bound:  # taken before anything is made
                store = recover(options)
                HugePages().start()
                return process.run(lambda: serve(options, directory, fields, store, bound), options.loop)
        finally:
            directory.unlock()
    except (process.StartError, IdentityError) as error:
        print(f"kvtcp-node: {error}", file=sys.stderr)  # noqa: T201
        return process.EXIT_USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return process.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
