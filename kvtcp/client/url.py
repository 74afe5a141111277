"""Addresses of a cluster as a user writes them: `kvtcp://host:port`.

Pure. The host is a name, an IPv4 address or an IPv6 address in brackets; both parts may be left out and are then
127.0.0.1 and 8000. There is nothing else in such a URL yet: a user, a path, a query or a fragment is refused with a
sentence rather than ignored, so that they can get a meaning later.
"""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple

from kvtcp.constants import HOST_DEFAULT, MAIN_PORT_DEFAULT
from kvtcp.errors import RequestError

SCHEME: Final = "kvtcp://"
URL_DEFAULT: Final = f"{SCHEME}{HOST_DEFAULT}:{MAIN_PORT_DEFAULT}"
_FORM: Final = "it is kvtcp://host:port, for example kvtcp://127.0.0.1:8000 or kvtcp://[::1]:8000"


class Address(NamedTuple):
    """The address of a coordinator. `host` is without brackets."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The address in the form `parse_url` reads."""
        return f"{SCHEME}[{self.host}]:{self.port}" if ":" in self.host else f"{SCHEME}{self.host}:{self.port}"


def _refuse(url: object, reason: str) -> RequestError:
    return RequestError(f"{url!r} is not an address of kvtcp: {reason}; {_FORM}")


def _port(url: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65_535):
        raise _refuse(url, f"{text!r} is not a port from 1 to 65535")
    return int(text)


def parse_url(url: str) -> Address:
    """Host and port of a URL. Raises RequestError, which names the fault and has an example."""
    if not isinstance(url, str):
        raise _refuse(url, f"it must be text, not {type(url).__name__}")
    if not url.startswith(SCHEME):
        raise _refuse(url, f"it does not start with {SCHEME}")
    place = url[len(SCHEME) :].removesuffix("/")
    for mark, meaning in (("/", "a path"), ("?", "a query"), ("#", "a fragment"), ("@", "a user")):
        if mark in place:
            raise _refuse(url, f"{meaning} has no meaning here")
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _refuse(url, "the brackets of an IPv6 address do not match")
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _refuse(url, f"{host!r} is not an IPv6 address") from None
        return Address(host, _port(url, rest[1:]) if rest else MAIN_PORT_DEFAULT)
    host, colon, port = place.partition(":")
    if ":" in port:
        raise _refuse(url, "an IPv6 address needs brackets")
    if not host.isprintable() or " " in host:
        raise _refuse(url, f"{host!r} is not the name of a host")
    return Address(host or HOST_DEFAULT, _port(url, port) if colon else MAIN_PORT_DEFAULT)
