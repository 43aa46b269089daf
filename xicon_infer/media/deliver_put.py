"""A file to an address that the client gave, by one PUT: usually a link into its own bucket.

The address is a stranger's, so the rules of fetching hold: only https, only public addresses,
the connection goes to the very address that was checked, and no redirect is followed (a link into
a bucket is signed for one host). The body goes as it is, with its length: no S3 store takes
chunks there.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import quote, urlsplit

from xicon_infer import __version__
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.address import DEFAULT_PORTS, Target, check_url, is_public, split_url
from xicon_infer.media.fetch_network import REAL, Connection, Network
from xicon_infer.media.fetch_types import FetchLimits

if TYPE_CHECKING:
    from xicon_infer.settings import Settings

FIELD = "output.upload_url"
_LIMITS = FetchLimits()
_BLOCK_BYTES = 64 * 1024
_MAX_ANSWER_BYTES = 64 * 1024
_TARGET_SAFE = "!#$%&'()*+,/:;=?@[]~"
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_BYTES_PER_S = 100_000
"""A slower receiver is given up, at the latest after the limit for a video plus this."""


class Put(Protocol):
    """Sends a file to an address."""

    def __call__(self, url: str, path: Path, *, mime: str, stop: Callable[[], None]) -> None:
        """Returns when the receiver has said that it has the whole file.

        Raises:
            PutFailed: it does not; `again` says whether another try may help.
            InvalidRequest: the address is not allowed.
            Cancelled: `stop` raised it.
        """


class PutFailed(MediaError):
    """The receiver did not take the file; the message names neither address nor answer."""

    default_code = "UPLOAD_FAILED"

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(f"'{FIELD}' did not take the video: {why}", field=FIELD)
        self.again = again


def plain_url(url: str) -> str:
    """Returns an address without its query and fragment, which hold the signature."""
    return url.split("#", 1)[0].split("?", 1)[0]


def putter(
    limits: FetchLimits = _LIMITS, *, network: Network = REAL, https_only: bool = True
) -> Put:
    """Returns what sends a file to an address under the rules for URLs.

    Args:
        limits: ports, allowed hosts and times, as for fetching.
        network: sockets and name server.
        https_only: False takes http too, for closed networks.
    """
    rules = replace(limits, require_https=https_only or limits.require_https)

    def put(url: str, path: Path, *, mime: str, stop: Callable[[], None]) -> None:
        check_url(url, FIELD, cast("Settings", rules))
        target = split_url(url, FIELD, cast("Settings", rules))
        try:
            _exchange(url, target, path, mime, _Sending(rules, network, stop))
        except TimeoutError as error:
            raise PutFailed("it does not answer in time", again=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise PutFailed("the connection broke", again=True) from error

    return put


class _Sending:
    """Limits and clock of one PUT."""

    def __init__(self, limits: FetchLimits, network: Network, stop: Callable[[], None]) -> None:
        self.limits, self.network, self.stop = limits, network, stop
        self.until = network.now() + limits.video_s

    def left_s(self, most: float) -> float:
        """Returns how long the next wait may be; raises TimeoutError when time is up."""
        self.stop()
        left = self.until - self.network.now()
        if left <= 0:
            raise TimeoutError
        return min(left, most)


def _exchange(url: str, target: Target, path: Path, mime: str, sending: _Sending) -> None:
    size = path.stat().st_size
    sending.until += size / _BYTES_PER_S
    connection = _connect(target, sending)
    try:
        client = http.client.HTTPConnection(target.host, target.port)
        client.sock = cast("Any", connection)
        connection.settimeout(sending.left_s(sending.limits.gap_s))
        client.putrequest("PUT", _request_target(url), skip_host=True, skip_accept_encoding=True)
        for name, value in _headers(target, mime, size):
            client.putheader(name, value)
        client.endheaders()
        cut_off = _send(client, connection, path, sending)
        # The receiver of a large file may need a while to store it.
        connection.settimeout(sending.left_s(3 * sending.limits.gap_s))
        answer = client.getresponse()
        answer.read(_MAX_ANSWER_BYTES)
        _check_status(answer.status, cut_off)
    finally:
        connection.close()


def _send(
    client: http.client.HTTPConnection, connection: Connection, path: Path, sending: _Sending
) -> bool:
    """Sends the file; returns True if the receiver hung up before its end."""
    try:
        for block in _blocks(path):
            connection.settimeout(sending.left_s(sending.limits.gap_s))
            client.send(block)
    except (BrokenPipeError, ConnectionResetError):
        return True  # it may have said why
    return False


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _check_status(status: int, cut_off: bool) -> None:
    if 200 <= status < 300:
        if cut_off:
            raise PutFailed("it hung up before the end", again=True)
        return
    if 300 <= status < 400:
        raise PutFailed("it redirects, and redirects are not followed", again=False)
    expired = "; the link may have expired" if status in (401, 403) else ""
    raise PutFailed(f"it answered {status}{expired}", again=status in _RETRIED)


def _connect(target: Target, sending: _Sending) -> Connection:
    """Returns a connection to the first address of the host that answers; all must be public."""
    limits, network = sending.limits, sending.network
    try:
        addresses = network.resolve(target.host, sending.left_s(limits.dns_s))
    except socket.gaierror as error:
        temporary = error.errno == socket.EAI_AGAIN
        raise PutFailed("its host is not known", again=temporary) from None
    if not limits.allow_private_urls and not all(map(is_public, addresses)):
        message = f"URL host is not allowed for '{FIELD}'"
        raise InvalidRequest(message, field=FIELD, code="URL_BLOCKED")
    server_hostname = target.host if target.scheme == "https" else None
    fault: OSError = OSError("no address")
    for address in addresses:
        timeout_s = sending.left_s(limits.connect_s)
        try:
            return network.connect(address, target.port, timeout_s, server_hostname)
        except OSError as error:
            fault = error
    raise fault


def _headers(target: Target, mime: str, size: int) -> list[tuple[str, str]]:
    host = f"[{target.host}]" if ":" in target.host else target.host
    if target.port != DEFAULT_PORTS[target.scheme]:
        host = f"{host}:{target.port}"
    return [
        ("Host", host),
        ("User-Agent", f"xicon-infer/{__version__}"),
        ("Content-Type", mime),
        ("Content-Length", str(size)),
        ("Connection", "close"),
    ]


def _request_target(url: str) -> str:
    """Returns path and query as they are sent: other scripts' letters escaped."""
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return quote((parts.path or "/") + query, safe=_TARGET_SAFE + "%")
