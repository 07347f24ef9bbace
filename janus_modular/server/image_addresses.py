"""Fetching an image from the public Internet, and from nowhere else.

A request that names an address must not reach what only this machine reaches: the name is resolved once,
every resolved address must be public, and the connection goes to the address that was checked. Redirects are
followed by the same rules; proxies of the environment are not used, for they would resolve the name again.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from functools import cache
from http.client import HTTPConnection, HTTPException
from ipaddress import IPv4Address, IPv6Address, ip_address
from threading import Timer
from urllib.parse import SplitResult, urljoin, urlsplit

from janus_modular.errors import ImageError
from janus_modular.foreign import printable, reason

REDIRECTS = 3
TIME = 10.0
"""Seconds for all of a download."""

REDIRECTED = (301, 302, 303, 307, 308)

Address = IPv4Address | IPv6Address


def fetch_image(url: str, *, max_bytes: int) -> bytes:
    """Return what an http or https address holds.

    Raises:
        ImageError: the address is not public, does not answer in time, or holds more than ``max_bytes``.
    """
    deadline = time.monotonic() + TIME
    for _ in range(REDIRECTS + 1):
        if time.monotonic() >= deadline:
            raise _too_slow()
        content = _get(url, max_bytes, deadline)
        if isinstance(content, bytes):
            return content
        url = content
    raise ImageError(f"image_url: more than {REDIRECTS} redirects. Send the image as a data URI.")


def public_address(host: str, port: int) -> str:
    """Resolve a host; return one of its addresses.

    Raises:
        ImageError: it has none, or one of them is not public: loopback, private, link-local, ...
    """
    name = printable(host, most=200)
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError(f"image_url: '{name}' has no address: {reason(error)}") from error
    addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in resolved]
    if not addresses or not all(map(is_public, addresses)):
        raise ImageError(
            f"image_url: '{name}' is not on the public Internet; expected a public address. Send the image as"
            " a data URI."
        )
    return str(addresses[0])


def is_public(address: Address) -> bool:
    """Return True if an address, and an IPv4 address inside it, is on the public Internet."""
    inner = (address.ipv4_mapped or address.sixtofour) if isinstance(address, IPv6Address) else None
    if inner is not None:
        return is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _get(url: str, max_bytes: int, deadline: float) -> bytes | str:
    """Return the content of an address, or the address that it redirects to."""
    parts = _checked(url)
    host, is_https = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_https else 80)
    connection = (PinnedTlsConnection if is_https else PinnedConnection)(host, port)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.pin(public_address(host, port), deadline)
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "janus-modular"})
        response = connection.getresponse()
        if response.status in REDIRECTED and (location := response.headers.get("location")):
            return urljoin(url, location)
        if response.status != 200:
            raise ImageError(f"image_url: the address answered with status {response.status}; expected 200.")
        content = response.read(max_bytes + 1)
    except (OSError, HTTPException, ValueError) as error:
        if time.monotonic() >= deadline:
            raise _too_slow() from error
        raise ImageError(f"image_url: the address cannot be read: {reason(error)}") from error
    finally:
        connection.close()
    if len(content) > max_bytes:
        raise ImageError(f"image_url: more than {max_bytes:,} bytes. Scale the image down first.")
    return content


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is no number
        is_valid = False
    if not is_valid or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise ImageError("image_url: expected a valid http or https address.")
    if parts.username is not None or parts.password is not None:
        raise ImageError("image_url: expected an address without a user name and password.")
    return parts


class PinnedConnection(HTTPConnection):
    """A connection to an address that was checked, whatever the host's name resolves to by then."""

    address = ""
    deadline = 0.0
    _timer: Timer | None = None
    _twin: socket.socket | None = (
        None  # of the same connection, for the timer: TLS takes the first socket away
    )

    def pin(self, address: str, deadline: float) -> None:
        """Connect to this address, and end the connection at ``deadline``, whatever is still to come."""
        self.address, self.deadline = address, deadline

    def connect(self) -> None:
        """Open the connection."""
        seconds = max(self.deadline - time.monotonic(), 0.001)
        self.sock = socket.create_connection((self.address, self.port), seconds)
        self._twin = self.sock.dup()
        self._timer = Timer(seconds, _shut, [self._twin])
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Close the connection."""
        if self._timer is not None:
            self._timer.cancel()
        if self._twin is not None:
            self._twin.close()
        super().close()


class PinnedTlsConnection(PinnedConnection):
    """The same in TLS: the certificate must be that of the host's name."""

    def connect(self) -> None:
        """Open the connection."""
        super().connect()
        self.sock = tls_context().wrap_socket(self.sock, server_hostname=self.host)


@cache
def tls_context() -> ssl.SSLContext:
    """Return the context that checks certificates by those of the system."""
    return ssl.create_default_context()


def _too_slow() -> ImageError:
    return ImageError(f"image_url: the address took more than {TIME:g} seconds.")


def _shut(connected: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        connected.shutdown(socket.SHUT_RDWR)
