"""What the benchmarks read from other programs: redis-benchmark, etcdctl, replies of RESP; and the check of markers."""

import random
import socket
import threading

import pytest

from bench.load import resp
from bench.load.raw import REDIS, run_batches
from bench.peers.servers import parse_check_perf

CSV = (
    '"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"\n'
    '"SET","235849.06","2.979","0.120","2.095","9.151","9.679","10.023"\n'
)


def serve(answers: bytes) -> int:
    """The port of a server that reads once and sends these bytes, on one connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server, server.accept()[0] as connection:
            connection.recv(65_536)
            connection.sendall(answers)

    threading.Thread(target=run, daemon=True).start()
    return int(server.getsockname()[1])


def test_the_figures_of_redis_benchmark_are_read() -> None:
    """Rate and latencies of the only test."""
    assert resp.parse_csv(CSV) == {"rate": 235849.06, "p50_ms": 2.095, "p99_ms": 9.679, "max_ms": 10.023}


@pytest.mark.parametrize("text", ["", CSV + "Error from server: ERR unknown command\n", CSV + CSV.splitlines()[1]])
def test_anything_else_is_refused(text: str) -> None:
    """Nothing, an error reply among the answers, two tests."""
    with pytest.raises(resp.RespError):
        resp.parse_csv(text)


def test_every_system_gets_the_same_options() -> None:
    """Only the port differs."""
    one, other = (resp.benchmark_command(port, "set", 16, 1_000, 64, 100_000) for port in (1, 2))
    assert [a for a, b in zip(one, other, strict=True) if a != b] == ["1"]
    assert " ".join(one).startswith("redis-benchmark -h 127.0.0.1 -p 1 -c 50 -d 64 -r 100000 -P 16 -n 1000 -t set")


@pytest.mark.parametrize(("text", "rate"), [
    ("PASS: Throughput is 150 writes/s", 150), ("FAIL: Throughput too low: 4123 writes/s\nPASS: Stddev", 4123),
], ids=["pass", "fail"])  # fmt: skip
def test_the_rate_of_etcd_is_read_whether_etcd_likes_it_or_not(text: str, rate: float) -> None:
    """Its load of 1,000 clients wants 15,000 writes a second, which few machines reach."""
    assert parse_check_perf(f" 60 / 60  100.00% 1m0s\n{text}\n") == rate
    with pytest.raises(resp.RespError, match="printed no rate"):
        parse_check_perf("Error: context deadline exceeded")


def test_answers_of_resp_are_read() -> None:
    """All kinds that the checks meet, also nil and nested arrays."""
    with resp.RespClient(serve(b"+OK\r\n:7\r\n$3\r\na\r\n\r\n$-1\r\n*2\r\n$1\r\nx\r\n*0\r\n")) as client:
        assert client.pipeline([(b"PING",)] * 5) == [b"OK", 7, b"a\r\n", None, [b"x", []]]


def test_an_error_of_resp_is_raised() -> None:
    """With its text."""
    with resp.RespClient(serve(b"-ERR no\r\n")) as client, pytest.raises(resp.RespError, match="ERR no"):
        client.command(b"PING")


@pytest.mark.parametrize(
    ("answer", "speaks"), [(b"$-1\r\n", True), (b"kvtcp: this port speaks kvtcp\n", False), (b"", False)]
)
def test_a_port_is_asked_whether_it_speaks_resp(answer: bytes, speaks: bool) -> None:
    """A line of text and a closed connection say no."""
    assert resp.speaks_resp(serve(answer)) is speaks


def test_markers_show_whether_a_server_did_what_it_answered() -> None:
    """SET must overwrite as many marked keys as random writes do; GET none; every value has its length."""
    marker, other = b"m" * 8, b"x" * 8
    rng = random.Random(5)
    written = {rng.randrange(1_000) for _ in range(1_000)}
    honest = [other if number in written else marker for number in rng.sample(range(1_000), 200)]
    resp.check_markers("set", honest, marker, 8, 1_000, 1_000)
    resp.check_markers("get", [marker] * 200, marker, 8, 1_000, 1_000)
    for test, values in (("set", [marker] * 200), ("set", [other] * 200), ("get", [other] + [marker] * 199)):
        with pytest.raises(AssertionError, match="marked keys were overwritten"):
            resp.check_markers(test, values, marker, 8, 1_000, 1_000)
    for value in (None, b"short"):
        with pytest.raises(AssertionError, match="instead of 8 bytes"):
            resp.check_markers("get", [value], marker, 8, 1_000, 1_000)


def test_the_raw_generator_compares_the_first_answers() -> None:
    """A wrong value is an error, the right one is counted."""
    request, reply = REDIS.get([resp.key_of(1)]), REDIS.found([resp.key_of(1)], b"v")
    assert request == resp.encode_command([b"GET", b"key:000000000001"])
    _, latencies = run_batches(serve(reply), [(request, reply)], 1, 1)
    assert len(latencies) == 1
    with pytest.raises(AssertionError, match="instead of what was asked"):
        run_batches(serve(reply.replace(b"v", b"w")), [(request, reply)], 1, 1)
    with pytest.raises(AssertionError, match="more than was asked"):
        run_batches(serve(reply), [(request, reply[:-1])], 1, 1)
