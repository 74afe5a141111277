"""The pytest plugin, in test sessions of their own (pytester) and in this one."""

import subprocess
import sys

import pytest

import kvtcp
from kvtcp.testing import LocalCluster
from tests.processes.cluster import ROOT

TESTS = """
import asyncio
import kvtcp
import pytest

{strict}
@pytest.mark.kvtcp(nodes=2, replication_factor=2, shards=4)
async def test_marked(kvtcp_cluster):
    assert (len(kvtcp_cluster.nodes), kvtcp_cluster.factor, kvtcp_cluster.shards) == (2, 2, 4)
    async with kvtcp.connect(kvtcp_cluster.url) as kv:
        await kv.put("a", "1")

{strict}
async def test_plain(kvtcp_cluster):
    assert len(kvtcp_cluster.nodes) == 3
    async with kvtcp.connect(kvtcp_cluster.url) as kv:
        assert await kv.get("a") is None

@pytest.mark.kvtcp(nodes=1)
def test_sync(kvtcp_url):
    with kvtcp.sync.connect(kvtcp_url) as kv:
        kv["a"] = b"1"
        assert kv.status()["nodes"] == 1
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A session of a user who has kvtcp: from the entry point if it is installed here, else by name."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    return pytester


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_fixtures_in_both_modes(session: pytest.Pytester, mode: str) -> None:
    """Both fixtures and the marker work in the auto and the strict mode of pytest-asyncio, with strict markers."""
    session.makepyfile(TESTS.format(strict="@pytest.mark.asyncio" if mode == "strict" else ""))
    result = session.runpytest_subprocess(
        "--strict-markers", "-W", "error", "-o", f"asyncio_mode={mode}",
        "-o", "asyncio_default_fixture_loop_scope=function",
    )  # fmt: skip
    result.assert_outcomes(passed=3)


def test_without_pytest_asyncio(session: pytest.Pytester) -> None:
    """Without pytest-asyncio the synchronous fixture works, and nothing asks for the other."""
    session.makepyfile("def test_sync(kvtcp_url):\n    assert kvtcp_url.startswith('kvtcp://')\n")
    session.runpytest_subprocess("-p", "no:asyncio", "--strict-markers").assert_outcomes(passed=1)


def test_wrong_marker(session: pytest.Pytester) -> None:
    """Positional arguments of the marker are refused with a sentence."""
    session.makepyfile("import pytest\n@pytest.mark.kvtcp(3)\ndef test_it(kvtcp_url): pass\n")
    result = session.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*takes arguments by name only*"])


def test_nothing_is_loaded_for_others() -> None:
    """Importing the plugin loads neither servers nor event loop: other users' sessions start as fast as before."""
    code = (
        "import sys, pytest; before = set(sys.modules); import kvtcp.testing.pytest_plugin; "
        "new = set(sys.modules) - before; "
        "print(*sorted(n for n in new if n.split('.')[0] in ('asyncio', 'uvloop', 'msgpack', 'pytest_asyncio') "
        "or n.startswith(('kvtcp.coordinator', 'kvtcp.node', 'kvtcp.client', 'kvtcp.storage', 'kvtcp.testing.local'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


async def test_the_fixture_here(kvtcp_cluster: LocalCluster) -> None:
    """This session has the plugin too."""
    async with kvtcp.connect(kvtcp_cluster.url) as kv:
        assert await kv.put("a", "1") == 1
