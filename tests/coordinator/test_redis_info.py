"""What the coordinator tells clients of Redis about itself, from a running cluster."""

from __future__ import annotations

from typing import Any

import pytest

import kvtcp
from kvtcp.coordinator.redis_info import RedisInfo
from kvtcp.frontend.resp.replies import encode
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import Wire, until
from tests.support.resp_tools import parse


def facts_of(text: bytes) -> dict[str, str]:
    """The lines of INFO."""
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)  # type: ignore[misc]


def info_of(cluster: LocalCluster) -> RedisInfo:
    """What a cluster tells."""
    coordinator = cluster.coordinator
    return RedisInfo(coordinator.status, coordinator.clients, lambda: 5000)


async def ask(wire: Wire, *commands: str) -> list[Any]:
    """Replies of commands, the last of which closes the connection."""
    wire.write("".join(command + "\r\n" for command in commands).encode() + b"quit\r\n")
    return parse(await wire.closed())[:-1]


async def test_info_of_a_cluster() -> None:
    """Facts are those of the cluster, under the names that Redis's tools look for."""
    async with LocalCluster(2, shards=4) as cluster, await Wire.open(cluster.coordinator.address, hello=False) as wire:
        reply, clients = await ask(wire, "info", "info clients")
        facts = facts_of(reply)
        assert facts["tcp_port"] == str(cluster.coordinator.address[1]) and int(facts["process_id"]) > 1
        assert facts["role"] == "master" and facts["kvtcp_replication_factor"] == "2" and facts["loading"] == "0"
        assert facts["redis_mode"] == "standalone" and facts["kvtcp_durability"] == "memory"
        assert int(facts["used_memory"]) > 1 << 20 and float(facts["used_cpu_user"]) > 0
        assert facts_of(clients) == {"connected_clients": "1", "blocked_clients": "0"}
        assert set(info_of(cluster).facts()) == {
            "Server", "Clients", "Memory", "Persistence", "Stats", "Replication", "CPU", "Cluster",
        }  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
async def test_status_can_be_told(version: int) -> None:
    """Every value of `status`, also of a cluster that misses a node, is one that a reply can hold."""
    async with LocalCluster(2, shards=4) as cluster:
        host = info_of(cluster)
        await cluster.kill_node("n2")
        await until(lambda: host.status()["state"] != "ok", "the news")
        reply = parse(encode(host.status(), version))[0]
        told = reply if version == 3 else dict(zip(reply[::2], reply[1::2], strict=True))
        assert told[b"cluster"] == cluster.coordinator.map.cluster.encode()
        assert {key.decode() for key in told} == set(host.status())


async def test_clients_in_the_order_in_which_they_came() -> None:
    """Only those of this face, while they are connected."""
    async with LocalCluster(1, shards=4) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put("a", "1")
        host = info_of(cluster)
        wires = [await Wire.open(cluster.coordinator.address, hello=False) for _ in range(4)]
        for n, wire in enumerate(wires):
            wire.write(b"client setname c%d\r\n" % n)
            await until(lambda n=n: any(client.name == f"c{n}" for client in host.resp_clients()), "the name")
        assert [client.name for client in host.resp_clients()] == ["c0", "c1", "c2", "c3"]
        assert all(client.peer.startswith("127.0.0.1:") for client in host.resp_clients())
        for wire in wires:
            await wire.close()
        await until(lambda: not list(host.resp_clients()), "their end")
