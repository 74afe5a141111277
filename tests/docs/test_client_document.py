"""docs/client.md says what the clients do: methods, signatures and numbers are compared with the code."""

import inspect
import re
from pathlib import Path

import kvtcp
from kvtcp import AsyncClient, SyncClient, codecs, constants
from kvtcp.client.sync import connect as connect_sync

TEXT = (Path(__file__).parent.parent.parent / "docs" / "client.md").read_text()
SYNC_TEXT = TEXT[TEXT.index("## SyncClient") :]


def members(client: type) -> dict[str, object]:
    """What a client has that is public, by name."""
    return {name: getattr(client, name) for name in dir(client) if not name.startswith("_")}


def signature(name: str, function: object) -> str:
    """`name(arguments with their defaults)`, without self and types."""
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters if p.name != "self"]
    return name + str(inspect.Signature(plain))


def test_every_method_is_described_as_it_is() -> None:
    """Each public method of the asynchronous client is in a table with its signature, and there is no other."""
    described = set(re.findall(r"^\| `([^`]+)` \|", TEXT[: TEXT.index("## Errors")], re.M))
    methods = {signature(n, m) if callable(m) else n for n, m in members(AsyncClient).items()}
    assert described == methods


def test_the_synchronous_client_has_the_same_and_a_mapping() -> None:
    """The synchronous client has every method with the same arguments; what it has besides is in its own section."""
    others = members(SyncClient)
    for name, member in members(AsyncClient).items():
        if callable(member):
            assert signature(name, others.pop(name)) == signature(name, member)
        else:
            assert others.pop(name)
    for name in others:
        assert f"`{name}(" in SYNC_TEXT, f"{name} is not described"


def test_connect_is_described_as_it_is() -> None:
    """Both ways to connect take what the page says."""
    described = re.search(r"`connect\((.+?)\)` connects", TEXT)
    assert described is not None
    names = [part.partition("=")[0] for part in described[1].split(", ")]
    for function in (kvtcp.connect, connect_sync):
        assert list(inspect.signature(function).parameters) == [name for name in names if name != "*"]
    assert f"timeout={inspect.signature(kvtcp.connect).parameters['timeout'].default}," in described[1]


def test_errors_and_codecs() -> None:
    """Every class of errors that is public, and every codec, is in the page."""
    classes = [getattr(kvtcp, name) for name in kvtcp.__all__ if inspect.isclass(getattr(kvtcp, name))]
    errors = [found.__name__ for found in classes if issubclass(found, kvtcp.KvtcpError)]
    assert len(errors) > 8
    for name in errors:
        assert name in TEXT
    for name, member in vars(codecs).items():
        if hasattr(member, "decode") and not inspect.isclass(member):
            assert f"| `codecs.{name}` |" in TEXT


def test_numbers() -> None:
    """The limits and defaults of the page are those of the code."""
    assert f"1 to {constants.KEY_BYTES_MAX} bytes" in TEXT
    assert f"at most {constants.VALUE_BYTES_MAX // constants.MIB} MiB" in TEXT
    assert f"(1 to {constants.PAGE_ITEMS_MAX}) pairs" in TEXT
    mib, keys = constants.CLIENT_CHUNK_BYTES // constants.MIB, constants.CLIENT_CHUNK_KEYS_MAX
    assert f"about {mib} MiB or {keys} keys, up to {constants.CLIENT_CHUNKS_MAX} of them" in TEXT
    assert f"timeout={constants.CLIENT_ADMIN_IDLE_MS / 1000})" in TEXT
