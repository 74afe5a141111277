"""Addresses: what is accepted, and what is said about the rest."""

import pytest

from kvtcp.client.url import URL_DEFAULT, Address, parse_url
from kvtcp.errors import RequestError


@pytest.mark.parametrize(("url", "address"), [
    ("kvtcp://127.0.0.1:8000", Address("127.0.0.1", 8000)),
    ("kvtcp://db.example:9", Address("db.example", 9)),
    ("kvtcp://db.example", Address("db.example", 8000)),
    ("kvtcp://db.example/", Address("db.example", 8000)),
    ("kvtcp://:7000", Address("127.0.0.1", 7000)),
    ("kvtcp://", Address("127.0.0.1", 8000)),
    ("kvtcp://[::1]:65535", Address("::1", 65535)),
    ("kvtcp://[fe80::1]", Address("fe80::1", 8000)),
    (URL_DEFAULT, Address("127.0.0.1", 8000)),
])  # fmt: skip
def test_accepted(url: str, address: Address) -> None:
    """Host and port may be left out, IPv6 stands in brackets, and the result reads back."""
    assert parse_url(url) == address
    assert parse_url(address.url) == address


@pytest.mark.parametrize(("url", "reason"), [
    ("127.0.0.1:8000", "does not start with kvtcp://"),
    ("http://127.0.0.1", "does not start with kvtcp://"),
    ("kvtcp://h:0", "'0' is not a port"),
    ("kvtcp://h:65536", "'65536' is not a port"),
    ("kvtcp://h:", "'' is not a port"),
    ("kvtcp://h:8x", "'8x' is not a port"),
    ("kvtcp://h:\u0661", "is not a port"),
    ("kvtcp://h:" + "9" * 5000, "is not a port"),
    ("kvtcp://::1:80", "needs brackets"),
    ("kvtcp://[::1", "brackets"),
    ("kvtcp://[::1]80", "brackets"),
    ("kvtcp://[::g]:80", "'::g' is not an IPv6 address"),
    ("kvtcp://me@h", "a user has no meaning"),
    ("kvtcp://h/path", "a path has no meaning"),
    ("kvtcp://h?x=1", "a query has no meaning"),
    ("kvtcp://h#x", "a fragment has no meaning"),
    ("kvtcp://a b", "not the name of a host"),
])  # fmt: skip
def test_refused(url: str, reason: str) -> None:
    """A wrong address is a RequestError that says what is wrong and shows a right one."""
    with pytest.raises(RequestError, match=r"kvtcp://127\.0\.0\.1:8000") as caught:
        parse_url(url)
    assert reason in str(caught.value)


def test_not_text() -> None:
    """Something that is not text is refused too, not an AttributeError."""
    with pytest.raises(RequestError, match="must be text, not int"):
        parse_url(8000)  # type: ignore[arg-type]
