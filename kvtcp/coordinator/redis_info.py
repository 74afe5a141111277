"""What the coordinator tells clients of the Redis protocol about itself: the sections of INFO, KV.STATUS, CLIENT LIST.

RedisInfo reads the status and the sessions and changes nothing.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterable
from typing import Any

from kvtcp.coordinator.status import Status
from kvtcp.frontend.clients import Clients
from kvtcp.frontend.resp.client_state import ClientState
from kvtcp.frontend.resp.session import RespSession


class RedisInfo:
    """The host of a RespService. `port` tells where clients connect."""

    def __init__(self, status: Status, clients: Clients, port: Callable[[], int]) -> None:
        self._status = status
        self._clients = clients
        self._port = port

    def status(self) -> dict[str, Any]:
        """The map of `status`."""
        return self._status.summary()

    def resp_clients(self) -> Iterable[ClientState]:
        """Those that are connected, in the order in which they came."""
        sessions = [session for session in self._clients.sessions if isinstance(session, RespSession)]
        return sorted((session.pipeline.state for session in sessions), key=lambda state: state.ident)

    def facts(self) -> dict[str, dict[str, Any]]:
        """The sections of INFO, without the number of keys."""
        status = self._status.summary()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        resident_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "Server": {
                "redis_mode": "standalone", "os": sys.platform, "process_id": os.getpid(),
                "tcp_port": self._port(), "uptime_in_seconds": status["uptime_s"],
                "uptime_in_days": status["uptime_s"] // 86_400,
            },
            "Clients": {"connected_clients": status["clients"], "blocked_clients": 0},
            "Memory": {
                "used_memory": resident_bytes, "used_memory_human": f"{resident_bytes / 2**20:.2f}M", "maxmemory": 0,
            },
            "Persistence": {"loading": 0, "kvtcp_durability": status["durability"]},
            "Stats": {"total_commands_processed": status["operations"]},
            "Replication": {
                "role": "master", "connected_slaves": 0, "kvtcp_replication_factor": status["replication_factor"],
                "kvtcp_min_insync": status["min_insync"], "kvtcp_state": status["state"],
            },
            "CPU": {"used_cpu_sys": f"{usage.ru_stime:.6f}", "used_cpu_user": f"{usage.ru_utime:.6f}"},
            "Cluster": {"cluster_enabled": 0},
        }  # fmt: skip
