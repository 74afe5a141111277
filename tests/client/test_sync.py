"""The synchronous client: the same results, threads, Ctrl-C, fork, and the mapping."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvtcp
from kvtcp import AdminError, BatchError, Entry, KeyExists, OutcomeUnknown, SyncClient, Unavailable, codecs
from kvtcp.client import loop_thread
from kvtcp.errors import Code
from tests.processes.cluster import is_waiting, wait_for
from tests.support import fake_server
from tests.support.fake_server import FakeServer


class ServerThread:
    """A scripted server in a thread of its own. `do` runs a function in it."""

    def __init__(self) -> None:
        self.server = FakeServer()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self.server.start())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        async def call() -> Any:
            return function(*args)

        return self.run(call())

    def stop(self) -> None:
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def peer() -> Iterator[ServerThread]:
    peer = ServerThread()
    yield peer
    peer.stop()


@pytest.fixture
def kv(peer: ServerThread) -> Iterator[SyncClient[bytes]]:
    with kvtcp.sync.connect(peer.server.url) as kv:
        yield kv


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work` with each number in a thread of its own; return when all have ended."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def client_threads() -> int:
    """Loop threads that run now."""
    return sum(thread.name == "kvtcp-client" for thread in threading.enumerate())


def test_every_method(kv: SyncClient[bytes]) -> None:
    """Each method gives what its asynchronous namesake gives."""
    assert kv.put("a", "1", ttl=60) == 1
    assert kv.get("a") == b"1"
    assert kv.get("none", 5) == 5
    with pytest.raises(KeyExists):
        kv.add("a", b"x")
    assert kv.add("b", b"2") == 2
    assert kv.cas("b", b"3", if_value=b"2") == 3
    assert kv.get_entry("b") == Entry(b"b", b"3", 3, None)
    assert kv.delete("b", if_rev=2) is False
    assert kv.incr("n", 5) == 5
    assert kv.exists("n") is True
    assert kv.expire("n", 60) is True
    assert 59 < (kv.ttl("n") or 0) <= 60
    assert kv.persist("n") is True
    assert kv.put_many({"x1": b"1", "x2": b"2"}, ttl=9) == [7, 8]
    assert kv.get_many(["x1", "none"]) == [b"1", None]
    assert [None if e is None else e.value for e in kv.get_many_entries(["x2", "none"])] == [b"2", None]
    assert list(kv.scan(prefix="x")) == [(b"x1", b"1"), (b"x2", b"2")]
    assert list(kv.scan(limit=1, keys_only=True)) == [(b"a", None)]
    assert list(kv.scan_keys(reverse=True, limit=2)) == [b"x2", b"x1"]
    assert [entry.key for entry in kv.scan_entries(start="b", end="o")] == [b"b", b"n"]
    assert list(kv.scan_pages(page_items=3)) == [
        [(b"a", b"1"), (b"b", b"3"), (b"n", b"5")], [(b"x1", b"1"), (b"x2", b"2")],
    ]  # fmt: skip
    assert kv.count() == 5
    assert kv.delete_many(["x1", "none"]) == [True, False]
    assert kv.status()["state"] == "ready"
    assert kv.nodes()[0]["id"] == "n1"
    assert kv.shards()[0]["replicas"] == ["n1"]
    assert kv.restore("b", dry_run=True)["dry_run"] is True
    assert kv.node_add("h", 5000).node == "n4"
    assert kv.node_drain("n1").shards == 21
    with pytest.raises(AdminError):
        kv.node_remove("n1")
    assert kv.node_forget("n1").node == "n1"
    assert kv.rebalance(dry_run=True).left == 0
    assert kv.shard_accept_loss(5).shard == 5
    assert kv.info.cluster == "c-1"
    assert kv.url.startswith("kvtcp://127.0.0.1:")


def test_mapping(kv: SyncClient[bytes]) -> None:
    """It is a MutableMapping, in key order."""
    kv["b"] = b"2"
    kv["a"] = "1"
    assert (kv["a"], len(kv), list(kv)) == (b"1", 2, [b"a", b"b"])
    assert "a" in kv and "c" not in kv and "" not in kv and 5 not in kv
    assert dict(kv) == dict(kv.scan()) == dict(kv.items()) == {b"a": b"1", b"b": b"2"}
    assert list(kv.values()) == [b"1", b"2"] and (b"a", b"1") in kv.items()
    del kv["a"]
    for missing in (lambda: kv["a"], lambda: kv.__delitem__("a"), lambda: kv.pop("a")):
        with pytest.raises(KeyError):
            missing()
    assert kv.pop("a", b"x") == b"x"
    assert kv.setdefault("b", b"9") == b"2" and kv.setdefault("c", b"9") == b"9"
    kv.update({"d": b"4"})
    assert kv.pop("d") == b"4"
    assert kv.popitem() == (b"b", b"2")
    kv.put_many({f"k{i}": b"" for i in range(20)})
    kv.clear()
    assert len(kv) == 0
    with pytest.raises(KeyError):
        kv.popitem()
    assert kv == kv and kv != {} and hash(kv)


def test_pop_gives_a_value_to_one_caller(kv: SyncClient[bytes]) -> None:
    """Threads that pop the same keys get each value exactly once."""
    kv.put_many({f"k{i}": str(i) for i in range(40)})
    got: list[bytes] = []

    def work(_: int) -> None:
        for i in range(40):
            value = kv.pop(f"k{i}", None)
            if value is not None:
                got.append(value)

    in_threads(work, 4)
    assert sorted(got, key=int) == [str(i).encode() for i in range(40)]


def test_threads_share_the_connection(kv: SyncClient[bytes], peer: ServerThread) -> None:
    """Many threads at once, one connection, each with its own answers."""
    wrong: list[str] = []

    def work(number: int) -> None:
        for i in range(50):
            key = f"{number}-{i}"
            kv.put(key, key)
            if kv.get(key) != key.encode():
                wrong.append(key)

    in_threads(work, 8)
    assert wrong == []
    assert len(kv) == 400
    assert peer.server.accepted == 1


def test_codec(peer: ServerThread) -> None:
    """Values pass through the codec of the client."""
    with kvtcp.sync.connect(peer.server.url, codec=codecs.msgpack) as kv:
        kv["a"] = {"x": [1, b"\xff"]}
        assert kv["a"] == {"x": [1, b"\xff"]}
        assert dict(kv.scan()) == {b"a": {"x": [1, b"\xff"]}}


def test_errors(kv: SyncClient[bytes], peer: ServerThread) -> None:
    """Errors are those of the asynchronous client, and leave no chain of references behind."""
    peer.do(peer.server.on, b"put", fake_server.drop)
    with pytest.raises(OutcomeUnknown):
        kv.put("a", b"1", timeout=0.05)
    peer.do(peer.server.on, b"mput", fake_server.error(Code.UNKNOWN))
    with pytest.raises(OutcomeUnknown):
        kv.put_many({"a": b"1"})
    peer.server.script[b"put item"].extend([None, [int(Code.UNKNOWN), "", {}]])  # type: ignore[list-item]
    with pytest.raises(BatchError):
        kv.put_many({"a": b"1", "b": b"2"})


def test_progress_is_called_in_the_callers_thread(kv: SyncClient[bytes], peer: ServerThread) -> None:
    """Progress comes to the thread that asked; an exception of the callback ends the call there."""
    steps = [fake_server.reply(1, {"keys": 1}), fake_server.reply(1, {"keys": 2}), fake_server.execute]
    peer.do(peer.server.on, b"backup", fake_server.several(*steps))
    seen: list[Any] = []
    kv.backup(progress=lambda fields: seen.append((threading.current_thread(), fields)))
    assert seen == [(threading.current_thread(), {"keys": 1}), (threading.current_thread(), {"keys": 2})]
    peer.do(peer.server.on, b"backup", fake_server.several(*steps))
    with pytest.raises(ZeroDivisionError):
        kv.backup(progress=lambda fields: fields["keys"] / 0)
    assert kv.get("a") is None


def test_ctrl_c_cancels_the_call(kv: SyncClient[bytes], peer: ServerThread) -> None:
    """KeyboardInterrupt comes at once, and the client goes on working."""
    peer.do(peer.server.on, b"get", peer.server.hold)

    def interrupt() -> None:
        wait_for(lambda: peer.server.held and is_waiting(os.getpid()), "a call that waits")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        kv.get("a", timeout=30)
    assert time.monotonic() - started < 10
    assert kv.put("a", b"1") == 1
    peer.do(peer.server.release)
    assert kv.get("a") == b"1"


def test_close(peer: ServerThread) -> None:
    """A call that waits ends when another thread closes the client; later ones say so; the loop thread ends."""
    before = client_threads()
    kv = kvtcp.sync.connect(peer.server.url)
    assert client_threads() == before + (0 if before else 1)
    peer.do(peer.server.on, b"put", peer.server.hold)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            kv.put("a", b"", timeout=30)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: peer.server.held, "the request")
    kv.close()
    kv.close()
    thread.join(10)
    assert [type(error) for error in caught] == [OutcomeUnknown]
    for call in (lambda: kv.get("a"), lambda: list(kv.scan()), lambda: kv.info, lambda: kv.backup(progress=print)):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    assert client_threads() == before
    wait_for(lambda: not peer.server.connections, "the end of the connection")


def test_clients_share_a_thread(peer: ServerThread) -> None:
    """Two clients have one loop thread; it ends with the last of them."""
    with kvtcp.sync.connect(peer.server.url) as one:
        with kvtcp.sync.connect(peer.server.url) as two:
            assert client_threads() == 1
            two["a"] = b"1"
        assert client_threads() == 1
        assert one["a"] == b"1"
    assert client_threads() == 0


def test_nobody_there() -> None:
    """Connecting to nobody fails within the timeout and leaves no thread."""
    with pytest.raises(Unavailable, match="connection refused"):
        kvtcp.sync.connect("kvtcp://127.0.0.1:1", timeout=0.1)
    assert client_threads() == 0


def test_in_its_own_loop() -> None:
    """A synchronous call in the loop thread would wait for itself: it is refused."""
    thread = loop_thread.acquire()
    try:

        async def inner() -> None:
            thread.run(asyncio.sleep(0))

        with pytest.raises(RuntimeError, match="in its own event loop"):
            thread.run(inner())
    finally:
        loop_thread.release(thread)


def test_fork(kv: SyncClient[bytes], peer: ServerThread) -> None:
    """A child gets a connection of its own; the parent's goes on, and its end is seen by the server."""
    kv["a"] = b"1"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kv["child"] = kv["a"]
            kv.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kv["child"] == b"1"
    assert peer.server.accepted == 2
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        kv.close()
        wait_for(lambda: not peer.server.connections, "the end: the child does not hold the parent's socket open")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_exit_without_close(peer: ServerThread) -> None:
    """A program that forgets to close ends by itself, quietly."""
    program = f"import kvtcp; kv = kvtcp.sync.connect({peer.server.url!r}); kv['a'] = b'1'; print(kv['a'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'1'\n", "")


def test_import_is_lazy() -> None:
    """`import kvtcp` loads neither asyncio nor msgpack, and every public name is there when asked for."""
    program = (
        "import sys, kvtcp; assert not {'asyncio', 'msgpack', 'uvloop'} & set(sys.modules), 'loaded';"
        "assert all(getattr(kvtcp, name) is not None for name in kvtcp.__all__);"
        "assert set(kvtcp.__all__) <= set(dir(kvtcp))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kvtcp.nothing  # type: ignore[attr-defined]
