"""Package definition of kvtcp: `pip install .` gives the library and its three commands."""

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
    *SHELL,
]

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
    install_requires=["msgpack>=1.0.8", "uvloop>=0.21; sys_platform != 'win32'"],
    extras_require={"shell": SHELL, "bench": BENCH, "peers": PEERS, "test": TEST},
    entry_points={
        "console_scripts": [
            "kvtcp-coordinator = kvtcp.server.coordinator_main:main",
            "kvtcp-node = kvtcp.server.node_main:main",
            "kvtcp-shell = kvtcp.shell.main:main",
        ],
        "pytest11": ["kvtcp = kvtcp.testing.pytest_plugin"],
    },
)
