"""One file over HTTP: redirects followed with care, tried again where that may help.

The transport is the standard library's `http.client` on connections opened here, to addresses
that were checked. So no proxy, netrc or cookie takes part, and every single wait is bounded.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import socket
import ssl
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urljoin, urlsplit

from xicon_infer import __version__
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.address import DEFAULT_PORTS, Target, check_url, split_url
from xicon_infer.media.fetch_body import ENCODINGS, Broken, Wire, decoded, read_blocks
from xicon_infer.media.fetch_network import Connection, may_connect
from xicon_infer.media.fetch_sink import Intake, Sink

if TYPE_CHECKING:
    from xicon_infer.settings import Settings

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRIED = frozenset({408, 425, 429})
_RETRIED_FROM = 500
_TARGET_SAFE = "!#$%&'()*+,/:;=?@[]~"
_HINTS = {
    401: "the link needs a login; give one that is open, for example a signed one",
    403: "the link may have expired; make a new one",
    404: "check the link",
    410: "the file was taken away; give another link",
}


def download(url: str, sink: Sink, intake: Intake) -> int:
    """Fetches one address into a file and returns how many tries it took.

    Args:
        url: http or https; checked here, like every address that it redirects to.
        sink: takes the bytes, decoded where the server compressed them.
        intake: limits, clock and switch.

    Raises:
        InvalidRequest: URL_INVALID, URL_SCHEME or URL_BLOCKED, of the address or a redirect.
        MediaError: FETCH_FAILED, FETCH_TIMEOUT, MEDIA_TOO_LARGE or DISK_FULL.
        Cancelled: the switch is set.
    """
    names: dict[str, list[str]] = {}
    waits_s = intake.limits.retry_waits_s
    tries = 1
    while True:
        try:
            _follow(url, sink, intake, names)
            return tries
        except Broken as error:
            if tries > len(waits_s):
                raise _failed(intake, f"{error} ({tries} tries)", error.code) from error
            asked_s = min(error.wait_s, intake.limits.max_retry_after_s)
        _wait(max(waits_s[tries - 1], asked_s), intake)
        sink.restart()
        tries += 1


def _wait(seconds: float, intake: Intake) -> None:
    intake.network.pause(min(seconds, intake.left_s()), intake.stop)
    intake.check()
    intake.left_s()


def _follow(url: str, sink: Sink, intake: Intake, names: dict[str, list[str]]) -> None:
    """Makes one try: the address, then wherever it redirects to."""
    for _ in range(intake.limits.max_redirects + 1):
        settings = cast("Settings", intake.limits)  # has the settings that are read
        check_url(url, intake.field, settings)
        target = split_url(url, intake.field, settings)
        connection = _connect(target, intake, names)
        try:
            location = _exchange(url, target, connection, sink, intake)
        except ssl.SSLError as error:
            raise Broken("the encrypted connection broke") from error
        except (OSError, http.client.HTTPException) as error:
            raise Broken("the connection broke before the end") from error
        finally:
            connection.close()
        if location is None:
            return
        url = _next(url, location, intake)
    limit = intake.limits.max_redirects
    raise _failed(intake, f"the address redirects more than {limit} times")


def _next(url: str, location: str, intake: Intake) -> str:
    """Returns the absolute address of a redirect; never one from https to http."""
    try:
        after = urljoin(url, location)
        down = urlsplit(url).scheme == "https" and urlsplit(after).scheme == "http"
    except ValueError:
        message = f"URL for '{intake.field}' redirects to a malformed one"
        raise InvalidRequest(message, field=intake.field, code="URL_INVALID") from None
    if down:
        message = f"URL for '{intake.field}' redirects from https to http"
        raise InvalidRequest(message, field=intake.field, code="URL_BLOCKED")
    return after


def _connect(target: Target, intake: Intake, names: dict[str, list[str]]) -> Connection:
    """Returns a connection to the first address of a host that answers.

    A name is looked up once: a later answer, which may be a trap, is never asked for.
    """
    if target.host not in names:
        names[target.host] = _public_addresses(target.host, intake)
    server_hostname = target.host if target.scheme == "https" else None
    fault: OSError | None = None
    for address in names[target.host]:
        intake.check()
        timeout_s = min(intake.limits.connect_s, intake.left_s())
        try:
            return intake.network.connect(address, target.port, timeout_s, server_hostname)
        except ssl.SSLCertVerificationError as error:
            message = "the certificate of its server is not valid; use a server with a valid one"
            raise _failed(intake, message) from error
        except OSError as error:
            fault = error
    code = "FETCH_TIMEOUT" if isinstance(fault, TimeoutError) else "FETCH_FAILED"
    raise Broken("its server cannot be reached", code=code) from fault


def _public_addresses(host: str, intake: Intake) -> list[str]:
    """Returns the addresses of a host, all of them public; one that is not condemns them all."""
    intake.check()
    timeout_s = min(intake.limits.dns_s, intake.left_s())
    try:
        addresses = intake.network.resolve(host, timeout_s)
    except TimeoutError as error:
        raise Broken("the name server does not answer", code="FETCH_TIMEOUT") from error
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise Broken("the name server does not answer") from error
        addresses = []
    if not addresses:
        raise _failed(intake, "its host is not known; check the link")
    if not intake.limits.allow_private_urls and not all(map(may_connect, addresses)):
        message = f"URL host is not allowed for '{intake.field}'"
        raise InvalidRequest(message, field=intake.field, code="URL_BLOCKED")
    return addresses


def _exchange(
    url: str, target: Target, connection: Connection, sink: Sink, intake: Intake
) -> str | None:
    """Sends the request and takes the answer; returns where it redirects to, or None."""
    client = http.client.HTTPConnection(target.host, target.port)
    wire = Wire(connection, intake)
    client.sock = cast("Any", wire)
    connection.settimeout(min(intake.limits.gap_s, intake.left_s()))
    client.putrequest("GET", _request_target(url), skip_host=True, skip_accept_encoding=True)
    for name, value in _headers(target):
        client.putheader(name, value)
    client.endheaders()
    answer = client.getresponse()
    wire.head_done()
    if answer.status in _REDIRECTS:
        return _location(answer, intake)
    _check_status(answer, intake)
    encoding = answer.getheader("Content-Encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise _failed(intake, "its server sends it in a compression that was not asked for")
    for block in decoded(read_blocks(answer, sink), encoding):
        sink.write(block)
    return None


def _headers(target: Target) -> list[tuple[str, str]]:
    host = f"[{target.host}]" if ":" in target.host else target.host
    if target.port != DEFAULT_PORTS[target.scheme]:
        host = f"{host}:{target.port}"
    return [
        ("Host", host),
        ("User-Agent", f"xicon-infer/{__version__}"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]


def _request_target(url: str) -> str:
    """Returns path and query as they are sent: other scripts' letters escaped."""
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return quote((parts.path or "/") + query, safe=_TARGET_SAFE)


def _location(answer: http.client.HTTPResponse, intake: Intake) -> str:
    location = answer.getheader("Location")
    if not location:
        raise _failed(intake, "the address redirects to nowhere")
    # http.client reads headers as Latin-1; what servers send there is UTF-8.
    return quote(location.encode("latin-1"), safe=_TARGET_SAFE)


def _check_status(answer: http.client.HTTPResponse, intake: Intake) -> None:
    status = answer.status
    if status == 200:
        return
    if status in _RETRIED or status >= _RETRIED_FROM:
        wait_s = retry_after_s(answer.getheader("Retry-After", ""))
        raise Broken(f"its server answered {status}", wait_s=wait_s)
    hint = _HINTS.get(status, "check the link")
    raise _failed(intake, f"its server answered {status}; {hint}")


def retry_after_s(text: str) -> float:
    """Returns the seconds that a Retry-After header asks for; 0 for none or nonsense."""
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _failed(intake: Intake, text: str, code: str = "FETCH_FAILED") -> MediaError:
    return MediaError(
        f"'{intake.field}' could not be fetched: {text}", field=intake.field, code=code
    )
