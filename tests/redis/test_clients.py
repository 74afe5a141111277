"""Clients of Redis on a coordinator of real processes: redis-cli, redis-benchmark, redis-py, Perl's Redis, a socket.

None of them knows kvtcp. `KVTCP_REDIS_ADDRESS=host:port` runs the same tests against another server, which loses all it
has; against a redis-server it shows that the tests are right, and those that tell of kvtcp alone are left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

import kvtcp
from tests.processes.cluster import ProcessCluster, wait_for

REFERENCE = os.environ.get("KVTCP_REDIS_ADDRESS", "")
PIPE_SETS = 100_000
TOOL_S_MAX = 120.0
VALUE_BYTES_MAX = 8 * 1024 * 1024

only_kvtcp = pytest.mark.skipif(bool(REFERENCE), reason="tells of kvtcp alone")
protocols = pytest.mark.parametrize("protocol", [2, 3])


@dataclass(frozen=True)
class Server:
    """Where the server is, and how to ask it with Redis's own tools."""

    host: str
    port: int

    def run(self, tool: str, *arguments: object, stdin: bytes = b"", code: int = 0) -> str:
        """Output of a tool, which must end with this exit code; skips if it is not installed."""
        needs(tool)
        done = subprocess.run(
            [tool, "-h", self.host, "-p", str(self.port), *map(str, arguments)],
            input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TOOL_S_MAX,
        )  # fmt: skip
        output = done.stdout.decode()
        assert done.returncode == code, f"{tool} {arguments}: exit {done.returncode}: {output}"
        return output

    def cli(self, *arguments: object, stdin: bytes = b"", code: int = 0) -> str:
        """Output of redis-cli without the last line break."""
        return self.run("redis-cli", *arguments, stdin=stdin, code=code).rstrip("\n")

    def redis(self, protocol: int = 2, **options: Any) -> redis.Redis:
        """A synchronous redis-py client."""
        return redis.Redis(self.host, self.port, protocol=protocol, socket_timeout=30, **options)

    def aio(self, protocol: int = 2, **options: Any) -> redis.asyncio.Redis:
        """An asynchronous redis-py client."""
        return redis.asyncio.Redis(host=self.host, port=self.port, protocol=protocol, socket_timeout=30, **options)


def needs(tool: str) -> None:
    """Skip where a tool is missing; continuous integration has all of them."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A coordinator with two nodes that both have everything, or the server that the environment names."""
    if REFERENCE:
        host, _, port = REFERENCE.rpartition(":")
        yield Server(host, int(port))
        return
    cluster = ProcessCluster(tmp_path_factory.mktemp("redis"), nodes=2)
    try:
        cluster.start("--durability", "memory", "--replication-factor", 2)
        host, _, port = cluster.url.removeprefix("kvtcp://").rpartition(":")
        yield Server(host, int(port))
    finally:
        cluster.close()


@pytest.fixture
def server(running: Server) -> Server:
    """The server, empty."""
    with running.redis() as client:
        client.flushall()
    return running


# --- redis-cli ------------------------------------------------------------------------------------------


def test_redis_cli_one_command(server: Server) -> None:
    """One command as arguments: what comes out is what Redis says, for values, numbers, nothing and errors."""
    assert server.cli("ping") == "PONG"
    assert server.cli("set", "a key", "a value\twith\nlines") == "OK"
    assert server.cli("get", "a key") == "a value\twith\nlines"
    assert server.cli("incr", "n") == "1"
    assert server.cli("get", "none") == ""
    assert server.cli("--no-raw", "get", "none") == "(nil)"
    assert server.cli("--no-raw", "mget", "n", "none") == '1) "1"\n2) (nil)'
    assert server.cli("-n", "0", "exists", "n") == "1"
    assert server.cli("-x", "set", "x", stdin=b"from stdin") == "OK"
    assert server.cli("getrange", "x", 5, -1) == "stdin"
    assert "ERR value is not an integer" in server.cli("incr", "a key")
    assert "ERR wrong number of arguments for 'incr' command" in server.cli("-e", "incr", "a", "b", code=1)
    assert "ERR unknown command" in server.cli("-e", "nosuchcommand", "a", code=1)
    assert server.cli("-r", 5, "incr", "n") == "2\n3\n4\n5\n6"


def test_redis_cli_resp3(server: Server) -> None:
    """-3 and --json begin with HELLO 3, whose answer is a map."""
    server.cli("mset", "a", "1", "b", "2")
    assert server.cli("-3", "get", "a") == "1"
    assert server.cli("-3", "--no-raw", "get", "none") == "(nil)"
    assert json.loads(server.cli("--json", "mget", "a", "b", "none")) == ["1", "2", None]
    assert json.loads(server.cli("--json", "incr", "a")) == 2
    greeting = json.loads(server.cli("--json", "hello", "3"))
    assert greeting["proto"] == 3
    assert {"server", "version", "id", "mode", "role"} <= greeting.keys()


def test_redis_cli_lines_from_stdin(server: Server) -> None:
    """Without arguments it reads commands line by line, and asks for the help texts of the server first."""
    lines = ["set a 1", "incr a", 'set b "two words"', "get b", "multi", "incr a", "get a", "exec", "nosuchcommand"]
    output = server.cli(stdin="\n".join([*lines, "quit", ""]).encode())
    said = [line for line in output.splitlines() if line]
    assert said[:8] == ["OK", "2", "OK", "two words", "OK", "QUEUED", "QUEUED", "3"]
    assert said[8] == "3"
    assert said[9].startswith("ERR unknown command")
    text = server.cli(stdin=b"help incr\nquit\n")
    assert "INCR" in text and "summary:" in text


def test_redis_cli_scan(server: Server) -> None:
    """--scan finds every key once, --pattern those that match."""
    with server.redis() as client:
        client.mset({f"user:{number}": "x" for number in range(500)} | {f"other:{n}": "y" for n in range(500)})
    found = server.cli("--scan").splitlines()
    assert len(found) == 1000
    assert set(found) == {f"{kind}:{number}" for kind in ("user", "other") for number in range(500)}
    assert sorted(server.cli("--scan", "--pattern", "user:1?").splitlines()) == [f"user:1{n}" for n in range(10)]
    assert sorted(server.cli("--scan", "--pattern", "*:42").splitlines()) == ["other:42", "user:42"]


def test_redis_cli_bigkeys(server: Server) -> None:
    """--bigkeys asks for type and length of every key and names the longest value."""
    with server.redis() as client:
        client.mset({f"small:{number}": "x" * 10 for number in range(300)})
        client.set("the big one", "x" * 5000)
    output = server.cli("--bigkeys")
    assert "Sampled 301 keys in the keyspace!" in output
    assert "Biggest string found '\"the big one\"' has 5000 bytes" in output
    assert "301 strings with 8000 bytes" in output


def test_redis_cli_latency(server: Server) -> None:
    """--latency pings for a second and tells shortest, longest and mean time in ms."""
    found = re.fullmatch(r"(\d+) (\d+) ([\d.]+) (\d+)", server.cli("--latency", "-i", 1))
    assert found is not None
    assert int(found[4]) >= 10, "pings that were answered in a second"


def test_redis_cli_pipe(server: Server) -> None:
    """--pipe sends 100,000 commands without waiting, and counts a good answer for every one of them."""
    commands = b"".join(
        b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value)
        for key, value in ((b"key:%d" % number, b"value %d" % number) for number in range(PIPE_SETS))
    )
    output = server.cli("--pipe", stdin=commands)
    assert f"errors: 0, replies: {PIPE_SETS}" in output
    assert server.cli("dbsize") == str(PIPE_SETS)
    assert server.cli("get", "key:99999") == "value 99999"


def test_redis_benchmark(server: Server) -> None:
    """redis-benchmark gets through its commands, one at a time and pipelined, and would stop at the first error."""
    for pipelined in (1, 16):
        size = ("-n", 2000, "-c", 10, "-r", 1000, "-P", pipelined)
        output = server.run("redis-benchmark", "-t", "ping,set,get,incr,mset", *size, "--csv")
        rates = dict(re.findall(r'^"([^"]+)","([\d.]+)"', output, re.M))
        assert rates.keys() == {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"}, output
        assert all(float(rate) > 0 for rate in rates.values())
    assert int(server.cli("dbsize")) > 1000


# --- redis-py -------------------------------------------------------------------------------------------


@protocols
def test_redis_py_strings(server: Server, protocol: int) -> None:
    """Strings and their options in both protocols."""
    with server.redis(protocol) as client:
        assert client.set("a", "1") is True
        assert client.get("a") == b"1"
        assert client.get("none") is None
        assert client.set("a", "2", nx=True) is None
        assert client.set("b", "2", xx=True) is None
        assert client.set("a", "3", get=True) == b"1"
        assert client.mset({"x": "1", "y": "2"}) is True
        assert client.mget("x", "none", "y") == [b"1", None, b"2"]
        assert client.msetnx({"{t}x": "1", "{t}y": "2"}) in (True, 1)
        assert (client.append("x", "23"), client.strlen("x")) == (3, 3)
        assert (client.incr("x"), client.decr("x", 24)) == (124, 100)
        assert client.incrbyfloat("x", 0.5) == 100.5
        assert client.getrange("x", 1, 2) == b"00"
        assert client.setrange("x", 0, "2") == 5
        assert (client.setbit("bits", 7, 1), client.getbit("bits", 7)) == (0, 1)
        assert client.getset("a", "4") == b"3"
        assert client.getdel("a") == b"4"
        assert client.setnx("a", "5") in (True, 1)
        everything = bytes(range(256))
        assert client.set(everything, everything) is True
        assert client.get(everything) == everything


@protocols
def test_redis_py_keys(server: Server, protocol: int) -> None:
    """Keys, their time to live, and iteration in both protocols."""
    with server.redis(protocol, decode_responses=True) as client:
        client.mset({f"key:{number}": number for number in range(200)})
        assert sorted(client.scan_iter("key:*", count=17)) == sorted(f"key:{number}" for number in range(200))
        assert sorted(client.keys("key:19?")) == [f"key:19{digit}" for digit in range(10)]
        assert client.dbsize() == 200
        assert str(client.randomkey()).startswith("key:")
        assert client.exists("key:1", "key:2", "none") == 2
        assert client.delete("key:1", "none") == 1
        assert client.unlink("key:2", "key:3") == 2
        assert client.type("key:4") == "string"
        assert client.type("none") == "none"
        assert client.expire("key:4", 100) in (True, 1)
        assert client.expire("key:4", 50, gt=True) in (False, 0)
        assert 90 < client.ttl("key:4") <= 100
        assert client.persist("key:4") in (True, 1)
        assert (client.ttl("key:4"), client.ttl("none")) == (-1, -2)
        client.set("short", "x", px=20)
        wait_for(lambda: client.get("short") is None, "the end of a key")
        assert client.set("{t}a", "1", ex=60) is True
        assert client.rename("{t}a", "{t}b") in (True, "OK")
        assert client.copy("{t}b", "{t}c") in (True, 1)
        assert client.getex("{t}c", persist=True) == "1"
        assert (client.ttl("{t}c"), client.ttl("{t}b") > 50) == (-1, True)


@protocols
def test_redis_py_connection(server: Server, protocol: int) -> None:
    """What clients ask about the server and about themselves."""
    with server.redis(protocol, decode_responses=True, client_name="a-test") as client:
        assert client.ping() is True
        assert client.echo("hello") == "hello"
        assert client.client_getname() == "a-test"
        assert client.client_id() > 0
        assert "a-test" in {other["name"] for other in client.client_list()}
        assert "redis_version" in client.info()
        assert client.time()[0] > 1_700_000_000
        assert isinstance(client.config_get("maxmemory"), dict)
        assert client.command_count() > 50
        assert "get" in client.command()
        with pytest.raises(redis.ResponseError, match="unknown command"):
            client.execute_command("NOSUCHCOMMAND", "a")
        with pytest.raises(redis.ResponseError, match="not an integer"):
            client.set("a", "text")
            client.incr("a")
        assert client.get("a") == "text", "an error leaves the connection usable"


def test_redis_py_large_values(server: Server) -> None:
    """A value of 8 MiB comes back whole, alone and among others."""
    value = os.urandom(VALUE_BYTES_MAX)
    with server.redis() as client:
        assert client.set("large", value) is True
        assert client.get("large") == value
        assert client.strlen("large") == VALUE_BYTES_MAX
        client.set("small", "x")
        assert client.mget("small", "large") == [b"x", value]


@protocols
def test_redis_py_pipelines(server: Server, protocol: int) -> None:
    """Without a transaction any keys, many at once, answered in order; an error takes only its own place."""
    with server.redis(protocol) as client:
        with client.pipeline(transaction=False) as pipe:
            for number in range(3000):
                pipe.set(f"key:{number}", number)
            assert pipe.execute() == [True] * 3000
            for number in range(3000):
                pipe.get(f"key:{number}")
            assert pipe.execute() == [b"%d" % number for number in range(3000)]
            pipe.set("a", "text").incr("a").get("a")
            first, second, third = pipe.execute(raise_on_error=False)
        assert (first, third) == (True, b"text")
        assert isinstance(second, redis.ResponseError)


@protocols
def test_redis_py_transactions(server: Server, protocol: int) -> None:
    """MULTI and EXEC on keys with one tag; WATCH finds that another client was faster, and the next try succeeds."""
    with server.redis(protocol) as client, server.redis(protocol) as other:
        with client.pipeline(transaction=True) as pipe:
            pipe.set("{t}a", 1).incr("{t}a").mget("{t}a", "{t}b").set("{t}b", 5).get("{t}b")
            assert pipe.execute() == [True, 2, [b"2", None], True, b"5"]
        with client.pipeline() as pipe:
            pipe.watch("{t}a")
            assert pipe.get("{t}a") == b"2"
            other.set("{t}a", 10)
            pipe.multi()
            pipe.set("{t}a", 3)
            with pytest.raises(redis.WatchError):
                pipe.execute()
        assert client.get("{t}a") == b"10"
        tries = []

        def add(pipe: Any) -> None:
            value = int(pipe.get("{t}a"))
            if not tries:
                other.incr("{t}a")
            tries.append(value)
            pipe.multi()
            pipe.set("{t}a", value + 100)

        assert client.transaction(add, "{t}a") == [True]
        assert (tries, client.get("{t}a")) == ([10, 11], b"111")


@only_kvtcp
def test_a_transaction_has_keys_of_one_shard(server: Server) -> None:
    """Keys without a common tag in one transaction are refused as Redis Cluster does, and nothing of it happens."""
    with server.redis() as client:
        with client.pipeline(transaction=True) as pipe:
            for number in range(100):
                pipe.set(f"key:{number}", number)
            with pytest.raises(redis.RedisError, match="the same slot"):
                pipe.execute()
        assert client.dbsize() == 0
        assert client.set("key:1", "1") is True, "the connection is usable afterwards"


@only_kvtcp
def test_both_protocols_see_one_set_of_keys(server: Server) -> None:
    """What a Redis client writes, a kvtcp client of the same port reads, and the other way round."""
    with kvtcp.sync.connect(f"kvtcp://{server.host}:{server.port}") as kv, server.redis() as client:
        client.set("a", "from redis", ex=100)
        assert kv.get("a") == b"from redis"
        kv.put("b", "from kvtcp")
        assert client.get("b") == b"from kvtcp"
        assert client.dbsize() == 2
        client.delete("b")
        assert kv.get("b") is None


@protocols
async def test_redis_py_asyncio(server: Server, protocol: int) -> None:
    """The asynchronous client: many tasks at once on its pool, pipelines of both kinds, WATCH, iteration."""
    client = server.aio(protocol, max_connections=20)
    try:
        counts = await asyncio.gather(*(client.incr("n") for _ in range(20)))
        assert sorted(counts) == list(range(1, 21))
        async with client.pipeline(transaction=False) as pipe:
            for number in range(1000):
                pipe.set(f"key:{number}", number)
            assert await pipe.execute() == [True] * 1000
        async with client.pipeline(transaction=True) as pipe:
            assert await pipe.set("{t}a", 1).incr("{t}a").get("{t}a").execute() == [True, 2, b"2"]
        async with client.pipeline() as pipe:
            await pipe.watch("{t}a")
            await client.incr("{t}a")
            pipe.multi()
            pipe.set("{t}a", 0)
            with pytest.raises(redis.WatchError):
                await pipe.execute()
        assert await client.get("{t}a") == b"3"
        found = [key async for key in client.scan_iter("key:*", count=100)]
        assert len(found) == len(set(found)) == 1000
        assert await client.mget("key:0", "none", "key:999") == [b"0", None, b"999"]
    finally:
        await client.aclose()


# --- others ---------------------------------------------------------------------------------------------


@pytest.fixture
def talk(server: Server) -> Iterator[Callable[[str], list[str]]]:
    """Send a line as telnet does, get the lines of the answer; the connection is closed by the end of the test."""
    with socket.create_connection((server.host, server.port), 10) as connection, connection.makefile("rwb") as stream:

        def one(text: str) -> list[str]:
            """Send it, read one whole answer."""
            stream.write(text.encode() + b"\r\n")
            stream.flush()
            return answer()

        def answer() -> list[str]:
            line = stream.readline().decode()
            assert line.endswith("\r\n"), f"an end instead of an answer: {line!r}"
            head = line[:-2]
            if head[0] == "$" and head != "$-1":
                return [head, stream.read(int(head[1:]) + 2).decode()[:-2]]
            lines = [head]
            for _ in range(max(0, int(head[1:])) if head[0] == "*" else 0):
                lines += answer()
            return lines

        yield one
        stream.write(b"quit\r\n")
        stream.flush()
        assert stream.readline() == b"+OK\r\n"
        assert stream.read() == b"", "the server closes the connection after quit"


def test_telnet(talk: Callable[[str], list[str]]) -> None:
    """Commands as lines of text, as from telnet or nc: quoted words, spaces, empty lines, errors."""
    assert talk("set a 1") == ["+OK"]
    assert talk("get a") == ["$1", "1"]
    assert talk("incr a") == [":2"]
    assert talk("keys *") == ["*1", "$1", "a"]
    assert talk("get none") == ["$-1"]
    assert talk('SET "two words" "a\\tb\\x41"') == ["+OK"]
    assert talk("get 'two words'") == ["$4", "a\tbA"]
    assert talk("  get    a  ") == ["$1", "2"]
    assert talk("\r\n\r\nping") == ["+PONG"]
    assert talk("incr 'two words'")[0].startswith("-ERR value is not an integer")
    assert talk("nosuchcommand")[0].startswith("-ERR unknown command")
    assert talk("mget a none") == ["*2", "$1", "2", "$-1"]


def test_telnet_without_carriage_returns(server: Server) -> None:
    """nc sends lines that end with a line feed alone; many in one packet are answered in order."""
    with socket.create_connection((server.host, server.port), 10) as connection:
        connection.sendall(b"set a 1\nincr a\nget a\nquit\n")
        with connection.makefile("rb") as stream:
            assert stream.read() == b"+OK\r\n:2\r\n$1\r\n2\r\n+OK\r\n"


PERL = r"""
use strict; use warnings; use Redis;
my $r = Redis->new(server => $ARGV[0], name => 'perl', conservative_reconnect => 1);
sub is {
    my ($got, $wanted, $what) = @_;
    $got = 'undef' unless defined $got;
    $got eq $wanted or die "$what: $got, not $wanted";
}
is($r->ping, 'PONG', 'ping');
is($r->set('a', 'x y'), 'OK', 'set');
is($r->get('a'), 'x y', 'get');
is($r->get('none'), 'undef', 'get of nothing');
is($r->client_getname, 'perl', 'name');
is($r->incrby('n', 41), 41, 'incrby'); is($r->incr('n'), 42, 'incr');
is($r->mset(map { ("k$_" => $_) } 1 .. 100), 'OK', 'mset');
is(join(',', $r->mget('k1', 'k2', 'k100')), '1,2,100', 'mget');
is(scalar(my @keys = $r->keys('k*')), 100, 'keys');
my ($cursor, %seen) = (0);
do {
    my ($next, $found) = $r->scan($cursor, 'MATCH', 'k*');
    $cursor = $next;
    $seen{$_}++ for @$found;
} while ($cursor);
is(scalar(keys %seen), 100, 'scan');
is($r->setex('t', 100, 'v'), 'OK', 'setex'); die 'ttl' unless $r->ttl('t') > 90;
is(eval { $r->incr('a'); 1 } // 'error', 'error', 'incr of text');
die "error: $@" unless $@ =~ /not an integer/;
my $answered = 0;
$r->set("p$_", $_, sub { my ($reply, $error) = @_; $answered++ if $reply eq 'OK' && !defined $error }) for 1 .. 1000;
$r->wait_all_responses;
is($answered, 1000, 'pipeline');
$r->multi; $r->set('{t}a', 1); $r->incr('{t}a');
is(join(',', $r->exec), 'OK,2', 'transaction');
is(ref($r->info), 'HASH', 'info');
is($r->del('a', 'n', 'none'), 2, 'del');
$r->quit;
print "good\n";
"""


def test_perl(server: Server, tmp_path: Path) -> None:
    """A client in another language, with its own implementation of the protocol."""
    needs("perl")
    if subprocess.run(["perl", "-MRedis", "-e", "1"], capture_output=True).returncode != 0:
        pytest.skip("Perl's Redis is not installed")
    script = tmp_path / "client.pl"
    script.write_text(PERL)
    address = f"{server.host}:{server.port}"
    done = subprocess.run(["perl", str(script), address], capture_output=True, text=True, timeout=TOOL_S_MAX)
    assert (done.returncode, done.stdout, done.stderr) == (0, "good\n", "")
