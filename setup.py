"""Package definition of kvtcp: `pip install .` gives the library and its three commands.

With KVTCP_COMPILE=1 the coordinator's path of every request is compiled by mypyc (which needs mypy and a C compiler):
the same source, a quarter less CPU per request. Everything works without, and is tested both ways.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"$', (HERE / "kvtcp" / "_version.py").read_text(), re.M).group(1)

SHELL = ["prompt_toolkit>=3.0.40", "rich>=13.0"]
BENCH = ["BTrees>=6.0", "sortedcontainers>=2.4"]
# what `make bench-full` compares with and draws; servers among the peers are Debian's packages
PEERS = ["lmdb>=1.4", "pysyncobj>=0.3.12", "matplotlib>=3.8"]
TEST = [
    "pytest>=8.0",
    "pytest-asyncio>=0.24",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "coverage>=7.5",
    "ruff>=0.6",
    "mypy>=1.11",
    "redis>=5.0",
    "matplotlib>=3.8",
    *SHELL,
]

# What a request passes through in the coordinator. Nodes gain nothing: their time goes into msgpack and memory.
COMPILED = [
    "constants", "errors", "protocol/hashing", "protocol/operations", "replication/sequencing/requests",
    "replication/sequencing/link", "replication/sequencing/multi_read", "replication/sequencing/following",
    "replication/sequencing/cluster_state", "replication/sequencing/shard", "replication/sequencing/reads",
    "replication/sequencing/sequencer", "frontend/resp/parser", "frontend/resp/replies", "frontend/resp/client_state",
    "frontend/resp/pipeline",
]  # fmt: skip


def extensions() -> list:
    """The compiled modules, none unless they are asked for."""
    if os.environ.get("KVTCP_COMPILE") != "1":
        return []
    from mypyc.build import mypycify

    return mypycify([f"kvtcp/{name}.py" for name in COMPILED], opt_level="3")


setup(
    name="kvtcp",
    version=VERSION,
    description="A distributed, replicated, ordered key-value store in Python",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["kvtcp", "kvtcp.*"]),
    package_data={"kvtcp": ["py.typed"]},
    ext_modules=extensions(),
    install_requires=["msgpack>=1.0.8", "uvloop>=0.21; sys_platform != 'win32'"],
    extras_require={"shell": SHELL, "bench": BENCH, "peers": PEERS, "test": TEST},
    entry_points={
        "console_scripts": [
            "kvtcp-coordinator = kvtcp.coordinator.main:main",
            "kvtcp-node = kvtcp.node.main:main",
            "kvtcp-shell = kvtcp.shell.main:main",
        ],
        "pytest11": ["kvtcp = kvtcp.testing.pytest_plugin"],
    },
)
