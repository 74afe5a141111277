"""`kvtcp-coordinator`: start a cluster (or link to nodes started elsewhere) and serve until stopped.

The command line and the exit codes; settings.py says what is made of the flags, launch.py does it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kvtcp.cluster.store import ConfigStoreError
from kvtcp.constants import NODES_DEFAULT, REPLICATION_FACTOR_DEFAULT, SHARDS_DEFAULT
from kvtcp.coordinator.launch import serve
from kvtcp.coordinator.settings import Settings, check_nodes
from kvtcp.coordinator.takeover import CannotServe
from kvtcp.runtime import process as runtime
from kvtcp.runtime.data_directory import FILE as IDENTITY_FILE
from kvtcp.runtime.data_directory import DataDirectory, IdentityError
from kvtcp.runtime.process import StartError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvtcp-coordinator",
        description="The coordinator of a kvtcp cluster: routes and orders requests, and supervises local nodes.",
    )
    parser.add_argument(
        "--num-nodes",
        type=int,
        help=f"local nodes, which are spawned and watched (default: {NODES_DEFAULT}, or those that there are); more "
        "adds nodes, which hold nothing before a rebalance, unless shards have too few copies",
    )
    parser.add_argument(
        "--nodes",
        metavar="HOST:PORT,...",
        help="use nodes started elsewhere with kvtcp-node, in the order of their ids; more adds nodes; later starts "
        "know the addresses without it",
    )
    parser.add_argument(
        "--replication-factor",
        type=int,
        help="copies of every key, fixed when the cluster is created "
        f"(default: {REPLICATION_FACTOR_DEFAULT}, or the number of nodes if that is smaller)",
    )
    parser.add_argument(
        "--min-insync",
        type=int,
        help="fewest in-sync copies a shard may have: a write is acknowledged when all in-sync copies have it, and "
        "refused while there are fewer than this; it may change at a start (default: min(2, factor), or as it was)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        help=f"slices of the key space, fixed when the cluster is created (default: {SHARDS_DEFAULT})",
    )
    parser.add_argument("--main-port", type=int, help="port for clients, 0 = any free one (default: %(default)s)")
    parser.add_argument("--base-port", type=int, help="port of the first local node (default: %(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="identity and map of the cluster, and the directories of local nodes; created if missing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--backup-dir",
        type=Path,
        help="where backups are written and restored from; created if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--recover-map",
        nargs="?",
        const="all",
        choices=["all", "accept"],
        help="map.json of the coordinator is lost: make it again from what the nodes have, if all of them answer (the "
        "default), then start; with accept without nodes that are gone for good",
    )
    parser.add_argument(
        "--no-resp", action="store_true", help="do not serve clients of Redis and telnet at the main port"
    )
    parser.add_argument("--orphan-ms", type=int, help=argparse.SUPPRESS)
    runtime.add_common_arguments(parser)
    parser.set_defaults(**vars(Settings()))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = make_parser().parse_args(argv)
    settings = Settings(**vars(options))
    runtime.set_up_logging(settings.log_level)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until it is known which nodes it is for
    try:
        runtime.check_common_arguments(options)
        check_nodes(settings)
        if (settings.data_dir / IDENTITY_FILE).exists():
            raise StartError(f"{settings.data_dir} is the data directory of a node: take the one above it")
        directory = DataDirectory(settings.data_dir / "coordinator", "coordinator")
        try:
            return runtime.run(lambda: serve(settings, directory), settings.loop)
        finally:
            directory.unlock()
    except (StartError, IdentityError, ConfigStoreError) as error:
        print(f"kvtcp-coordinator: {error}", file=sys.stderr)  # noqa: T201
        return runtime.EXIT_USAGE
    except CannotServe as error:
        print(f"kvtcp-coordinator: {error}", file=sys.stderr)  # noqa: T201
        return runtime.EXIT_USAGE if error.is_start else runtime.EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        return runtime.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
