"""Import and export: streams, gzip, damage, order of equal keys, and what is told when something goes wrong."""

import asyncio
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvtcp.constants import IMPORT_CHUNK_BYTES, IMPORT_CHUNK_RECORDS, IMPORT_CHUNKS_MAX, JSON_LINE_BYTES_MAX
from kvtcp.errors import BatchError, Code, DataError, OutcomeUnknown, RequestError, Unavailable
from kvtcp.jsonl import encode_pair
from kvtcp.shell.transfer import ChunkBuilder, LineReader, Sender
from tests.support.shell_fakes import FakeClient, Shell


def lines_of(count: int, start: int = 0) -> bytes:
    """JSON lines of so many pairs."""
    return b"".join(encode_pair(b"k%06d" % n, b"v%d" % n).encode() + b"\n" for n in range(start, start + count))


def run_piped(shell: Shell, data: bytes, *arguments: str) -> int:
    """Run the shell with stdin that is a pipe: it cannot be read twice."""
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb", buffering=0) as stream:
            for start in range(0, len(data), 10_000):
                try:
                    stream.write(data[start : start + 10_000])
                except BrokenPipeError:
                    return

    thread = threading.Thread(target=feed)
    thread.start()
    streams = shell.streams()
    with os.fdopen(reader, "rb", buffering=0) as stdin:
        streams.stdin = stdin
        from kvtcp.shell.main import main

        code = main(arguments, streams=streams, connect=shell.client.connect)
    thread.join(10)
    assert isinstance(streams.stdout, io.BytesIO) and isinstance(streams.stderr, io.StringIO), "memory streams"
    shell.out, shell.err = streams.stdout.getvalue(), streams.stderr.getvalue()
    return code


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_import_stores_every_pair(shell: Shell, tmp_path: Path, packed: bool, piped: bool) -> None:
    """Plain or gzip, file or pipe, told apart by content alone: every pair is stored, and the number is printed."""
    data = lines_of(2345) + b'{"key_b64": "/w==", "value_b64": "AA==", "ttl_ms": 1500, "rev": 9}'
    data = gzip.compress(data) if packed else data
    if piped:
        code = run_piped(shell, data, "import", "-")
    else:
        (tmp_path / "data").write_bytes(data)
        code = shell.run("import", str(tmp_path / "data"))
    assert (code, shell.out, shell.err) == (0, b"imported 2346\n", "")
    assert len(shell.client.cells) == 2346
    assert shell.client.cells[b"k000007"].value == b"v7"
    assert shell.client.cells[b"\xff"][1::2] == (b"\x00", 1.5)
    assert 1 < shell.client.in_flight_max <= IMPORT_CHUNKS_MAX


def test_import_of_nothing(shell: Shell, tmp_path: Path) -> None:
    """An empty file is a file with no pairs."""
    (tmp_path / "empty").write_bytes(b"")
    assert (shell.run("import", str(tmp_path / "empty")), shell.out) == (0, b"imported 0\n")
    assert (shell.run("import", "-", stdin=b""), shell.out) == (0, b"imported 0\n")
    assert (shell.run("import", "-", "-o", "json", stdin=lines_of(1)), shell.out) == (0, b'{"imported": 1}\n')


def test_import_of_a_missing_file(shell: Shell, tmp_path: Path) -> None:
    """A file that is not there is a mistake of the call."""
    assert shell.run("import", str(tmp_path / "none")) == 2
    assert shell.err == f"kvtcp-shell: {tmp_path / 'none'}: No such file or directory\n"


def test_bad_line_of_a_file_changes_nothing(shell: Shell, tmp_path: Path) -> None:
    """A file is checked to its end first: exit code 7, file and line are named, no pair is stored."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines_of(3000) + b'{"key": 1}\n' + lines_of(10, 5000))
    assert shell.run("import", str(path)) == 7
    assert shell.out == b"" and shell.client.cells == {} and shell.client.opened == []
    assert shell.err.startswith(f"kvtcp-shell: {path}, line 3001: ") and shell.err.endswith("; nothing was written\n")


def test_bad_line_of_a_pipe(shell: Shell) -> None:
    """Of a pipe the pairs before the bad line are stored, none after it, and their number is told."""
    assert run_piped(shell, lines_of(1234) + b"nonsense\n" + lines_of(2000, 5000), "import", "-") == 7
    assert shell.out == b""
    assert "standard input, line 1235: " in shell.err
    assert shell.err.endswith("; the 1234 records before it were written\n")
    assert sorted(shell.client.cells) == [b"k%06d" % n for n in range(1234)]


def test_truncated_gzip(shell: Shell, tmp_path: Path) -> None:
    """gzip data that ends early, is damaged, or is followed by something else is bad data."""
    whole = gzip.compress(lines_of(1000))
    for damaged, text in (
        (whole[:-5], "the gzip data ends early"),
        (whole[:-8] + b"\0\0\0\0" + whole[-4:], "damaged gzip data"),
        (whole + b"more", "damaged gzip data"),
    ):
        (tmp_path / "x.gz").write_bytes(damaged)
        assert shell.run("import", str(tmp_path / "x.gz")) == 7
        assert text in shell.err and shell.client.cells == {}
    (tmp_path / "x.gz").write_bytes(whole + whole + b"\0" * 100)
    assert shell.run("import", str(tmp_path / "x.gz")) == 0
    assert shell.out == b"imported 2000\n"


class Refusing(FakeClient):
    """Fails the third put_many."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.puts = 0

    async def put_many(self, items: Sequence[tuple[bytes, bytes, float | None]]) -> list[int]:
        self.puts += 1
        if self.puts == 3:
            await asyncio.sleep(0)
            raise self.error
        return await super().put_many(items)


@pytest.mark.parametrize(("error", "code"), [
    (Unavailable("shard 3 has 1 of 2 replicas", Code.NOT_ENOUGH_REPLICAS), 6),
    (OutcomeUnknown("the connection was lost"), 5),
    (Unavailable("no connection within 2 s"), 3),
    (BatchError("some keys failed", [7, OutcomeUnknown("lost"), Unavailable("no", Code.NO_SPACE)]), 5),
    (BatchError("some keys failed", [7, 8, RequestError("too large", Code.TOO_LARGE)]), 6),
])  # fmt: skip
def test_failing_cluster_ends_an_import(tmp_path: Path, error: Exception, code: int) -> None:
    """An import stops at the first chunk that fails, with its code, and tells how many records were written."""
    (tmp_path / "data").write_bytes(lines_of(20 * IMPORT_CHUNK_RECORDS))
    shell = Shell(Refusing(error))
    assert shell.run("import", str(tmp_path / "data")) == code
    written = len(shell.client.cells)
    done = sum(isinstance(result, int) for result in error.results) if isinstance(error, BatchError) else 0
    assert f"kvtcp-shell: {written + done} records were written before the error\n" in shell.err
    assert str(error) in shell.err and shell.out == b""
    assert written < 20 * IMPORT_CHUNK_RECORDS


def test_later_of_equal_keys_wins() -> None:
    """Chunks with a key in common are not in flight together, so the later line wins however slow the first is."""

    async def scenario() -> None:
        client = FakeClient()
        release = asyncio.Event()
        order: list[int] = []
        put_many = client.put_many

        async def slow_first(items: Sequence[tuple[bytes, bytes, float | None]]) -> list[int]:
            number = len(order)
            order.append(number)
            if number == 0:
                await release.wait()
            return await put_many(items)

        client.put_many = slow_first  # type: ignore[method-assign]
        sender = Sender(client)
        builder = ChunkBuilder("x")
        chunks = []
        for value in (b'"1"', b'"2"'):
            assert list(builder.add([b'{"key": "a", "value": ' + value + b"}"])) == []
            chunks.append(builder.rest())
        await sender.send(chunks[0])
        second = asyncio.create_task(sender.send(chunks[1]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == [0], "the second waits"
        release.set()
        await second
        await sender.drain()
        assert client.cells[b"a"].value == b"2" and sender.written == 2

    asyncio.run(scenario())


def test_chunks_are_bounded_and_count_lines() -> None:
    """A chunk ends at its number of keys or bytes; equal keys in it are one item, but each line counts."""
    builder = ChunkBuilder("x")
    small = list(builder.add(lines_of(2 * IMPORT_CHUNK_RECORDS + 1).splitlines()))
    assert [chunk.lines for chunk in small] == [IMPORT_CHUNK_RECORDS] * 2 and builder.rest().lines == 1
    value = b"x" * (IMPORT_CHUNK_BYTES // 2)
    large = list(builder.add([encode_pair(b"%d" % n, value).encode() for n in range(5)]))
    assert [chunk.lines for chunk in large] == [2, 2] and builder.rest().lines == 1
    assert list(builder.add([b'{"key": "a", "value": "%d"}' % n for n in range(3)])) == []
    rest = builder.rest()
    assert (rest.items, rest.lines) == ({b"a": (b"a", b"2", None)}, 3)
    assert builder.lines == 2 * IMPORT_CHUNK_RECORDS + 1 + 5 + 3


def test_chunk_before_a_bad_line_is_kept() -> None:
    """After a bad line `rest` has exactly what came before it."""
    builder = ChunkBuilder("x")
    with pytest.raises(DataError, match="x, line 3: "):
        list(builder.add([*lines_of(2).splitlines(), b"{}", *lines_of(2, 7).splitlines()]))
    assert builder.rest().lines == 2


@given(
    st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b), max_size=20), st.booleans(),
    st.lists(st.integers(1, 700), min_size=1, max_size=20),
)  # fmt: skip
@example([b"\xef\xbb\xbf"], False, [1])
@example([b"\xef\xbb\xbf\xef\xbb\xbf{}", b"\xef\xbb\xbf"], True, [2])
def test_lines_do_not_depend_on_blocks(lines: list[bytes], packed: bool, sizes: list[int]) -> None:
    """However a file is cut into blocks, plain or gzip, the lines come out; a byte order mark before them does not."""
    content = b"\n".join(lines)
    if not packed and content.startswith(b"\x1f\x8b"):
        return
    expected = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    stream = io.BytesIO(gzip.compress(content) if packed else content)
    reader, seen = LineReader("x"), []
    for size in itertools.cycle(sizes):
        block = stream.read(size)
        if not block:
            break
        for some in reader.feed(block):
            seen += some
    assert seen + reader.finish() == expected


def test_a_line_without_end_is_refused() -> None:
    """A line longer than any pair is refused while it is read, not collected."""
    reader = LineReader("x")
    block = b"a" * (1 << 20)
    with pytest.raises(DataError, match="x, line 1: longer than"):
        for _ in range(JSON_LINE_BYTES_MAX // len(block) + 1):
            list(reader.feed(block))


def test_a_small_gzip_file_does_not_become_large_memory() -> None:
    """Decompression goes in pieces: a block of well-packed zeros is refused before it is unpacked as a whole."""
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(packed.compress(bytes(1 << 20)) for _ in range(JSON_LINE_BYTES_MAX // (1 << 20) + 2))
    with pytest.raises(DataError, match="longer than"):
        list(LineReader("x").feed(data + packed.flush()))


def test_export_and_import_round_trip(shell: Shell, tmp_path: Path) -> None:
    """What is exported comes back as it was: text, bytes, deadlines; sorted, and gzip by the name's end."""
    shell.client._set(b"b", "Zoë\n".encode(), 60.0)
    shell.client._set(b"a\xff", b"\x00\xff", None)
    for n in range(1100):
        shell.client._set(b"k%d" % n, b"v", None)
    assert (shell.run("export", str(tmp_path / "x.jsonl")), shell.out) == (0, b"exported 1102\n")
    assert (shell.run("export", str(tmp_path / "x.gz")), shell.out) == (0, b"exported 1102\n")
    data = (tmp_path / "x.jsonl").read_bytes()
    assert gzip.decompress((tmp_path / "x.gz").read_bytes()) == data
    assert data.splitlines()[:2] == [
        b'{"key_b64": "Yf8=", "value_b64": "AP8=", "rev": 2}',
        b'{"key": "b", "value": "Zo\xc3\xab\\n", "rev": 1, "ttl_ms": 60000}',
    ]
    assert (shell.run("export", "-"), shell.out) == (0, data)
    other = Shell()
    assert other.run("import", str(tmp_path / "x.gz")) == 0
    assert {k: (e.value, e.ttl) for k, e in other.client.cells.items()} == {
        k: (e.value, e.ttl) for k, e in shell.client.cells.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gz", "x.jsonl"]


def test_failed_export_leaves_the_old_file(shell: Shell, tmp_path: Path) -> None:
    """An export that fails changes neither the file of its name nor leaves another behind."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"old")
    shell.client.failure = None

    async def scan_entries(**_: object) -> Any:
        for n in range(700):
            yield shell.client.cells.setdefault(b"%d" % n, type(shell.client.cells[b"a"])(b"%d" % n, b"", n, None))
        raise Unavailable("gone")

    shell.client._set(b"a", b"1", None)
    shell.client.scan_entries = scan_entries  # type: ignore[method-assign]
    assert shell.run("export", str(path)) == 3
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_export_through_a_link_and_to_a_device(shell: Shell, tmp_path: Path) -> None:
    """The target of a symbolic link is replaced, not the link; a device is written, not replaced."""
    shell.client._set(b"a", b"1", None)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert shell.run("export", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "real").read_bytes())["key"] == "a"
    assert shell.run("export", os.devnull) == 0
    assert not Path(os.devnull).is_file()
    assert shell.run("export", str(tmp_path)) == 2
    assert shell.run("export", str(tmp_path / "none" / "x")) == 2


def test_progress_on_a_terminal(shell: Shell, tmp_path: Path) -> None:
    """On a terminal a bar is drawn on stderr and removed at the end; stdout has the last line alone."""
    (tmp_path / "data").write_bytes(lines_of(3000))
    assert shell.run("import", str(tmp_path / "data"), terminal=True) == 0
    assert shell.out == b"imported 3000\n"
    assert "check" in shell.err and "import" in shell.err and shell.err.endswith("\r\x1b[K")


def test_interrupt_does_not_wait_for_a_pipe() -> None:
    """Ctrl-C ends an import whose pipe never ends, with 130, and tells what was written."""
    program = (
        "import sys; sys.path[:0] = ['.']\n"
        "from tests.support.shell_fakes import FakeClient; from kvtcp.shell.main import main\n"
        "sys.exit(main(['import', '-'], connect=FakeClient().connect))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdin is not None and process.stderr is not None, "pipes were asked for"
        process.stdin.write(lines_of(IMPORT_CHUNK_RECORDS))
        process.stdin.flush()
        threads = Path(f"/proc/{process.pid}/task")
        if not threads.exists():
            pytest.skip("needs /proc to see that the import waits")
        deadline = threading.Event()
        for _ in range(1000):
            if len(list(threads.iterdir())) > 1:  # the thread that reads the pipe
                break
            deadline.wait(0.01)
        process.send_signal(2)
        assert process.wait(10) == 130
        # the first chunk may or may not have had its answer
        assert process.stderr.read() in [
            b"kvtcp-shell: interrupted; %d records were written, and perhaps a few more\n" % written
            for written in (0, IMPORT_CHUNK_RECORDS)
        ]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n" + lines_of(2)])
def test_a_byte_order_mark_is_skipped(shell: Shell, pack: Any, ending: bytes) -> None:
    """The mark that some editors write at the beginning of UTF-8 is no part of the first line; elsewhere it is bad."""
    line = b'{"key": "a", "value": "1"}'
    assert run_piped(shell, pack(b"\xef\xbb\xbf" + line + ending), "import", "-") == 0
    assert shell.client.cells[b"a"].value == b"1"
    assert run_piped(shell, pack(line + b"\n\xef\xbb\xbf" + line + b"\n"), "import", "-") == 7
    assert "line 2" in shell.err


def test_a_byte_order_mark_comes_in_pieces() -> None:
    """The mark is skipped however the blocks are cut, and a file of a mark alone has no lines."""
    for data, lines in ((b"\xef\xbb\xbf{}\n{}", [b"{}", b"{}"]), (b"\xef\xbb\xbf", []), (b"\xef\xbb\xbf\n", [b""])):
        reader = LineReader("f")
        found = [line for byte in data for some in reader.feed(bytes([byte])) for line in some]
        assert found + reader.finish() == lines
